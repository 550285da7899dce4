"""Which documents are copies of earlier ones, found with files in place of memory.

Of each document lie there: a key of its text, its MinHash signature, and a key of each band of that. Documents that
have a key in common are found by sorting the keys, some at a time; those are then gone through in order, and each is
compared with the ones before it that were kept. A document that shares no key with another is not looked at again.

Shape letters: N documents of a shard, P permutations, B bands; M documents that share a key, G of those in one portion.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.copies.minhash import ODD, PERMUTATIONS, band_keys, bands, signatures

SORTED = 1 << 21  # keys at once
SPAN = 1 << 17  # documents whose shared keys are read at once
KEY = np.dtype([("high", "<u8"), ("low", "<u8")])
SHARED = np.dtype([("document", "<i8"), ("group", "<i8")])  # a group: its first document and its band
Signed = tuple[NDArray[np.void], NDArray[np.uint32]]


def signed(rows: list[tuple[str, str]], threshold: float | None) -> Signed:
    """Of texts and what belongs to each: 16 bytes that copies share, of each band too, and the signatures.

    The keys are N rows of one, and of one a band where there is a threshold; the signatures are N by P, or N by 0.
    """
    of_text = [_key(text.encode(errors="surrogatepass"), beside) for text, beside in rows]
    key_N = np.frombuffer(b"".join(of_text), KEY)
    if threshold is None:
        return key_N[:, None], np.empty((len(rows), 0), np.uint32)
    signature_NP = signatures([text for text, _ in rows])
    key_NB = np.empty((len(rows), bands(threshold)), KEY)
    beside_N = np.frombuffer(b"".join(_key(b"", beside) for _, beside in rows), KEY)
    for half, odd in zip(("high", "low"), (ODD, ODD[::-1]), strict=True):
        key_NB[half] = band_keys(signature_NP, bands(threshold), beside_N[half], odd)
    return np.column_stack([key_N, key_NB]), signature_NP


def _key(text: bytes, beside: str) -> bytes:
    sized = len(text).to_bytes(8, "little")  # else what is parted at another place would be the same
    return blake2b(sized + text + beside.encode(errors="surrogatepass"), digest_size=16).digest()


class Signatures:
    """What `signed` gives of the shards of a corpus in order, in files that go when this closes."""

    def __init__(self, threshold: float | None) -> None:
        self.threshold, self.documents = threshold, 0
        self._open = ExitStack()
        self._signature_NP: NDArray[np.uint32] | None = None

    def __enter__(self) -> Self:
        self.folder = Path(self._open.enter_context(TemporaryDirectory(prefix="pretrain-signatures-")))
        count = 1 + (bands(self.threshold) if self.threshold else 0)
        self._keys = [self._open.enter_context((self.folder / f"key-{n}").open("wb")) for n in range(count)]
        self._signatures = self._open.enter_context((self.folder / "signatures").open("wb"))
        return self

    def __exit__(self, *of: object) -> None:
        self._signature_NP = None
        self._open.close()

    def add(self, key_NB: NDArray[np.void], signature_NP: NDArray[np.uint32]) -> None:
        """The next documents'."""
        for file, key_N in zip(self._keys, key_NB.T, strict=True):
            file.write(np.ascontiguousarray(key_N).tobytes())
        self._signatures.write(signature_NP.tobytes())
        self.documents += len(key_NB)

    def copies(self) -> Iterator[tuple[int, str, float, int]]:
        """The documents that are copies, in order: what (exact copy, near-duplicate), how alike, and of which document.

        A document is compared with those before it that were kept: the first that is alike says how much.
        """
        for file in (*self._keys, self._signatures):
            file.flush()
        for number in range(len(self._keys)):
            for shared_G in self._shared(number):
                self._put(shared_G)
        kept_of: dict[int, list[int]] = defaultdict(list)  # of a group
        near: dict[
            int, tuple[float, int]
        ] = {}  # of documents that were dropped and have copies: how alike, and to which
        for number in range(-(-self.documents // SPAN)):
            for document, groups in self._of_span(number):
                first = next((group // len(self._keys) for group in groups if group % len(self._keys) == 0), None)
                copy = first is not None and first < document
                of_bands = [group for group in groups if group % len(self._keys)]
                alike = near.get(first or 0) if copy else self._alike(document, of_bands, kept_of)
                if alike is not None:
                    yield document, "near-duplicate", *alike
                    if first == document:
                        near[document] = alike
                elif copy and first is not None:
                    yield document, "exact copy", 1.0, first
                else:
                    for group in of_bands:
                        kept_of[group].append(document)

    def _shared(self, number: int) -> Iterator[NDArray[np.void]]:
        """The documents that have a key of that number in common with others, and their groups."""
        key_N = np.memmap(self.folder / f"key-{number}", KEY, "r") if self.documents else np.empty(0, KEY)
        portions = -(-self.documents // SORTED)
        for portion in range(portions):
            place_M = _of_portion(key_N, portion, portions)
            high_M, low_M = key_N["high"][place_M], key_N["low"][place_M]
            order_M = np.lexsort((place_M, low_M, high_M))
            place_M, high_M, low_M = place_M[order_M], high_M[order_M], low_M[order_M]
            new_M = np.ones(len(place_M), bool)
            new_M[1:] = (high_M[1:] != high_M[:-1]) | (low_M[1:] != low_M[:-1])
            starts = np.flatnonzero(new_M)
            sizes = np.diff(starts, append=len(place_M))
            several_M = np.repeat(sizes > 1, sizes)
            shared_G = np.empty(int(several_M.sum()), SHARED)
            shared_G["document"] = place_M[several_M]
            shared_G["group"] = np.repeat(place_M[starts], sizes)[several_M] * len(self._keys) + number
            yield shared_G

    def _put(self, shared_G: NDArray[np.void]) -> None:
        """Write them into the files of their spans of documents."""
        span_G = shared_G["document"] // SPAN
        for span in np.unique(span_G):
            with (self.folder / f"span-{span}").open("ab") as file:
                file.write(shared_G[span_G == span].tobytes())

    def _of_span(self, number: int) -> Iterator[tuple[int, list[int]]]:
        """The documents of a span that share keys, in order, with their groups."""
        path = self.folder / f"span-{number}"
        if not path.exists():
            return
        shared_G = np.frombuffer(path.read_bytes(), SHARED)
        shared_G = shared_G[np.lexsort((shared_G["group"], shared_G["document"]))]
        starts = np.flatnonzero(np.diff(shared_G["document"], prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(shared_G)], strict=True):
            yield int(shared_G["document"][start]), shared_G["group"][start:stop].tolist()

    def _alike(self, document: int, groups: list[int], kept_of: dict[int, list[int]]) -> tuple[float, int] | None:
        """How alike the first kept document is that is at least `threshold` alike, and which; None without one."""
        others = sorted({other for group in groups for other in kept_of.get(group, ())})
        if self.threshold is None or not others:
            return None
        if self._signature_NP is None:
            self._signature_NP = np.memmap(self.folder / "signatures", np.uint32, "r").reshape(-1, PERMUTATIONS)
        alike = (self._signature_NP[others] == self._signature_NP[document]).mean(1)
        close = ((float(each), other) for each, other in zip(alike, others, strict=True) if each >= self.threshold)
        return next(close, None)


def _of_portion(key_N: NDArray[np.void], portion: int, portions: int) -> NDArray[np.int64]:
    """The places of the keys that are looked at together: equal ones are."""
    places = []
    for start in range(0, len(key_N), SORTED):
        mine = key_N["low"][start : start + SORTED] % np.uint64(portions) == portion
        places.append(start + np.flatnonzero(mine))
    return np.concatenate(places) if places else np.empty(0, np.int64)
