"""What a corpus that is not made yet will hold: its files are read for a moment, and split and compared as it will be.

So copies are not counted twice, and each split has the documents that their hashes put there. Of more text than there
is time for the beginning is read, and the rest is taken to be like it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from pretrain.core.errors import PretrainError
from pretrain.corpus.payload import identity, only_text
from pretrain.corpus.sources import Document, Files, PythonStdlib, Skipped, Source, evenly, read
from pretrain.corpus.store import key_of, side
from pretrain.stages._examples import middle

READ, COMPARED = 0.5, 0.5  # seconds that documents are read, and compared, at most
SHOWN, LONG = 200, 1000  # texts that are kept, and characters of each
SIZES = 200  # of documents that are kept, of a split


@dataclass(frozen=True)
class Looked:
    """By split what is left of the documents that were read, in bytes and in number; and some of their texts."""

    whole: bool  # whether all were read
    given: float  # bytes that were read, copies included
    bytes: dict[str, float] = field(default_factory=dict)
    documents: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, tuple[float, ...]] = field(default_factory=dict)  # bytes of some documents
    texts: tuple[str, ...] = ()

    @property
    def kept(self) -> float:
        """The share of the bytes that is left."""
        return sum(self.bytes.values()) / self.given if self.given else 1.0


def looked(
    sources: Sequence[Source], longest: int, shares: tuple[float, float], near: float | None, alike: float | None
) -> Looked | None:
    """What is left of the sources' text by split; None where they are no plain texts, or cannot be read.

    `shares` are held out for validation and test. Training documents that are `near` held-out ones are removed, and of
    those that are `alike` among themselves all but the first: None removes none, 0 exact copies alone.
    """
    if not sources or not all(_plain(source) for source in sources):
        return None
    rows: dict[bytes, Document] = {}
    given, whole, begun = 0.0, True, time.perf_counter()
    with suppress(PretrainError, OSError, ValueError):  # told when the stage runs
        for document in _documents(sources, longest):
            given += len(document["text"].encode())
            rows.setdefault(identity(document), document)
            if time.perf_counter() - begun > READ:
                whole = False
                break
    if not rows:
        return None
    splits: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    for document in rows.values():
        splits[side(key_of(document), *shares)].append(document)
    held = [document["text"] for split in ("validation", "test") for document in splits[split] if only_text(document)]
    train = splits["train"]
    left = _left([document["text"] for document in train], held, near, alike)
    sizes = {name: [float(len(document["text"].encode())) for document in some] for name, some in splits.items()}
    bytes_ = {name: sum(some) * (left if name == "train" else 1.0) for name, some in sizes.items()}
    documents = {name: len(some) * (left if name == "train" else 1.0) for name, some in sizes.items()}
    shown = tuple(middle(document["text"], LONG) for document in evenly(train, SHOWN))
    return Looked(
        whole, given, bytes_, documents, {name: tuple(evenly(some, SIZES)) for name, some in sizes.items()}, shown
    )


def _plain(source: Source) -> bool:
    """Whether its documents are texts that are read at once."""
    return isinstance(source, PythonStdlib) or (isinstance(source, Files) and source.package is None)


def _documents(sources: Sequence[Source], longest: int) -> Iterator[Document]:
    skipped = Skipped(longest)
    for source in sources:
        for document in read(source, skipped):
            if isinstance(document.get("text"), str):
                yield document


def _left(texts: Sequence[str], held: Sequence[str], near: float | None, alike: float | None) -> float:
    """The share of the training texts' bytes that is left once those are removed that are near others.

    Of those that there is no time for it is taken to be the same.
    """
    if not texts or not (near or alike):
        return 1.0
    from pretrain.corpus.minhash import Index, signature

    begun, seen, gone = time.perf_counter(), 0.0, 0.0
    against, among = Index(near) if near else None, Index(alike) if alike else None
    for text in held:
        if against is None:
            break
        against.add(signature(text))
        if time.perf_counter() - begun > COMPARED / 2:
            break
    for text in texts:
        size, minhash = len(text.encode()), signature(text)
        double = (against is not None and against.has_near(minhash)) or (among is not None and among.has_near(minhash))
        seen, gone = seen + size, gone + size * double
        if among is not None and not double:
            among.add(minhash)
        if time.perf_counter() - begun > COMPARED:
            break
    return 1 - gone / seen if seen else 1.0
