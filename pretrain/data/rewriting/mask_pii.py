"""Put a mark in the place of addresses and numbers that tell of a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pretrain.core.bounds import Whole
from pretrain.data import DataOperation
from pretrain.data._mapped import check_text, remade
from pretrain.data._work import by_domain, desk
from pretrain.data.rewriting import _pii

if TYPE_CHECKING:
    from datasets import Dataset

# In this order, since a part of the one may look like another.
KINDS: dict[str, Callable[[str], _pii.Spans]] = {
    "emails": _pii.emails, "ibans": _pii.ibans, "credit_cards": _pii.credit_cards, "ip_addresses": _pii.ip_addresses,
    "phone_numbers": _pii.phone_numbers,
}  # fmt: skip


@dataclass(frozen=True)
class MaskPii(DataOperation):
    """Dolma: an Open Corpus of Three Trillion Tokens for Language Model Pretraining Research (arXiv:2402.00159).

    In the place of what tells of a person stands a mark, each kind's field: of e-mail addresses, IP addresses that are
    reached from everywhere (private and reserved ones stay, as in FineWeb) and telephone numbers (with + and the
    country's, or North American) those of Dolma; of card numbers (an issuer's form, Luhn's check digit) and IBANs (the
    country's length, 1 modulo 97) such as these. A kind whose mark is null is left alone. Documents with more than
    `most` of all kinds are dropped (5 in Dolma, as it is quoted). The report counts each kind. Names, streets and
    numbers without a form of their own are not found. Text is changed.
    """

    computes: ClassVar[bool] = False
    speed: ClassVar[float] = 16e6
    shared: ClassVar[bool] = True

    emails: str | None = "|||EMAIL_ADDRESS|||"
    ip_addresses: str | None = "|||IP_ADDRESS|||"
    phone_numbers: str | None = "|||PHONE_NUMBER|||"
    credit_cards: str | None = "|||CREDIT_CARD|||"
    ibans: str | None = "|||IBAN|||"
    most: Whole | None = None

    def __call__(self, corpus: Dataset) -> Dataset:
        """The corpus with marks, without documents that have more than `most`; the order is kept."""
        check_text(self.name, corpus)
        counts: Counter[str] = Counter()
        many: dict[int, int] = {}
        number = changed = 0

        def mask(texts: list[str], masked: dict[int, tuple[str, Counter[str]]]) -> dict[str, list[str]]:
            nonlocal number, changed
            result = list(texts)
            for place, (text, marks) in masked.items():
                result[place] = text
                total = marks.total()
                counts.update(marks)
                changed += 1
                if self.most is not None and total > self.most:
                    many[number + place] = total
            number += len(texts)
            return {"text": result}

        with desk() as here:
            after = remade(self.name, corpus, here, self.each_masked, mask)
            rows_D = np.array(sorted(many), np.int64)
            kept = np.setdiff1d(np.arange(len(corpus)), rows_D)
            here.drop(self.name, corpus, rows_D, "personal data", np.array([many[row] for row in rows_D], float))
            facts = {"method": self.name, "documents": by_domain(corpus, kept), "changed": changed}
            masked = {kind: counts[kind] for kind in KINDS if getattr(self, kind) is not None}
            here.reports.append(facts | {"masked": masked})
        return after.select(kept)

    def each_masked(self, texts: list[str]) -> dict[int, tuple[str, Counter[str]]]:
        """Of texts that have any, by their places, what `masked` gives."""
        every = ((place, self.masked(text)) for place, text in enumerate(texts))
        return {place: (text, marks) for place, (text, marks) in every if marks}

    def masked(self, text: str) -> tuple[str, Counter[str]]:
        """The text with marks, and how many of each kind there were."""
        counts: Counter[str] = Counter()
        for kind, find in KINDS.items():
            mark = getattr(self, kind)
            spans = sorted(find(text)) if mark is not None else []
            kept, free = [], 0
            for start, end in spans:
                if start >= free:
                    kept += [text[free:start], mark]
                    free = end
                    counts[kind] += 1
            text = "".join([*kept, text[free:]]) if kept else text
        return text, counts
