"""The columns that an operation writes texts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pretrain.core.errors import PretrainError, nearest

if TYPE_CHECKING:
    from datasets import Dataset


def check_columns(method: str, corpus: Dataset, columns: Sequence[str]) -> None:
    """Refuse a corpus that lacks a column."""
    known = corpus.column_names
    for name in columns:
        if name not in known:
            accepted = ", ".join(known) or "a corpus with it"
            raise PretrainError(f"{method}: no column {name!r}{nearest(name, known)}; accepted: {accepted}")


def check_filled(method: str, number: int, document: Mapping[str, object], columns: Sequence[str]) -> None:
    """Refuse a document, the one of that number, that has nothing in a column."""
    empty = next((name for name in columns if document[name] is None), None)
    if empty is not None:
        raise PretrainError(f"{method}: document {number} has no {empty!r}; accepted: one in each")
