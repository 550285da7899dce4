"""Sources and stored corpora: what is read, how it is split, what is removed."""

from __future__ import annotations

import gzip
import itertools
import json
import random

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core.errors import PretrainError
from pretrain.corpus.sources import (
    DebianDocs,
    Files,
    HubDataset,
    Packages,
    PythonStdlib,
    Skipped,
    evenly,
    fingerprint,
    read,
    unroff,
)
from pretrain.corpus.store import SPLITS, Corpus, side, write_corpus
from pretrain.data.deduplication.deduplicate import Deduplicate

LONG = "the quick brown fox jumps over the lazy dog and runs away from all the hounds of the village tonight "


def test_a_folder_gives_a_document_a_file_and_counts_what_it_passes_over(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.md").write_text("# héllo\n")
    (tmp_path / "c.bin").write_bytes(b"\0\1\2")
    (tmp_path / "d.txt").write_bytes(b"\xff broken")
    (tmp_path / "e.txt").write_text("  \n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "f.txt").write_text("hidden")
    skipped = Skipped()
    found = list(read(Files(str(tmp_path), on_error="skip"), skipped))
    assert [(d["text"], d["domain"]) for d in found] == [("x = 1\n", "py"), ("# héllo\n", "md")]
    assert skipped.reasons == {"binary": 1, "not UTF-8": 1, "empty": 1, "tools' folders": 1}
    assert [d["domain"] for d in read(Files(str(tmp_path), suffixes=(".py",), domain="code"))] == ["code"]
    assert len(list(read(Files(str(tmp_path / "*.py"))))) == 1


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines_keep_their_columns(tmp_path, ending):
    rows = [{"text": "one", "domain": "a", "quality": 3}, {"text": "two"}]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packed = {".jsonl": data, ".jsonl.gz": gzip.compress(data), ".jsonl.zst": zstandard.compress(data)}[ending]
    (tmp_path / f"x{ending}").write_bytes(packed)
    found = list(read(Files(str(tmp_path / f"x{ending}"))))
    assert [d["text"] for d in found] == ["one", "two"]
    assert found[0]["domain"] == "a" and found[0]["quality"] == 3 and found[1]["domain"] == "x"


def test_parquet_and_local_data_sets_are_read(tmp_path):
    import datasets

    data = datasets.Dataset.from_dict({"body": ["one", "two", "three"], "kind": ["a", "b", "b"]})
    data.to_parquet(tmp_path / "x.parquet")
    data.save_to_disk(tmp_path / "saved")
    found = list(read(Files(str(tmp_path / "x.parquet"), text="body", domain="kind")))
    assert [(d["text"], d["domain"]) for d in found] == [("one", "a"), ("two", "b"), ("three", "b")]
    found = list(read(HubDataset(str(tmp_path / "saved"), text="body", limit=2)))
    assert [d["text"] for d in found] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "x.jsonl:2: not JSON"),
        ("x.jsonl", b'{"txt": "a"}\n', r"no column 'text' \(did you mean 'txt'\?\)"),
        ("x.jsonl", b'{"text": 3}\n', r"x.jsonl:1 \(row 1\): column 'text' is int"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 500)[:-12], "truncated"),
        ("x.parquet", b"PAR1 nothing", "not a whole Parquet file"),
    ],
    ids=["half a line", "no column", "not text", "half a gzip", "no parquet"],
)
def test_a_broken_file_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PretrainError, match=message):
        list(read(Files(str(tmp_path / name))))


def test_a_missing_path_is_an_error(tmp_path):
    with pytest.raises(PretrainError, match="no files at"):
        list(read(Files(str(tmp_path / "nothing"))))
    with pytest.raises(PretrainError, match="cannot be loaded"):
        list(read(HubDataset("nobody/nothing-of-the-kind")))


@pytest.mark.processes
def test_the_standard_library_has_modules_and_docstrings_without_tests():
    found = {(d["domain"], d["id"]) for d in read(PythonStdlib())}
    assert ("python", "argparse.py") in found and ("docstrings", "argparse.py#docstrings") in found
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for _, name in found)


@given(st.lists(st.integers(), max_size=50), st.integers(1, 60))
def test_an_even_choice_is_of_the_whole_length_and_in_order(items, limit):
    numbered = list(enumerate(items))
    chosen = evenly(numbered, limit)
    assert len(chosen) == min(limit, len(items)) and chosen == sorted(set(chosen)) and set(chosen) <= set(numbered)
    if 1 < limit < len(items):
        gaps = [b[0] - a[0] for a, b in itertools.pairwise(chosen)]
        assert max(gaps) - min(gaps) <= 1 and chosen[0][0] == 0 and chosen[-1][0] >= len(items) - max(gaps) - 1
    assert evenly(numbered, None) == numbered


def test_the_standard_library_can_be_bounded_evenly():
    few = [d["id"] for d in read(PythonStdlib(docstrings=False, limit=12))]
    assert len(few) == 12 and few == sorted(few, key=lambda name: name.split("/"))
    assert not any(
        d["id"].startswith("encodings") for d in read(PythonStdlib(docstrings=False, exclude=("encodings/*",)))
    )
    assert few[0] < "b" and few[-1] > "u" and few == [d["id"] for d in read(PythonStdlib(docstrings=False, limit=12))]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package `grove`, which must not be imported, and a module `lonetree`."""
    for name in ("__init__", "a", "conftest", "sub/__init__", "sub/b", "tests/test_a", "sub/test_b", "sub/b_test"):
        path = tmp_path / "grove" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"raise RuntimeError('{name} is imported')\n")
    (tmp_path / "grove" / "empty.py").write_text("")
    (tmp_path / "grove" / "data.txt").write_text("no module")
    (tmp_path / "lonetree.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_packages_are_read_without_being_imported(installed):
    found = list(read(Packages(("grove", "lonetree", "grove.sub"))))
    assert [(d["domain"], d["id"]) for d in found] == [
        ("grove", "grove/__init__.py"), ("grove", "grove/a.py"), ("grove", "grove/sub/__init__.py"),
        ("grove", "grove/sub/b.py"), ("lonetree", "lonetree.py"), ("grove.sub", "grove/sub/__init__.py"),
        ("grove.sub", "grove/sub/b.py"),
    ]  # fmt: skip
    assert all(d["group"] == d["id"] for d in found) and "b is imported" in found[3]["text"]
    assert len(list(read(Packages(("grove",), tests=True)))) == 8
    assert [d["id"] for d in read(Packages(("grove", "lonetree"), limit=2))] == [
        "grove/__init__.py", "grove/sub/__init__.py", "lonetree.py",
    ]  # fmt: skip
    assert [d["id"] for d in read(Packages(("grove",), exclude=("grove/sub/*", "*/a.py")))] == ["grove/__init__.py"]
    before = fingerprint(Packages(("grove",)))
    assert before == fingerprint(Packages(("grove",))) != fingerprint(Packages(("lonetree",)))
    (installed / "grove" / "a.py").write_text("another text\n")
    assert fingerprint(Packages(("grove",))) != before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grovee", r"package 'grovee' \(did you mean 'grove'\?\): accepted: an installed Python package"),
        ("scikit-learn", r"did you mean 'sklearn'"),
        ("math", "package 'math': accepted: .* with modules in Python"),
        ("../grove", "package '../grove'"),
        ("grove.none", "package 'grove.none'"),
    ],
)
def test_an_unknown_package_is_named_with_the_nearest(installed, name, message):
    with pytest.raises(PretrainError, match=message):
        list(read(Packages((name,))))


def test_a_runs_own_output_and_caches_are_no_source(tmp_path, monkeypatch):
    from pretrain import engine
    from pretrain.recipe import check

    (tmp_path / "notes.txt").write_text("text " * 50)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text("more " * 50)
    monkeypatch.chdir(tmp_path)
    stages = [{"stage": "data", "sources": [{"files": "."}], "validation": 0, "test": 0}]
    for output, store in (("runs/x", None), ("runs/x", None), ("y", "stages"), ("y", "stages")):
        result = engine.run(check({"stages": stages}, output=output), store=store, say=lambda text: None)
        assert result.stages["data"]["metrics"]["documents/train"] == 2
    statuses = json.loads((tmp_path / "y" / "run.json").read_text())["stages"]
    assert [s["status"] for s in statuses] == ["finished"]
    assert len(list(read(Files("runs/x", tables="text", pages="markup")))) > 2  # asked for by name


def test_a_glob_passes_over_hidden_folders_as_a_folder_does(tmp_path):
    for name in ("a.txt", ".git/b.txt", "node_modules/deep/c.txt", "d/e.txt", "out/run.json", "out/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    texts = lambda pattern: [d["text"] for d in read(Files(str(tmp_path / pattern)))]  # noqa: E731
    assert texts("**/*.txt") == ["a.txt", "d/e.txt"] == texts("")
    assert texts("*/*.txt") == ["d/e.txt"] and texts(".git/*.txt") == [".git/b.txt"]
    with pytest.raises(PretrainError, match="no files at"):
        texts("none/*.txt")


def test_a_sample_of_a_split_is_even_and_takes_the_columns_that_are_asked_for(tmp_path):
    rows = [{"text": f"text {i}", "domain": "d", "id": str(i), "label": i} for i in range(20)]
    write_corpus(rows, tmp_path / "c", validation=0, test=0)
    found = Corpus(tmp_path / "c").sample("train", 5, ("id", "label"))
    assert found == [{"id": str(i), "label": i} for i in (0, 4, 8, 12, 16)]
    assert len(Corpus(tmp_path / "c").sample("train", 50)) == 20
    with pytest.raises(PretrainError, match="unknown split 'trian'"):
        Corpus(tmp_path / "c").sample("trian", 5)


def test_what_data_operations_compute_is_metered(tmp_path, monkeypatch, stories):
    import torch

    from pretrain.stages import Job
    from pretrain.stages.data import Data

    def scores(self, corpus):
        torch.ones(3, 4) @ torch.ones(4, 5)
        return corpus

    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(Deduplicate, "__call__", scores)
    stage = {"sources": [str(tmp_path / "a.txt")], "validation": 0, "test": 0}
    job = lambda name: Job(tmp_path / name, {}, say=lambda text: None)  # noqa: E731
    twice = Data.model_validate(stage | {"operations": ["deduplicate", "deduplicate"]})
    assert twice.run(job("x"))["flops"] == 2 * 2 * 3 * 4 * 5
    assert Data.model_validate(stage).run(job("y"))["flops"] == 0


def test_debian_documentation_is_plain_text(tmp_path):
    (tmp_path / "doc" / "x").mkdir(parents=True)
    (tmp_path / "man" / "man1").mkdir(parents=True)
    (tmp_path / "doc" / "x" / "copyright").write_text("free\n")
    page = '.TH LS 1\n.SH NAME\nls \\- list \\fBfiles\\fR\n.PP\n.B "ls -l"\n.\\" comment\n'
    (tmp_path / "man" / "man1" / "ls.1.gz").write_bytes(gzip.compress(page.encode()))
    found = list(read(DebianDocs(doc=str(tmp_path / "doc"), man=str(tmp_path / "man"))))
    assert [d["domain"] for d in found] == ["doc", "man"]
    assert found[1]["text"] == "NAME\nls - list files\n\nls -l\n"
    assert unroff("a\\(bu\\e") == "a*\\"


def test_the_fingerprint_follows_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    first = fingerprint(Files(str(tmp_path)))
    assert fingerprint(Files(str(tmp_path))) == first
    (tmp_path / "a.txt").write_text("other")
    assert fingerprint(Files(str(tmp_path))) != first


@pytest.mark.promise(
    "Determinism",
    "A document's side (training, validation, test) is that of its content, whatever else is in the corpus and in whatever order.",
)
@settings(max_examples=15)
@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=40), st.randoms())
def test_no_document_is_on_two_sides_whatever_the_order(tmp_path_factory, texts, rng):
    texts = [t.encode("utf-8", "ignore").decode() or "x" for t in texts]
    sides = []
    for order in (texts, rng.sample(texts, len(texts))):
        folder = tmp_path_factory.mktemp("c") / "corpus"
        documents = [{"text": t, "domain": "d", "id": str(i)} for i, t in enumerate(order)]
        try:
            write_corpus(documents, folder, validation=0.2, test=0.2, near_duplicates=None)
        except PretrainError:
            continue  # all on the held-out side
        sides.append({s: {d["text"] for d in Corpus(folder).documents(s)} for s in SPLITS})
        assert sum(len(v) for v in sides[-1].values()) == len(set(texts))
    assert len(sides) < 2 or sides[0] == sides[1]


def test_another_split_seed_holds_out_other_documents_and_copies_stay_on_one_side(tmp_path):
    texts = [f"text number {n}" for n in range(200)]
    rows = [{"text": text, "label": label, "domain": "d", "id": ""} for text in texts for label in ("a", "b")]

    def held_out(seed):
        folder = tmp_path / f"corpus-{seed}"
        write_corpus(rows, folder, validation=0.2, test=0.2, split_seed=seed, near_duplicates=None)
        sides = [{row["text"] for row in Corpus(folder).documents(name)} for name in SPLITS]
        assert sum(map(len, sides)) == len(texts)  # both copies of each on one side
        assert all(30 < len(some) < 150 for some in sides)
        return sides[1]

    assert len({frozenset(held_out(seed)) for seed in (0, 1, 2)}) == 3


def test_a_split_seed_moves_the_address_and_what_the_dry_run_sees_and_zero_neither(tmp_path):
    from pretrain.stages.data import Data

    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(300)))
    given = {"name": "corpus", "sources": [str(tmp_path / "a.jsonl")], "validation": 0.2, "near_duplicates": None}
    usual, zero, other = (Data(**given, **more) for more in ({}, {"split_seed": 0}, {"split_seed": 7}))
    assert usual.config() == zero.config() != other.config() and "split_seed" not in usual.config()
    for stage in (usual, other):
        info = write_corpus(
            read(stage.sources[0], Skipped()), tmp_path / f"c{stage.split_seed}", validation=0.2,
            split_seed=stage.split_seed, near_duplicates=None,
        )  # fmt: skip
        seen = stage._looked([1e4])
        assert seen.documents == info["documents"] and seen.bytes == info["bytes"]
    counts = [Corpus(tmp_path / f"c{seed}").info["documents"] for seed in (0, 7)]
    assert counts[0] != counts[1]


def test_groups_stay_on_one_side():
    assert len({side("same group", 0.3, 0.3) for _ in range(5)}) == 1
    shares = [side(str(i), 0.1, 0.2) for i in range(5000)]
    assert 0.08 < shares.count("validation") / 5000 < 0.12 and 0.18 < shares.count("test") / 5000 < 0.22


def test_training_documents_near_held_out_ones_are_removed(tmp_path):
    rng = random.Random(0)
    documents = []
    for number in range(60):
        words = [f"{w}{rng.randrange(50)}" for w in (LONG * 3).split()]
        documents.append({"text": " ".join(words), "domain": "d", "id": str(number)})
        documents.append({"text": " ".join(words) + " end", "domain": "d", "id": f"{number}b"})
    info = write_corpus(documents, tmp_path / "c", validation=0.3, test=0.1)
    assert info["removed"]["near"] > 5
    held = [d["id"].rstrip("b") for s in ("validation", "test") for d in Corpus(tmp_path / "c").documents(s)]
    assert not {d["id"].rstrip("b") for d in Corpus(tmp_path / "c").documents("train")} & set(held)


def test_operations_change_the_training_split_only(tmp_path, stories):
    class Shout:
        def __call__(self, corpus):
            return corpus.map(lambda row: {"text": row["text"].upper()}).select(range(5))

    info = write_corpus([*stories, stories[0]], tmp_path / "c", validation=0.2, operations=[Shout()])
    assert info["removed"]["operations.0"] > 0 and info["removed"]["exact"] > 0
    assert info["read"] == len(stories) + 1 == sum(info["documents"].values()) + sum(info["removed"].values())
    corpus = Corpus(tmp_path / "c")
    train = corpus.split("train")["text"]
    assert len(train) == 5 and all(t == t.upper() for t in train)
    assert any(d["text"] != d["text"].upper() for d in corpus.documents("validation"))


def test_deduplicate_keeps_the_first_of_each_kind():
    import datasets

    texts = [LONG * 3, "short", LONG * 3 + "more", "short", "another text altogether, unlike the rest in all its words"]
    assert Deduplicate()(datasets.Dataset.from_dict({"text": texts}))["text"] == [texts[0], "short", texts[4]]
    assert len(Deduplicate(threshold=0)(datasets.Dataset.from_dict({"text": texts}))) == 4


EXAMPLES = st.lists(
    st.fixed_dictionaries(
        {"text": st.sampled_from([LONG, LONG * 2, "short", ""])},
        optional={
            "label": st.sampled_from(["a", "b", None]), "target": st.sampled_from([LONG, "y", None]),
            "tags": st.sampled_from([["B", "O"], ["O", "O"]]), "url": st.sampled_from(["u", "v"]),
            "language_score": st.sampled_from([0.5, 0.7]), "name": st.sampled_from(["n", "m"]),
        },
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@given(EXAMPLES, st.sampled_from([0.0, 1.0]))
@settings(max_examples=40)
def test_only_examples_that_are_equal_in_all_that_belongs_to_them_are_copies(tmp_path_factory, examples, threshold):
    import datasets

    def content(row):
        return repr([row.get(name) for name in ("text", "label", "target", "tags")])

    names = {name: None for row in examples for name in row}
    rows = [dict.fromkeys(names) | row | {"id": number, "domain": "d"} for number, row in enumerate(examples)]
    first = {content(row): row["id"] for row in reversed(rows)}
    assert Deduplicate(threshold)(datasets.Dataset.from_list(rows))["id"] == sorted(first.values())
    folder = tmp_path_factory.mktemp("copies") / "c"
    said = write_corpus([row | {"text": row["text"] or "x"} for row in rows], folder, validation=0, test=0)
    assert sorted(Corpus(folder).split("train")["id"]) == sorted(first.values())
    assert said["removed"] == {"exact": len(rows) - len(first), "near": 0}


def test_near_duplicates_are_of_one_label():
    import datasets

    rows = [{"text": LONG * 3 + end, "label": label, "url": end} for end in ("", "more") for label in ("a", "b")]
    kept = Deduplicate()(datasets.Dataset.from_list(rows))
    assert kept["label"] == ["a", "b"] and kept["url"] == ["", ""]


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.1), (0.6, 0.4)])
def test_impossible_shares_are_refused(tmp_path, validation, test):
    with pytest.raises(PretrainError, match="accepted: shares"):
        write_corpus([], tmp_path / "c", validation=validation, test=test)


def test_an_empty_corpus_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(PretrainError, match="no training documents"):
        write_corpus([], tmp_path / "c")
    assert not list(tmp_path.glob("*c*"))
    with pytest.raises(PretrainError, match="is not a corpus"):
        Corpus(tmp_path / "c")


def documents(*texts, **more):
    return [{"text": t, "domain": "d", "id": str(i)} | more for i, t in enumerate(texts)]


def test_the_fingerprint_is_of_the_texts_and_their_order(tmp_path):
    prints = [
        write_corpus(documents(*texts), tmp_path / "c", validation=0, test=0)["fingerprint"]
        for texts in (("one", "two"), ("ONE", "two"), ("two", "one"))
    ]
    assert len(set(prints)) == 3


def test_columns_that_only_some_sources_have_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.corpus.parts.PART_BYTES", 1)
    rows = documents("one") + documents("two", quality=3) + documents("three", quality=4.5, group="g")
    write_corpus(rows, tmp_path / "c", validation=0, test=0)
    found = Corpus(tmp_path / "c").split("train")
    assert found["quality"] == [None, 3.0, 4.5] and found["group"] == [None, None, "g"]
    with pytest.raises(PretrainError, match="column holds several types .*quality"):
        write_corpus(
            documents("one", quality=3) + documents("two", quality="high"), tmp_path / "d", validation=0, test=0
        )


def test_odd_rows_are_passed_over_and_counted(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        '{"text": "good"}\n{"text": null}\n{"text": " "}\n{"text": "bad \\ud83d"}\n{"text": "g", "group": 3}\n'
    )
    skipped = Skipped()
    found = list(read(Files(str(tmp_path / "x.jsonl")), skipped))
    assert [d["text"] for d in found] == ["good", "g"] and skipped.reasons == {"empty": 2, "not UTF-8": 1}
    write_corpus(found, tmp_path / "c", validation=0, test=0)


def test_a_row_without_its_column_is_named_by_its_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n{"body": "c", "id": 1}\n')
    with pytest.raises(PretrainError, match=r"x\.jsonl:4\b.*no column 'text'.*accepted: .*body, id"):
        list(read(Files(str(tmp_path / "x.jsonl"))))


def test_blanks_are_no_label(tmp_path):
    import pyarrow.parquet

    numbers = pyarrow.table({"text": list("abc"), "n": [0.0, float("nan"), None]})
    pyarrow.parquet.write_table(numbers, tmp_path / "x.parquet")
    skipped = Skipped()
    assert [d["n"] for d in read(Files(str(tmp_path / "x.parquet"), required=("n",)), skipped)] == [0.0]
    assert skipped.reasons == {"rows without n": 2}
    rows = [{"text": "a", "label": label} for label in ("x", "", "  ", None, 0)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [d["label"] for d in read(Files(str(tmp_path / "x.jsonl"), required=("label",)))] == ["x", 0]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
def test_a_file_that_is_not_what_its_name_says_is_named_and_not_taken_for_a_full_disk(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "plain"}\n')
    with pytest.raises(PretrainError, match=f"{name}: cannot be read after line 0"):
        write_corpus(read(Files(str(tmp_path / name))), tmp_path / "c")


def test_a_folder_inside_a_hidden_one_can_be_asked_for(tmp_path):
    (tmp_path / ".venv" / "lib").mkdir(parents=True)
    (tmp_path / ".venv" / "lib" / "notes.txt.gz").write_bytes(gzip.compress(b"text"))
    assert [d["domain"] for d in read(Files(str(tmp_path / ".venv" / "lib")))] == ["txt"]


def test_when_nothing_is_left_it_is_said_what_was_passed_over(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0\0")
    skipped = Skipped()
    with pytest.raises(PretrainError, match=r"no training documents are left \(passed over: 1 binary \(.*a.bin"):
        write_corpus(read(Files(str(tmp_path / "a.bin")), skipped), tmp_path / "c", skipped=skipped)


def test_what_is_passed_over_is_said_of_one_as_of_one():
    skipped = Skipped()
    for reason, count in {
        "bad lines": 1,
        "rows that are no image": 1,
        ".png files": 2,
        "series without values": 1,
    }.items():
        for number in range(count):
            skipped.add(reason, f"f{number}")
    words = "1 bad line (f0), 2 .png files (f0, f1), 1 row that is no image (f0), 1 series without values (f0)"
    assert str(skipped) == words


def test_documented_functions_are_examples_of_code_and_summary():
    from pretrain.corpus import modules
    from pretrain.corpus.sources import Functions

    code = 'class A:\n    def f(self, x):\n        """Say x.\n\n        More.\n        """\n        return x\n\n\ndef g(): "no"\ndef h():\n    return 1\n'
    assert modules.functions(code) == [("f", "def f(self, x):\n    return x\n", "Say x.")]
    assert modules.functions("def (") == []
    found = list(read(Functions(("stdlib", "yaml"), limit=12)))
    assert {d["domain"] for d in found} == {"stdlib", "yaml"} and all(len(d["text"]) <= 2000 for d in found)
    for document in found:
        assert document["target"] and document["text"].lstrip().startswith(("def ", "async def "))
        compile(document["text"], "", "exec", dont_inherit=True, flags=1024)  # only to its syntax tree
    with pytest.raises(PretrainError, match="at least one package"):
        Functions(())


def test_what_operations_leave_is_written_as_small_as_what_they_are_given(tmp_path):
    rows = [{"text": f"{n} and again " * 200, "domain": "d", "id": str(n)} for n in range(100)]
    write_corpus(rows, tmp_path / "plain", near_duplicates=None)
    write_corpus(rows, tmp_path / "operated", near_duplicates=None, operations=[lambda corpus: corpus])
    sizes = [(tmp_path / name / "train" / "part-00000.parquet").stat().st_size for name in ("plain", "operated")]
    assert sizes[1] < 1.2 * sizes[0]
