"""A domain that a recipe names and no document has is refused by a dry run, wherever the domains can be known."""

from __future__ import annotations

import pytest
import yaml

from pretrain.core.errors import PretrainError
from pretrain.corpus.look import glance
from pretrain.corpus.store import write_corpus
from pretrain.forecast import check_documents
from pretrain.identity import plan
from pretrain.recipe import load
from pretrain.stages import _preflight

NAMING = {
    "mixture": lambda name: {"mixture": {"German": 1.0, name: 1.0}},
    "upsampling": lambda name: {"policies": [{"method": "domain_upsampling", "mixture": {name: 1.0}}]},
    "replay": lambda name: {"policies": [{"method": "stability_gap", "domain": "German", "replay": {name: 1.0}}]},
    "unlearning": lambda name: {"objective": {"method": "unlearning", "forget": name}},
    "keep_best": lambda name: {"policies": [{"method": "keep_best", "metric": f"bits_per_byte/{name}"}]},
}


@pytest.fixture
def checked(tmp_path):
    """`checked(training's fields, stages before)`: what a dry run says of documents."""
    for name in ("de", "fr"):
        (tmp_path / name).mkdir()
        for number in range(30):
            (tmp_path / name / f"{number}.txt").write_text(f"text {number} of {name}\n" * 20)
    sources = [{"files": str(tmp_path / "de"), "domain": "German"}, {"files": str(tmp_path / "fr"), "domain": "French"}]
    corpus = {"stage": "data", "name": "corpus", "sources": sources}

    def check(fields, *more, name="corpus"):
        train = {
            "stage": "train", "name": "model", "corpus": name, "tokenizer": str(tmp_path),
            "model": {"family": "llama"}, "budget": {"steps": 2}, **fields,
        }  # fmt: skip
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump({"stages": [corpus, *more, train]}))
        recipe = load(path, output=tmp_path / "run")
        return check_documents(recipe, plan(recipe))

    return check


@pytest.mark.parametrize("seconds", [0.5, 0.0], ids=["read whole", "read in part"])
@pytest.mark.parametrize("name", NAMING)
def test_a_misspelt_domain_is_refused_with_the_one_that_is_meant(checked, monkeypatch, name, seconds):
    monkeypatch.setattr(_preflight, "SECONDS", seconds)
    if not seconds:
        monkeypatch.setattr(glance, "LARGE", 0)
    checked(NAMING[name]("French"))
    with pytest.raises(
        PretrainError, match=r"model\.\S+: .*'Frnech' \(did you mean 'French'\?\); accepted: French, German$"
    ):
        checked(NAMING[name]("Frnech"))


def test_a_corpus_made_of_another_has_the_domains_of_both(checked):
    other = {"stage": "data", "name": "more", "corpus": "corpus", "sources": [{"stdlib": True}]}
    checked({"mixture": {"German": 1, "python": 1}}, other, name="more")
    with pytest.raises(
        PretrainError, match=r"'pyton' \(did you mean 'python'\?\); accepted: French, German, docstrings, python"
    ):
        checked({"mixture": {"German": 1, "pyton": 1}}, other, name="more")


def test_a_corpus_made_of_one_that_is_there_has_its_domains(checked, tmp_path):
    documents = [{"text": f"{d} {n}", "domain": d, "id": f"{d}{n}"} for n in range(9) for d in ("old", "new")]
    write_corpus(documents, tmp_path / "there" / "corpus", validation=0.2, test=0.2)
    more = {"stage": "data", "name": "more", "corpus": str(tmp_path / "there"), "sources": [{"stdlib": True}]}
    checked({"mixture": {"old": 1, "python": 1}}, more, name="more")
    with pytest.raises(PretrainError, match="'German'; accepted: docstrings, new, old, python"):
        checked({"mixture": {"German": 1}}, more, name="more")


def test_where_a_domain_may_be_a_column_or_files_are_many_nothing_is_refused(checked, monkeypatch, tmp_path):
    monkeypatch.setattr(_preflight, "SECONDS", 0.0)
    monkeypatch.setattr(glance, "LARGE", 0)  # a document of each source
    (tmp_path / "t.csv").write_text("text,German\n" + "words,a\nwords,b\n" * 50)
    more = {"stage": "data", "name": "more", "sources": [{"files": str(tmp_path / "t.csv"), "domain": "German"}]}
    checked({"mixture": {"b": 1}}, more, name="more")
    more["sources"] = [{"files": str(tmp_path / "de")}]
    checked({"mixture": {"md": 1}}, more, name="more")


def test_a_metric_of_a_domain_that_only_held_out_documents_have_is_taken(tmp_path):
    from pretrain.policies.averaging.keep_best import KeepBest

    class Stage:
        mixture = None

        def placed_methods(self):
            return [("policies.0", KeepBest(metric="loss/rare"))]

    seen = _preflight.Seen(None, {}, False, domains=("common",), held_out=("rare",))
    _preflight.check_domains(Stage(), seen)
    with pytest.raises(PretrainError, match="'rare'; accepted: common"):
        _preflight.check_domains(Stage(), _preflight.Seen(None, {}, False, domains=("common",)))
