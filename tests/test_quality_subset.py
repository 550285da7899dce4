"""The quality subset: the best of a domain by bytes, by a column or by a model of good text."""

from __future__ import annotations

import pytest

from pretrain.core.errors import PretrainError
from pretrain.corpus.store import write_corpus
from pretrain.data.selection.quality_subset import QualitySubset

datasets = pytest.importorskip("datasets")


def corpus(**columns):
    texts = [f"document {n} " + "x" * (89 if n % 2 else 9) for n in range(10)]  # 100 and 20 bytes
    return datasets.Dataset.from_dict({"text": texts, "domain": ["new"] * 8 + ["old"] * 2} | columns)


def test_the_best_that_hold_the_share_stay_in_order_and_other_domains_are_whole():
    kept = QualitySubset("new", share=0.5)(corpus(quality=[5, 1, 9, 8, 3, 7, 2, 6, 0, 0]))
    # Of 480 bytes half is held by 9 (20), 8 (100), 7 (100), and 6 (100), which passes it.
    assert [t.split()[1] for t in kept["text"]] == ["2", "3", "5", "7", "8", "9"]
    assert QualitySubset("new", share=1.0)(corpus(quality=[1] * 10))["text"] == corpus()["text"]


def test_what_reads_like_the_reference_is_best(tmp_path):
    good = [
        f"the cat {verb} on the mat and the dog {verb} by the door {n}" for n in range(40) for verb in ("sat", "lay")
    ]
    write_corpus(
        [{"text": t, "domain": "good", "id": str(i)} for i, t in enumerate(good)], tmp_path / "corpus",
        near_duplicates=None,
    )  # fmt: skip
    texts = ["zq vx qq zz 99 !!", "the dog sat on the mat", "the cat lay by the door", "colourless green ideas sleep"]
    pool = datasets.Dataset.from_dict({"text": texts, "domain": ["new"] * 4})
    kept = QualitySubset("new", share=0.4, reference=str(tmp_path))(pool)
    assert kept["text"] == texts[1:3]


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(PretrainError, match="domain 'news' has no documents; accepted: new, old"):
        QualitySubset("news")(corpus())
    with pytest.raises(PretrainError, match="no column 'quality' and no reference; accepted"):
        QualitySubset("new")(corpus())
    with pytest.raises(PretrainError, match="column 'quality' is not all numbers"):
        QualitySubset("new")(corpus(quality=["a"] * 10))
    with pytest.raises(PretrainError, match="share 0: accepted: above 0"):
        QualitySubset("new", share=0)
