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
    """Held-out metrics of a causal model on a split's tokens, on the same ones each time.

    With `max_tokens` a fixed random choice of windows is measured that together predict about as many, so that it tells
    of all the text: neither of the beginnings of documents nor of a long one alone.
    """
    if stride not in (None, length) and max_tokens is not None:
        raise ValueError("windows that overlap are measured all together")
    return _measured(
        shards, lambda pieces: document_nll(model, pieces, length=length, stride=stride), length, max_tokens
    )


def shard_line(
    train: Shards, shards: Shards, *, seen: int, length: int, max_tokens: int | None = None
) -> dict[str, float]:
    """What counts of `seen` adjacent training tokens make of the same text: a model must do better to be one."""
    return _measured(shards, Bigrams.of(train, seen).nll, length, max_tokens)


def _measured(
    shards: Shards, nll: Callable[[Sequence[NDArray[np.integer]]], NDArray[np.float64]], length: int,
    max_tokens: int | None,
) -> dict[str, float]:  # fmt: skip
    """The likelihoods of the text that is measured, by what `nll` says in nats of each piece after its first token."""
    lengths_N = np.asarray(shards.lengths_N, np.int64)
    number_P, start_P, targets_P = np.arange(len(lengths_N)), np.zeros_like(lengths_N), np.maximum(lengths_N - 1, 0)
    if max_tokens is not None and targets_P.sum() > max_tokens:
        number_P, start_P, targets_P = _windows(lengths_N, length, max_tokens)
    pieces = [
        np.asarray(shards.document(int(i))[start : start + count + 1])
        for i, start, count in zip(number_P, start_P, targets_P, strict=True)
    ]
    # A piece counts its share of its document's bytes.
    bytes_N = predicted_bytes(shards.bytes_N, lengths_N, begins=shards.info.get("begins", True))
    shares_P = np.where(lengths_N[number_P] > 1, targets_P / np.maximum(lengths_N[number_P] - 1, 1), 1.0)
    domains = [shards.domain_names[d] for d in shards.domains_N[number_P]]
    metrics, by_domain = likelihoods(nll(pieces), targets_P, bytes_N[number_P] * shares_P, domains)
    return metrics | {f"{name}/{domain}": v for domain, values in by_domain.items() for name, v in values.items()}


def _windows(
    lengths_N: NDArray[np.int64], length: int, most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """A fixed random choice of windows of `length`, of at most `most` targets or one window, in their order.

    What is returned is their documents, first tokens and targets.
    """
    count_N = -(-np.maximum(lengths_N - 1, 0) // length)
    number_W = np.repeat(np.arange(len(lengths_N)), count_N)
    start_W = (np.arange(len(number_W)) - np.repeat(np.cumsum(count_N) - count_N, count_N)) * length
    targets_W = np.minimum(length, lengths_N[number_W] - 1 - start_W)
    order_W = np.random.default_rng(0).permutation(len(number_W))
    enough = int(np.searchsorted(np.cumsum(targets_W[order_W]), most, "right"))
    chosen_P = np.sort(order_W[: max(1, enough)])
    return number_W[chosen_P], start_W[chosen_P], targets_W[chosen_P]
