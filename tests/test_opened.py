"""Archives are read as folders are, and of HTML, PDF and WARC the text: whole, bounded, and never in silence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from documents_made import WORDS, page, pdf, put, tarred, warc, zipped

from pretrain.core.errors import PretrainError
from pretrain.core.foreign.documents import members
from pretrain.corpus.sources import Files, Skipped, read

LONG = "\n".join(WORDS["en"] * 3 for _ in range(4))
PACKINGS = {
    ".zip": zipped,
    ".tar": tarred,
    ".tgz": lambda files: gzip.compress(tarred(files)),
    ".tar.gz": lambda files: gzip.compress(tarred(files)),
    ".tar.bz2": lambda files: bz2.compress(tarred(files)),
    ".tar.xz": lambda files: lzma.compress(tarred(files)),
    ".tar.zst": lambda files: zstandard.compress(tarred(files)),
}


def collect(where, longest=4_000_000, **fields):
    skipped = Skipped(longest)
    return list(read(Files(str(where), **fields), skipped)), skipped


def parquet(rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink := pyarrow.BufferOutputStream())
    return sink.getvalue().to_pybytes()


FILES = {
    "a.txt": b"plain words",
    "deep/er/b.md.gz": gzip.compress(b"# packed words"),
    "rows.jsonl": b'{"text": "a row", "label": "x"}\n{"text": "another"}\n',
    "rows.csv": b"text,label\nof a table,y\n",
    "rows.parquet": parquet([{"text": "of columns"}]),
    "list.json": json.dumps([{"text": "of a list"}]).encode(),
    "book.ipynb": json.dumps({"cells": [{"cell_type": "markdown", "source": ["a cell"]}]}).encode(),
    "guide.rst": b"Title\n=====\n",
    ".env": b"KEY=1",
    ".hidden/c.txt": b"hidden",
    "node_modules/d.js": b"tool",
    "pic.bin": b"\0\1\2",
    "style.min.css": b"a{}",
}


@pytest.mark.parametrize("ending", PACKINGS)
def test_an_archive_is_read_as_a_folder_of_its_files_is(tmp_path, ending):
    for name, data in FILES.items():
        put(tmp_path / "folder" / name, data)
    archive = put(tmp_path / f"all{ending}", PACKINGS[ending](FILES))

    def plain(documents, root):
        return sorted(
            (d["text"], d["domain"], d["id"].removeprefix(f"{root}/"), d.get("label"), d.get("cell")) for d in documents
        )

    laid, over = collect(tmp_path / "folder")
    packed, skipped = collect(archive)
    assert plain(packed, archive) == plain(laid, tmp_path / "folder") and len(laid) == 9
    assert over.reasons["hidden"] == 1 and over.reasons["binary"] == skipped.reasons["binary"] == 1
    assert skipped.names["secret-looking"] == [f"{archive}/.env"] and "generated" in skipped.reasons
    assert {p.name for p in tmp_path.iterdir()} == {"folder", f"all{ending}"}  # nothing was laid beside it


def test_endings_are_asked_of_the_files_in_an_archive_that_they_name(tmp_path):
    put(tmp_path / "x" / "all.zip", zipped({"a.md": b"one", "b.txt": b"two"}))
    put(tmp_path / "x" / "c.md", "three")
    texts = lambda *ends: sorted(d["text"] for d in collect(tmp_path / "x", suffixes=ends)[0])  # noqa: E731
    assert texts(".md") == ["three"] and texts(".md", ".zip") == ["one", "three"] and texts(".zip") == ["one", "two"]
    assert [d["text"] for d in collect(tmp_path / "x" / "all.zip", suffixes=(".md",))[0]] == ["one"]


def entry(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_names_that_lead_out_and_links_are_refused_and_named(tmp_path):
    files = {"../up.txt": b"x", "/etc/x.txt": b"x", "a/../../b.txt": b"x", "C:/w.txt": b"x", "good.txt": b"good"}
    others = [
        entry("l.txt", tarfile.SYMTYPE, "/etc/passwd"),
        entry("h.txt", tarfile.LNKTYPE, "good.txt"),
        entry("f", tarfile.FIFOTYPE),
    ]
    put(tmp_path / "t.tar", tarred(files, others))
    documents, skipped = collect(tmp_path / "t.tar")
    assert [d["text"] for d in documents] == ["good"]
    assert skipped.reasons == {"names that lead out of their archive": 4, "no regular files": 3}
    link = zipfile.ZipInfo("l.txt")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
        archive.writestr("..\\up.txt", "x")
        archive.writestr("good.txt", "good")
    documents, skipped = collect(tmp_path / "z.zip")
    assert [d["text"] for d in documents] == ["good"]
    assert skipped.reasons == {"names that lead out of their archive": 1, "no regular files": 1}


def test_archives_in_archives_are_named_and_not_opened(tmp_path):
    put(tmp_path / "z.zip", zipped({"in.zip": zipped({"a.txt": b"a"}), "in.tar.gz": b"", "b.txt": b"b"}))
    documents, skipped = collect(tmp_path / "z.zip")
    assert [d["text"] for d in documents] == ["b"] and skipped.reasons == {"archives in archives": 2}


@pytest.mark.parametrize("ending", PACKINGS)
def test_an_archive_that_ends_too_early_is_told_or_counted_in_one_line(tmp_path, ending):
    noise = {f"{n}.txt": bytes(65 + (k * k * n + k // 7) % 26 for k in range(20_000)) for n in range(1, 9)}
    whole = PACKINGS[ending](noise)
    put(tmp_path / "a.txt", "words")
    path = put(tmp_path / f"cut{ending}", whole[: len(whole) * 2 // 3])
    with pytest.raises(PretrainError, match=rf"cut{ending}.*; accepted: a whole archive, or on_error: skip") as error:
        collect(tmp_path)
    assert "\n" not in str(error.value)
    documents, skipped = collect(tmp_path, on_error="skip")
    assert "words" in [d["text"] for d in documents] and 1 <= len(documents) < 9
    assert len(skipped.reasons) == 1 and next(iter(skipped.reasons)).startswith("unreadable")
    assert next(iter(skipped.names.values())) == [str(path)]


def test_a_damaged_file_in_an_archive_costs_that_file_alone(tmp_path):
    data = bytearray(zipped({"a.txt": b"first words", "b.txt": b"second words"}, zipfile.ZIP_STORED))
    data[data.index(b"first")] ^= 1
    put(tmp_path / "z.zip", bytes(data))
    with pytest.raises(PretrainError, match=r"z.zip/a.txt: cannot be read \(Bad CRC-32"):
        collect(tmp_path)
    documents, skipped = collect(tmp_path, on_error="skip")
    assert [d["text"] for d in documents] == ["second words"] and skipped.names == {
        "unreadable (OSError)": [f"{tmp_path}/z.zip/a.txt"]
    }
    whole = bytearray(tarred({"a.txt": b"a", "b.txt": b"b"}))
    whole[1024 + 5] ^= 1  # in the second header: not taken for the end
    put(tmp_path / "z.zip", zipped({"c.txt": b"c"}))
    put(tmp_path / "t.tar", bytes(whole))
    documents, skipped = collect(tmp_path, on_error="skip")
    assert [d["text"] for d in documents] == ["a", "c"] and skipped.names == {
        "unreadable (OSError)": [f"{tmp_path}/t.tar"]
    }


def test_what_a_zip_does_not_show_without_a_password_or_another_decoder_is_named(tmp_path):
    data = bytearray(zipped({"a.txt": b"a", "b.txt": b"b"}, zipfile.ZIP_STORED))
    place = data.index(b"PK\1\2")
    data[place + 8] |= 1  # of the first file: encrypted
    put(tmp_path / "z.zip", bytes(data))
    put(tmp_path / "l.zip", zipped({"c.txt": b"c"}, zipfile.ZIP_LZMA))
    documents, skipped = collect(tmp_path)
    assert [d["text"] for d in documents] == ["b"]
    assert skipped.names == {
        "unreadable (encrypted)": [f"{tmp_path}/z.zip/a.txt"],
        "unreadable (packed in a way that is not read)": [f"{tmp_path}/l.zip/c.txt"],
    }


def test_bombs_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.core.foreign.archives.FREE", 1 << 20)
    zeros = b" " * (3 << 20)
    for ending in PACKINGS:
        if ending != ".tar":
            put(tmp_path / ending / f"b{ending}", PACKINGS[ending]({"a.txt": zeros, "b.txt": zeros}))
            monkeypatch.setattr("pretrain.core.foreign.archives.RATIO", 2)
            with pytest.raises(PretrainError, match=r"more than 1 MiB"):
                collect(tmp_path / ending)
    monkeypatch.undo()
    many = zipped({"a.txt": b"a"})
    listed = many.index(b"PK\5\6") + 12
    put(tmp_path / "m" / "m.zip", many[:listed] + (1 << 30).to_bytes(4, "little") + many[listed + 4 :])
    with pytest.raises(PretrainError, match=r"its list of files is of 1 GiB, where at most 16 MiB are read"):
        collect(tmp_path / "m")
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    put(tmp_path / "n" / "n.tar", name.tobuf() + b"x" * 4096)
    with pytest.raises(PretrainError, match=r"the name of a file in it takes more than 1 MiB"):
        collect(tmp_path / "n")
    monkeypatch.setattr(members, "MOST_FILES", 3)
    put(tmp_path / "f" / "f.tar", tarred({f"{n}.txt": b"x" for n in range(5)}))
    with pytest.raises(PretrainError, match=r"it holds more than 3 files"):
        collect(tmp_path / "f")


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz"])
def test_a_large_file_in_an_archive_is_streamed(tmp_path, monkeypatch, ending):
    """Files beyond `HELD` are read where they lie, each time anew; a table that must be held whole is named."""
    monkeypatch.setattr("pretrain.core.foreign.documents.members.HELD", 1 << 16)
    monkeypatch.setattr("pretrain.core.foreign.archives.HELD", 1 << 16)
    lines = "".join(json.dumps({"text": f"{n} " + "words " * 100}) + "\n" for n in range(12_000)).encode()
    rows = parquet([{"text": f"{n * n * 7919} {n}"} for n in range(20_000)])
    archive = put(tmp_path / f"l{ending}", PACKINGS[ending]({"a.jsonl": lines, "b.parquet": rows, "c.txt": b"end"}))
    collect(put(tmp_path / "small.zip", zipped(FILES)))  # what is imported is there
    tracemalloc.start()
    skipped, count = Skipped(100_000), 0
    for document in read(Files(str(archive), on_error="skip"), skipped):  # noqa: B007
        count += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 12_001 and document["text"] == "end" and len(lines) > 7e6 and peak < 4e6
    assert skipped.names == {"bad files": [f"{archive}/b.parquet"]}


def test_of_a_page_the_text_is_taken_in_the_encoding_that_it_names(tmp_path):
    pytest.importorskip("trafilatura")
    text = "\n".join(f"{WORDS['de']} {n}. " * 3 for n in range(3))
    for name, data in (
        ("a.html", page(text)),
        ("b.htm", page(text, "iso-8859-1")),
        ("c.xhtml", b"\xef\xbb\xbf" + page(text, named=False)),
        ("d.html.gz", gzip.compress(page(text, "cp1252"))),
        ("e.html", page(text, "koi8-r".replace("koi8-r", "iso-8859-15"))),
    ):
        put(tmp_path / name, data)
    documents, skipped = collect(tmp_path)
    assert not skipped.reasons and [d["domain"] for d in documents] == ["html", "htm", "xhtml", "html", "html"]
    for document in documents:
        assert document["text"].count("Es wäre schön") == 9
        assert "Menu" not in document["text"] and "<p>" not in document["text"] and "rights" not in document["text"]
    (plain,), _ = collect(tmp_path / "a.html", pages="markup")
    assert plain["text"].encode() == page(text)


def test_pages_that_cannot_be_read_or_hold_no_text_are_counted_with_their_reason(tmp_path):
    pytest.importorskip("trafilatura")
    put(tmp_path / "good.html", page(LONG))
    put(tmp_path / "bad.html", page(LONG).replace(b"house", b"ho\xffuse", 1))
    put(tmp_path / "menu.html", b"<html><body><script>let a = 1</script></body></html>")
    put(tmp_path / "none.html", b"\0\1\2\3")
    with pytest.raises(PretrainError, match=r"bad.html:1: byte 0xff is not UTF-8; accepted: a page in the encoding"):
        collect(tmp_path)
    documents, skipped = collect(tmp_path, on_error="skip")
    assert [d["id"] for d in documents] == [str(tmp_path / "good.html")]
    assert skipped.names == {
        "not UTF-8": [f"{tmp_path}/bad.html:1"],
        "documents without text (HTML)": [f"{tmp_path}/menu.html"],
        "binary": [f"{tmp_path}/none.html"],
    }


def test_of_a_pdf_the_pages_are_joined_and_a_long_one_comes_in_pieces(tmp_path):
    pytest.importorskip("pypdf")
    put(tmp_path / "a.pdf", pdf("First page.", "", "Third page."))
    (document,), skipped = collect(tmp_path)
    assert document == {"text": "First page.\n\nThird page.", "id": str(tmp_path / "a.pdf"), "domain": "pdf"}
    put(tmp_path / "z.zip", zipped({"in/a.pdf": (tmp_path / "a.pdf").read_bytes()}))
    (inner,), _ = collect(tmp_path / "z.zip")
    assert inner["text"] == document["text"] and inner["id"].endswith("z.zip/in/a.pdf")
    put(tmp_path / "a.pdf", pdf(*(f"Page {n} of a long one." for n in range(9))))
    pieces, skipped = collect(tmp_path / "a.pdf", longest=60)
    assert len(pieces) > 2 and all(len(piece["text"]) <= 60 for piece in pieces)
    assert {piece["group"] for piece in pieces} == {str(tmp_path / "a.pdf")} and len({p["id"] for p in pieces}) == len(
        pieces
    )
    assert "".join(piece["text"] for piece in pieces).count("of a long one") == 9
    assert skipped.reasons == {"documents cut to 60 characters": 1}


def test_pdfs_without_text_with_a_password_and_broken_ones_are_named(tmp_path):
    pytest.importorskip("pypdf")
    put(tmp_path / "a.txt", "words")
    put(tmp_path / "locked.pdf", pdf("Hidden.", password="secret"))
    put(tmp_path / "owned.pdf", pdf("Only kept from being changed.", password=""))
    put(tmp_path / "scan.pdf", pdf("", ""))
    documents, skipped = collect(tmp_path)
    assert [d["text"] for d in documents] == ["words", "Only kept from being changed."]
    assert skipped.names == {
        "unreadable (encrypted)": [f"{tmp_path}/locked.pdf"],
        "documents without text (PDF: scans, pictures)": [f"{tmp_path}/scan.pdf"],
    }
    whole = pdf("Whole.")
    for name, data in (("cut.pdf", whole[:60]), ("none.pdf", b"%PDF-1.4 text")):
        put(tmp_path / "broken" / name, data)
        with pytest.raises(
            PretrainError, match=rf"{name}: no whole PDF \(.+\): truncated or damaged; accepted: a whole PDF"
        ) as error:
            collect(tmp_path / "broken" / name)
        assert "\n" not in str(error.value)
    documents, skipped = collect(tmp_path, on_error="skip")
    assert len(documents) == 2 and skipped.reasons["broken PDF"] == 2


def test_a_pdf_that_unpacks_to_too_much_is_no_document(tmp_path):
    pytest.importorskip("pypdf")
    bomb = zlib.compress(b" " * (200 << 20), 9)
    data = pdf("Text.").replace(b"/Length", b"/Filter /FlateDecode /Length", 1)
    start = data.index(b"stream\n") + 7
    end = data.index(b"endstream", start)
    head = data[:start].rsplit(b"/Length", 1)
    data = head[0] + b"/Length %d >>\nstream\n" % len(bomb) + bomb + b"\n" + data[end:]
    put(tmp_path / "b.pdf", data)
    tracemalloc.start()
    documents, skipped = collect(tmp_path, on_error="skip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert documents == [] and sum(skipped.reasons.values()) == 1 and peak < 160e6


@pytest.mark.parametrize("packed", [True, False])
def test_of_a_warc_the_pages_are_taken_with_their_addresses(tmp_path, packed):
    pytest.importorskip("warcio"), pytest.importorskip("trafilatura")
    german = "\n".join(f"{WORDS['de']} {n}. " * 3 for n in range(3))
    path = put(
        tmp_path / ("w.warc.gz" if packed else "w.warc"),
        warc(
            [
                ("http://example.org/a", "200 OK", "text/html; charset=utf-8", page(LONG, named=False)),
                ("http://example.org/b", "404 Not Found", "text/html", page("no such page")),
                ("http://example.org/c", "200 OK", "image/png", b"\x89PNG"),
                (
                    "http://example.org/d",
                    "200 OK",
                    "text/html; charset=iso-8859-1",
                    page(german, "iso-8859-1", named=False),
                ),
            ],
            packed,
        ),
    )
    documents, skipped = collect(path)
    assert [(d["url"], d["domain"]) for d in documents] == [(f"http://example.org/{x}", "warc") for x in "ad"]
    assert "Es wäre schön" in documents[1]["text"] and len({d["id"] for d in documents}) == 2
    assert sorted(skipped.reasons.values()) == [1, 1] and all("no page" in reason for reason in skipped.reasons)
    whole = path.read_bytes()
    for cut in (30, len(whole) // 5, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        with pytest.raises(PretrainError, match=r"no whole WARC \(.+\): truncated or damaged"):
            collect(path)
        assert collect(path, on_error="skip")[1].reasons["broken WARC"] == 1
    put(path, gzip.compress(b"words and words\n" * 20) if packed else b"words and words\n" * 20)
    with pytest.raises(PretrainError, match=r"no whole WARC \(.+\).*; accepted: a whole WARC file, or on_error: skip"):
        collect(path)


@pytest.mark.parametrize(
    "package, name, data",
    [("trafilatura", "a.html", b"<p>text</p>"), ("pypdf", "a.pdf", b"%PDF-1.4"), ("warcio", "a.warc", b"WARC/1.0\r\n")],
)
def test_without_a_package_the_extra_is_named(tmp_path, monkeypatch, package, name, data):
    for module in [each for each in sys.modules if each.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    put(tmp_path / name, data)
    put(tmp_path / "b.txt", "words")
    with pytest.raises(
        PretrainError,
        match=rf"{name}: {package} is missing; accepted: pip install 'pretrain\[documents\]', or on_error: skip",
    ):
        collect(tmp_path)
    documents, skipped = collect(tmp_path, on_error="skip")
    assert [d["text"] for d in documents] == ["words"]
    assert skipped.names == {"files that need pip install 'pretrain[documents]'": [f"{tmp_path}/{name}"]}


def test_keys_in_pages_and_archives_are_left_out(tmp_path):
    key = "AKIA" + "ABCDEFGHIJKLMNOP"
    put(tmp_path / "z.zip", zipped({"a.txt": key.encode(), "b.txt": b"words"}))
    documents, skipped = collect(tmp_path)
    assert [d["text"] for d in documents] == ["words"]
    assert skipped.names["holding what looks like a key or a password"][0].startswith(f"{tmp_path}/z.zip/a.txt, line 1")


def test_the_text_of_such_files_is_estimated_from_their_sizes(tmp_path):
    put(tmp_path / "a.txt", b"x" * 1000)
    put(tmp_path / "b.html", page("words " * 2000))
    size = Files(str(tmp_path)).size()
    assert size is not None and 1000 < size.bytes < 1000 + (tmp_path / "b.html").stat().st_size and size.documents == 2
    put(tmp_path / "c.zip", zipped({"a.txt": b"x" * 1000}))
    size = Files(str(tmp_path)).size()
    assert size is not None and size.documents == 0  # not known without reading


def test_real_manuals_are_read(tmp_path):
    """Where Debian's documentation lies: its longest PDF and pages give sentences."""
    pytest.importorskip("pypdf"), pytest.importorskip("trafilatura")
    places = [Path("/usr/share/doc/libtasn1-doc/libtasn1.pdf"), Path("/usr/share/doc/python3/python-policy.html")]
    if not all(place.exists() for place in places):
        pytest.skip("no documentation is installed here")
    for place, words in zip(
        places, ("Abstract Syntax Notation One", "packaging of Python within the Debian"), strict=True
    ):
        (document,), _ = collect(place)
        assert words in document["text"] and len(document["text"]) > 10_000


def test_what_is_read_of_archives_is_the_same_with_every_reading(tmp_path):
    put(tmp_path / "z.tar.gz", gzip.compress(tarred(FILES)))
    source = Files(str(tmp_path))
    assert list(read(source)) == list(read(source))
