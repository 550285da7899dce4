"""`pretrain new` looks into archives and PDF files, which the recipe reads as they lie."""

from __future__ import annotations

import pytest
import yaml
from documents_made import WORDS, page, pdf, put, tarred, zipped

from pretrain.core.errors import PretrainError
from pretrain.corpus.sources import Files, Skipped, read
from pretrain.new.corpora import corpus
from pretrain.new.look import look
from pretrain.new.texts import opened


def texts(language, count):
    """Texts of a language, in letters of Latin-1."""
    return [WORDS[language] * (3 + n % 5) + f"{n}." for n in range(count)]


def source(seen):
    (stage,) = yaml.safe_load(corpus(seen, "pretrain", None))
    (found,) = stage["sources"]
    return found


def read_by(found):
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return [document["text"] for document in read(Files(**fields), Skipped())]


def test_pdfs_and_an_archive_are_prose_and_the_recipe_reads_all_that_is_in_them(tmp_path):
    written = texts("de", 45)
    for n, text in enumerate(written[:5]):
        put(tmp_path / f"{n}.pdf", pdf(text))
    put(tmp_path / "notes.zip", zipped({f"n/{n}.md": text.encode() for n, text in enumerate(written[5:])}))
    put(tmp_path / "odd.zip", zipped({"rows.csv": b"text,label\na,b\n" * 40}))
    seen = look(str(tmp_path))
    assert (seen.kind, seen.languages, seen.endings) == ("prose", ("German",), (".md", ".pdf", ".zip"))
    assert seen.prompts and seen.share and seen.bytes == sum(len(text.encode()) for text in read_by(source(seen)))
    assert "1 archive of tables, to be unpacked first (odd.zip)" in seen.over
    assert source(seen) == {"files": str(tmp_path), "suffixes": [".md", ".pdf", ".zip"], "on_error": "skip"}
    assert len(read_by(source(seen))) == 45


@pytest.mark.parametrize("packed", [zipped, tarred])
def test_an_archive_alone_is_looked_into_whatever_it_holds(packed, tmp_path):
    code = {f"src/{n}.py": b"def f(x):\n    return x + %d\n" % n * 20 for n in range(30)}
    place = tmp_path / ("a.zip" if packed is zipped else "a.tar")
    put(place, packed(code | {"README.md": b"# What it does\n\nIt adds.\n", "index.html": b"<p>It adds.</p>\n"}))
    seen = look(str(place))
    assert (seen.kind, seen.languages) == ("code", ("Python",)) and seen.share
    assert {".py", ".md"} <= {*seen.endings} and len(read_by(source(seen))) == 32
    assert source(seen)["pages"] == "markup"


def test_pages_in_an_archive_are_prose(tmp_path):
    pages = {f"{n}.html": page(text) for n, text in enumerate(texts("en", 30))}
    put(tmp_path / "site.zip", zipped(pages | {"site.js": b"let x = 1\n"}))
    seen = look(str(tmp_path))
    assert (seen.kind, seen.languages, seen.endings) == ("prose", ("English",), (".html", ".zip"))


@pytest.mark.parametrize(("name", "content", "why"), [
    ("rows.zip", zipped({"rows.csv": b"text,label\na,b\n"}), "1 archive of tables, to be unpacked first"),
    ("pictures.zip", zipped({"a.png": b"\x89PNG"}), "1 archive of images, to be unpacked first"),
    ("none.zip", b"PK\x03\x04", "1 archive without text, or damaged"),
    ("program.zip", zipped({"a.exe": b"MZ"}), "1 archive without text, or damaged"),
])  # fmt: skip
def test_an_archive_that_no_recipe_reads_is_named_and_why(name, content, why, tmp_path):
    put(tmp_path / name, content)
    with pytest.raises(PretrainError, match="nothing to learn from") as error:
        look(str(tmp_path))
    assert why in str(error.value) and name in str(error.value)


def test_what_wants_an_extra_says_so(tmp_path, monkeypatch):
    put(tmp_path / "a.pdf", pdf(texts("en", 1)[0]))
    monkeypatch.setattr(opened, "find_spec", lambda name: None)
    with pytest.raises(PretrainError, match=r"1 file that need pip install 'pretrain\[documents\]'"):
        look(str(tmp_path))


def test_of_documents_that_are_not_all_read_each_split_gets_some_all_but_surely(tmp_path, monkeypatch):
    for n, text in enumerate(texts("en", 24)):
        put(tmp_path / f"{n}.pdf", pdf(text))
    known = look(str(tmp_path)).share
    opened.texts_of.cache_clear()
    monkeypatch.setattr(opened, "SECONDS", 0.0)
    assert known <= 0.25 and look(str(tmp_path)).share * 24 >= 4
