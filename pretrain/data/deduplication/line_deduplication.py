"""Remove lines that stand elsewhere in the corpus: menus, notices, what one page has of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pretrain.core.bounds import Whole
from pretrain.data.deduplication._parts import PartDeduplication


@dataclass(frozen=True)
class LineDeduplication(PartDeduplication):
    """CCNet: Extracting High Quality Monolingual Datasets from Web Crawl Data (arXiv:1911.00359).

    Lines (the paper's paragraphs) are compared in lower case, each digit as 0, without punctuation and accents, by 64
    bits of a hash. With `common` 0 a line stays where the corpus has it first and goes wherever else it stands, in the
    same document too; else lines of more than `common` documents go from them all (1 is the paper's way). Blank lines
    that are left side by side become one. A document that lost lines is dropped if it has fewer than `least_words`
    words left (50, of datatrove's sentence deduplication); the lines that it had count as seen nonetheless. Memory: 24
    to 48 bytes a distinct line, 80 while the table grows, and 8 on disk for each line with `common`. Text is changed.
    """

    speed: ClassVar[float] = 24e6

    common: Whole = 0
    least_words: Whole = 50

    def split(self, text: str) -> list[str]:
        """The lines."""
        return text.split("\n")

    def without(self, text: str, gone_P: NDArray[np.bool_]) -> str:
        """The lines that stay; of blank ones around a gap one."""
        kept: list[str] = []
        gap = False
        for line, gone in zip(text.split("\n"), gone_P.tolist(), strict=True):
            if gone:
                gap = True
            elif line.strip() or not gap or (kept and kept[-1].strip()):
                kept.append(line)
                gap = gap and not line.strip()
        return "\n".join(kept)
