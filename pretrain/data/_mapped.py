"""A corpus with other texts or more columns, made batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING
from uuid import uuid4

from pretrain.core.errors import PretrainError
from pretrain.data._workers import Made, Shard

if TYPE_CHECKING:
    from datasets import Dataset, Features

    from pretrain.data._work import Desk

SHARD = 1024  # documents


def check_text(method: str, corpus: Dataset) -> None:
    """Refuse a corpus without text."""
    if "text" not in corpus.column_names:
        known = ", ".join(corpus.column_names) or "no columns"
        raise PretrainError(f"{method}: a corpus with {known}; accepted: one with text")


def shards(corpus: Dataset) -> Iterator[Shard]:
    """The texts of `SHARD` documents, one lot after another; of a document without one the empty text."""
    for table in corpus.select_columns(["text"]).with_format("arrow").iter(SHARD):
        yield Shard([text or "" for text in table["text"].to_pylist()])


def remade(
    method: str, corpus: Dataset, here: Desk, work: Callable[[list[str]], Made],
    make: Callable[[list[str], Made], Mapping[str, Sequence[object]]], features: Features | None = None,
) -> Dataset:  # fmt: skip
    """As `mapped` (`features`: the corpus's own); `make` is also given what the desk's workers make of the texts."""
    stream = here.workers.each(method, work, shards(corpus), len(corpus))

    def of_both(texts: list[str]) -> Mapping[str, Sequence[object]]:
        shard, made = next(stream)
        assert len(shard.rows) == len(texts), "documents come in the batches in which they are shared out"
        return make(texts, made)

    return mapped(corpus, of_both, features or corpus.features)


def mapped(corpus: Dataset, make: Callable[[list[str]], Mapping[str, Sequence[object]]], features: Features) -> Dataset:
    """The corpus with what `make` gives of the texts of `SHARD` documents, batch by batch and in order, on disk."""
    import datasets

    if not len(corpus):
        return datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    return corpus.map(
        make, input_columns="text", batched=True, batch_size=SHARD, features=features, load_from_cache_file=False,
        new_fingerprint=uuid4().hex,
    )  # fmt: skip
