"""Remove paragraphs that stand elsewhere in the corpus: licences, quotations, passages that are passed on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pretrain.core.bounds import Whole
from pretrain.data.deduplication._parts import PartDeduplication

_BLANK = re.compile(r"\n(?:[^\S\n]*\n)+")


@dataclass(frozen=True)
class ParagraphDeduplication(PartDeduplication):
    """CCNet: Extracting High Quality Monolingual Datasets from Web Crawl Data (arXiv:1911.00359).

    As line_deduplication, for paragraphs with blank lines between them: compared in lower case, each digit as 0,
    without punctuation and accents, by 64 bits of a hash. With `common` 0 a paragraph stays where the corpus has it
    first; else paragraphs of more than `common` documents go from them all. A document that lost some is dropped if it
    has fewer than `least_words` words left; the paragraphs that it had count as seen nonetheless. Memory: 24 to 48
    bytes a distinct paragraph, 80 while the table grows, and 8 on disk for each with `common`. Text is changed.
    """

    speed: ClassVar[float] = 30e6

    common: Whole = 0
    least_words: Whole = 50

    def split(self, text: str) -> list[str]:
        """What stands between blank lines."""
        return _BLANK.split(text)

    def without(self, text: str, gone_P: NDArray[np.bool_]) -> str:
        """The paragraphs that stay, each with the blank lines after it as far as another follows."""
        ends = [match.span() for match in _BLANK.finditer(text)]
        spans = zip([0, *(end for _, end in ends)], [*(start for start, _ in ends), len(text)], strict=True)
        kept = [
            (text[start:end], text[end : after[1]] if after else "")
            for (start, end), after, gone in zip(spans, [*ends, None], gone_P.tolist(), strict=True)
            if not gone
        ]
        return "".join(part + (after or "\n\n" if n < len(kept) - 1 else "") for n, (part, after) in enumerate(kept))
