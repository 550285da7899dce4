"""Draft and verify: a tree of guesses is read in one pass; those that the model itself would have made are kept.

The root is the last token, which the model has not read yet; a node's parent is the token before it. One pass of the
model, in which a node attends to what is decided and to its own ancestors, gives the model's token after every node.
From the root the walk follows the child that is the model's token for as long as there is one; the token after the last
is new in any case. Nothing but the number of passes depends on the guesses: greedily the tokens are those of greedy
decoding, and sampled tokens are those of `core.generation.loop` with the same random numbers (see there).

Shape letters: L prompt tokens, T nodes of the tree, C room of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.generation.forward import Forward, pads
from pretrain.core.generation.options import Options

NO_TOKENS = torch.empty(1, 0, dtype=torch.int64)  # where nothing depends on what stands before


class Shape:
    """The nodes' places in the tree, the root first and parents before children (the root is its own parent)."""

    def __init__(self, parents: list[int], device: torch.device, dtype: torch.dtype) -> None:
        count = len(parents)
        self.parents = parents
        self.children: list[list[int]] = [[] for _ in parents]
        depths = [0] * count
        for node in range(1, count):
            self.children[parents[node]].append(node)
            depths[node] = depths[parents[node]] + 1
        self.depth = max(depths)
        parent_T, above_T = torch.tensor(parents), torch.arange(count)
        rows_T, seen_TT = above_T, torch.zeros(count, count, dtype=torch.bool)
        for _ in range(self.depth + 1):
            seen_TT[rows_T, above_T] = True
            above_T = parent_T[above_T]
        self.depth_1T = torch.tensor([depths], device=device)
        lowest = max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)
        self.mask_TT = torch.zeros(count, count, dtype=dtype).masked_fill_(~seen_TT, lowest).to(device)


class Draft(Protocol):
    """What guesses: made for one prompt, asked for a tree before each pass, told the outcome after it."""

    def tree(self) -> tuple[list[int], Shape]:
        """The nodes' tokens, the root's first, and their places."""

    def learn(self, tokens: list[int], logits_TV: Tensor, new: list[int]) -> None:
        """After a pass: the tree's tokens, the logits after each, and the tokens that were decided."""


class Chain:
    """A draft that is one sequence: `draft` gives its tokens, the last decided one first."""

    def __init__(self, weight_VE: Tensor) -> None:
        self.device, self.dtype = weight_VE.device, weight_VE.dtype
        self.shapes: dict[int, Shape] = {}

    def draft(self) -> list[int]:
        """The last decided token and the guesses after it."""
        raise NotImplementedError

    def tree(self) -> tuple[list[int], Shape]:
        """The tokens, each the parent of the next."""
        tokens = self.draft()
        count = len(tokens)
        if count not in self.shapes:
            self.shapes[count] = Shape([0, *range(count - 1)], self.device, self.dtype)
        return tokens, self.shapes[count]


def prompts(input_ids_BL: Tensor, attention_mask_BL: Tensor | None) -> list[Tensor]:
    """Each row's `input_ids_1L` without its pads."""
    kept_BL = pads(input_ids_BL, attention_mask_BL)
    if kept_BL is None:
        return list(input_ids_BL[:, None])
    return [ids_L[kept_L][None] for ids_L, kept_L in zip(input_ids_BL, kept_BL, strict=True)]


def speculate(
    model: PreTrainedModel, input_ids_BL: Tensor, start: Callable[[list[int], Sampler], Draft], options: Options, *,
    room: int,
) -> Tensor:  # fmt: skip
    """Continue prompts, row by row.

    `start(tokens, sampler)` makes the `Draft`, of at most `room` nodes, for a prompt and the first token after it.
    """
    with torch.inference_mode():
        return alone(input_ids_BL, options, lambda ids_1L, sampler: _row(model, ids_1L, start, room, sampler))


def alone(input_ids_BL: Tensor, options: Options, new_tokens: Callable[[Tensor, Sampler], list[int]]) -> Tensor:
    """Continue each row by itself, with the numbers that are drawn for it: `new_tokens(ids_1L, sampler)`."""
    prompts_1L = prompts(input_ids_BL, options.attention_mask_BL)
    uniform_NB = options.draws(len(prompts_1L))
    rows: list[list[int]] = []
    for row, ids_1L in enumerate(prompts_1L):
        sampler = Sampler(options, None if uniform_NB is None else uniform_NB[:, row])
        rows.append(new_tokens(ids_1L, sampler))
    return options.stacked(input_ids_BL, rows)


@dataclass(frozen=True)
class Sampler:
    """What decides the tokens of one row: the numbers drawn for its places, or none."""

    options: Options
    uniform_N: Tensor | None

    def token(self, logits_1V: Tensor, prompt: list[int], new: list[int]) -> int:
        """The model's token after a prompt and new tokens; -1 beyond the last that is asked for."""
        place = len(new)
        if place >= self.options.max_new_tokens:
            return -1
        uniform_1 = None if self.uniform_N is None else self.uniform_N[place : place + 1]
        if self.options.by_logits:
            return int(self.options.pick(logits_1V, uniform_1, NO_TOKENS))
        return int(self.options.pick(logits_1V, uniform_1, torch.tensor([[*prompt, *new]])))


def _row(
    model: PreTrainedModel, ids_1L: Tensor, start: Callable[[list[int], Sampler], Draft], room: int, sampler: Sampler
) -> list[int]:
    prompt, options = ids_1L[0].tolist(), sampler.options
    length, most = len(prompt), options.max_new_tokens
    forward = Forward(model, length + most, extra=room)
    # The columns of the tree stand last, so that a pass over n decided places takes the columns from `room - n` on.
    mask_TC = torch.zeros(room, forward.room + room, dtype=forward.dtype, device=forward.device)
    logits_1V = forward.prefill(ids_1L)
    new = [sampler.token(logits_1V, prompt, [])]
    if most == 1 or options.at_end(new):
        return new
    draft = start(prompt + new, sampler)
    shape = None
    while True:
        tokens, drafted = draft.tree()
        count = len(tokens)
        if drafted is not shape:
            shape = drafted
            mask_TC[:count, forward.room : forward.room + count] = shape.mask_TT
        mask_11TC = mask_TC[None, None, :count, forward.room - forward.length : forward.room + count]
        ids_1T = torch.tensor([tokens], device=forward.device)
        states_1TE = forward.states(ids_1T, shape.depth_1T + forward.length, mask_11TC)
        logits_TV = forward.head(forward.norm(states_1TE[0]))
        path, verified = _walk(tokens, shape.children, logits_TV, prompt, new, sampler)
        forward.keep(path)
        before, new = len(new), options.cut([*new, *verified][:most], len(new))
        verified = new[before:]
        draft.learn(tokens, logits_TV, verified)  # what comes last as well: some drafts are of the answers before
        if len(new) >= most or options.at_end(new):
            return new


def _walk(
    tokens: list[int], children: list[list[int]], logits_TV: Tensor, prompt: list[int], new: list[int], sampler: Sampler
) -> tuple[list[int], list[int]]:
    """The nodes that are the model's own tokens, the root first, and the tokens that they decide."""
    plain = sampler.uniform_N is None and sampler.options.by_logits
    best = logits_TV.argmax(-1).tolist() if plain else None
    path, node = [0], 0
    verified: list[int] = []
    while True:
        if best is not None:
            token = best[node]
        else:
            token = sampler.token(logits_TV[node : node + 1], prompt, [*new, *verified])
        verified.append(token)
        for child in children[node]:
            if tokens[child] == token:
                node = child
                path.append(child)
                break
        else:
            return path, verified
