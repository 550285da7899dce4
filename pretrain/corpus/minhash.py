"""Near-duplicates by MinHash: documents as sets of word 5-grams, compared by the share that they have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rensa import RMinHash, RMinHashLSH

PERMUTATIONS, BANDS, SHINGLE = 128, 32, 5


def shingles(text: str) -> list[str]:
    """The distinct runs of five words; the words themselves where there are fewer."""
    words = text.split()
    if len(words) < SHINGLE:
        return words
    return list({" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)})


def signature(text: str) -> RMinHash:
    """The document's MinHash signature."""
    minhash = RMinHash(num_perm=PERMUTATIONS, seed=0)
    minhash.update(shingles(text))
    return minhash


class Index:
    """Signatures that can be asked for a near-duplicate; candidates come from LSH, the verdict from the signatures."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.signatures: list[tuple[RMinHash, str]] = []
        self.buckets = RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=BANDS)

    def add(self, minhash: RMinHash, kind: str = "") -> None:
        """Put one in."""
        self.buckets.insert(len(self.signatures), minhash)
        self.signatures.append((minhash, kind))

    def has_near(self, minhash: RMinHash, kind: str = "") -> bool:
        """Whether one of that kind that was put in is at least `threshold` alike."""
        near = (self.signatures[i] for i in self.buckets.query(minhash))
        return any(its == kind and minhash.jaccard(other) >= self.threshold for other, its in near)


def unique(texts: Iterable[tuple[str, str]], threshold: float | None) -> Sequence[bool]:
    """For each text whether it is kept: no exact copy and (with a threshold) no near-duplicate of one kept before.

    With each comes its kind; only texts of one kind are compared.
    """
    seen: set[tuple[str, str]] = set()
    index = Index(threshold) if threshold else None
    kept = []
    for text, kind in texts:
        keep = (text, kind) not in seen
        if keep and index is not None:
            minhash = signature(text)
            keep = not index.has_near(minhash, kind)
            if keep:
                index.add(minhash, kind)
        if keep:
            seen.add((text, kind))
        kept.append(keep)
    return kept
