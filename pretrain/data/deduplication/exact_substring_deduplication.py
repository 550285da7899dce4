"""Cut out of documents the long runs of tokens that the corpus has before, in other documents or in the same one."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from pretrain.core.bounds import Count, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.folders import tokenizer_of
from pretrain.core.method import Ref
from pretrain.corpus.copies.minhash import UNSPACED
from pretrain.data import DataOperation, _mapped
from pretrain.data._work import desk
from pretrain.data.deduplication._repeats import END, WINDOWS, later
from pretrain.data.deduplication._shortened import shortened

if TYPE_CHECKING:
    from datasets import Dataset

BYTES_OF_WORD = 4.0  # fewer than a word has, with the space after it
TOKEN, WINDOW, ENTRY = (
    20.0,
    80.0,
    1.2,
)  # bytes of memory: a token, a window of those compared at once, per byte of words
_WORD = re.compile(f"[{UNSPACED}]|[^\\W{UNSPACED}]+|[^\\w\\s]")
_SPACED = re.compile(rf"(?:{_WORD.pattern})\s*")
Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class ExactSubstringDeduplication(DataOperation):
    """Deduplicating Training Data Makes Language Models Better (arXiv:2107.06499).

    The paper's ExactSubstr: of a run of at least `length` tokens that documents have in common, or one has twice, the
    paper removes one copy. Here the first in the corpus stays, and of later ones what does not overlap it is cut out.
    Tokens are those of `tokenizer`, as in the paper; without one, words and signs, whatever blanks are between them,
    or, with `unit: bytes`, bytes of UTF-8, of which no character is parted. Equal windows are found by prefix doubling,
    as in building a suffix array; none is taken for equal that is not. A document that was cut is dropped if it has
    fewer than `least_words` words left (50, datatrove's). Memory: 20 bytes a token, 170 MB for what is compared at
    once, and of words the distinct ones. Text is changed.
    """

    computes: ClassVar[bool] = False
    speed: ClassVar[float] = 3.6e6

    length: Count = 50
    unit: Literal["words", "bytes"] = "words"
    tokenizer: Ref = ""
    least_words: Whole = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer and self.unit == "bytes":
            raise PretrainError("exact_substring_deduplication: unit 'bytes': accepted: without a tokenizer")

    def memory(self, size: float) -> float:
        """Bytes for a corpus of `size` bytes of text, as if no token were longer than usual."""
        tokens = size if self.unit == "bytes" else size / BYTES_OF_WORD
        return TOKEN * tokens + WINDOW * min(tokens, WINDOWS) + (0.0 if self.unit == "bytes" else ENTRY * size)

    def __call__(self, corpus: Dataset) -> Dataset:
        """The corpus without later copies, and without documents of which too little is left; the order is kept."""
        _mapped.check_text(self.name, corpus)
        tokens = self._tokens()
        sizes: list[int] = []
        copy_N = later(_joined(_batches(corpus, tokens), sizes), self.length)
        places = iter(zip(np.cumsum(np.array([0, *sizes], np.int64) + 1)[:-1] - 1, sizes, strict=False))

        def cut(texts: list[str]) -> list[str]:
            spans = [copy_N[start : start + size] for _, (start, size) in zip(texts, places, strict=False)]
            return [
                tokens.cut(text, gone_T) if gone_T.any() else text for text, gone_T in zip(texts, spans, strict=True)
            ]

        with desk() as here:
            return shortened(self.name, corpus, here, cut, self.least_words)

    def _tokens(self) -> Pieces:
        if self.tokenizer:
            return OfTokenizer(self.tokenizer)
        return Bytes() if self.unit == "bytes" else Words()


class Pieces:
    """What texts are made of."""

    @abstractmethod
    def numbers(self, texts: list[str]) -> list[Tokens]:
        """The texts' tokens."""
        raise NotImplementedError

    @abstractmethod
    def ends(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """At which characters each token begins and ends."""
        raise NotImplementedError

    def cut(self, text: str, gone_T: NDArray[np.bool_]) -> str:
        """The text without these tokens; of a character that one shares with a token that stays, nothing goes."""
        start_T, end_T = self.ends(text)
        kept, free = [], 0
        for start, end in _runs(gone_T):
            first = max(start_T[start], end_T[start - 1] if start else 0)
            last = start_T[end] if end < len(gone_T) else end_T[end - 1]
            kept.append(text[free:first])
            free = max(first, last)
        return "".join([*kept, text[free:]])


class Words(Pieces):
    """Words and signs, numbered as they come."""

    def __init__(self) -> None:
        self.number_of: dict[str, int] = {}

    def numbers(self, texts: list[str]) -> list[Tokens]:
        """The numbers of the words."""
        known = self.number_of
        return [
            np.array([known.setdefault(word, len(known)) for word in _WORD.findall(text)], np.int32) for text in texts
        ]

    def ends(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each word and the blanks after it."""
        spans = np.array([match.span() for match in _SPACED.finditer(text)], np.int64).reshape(-1, 2)
        return spans[:, 0], spans[:, 1]


class Bytes(Pieces):
    """Bytes of UTF-8."""

    def numbers(self, texts: list[str]) -> list[Tokens]:
        """The bytes."""
        return [np.frombuffer(text.encode(errors="surrogatepass"), np.uint8).astype(np.int32) for text in texts]

    def ends(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All bytes of a character begin and end where it does."""
        (byte_T,) = self.numbers([text])
        start_T = np.cumsum(byte_T & 0xC0 != 0x80) - 1
        return start_T, start_T + 1


class OfTokenizer(Pieces):
    """Tokens of a tokenizer, which tells where each begins and ends."""

    def __init__(self, folder: str) -> None:
        from pretrain.core.encoding import plain_backend
        from pretrain.corpus.tokenizers import load_tokenizer

        backend = plain_backend(load_tokenizer(tokenizer_of(Path(folder))))
        if backend is None:
            raise PretrainError(f"exact_substring_deduplication: tokenizer {folder}: accepted: one with tokenizer.json")
        self.backend = backend

    def numbers(self, texts: list[str]) -> list[Tokens]:
        """The tokens' numbers."""
        from pretrain.core.encoding import numbers

        return [np.array(each, np.int32) for each in numbers(self.backend, texts)]

    def ends(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The characters of the tokens."""
        from pretrain.core.encoding import spans

        span_T2 = np.array(spans(self.backend, text), np.int64).reshape(-1, 2)
        return span_T2[:, 0], span_T2[:, 1]


def _batches(corpus: Dataset, tokens: Pieces) -> Iterator[list[Tokens]]:
    for batch in corpus.select_columns(["text"]).with_format("arrow").iter(_mapped.SHARD):
        yield tokens.numbers([text or "" for text in batch["text"].to_pylist()])


def _joined(batches: Iterator[Sequence[Tokens]], sizes: list[int]) -> Tokens:
    """All tokens one after another, with a mark after each document; `sizes` gets how many each has."""
    token_N, many = np.empty(1 << 16, np.int32), 0
    for batch in batches:
        for document in batch:
            sizes.append(len(document))
            if many + len(document) + 1 > len(token_N):
                token_N = np.concatenate([token_N, np.empty(max(len(token_N) // 2, len(document) + 1), np.int32)])
            token_N[many : many + len(document)] = document
            token_N[many + len(document)] = END
            many += len(document) + 1
    return token_N[:many]


def _runs(gone_T: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where runs of tokens that go begin and end."""
    edges = np.flatnonzero(np.diff(gone_T.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
