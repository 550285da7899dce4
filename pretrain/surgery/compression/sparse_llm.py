"""Weights set to zero after training: the matrices of a feed-forward jointly, or each by itself.

Shape letters: N tokens, O outputs, I inputs, C inputs of a block of columns, E width, H feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from pretrain.core.bounds import Count, NonNegative, OpenShare, Positive, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import family
from pretrain.core.models.layers import Linear
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._calibration import (
    Blocks,
    batches_of,
    inverse_factor,
    parts,
    plain_linears,
    set_weight,
    weight_of,
)


def smallest(score: Tensor, share: float) -> Tensor:
    """Where the `share` of smallest scores is, in each row of the last dimension; exactly so many."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(-1, torch.argsort(score, dim=-1, stable=True)[..., : round(score.shape[-1] * share)], True)


def magnitude(weight_OI: Tensor, sparsity: float) -> Tensor:
    """The smallest weights of the whole matrix to zero."""
    return weight_OI.masked_fill(smallest(weight_OI.abs().flatten(), sparsity).view_as(weight_OI), 0)


def wanda(weight_OI: Tensor, hessian_II: Tensor, sparsity: float) -> Tensor:
    """In each row the weights of the smallest |w| · ‖x‖₂ to zero; x, all values of the weight's input."""
    norm_I = hessian_II.diagonal().to(weight_OI.dtype).sqrt()  # but for a factor that all inputs share
    return weight_OI.masked_fill(smallest(weight_OI.abs() * norm_I, sparsity), 0)


def sparsegpt(weight_OI: Tensor, hessian_II: Tensor, sparsity: float, damping: float, block_size: int) -> Tensor:
    """Column by column to zero where w² / U_ii² is smallest in the block, the error made up for by later columns."""
    W_OI, inputs = weight_OI.clone(), weight_OI.shape[1]
    U_II = inverse_factor(hessian_II, damping, "sparse_llm").to(W_OI.dtype)
    for start in range(0, inputs, block_size):
        end = min(start + block_size, inputs)
        score_OC = (W_OI[:, start:end] / U_II.diagonal()[start:end]) ** 2
        mask_OC = smallest(score_OC.flatten(), sparsity).view_as(score_OC)
        error_OC = torch.zeros_like(score_OC)
        for i in range(start, end):
            error_O = torch.where(mask_OC[:, i - start], W_OI[:, i], 0) / U_II[i, i]
            W_OI[:, i:end] -= torch.outer(error_O, U_II[i, i:end])
            error_OC[:, i - start] = error_O
        W_OI[:, start:end].masked_fill_(mask_OC, 0)
        W_OI[:, end:] -= error_OC @ U_II[start:end, end:]
    return W_OI


def fitted(x_NI: Tensor, y_NO: Tensor) -> Tensor:
    """The matrix of least squares, `weight_OI` = Y X⁺."""
    x_NI, y_NO = x_NI.double(), y_NO.double()
    return (y_NO.T @ x_NI) @ torch.linalg.pinv(x_NI.T @ x_NI, hermitian=True)


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


@dataclass(frozen=True)
class SparseLLM(Surgery):
    """SparseLLM: Towards Global Pruning for Pre-trained Language Models (arXiv:2402.17946).

    A `sparsity` share of the weights of each linear layer of the blocks becomes zero, without a pattern; the model
    stays plain. Block after block, on calibration text that has passed the pruned ones: the attention's matrices by
    SparseGPT; those of the feed-forward jointly, with the activations as variables of their own: least α‖z - W_up x‖² +
    α‖s - W_gate x‖² + γ‖p - silu(s) z‖² + β‖y - W_down p‖², x and y the dense feed-forward's input and output (without
    a gate φ(z) = relu(z)). In each of `epochs` the W are fitted (W = z x⁺; not in the first), pruned by SparseGPT, and
    p, z, s set to the best, s by `gate_steps` of gradient descent. Baselines by `solver`: sparsegpt everywhere; wanda,
    the smallest |w| · ‖x‖₂ of each row; magnitude, the smallest |w| of each matrix, which needs no text.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert", "modernbert")

    sparsity: OpenShare = 0.7
    alpha: Positive = 5.0
    beta: Positive = 5.0
    gamma: Positive = 5.0
    epochs: Count = 4
    gate_steps: Whole = 2
    gate_rate: NonNegative = 0.01
    damping: OpenShare = 0.01
    block_size: Count = 128
    solver: Literal["sparse_llm", "sparsegpt", "wanda", "magnitude"] = "sparse_llm"

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model with weights set to zero."""
        layers = plain_linears(model, self.name, self.families)
        if self.solver == "magnitude":
            for layer in layers.values():
                set_weight(layer, magnitude(weight_of(layer), self.sparsity))
            return model
        if self.solver == "sparse_llm":
            self._check_activation(model)
        batches, training = batches_of(inputs, self.name), model.training
        stack, places = Blocks(model.eval(), batches), parts(model)
        for number in range(len(stack)):
            inner = stack.layers(number, [name for step in places.values() for name in step])
            hessians = stack.hessians(number, inner)
            joint = {*places["up"], *places["down"]} if self.solver == "sparse_llm" else set()
            seen = self._seen(stack, number, {name: layer for name, layer in inner.items() if name in joint})
            for name, layer in inner.items():
                if name not in joint:
                    self._prune(layer, hessians[name])
            if joint:
                up, down = [inner[name] for name in places["up"]], inner[places["down"][0]]
                first = hessians[places["up"][0]], hessians[places["down"][0]]
                self._prune_jointly(up, down, [seen[n] for n in (*places["up"], *places["down"])], first)
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

    def _seen(self, stack: Blocks, number: int, layers: dict[str, Linear]) -> dict[str, tuple[Tensor, Tensor]]:
        """What enters and leaves the layers of the block as it still is, all tokens together."""
        if not layers:
            return {}
        batches = list(stack.seen(number, layers))
        return {
            n: (torch.cat([seen[n][0] for seen in batches]), torch.cat([seen[n][1] for seen in batches]))
            for n in layers
        }

    def _prune(self, layer: Linear, hessian_II: Tensor) -> None:
        weight_OI = weight_of(layer)
        if self.solver == "wanda":
            set_weight(layer, wanda(weight_OI, hessian_II, self.sparsity))
        else:
            set_weight(layer, sparsegpt(weight_OI, hessian_II, self.sparsity, self.damping, self.block_size))

    def _prune_jointly(
        self, up: list[Linear], down: Linear, seen: list[tuple[Tensor, Tensor]], hessians: tuple[Tensor, Tensor]
    ) -> None:
        """The feed-forward's matrices; `up` holds the gate first where there is one."""
        gated, (x_NE, _) = len(up) == 2, seen[0]
        wide = torch.promote_types(x_NE.dtype, torch.float32)
        s_NH, z_NH = seen[0][1].to(wide), seen[-2][1].to(wide)
        p_NH, y_NE = (part.to(wide) for part in seen[-1])
        x_NE = x_NE.to(wide)
        y_NE = y_NE - (down.bias if down.bias is not None else 0)
        of_x_EE, of_p_HH = hessians
        for epoch in range(self.epochs):
            if epoch:
                for layer, out_NH in zip(up, (s_NH, z_NH) if gated else (z_NH,), strict=True):
                    set_weight(layer, fitted(x_NE, out_NH - (layer.bias if layer.bias is not None else 0)))
                set_weight(down, fitted(p_NH, y_NE))
                of_p_HH = 2 * p_NH.T @ p_NH / len(p_NH)
            for layer in up:
                self._prune(layer, of_x_EE)
            self._prune(down, of_p_HH)
            if epoch == self.epochs - 1:
                break
            after_NH = F.silu(s_NH) * z_NH if gated else z_NH.relu()
            p_NH = best_p(weight_of(down), y_NE, after_NH, self.beta, self.gamma)
            made = [F.linear(x_NE, weight_of(layer), layer.bias) for layer in up]
            if gated:
                z_NH = best_z_gated(made[1], p_NH, F.silu(s_NH), self.alpha, self.gamma)
                s_NH = descended_s(s_NH, made[0], p_NH, z_NH, self)
            else:
                z_NH = best_z_relu(made[0], p_NH, self.alpha, self.gamma)
