"""What `corpus.json` says of the documents of a corpus: how many, how large, a digest of all, some to look at."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from random import Random

from pretrain.corpus.payload import bucket, payload
from pretrain.corpus.sources import Document

KEPT, LETTERS = 20, 600  # training documents that reports show, and letters of each
Counts = dict[str, dict[str, dict[str, int]]]


class Census:
    """Documents and bytes by split and domain in `counts`, in `lengths` how many are below each power of two of bytes.

    `kept` are the beginnings of some training documents, each drawn with the same chance.
    """

    def __init__(self) -> None:
        self.counts: Counts = {}
        self.lengths: dict[str, dict[str, int]] = {}
        self.kept: list[dict[str, str | int]] = []
        self._digest, self._random = hashlib.sha256(), Random(0)

    @property
    def digest(self) -> str:
        """Of all payloads in their order."""
        return self._digest.hexdigest()

    def begin(self, split: str) -> None:
        """The documents of a split follow."""
        self.split, self._seen = split, 0
        self._domains: dict[str, dict[str, int]] = defaultdict(lambda: {"documents": 0, "bytes": 0})
        self._lengths = Counter[str]()

    def add(self, document: Document) -> None:
        """One more of the split."""
        data, domain = payload(document), document["domain"]
        self._digest.update(f"{self.split}\0{domain}\0{len(data)}\0".encode() + data)
        self._domains[domain]["documents"] += 1
        self._domains[domain]["bytes"] += len(data)
        self._lengths[bucket(len(data))] += 1
        if self.split == "train" and document.get("text"):
            self._seen += 1
            place = len(self.kept) if len(self.kept) < KEPT else self._random.randrange(self._seen)
            if place < KEPT:
                row: dict[str, str | int] = {
                    "domain": str(domain),
                    "id": str(document.get("id") or ""),
                    "bytes": len(data),
                }
                self.kept[place : place + 1] = [row | {"text": document["text"][:LETTERS]}]

    def end(self) -> None:
        """The split is at its end."""
        self.counts[self.split] = dict(sorted(self._domains.items()))
        self.lengths[self.split] = dict(sorted(self._lengths.items(), key=lambda item: int(item[0])))
