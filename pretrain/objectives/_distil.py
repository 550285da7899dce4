"""Distillation: a frozen teacher, divergences between two models' predictions in chunks, and the states of blocks.

Shape letters: B rows, L positions, E width, N targets or tokens, V vocabulary, K most likely tokens, S losses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pretrain.core.batch import Batch, Context, Row
from pretrain.core.checkpoint import load
from pretrain.core.errors import PretrainError
from pretrain.core.folders import checkpoint_of
from pretrain.core.models.attention import attend
from pretrain.core.models.cross_entropy import CHUNK_BYTES, IGNORE, LEAST_ROWS
from pretrain.core.models.families import at, base, blocks, family, head, hidden
from pretrain.core.models.fast import accelerate
from pretrain.objectives import Objective
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.objectives.language.masked_lm import MaskedLM

Side = tuple[Tensor, Tensor, Tensor | None]  # a model's states at the targets, its head's weight and bias


class Taught(Objective):
    """Base of the objectives that add a teacher to a plain one: `objective`, causal_lm or masked_lm at `rate`."""

    token_weights: ClassVar[bool] = True

    objective: str
    rate: float

    @property
    def task(self) -> str:
        """The kind of model that the objective trains."""
        return self._inner.task

    @property
    def _inner(self) -> Objective:
        return inner(self.objective, self.rate)

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """What the plain objective prepares."""
        return self._inner.prepare(rows, context)


class Teacher(nn.Module):
    """A model that is only read, and what is `learnt` beside the student.

    The model is moved with this module and is no part of it otherwise: it is not among the parameters, not in the state
    of a training, and stays in evaluation mode.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, learnt: nn.Module | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "model", model.eval().requires_grad_(False))
        self.learnt = learnt

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        self.model._apply(fn)
        return super()._apply(fn, recurse)


def open_teacher(reference: str, model: nn.Module, method: str) -> PreTrainedModel:
    """The checkpoint that `reference` names, ready to teach `model`."""
    teacher, _ = load(checkpoint_of(Path(reference)), dtype=torch.float32)
    if family(teacher).causal != family(model).causal:
        kinds = {True: "causal", False: "bidirectional"}
        raise PretrainError(
            f"{method}: teacher {reference!r} is a {kinds[family(teacher).causal]} model: accepted: a "
            f"{kinds[family(model).causal]} one, as the student"
        )
    same_vocabulary(method, "teacher", teacher, model)
    accelerate(teacher)
    return teacher


def same_vocabulary(method: str, what: str, other: nn.Module, model: nn.Module) -> None:
    """An error where the heads of two models have other numbers of entries."""
    theirs, ours = (len(head(m)[0]) for m in (other, model))
    if theirs != ours:
        raise PretrainError(f"{method}: the {what}'s vocabulary has {theirs} entries: accepted: {ours}")


def same_width(method: str, teacher: nn.Module, model: nn.Module) -> None:
    """An error where the states of two models are not of one width."""
    theirs, ours = (at(m, "config").hidden_size for m in (teacher, model))
    if theirs != ours:
        raise PretrainError(f"{method}: the teacher's hidden_size is {theirs}: accepted: {ours}, the student's")


def inner(objective: str, rate: float) -> Objective:
    """The objective of the student's own loss."""
    return CausalLM() if objective == "causal_lm" else MaskedLM(rate=rate)


def kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(p ‖ q) of each row of log-probabilities."""
    return (p_NV.exp() * (p_NV - q_NV)).sum(-1)


def states(model: nn.Module, batch: Batch, *, causal: bool) -> Tensor:
    """`states_BLE`, what the head's linear layer multiplies; documents of a row do not see one another."""
    return hidden(model, input_ids=batch["tokens_BL"], **attend(model, batch, causal=causal))


def targets(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """`has_target_BL`, the targets and their weights: 1, or what a policy has written."""
    has_target_BL = batch["target_BL"] != IGNORE
    target_N, weight_BL = batch["target_BL"][has_target_BL], batch.get("token_weight_BL")
    weight_N = torch.ones_like(target_N, dtype=torch.float32) if weight_BL is None else weight_BL[has_target_BL]
    return has_target_BL, target_N, weight_N


def scattered(nll_N: Tensor, has_target_BL: Tensor) -> Tensor:
    """`nll_BL` of `Loss`."""
    nll_BL = torch.zeros(has_target_BL.shape, device=nll_N.device)
    return nll_BL.masked_scatter_(has_target_BL, nll_N.detach())


def in_chunks(losses: Callable[[Side, Side, Tensor], Tensor], ours: Side, theirs: Side, target_N: Tensor) -> Tensor:
    """`losses_SN`, the logits made anew in the backward pass where those of all targets would fill the memory."""
    rows = max(LEAST_ROWS, CHUNK_BYTES.get(target_N.device.type, 64 << 20) // (4 * len(ours[1])))
    if len(target_N) <= rows:
        return losses(ours, theirs, target_N)
    parts = []
    for start in range(0, len(target_N), rows):
        part = slice(start, start + rows)
        sides = [(states_NE[part], weight_VE, bias_V) for states_NE, weight_VE, bias_V in (ours, theirs)]
        parts.append(checkpoint(losses, *sides, target_N[part], use_reentrant=False))
    return torch.cat(parts, dim=1)


@contextmanager
def block_states(model: nn.Module, numbers: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """While open, a forward pass leaves what the blocks of these numbers put out, `states_BLE` by number."""
    seen: dict[int, Tensor] = {}
    handles = []
    for number in numbers:

        def note(_: nn.Module, __: object, out: Tensor | tuple[Tensor, ...], number: int = number) -> None:
            seen[number] = out[0] if isinstance(out, tuple) else out

        handles.append(blocks(model)[number].register_forward_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def last_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """While open, each forward pass leaves the last states of the model without its head, `states_BLE`."""
    seen: list[Tensor] = []
    handle = base(model).register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state))
    try:
        yield seen
    finally:
        handle.remove()


def distances(pairs: Collection[tuple[Tensor, Tensor]], batch: Batch) -> Tensor:
    """The mean over pairs of states of their mean squared difference, over all tokens but padding (`inside` many).

    A token weighs as `token_weight_BL` says, where a policy has written it.
    """
    inside_BL = batch["document_BL"] != 0
    means = []
    for a_BLE, b_BLE in pairs:
        a_NE, b_NE = a_BLE[inside_BL].float(), b_BLE[inside_BL].float()
        if "token_weight_BL" in batch:
            means.append(weighted_mean((a_NE - b_NE).square().mean(-1), inside_BL, batch))
        else:
            means.append(nn.functional.mse_loss(a_NE, b_NE))
    return torch.stack(means).mean()


def weighted_mean(loss_N: Tensor, chosen_BL: Tensor, batch: Batch) -> Tensor:
    """The mean of the losses of the chosen tokens, each times its `token_weight_BL` where a policy has written it."""
    if "token_weight_BL" in batch:
        loss_N = loss_N * batch["token_weight_BL"][chosen_BL]
    return loss_N.mean()


def inside(batch: Batch) -> Tensor:
    """How many tokens a batch of rows holds."""
    return (batch["document_BL"] != 0).sum()
