"""How likely a model finds a split that is in tokens already."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pretrain.core.models.likelihood import document_nll, likelihoods, predicted_bytes
from pretrain.corpus.bigrams import Bigrams
from pretrain.corpus.shards import Shards


def shard_loss(
    model: nn.Module, shards: Shards, *, length: int, stride: int | None = None, max_tokens: int | None = None
) -> dict[str, float]:
    """Held-out metrics of a causal model on a split's tokens, on the same documents each time.

    With `max_tokens` a fixed random choice of documents is measured that together hold about as many; a document counts
    for at most a 64th of it and is cut there, or for more where all of them so cut are fewer.
    """
    return _measured(shards, lambda documents: document_nll(model, documents, length=length, stride=stride), max_tokens)


def shard_line(train: Shards, shards: Shards, *, seen: int, max_tokens: int | None = None) -> dict[str, float]:
    """What counts of `seen` adjacent training tokens make of the same documents: a model must do better to be one."""
    return _measured(shards, Bigrams.of(train, seen).nll, max_tokens)


def _measured(
    shards: Shards, nll: Callable[[Sequence[NDArray[np.integer]]], NDArray[np.float64]], max_tokens: int | None
) -> dict[str, float]:
    """The likelihoods of the documents that are measured, by what `nll` says of each in nats."""
    lengths_N, chosen, cap = shards.lengths_N, np.arange(len(shards)), None
    if max_tokens is not None:
        cap = cap_of(lengths_N, max_tokens)
        order = np.random.default_rng(0).permutation(len(shards))
        count = int(np.searchsorted(np.cumsum(np.minimum(lengths_N, cap)[order]), max_tokens, "right"))
        chosen = np.sort(order[: max(1, count)])
    documents = [np.asarray(shards.document(int(i))[:cap]) for i in chosen]
    kept_N = np.array([len(d) for d in documents])
    # A cut document counts its share of bytes.
    bytes_N = shards.bytes_N[chosen] * (kept_N / np.maximum(lengths_N[chosen], 1))
    bytes_N = predicted_bytes(bytes_N, kept_N, begins=shards.info.get("begins", True))
    nll_N = nll(documents)
    domains = [shards.domain_names[d] for d in shards.domains_N[chosen]]
    metrics, by_domain = likelihoods(nll_N, np.maximum(kept_N - 1, 0), bytes_N, domains)
    return metrics | {f"{name}/{domain}": v for domain, values in by_domain.items() for name, v in values.items()}


def cap_of(lengths_N: NDArray[np.integer], most: int) -> int:
    """Where documents are cut: at a 64th of `most` tokens, or later where all then have no more than these."""
    low, high = max(2, most // 64), max(2, int(lengths_N.max(initial=0)))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(lengths_N, middle).sum() <= most else (low, middle - 1)
    return low
