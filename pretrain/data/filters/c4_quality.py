"""Keep the lines that are sentences, and the documents that have enough of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pretrain.core.bounds import Count, Whole
from pretrain.data import DataOperation
from pretrain.data._mapped import check_text, remade
from pretrain.data._work import by_domain, desk
from pretrain.data.filters._words import is_unspaced

if TYPE_CHECKING:
    from datasets import Dataset

TERMINAL = (".", "?", "!", '"', "'", "。", "？", "！", "”", "」")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_SENTENCE = re.compile(r"[.!?]+(?=\s|[\"'”’)\]]|$)|[。？！]+")


@dataclass(frozen=True)
class C4Quality(DataOperation):
    """Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (arXiv:1910.10683).

    How C4 was made of web pages: of a document those lines stay that end in a terminal mark (no ellipsis), have
    `words` words or more, none of them longer than `longest` characters, and mention neither JavaScript nor the phrases
    of terms and cookies; marks of citations (`[2]`, `[edit]`) are cut out of them. A document is dropped if a line that
    ends so has "lorem ipsum" or a curly bracket in it, or if fewer than `sentences` sentences are left. The paper's
    list of bad words is not part of this. Sentences are counted by their ends, words by spaces, and lines mostly in
    scripts without spaces by sentences alone. Text is changed.
    """

    computes: ClassVar[bool] = False
    speed: ClassVar[float] = 28e6
    shared: ClassVar[bool] = True

    sentences: Whole = 5
    words: Whole = 3
    longest: Count = 1000

    def __call__(self, corpus: Dataset) -> Dataset:
        """The documents that are kept, in order, with the lines that are."""
        check_text(self.name, corpus)
        reasons: list[str] = []
        counts: list[int] = []

        def clean(texts: list[str], cleaned: list[tuple[str, str, int]]) -> dict[str, list[str]]:
            reasons.extend(reason for _, reason, _ in cleaned)
            counts.extend(count for _, _, count in cleaned)
            return {"text": [old if why else new for old, (new, why, _) in zip(texts, cleaned, strict=True)]}

        with desk() as here:
            changed = remade(self.name, corpus, here, self.each_cleaned, clean)
            dropped_N = np.array([bool(why) for why in reasons], bool)
            kept, rows_D = np.flatnonzero(~dropped_N), np.flatnonzero(dropped_N)
            here.reports.append({"method": self.name, "documents": by_domain(corpus, kept)})
            here.drop(self.name, corpus, rows_D, [why for why in reasons if why], np.array(counts, float)[rows_D])
        return changed.select(kept)

    def each_cleaned(self, texts: list[str]) -> list[tuple[str, str, int]]:
        """What `cleaned` gives of texts."""
        return [self.cleaned(text) for text in texts]

    def cleaned(self, text: str) -> tuple[str, str, int]:
        """The lines that stay, the reason to drop the document (empty: none), and how many sentences there are."""
        sentences, kept = 0, []
        for line in map(str.strip, text.splitlines()):
            parts = line.split()
            unspaced = is_unspaced(line)
            if not unspaced and len(line) > self.longest and max(map(len, parts), default=0) > self.longest:
                continue
            if "[" in line:
                line = _CITATION.sub("", line)
            if not line.endswith(TERMINAL) or line.endswith("...") or (len(parts) < self.words and not unspaced):
                continue
            small = line.lower()
            if "lorem ipsum" in small:
                return "", "lorem ipsum", sentences
            if "javascript" in small:
                continue
            if "{" in line:
                return "", "curly bracket", sentences
            if any(phrase in small for phrase in POLICY):
                continue
            sentences += max(1, len(_SENTENCE.findall(line)))
            kept.append(line)
        why = "sentences" if sentences < self.sentences else ""
        return "\n".join(kept).strip(), why, sentences
