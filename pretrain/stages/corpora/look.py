"""A look at the sources of a corpus that is not made yet.

What a corpus that is not made yet will hold is told by a look at its files: they are read for a moment, and split and
compared as they will be, so that copies are not counted twice and each split has the documents that their hashes put
there. Of more text than there is time for a part is read, a least amount of it in any case, and the rest is taken to be
like it: of each source in proportion, and of many files some from all over, since files are sorted by their names and
those that stand first are seldom like the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from operator import itemgetter

from pretrain.core.errors import PretrainError
from pretrain.corpus.look.glance import Glance
from pretrain.corpus.parts import GROUP_BYTES
from pretrain.corpus.payload import identity, only_text
from pretrain.corpus.sources import Document, Files, PythonStdlib, Skipped, Source, evenly, read_by_file, spread
from pretrain.corpus.sources._files import Part
from pretrain.corpus.store import key_of, side
from pretrain.dial.packed import packed
from pretrain.stages._examples import ROOM, shown

READ, COMPARED = 0.5, 0.5  # seconds that documents are read, and compared
SIZES = 200  # of documents that are kept, of a split
SPREAD = 64  # files of a source that are enough to be read from all over; of fewer each may be unlike the others
Place = tuple[int, int, int]  # of a document: the source, the file, and where it stands in that
Placed = tuple[Place, Document]


@dataclass(frozen=True)
class Looked:
    """By split what is left of the documents that were read, in bytes and in number; and some of their texts."""

    whole: bool  # whether all were read
    given: float  # bytes that were read, copies included
    bytes: dict[str, float] = field(default_factory=dict)
    documents: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, tuple[float, ...]] = field(default_factory=dict)  # bytes of some documents
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)  # all of them, or parts of some
    packed: float = 0.0  # bytes that what is left of them takes on the disk
    squares: float = 0.0  # of the bytes of each document, summed
    removed: float = 0.0  # documents that were read and are not left
    enough: bool = True  # whether they can tell of the rest, where they are not all
    alike: bool = False  # whether what was read lies over all the sources, and is not what stands first in them
    text: float = 0.0  # bytes that all the sources hold, by what the files that were read hold of theirs
    seconds: float = 0.0  # of the processor, to read them all

    @property
    def kept(self) -> float:
        """The share of the bytes that is left."""
        return sum(self.bytes.values()) / self.given if self.given else 1.0

    def spread(self, share: float, total: float) -> float:
        """By how much the text of a split of such a share is off, as a share of all `total` bytes (deviation).

        Each document is in it or is not: sqrt(share (1 - share) Σ size²) / total, of documents like those that were
        read.
        """
        squares = self.squares * total / max(1.0, self.given)
        return math.sqrt(share * (1 - share) * squares) / max(1.0, total)


def looked(
    sources: Sequence[Source], longest: int, shares: tuple[float, float], near: float | None, alike: float | None,
    salt: int = 0, sizes: Sequence[float] = (),
) -> Looked | None:  # fmt: skip
    """What is left of the sources' text by split; None where they are no plain texts, or cannot be read.

    There are `sizes` bytes of it in each, as far as files tell. `shares` are held out for validation and test, drawn by
    `salt`. Training documents that are `near` held-out ones are removed, and of those that are `alike` among themselves
    all but the first: None removes none, 0 exact copies alone.
    """
    if not sources or not all(_plain(source) for source in sources):
        return None
    seen: list[Placed] = []
    whole, many, text, seconds = False, False, 0.0, 0.0
    with suppress(PretrainError, OSError, ValueError):  # told when the stage runs
        skipped = Skipped(longest)
        by_file = [read_by_file(source, skipped) for source in sources]
        many, glance = min(map(len, by_file)) >= SPREAD, Glance(READ, sum(sizes) or math.inf)
        took, before = [0.0] * len(sources), 0
        for placed in _documents(by_file, sizes):
            seen.append(placed)
            began, stop = glance.taken, glance.enough(len(placed[1]["text"].encode()))
            took[before] += glance.taken - began  # whose next document was read meanwhile
            before = placed[0][0]
            if stop:
                break
        else:
            whole = True
        text, seconds = _in_all(seen, by_file, sizes, took, whole)
    if not seen:
        return None
    rows: dict[bytes, Document] = {}
    for _, document in sorted(seen, key=itemgetter(0)):  # of copies the stage takes the first
        rows.setdefault(identity(document), document)
    splits: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    for document in rows.values():
        splits[side(key_of(document), *shares, salt)].append(document)
    held = [document["text"] for split in ("validation", "test") for document in splits[split] if only_text(document)]
    train = splits["train"]
    left = _left([document["text"] for document in train], held, near, alike)
    by_split = {name: [float(len(document["text"].encode())) for document in some] for name, some in splits.items()}
    bytes_ = {name: sum(some) * (left if name == "train" else 1.0) for name, some in by_split.items()}
    documents = {name: len(some) * (left if name == "train" else 1.0) for name, some in by_split.items()}
    every = [size for some in by_split.values() for size in some]
    texts = {name: shown([document["text"] for document in some], ROOM[name]) for name, some in splits.items()}
    disk = {name: packed(some, GROUP_BYTES) * (left if name == "train" else 1.0) for name, some in splits.items()}
    if not whole and bytes_["train"]:  # a few held-out documents have a file's ends, and so have many: not to multiply
        disk = {"all": disk["train"] * sum(bytes_.values()) / bytes_["train"]}
    if not whole:  # which of few documents are held out is by chance
        by_split = dict.fromkeys(by_split, every)
    return Looked(
        whole, glance.bytes, bytes_, documents, {name: tuple(evenly(some, SIZES)) for name, some in by_split.items()},
        texts, sum(disk.values()), sum(size**2 for size in every), glance.documents - sum(documents.values()),
        whole or glance.least, many, text, seconds,
    )  # fmt: skip


def _in_all(
    seen: Sequence[Placed],
    by_file: Sequence[Sequence[Part]],
    sizes: Sequence[float],
    took: Sequence[float],
    whole: bool,
) -> tuple[float, float]:
    """Bytes of text that all files hold, and seconds to read them: of those read what they are to their files' bytes.

    Of a source of few files, of which perhaps none was read to its end, they are to its text as the files tell it.
    """
    text = seconds = 0.0
    for number, files in enumerate(by_file):
        given = sum(len(document["text"].encode()) for place, document in seen if place[0] == number)
        opened = sum(files[file][0] for file in {place[1] for place, _ in seen if place[0] == number})
        times = sum(size for size, _ in files) / opened if opened else 1.0
        if len(files) < SPREAD or not given:
            times = max(1.0, sizes[number] / given) if given and sizes else 1.0
        times = 1.0 if whole else times
        text, seconds = text + times * given, seconds + times * took[number]
    return text, seconds


def _plain(source: Source) -> bool:
    """Whether its documents are texts that are read at once."""
    return isinstance(source, PythonStdlib) or (isinstance(source, Files) and source.package is None)


def _documents(by_file: Sequence[Sequence[Part]], sizes: Sequence[float]) -> Iterator[Placed]:
    """The documents of the files of sources, of each source in proportion to its size."""
    streams = [_spread(number, some) for number, some in enumerate(by_file)]
    # Of each source the share that is read, its number, and its next document.
    ahead = [(0.0, number, placed) for number, stream in enumerate(streams) if (placed := next(stream, None))]
    heapify(ahead)
    while ahead:
        share, number, placed = ahead[0]
        yield placed
        share += len(placed[1]["text"].encode()) / max(1.0, sizes[number] if sizes else 1.0)
        following = next(streams[number], None)
        _ = heapreplace(ahead, (share, number, following)) if following else heappop(ahead)


def _spread(source: int, files: Sequence[Part]) -> Iterator[Placed]:
    """The documents with text of a source, from all over its files where there are many."""
    order = spread([size for size, _ in files]) if len(files) >= SPREAD else range(len(files))
    for file in order:
        for place, document in enumerate(files[file][1]):
            if isinstance(document.get("text"), str):
                yield (source, file, place), document


def _left(texts: Sequence[str], held: Sequence[str], near: float | None, alike: float | None) -> float:
    """The share of the training texts' bytes that is left once those are removed that are near others.

    Of those that there is no time for it is taken to be the same.
    """
    if not texts or not (near or alike):
        return 1.0
    from pretrain.corpus.copies.minhash import Index, signature

    glance, seen, gone = Glance(COMPARED / 2), 0.0, 0.0
    against, among = Index(near) if near else None, Index(alike) if alike else None
    for text in held:
        if against is None:
            break
        against.add(signature(text))
        if glance.enough(len(text.encode())):
            break
    glance = Glance(COMPARED - glance.spent)
    for text in texts:
        size, minhash = len(text.encode()), signature(text)
        double = (against is not None and against.has_near(minhash)) or (among is not None and among.has_near(minhash))
        seen, gone = seen + size, gone + size * double
        if among is not None and not double:
            among.add(minhash)
        if glance.enough(size):
            break
    return 1 - gone / seen if seen else 1.0
