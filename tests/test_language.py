"""Languages are told from text alone, kept by their codes, and read again from the columns."""

from __future__ import annotations

import sys

import pytest
from datasets import Dataset

from pretrain.core.errors import PretrainError
from pretrain.data._dropped import Ledger
from pretrain.data._work import working
from pretrain.data.filters.language import Language

TEXTS = {
    "en": "The house stands at the edge of the forest, and nobody has lived in it for many years.",
    "de": "Das Haus steht am Rand des Waldes, und seit vielen Jahren hat niemand mehr darin gewohnt.",
    "fr": "La maison se trouve à la lisière de la forêt, et personne n'y a habité depuis des années.",
    "zh": "房子在森林的边上，已经很多年没有人住在里面了。",
    "ru": "Дом стоит на краю леса, и уже много лет в нём никто не живёт.",
}


@pytest.fixture
def corpus():
    return Dataset.from_list([{"text": text, "id": code} for code, text in TEXTS.items()])


def test_each_document_has_its_language_and_a_score(corpus):
    pytest.importorskip("py3langid")
    tagged = Language()(corpus)
    assert list(tagged["language"]) == list(TEXTS) and all(0.5 < score <= 1 for score in tagged["language_score"])
    assert list(Language()(corpus.select([]))["language"]) == []


def test_wanted_languages_stay_and_are_not_told_again(corpus, tmp_path, monkeypatch):
    pytest.importorskip("py3langid")
    tagged = Language()(corpus)
    ledger = Ledger(tmp_path)
    monkeypatch.setattr(Language, "_identifier", None)
    with working(tmp_path, ledger):
        kept = Language(keep=("fr", "en"))(tagged)
        ledger.settle("language", tagged, kept)
        assert len(Language(least=1.0)(tagged)) < len(TEXTS)
    ledger.close()
    assert list(kept["id"]) == ["en", "fr"]
    assert set(ledger.funnel[0]["reasons"]) == {"language de", "language zh", "language ru"}


def test_unknown_languages_and_columns_by_half_are_refused(corpus):
    with pytest.raises(PretrainError, match="both of|and language_score or neither"):
        Language()(corpus.add_column("language", list(TEXTS)))
    pytest.importorskip("py3langid")
    with pytest.raises(PretrainError, match="keep 'english'.*accepted: .*en"):
        Language(keep=("english",))(corpus)


def test_without_the_package_the_extra_is_named(corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.delitem(sys.modules, "py3langid.langid", raising=False)
    with pytest.raises(PretrainError, match=r"accepted: pip install 'pretrain\[language\]'"):
        Language()(corpus)
