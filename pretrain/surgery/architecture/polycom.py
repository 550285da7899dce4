"""Polynomial composition activations in the feed-forward layers, in place of GELU, ReLU or a gate.

Shape letters: N tokens, F width of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from pretrain.core.bounds import Count, NonNegative
from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.models.layers import Saved
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._feed_forward import replace_activations
from pretrain.surgery._random import generator


class _PolyReLU(torch.autograd.Function):
    """y = Σ aᵢ ReLU(x)ⁱ; only x and a are kept."""

    @staticmethod
    def forward(ctx: Saved, x: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(x, a)
        r = x.relu()
        out = a[-1] * r
        for coefficient in a[1:-1].flip(0):
            out = out.add_(coefficient).mul_(r)  # Horner
        return out.add_(a[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Saved, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        x, a = ctx.saved_tensors
        r, degree = x.relu(), a.numel() - 1
        slope = torch.full_like(r, degree) * a[-1]
        for i in range(degree - 1, 0, -1):
            slope = slope.mul_(r).add_(a[i], alpha=i)
        of_a, power = [grad.sum()], grad
        for _ in range(degree):
            power = power * r
            of_a.append(power.sum())
        return slope.mul_(x > 0).mul_(grad), torch.stack(of_a)


class _PolyNorm(torch.autograd.Function):
    """y = a₀ + Σ aᵢ ρᵢ xⁱ, ρᵢ = 1 / rms(xⁱ) over the last dimension; only x, a and the ρᵢ of each token are kept.

    ∂x = g · Σ i aᵢ ρᵢ xⁱ⁻¹ - Σ i aᵢ ρᵢ³ ⟨g, xⁱ⟩ / F · x²ⁱ⁻¹;  ∂aᵢ = Σ ρᵢ ⟨g, xⁱ⟩.
    """

    @staticmethod
    def forward(ctx: Saved, x_NF: Tensor, a: Tensor, eps: float) -> Tensor:
        inverse = []
        for power_NF in _powers(x_NF, a.numel() - 1):
            square_N1 = torch.linalg.vector_norm(power_NF, dim=-1, keepdim=True).square_().div_(x_NF.shape[-1])
            inverse.append(square_N1.add_(eps).rsqrt_())
        ctx.save_for_backward(x_NF, a, *inverse)
        return _polynomial(x_NF, [a[i + 1] * inverse_N1 for i, inverse_N1 in enumerate(inverse)]).mul_(x_NF).add_(a[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Saved, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        x_NF, a, *inverse = ctx.saved_tensors
        of_a, direct, through = [grad.sum()], [], []
        for i, power_NF in enumerate(_powers(x_NF, len(inverse)), 1):
            rho_N1 = inverse[i - 1]
            dot_N1 = torch.linalg.vecdot(grad, power_NF).unsqueeze(-1)
            of_a.append((rho_N1 * dot_N1).sum())
            direct.append(i * a[i] * rho_N1)
            through.append(i * a[i] * rho_N1.pow(3) * dot_N1 / -x_NF.shape[-1])
        of_x = _polynomial(x_NF.square(), through).mul_(x_NF)
        return of_x.addcmul_(grad, _polynomial(x_NF, direct)), torch.stack(of_a), None


def _powers(x: Tensor, order: int) -> Iterator[Tensor]:
    """x, x², …; each is overwritten by the next."""
    yield x
    power = None
    for _ in range(order - 1):
        power = x.square() if power is None else power.mul_(x)
        yield power


def _polynomial(x_NF: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
    """c₀ + c₁ x + c₂ x² + … by Horner's rule, the coefficients one a token."""
    *lower, highest = coefficients
    out = highest.expand_as(x_NF).clone()
    for coefficient_N1 in reversed(lower):
        out.mul_(x_NF).add_(coefficient_N1)
    return out


class Activation(nn.Module):
    """The activation; `a` are the coefficients a₀ … a_r. Computed in float32 or wider, whatever comes in."""

    def __init__(self, activation: str, order: int, eps: float, like: Tensor) -> None:
        super().__init__()
        self.activation, self.eps = activation, eps
        self.a = nn.Parameter(torch.full((order + 1,), 1 / order, dtype=like.dtype, device=like.device))
        with torch.no_grad():
            self.a[0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Σ aᵢ ReLU(x)ⁱ or Σ aᵢ Norm(xⁱ)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            if self.activation == "polyrelu":
                return _PolyReLU.apply(x.to(wide), self.a.to(wide)).to(x.dtype)
            return _PolyNorm.apply(x.to(wide), self.a.to(wide), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """What `print` says."""
        return f"{self.activation}, order={self.a.numel() - 1}"


@dataclass(frozen=True)
class PolyCom(Surgery):
    """Polynomial Composition Activations: Unleashing the Dynamics of Large Language Models (arXiv:2411.03884).

    The activation of each feed-forward becomes a polynomial with trained coefficients, shared by a layer: PolyReLU,
    Σ aᵢ ReLU(x)ⁱ, or PolyNorm, Σ aᵢ xⁱ / rms(xⁱ), i from 0 to `order`; at the start a₀ = 0 and the others 1 / order. A
    gated feed-forward of width f becomes a plain one of width 3f/2, which has as many weights; its matrices are drawn
    anew, normal with the standard deviation of those they replace: for a model about to be trained. The configuration
    still names the width f.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert", "modernbert", "t5")

    activation: Literal["polynorm", "polyrelu"] = "polynorm"
    order: Count = 3
    eps: NonNegative = 1e-6

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with its activations replaced, its gated feed-forwards made plain."""
        self._replace(model, generator(self.name, inputs))
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same without drawing numbers."""
        self._replace(model, None)
        return model

    def _replace(self, model: PreTrainedModel, source: torch.Generator | None) -> None:
        if any(isinstance(module, Activation) for module in model.modules()):
            raise PretrainError("polycom: this model has such activations already; accepted: one polycom")

        def made(weight: Tensor) -> Activation:
            return Activation(self.activation, self.order, self.eps, weight)

        replace_activations(model, self.name, self.families, made, source)
