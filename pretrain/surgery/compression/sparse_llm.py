"""Weights set to zero after training: the matrices of a feed-forward jointly, or each by itself.

Shape letters: N tokens, O outputs, I inputs, C inputs of a block of columns, E width, H feed-forward width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from pretrain.core.bounds import Count, NonNegative, OpenShare, Positive, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import family
from pretrain.core.models.layers import Linear, sides
from pretrain.core.quick.machine import likely_rate
from pretrain.dial.effort import Task, Work, by_columns, decomposed, sorting, through
from pretrain.dial.tuned import DOWN, OUTPUT, QUERIES, UP
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._calibration import (
    Blocks,
    batches_of,
    inverse_factor,
    parts,
    plain_linears,
    set_weight,
    weight_of,
    wide_type,
)


def smallest(score: Tensor, share: float) -> Tensor:
    """Where the `share` of smallest scores is, in each row of the last dimension; exactly so many."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(-1, torch.argsort(score, dim=-1, stable=True)[..., : round(score.shape[-1] * share)], True)


def smallest_of_each(score_OI: Tensor, share: float, group: int) -> Tensor:
    """Where the `share` of smallest scores is in each run of `group` neighbours of a row."""
    return smallest(score_OI.unflatten(-1, (-1, group)), share).flatten(-2)


def magnitude(weight_OI: Tensor, sparsity: float, group: int = 0) -> Tensor:
    """The smallest weights of the whole matrix, or of each `group` of neighbours, to zero."""
    if group:
        return weight_OI.masked_fill(smallest_of_each(weight_OI.abs(), sparsity, group), 0)
    return weight_OI.masked_fill(smallest(weight_OI.abs().flatten(), sparsity).view_as(weight_OI), 0)


def wanda(weight_OI: Tensor, hessian_II: Tensor, sparsity: float, group: int = 0) -> Tensor:
    """In each row, or `group` of it, the weights of the smallest |w| · ‖x‖₂ to zero; x, all values of its input."""
    norm_I = hessian_II.diagonal().to(weight_OI.dtype).sqrt()  # but for a factor that all inputs share
    return weight_OI.masked_fill(smallest_of_each(weight_OI.abs() * norm_I, sparsity, group or len(norm_I)), 0)


COLUMN = 14.0  # operations on a column of weights


def sparsegpt(
    weight_OI: Tensor, hessian_II: Tensor, sparsity: float, damping: float, block_size: int, group: int = 0
) -> Tensor:
    """Column by column to zero where w² / U_ii² is smallest, the error made up for by later columns.

    Smallest in the block of columns or, in each row, of its next `group` as they are when the first of them comes.
    """
    W_OI, inputs = weight_OI.clone(), weight_OI.shape[1]
    U_II = inverse_factor(hessian_II, damping, "sparse_llm").to(W_OI.dtype)
    for start in range(0, inputs, block_size):
        end = min(start + block_size, inputs)
        score_OC = (W_OI[:, start:end] / U_II.diagonal()[start:end]) ** 2
        mask_OC = smallest(score_OC.flatten(), sparsity).view_as(score_OC)
        error_OC = torch.zeros_like(score_OC)
        for i in range(start, end):
            if group and i % group == 0:
                score_OC = (W_OI[:, i : i + group] / U_II.diagonal()[i : i + group]) ** 2
                mask_OC[:, i - start : i - start + group] = smallest(score_OC, sparsity)
            error_O = torch.where(mask_OC[:, i - start], W_OI[:, i], 0) / U_II[i, i]
            W_OI[:, i:end] -= torch.outer(error_O, U_II[i, i:end])
            error_OC[:, i - start] = error_O
        W_OI[:, start:end].masked_fill_(mask_OC, 0)
        W_OI[:, end:] -= error_OC @ U_II[start:end, end:]
    return W_OI


def fitted(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The matrix of least squares over all of the pairs `x_NI`, `y_NO`: `weight_OI` = Y X⁺."""
    yx_OI = xx_II = torch.zeros(())
    for x_NI, y_NO in pairs:
        x_NI, y_NO = x_NI.double(), y_NO.double()
        yx_OI, xx_II = yx_OI + y_NO.T @ x_NI, xx_II + x_NI.T @ x_NI
    return yx_OI @ torch.linalg.pinv(xx_II, hermitian=True)


def mean_product(parts: Iterable[Tensor]) -> Tensor:
    """`2 / N · Σ p pᵀ` over all rows of all parts."""
    total_HH, count = torch.zeros(()), 0
    for p_NH in parts:
        total_HH, count = total_HH + 2 * p_NH.T @ p_NH, count + len(p_NH)
    return total_HH / count


def best_p(down_EH: Tensor, y_NE: Tensor, after_NH: Tensor, beta: float, gamma: float) -> Tensor:
    """The p of least β‖p Wᵀ - y‖² + γ‖p - φ‖², φ what the activation gives."""
    left_HH = beta * down_EH.T @ down_EH + gamma * torch.eye(down_EH.shape[1], dtype=down_EH.dtype, device=y_NE.device)
    return torch.linalg.solve(left_HH, beta * y_NE @ down_EH + gamma * after_NH, left=False)


def best_z_gated(made_NH: Tensor, p_NH: Tensor, gate_NH: Tensor, alpha: float, gamma: float) -> Tensor:
    """The z of least α(z - m)² + γ(p - g z)², m what the weights make and g the activated gate."""
    return (alpha * made_NH + gamma * gate_NH * p_NH) / (alpha + gamma * gate_NH**2)


def best_z_relu(made_NH: Tensor, p_NH: Tensor, alpha: float, gamma: float) -> Tensor:
    """The z of least α(z - m)² + γ(p - relu(z))²: the better of the best z ≥ 0 and the best z ≤ 0."""
    above_NH = ((gamma * p_NH + alpha * made_NH) / (gamma + alpha)).clamp(min=0)
    below_NH = made_NH.clamp(max=0)

    def cost(z_NH: Tensor) -> Tensor:
        return gamma * (p_NH - z_NH.relu()) ** 2 + alpha * (z_NH - made_NH) ** 2

    return torch.where(cost(above_NH) <= cost(below_NH), above_NH, below_NH)


def descended_s(s_NH: Tensor, made_NH: Tensor, p_NH: Tensor, z_NH: Tensor, method: SparseLLM) -> Tensor:
    """A few steps of gradient descent on α(s - m)² + γ(p - silu(s) z)², which has no closed form."""
    for _ in range(method.gate_steps):
        sigmoid_NH = torch.sigmoid(s_NH)
        slope_NH = sigmoid_NH * (1 + s_NH * (1 - sigmoid_NH))
        pull_NH = 2 * method.gamma * (s_NH * sigmoid_NH * z_NH - p_NH) * z_NH * slope_NH
        s_NH = s_NH - method.gate_rate * (2 * method.alpha * (s_NH - made_NH) + pull_NH)
    return s_NH


def wide(*parts: Tensor) -> tuple[Tensor, ...]:
    """In float32 at least."""
    return tuple(part.to(wide_type(part)) for part in parts)


@dataclass
class FeedForward:
    """A batch's tokens at a feed-forward: what enters it, what it gives before the bias, and the variables."""

    x_NE: Tensor
    y_NE: Tensor
    p_NH: Tensor  # what enters the second matrix
    z_NH: Tensor
    s_NH: Tensor | None  # what enters the gate, where there is one

    @property
    def activated_NH(self) -> Tensor:
        """What the activation makes of the variables."""
        return self.z_NH.relu() if self.s_NH is None else F.silu(self.s_NH) * self.z_NH

    def update(self, up: list[Linear], down_EH: Tensor, method: SparseLLM) -> None:
        """Set p, z and s to the best for these weights; `up` holds the gate first where there is one."""
        self.p_NH = best_p(down_EH, self.y_NE, self.activated_NH, method.beta, method.gamma)
        made_NH = F.linear(self.x_NE, weight_of(up[-1]), up[-1].bias)
        if self.s_NH is None:
            self.z_NH = best_z_relu(made_NH, self.p_NH, method.alpha, method.gamma)
            return
        self.z_NH = best_z_gated(made_NH, self.p_NH, F.silu(self.s_NH), method.alpha, method.gamma)
        made_NH = F.linear(self.x_NE, weight_of(up[0]), up[0].bias)
        self.s_NH = descended_s(self.s_NH, made_NH, self.p_NH, self.z_NH, method)


@dataclass(frozen=True)
class SparseLLM(Surgery):
    """SparseLLM: Towards Global Pruning for Pre-trained Language Models (arXiv:2402.17946).

    A `sparsity` share of the weights of each linear layer of the blocks becomes zero, without a pattern or, `pattern:
    2:4` (4:8), half of each 4 (8) neighbours of a row, which GPUs multiply faster; the model stays plain. Block after
    block, on calibration text that has passed the pruned ones: the attention's matrices by SparseGPT; those of the
    feed-forward jointly, with the activations as variables of their own: least α‖z - W_up x‖² + α‖s - W_gate x‖² +
    γ‖p - silu(s) z‖² + β‖y - W_down p‖², x and y the dense feed-forward's input and output (without a gate φ(z) =
    relu(z)). In each of `epochs` the W are fitted (W = z x⁺; not in the first), pruned by SparseGPT, and p, z, s set to
    the best, s by `gate_steps` of gradient descent. Baselines by `solver`: sparsegpt everywhere; wanda, the smallest
    |w| · ‖x‖₂ of each row; magnitude, the smallest |w| of each matrix, which needs no text.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert", "modernbert")

    sparsity: OpenShare = 0.7
    pattern: Literal["none", "2:4", "4:8"] = "none"
    alpha: Positive = 5.0
    beta: Positive = 5.0
    gamma: Positive = 5.0
    epochs: Count = 4
    gate_steps: Whole = 2
    gate_rate: NonNegative = 0.01
    damping: OpenShare = 0.01
    block_size: Count = 128
    solver: Literal["sparse_llm", "sparsegpt", "wanda", "magnitude"] = "sparse_llm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group and self.sparsity != 0.5:
            raise PretrainError(
                f"sparse_llm: sparsity {self.sparsity} with pattern {self.pattern}: accepted: 0.5", place=("sparsity",)
            )
        if self.group and self.block_size % self.group:
            wrong = f"sparse_llm: block_size {self.block_size} with pattern {self.pattern}: accepted: multiples of"
            raise PretrainError(f"{wrong} {self.group}", place=("block_size",))

    @property
    def group(self) -> int:
        """How many neighbours a pattern is about; 0: there is none."""
        return 0 if self.pattern == "none" else int(self.pattern[-1])

    @property
    def needs_text(self) -> bool:
        """Magnitudes do not."""
        return self.solver != "magnitude"

    def work(self, task: Task) -> Work:
        """Passes and second moments; of each layer, for each time that it is pruned, a column after another."""
        if self.solver == "magnitude":
            return self._ranking(task, whole=True)
        passes = Work(3 * task.forward + task.second_moments())
        if self.solver == "wanda":
            return passes + self._ranking(task, whole=False)
        joint = self.solver == "sparse_llm"
        times = {place: self.epochs if joint and place in (UP, DOWN) else 1 for place in (QUERIES, OUTPUT, UP, DOWN)}
        columns = [by_columns(each, COLUMN) * times[each.place] for each in task.inner]
        return sum(columns, passes + (self._joint(task) if joint else Work()))

    def _ranking(self, task: Task, *, whole: bool) -> Work:
        """All weights of a layer in order, or those of each row or of its neighbours."""
        each = [(layer.outputs * layer.inputs, layer.inputs, layer.blocks) for layer in task.inner]
        sorts = [sorting(self.group or (size if whole else row)) * (size / (self.group or (size if whole else row)))
                 * blocks for size, row, blocks in each]  # fmt: skip
        return sum(sorts, through(task.linear, 4))

    def _joint(self, task: Task) -> Work:
        """The fits of least squares, in float64, and the variables' updates, in all epochs but one."""
        wide, inner = task.layers.shape.width, task.layers.shape.intermediate
        ups, blocks = (2 if task.layers.shape.gated else 1), task.layers.shape.depth
        fits = 2.0 * task.tokens * (ups * (wide * inner + wide**2) + wide * inner + inner**2)
        fits += 2.0 * (ups * wide**3 + inner**3)
        fit = Work(fits, fits / likely_rate()) + decomposed(wide) * ups + decomposed(inner)
        moments = Work(2.0 * task.tokens * inner**2)
        solved = (2 / 3 * inner**3 + 2.0 * task.tokens * inner**2) / likely_rate()
        update = Work(2.0 * task.tokens * wide * inner * (ups + 1) + 2.0 * wide * inner**2, solved)
        numbers = through(task.tokens * inner, 10 + 10 * self.gate_steps * (ups > 1))
        seen = Work(task.forward / blocks)
        return ((fit + moments + update + numbers) * (self.epochs - 1) + seen) * blocks

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model with weights set to zero."""
        layers = plain_linears(model, self.name, self.families)
        for name, layer in layers.items():
            if self.group and sides(layer)[1] % self.group:
                raise PretrainError(
                    f"sparse_llm: pattern {self.pattern}: {name} has {sides(layer)[1]} inputs; accepted: multiples of "
                    f"{self.group}"
                )
        if self.solver == "magnitude":
            for layer in layers.values():
                set_weight(layer, magnitude(weight_of(layer), self.sparsity, self.group))
            return model
        if self.solver == "sparse_llm":
            self._check_activation(model)
        batches, training = batches_of(inputs, self.name), model.training
        stack, places = Blocks(model.eval(), batches), parts(model)
        for number in range(len(stack)):
            inner = stack.layers(number, [name for step in places.values() for name in step])
            hessians = stack.hessians(number, inner)
            up, down = ({name: inner[name] for name in places[part]} for part in ("up", "down"))
            joint = up | down if self.solver == "sparse_llm" else {}
            seen = self._seen(stack, number, up, down) if joint else []
            for name, layer in inner.items():
                if name not in joint:
                    self._prune(layer, hessians[name])
            if joint:
                first = hessians[places["up"][0]], hessians[places["down"][0]]
                self._prune_jointly([*up.values()], next(iter(down.values())), seen, first)
            stack.advance(number)
        return model.train(training)

    def _check_activation(self, model: PreTrainedModel) -> None:
        config = model.config
        names = ("hidden_act", "activation_function", "hidden_activation")
        activation = next((getattr(config, name) for name in names if hasattr(config, name)), None)
        kind = family(model).name
        if kind == "modernbert" or activation != ("silu" if kind == "llama" else "relu"):
            raise PretrainError(
                f"sparse_llm: activation {activation!r} of model type {config.model_type!r}: accepted: silu with a "
                "gate, or relu without; the solvers sparsegpt, wanda and magnitude take any"
            )

    def _seen(self, stack: Blocks, number: int, up: dict[str, Linear], down: dict[str, Linear]) -> list[FeedForward]:
        """What enters and leaves the feed-forward of the block as it still is, batch by batch."""
        parts = []
        for seen in stack.seen(number, up | down):
            before = [wide(*seen[name]) for name in up]
            (x_NE, first_NH), (_, z_NH) = before[0], before[-1]
            ((p_NH, y_NE),) = [wide(*seen[name]) for name in down]
            (bias_E,) = [layer.bias for layer in down.values()]
            y_NE = y_NE if bias_E is None else y_NE - bias_E
            parts.append(FeedForward(x_NE, y_NE, p_NH, z_NH, first_NH if len(up) == 2 else None))
        return parts

    def _prune(self, layer: Linear, hessian_II: Tensor) -> None:
        weight_OI, fields = weight_of(layer), (self.damping, self.block_size, self.group)
        if self.solver == "wanda":
            set_weight(layer, wanda(weight_OI, hessian_II, self.sparsity, self.group))
        else:
            set_weight(layer, sparsegpt(weight_OI, hessian_II, self.sparsity, *fields))

    def _prune_jointly(
        self, up: list[Linear], down: Linear, seen: list[FeedForward], hessians: tuple[Tensor, Tensor]
    ) -> None:
        """The feed-forward's matrices; `up` holds the gate first where there is one.

        In memory are p, z and s of all tokens, three activations of the feed-forward; all else goes batch by batch.
        """
        of_x_EE, of_p_HH = hessians
        for epoch in range(self.epochs):
            if epoch:
                for layer, gate in zip(up, (True, False)[-len(up) :], strict=True):
                    outputs = ((each.x_NE, each.s_NH if gate else each.z_NH) for each in seen)
                    bias_H = 0 if layer.bias is None else layer.bias
                    set_weight(layer, fitted((x_NE, out_NH - bias_H) for x_NE, out_NH in outputs if out_NH is not None))
                set_weight(down, fitted((each.p_NH, each.y_NE) for each in seen))
                of_p_HH = mean_product(each.p_NH for each in seen)
            for layer in up:
                self._prune(layer, of_x_EE)
            self._prune(down, of_p_HH)
            if epoch < self.epochs - 1:
                down_EH = weight_of(down)
                for each in seen:
                    each.update(up, down_EH, self)
