"""What others have written never takes more memory than is stated, nor more than seconds to be refused."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from pretrain.core.errors import PretrainError
from pretrain.core.files import atomic_folder, damage
from pretrain.core.foreign import json as foreign_json
from pretrain.core.foreign import texts
from pretrain.core.foreign import yaml as foreign_yaml
from pretrain.core.foreign.archives import BROKEN, Bomb, open_packed, open_text
from pretrain.core.foreign.arrays import read_array
from pretrain.core.foreign.parsing import parsing
from pretrain.core.foreign.reading import open_file, read_bytes
from pretrain.core.system.console import App
from pretrain.corpus.sources import Audio, Files, Images, Skipped, read
from pretrain.corpus.store import write_corpus
from pretrain.recipe import load

MB = 1 << 20
AT_ONCE = 5.0  # seconds
BASE = 400  # MB that Python, numpy, pyarrow and the package hold before a byte is read
PEAK = "print(int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) >> 10)"  # MB; not of the parent


def peak(code: str, folder: Path, limit: int | None = None) -> tuple[int, str]:
    """The largest memory in MB of a process that runs `code`, and what it has printed before; with `limit` it gets no more."""
    bound = f"resource.setrlimit(resource.RLIMIT_AS, ({limit << 20}, {limit << 20}))" if limit else ""
    text = f"import resource\nfrom pathlib import Path\n{bound}\n{textwrap.dedent(code)}\n{PEAK}\n"
    done = subprocess.run([sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    *said, number = done.stdout.strip().splitlines()
    return int(number), "\n".join(said)


def cli(folder: Path, *words: str, limit: int | None = None) -> tuple[int, str, float]:
    """The exit status of a command, its last line of errors, and the seconds it took."""
    before = (
        (lambda: __import__("resource").setrlimit(__import__("resource").RLIMIT_AS, (limit << 20, limit << 20)))
        if limit
        else None
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", *words], cwd=folder, capture_output=True, text=True, timeout=120, preexec_fn=before
    )  # fmt: skip
    return (
        done.returncode,
        done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "",
        time.perf_counter() - start,
    )


CORPUS = """
    from pathlib import Path
    from pretrain.core.errors import PretrainError
    from pretrain.corpus.sources import Files, Skipped, read
    from pretrain.corpus.store import write_corpus
    skipped = Skipped()
    try:
        info = write_corpus(read(Files({where!r}, on_error="skip"), skipped), Path("corpus"), near_duplicates=None, skipped=skipped)
        print(info["passed_over"])
    except PretrainError as error:
        print(error)
"""


def large(path: Path, size: int, line: bytes = b"") -> None:
    """A file of `size` bytes of text, without the end of a line unless `line` is what it repeats."""
    piece = line * (MB // len(line)) if line else b"word " * (MB // 5)
    with path.open("wb") as file:
        file.write(b'{"text": "a good line"}\n' if path.suffix == ".jsonl" else b"")
        file.write(b'{"text": "' if path.suffix == ".jsonl" else b"")
        for _ in range(size // len(piece)):
            file.write(piece)


@pytest.mark.processes
@pytest.mark.promise(
    "Memory",
    "`data` takes 0.3 GB, 0.6 GB with near-duplicates, whatever the files hold, at the default `longest`; about 200 bytes for each document, and one row group of a Parquet file, at most 2 GiB as it says.",
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.json", "a.ipynb"])
def test_a_line_of_200_megabytes_is_passed_over_or_cut_in_bounded_memory(tmp_path, name):
    (tmp_path / "good.txt").write_text("a good document\n")
    large(tmp_path / name, 200 * MB)
    if name == "a.json":
        (tmp_path / name).write_bytes(b'["one", "' + (tmp_path / name).read_bytes())
    memory, said = peak(CORPUS.format(where="."), tmp_path)
    print(f"{name}: {memory} MB")
    assert ("bad files" if name == "a.json" else "4,000,000 characters") in said
    assert memory < BASE + (700 if name == "a.txt" else 300), f"{memory} MB"


@pytest.mark.promise(
    "What others have written", "A compressed file gives 64 MiB, or 250 times its own size where that is more."
)
@pytest.mark.parametrize("ending", [".gz", ".zst", ".xz", ".bz2"])
def test_a_bomb_is_unpacked_no_further_than_its_bound(tmp_path, ending):
    """Of 128 MB of the same line, two million of them, no more is read than 250 times the file or 64 MiB."""
    make = __import__({".gz": "gzip", ".zst": "zstandard", ".xz": "lzma", ".bz2": "bz2"}[ending])
    piece = b"the same old words and so on and on and on, ever again and more\n" * 16384
    if ending == ".zst":
        with make.open(tmp_path / "a.txt.zst", "wb") as file:
            for _ in range(128):
                file.write(piece)
    else:  # streams one after another, of which the first alone is made: bzip2 takes a minute for all
        (tmp_path / f"a.txt{ending}").write_bytes(make.compress(piece) * 128)
    (tmp_path / "good.txt").write_text("a good document\n")
    memory, said = peak(CORPUS.format(where="."), tmp_path)
    print(f"{ending}: {memory} MB")
    assert "unreadable (Bomb)" in said and memory < BASE + 700, f"{memory} MB"


def test_a_bomb_of_zeros_is_binary_and_one_of_a_line_is_none(tmp_path):
    import gzip

    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        for _ in range(300):
            file.write(bytes(MB))
    with pytest.raises(
        PretrainError, match=r"a.jsonl.gz: cannot be read after line 1 .*it unpacks to more than 7. MiB"
    ):
        list(read(Files(str(tmp_path / "a.jsonl.gz"))))
    with pytest.raises(BROKEN), open_packed(tmp_path / "a.jsonl.gz") as packed:
        while packed.read(MB):
            pass
    assert issubclass(Bomb, OSError)


@pytest.mark.promise(
    "What others have written", "Named pipes, devices and sockets, and links to them, are never opened."
)
def test_what_is_no_regular_file_is_refused_at_once_wherever_it_stands(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "linked").symlink_to(tmp_path / "pipe")
    for name, kind in (
        ("pipe", "a named pipe"),
        ("linked", "a named pipe"),
        ("zero", "a device"),
        ("/dev/zero", "a device"),
    ):
        place = tmp_path / name
        with pytest.raises(OSError, match=kind):
            open_file(place)
        with pytest.raises(PretrainError, match=f"{name}.*{kind}"):
            list(read(Files(str(place))))
        with pytest.raises(PretrainError, match=f"recipe .*{name}.*{kind}"):
            load(place)
        with pytest.raises(PretrainError, match=f"{name} cannot be read: it is {kind}"):
            foreign_json.read(place)
    skipped = Skipped()
    (tmp_path / "good.txt").write_text("good")
    assert len(list(read(Files(str(tmp_path)), skipped))) == 1 and skipped.reasons == {"no regular files": 3}


@pytest.mark.promise("What others have written", "Named pipes, devices")
def test_a_checkpoint_and_a_recipe_in_a_pipe_end_the_command_at_once(tmp_path):
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "config.json")
    recipe = {"stages": [{"stage": "evaluate", "checkpoint": "model", "corpus": "model"}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    commands = [
        ["run", "r.yaml", "--dry-run"],
        ["generate", "model", "--prompt", "x"],
        ["run", "/dev/zero"],
        ["run", "model/config.json"],
    ]
    code = """
        import sys
        from pretrain.cli import app
        for words in json.loads(sys.argv[1]):
            try:
                app(words)
            except SystemExit as end:
                print("status", end.code, file=sys.stderr)
    """
    done = subprocess.run(  # no end at all if the pipe were opened; most of it is the start of torch on a busy machine
        [sys.executable, "-c", "import json\n" + textwrap.dedent(code), json.dumps(commands)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    said = [line for line in done.stderr.strip().splitlines() if not line.startswith("opening ")]
    assert done.returncode == 0 and len(said) == 2 * len(commands), done.stderr
    for line, status in zip(said[::2], said[1::2], strict=True):
        assert line.startswith("error: ") and ("pipe" in line or "device" in line), line
        assert status in ("status 1", "status 2")


def _bomb(levels: int = 9) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.promise(
    "What others have written",
    "YAML has at most 1 MiB and 20,000 values (of both what aliases repeat counted each time), 50 levels and numbers of 64 digits.",
)
def test_yaml_that_multiplies_itself_is_refused_in_files_and_values(tmp_path):
    start = time.process_time()
    with pytest.raises(PretrainError, match="r.yaml:5: not valid YAML: more than 20,000 values"):
        foreign_yaml.loads(_bomb(), "r.yaml")
    merged = "a: &a {x: 1, y: 2}\n" + "\n".join(
        f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}" for a, b in zip("abcdefgh", "bcdefghi")
    )
    with pytest.raises(PretrainError, match="not valid YAML: more than 20,000 values"):
        foreign_yaml.loads(merged, "r.yaml")
    (tmp_path / "r.yaml").write_text(f"stages: []\nname:\n{textwrap.indent(_bomb(), '  ')}")
    with pytest.raises(PretrainError, match="more than 20,000 values"):
        load(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("stages: [{stage: data, sources: [stdlib]}]")
    value = "[" + ", ".join(["&a [x, x, x]"] + ["*a"] * 8000) + "]"
    with pytest.raises(PretrainError, match="--set data.sources=.*more than 20,000 values"):
        load(tmp_path / "r.yaml", [f"data.sources={value}"])
    for text, why in (("[" * 5000, "more than 50 lists"), ("9" * 5000, "5000 digits"), ('"\\ud800"', "half of a character"),
                      ("!!binary aGk=", "the tag"), ("x" * (1 << 21), "characters")):  # fmt: skip
        with pytest.raises(PretrainError, match=why):
            foreign_yaml.loads(text, "value")
    with pytest.raises(PretrainError, match="value:2: not valid YAML: more than 1,048,576 characters, what aliases"):
        foreign_yaml.loads(f"a: &a {'x' * 1000}\nb: [{', '.join(['*a'] * 2000)}]", "value")
    assert len(foreign_yaml.loads(f"[&a x{', *a' * 5000}]", "value")[0]) == 5001
    assert foreign_yaml.loads("2026-13-45", "value")[0] == "2026-13-45"  # a date is a text
    assert time.process_time() - start < AT_ONCE


@pytest.mark.promise(
    "What others have written",
    "JSON read whole has at most 64 MiB, 4 million values, 200 levels and numbers of 64 digits.",
)
def test_json_is_bounded_in_depth_digits_and_characters(tmp_path):
    path = tmp_path / "a.json"
    for text, why in (("[" * 100_000, "more than 200 lists"), ("[" * 300 + "]" * 300, "more than 200 lists"), ("9" * 5000, "5000 digits"),
                      ("[" + "[]," * 4_000_000 + "1]", "more than 4,000,000 values"), ('{"a": "\\ud800"}', "half of a character"), ("{", "truncated or damaged")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(PretrainError, match=f"a.json is not valid JSON .*{why}"):
            foreign_json.read(path)
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        path.write_text('{"a": "é"}', encoding=encoding)
        assert foreign_json.read(path) == {"a": "é"}
    path.write_bytes(b"1" * 100)
    with pytest.raises(PretrainError, match="is too large"):
        read_bytes(path, 99)


@pytest.mark.promise("What others have written", "An array of documents is read an item at a time.")
@pytest.mark.parametrize(
    "text", ["[]", "[1]", '[1, {"a": "b,]"}, "x"]', " [ 1 , 2 ] ", "[" + ",".join(['"' + "y" * 70_000 + '"'] * 5) + "]"]
)
def test_an_array_is_read_an_item_at_a_time(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with open_text(tmp_path / "a.json") as opened:
        assert list(foreign_json.items(opened, 1 << 20)) == json.loads(text)
    for end in (1, len(text) // 2):
        (tmp_path / "a.json").write_text(text.strip()[: -end or None] if len(text) > 2 else "[")
        with open_text(tmp_path / "a.json") as opened, pytest.raises(foreign_json.NotJSON):
            list(foreign_json.items(opened, 1 << 20))


@pytest.mark.promise(
    "What others have written",
    "A byte-order mark says the encoding (UTF-8, UTF-16, UTF-32) of text, tables, recipes and checkpoints' files.",
)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be-mark", "utf-32"])
def test_a_byte_order_mark_says_the_encoding_of_text_tables_and_recipes(tmp_path, encoding):
    def write(name: str, text: str) -> Path:
        data = b"\xfe\xff" + text.encode("utf-16-be") if encoding == "utf-16-be-mark" else text.encode(encoding)
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    for name, text in (
        ("a.txt", "é is text"),
        ("a.jsonl", '{"text": "é is text"}'),
        ("a.csv", "text,n\né is text,1"),
        ("a.json", '["é is text"]'),
    ):
        assert [d["text"] for d in read(Files(str(write(name, text))))] == ["é is text"], name
    assert load(write("r.yaml", "stages: [{stage: data, sources: [stdlib]}]")).stages
    skipped = Skipped()
    (tmp_path / "u.txt").write_bytes("plain words".encode("utf-16-le"))
    assert not list(read(Files(str(tmp_path / "u.txt")), skipped)) and skipped.reasons == {
        "UTF-16 without a byte-order mark": 1
    }


@pytest.mark.promise(
    "What others have written",
    "Halves of characters in domains, ids, labels and other columns are replaced and counted.",
)
def test_halves_of_characters_are_replaced_and_counted_wherever_they_stand(tmp_path):
    row = (
        '{"text": "words", "domain": "\\ud800", "id": "\\udc00", "label": "a\\ud800", "group": "\\ud800", "\\ud800": 1}'
    )
    (tmp_path / "a.jsonl").write_text(row)
    skipped = Skipped()
    [document] = read(Files(str(tmp_path / "a.jsonl")), skipped)
    assert texts.broken_in(document) is None and document["label"] == "a\ufffd" and document["\ufffd"] == 1
    assert skipped.reasons == {"halves of characters, replaced": 1}
    assert "\\ud800" in str(PretrainError("x\ud800\ny")) and "\n" not in str(PretrainError("x\ud800\ny"))


@pytest.mark.promise(
    "What others have written",
    "Lines and rows of more than `longest` characters of the data stage (4 million) are passed over, longer files of text cut at the end of a line, and both counted in `corpus.json` and said.",
)
def test_a_document_that_is_too_long_is_cut_at_the_end_of_a_line_and_kept_on_one_side(tmp_path):
    (tmp_path / "a.txt").write_text("line one\nline two\nline three\n" + "x" * 50 + "\n")
    skipped = Skipped(20)
    documents = list(read(Files(str(tmp_path / "a.txt")), skipped))
    assert "".join(d["text"] for d in documents) == (tmp_path / "a.txt").read_text()
    assert documents[0]["text"] == "line one\nline two\n" and max(len(d["text"]) for d in documents) <= 20
    assert {d["group"] for d in documents} == {str(tmp_path / "a.txt")} and len({d["id"] for d in documents}) == len(
        documents
    )
    assert skipped.reasons == {"documents cut to 20 characters": 1}
    (tmp_path / "b.jsonl").write_text('{"text": "short"}\n{"text": "' + "x" * 30 + '"}\n{"text": "last"}\n')
    skipped = Skipped(25)
    assert [d["text"] for d in read(Files(str(tmp_path / "b.jsonl")), skipped)] == ["short", "last"]
    assert skipped.reasons == {"lines of more than 25 characters": 1}


def test_headers_of_arrays_say_what_the_files_hold(tmp_path):
    import numpy as np

    path = tmp_path / "a.npy"
    np.save(path, np.arange(5))
    assert read_array(path).tolist() == [0, 1, 2, 3, 4]
    good = path.read_bytes()
    for old, new in (
        (b"(5,)", b"(9,)"),
        (b"<i8", b"|O8"),
        (b"'descr'", b"'d\xffscr'"),
        (b"(5,)", b"[[[]"),
        (b"\x93NUMPY\x01", b"\x93NUMPY\x09"),
    ):
        path.write_bytes(good.replace(old, new))
        with pytest.raises((ValueError, OSError)):
            read_array(path)


@pytest.mark.processes
@pytest.mark.promise(
    "Memory",
    "`train`, `surgery`, `evaluate` and `decode` take what `--dry-run` says; a third more than the machine has, or than `ulimit -v` allows, is refused before anything runs, and where memory ends later that is one line.",
)
def test_what_does_not_fit_is_one_line(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.py").write_text(f"def f{number}():\n    return {number}\n" * 20)
    model = {
        "family": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    recipe = {"stages": [
        {"stage": "data", "name": "corpus", "sources": [{"files": "text"}], "validation": 0.1, "test": 0.1},
        {"stage": "tokenizer", "corpus": "corpus", "vocab_size": 300},
        {"stage": "train", "corpus": "corpus", "tokenizer": "tokenizer", "length": 32, "batch_rows": 4_000_000_000, "micro_rows": 2,
         "model": model, "budget": {"steps": 1}},
    ]}  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    code, said, _ = cli(tmp_path, "run", "r.yaml")
    assert code == 1 and said.startswith("error: stage 'train': about ") and "GB of memory" in said, said
    code, said, _ = cli(tmp_path, "run", "r.yaml", "--set", "train.batch_rows=2", limit=700)
    assert code == 1 and said.startswith("error: ulimit -v allows 700 MiB of memory; accepted: at least 1 GiB"), said
    for limit in (1100, 1225):  # what gets no memory is another library at each: some of them abort the process
        code, said, _ = cli(tmp_path, "run", "r.yaml", "--set", "train.batch_rows=2", limit=limit)
        assert code == 1 and said.startswith("error: ") and "there is not enough memory" in said, said


TOKENS = """
    import random
    from pathlib import Path
    from pretrain.corpus.shards import tokenise
    from pretrain.corpus.sources import Files, Skipped, read
    from pretrain.corpus.store import Corpus, write_corpus
    from pretrain.corpus.tokenizers import train_tokenizer
    write_corpus(read(Files("text"), Skipped()), Path("corpus"), validation=0.0, test=0.0, near_duplicates=None)
    corpus = Corpus(Path("corpus"))
    tokenizer = train_tokenizer((d["text"][:20_000] for d in corpus.documents("train")), vocab_size=400)
    print(tokenise(corpus, tokenizer, Path("tokens"), splits=("train",))["train"].tokens)
"""


@pytest.mark.processes
@pytest.mark.promise(
    "Memory",
    "Tokens and `tokenizer` take 2 GB at the default `longest`, about 90 bytes for each character of the documents at work.",
)
def test_documents_as_long_as_they_may_be_are_put_into_tokens_in_bounded_memory(tmp_path):
    (tmp_path / "text").mkdir()
    words = " ".join(f"word{n % 977}x{n % 13}" for n in range(500_000))[:3_990_000]
    with (tmp_path / "text" / "a.jsonl").open("w") as file:
        for number in range(2):  # one is more than is put into tokens at a time
            file.write(json.dumps({"text": f"{number} {words}"}) + "\n")
    memory, said = peak(TOKENS, tmp_path)
    print(f"tokens: {memory} MB of {said}")
    assert memory < 2500, f"{memory} MB"


@pytest.mark.parametrize("end", ["parquet", "arrow", "orc"])
def test_a_cell_far_longer_than_is_read_is_passed_over_before_text_is_made_of_it(tmp_path, monkeypatch, end):
    import pyarrow
    from pyarrow import feather, orc, parquet

    from pretrain.corpus.sources import _containers

    table = pyarrow.table({"text": ["first", "x" * 100_000, "third"], "other": ["a", "b", "c"]})
    write = {"parquet": parquet.write_table, "arrow": feather.write_feather, "orc": orc.write_table}[end]
    write(table, str(tmp_path / f"rows.{end}"))
    monkeypatch.setattr(_containers, "LARGE", 10_000)
    made, skipped = [], Skipped(1000)
    monkeypatch.setattr(_containers, "has_bad_bytes", lambda text: made.append(len(text)) or False, raising=False)
    rows = [document["text"] for document in read(Files(str(tmp_path / f"rows.{end}")), skipped)]
    assert rows == ["first", "third"] and max(made, default=0) < 1000
    assert "1 row of more than 1,000 characters" in str(skipped) and "row 2" in str(skipped)


def test_what_a_parquet_file_says_of_itself_is_bounded(tmp_path):
    path = tmp_path / "a.parquet"
    with path.open("wb") as file:
        file.truncate(2 << 30)  # sparse: nothing on the disk
        file.seek(0, 2)
        file.write((1 << 30).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(PretrainError, match=r"a footer of 1073741824 bytes, where at most 67108864 are read"):
        list(read(Files(str(path))))


NO_MEMORY = (
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to …"),
    RuntimeError("can't start new thread"),
)


@pytest.mark.promise(
    "Memory",
    "That there is no more memory is never taken for damage: nothing is passed over, made anew or refused for it, and the command ends in one line.",
)
@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_what_memory_does_not_hold_is_not_called_damaged(tmp_path, monkeypatch, capsys, error):
    def fails(*_, **__):
        raise error

    for name in ("a.txt", "a.jsonl", "a.csv", "a.json", "a.ipynb", "a.png", "a.wav"):
        (tmp_path / name).write_text("words")
    with atomic_folder(tmp_path / "made") as work:
        (work / "config.json").write_text("{}")
    for boundary in ("archives.open_file", "reading.open_file"):
        monkeypatch.setattr(f"pretrain.core.foreign.{boundary}", fails)
    for module in ("images.read_bytes", "audio.open_file"):
        monkeypatch.setattr(f"pretrain.corpus.sources.{module}", fails)
    for source in (*(Files(str(tmp_path / f"a.{end}"), on_error="skip") for end in ("txt", "jsonl", "csv", "json", "ipynb")),
                   Images(str(tmp_path / "a.png")), Audio(str(tmp_path / "a.wav"))):  # fmt: skip
        with pytest.raises((MemoryError, RuntimeError)):
            list(read(source, Skipped()))
    monkeypatch.setattr(foreign_json, "read_bytes", fails)
    with pytest.raises((MemoryError, RuntimeError)):
        damage(tmp_path / "made")
    with pytest.raises(MemoryError), parsing("a file", "another"):
        fails()

    read_it = lambda: list(read(Files(str(tmp_path / "a.csv"))))  # noqa: E731
    named = f" for {tmp_path / 'a.csv'}" if isinstance(error, MemoryError | OSError) else ""
    for what, does in (("", fails), (named, read_it)):
        app = App()
        app.command()(lambda does=does: does() and None)
        with pytest.raises(SystemExit, match="1"):
            app([])
        assert capsys.readouterr().err.strip() == (
            f"error: there is not enough memory{what}; accepted: a smaller model, batch or corpus, or a machine with more"
        )


@pytest.mark.promise("Memory", "A corpus has at most 1,000 columns, what objects in them hold counted as well.")
def test_the_columns_of_a_corpus_are_bounded(tmp_path):
    wide = {f"c{n}": 1 for n in range(1001)}
    for rows in ([{"text": "a"} | wide], [{"text": "a", "meta": {"tags": [wide]}}],
                 [{"text": f"row {n}", f"c{n}": 1} for n in range(1001)]):  # fmt: skip
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(PretrainError, match="more than 1,000 columns and what is in them; accepted: fewer"):
            write_corpus(read(Files(str(tmp_path / "a.jsonl"))), tmp_path / "corpus", near_duplicates=None)
    start = time.process_time()
    (tmp_path / "a.csv").write_text("text," + ",".join(f"c{n}" for n in range(200_000)) + "\nwords" + ",1" * 200_000)
    assert len(next(iter(read(Files(str(tmp_path / "a.csv")))))) > 200_000
    assert time.process_time() - start < AT_ONCE


@pytest.mark.promise("Memory", "A recording has at most 67 million samples in `longest` seconds.")
def test_a_recording_whose_header_promises_too_many_samples_a_second_is_passed_over(tmp_path):
    size = 200 << 20
    head = b"RIFF" + struct.pack("<I", size + 36) + b"WAVEfmt "
    head += struct.pack("<IHHIIHH", 16, 1, 1, (1 << 31) - 1, (1 << 32) - 2, 2, 16) + b"data" + struct.pack("<I", size)
    with (tmp_path / "a.wav").open("wb") as file:
        file.write(head)
        file.truncate(size + len(head))  # sparse: nothing on the disk
    skipped = Skipped()
    assert not list(read(Audio(str(tmp_path / "a.wav"), shortest=0.0), skipped))
    assert skipped.reasons == {"recordings of more than 67,108,864 samples in 30.0 seconds": 1}
