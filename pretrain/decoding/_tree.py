"""Draft and verify: a tree of guesses is read in one pass; those that the model itself would have made are kept.

The root is the last token, which the model has not read yet; a node's parent is the token before it. One pass of the
model, in which a node attends to what is decided and to its own ancestors, gives the model's token after every node.
From the root the walk follows the child that is the model's token for as long as there is one; the token after the last
is new in any case. Nothing but the number of passes depends on the guesses: greedily the tokens are those of greedy
decoding, and sampled tokens are those of `_loop.decode` with the same random numbers (see there).

Shape letters: L prompt tokens, T nodes of the tree, C room of the cache, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.core.errors import PretrainError
from pretrain.core.generation.forward import Forward, pads
from pretrain.core.generation.loop import draws, pick


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


def check(rows: Any) -> None:
    """An error for each (field, value, least value) that is too small."""
    for where, value, least in rows:
        if value is not None and value < least:
            raise PretrainError(f"{where} {value}: accepted: at least {least}")


def prompts(input_ids_BL: Tensor, attention_mask_BL: Tensor | None) -> list[Tensor]:
    """Each row's `input_ids_1L` without its pads."""
    kept_BL = pads(input_ids_BL, attention_mask_BL)
    if kept_BL is None:
        return list(input_ids_BL[:, None])
    return [ids_L[kept_L][None] for ids_L, kept_L in zip(input_ids_BL, kept_BL, strict=True)]


def speculate(
    model: Any, input_ids_BL: Tensor, start: Any, *, attention_mask_BL: Tensor | None, max_new_tokens: int,
    room: int, temperature: float, top_p: float, eos: int | None, pad: int, generator: torch.Generator | None,
) -> Tensor:  # fmt: skip
    """Continue prompts, row by row.

    `start(tokens)` makes the `Draft`, of at most `room` nodes, for a prompt and the first token after it.
    """
    prompts_1L = prompts(input_ids_BL, attention_mask_BL)
    uniform_NB = draws(max_new_tokens, len(prompts_1L), temperature, top_p, generator)
    rows: list[list[int]] = []
    with torch.inference_mode():
        for row, ids_1L in enumerate(prompts_1L):
            uniform_N = None if uniform_NB is None else uniform_NB[:, row]
            rows.append(_row(model, ids_1L, start, max_new_tokens, room, (uniform_N, temperature, top_p), eos))
    width = max(map(len, rows))
    new_BN = torch.tensor([new + [pad] * (width - len(new)) for new in rows], device=input_ids_BL.device)
    return torch.cat([input_ids_BL, new_BN], dim=1)


def _row(
    model: Any, ids_1L: Tensor, start: Any, most: int, room: int,
    sampling: tuple[Tensor | None, float, float], eos: int | None,
) -> list[int]:  # fmt: skip
    length = ids_1L.shape[1]
    forward = Forward(model, length + most, extra=room)
    # The columns of the tree stand last, so that a pass over n decided places takes the columns from `room - n` on.
    mask_TC = torch.zeros(room, forward.room + room, dtype=forward.dtype, device=forward.device)
    logits_1V = forward.prefill(ids_1L)
    new = [_token(logits_1V, 0, sampling)]
    if new[0] == eos or most == 1:
        return new
    draft: Draft = start(ids_1L[0].tolist() + new)
    shape = None
    while True:
        tokens, made = draft.tree()
        count = len(tokens)
        if made is not shape:
            shape = made
            mask_TC[:count, forward.room : forward.room + count] = shape.mask_TT
        mask_11TC = mask_TC[None, None, :count, forward.room - forward.length : forward.room + count]
        ids_1T = torch.tensor([tokens], device=forward.device)
        states_1TE = forward.states(ids_1T, shape.depth_1T + forward.length, mask_11TC)
        logits_TV = forward.head(forward.norm(states_1TE[0]))
        path, found = _walk(tokens, shape.children, logits_TV, len(new), sampling)
        forward.keep(path)
        if eos in found:
            found = found[: found.index(eos) + 1]
        new += found
        if len(new) >= most or new[-1] == eos:
            return new[:most]
        draft.learn(tokens, logits_TV, found)


def _walk(
    tokens: list[int], children: list[list[int]], logits_TV: Tensor, place: int,
    sampling: tuple[Tensor | None, float, float],
) -> tuple[list[int], list[int]]:  # fmt: skip
    """The nodes that are the model's own tokens, the root first, and the tokens that they decide."""
    best = logits_TV.argmax(-1).tolist() if sampling[0] is None else None
    path, node = [0], 0
    found: list[int] = []
    while True:
        token = best[node] if best is not None else _token(logits_TV[node : node + 1], place + len(found), sampling)
        found.append(token)
        for child in children[node]:
            if tokens[child] == token:
                node = child
                path.append(child)
                break
        else:
            return path, found


def _token(logits_1V: Tensor, place: int, sampling: tuple[Tensor | None, float, float]) -> int:
    uniform_N, temperature, top_p = sampling
    if uniform_N is None:
        return int(logits_1V.argmax(-1))
    if place >= len(uniform_N):
        return -1  # beyond the last token that is asked for
    return int(pick(logits_1V, uniform_N[place : place + 1].to(logits_1V.device), temperature, top_p))
