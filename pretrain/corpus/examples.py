"""A split's documents as examples, each whole and with all its columns: for objectives that read examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pretrain.core.batch import Example
from pretrain.core.encoding import Encoder
from pretrain.core.errors import PretrainError, nearest
from pretrain.core.processors import Processor, tokenizer_in
from pretrain.corpus.sources import Document
from pretrain.corpus.store import Corpus

if TYPE_CHECKING:
    from datasets import Dataset


def _rows(split: Dataset) -> Iterator[Document]:
    for table in split.iter(256):
        yield from table.to_pylist()


class Examples:
    """Stands where shards stand for a loader: its rows are the documents, one each.

    `columns` must be there, with a value in each document; an error names the first that is not. Held-out documents of
    which none has a value are left out: operations that add columns see the training documents alone.
    """

    def __init__(self, corpus: Corpus, split: str, processor: Processor, columns: Sequence[str] = ()) -> None:
        self.folder, self.split = corpus.folder, corpus.split(split)
        self.info = {"corpus": corpus.info["fingerprint"]}
        self.domain_names = corpus.domains
        for name in columns if len(self) else ():
            known = self.split.column_names
            if name not in known:
                raise PretrainError(
                    f"{corpus.folder}: no column {name!r}{nearest(name, known)}; accepted: {', '.join(known)}"
                )
            stored = self.split.select_columns([name]).with_format("arrow")  # files undecoded
            empty = next((i for i, row in enumerate(_rows(stored)) if row[name] is None), None)
            if empty == 0 and split != "train" and all(row[name] is None for row in _rows(stored)):
                self.split = self.split.select([])
                break
            if empty is not None:
                raise PretrainError(f"{corpus.folder}: {split} document {empty} has no {name!r}; accepted: one in each")
        numbers = {name: number for number, name in enumerate(self.domain_names)}
        self.domain_R = np.array([numbers[name] for name in self.split["domain"]], np.uint16)
        self._members: dict[str, dict[str, list[int]]] = {}
        tokenizer = tokenizer_in(processor)
        self.given: dict[str, Any] = {"processor": processor, "encoder": tokenizer and Encoder(tokenizer)}

    def __len__(self) -> int:
        return len(self.split)

    def plan(self, length: int) -> Examples:
        """Examples are not packed."""
        return self

    def keep(self, numbers: Sequence[int]) -> None:
        """Leave out all other documents."""
        self.split, self.domain_R = self.split.select(numbers), self.domain_R[list(numbers)]
        self._members = {}

    def row(self, _: object, index: int) -> Example:
        """One document."""
        return Example(self.split[index], int(self.domain_R[index]), index)

    def members(self, column: str) -> dict[str, list[int]]:
        """The numbers of the documents by what a column says, in order."""
        if column not in self._members:
            members: dict[str, list[int]] = {}
            for number, value in enumerate(self.split[column]):
                members.setdefault(str(value), []).append(number)
            self._members[column] = members
        return self._members[column]

    def rows_of_domain(self, domain: int) -> NDArray[np.int64]:
        """The numbers of the documents of one domain."""
        return np.flatnonzero(self.domain_R == domain)
