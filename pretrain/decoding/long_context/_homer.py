"""How `homer` reads a long prompt: chunks that become one, layer by layer, and what they are pruned by.

The tree is walked depth first, so that besides the chunk at work only one finished chunk a level is in memory.

Shape letters: T tokens of a chunk, H heads, K key heads, D width of a head, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from pretrain.core.generation.forward import Forward

NAME = "homer"  # of the attention
_seen: ContextVar[list[Tensor] | None] = ContextVar(NAME, default=None)


@dataclass(frozen=True)
class Plan:
    """How one prompt is read: the affixes' lengths, each chunk's part of the context, layers and targets."""

    prefix: int
    suffix: int
    spans: tuple[tuple[int, int], ...]  # of the prompt, by chunk
    layers: tuple[
        tuple[int, int], ...
    ]  # by height in the tree, leaves first: the first block and the one after the last
    targets: tuple[int, ...]  # by height: how many tokens a chunk keeps at its last block

    @property
    def height(self) -> int:
        """How many times chunks are merged."""
        return len(self.layers) - 1


class Chunk:
    """Tokens in order: their states after the last block, positions, and keys and values in the blocks so far.

    As the blocks' `past_key_values` it answers `update`.
    """

    def __init__(self, states_1TE: Tensor, position_T: Tensor) -> None:
        self.states_1TE, self.position_T = states_1TE, position_T
        self.cache: list[tuple[Tensor, Tensor]] = []  # by block: keys_1KTD, values_1KTD

    def update(self, keys_1KTD: Tensor, values_1KTD: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Note a block's keys and values, which are all that its queries see."""
        self.cache.append((keys_1KTD, values_1KTD))
        return keys_1KTD, values_1KTD

    def through(self, forward: Forward, first: int, stop: int, scored: int) -> list[Tensor]:
        """Send the states through the blocks from `first`; returns the `significance_T` in those from `scored` on."""
        more: dict[str, tuple[Tensor, ...]] = {}
        if forward.table_CE is None:
            more["position_embeddings"] = tuple(
                angles_1CD[:, self.position_T] for angles_1CD in (forward.cos_1CD, forward.sin_1CD)
            )
        significances: list[Tensor] = []
        for number in range(first, stop):
            with _watched(significances if number >= scored else None):
                self.states_1TE = forward.blocks[number](
                    self.states_1TE, attention_mask=None, past_key_values=self, use_cache=True, **more
                )
        return [score_1T[0] for score_1T in significances]

    def keep(self, kept_K: Tensor) -> None:
        """Keep these tokens alone, in all blocks so far."""
        self.states_1TE, self.position_T = self.states_1TE[:, kept_K], self.position_T[kept_K]
        self.cache = [(keys[:, :, kept_K], values[:, :, kept_K]) for keys, values in self.cache]


def leaf(forward: Forward, plan: Plan, ids_L: Tensor, number: int) -> Chunk:
    """A chunk's embeddings: the prompt's prefix, the chunk's part of the context, the prompt's suffix."""
    start, stop = plan.spans[number]
    ids_T = torch.cat([ids_L[: plan.prefix], ids_L[start:stop], ids_L[len(ids_L) - plan.suffix :]])
    position_T = torch.arange(len(ids_T), device=ids_L.device)
    longest = max(stop - start for start, stop in plan.spans)
    position_T[len(ids_T) - plan.suffix :] += longest - (stop - start)  # the suffix stands at one place in all chunks
    states_1TE = forward.embed(ids_T[None])
    if forward.table_CE is not None:
        states_1TE = forward.drop(states_1TE + forward.table_CE[position_T])
    return Chunk(states_1TE, position_T)


def merged(left: Chunk, right: Chunk, prefix: int, suffix: int) -> Chunk:
    """Two chunks as one: the affixes' states, keys and values are means, the contexts stand side by side."""

    def joined(left: Tensor, right: Tensor, axis: int) -> Tensor:
        def cut(tensor: Tensor, start: int, stop: int) -> Tensor:
            return tensor.narrow(axis, start, stop - start)

        a, b = left.shape[axis], right.shape[axis]
        first = (cut(left, 0, prefix) + cut(right, 0, prefix)) / 2
        last = (cut(left, a - suffix, a) + cut(right, b - suffix, b)) / 2
        return torch.cat([first, cut(left, prefix, a - suffix), cut(right, prefix, b - suffix), last], axis)

    ends = len(left.position_T) - suffix
    chunk = Chunk(
        joined(left.states_1TE, right.states_1TE, 1), torch.cat([left.position_T[:ends], right.position_T[prefix:]])
    )
    for mine, theirs in zip(left.cache, right.cache, strict=True):
        chunk.cache.append((joined(mine[0], theirs[0], 2), joined(mine[1], theirs[1], 2)))
    return chunk


def read(forward: Forward, plan: Plan, ids_L: Tensor, bias_ND: Tensor | None) -> Chunk:
    """The one chunk that a prompt becomes, after all blocks; `bias_ND` by block and distance is taken off scores."""

    def grown(first: int, height: int) -> Chunk:
        if height == 0:
            chunk = leaf(forward, plan, ids_L, first)
        else:
            left = grown(first, height - 1)
            chunk = merged(left, grown(first + 2 ** (height - 1), height - 1), plan.prefix, plan.suffix)
        begin, stop = plan.layers[height]
        excess = len(chunk.position_T) - plan.targets[height]
        for score_T in chunk.through(forward, begin, stop, stop - 1 if excess > 0 else stop):
            bias_D = None if bias_ND is None else bias_ND[stop - 1]
            chunk.keep(survivors(score_T, chunk.position_T, bias_D, excess, plan.prefix, plan.suffix))
        return chunk

    return grown(0, plan.height)


def survivors(
    score_T: Tensor, position_T: Tensor, bias_D: Tensor | None, excess: int, prefix: int, suffix: int
) -> Tensor:
    """The places that stay when the `excess` lowest scores between the affixes go, of equal ones the earlier."""
    if bias_D is not None:
        score_T = score_T - bias_D.to(score_T.device)[position_T[-1] - position_T]
    stop = len(score_T) - suffix
    stays_T = torch.ones(len(score_T), dtype=torch.bool, device=score_T.device)
    stays_T[score_T[prefix:stop].argsort(stable=True)[:excess] + prefix] = False
    return stays_T.nonzero()[:, 0]


def significance(query_BHQD: Tensor, key_BKTD: Tensor, scaling: float) -> Tensor:
    """The attention of the last query to each token, the greatest of the heads; `_BT`, float32 or finer."""
    key_BHTD = repeat_kv(key_BKTD, query_BHQD.shape[1] // key_BKTD.shape[1])
    score_BHT = torch.matmul(query_BHQD[:, :, -1:], key_BHTD.transpose(2, 3))[:, :, 0] * scaling
    return score_BHT.to(torch.promote_types(score_BHT.dtype, torch.float32)).softmax(-1).amax(1)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    significances = _seen.get()
    if significances is not None:
        significances.append(significance(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling))
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)


AttentionInterface.register(NAME, _attention)


@contextmanager
def _watched(significances: list[Tensor] | None) -> Iterator[None]:
    token = _seen.set(significances)
    try:
        yield
    finally:
        _seen.reset(token)


@contextmanager
def attending(model: PreTrainedModel) -> Iterator[None]:
    """While open, the model's attention is one whose significance can be noted."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def mean_significance(model: PreTrainedModel, rows_BL: Tensor) -> Tensor:
    """`bias_ND`: by block and distance from the last token, the mean significance over rows of text of one length."""
    length = rows_BL.shape[1]
    forward, plan = Forward(model, length), Plan(0, 0, ((0, length),), (), ())
    scores: list[Tensor] = []
    with attending(model):
        for ids_L in rows_BL:
            significances = leaf(forward, plan, ids_L, 0).through(forward, 0, len(forward.blocks), 0)
            scores.append(torch.stack(significances).float().flip(1))
    return torch.stack(scores).mean(0)
