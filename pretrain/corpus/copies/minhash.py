"""Near-duplicates by MinHash: documents as sets of word 5-grams, compared by the share that they have in common.

Where words are written without spaces between them, characters stand for words.

Shape letters: N documents, P permutations, B bands of R rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash, RMinHashLSH

PERMUTATIONS, SHINGLE = 128, 5
ODD = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93], np.uint64)  # mix bits
MISSED = 0.95  # what a missed copy costs; a candidate that is none costs the rest, one look at two signatures
# Scripts without spaces between words, by Unicode's blocks: Thai and Lao; Tibetan and Burmese; Khmer; Tai Le, New Tai
# Lue and Tai Tham; Javanese and more of Burmese; kana, bopomofo and Han.
UNSPACED = (
    "\u0e00-\u0eff" "\u0f00-\u109f" "\u1780-\u17ff" "\u1950-\u19ff\u1a20-\u1aaf" "\ua980-\ua9ff\uaa60-\uaadf"
    "\u3005-\u3007\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f\U0001b000-\U0001b16f"
    "\u2e80-\u2fdf\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)  # fmt: skip
_UNSPACED, _UNIT = re.compile(f"[{UNSPACED}]"), re.compile(f"[{UNSPACED}]|[^\\s{UNSPACED}]+")


def units(text: str) -> list[str]:
    """The words between spaces, and each character of a script that has none."""
    return text.split() if text.isascii() or not _UNSPACED.search(text) else _UNIT.findall(text)


def shingles(text: str) -> list[str]:
    """The distinct runs of five units; all of them as one run where there are fewer."""
    parts = units(text)
    if len(parts) < SHINGLE:
        return [" ".join(parts)]
    return list(set(map(" ".join, zip(*(parts[start:] for start in range(SHINGLE)), strict=False))))


@cache
def bands(threshold: float) -> int:
    """How many bands the signatures are cut into: documents are candidates if they agree in all rows of a band.

    With b bands of r rows, which documents that are s alike are with 1 - (1 - s^r)^b. The b is that for which the areas
    of what is missed above the threshold and of what is found below it, weighed by `MISSED`, are least together.
    """
    alike_S = (np.arange(1000) + 0.5) / 1000

    def cost(count: int) -> float:
        candidate_S = 1 - (1 - alike_S ** (PERMUTATIONS / count)) ** count
        copies_S = alike_S >= threshold
        return float(MISSED * (1 - candidate_S)[copies_S].sum() + (1 - MISSED) * candidate_S[~copies_S].sum())

    return min((b for b in range(1, PERMUTATIONS + 1) if PERMUTATIONS % b == 0), key=cost)


def signature(text: str) -> RMinHash:
    """The document's MinHash signature."""
    minhash = RMinHash(num_perm=PERMUTATIONS, seed=0)
    minhash.update(shingles(text))
    return minhash


def signatures(texts: list[str]) -> NDArray[np.uint32]:
    """The documents' signatures, N by P."""
    return np.array([signature(text).digest() for text in texts], np.uint32).reshape(-1, PERMUTATIONS)


def band_keys(
    signature_NP: NDArray[np.uint32],
    count: int,
    begin_N: NDArray[np.uint64] | None = None,
    odd: NDArray[np.uint64] = ODD,
) -> NDArray[np.uint64]:
    """A number for each of `count` bands, N by B: the same where all of its rows, and the number in `begin_N`, are."""
    part_NBR = signature_NP.reshape(len(signature_NP), count, signature_NP.shape[1] // count).astype(np.uint64)
    begin_N = np.zeros(len(part_NBR), np.uint64) if begin_N is None else begin_N
    key_NB = np.zeros(part_NBR.shape[:2], np.uint64)
    for number_NB in (begin_N[:, None], *np.moveaxis(part_NBR, 2, 0)):
        key_NB = (key_NB ^ number_NB) * odd[0]
        key_NB = (key_NB ^ (key_NB >> np.uint64(31))) * odd[1]
    return key_NB ^ (key_NB >> np.uint64(29))


class Index:
    """Signatures that can be asked for a near-duplicate; candidates come from LSH, the verdict from the signatures."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.signatures: list[tuple[RMinHash, str]] = []
        self.buckets = RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=bands(threshold))

    def add(self, minhash: RMinHash, kind: str = "") -> None:
        """Put one in."""
        self.buckets.insert(len(self.signatures), minhash)
        self.signatures.append((minhash, kind))

    def has_near(self, minhash: RMinHash, kind: str = "") -> bool:
        """Whether one of that kind that was put in is at least `threshold` alike."""
        return self.near(minhash, kind) is not None

    def near(self, minhash: RMinHash, kind: str = "") -> float | None:
        """How alike the first of that kind is that was put in and is at least `threshold` alike."""
        others = (other for other, its in map(self.signatures.__getitem__, self.buckets.query(minhash)) if its == kind)
        return next((alike for alike in map(minhash.jaccard, others) if alike >= self.threshold), None)


def copies(texts: Iterable[tuple[str, str]], threshold: float | None) -> Iterator[tuple[str, float] | None]:
    """For each text None if it is kept, else what it is of one kept before, and how alike.

    It is an exact copy or (with a threshold) a near-duplicate. With each comes its kind; only texts of one kind are
    compared.
    """
    seen: set[tuple[str, str]] = set()
    index = Index(threshold) if threshold else None
    for text, kind in texts:
        if (text, kind) in seen:
            yield "exact copy", 1.0
            continue
        if index is not None:
            minhash = signature(text)
            alike = index.near(minhash, kind)
            if alike is not None:
                yield "near-duplicate", alike
                continue
            index.add(minhash, kind)
        seen.add((text, kind))
        yield None
