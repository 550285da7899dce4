"""Files that belong together, as translations of a page do, lie on one side of the split where a source says so."""

from __future__ import annotations

import pytest

from pretrain.core.errors import PretrainError
from pretrain.corpus.sources import Files, read
from pretrain.corpus.store import Corpus, write_corpus


def put(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"What the page {name} has to say of itself.\n")


def groups(folder, group):
    documents = list(read(Files(str(folder), group=group)))
    return {d["id"].removeprefix(f"{folder}/"): d.get("group") for d in documents}


def test_a_group_is_the_name_or_the_path_or_what_a_pattern_matches(tmp_path):
    put(
        tmp_path,
        ["es/a/sect.one.txt", "de/a/sect.one.txt", "ch1.es.txt", "ch1.pt-br.md", "ch1.txt", "es/b/sect.one.txt"],
    )
    stems = groups(tmp_path, "stem")
    assert stems == {name: "ch1" if name.startswith("ch1") else "sect.one" for name in stems} and len(stems) == 6
    paths = groups(tmp_path, "path")
    assert paths["es/a/sect.one.txt"] == "es/a/sect.one" and paths["ch1.pt-br.md"] == paths["ch1.es.txt"] == "ch1"
    assert groups(tmp_path / "es", "path") == {"a/sect.one.txt": "a/sect.one", "b/sect.one.txt": "b/sect.one"}
    matched = groups(tmp_path, "/(.+)")
    assert matched["es/a/sect.one.txt"] == matched["de/a/sect.one.txt"] == "a/sect.one.txt"
    assert matched["es/b/sect.one.txt"] == "b/sect.one.txt" and matched["ch1.txt"] is None
    assert set(groups(tmp_path, None).values()) == {None}


def test_of_a_glob_the_path_is_what_it_does_not_say(tmp_path):
    put(tmp_path, ["book/es/a.txt", "book/de/a.txt"])
    documents = list(read(Files(f"{tmp_path}/book/*/a.txt", group="(.+)/")))
    assert [d["group"] for d in documents] == ["de", "es"]


def test_what_is_no_regular_expression_is_refused():
    with pytest.raises(PretrainError, match=r"group '\(': .*; accepted: stem, path, or a regular expression"):
        Files("x", group="(")


def test_translations_of_a_page_lie_on_one_side_of_the_split(tmp_path):
    put(tmp_path / "pages", [f"{language}/page-{n}.txt" for language in ("es", "de", "fr") for n in range(60)])

    def sides(group):
        folder = tmp_path / f"corpus-{group}"
        write_corpus(
            read(Files(str(tmp_path / "pages"), group=group)), folder, validation=0.2, test=0.2, near_duplicates=None
        )
        found: dict[str, set[str]] = {}
        for split in ("train", "validation", "test"):
            for document in Corpus(folder).documents(split):
                found.setdefault(document["id"].rpartition("/")[2], set()).add(split)
        return [len(each) for each in found.values()]

    assert sides("stem") == [1] * 60 and max(sides(None)) > 1
