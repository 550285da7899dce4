"""A corpus with other texts or more columns, made batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING
from uuid import uuid4

from pretrain.core.errors import PretrainError

if TYPE_CHECKING:
    from datasets import Dataset, Features

SHARD = 1024  # documents


def check_text(method: str, corpus: Dataset) -> None:
    """Refuse a corpus without text."""
    if "text" not in corpus.column_names:
        known = ", ".join(corpus.column_names) or "no columns"
        raise PretrainError(f"{method}: a corpus with {known}; accepted: one with text")


def mapped(corpus: Dataset, make: Callable[[list[str]], Mapping[str, Sequence[object]]], features: Features) -> Dataset:
    """The corpus with what `make` gives of the texts of `SHARD` documents, batch by batch and in order, on disk."""
    import datasets

    if not len(corpus):
        return datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    return corpus.map(
        make, input_columns="text", batched=True, batch_size=SHARD, features=features, load_from_cache_file=False,
        new_fingerprint=uuid4().hex,
    )  # fmt: skip
