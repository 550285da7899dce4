"""What a causal model says of each token: how unlikely it finds it, how sure it is, and whether it is right.

Shape letters: B windows of a batch, L tokens of a window, N targets of a batch, T of a document, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import family, hidden
from pretrain.core.models.features import evaluating
from pretrain.core.models.likelihood import Window, judged, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pretrain.core.batch import Vocabulary


@dataclass(frozen=True)
class Predictions:
    """Of each token of a document after its first."""

    nll_T: NDArray[np.float64]  # nats
    confidence_T: NDArray[np.float64]  # the largest probability
    right_T: NDArray[np.bool_]  # whether the token is the likeliest


def framed(
    tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, texts: Sequence[str], *, end: bool
) -> list[NDArray[np.int64]]:
    """Texts as a causal model is trained on them: what begins a document, the tokens, and with `end` what ends it.

    A document's end stands for its beginning where there is no token for that.
    """
    before = vocabulary.begin
    after = [vocabulary.after] if end and vocabulary.after is not None else []
    return [
        np.array([*([] if before is None else [before]), *ids, *after], np.int64) for ids in encode(tokenizer, texts)
    ]


def predictions(
    model: nn.Module,
    documents: Sequence[NDArray[np.integer]],
    *,
    length: int,
    stride: int | None = None,
    batch_tokens: int = 4096,
) -> list[Predictions]:
    """What the model says of each document's tokens after the first, each predicted once.

    `length` inputs a window; consecutive windows of a long document advance by `stride` (default: all of `length`).
    """
    if not family(model).causal:
        raise PretrainError(f"{type(model).__name__} predicts no next token; accepted: a causal language model")
    if not 1 <= (length if stride is None else stride) <= length:
        raise PretrainError(f"stride {stride}, length {length}: accepted: 1 <= stride <= length")
    todo = [(w, at) for i, tokens in enumerate(documents) for w, at in _placed(i, tokens, length, stride or length)]
    todo.sort(key=lambda item: len(item[0].tokens))
    counts = [max(len(tokens) - 1, 0) for tokens in documents]
    predicted = [Predictions(np.zeros(n), np.zeros(n), np.zeros(n, np.bool_)) for n in counts]
    with evaluating(model):
        start = 0
        while start < len(todo):
            end = start + 1
            while end < len(todo) and (end + 1 - start) * len(todo[end][0].tokens) <= batch_tokens:
                end += 1
            _predict(model, todo[start:end], predicted)
            start = end
    return predicted


def _placed(document: int, tokens: NDArray[np.integer], length: int, stride: int) -> list[tuple[Window, int]]:
    """A document's windows, each with the place of its first new target among the document's."""
    placed, at = [], 0
    for window in windows(document, tokens, length, stride):
        placed.append((window, at))
        at += len(window.tokens) - 1 - window.context
    return placed


def _predict(model: nn.Module, chosen: list[tuple[Window, int]], predicted: list[Predictions]) -> None:
    """Write what the model says of the new targets of some windows."""
    device, width = next(model.parameters()).device, max(len(w.tokens) for w, _ in chosen) - 1
    input_BL = torch.zeros(len(chosen), width, dtype=torch.long)
    wanted_BL = torch.zeros(len(chosen), width, dtype=torch.bool)
    for b, (window, _) in enumerate(chosen):
        input_BL[b, : len(window.tokens) - 1] = torch.from_numpy(window.tokens[:-1].astype(np.int64))
        wanted_BL[b, window.context : len(window.tokens) - 1] = True
    targets = np.concatenate([w.tokens[1 + w.context :] for w, _ in chosen]).astype(np.int64)
    # Padding stands at the end, where a causal model's predictions do not see it.
    states_BLE = hidden(model, input_ids=input_BL.to(device), use_cache=False)
    scores = judged(model, states_BLE[wanted_BL.to(device)], torch.from_numpy(targets).to(device))
    nll_N, confidence_N, right_N = (x.cpu().numpy() for x in scores)
    done = 0
    for window, at in chosen:
        count = len(window.tokens) - 1 - window.context
        here, there = slice(done, done + count), slice(at, at + count)
        predicted[window.document].nll_T[there] = nll_N[here]
        predicted[window.document].confidence_T[there] = confidence_N[here]
        predicted[window.document].right_T[there] = right_N[here]
        done += count
