"""Training documents that are near-duplicates of held-out ones, found lot by lot.

What is asked for of texts, their signatures, is a function that whoever calls may share out to processes.

Shape letters: N held-out documents, M others, T training documents, P permutations, B bands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.copies.minhash import band_keys, bands, signatures
from pretrain.corpus.payload import content, only_text
from pretrain.corpus.sources import Document

LOT = 1024  # documents
COMPARED = 4096  # signatures at once
Signatures = NDArray[np.uint32]
# What a function gives of each lot of texts, in order; the number is that of all texts.
Each = Callable[[Callable[[list[str]], Signatures], Iterable[list[str]], int], Iterator[Signatures]]


class Nearest:
    """Of documents whose signatures are given at once, the first that another one is at least `threshold` alike.

    Held of each are its signature and a number a band: with a threshold of 0.8 some 0.7 kB.
    """

    def __init__(self, signature_NP: Signatures, threshold: float) -> None:
        self.threshold, self.signature_NP = threshold, signature_NP
        key_NB = band_keys(signature_NP, bands(threshold))
        self._order = [np.argsort(key_N, kind="stable").astype(np.uint32) for key_N in key_NB.T]
        self._sorted = [key_N[order_N] for key_N, order_N in zip(key_NB.T, self._order, strict=True)]

    def first(self, signature_MP: Signatures) -> NDArray[np.int64]:
        """For each its place, or -1 where none is."""
        first_M = np.full(len(signature_MP), -1)
        key_MB = band_keys(signature_MP, len(self._order))
        ends = [
            (np.searchsorted(sorted_N, key_M), np.searchsorted(sorted_N, key_M, "right"))
            for sorted_N, key_M in zip(self._sorted, key_MB.T, strict=True)
        ]
        some_M = np.any([right_M > left_M for left_M, right_M in ends], axis=0)
        for document in np.flatnonzero(some_M):
            of_bands = [
                order_N[left_M[document] : right_M[document]]
                for order_N, (left_M, right_M) in zip(self._order, ends, strict=True)
            ]
            others = np.unique(np.concatenate(of_bands))
            for start in range(0, len(others), COMPARED):
                some = others[start : start + COMPARED]
                alike = (self.signature_NP[some] == signature_MP[document]).mean(1) >= self.threshold
                if alike.any():
                    first_M[document] = some[alike.argmax()]
                    break
        return first_M


def here(work: Callable[[list[str]], Signatures], lots: Iterable[list[str]], count: int) -> Iterator[Signatures]:
    """`Each` in this process."""
    return map(work, lots)


def near_held_out(
    held_out: Iterable[Document], training: Iterable[Document], counts: tuple[int, int], threshold: float, each: Each
) -> NDArray[np.int64]:
    """Of each training document the place of the first held-out one that it is a copy of, T; -1 where there is none.

    Texts are copies that are at least `threshold` alike; of documents that have more than text the content is the same.
    Documents come with their content alone; `counts` says how many there are of both.
    """
    key_N = list[bytes]()
    signature_NP = np.concatenate([signatures([]), *each(signatures, _lots(held_out, key_N), counts[0])])
    text_N = np.flatnonzero([not key for key in key_N])
    if not key_N:
        return np.full(counts[1], -1)
    nearest = Nearest(signature_NP[text_N], threshold)
    places = {key: place for place, key in reversed(list(enumerate(key_N))) if key}
    key_T, copy_T = list[bytes](), np.full(counts[1], -1)
    start = 0
    for signature_MP in each(signatures, _lots(training, key_T), counts[1]):
        stop = start + len(signature_MP)
        first_M = nearest.first(signature_MP)
        copy_T[start:stop] = np.where(first_M < 0, -1, text_N[first_M] if len(text_N) else -1)
        for place in range(start, stop):
            if key := key_T[place]:
                copy_T[place] = places.get(key, -1)
        start = stop
    return copy_T


def _lots(documents: Iterable[Document], keys: list[bytes]) -> Iterator[list[str]]:
    """The texts of some documents at a time; `keys` takes nothing for one of text alone, else 16 bytes of its content.

    Such a one has no text here.
    """
    stream = iter(documents)
    while some := list(islice(stream, LOT)):
        plain = [only_text(document) for document in some]
        keys += [
            b"" if text else hashlib.blake2b(content(document), digest_size=16).digest()
            for text, document in zip(plain, some, strict=True)
        ]
        yield [document["text"] if text else "" for text, document in zip(plain, some, strict=True)]
