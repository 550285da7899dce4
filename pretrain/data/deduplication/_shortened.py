"""What operations share that cut out of documents what stands elsewhere: the rest, what is too little, the counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pretrain.corpus.copies.minhash import units
from pretrain.data._mapped import mapped
from pretrain.data._work import Desk, by_domain

if TYPE_CHECKING:
    from datasets import Dataset

LITTLE = "little left"  # the reason to drop what a cut has left next to nothing of


def shortened(
    method: str, corpus: Dataset, here: Desk, cut: Callable[[list[str]], Sequence[str]], least_words: int
) -> Dataset:
    """The corpus with what `cut` leaves of its texts, given batch by batch and in order.

    Of what was cut, documents of fewer than `least_words` words (characters, in scripts without spaces) are dropped,
    and those of which nothing is left; one that nothing was cut out of stays as it is. The report counts characters:
    `cut` out of all documents, and what was left in those that were `dropped`; the rest of `before` is still there.
    """
    dropped: list[int] = []
    left: list[int] = []
    counts = {"before": 0, "cut": 0, "dropped": 0}
    number = changed = 0

    def shorten(texts: list[str]) -> dict[str, list[str]]:
        nonlocal number, changed
        result = list(texts)
        for place, (old, new) in enumerate(zip(texts, cut([text or "" for text in texts]), strict=True)):
            length = len(old or "")
            counts["before"] += length
            if new != (old or ""):
                result[place] = new
                changed += 1
                counts["cut"] += length - len(new)
                words = len(units(new))
                if words < max(1, least_words):
                    counts["dropped"] += len(new)
                    dropped.append(number + place)
                    left.append(words)
        number += len(texts)
        return {"text": result}

    short = mapped(corpus, shorten, corpus.features)
    rows_D = np.array(dropped, np.int64)
    kept = np.setdiff1d(np.arange(len(corpus)), rows_D)
    here.drop(method, corpus, rows_D, LITTLE, np.array(left, float))
    facts = {"method": method, "documents": by_domain(corpus, kept), "changed": changed, "characters": counts}
    here.reports.append(facts)
    return short.select(kept)
