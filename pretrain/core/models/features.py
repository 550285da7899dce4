"""What a frozen model makes of a piece of text: one vector, pooled from the states of one layer.

Shape letters: N pieces, B pieces of a batch, L tokens, E width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pretrain.core.errors import PretrainError
from pretrain.core.models.families import base, blocks, family

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pretrain.core.batch import Vocabulary

POOLINGS = ("mean", "cls", "last")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients; afterwards each module is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class Framing:
    """How a piece of text is given to a model: `[bos] tokens [eos]`, without the end where the model is causal.

    A causal model has not seen an end of document after a piece from the middle of one; the beginning it has learnt to
    start from.
    """

    def __init__(self, model: nn.Module, vocabulary: Vocabulary, length: int) -> None:
        self.before = [] if vocabulary.bos is None else [vocabulary.bos]
        self.after = [] if vocabulary.eos is None or family(model).causal else [vocabulary.eos]
        limit = getattr(model.config, "max_position_embeddings", None)
        room = limit - len(self.before) - len(self.after) if isinstance(limit, int) else length
        if room < 1:
            raise PretrainError(f"a model of {limit} positions has no room for text; accepted: 3 positions or more")
        self.length = min(length, room)  # tokens of text

    def frame(self, tokens: NDArray[Any]) -> list[int]:
        """The model's input for a piece of at most `length` tokens."""
        return [*self.before, *tokens.tolist(), *self.after]


def labelled(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[dict[str, Any]], label: str, length: int
) -> list[tuple[dict[str, Any], NDArray[Any]]]:
    """The documents that have the label and any text, each with at most `length` tokens from its middle."""
    from pretrain.core.encoding import encode

    known = [d for d in documents if d.get(label) is not None]
    pieces = [middle(ids, length) for ids in encode(tokenizer, [d["text"] for d in known])]
    return [(document, piece) for document, piece in zip(known, pieces, strict=True) if len(piece)]


def middle(tokens: NDArray[Any], length: int) -> NDArray[Any]:
    """At most `length` tokens from the middle."""
    start = max(0, (len(tokens) - length) // 2)
    return tokens[start : start + length]


def features(
    model: nn.Module,
    pieces: Sequence[NDArray[Any]],
    framing: Framing,
    *,
    pooling: str = "mean",
    layer: int = -1,
    batch_tokens: int = 8192,
) -> NDArray[np.float32]:
    """`features_NE` of pieces of text tokens.

    `layer` 0 is the embeddings, n the states after block n, -1 the last states (of an encoder-decoder the encoder's),
    final norm included. `pooling`: `mean` over the text's tokens, `cls` the first special token, `last` the last token.
    """
    _check(model, framing, pooling, layer)
    device = next(model.parameters()).device
    rows = [framing.frame(tokens) for tokens in pieces]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: list[Any] = [None] * len(rows)
    start = 0
    with evaluating(model):
        while start < len(order):
            end = start + 1
            while end < len(order) and (end + 1 - start) * len(rows[order[end]]) <= batch_tokens:
                end += 1
            chosen, start = order[start:end], end
            pooled_BE = _pool(model, [rows[i] for i in chosen], framing, pooling, layer, device)
            for i, vector_E in zip(chosen, pooled_BE.float().cpu().numpy(), strict=True):
                found[i] = vector_E
    if not np.isfinite(found).all():
        raise PretrainError(f"layer {layer} gives states that are not finite; accepted: a model with finite states")
    return np.stack(found)


def _check(model: nn.Module, framing: Framing, pooling: str, layer: int) -> None:
    if pooling not in POOLINGS:
        raise PretrainError(f"pooling {pooling!r}: accepted: {', '.join(POOLINGS)}")
    if pooling == "cls" and family(model).causal:
        raise PretrainError("pooling 'cls': a causal model's first token sees no text; accepted: mean, last")
    if pooling == "cls" and not framing.before:
        raise PretrainError("pooling 'cls': the tokenizer has no cls or bos token; accepted: mean, last")
    depth = len(blocks(model))
    if not -depth - 1 <= layer <= depth:
        raise PretrainError(f"layer {layer}: accepted: {-depth - 1} to {depth}, for {depth} blocks")


def _pool(
    model: nn.Module, rows: list[list[int]], framing: Framing, pooling: str, layer: int, device: torch.device
) -> Tensor:
    lengths_B = torch.tensor([len(row) for row in rows], device=device)
    # Any id will do for padding: the mask hides it, and it is left out of the mean.
    input_BL = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows], device=device)
    position_L = torch.arange(input_BL.shape[1], device=device)
    states_BLE = _states(model, layer, input_BL, (position_L < lengths_B[:, None]).long()).float()
    if pooling == "cls":
        return states_BLE[:, 0]
    if pooling == "last":
        return states_BLE[torch.arange(len(rows), device=device), lengths_B - 1]
    text_BL = (position_L >= len(framing.before)) & (position_L < lengths_B[:, None] - len(framing.after))
    return (states_BLE * text_BL[..., None]).sum(1) / text_BL.sum(1, keepdim=True)


def _states(model: nn.Module, layer: int, input_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """The states of one layer, taken from the blocks themselves, so that a block of another class gives them too."""
    encoder = family(model).decoder_blocks is not None
    inner: Any = model.get_encoder() if encoder else base(model)  # type: ignore[operator]
    taken: list[Tensor] = []

    def take(_: nn.Module, states: Any) -> None:
        taken.append(states[0] if isinstance(states, tuple) else states)

    every = blocks(model)
    wanted = layer % (len(every) + 1)
    handle = None
    if wanted == 0:
        handle = every[0].register_forward_pre_hook(take)
    elif wanted < len(every):
        handle = every[wanted - 1].register_forward_hook(lambda module, _, states: take(module, states))
    try:
        more = {} if encoder or not family(model).causal else {"use_cache": False}
        last_BLE = inner(input_ids=input_BL, attention_mask=mask_BL, **more).last_hidden_state
    finally:
        if handle is not None:
            handle.remove()
    return taken[0] if taken else last_BLE
