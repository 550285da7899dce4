"""What a corpus that is not made yet is expected to hold and to take, and what is said of uneven splits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from pretrain.core.files import JSONObject
from pretrain.core.quick.quantities import counted, short
from pretrain.core.system.processes import usable_cores
from pretrain.data import DataOperation
from pretrain.data._workers import START
from pretrain.stages._estimates import FLOOR, RECORDS, Estimate, Left, Odd
from pretrain.stages._examples import Texts
from pretrain.stages.corpora.look import Looked

# Times the share that a split has or lacks, at any size of its documents and where they are so many times as large or
# small as others; and what of a share is by chance: all that is told.
FAR, UNEVEN, UNSIZED, UNSURE = 5.0, 2.0, 1.5, 0.3
TINY = 20  # documents, of fewer a split may well be one
MUCH = 0.1  # of a corpus's text: a domain that each split should have
# Of a data stage, on one core of a CPU: seconds to open what reads and writes, and what operations need; bytes a second
# that are split and written, and compared with held-out documents; seconds that other processes take to begin.
OPENED, LIBRARIES, WRITTEN, COMPARED, BEGINNING = 0.3, 1.5, 45e6, 22e6, 1.0
SAMPLES = 5e3  # bytes of a few documents that are shown
TOTALS, REMOVED = 2e3, 80.0  # bytes of a corpus's counts and checksums; of a line for a document that is removed


def uneven(info: JSONObject, shares: Mapping[str, float]) -> Iterable[str]:
    """What is said of splits that documents of unequal size have made unlike what was asked for."""
    whole, every = (max(1.0, sum(info[what].values())) for what in ("bytes", "documents"))
    for split, share in shares.items():
        documents, held = info["documents"].get(split, 0), info["bytes"].get(split, 0) / whole
        off = max(held / share, share / max(held, 1e-9)) if share else 1.0
        size = held * every / max(1.0, documents)  # of one of its documents, beside the usual one
        alone = documents == 1 and every >= TINY
        if documents and share and (alone or off > FAR or (off > UNEVEN and not 1 / UNSIZED < size < UNSIZED)):
            yield (
                f"the {split} split has {documents:,.0f} of the documents with {held:.1%} of the text, not "
                f"{share:.1%}: the documents are uneven; accepted: smaller ones, another share, or another split_seed"
            )
        if share and documents:
            yield from _lacking(split, info.get("domains", {}))


def _empty(documents: Mapping[str, float], shares: Mapping[str, float]) -> Iterable[str]:
    """What is said of splits that few documents leave empty."""
    for split, share in shares.items():
        if share and not documents.get(split):
            yield (
                f"no {split} documents: {sum(documents.values()):,.0f} are too few for a share of {share:g}; accepted: "
                "more documents, pieces of them (a source's pieces: 5000), or a larger share"
            )


def _lacking(split: str, domains: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterable[str]:
    """What is said of domains that a split hardly has, and the corpus has much of."""
    sizes = {part: {name: counts["bytes"] for name, counts in rows.items()} for part, rows in domains.items()}
    whole = {
        name: sum(rows.get(name, 0.0) for rows in sizes.values()) for name in dict.fromkeys(chain(*sizes.values()))
    }
    held = sizes.get(split, {})
    for name, size in whole.items():
        usual, there = size / max(1.0, sum(whole.values())), held.get(name, 0.0) / max(1.0, sum(held.values()))
        if usual >= MUCH and there < usual / 4:
            count = domains.get(split, {}).get(name, {}).get("documents", 0)
            yield (
                f"{there:.0%} of the {split} text is {name} ({counted(int(count), 'document')}), {usual:.0%} of all: "
                f"what is measured there says little of {name}; accepted: a larger share, or smaller documents"
            )


def corpus_estimate(
    total: float, documents: float, validation: float, test: float, works: bool, rows: Texts = (), whole: float = 0.0,
    seen: Looked | None = None, seconds: float | None = None,
) -> Estimate:  # fmt: skip
    """Of a corpus of so many bytes of text, and a few documents of it; `works`: operations compute something too.

    `whole` are the bytes of its files, where these hold more than the text; `seen` is what was read of them, which it
    takes so many seconds to write and to operate on.
    """
    held = max(total, whole)
    shares = {"train": 1 - validation - test, "validation": validation, "test": test}
    left = Left({split: share * total for split, share in shares.items()},
                {split: share * documents for split, share in shares.items() if documents}, rows=rows)  # fmt: skip
    basis = "what is said of its text is by the sizes of its sources, copies included"
    disk: float | None = RECORDS + SAMPLES + TOTALS + compressed(held)
    if seen is not None and not seen.enough:  # too little to tell of the rest
        disk = None
    elif seen is not None:
        left, basis = _seen(left, seen), _basis(seen, total, {"validation": validation, "test": test})
        on_disk = (seen.packed + REMOVED * seen.removed) * (1.0 if seen.whole else total / max(1.0, seen.given))
        disk = RECORDS + SAMPLES + TOTALS + on_disk
    shared = {"validation": validation, "test": test} if seen is not None and seen.whole else {}
    lines = uneven({"bytes": left.bytes, "documents": left.documents}, shared)
    odd = tuple(Odd(text.split()[1], text) for text in chain(_empty(left.documents, shared), lines))
    return Estimate(None if works else 0.0, FLOOR + 10 * min(held, 128e6), seconds, disk, 1.0, left, odd, basis=basis)


def work_seconds(
    size: float, documents: float, near: bool, operations: Sequence[DataOperation], workers: int, loaded: bool = False
) -> float | None:
    """Seconds to write a corpus of so many bytes of text, to look for copies (`near`), and of operations.

    What workers share takes one core `START` seconds, and then as many as there are; None where an operation says
    nothing. Libraries may be `loaded`, by the stage that has made the corpus before.
    """
    count = workers or usable_cores()
    each = [operation.seconds(size, documents) for operation in operations]
    shares = [size / COMPARED] if near else []
    shares += [took for took, operation in zip(each, operations, strict=True) if took and operation.shared]
    alone = [took for took, operation in zip(each, operations, strict=True) if not operation.shared]
    if None in each:
        return None
    begun = 0.0 if count == 1 or max(shares, default=0.0) <= START else BEGINNING
    shared = sum(took if count == 1 else min(took, START) + max(0.0, took - START) / count for took in shares)
    opening = 0.0 if loaded else OPENED + (LIBRARIES if operations else 0.0)
    return opening + size / WRITTEN + begun + shared + sum(filter(None, alone))


def _seen(left: Left, seen: Looked) -> Left:
    """What a corpus is to hold, by the documents that were read: all of them, or a part that is like the rest."""
    if seen.whole:
        return replace(left, bytes=seen.bytes, documents=seen.documents, sizes=seen.sizes, texts=seen.texts)
    if not left.documents and seen.given:  # of tables nobody has counted the rows
        many = sum(seen.documents.values()) / seen.given / max(seen.kept, 1e-9)
        left = replace(left, documents={split: many * size for split, size in left.bytes.items()})
    bytes_, documents = (
        {split: value * seen.kept for split, value in of.items()} for of in (left.bytes, left.documents)
    )
    # A few large documents decide how large those are that were read: the mean is that of all.
    mean = sum(left.bytes.values()) / max(1.0, sum(left.documents.values()))
    sizes = {split: tuple(mean * len(some) / sum(some) * size for size in some)
             for split, some in seen.sizes.items() if sum(some)}  # fmt: skip
    return replace(left, bytes=bytes_, documents=documents, sizes=sizes, texts=seen.texts)


def _basis(seen: Looked, total: float, shares: Mapping[str, float]) -> str:
    """What is known of the text, in words: of a part also how much a split may have by chance."""
    share = min(1.0, seen.given / max(1.0, total))
    few = f"{share:.1%}" if share >= 0.001 else f"{short(seen.given, 'B')}, less than 0.1%,"
    some = f"{few} of its sources, from all over them" if seen.alike else f"the first {few} of its sources"
    part = "its sources" if seen.whole else some
    copies = f", of which copies are {1 - seen.kept:.0%}" if seen.kept < 0.995 else ""
    unsure = ""
    for name, asked in shares.items():
        spread = 0.0 if seen.whole else 2 * seen.spread(asked, total)
        if spread > UNSURE * asked:
            unsure = f"; its documents are uneven: the {name} split may have {max(0.0, asked - spread):.1%} to "
            unsure += f"{min(1.0, asked + spread):.1%} of the text, not {asked:.1%}"
    return f"what is said of its text is by a look at {part}{copies}{unsure}"


def compressed(size: float) -> float:
    """Bytes on the disk of so many bytes of text, in columns and by zstd: less of it repeats the less there is."""
    return 0.25 * size * (1 + math.sqrt(3e4 / max(1.0, size)))
