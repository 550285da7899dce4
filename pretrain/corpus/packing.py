"""Packing: whole documents into rows of fixed length, best fit first.

A document longer than a row is cut into full rows and a remainder; remainders and shorter documents are taken from the
longest to the shortest, each into the fullest row of its domain that has room (*Fewer Truncations Improve Language
Modeling*, arXiv:2404.10830). Nothing is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pretrain.core.batch import Row
from pretrain.core.errors import PretrainError, warn
from pretrain.core.files import SUMS, atomic_folder, damage, locked, sweep
from pretrain.core.foreign.arrays import read_array


class Tokens(Protocol):
    """What is packed: one split's documents in tokens (`corpus.shards.Shards`)."""

    folder: Path
    domains_N: NDArray[np.uint16]

    @property
    def tokens(self) -> int:
        """How many there are."""

    @property
    def seal(self) -> str:
        """By which they are known from others."""

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens of each document."""

    def piece(self, document: int, start: int, length: int) -> NDArray[np.integer]:
        """A run of one document's tokens."""


@dataclass(frozen=True)
class Plan:
    """Which pieces of which documents make each row; R rows, P pieces, all in row order."""

    first_R1: NDArray[np.int64]  # the row's first piece; one more entry for the end
    domain_R: NDArray[np.uint16]
    document_P: NDArray[np.int64]
    start_P: NDArray[np.int64]  # where the piece begins in its document
    length_P: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.domain_R)

    def row(self, shards: Tokens, index: int) -> Row:
        """One row with its tokens."""
        pieces = range(int(self.first_R1[index]), int(self.first_R1[index + 1]))
        lengths = self.length_P[pieces.start : pieces.stop]
        parts = [shards.piece(int(self.document_P[p]), int(self.start_P[p]), int(self.length_P[p])) for p in pieces]
        return Row(
            tokens_L=np.concatenate(parts).astype(np.int32),
            starts_D=np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int32),
            documents_D=np.asarray(self.document_P[pieces.start : pieces.stop]),
            domain=int(self.domain_R[index]),
            index=index,
        )

    def rows_of_domain(self, domain: int) -> NDArray[np.int64]:
        """The numbers of the rows of one domain."""
        return np.flatnonzero(self.domain_R == domain)


def pack(lengths_N: NDArray[np.integer], domains_N: NDArray[np.integer], length: int) -> Plan:
    """Plan the rows of `length` tokens for documents of these lengths and domains."""
    plans = [
        _pack_domain(np.flatnonzero(domains_N == domain), lengths_N, length, int(domain))
        for domain in np.unique(domains_N)
    ]
    if not plans:
        empty = np.zeros(0, np.int64)
        return Plan(np.zeros(1, np.int64), np.zeros(0, np.uint16), empty, empty, np.zeros(0, np.int32))
    shifts = np.cumsum([0] + [len(p.document_P) for p in plans])
    firsts = [p.first_R1[:-1] + shift for p, shift in zip(plans, shifts)]
    whole = {f.name: np.concatenate([getattr(p, f.name) for p in plans]) for f in fields(Plan)}
    return Plan(**(whole | {"first_R1": np.append(np.concatenate(firsts), shifts[-1])}))


def _pack_domain(documents: NDArray[np.int64], lengths_N: NDArray[np.integer], length: int, domain: int) -> Plan:
    sizes = lengths_N[documents].astype(np.int64)
    full, rest = sizes // length, sizes % length
    # Full rows, one piece each.
    document_F = np.repeat(documents, full)
    ordinal_F = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    # Remainders, from the longest.
    order = np.argsort(-rest, kind="stable")
    order = order[rest[order] > 0]
    row_Q, rows = _best_fit(rest[order], length)
    by_row = np.argsort(row_Q, kind="stable")
    order, row_Q = order[by_row], row_Q[by_row]
    first_Q = np.searchsorted(row_Q, np.arange(rows))
    return Plan(
        first_R1=np.concatenate(
            [np.arange(len(document_F)), len(document_F) + first_Q, [len(document_F) + len(order)]]
        ),
        domain_R=np.full(len(document_F) + rows, domain, np.uint16),
        document_P=np.concatenate([document_F, documents[order]]),
        start_P=np.concatenate([ordinal_F * length, full[order] * length]),
        length_P=np.concatenate([np.full(len(document_F), length), rest[order]]).astype(np.int32),
    )


def _best_fit(sizes: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], int]:
    """The row of each piece (sizes descending), each into the fullest row with room; and how many rows.

    Rows stand in stacks by the room they have left; an integer whose bit r says that stack r is not empty finds the
    smallest sufficient room in one operation, so millions of pieces take seconds.
    """
    stacks: list[list[int]] = [[] for _ in range(length + 1)]
    occupied, rows = 0, 0
    row_of = np.empty(len(sizes), np.int64)
    for index, size in enumerate(sizes.tolist()):
        enough = occupied >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            row = stacks[room].pop()
            if not stacks[room]:
                occupied &= ~(1 << room)
        else:
            room, row, rows = length, rows, rows + 1
        row_of[index] = row
        if room > size:
            stacks[room - size].append(row)
            occupied |= 1 << (room - size)
    return row_of, rows


def plan_for(shards: Tokens, length: int) -> Plan:
    """The plan of a split at one row length, kept beside its tokens and memory-mapped."""
    folder = shards.folder / f"rows-{length}"
    of = f"{length} {shards.seal}"
    finding = damage(folder, of=of)
    if finding:
        warn(f"{finding}: the rows of {length} tokens are planned anew")
    elif (folder / SUMS).exists():
        try:
            plan = _read(folder)
            if int(plan.length_P.sum()) == shards.tokens and int(plan.first_R1[-1]) == len(plan.document_P):
                return plan
        except (OSError, ValueError, EOFError):
            pass  # damaged: it can be made anew from the lengths
    made = pack(shards.lengths_N, shards.domains_N, length)
    try:
        with locked(shards.folder / ".lock"):
            sweep(shards.folder, folder.name)
            with atomic_folder(folder, of) as work:
                for field in fields(Plan):
                    np.save(work / f"{field.name}.npy", getattr(made, field.name))
    except PretrainError:
        return made  # another process wrote it first, or the folder cannot be written: the plan is the same
    return _read(folder)


def _read(folder: Path) -> Plan:
    return Plan(**{f.name: read_array(folder / f"{f.name}.npy") for f in fields(Plan)})
