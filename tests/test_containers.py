"""What the source `files` makes of every kind of file: rows, cells, text, or a name and a reason."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from pretrain import engine
from pretrain.core.errors import PretrainError, PretrainWarning
from pretrain.corpus.sources import Files, HubDataset, Images, Series, Skipped, read
from pretrain.recipe import check

ROWS = [{"id": "7", "body": 'one, or "two"\nlines', "label": "a"}, {"id": "8", "body": "three", "label": "b"}]
CSV = 'id,body,label\n7,"one, or ""two""\nlines",a\n\n8,three,b\n'


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data) if isinstance(data, bytes) else path.write_text(data, encoding="utf-8")
    return path


def collect(where, **fields):
    skipped = Skipped()
    return list(read(Files(str(where), **fields), skipped)), skipped


def table(ending):
    """The rows as a file of that ending."""
    import pyarrow
    import pyarrow.feather
    import pyarrow.orc
    import pyarrow.parquet

    arrow, sink = pyarrow.Table.from_pylist(ROWS), pyarrow.BufferOutputStream()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    text = {
        ".csv": CSV, ".tsv": CSV.replace(",", "\t").replace("one\t", "one,"), ".jsonl": lines, ".ndjson": "\n" + lines,
        ".json": json.dumps(ROWS, indent=2),
    }  # fmt: skip
    if ending in text:
        return text[ending].encode()
    if ending == ".arrow":
        with pyarrow.ipc.new_stream(sink, arrow.schema) as writer:
            writer.write_table(arrow)
    else:
        module = {
            ".parquet": pyarrow.parquet.write_table,
            ".feather": pyarrow.feather.write_feather,
            ".orc": pyarrow.orc.write_table,
        }
        module[ending](arrow, sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "ending", [".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".feather", ".arrow", ".orc"]
)
def test_the_column_is_the_text_of_every_table_and_the_others_stay_beside_it(tmp_path, ending):
    found, skipped = collect(put(tmp_path / f"x{ending}", table(ending)), text="body")
    assert [(d["text"], d["label"], d["id"]) for d in found] == [(r["body"], r["label"], r["id"]) for r in ROWS]
    assert all("body" not in d and d["domain"] == "x" for d in found) and not skipped.reasons
    with pytest.raises(PretrainError, match=r"no column 'bodi' \(did you mean 'body'\?\); accepted: body, id, label"):
        collect(tmp_path / f"x{ending}", text="bodi")


NAMED = {
    "csv": ("x.csv", 'text,n\n"one\ntwo\n",1\n\n' + "x" * 80 + ",2\nthree,3\n,4\nfive,5\n", [":2", ":7", ":9"], ":8"),
    "tsv without a header": ("x.tsv", "one\t1\n\t2\nthree\t3\n", [":1", ":3"], ":2"),
    "jsonl": ("x.jsonl", '{"text": "one"}\n\n{"text": ""}\n{"text": "three"}\n', [":1", ":4"], ":3"),
    "array": ("x.json", '[{"text": "one"}, {"text": ""}, {"text": "three"}]', [", item 1", ", item 3"], ", item 2"),
    "parquet": ("x.parquet", ["one", "", "three"], [", row 1", ", row 3"], ", row 2"),
    "notebook": ("x.ipynb", json.dumps({"cells": [{"cell_type": "code", "source": s} for s in ("1", "", "3")]}), [", cell 1", ", cell 3"], ", cell 2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMED)
def test_a_document_of_a_table_is_named_by_where_its_row_stands_as_messages_are(tmp_path, kind):
    name, content, places, empty = NAMED[kind]
    path = tmp_path / name
    if isinstance(content, list):
        pyarrow.parquet.write_table(pyarrow.table({"text": content}), path)
    else:
        put(path, content)
    skipped = Skipped(longest=60 if kind == "csv" else 10_000)
    found = list(read(Files(str(path), text="0" if "without" in kind else "text"), skipped))
    assert [document["id"] for document in found] == [f"{path}{place}" for place in places]
    assert skipped.names["empty"] == [f"{path}{empty}"]


def test_answers_of_a_conversation_are_named_by_its_line(tmp_path):
    turns = [{"role": role, "content": word} for word in "ab" for role in ("user", "assistant")]
    path = put(tmp_path / "x.jsonl", "\n" + json.dumps({"text": turns}) + "\n")
    found, _ = collect(path)
    assert [(document["id"], document["group"]) for document in found] == [
        (f"{path}:2:0", f"{path}:2"), (f"{path}:2:1", f"{path}:2"),
    ]  # fmt: skip


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
def test_tables_and_text_may_be_compressed(tmp_path, ending, pack):
    put(tmp_path / f"x.csv{ending}", pack.compress(CSV.encode()))
    put(tmp_path / f"y.txt{ending}", pack.compress("fünf".encode()))
    found, _ = collect(tmp_path, text="body")
    assert [(d["text"], d["domain"]) for d in found] == [(ROWS[0]["body"], "x"), ("three", "x"), ("fünf", "txt")]
    put(tmp_path / f"y.txt{ending}", pack.compress(b"five" * 999)[:-9])
    with pytest.raises(PretrainError, match=f"y.txt{ending}: cannot be read"):
        collect(tmp_path, text="body")


def test_excels_mark_semicolons_and_tables_without_a_header_are_read(tmp_path):
    found, _ = collect(put(tmp_path / "a.csv", "\ufeffbody;n\nein Satz, lang;1\n"), text="body")
    assert [(d["text"], d["n"]) for d in found] == [("ein Satz, lang", "1")]
    found, _ = collect(put(tmp_path / "b.csv", "3,good\n4,bad\n"), text="1")
    assert [(d["text"], d["0"]) for d in found] == [("good", "3"), ("bad", "4")]
    with pytest.raises(PretrainError, match="c.csv:1: two columns are named 'a'"):
        collect(put(tmp_path / "c.csv", "a,a\nx,y\n"), text="a")


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_the_separator_of_a_table_is_the_mark_of_its_first_line_that_stands_outside_of_quotes(tmp_path, mark):
    others = "".join(sorted({",", ";", "|"} - {mark}))
    quoted = f'"body{mark}{others}"{mark}n\n"one{mark} {others}"{mark}x\n'
    found, _ = collect(put(tmp_path / "a.csv", quoted), text=f"body{mark}{others}")
    assert [(d["text"], d["n"]) for d in found] == [(f"one{mark} {others}", "x")]
    found, _ = collect(put(tmp_path / "b.csv", f"body{mark}n\nat 10:30{mark}x\n"), text="body")
    assert [(d["text"], d["n"]) for d in found] == [("at 10:30", "x")]
    put(tmp_path / "c.csv", f"load{mark}wind\n1{mark}5\n2{mark}6\n")
    assert [d["series"] for d in read(Series(str(tmp_path / "c.csv")))] == [[[1, 5], [2, 6]]]


def test_a_table_whose_header_is_not_utf_8_is_refused_or_passed_over(tmp_path):
    path = put(tmp_path / "a.csv", b"text,gr\xf6\xdfe\na,1\n")
    with pytest.raises(PretrainError, match=r"a.csv:1: byte 0xf6 is not UTF-8; accepted: text in UTF-8"):
        collect(path)
    found, skipped = collect(path, on_error="skip")
    assert not found and skipped.reasons == {"lines with bad bytes": 1}


def test_arrays_of_texts_objects_with_the_column_and_lines_named_json_are_rows(tmp_path):
    put(tmp_path / "a.json", '["one", "two"]')
    put(tmp_path / "b.json", '{"text": "three", "label": 1}')
    put(tmp_path / "c.json", '{"text": "four"}\n{"text": "five"}\n')
    put(tmp_path / "settings.json", '{\n  // a comment\n  "strict": true\n}')
    put(tmp_path / "plain.json", '{"name": "x"}')
    found, _ = collect(tmp_path)
    texts = {d["id"].rpartition("/")[2]: d["text"] for d in found}
    assert [texts[f"{name}"] for name in ("a.json, item 1", "a.json, item 2", "b.json, item 1", "c.json:1", "c.json:2")] == [
        "one", "two", "three", "four", "five",
    ]  # fmt: skip
    assert texts["plain.json"] == '{"name": "x"}' and "a comment" in texts["settings.json"]


def test_a_notebook_is_its_cells_on_one_side_of_the_split(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["# A\n", "title"]},
        {"cell_type": "code", "source": "x = 1", "outputs": [{"text": "a secret output"}]},
        {"cell_type": "code", "source": []},
    ]
    found, skipped = collect(put(tmp_path / "n.ipynb", json.dumps({"cells": cells, "nbformat": 4})))
    assert [(d["text"], d["cell"], d["domain"]) for d in found] == [
        ("# A\ntitle", "markdown", "ipynb"), ("x = 1", "code", "ipynb"),
    ]  # fmt: skip
    assert {d["group"] for d in found} == {str(tmp_path / "n.ipynb")} and skipped.reasons == {"empty": 1}
    with pytest.raises(PretrainError, match="m.ipynb:1: no notebook"):
        collect(put(tmp_path / "m.ipynb", "[1]"))
    found, _ = collect(tmp_path, tables="text")
    assert len(found) == 2 and '"cells"' in found[1]["text"]


BAD = {
    "csv line": ("x.csv", b"text,n\na,1\n\nb\nc,3\n", r"x.csv:4 \(row 2\): 1 cells; accepted: 2 cells", "x.csv:4", "bad lines"),
    "csv bytes": ("x.csv", b"text,n\na,1\n\xe9,2\nc,3\n", r"x.csv:3 \(row 2\): byte 0xe9 is not UTF-8", "x.csv:3", "lines with bad bytes"),
    "csv line after a long cell": ("x.csv", b'text,n\n"a\n\na",1\nb\nc,3\n', r"x.csv:5 \(row 2\): 1 cells", "x.csv:5", "bad lines"),
    "csv quote": ("x.csv", b'text,n\na,1\nc,3\n"b,2\n', r"x.csv:4: no row of a table \(unexpected end", "x.csv:4", "bad lines"),
    "jsonl line": ("x.jsonl", b'{"text": "a"}\n\n{"text": \n{"text": "c"}\n', r"x.jsonl:3: not JSON", "x.jsonl:3", "bad lines"),
    "jsonl bytes": ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "c"}\n', r"x.jsonl:2: byte 0xff", "x.jsonl:2", "lines with bad bytes"),
    "jsonl column": ("x.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n{"text": "c"}\n', r"x.jsonl:3 \(row 2\): no column 'text' \(did you mean 'txt'", "x.jsonl:3", "rows without the column 'text'"),
    "jsonl type": ("x.jsonl", b'{"text": "a"}\n{"text": 3}\n{"text": "c"}\n', r"x.jsonl:2 \(row 2\): column 'text' is int, not text", "x.jsonl:2", "rows without text"),
    "array item": ("x.json", b'["a", 4, "c"]', r"x.json, item 2: int", "x.json, item 2", "bad items"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_stops_with_its_line_and_row_or_is_counted(tmp_path, kind):
    name, data, message, place, reason = BAD[kind]
    path = put(tmp_path / name, data)
    with pytest.raises(PretrainError, match=f"{message}.*or on_error: skip"):
        collect(path)
    found, skipped = collect(path, on_error="skip")
    assert [d["text"].strip()[0] for d in found] == ["a", "c"] and skipped.reasons == {reason: 1}
    assert skipped.names[reason] == [str(tmp_path / place)]


def test_a_text_file_with_bad_bytes_stops_with_its_line_or_is_counted(tmp_path):
    put(tmp_path / "a.txt", b"one\ntwo\n" + b"caf\xe9\n")
    put(tmp_path / "b.txt", "good")
    with pytest.raises(
        PretrainError, match=r"a.txt:3: byte 0xe9 is not UTF-8; accepted: text in UTF-8, or on_error: skip"
    ):
        collect(tmp_path)
    found, skipped = collect(tmp_path, on_error="skip")
    assert [d["text"] for d in found] == ["good"] and skipped.names == {"not UTF-8": [f"{tmp_path}/a.txt:3"]}


def test_other_containers_and_binaries_are_named_and_alone_they_are_refused(tmp_path):
    put(tmp_path / "a.txt", "text")
    for name, data in (
        ("b.docx", b"PK\3\4 text"),
        ("c.xlsx", b"PK\3\4"),
        ("d.bin", b"\1\2\3\4"),
        ("e.pkl", b"\x80\4."),
    ):
        put(tmp_path / name, data)
    found, skipped = collect(tmp_path)
    assert [d["text"] for d in found] == ["text"]
    assert skipped.names == {
        reason: [str(tmp_path / name)]
        for reason, name in {
            "a document (.docx)": "b.docx", "a workbook (.xlsx)": "c.xlsx", "binary": "d.bin", "a pickle, which is never read (.pkl)": "e.pkl",
        }.items()
    }  # fmt: skip
    with pytest.raises(PretrainError, match=r"c.xlsx is a workbook \(.xlsx\); accepted: text, or one of .jsonl"):
        collect(tmp_path / "c.xlsx")
    with pytest.raises(PretrainError, match=r"text 'body': there is no table at"):
        collect(tmp_path, text="body")


SECRETS = (
    ".env",
    "prod.env",
    "server.pem",
    "id_rsa",
    "credentials",
    "credentials.json",
    ".netrc",
    "KEY.PEM",
    ".ssh/config",
)


def test_hidden_files_and_secrets_are_left_out_unless_a_field_asks(tmp_path):
    put(tmp_path / "a.txt", "seen")
    for name in (*SECRETS, ".hidden.txt", ".notes/b.txt", "deep/.c.txt", ".env.example"):
        put(tmp_path / name, f"text of {name}")

    def texts(where=tmp_path, **fields):
        return {d["text"].removeprefix("text of ") for d in collect(where, tables="text", **fields)[0]}

    hidden = {".hidden.txt", ".notes/b.txt", "deep/.c.txt", ".env.example"}
    assert texts() == {"seen"} == texts(tmp_path / "**" / "*")
    assert texts(hidden=True) == {"seen"} | hidden
    assert texts(hidden=True, secrets=True) == {"seen"} | hidden | set(SECRETS)
    assert texts(secrets=True) == {"seen"} | {name for name in SECRETS if not name.startswith(".")}
    assert texts(tmp_path / ".hidden.txt") == {".hidden.txt"} and texts(tmp_path / ".n*" / "*") == {".notes/b.txt"}
    with pytest.raises(PretrainError, match="id_rsa' looks like a secret; accepted: another file, or secrets: true"):
        collect(tmp_path / "id_rsa")
    _, skipped = collect(tmp_path)
    assert skipped.reasons == {"secret-looking": len(SECRETS), "hidden": 4}  # a folder counts once
    assert (
        str(tmp_path / ".env") in skipped.names["secret-looking"] and f"{tmp_path}/.notes/" in skipped.names["hidden"]
    )


def test_what_a_modalitys_source_passes_over_has_its_name(tmp_path):
    put(tmp_path / "a.png", "no image")
    put(tmp_path / "b.heic", b"\0")
    put(tmp_path / "._c.png", "a mac's")
    skipped = Skipped()
    assert list(read(Images(str(tmp_path)), skipped)) == []
    assert {reason: [name.rpartition("/")[2] for name in names] for reason, names in skipped.names.items()} == {
        "no image": ["a.png"], "other endings (.heic)": ["b.heic"], "hidden": ["._c.png"],
    }  # fmt: skip


def test_the_list_of_names_is_bounded_and_the_count_is_not(tmp_path):
    for number in range(30):
        put(tmp_path / f"{number}.bin", b"\0")
    put(tmp_path / "a.txt", "text")
    _, skipped = collect(tmp_path)
    facts = skipped.facts()
    assert facts["binary"]["count"] == 30 and len(facts["binary"]["names"]) == 20
    assert str(skipped).startswith("30 binary (") and str(skipped).endswith(", …)")


STAGES = [
    {"stage": "data", "sources": [{"files": "text"}]},
    {"stage": "tokenizer", "corpus": "data", "vocab_size": 300},
    {"stage": "train", "corpus": "data", "tokenizer": "tokenizer", "budget": {"steps": 1}, "length": 16, "model": {
        "family": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16}},
    {"stage": "evaluate", "corpus": "data", "checkpoint": "train"},
]  # fmt: skip


def test_a_corpus_says_what_it_passed_over_and_a_split_that_is_needed_and_empty_is_told_before_training(
    tmp_path, monkeypatch
):
    from pretrain.report.page import write

    monkeypatch.chdir(tmp_path)
    for number in range(3):
        put(tmp_path / "text" / f"{number}.txt", f"text number {number} " * 9)
    put(tmp_path / "text" / "x.bin", b"\0")
    put(tmp_path / "text" / ".env", "KEY=1")
    said = []
    with pytest.raises(
        PretrainError,
        match=r"evaluate: the corpus 'data' has no test documents, which this stage needs \(3 documents in all\); accepted: more documents, pieces of them \(a source's pieces: 5000\), or a larger share \(test: 0.3\)",
    ):
        engine.run(check({"stages": STAGES}), say=said.append)
    info = json.loads((tmp_path / "runs" / "run" / "data" / "corpus" / "corpus.json").read_text())
    assert info["passed_over"] == {
        "secret-looking": {"group": "looks secret", "count": 1, "names": ["text/.env"]},
        "binary": {"group": "files left out", "count": 1, "names": ["text/x.bin"]},
    }  # fmt: skip
    lines = [line.removeprefix("[data] ") for line in said]
    assert "passed over: 1 secret-looking (text/.env), 1 binary (text/x.bin)" in lines
    assert "no test documents: 3 are too few for a share of 0.02" in lines
    assert not any("[tokenizer]" in line or "[train]" in line for line in said)
    page = write(tmp_path / "runs" / "run").read_text()
    assert "Passed over: 2" in page and page.index("looks secret") < page.index("text/x.bin")
    assert "3 documents read, 3 kept" in page


@pytest.mark.parametrize("model", [{"n_positions": 16}, {"max_position_embeddings": 16}])
def test_a_length_beyond_the_models_positions_is_refused_as_the_recipe_is_read(tmp_path, model):
    train = STAGES[2] | {"model": STAGES[2]["model"] | model}
    check({"stages": [*STAGES[:2], train]})
    with pytest.raises(
        PretrainError,
        match=r"train.length: length 17: this gpt2 has 16 positions; accepted: at most 16, or model.max_pos",
    ):
        check({"stages": [*STAGES[:2], train | {"length": 17}]})
    more = {"stage": "train", "name": "more", "corpus": "data", "init": "train", "budget": {"steps": 1}, "length": 17}
    with pytest.raises(PretrainError, match=r"more.length: length 17: train has 16 positions; accepted: at most 16"):
        check({"stages": [*STAGES[:2], train, more]})
    put(tmp_path / "gpt2" / "config.json", json.dumps({"model_type": "gpt2", "n_positions": 12}))
    with pytest.raises(PretrainError, match=r"more.length: length 17: .*/gpt2 has 12 positions"):
        check({"stages": [*STAGES[:2], more | {"init": str(tmp_path / "gpt2")}]})
    with pytest.raises(PretrainError, match=r"more.init: no checkpoint at"):
        check({"stages": [*STAGES[:2], more | {"init": str(tmp_path)}]})


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A store in memory, and a cache of its own."""
    import fsspec

    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.store.clear()
    for name, data in (
        ("a.txt", b"one"),
        ("deep/b.csv", CSV.encode()),
        (".env", b"KEY=1"),
        ("deep/.c.txt", b"x"),
        ("d.bin", b"\0"),
    ):
        store.pipe(f"/bucket/{name}", data)
    yield store
    store.store.clear()


def test_sources_elsewhere_are_read_through_fsspec_and_fetched_once(bucket, monkeypatch, tmp_path):
    source = Files("memory://bucket", text="body")
    skipped = Skipped()
    found = list(read(source, skipped))
    assert [(d["text"], d["id"]) for d in found] == [
        ("one", "memory://bucket/a.txt"), (ROWS[0]["body"], "7"), ("three", "8"),
    ]  # fmt: skip
    assert skipped.reasons == {"secret-looking": 1, "hidden": 1, "binary": 1} and skipped.names["secret-looking"] == [
        ".env"
    ]
    before = source.state()
    with monkeypatch.context() as patched:
        patched.setattr(type(bucket), "open", None)  # what is in the cache is not fetched again
        assert list(read(source)) == found
    assert source.state() == before
    (copy,) = (tmp_path / "cache" / "remote").glob("*/a.txt")
    copy.write_text("ore")
    with pytest.warns(PretrainWarning, match=rf"{copy} is damaged or was replaced, and is fetched again"):
        assert list(read(source)) == found
    bucket.pipe("/bucket/a.txt", b"two!")
    assert source.state() != before and next(iter(read(source)))["text"] == "two!"
    assert [d["text"] for d in read(Files("memory://bucket/*.txt"))] == ["two!"]
    assert [d["text"] for d in read(Files("memory://bucket/a.txt"))] == ["two!"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("memory://nowhere", r"no files at 'memory://nowhere'|'memory://nowhere' cannot be read"),
        ("s3://bucket/x", r"'s3://bucket/x': needs the package s3fs; accepted: pip install s3fs"),
        ("gs://bucket/x", r"'gs://bucket/x': needs the package gcsfs"),
        ("odd://x", r"'odd://x': fsspec knows no protocol 'odd'; accepted: s3://, gs://, https://, a path"),
        (
            "zip://a::docs/d1.txt",
            r"^'zip://a::docs/d1.txt': zip:// is no place of files; accepted: s3://, gs://, https://, a",
        ),
        ("reference://x", r"reference:// is no place of files"),
        ("jlab://x", r"jlab:// is no place of files"),
        ("asynclocal://x", r"asynclocal:// is no place of files"),
        (
            "ftp://127.0.0.1:9/x",
            r"'ftp://127.0.0.1:9/x' cannot be read \(ConnectionRefusedError: .*\); accepted: a URL",
        ),
        ("hdfs://x", r"'hdfs://x' (cannot be read \(.*\)|needs .*); accepted: "),
        ("sftp://x", r"'sftp://x': needs the package paramiko; accepted: pip install paramiko$"),
        ("smb://x", r"'smb://x': needs the package smbprotocol; accepted: pip install smbprotocol$"),
        ("oss://x", r"'oss://x': needs more than is installed \(.*ossfs.*\); accepted: s3://"),
        ("http://[::1/x", r"'http://\[::1/x' cannot be read \(ValueError: Invalid IPv6 URL\); accepted: a URL"),
        (
            "http://localhost:9/a::b",
            r"'http://localhost:9/a::b' cannot be read \(.*localhost:9/a::b.*\); accepted: a URL",
        ),
        ("https://localhost:9/x.txt", r"'https://localhost:9/x.txt' cannot be read \(.*\); accepted: a URL"),
    ],
)
def test_what_cannot_be_reached_is_one_line(where, message, bucket, monkeypatch):
    for package in ("s3fs", "gcsfs", "paramiko", "smbprotocol", "ossfs"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    for ask in (lambda: list(read(Files(where))), lambda: Files(where).state()):
        with pytest.raises(PretrainError, match=message) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_column_of_conversations_gives_each_answer_with_what_comes_before_it(tmp_path):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Bye"},
             {"from": "gpt", "value": "Until then."}]  # fmt: skip
    rows = [{"chat": turns, "n": 1}, {"chat": [{"role": "user", "content": "alone"}], "n": 2}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    skipped = Skipped()
    documents = list(read(Files(str(tmp_path / "chats.jsonl"), text="chat"), skipped))
    assert skipped.reasons == {"conversations without an answer": 1}
    assert [(d["text"], d["target"]) for d in documents] == [
        ("user: Hi", "Hello."), ("user: Hi\n\nassistant: Hello.\n\nuser: Bye", "Until then."),
    ]  # fmt: skip
    assert documents[0]["group"] == documents[1]["group"] and documents[0]["id"] != documents[1]["id"]
    assert documents[0]["domain"] == "chats"


def test_a_list_that_is_no_conversation_is_still_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"chat": [{"role": "user"}]}\n')
    with pytest.raises(PretrainError, match="column 'chat' is list, not text"):
        list(read(Files(str(tmp_path / "a.jsonl"), text="chat")))


ODD = {
    "far": (
        pyarrow.array([1, 2**62, 3], pyarrow.timestamp("us")),
        r"\(timestamp\[us\]\) holds .*date value out of range",
    ),
    "days": (pyarrow.array([1, 2**30, 3], pyarrow.int32()).cast(pyarrow.date32()), r"\(date32\[day\]\) holds"),
    "time": (pyarrow.array([1, 2**60, 3], pyarrow.duration("s")), r"\(duration\[s\]\) holds what cannot be read"),
    "zone": (
        pyarrow.array([None, 2, None], pyarrow.timestamp("us", tz="Nowhere/No")),
        r"\(timestamp\[us, tz=Nowhere/No\]\) holds what cannot be read",
    ),
    "twice": (
        pyarrow.array([[("a", 1)], [("a", 1), ("a", 2)], None], pyarrow.map_(pyarrow.string(), pyarrow.int8())),
        r"\(map<string, int8.*>\) holds what cannot be read \(a key is given twice\)",
    ),
}


@pytest.mark.promise(
    "What others have written",
    "A value of a Parquet, Arrow or ORC file that Python has none of is one line, by its row.",
)
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("end", ["parquet", "arrow"])
def test_a_value_that_python_has_none_of_is_a_bad_row(tmp_path, kind, end):
    column, message = ODD[kind]
    table = pyarrow.table({"text": ["one", "two", "three"], "odd": column})
    place = tmp_path / f"a.{end}"
    pyarrow.parquet.write_table(table, place) if end == "parquet" else pyarrow.feather.write_feather(table, place)
    with pytest.raises(PretrainError, match=rf"a.{end}, row [12]: column 'odd' {message}.*, or on_error: skip$"):
        list(read(Files(str(place))))
    skipped = Skipped()
    kept = [document["text"] for document in read(Files(str(place), on_error="skip"), skipped)]
    assert skipped.reasons["bad rows"] == 3 - len(kept) and "two" not in kept
    assert kept == ["one", "three"] or kind == "zone"


@pytest.mark.parametrize("end", ["parquet", "arrow"])
def test_two_columns_of_a_name_are_refused_in_tables_of_arrow(tmp_path, end):
    texts = pyarrow.array(["one"])
    table, place = pyarrow.Table.from_arrays([texts, texts, texts], names=["text", "n", "n"]), tmp_path / f"a.{end}"
    if end == "parquet":
        pyarrow.parquet.write_table(table, place)
    else:
        with pyarrow.ipc.new_file(place, table.schema) as file:
            file.write_table(table)
    with pytest.raises(
        PretrainError, match=rf"a.{end}: two columns are named 'n'; accepted: a name of its own for each"
    ):
        list(read(Files(str(place), on_error="skip")))


def test_maps_are_objects_or_lists_of_keys_with_values(tmp_path):
    inner = pyarrow.map_(pyarrow.string(), pyarrow.map_(pyarrow.int32(), pyarrow.string()))
    deep = pyarrow.array([[{"m": [("a", [(1, "b")])]}], None], pyarrow.list_(pyarrow.struct([("m", inner)])))
    table = pyarrow.table({"text": ["one", "two"], "deep": deep})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = [document["deep"] for document in read(Files(str(tmp_path / "a.parquet")))]
    assert rows == [[{"m": {"a": [{"key": 1, "value": "b"}]}}], None]


def test_a_row_that_datasets_cannot_give_is_one_line(tmp_path):
    import datasets

    table = pyarrow.table({"text": ["one", "two"], "odd": ODD["far"][0][:2]})
    datasets.Dataset(table).save_to_disk(tmp_path / "set")
    with pytest.raises(
        PretrainError, match=r"data set '.*set' cannot be read after row 1 \(.*out of range\); accepted: "
    ):
        list(read(HubDataset(str(tmp_path / "set"))))
