"""What removing lines and removing paragraphs share: parts of documents, told apart by hashes of what they say.

A part is compared as CCNet does: in lower case, each digit as 0, without punctuation, accents and control characters,
and so are the spaces around it. What is nothing then, as a blank line or a rule of dashes, is no part.

Shape letters: P parts of some documents, U distinct ones, S slots of a table.
"""

from __future__ import annotations

import unicodedata
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from pretrain.data import DataOperation, _mapped
from pretrain.data._work import desk
from pretrain.data.deduplication._shortened import shortened

if TYPE_CHECKING:
    from datasets import Dataset

FIRST_SLOTS = 1 << 12  # of a table; a power of two
MOVED = 1 << 18  # slots at a time when a table grows
Hashes = NDArray[np.uint64]


class PartDeduplication(DataOperation):
    """Base of those that remove parts of documents which stand elsewhere too."""

    computes: ClassVar[bool] = False
    shared: ClassVar[bool] = True
    common: int
    least_words: int

    @abstractmethod
    def split(self, text: str) -> list[str]:
        """The parts of a text."""
        raise NotImplementedError

    @abstractmethod
    def without(self, text: str, gone_P: NDArray[np.bool_]) -> str:
        """The text without those of its parts."""
        raise NotImplementedError

    def __call__(self, corpus: Dataset) -> Dataset:
        """The corpus without these parts, and without documents of which too little is left; the order is kept."""
        _mapped.check_text(self.name, corpus)
        table = Table()
        with desk() as here, TemporaryFile() as file:
            stream = here.workers.each(self.name, self.hashes, _mapped.shards(corpus), len(corpus))
            hashed = (made for _, made in stream)
            if self.common:
                self._count(hashed, table, file)

            def cut(texts: list[str]) -> list[str]:
                sizes, hash_P = self._again(texts, file) if self.common else next(hashed)
                assert len(sizes) == len(texts), "documents come in the batches in which they are shared out"
                gone_P = _beyond(hash_P, table, self.common) if self.common else _again(hash_P, table)
                ends = np.cumsum(sizes)[:-1]
                return [
                    self.without(text, each_P) if each_P.any() else text
                    for text, each_P in zip(texts, np.split(gone_P, ends), strict=True)
                ]

            return shortened(self.name, corpus, here, cut, self.least_words)

    def hashes(self, texts: Sequence[str]) -> tuple[list[int], Hashes]:
        """How many parts each text has, and the hashes of them all; 0 of what is no part."""
        sizes, digests = [], []
        for text in texts:
            parts = normal("\n".join(part.replace("\n", " ") for part in self.split(text))).split("\n")
            sizes.append(len(parts))
            for part in parts:
                bare = part.strip()
                digests.append(blake2b(bare.encode(errors="surrogatepass"), digest_size=8).digest() if bare else _NONE)
        return sizes, np.frombuffer(b"".join(digests), np.uint64)

    def _count(self, hashed: Iterable[tuple[list[int], Hashes]], table: Table, file: IO[bytes]) -> None:
        """Put into the table how many documents have each part, and into the file all sizes and hashes."""
        for sizes, hash_P in hashed:
            for size, each_P in zip(sizes, np.split(hash_P, np.cumsum(sizes)[:-1]), strict=True):
                file.write(size.to_bytes(8, "little") + each_P.tobytes())
            document_P = np.repeat(np.arange(len(sizes)), sizes)
            table.add(*_documents(hash_P, document_P))
        file.seek(0)

    def _again(self, texts: Sequence[str], file: IO[bytes]) -> tuple[list[int], Hashes]:
        """What `hashes` gave of these texts, which come in the order in which they were counted."""
        sizes, pieces = [], []
        for _ in texts:
            sizes.append(int.from_bytes(file.read(8), "little"))
            pieces.append(file.read(8 * sizes[-1]))
        return sizes, np.frombuffer(b"".join(pieces), np.uint64)


class Table:
    """64-bit numbers (0 is none) with a count each, in slots of 12 bytes of which half at the most are taken."""

    def __init__(self) -> None:
        self._key_S, self._count_S = np.zeros(FIRST_SLOTS, np.uint64), np.zeros(FIRST_SLOTS, np.uint32)
        self._taken = 0

    def add(self, key_U: Hashes, by_U: NDArray[np.int64] | int = 1) -> NDArray[np.uint32]:
        """Raise the counts of distinct numbers; what they were before."""
        while 2 * (self._taken + len(key_U)) > len(self._key_S):
            self._grow()
        slot_U = self._slots(key_U)
        before_U = self._count_S[slot_U]
        self._count_S[slot_U] = np.minimum(before_U.astype(np.int64) + by_U, np.iinfo(np.uint32).max)
        self._taken += int((before_U == 0).sum())
        return before_U

    def counts(self, key_U: Hashes) -> NDArray[np.uint32]:
        """The counts of numbers that were all added."""
        return self._count_S[self._slots(key_U)]

    def _grow(self) -> None:
        key_S, count_S = self._key_S, self._count_S
        self._key_S, self._count_S = np.zeros(2 * len(key_S), np.uint64), np.zeros(2 * len(key_S), np.uint32)
        for start in range(0, len(key_S), MOVED):
            part = slice(start, start + MOVED)
            there = key_S[part] != 0
            self._count_S[self._slots(key_S[part][there])] = count_S[part][there]

    def _slots(self, key_U: Hashes) -> NDArray[np.int64]:
        """Where distinct numbers stand; those that do not yet are put into the next free slots."""
        last = len(self._key_S) - 1
        slot_U = (key_U & np.uint64(last)).astype(np.int64)
        open_U = np.arange(len(key_U))
        while len(open_U):
            slots, keys = slot_U[open_U], key_U[open_U]
            free = self._key_S[slots] == 0
            self._key_S[slots[free]] = keys[free]  # of several that want one slot the last has it
            open_U = open_U[self._key_S[slots] != keys]
            slot_U[open_U] = (slot_U[open_U] + 1) & last
        return slot_U


def _again(hash_P: Hashes, table: Table) -> NDArray[np.bool_]:
    """Which parts were there before, among these or in the table, which has them all now."""
    key_U, first_U = np.unique(hash_P, return_index=True)
    key_U, first_U = key_U[key_U != 0], first_U[key_U != 0]
    gone_P = hash_P != 0
    gone_P[first_U] = table.add(key_U) > 0
    return gone_P


def _beyond(hash_P: Hashes, table: Table, common: int) -> NDArray[np.bool_]:
    """Which parts stand in more than `common` documents."""
    key_U, which_P = np.unique(hash_P, return_inverse=True)
    count_U = np.zeros(len(key_U), np.uint32)
    count_U[key_U != 0] = table.counts(key_U[key_U != 0])
    return (count_U > common)[which_P]


def _documents(hash_P: Hashes, document_P: NDArray[np.int64]) -> tuple[Hashes, NDArray[np.int64]]:
    """The distinct parts, and in how many of the documents each is."""
    order_P = np.lexsort((document_P, hash_P))
    hash_P, document_P = hash_P[order_P], document_P[order_P]
    new_P = np.concatenate([[True], (hash_P[1:] != hash_P[:-1]) | (document_P[1:] != document_P[:-1])])
    key_U, count_U = np.unique(hash_P[new_P & (hash_P != 0)], return_counts=True)
    return key_U, count_U


class _Signs(dict[int, int | str | None]):
    """What a character is compared as, by its number: looked up once."""

    def __missing__(self, code: int) -> int | str | None:
        kind = unicodedata.category(chr(code))
        away = kind[0] == "P" or (kind == "Cc" and code != ord("\n")) or 0x300 <= code < 0x370
        self[code] = "0" if kind == "Nd" else None if away else code
        return self[code]


_SIGNS, _NONE = _Signs(), bytes(8)


def normal(text: str) -> str:
    """A text as it is compared; its lines stay lines."""
    text = text.lower()
    return (text if text.isascii() else unicodedata.normalize("NFD", text)).translate(_SIGNS)
