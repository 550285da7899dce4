"""How likely a model finds text: each token of each document predicted exactly once, from as much before as fits.

Shape letters: B windows of a batch, L tokens of a window, N targets, C of a chunk, E width, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pretrain.core.errors import PretrainError
from pretrain.core.generation.finite import check_logits
from pretrain.core.models.cross_entropy import IGNORE, linear_cross_entropy
from pretrain.core.models.families import family, head, hidden, softcap
from pretrain.core.models.features import evaluating

CHUNK_BYTES = 64 << 20  # of logits


@dataclass(frozen=True)
class Window:
    """A run of one document's tokens; the first `context` targets were predicted in an earlier window."""

    document: int
    tokens: NDArray[np.integer]
    context: int


def windows(document: int, tokens: NDArray[np.integer], length: int, stride: int) -> Iterator[Window]:
    """Windows of at most `length` inputs that together predict each token after the first once."""
    start, done = 0, 1  # `done`: tokens already predicted, the first counted as given
    while done < len(tokens):
        end = min(start + length + 1, len(tokens))
        yield Window(document, tokens[start:end], done - start - 1)
        done, start = end, end - 1 - (length - stride) if end < len(tokens) else end


def document_nll(
    model: nn.Module,
    documents: Sequence[NDArray[np.integer]],
    *,
    length: int,
    stride: int | None = None,
    batch_tokens: int = 4096,
) -> NDArray[np.float64]:
    """The negative log-likelihood of each document in nats, its first token given.

    `length` inputs a window; consecutive windows of a long document advance by `stride` (default: all of `length`).
    """
    nll_N = np.zeros(len(documents))
    with evaluating(model):
        ends = head(model, capped=True)
        for chosen in _lots(model, documents, length, stride, batch_tokens):
            for window, nll in zip(chosen, _window_nll(model, chosen, *ends), strict=True):
                nll_N[window.document] += nll
    return nll_N


def token_ranks(
    model: nn.Module,
    documents: Sequence[NDArray[np.integer]],
    *,
    length: int,
    stride: int | None = None,
    batch_tokens: int = 4096,
) -> list[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Of each document, for its tokens after the first: its loss in nats, and how many others are as likely or more.

    Windows are those of `document_nll`; the tokens come in no particular order.
    """
    nlls, ranks = ([[np.zeros(0)] for _ in documents], [[np.zeros(0, np.int64)] for _ in documents])
    with evaluating(model):
        for chosen in _lots(model, documents, length, stride, batch_tokens):
            states_BLE, target_BL = _window_states(model, chosen)
            has_target_BL = target_BL != IGNORE
            nll_N, rank_N = _ranked(model, states_BLE[has_target_BL], target_BL[has_target_BL])
            ends = has_target_BL.sum(-1).cumsum(0)[:-1].tolist()
            for window, nll, rank in zip(chosen, np.split(nll_N, ends), np.split(rank_N, ends), strict=True):
                nlls[window.document].append(nll)
                ranks[window.document].append(rank)
    return [(np.concatenate(nll), np.concatenate(rank)) for nll, rank in zip(nlls, ranks, strict=True)]


def _lots(
    model: nn.Module, documents: Sequence[NDArray[np.integer]], length: int, stride: int | None, batch_tokens: int
) -> Iterator[list[Window]]:
    """The documents' windows, batch by batch."""
    if not family(model).causal:
        raise PretrainError(f"{type(model).__name__} predicts no next token; accepted: a causal language model")
    if not 1 <= (length if stride is None else stride) <= length:
        raise PretrainError(f"stride {stride}, length {length}: accepted: 1 <= stride <= length")
    todo = [w for i, tokens in enumerate(documents) for w in windows(i, tokens, length, stride or length)]
    todo.sort(key=lambda w: len(w.tokens))
    yield from _batches(todo, batch_tokens)


def _batches(todo: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Windows, sorted by length, in lots of about `batch_tokens`."""
    start = 0
    while start < len(todo):
        width = len(todo[min(start + max(1, batch_tokens // len(todo[start].tokens)), len(todo)) - 1].tokens)
        yield todo[start : start + max(1, batch_tokens // width)]
        start += max(1, batch_tokens // width)


def _window_states(model: nn.Module, chosen: list[Window]) -> tuple[torch.Tensor, torch.Tensor]:
    """`states_BLE` of windows, and the `target_BL` that are theirs to predict."""
    device, width = next(model.parameters()).device, max(len(w.tokens) for w in chosen) - 1
    input_BL = torch.zeros(len(chosen), width, dtype=torch.long)
    target_BL = torch.full((len(chosen), width), IGNORE)
    for b, window in enumerate(chosen):
        tokens = torch.from_numpy(window.tokens.astype(np.int64))
        input_BL[b, : len(tokens) - 1] = tokens[:-1]
        target_BL[b, window.context : len(tokens) - 1] = tokens[1 + window.context :]
    # Padding stands at the end, where a causal model's predictions do not see it.
    return hidden(model, input_ids=input_BL.to(device), use_cache=False), target_BL.to(device)


def _window_nll(
    model: nn.Module, chosen: list[Window], weight_VE: torch.Tensor, bias_V: torch.Tensor | None
) -> list[float]:
    """The negative log-likelihood of each window's new targets."""
    states_BLE, target_BL = _window_states(model, chosen)
    _, nll_BL = linear_cross_entropy(states_BLE, weight_VE, target_BL, bias_V=bias_V, softcap=softcap(model))
    check_logits(nll_BL, type(model).__name__)
    return nll_BL.double().sum(-1).tolist()


def _logits(
    model: nn.Module, states_NE: torch.Tensor, target_N: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`logits_CV`, a chunk at a time, and the chunk's `target_C`."""
    (weight_VE, bias_V), cap = head(model, capped=True), softcap(model)
    rows = max(1, CHUNK_BYTES // (4 * len(weight_VE)))
    for start in range(0, len(states_NE), rows):
        logits_CV = torch.nn.functional.linear(states_NE[start : start + rows], weight_VE, bias_V).float()
        if cap is not None:
            logits_CV = cap * torch.tanh(logits_CV / cap)
        check_logits(logits_CV, type(model).__name__)
        yield logits_CV, target_N[start : start + rows]


def _ranked(
    model: nn.Module, states_NE: torch.Tensor, target_N: torch.Tensor
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """`nll_N` of the targets, and `rank_N`: how many other tokens of the vocabulary are as likely or likelier."""
    nlls, ranks = [np.zeros(0)], [np.zeros(0, np.int64)]
    for logits_CV, target_C in _logits(model, states_NE, target_N):
        own_C1 = logits_CV.gather(-1, target_C[:, None])
        nlls.append((logits_CV.logsumexp(-1) - own_C1[:, 0]).double().cpu().numpy())
        ranks.append((logits_CV >= own_C1).sum(-1).sub(1).cpu().numpy())
    return np.concatenate(nlls), np.concatenate(ranks)


def judged(
    model: nn.Module, states_NE: torch.Tensor, target_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`nll_N`, `confidence_N` and `right_N` of the targets, the logits made a chunk at a time."""
    parts = []
    for logits_CV, target_C in _logits(model, states_NE, target_N):
        total_C, (top_C, likeliest_C) = logits_CV.logsumexp(-1), logits_CV.max(-1)
        nll_C = total_C - logits_CV.gather(-1, target_C[:, None])[:, 0]
        parts.append((nll_C.double(), (top_C - total_C).double().exp(), likeliest_C == target_C))
    nll_N, confidence_N, right_N = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return nll_N, confidence_N, right_N


def predicted_bytes(bytes_N: NDArray[np.number], tokens_N: NDArray[np.integer], *, begins: bool) -> NDArray[np.float64]:
    """The bytes that the predicted tokens hold: all, if a special token stands before the text.

    Otherwise nothing predicts a document's first token, and it takes its share of the bytes with it.
    """
    if begins:
        return np.asarray(bytes_N, np.float64)
    return bytes_N * (np.maximum(tokens_N - 1, 0) / np.maximum(tokens_N, 1))


def likelihoods(
    nll_N: NDArray[np.float64], targets_N: NDArray[np.number], bytes_N: NDArray[np.number], domains: Sequence[str]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """`loss` (nats a token), `perplexity`, `bits_per_byte`; and by domain the first and the last."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, domain in enumerate(domains):
        members[domain].append(index)
    sums_NK = np.stack([np.asarray(x, np.float64) for x in (nll_N, targets_N, bytes_N)], axis=1)
    by_domain: dict[str, dict[str, float]] = {}
    for domain, chosen in sorted(members.items()):
        domain_metrics = _metrics(*sums_NK[chosen].sum(0))
        by_domain[domain] = {k: v for k, v in domain_metrics.items() if k != "perplexity"}
    return _metrics(*sums_NK.sum(0)), by_domain


def _metrics(nll: float, targets: float, size: float) -> dict[str, float]:
    loss = float(nll / max(targets, 1.0))
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": float(nll / math.log(2) / max(size, 1.0)),
    }
