"""Frozen weights held in the type they were stored in, in a model that is trained in float32.

A bfloat16 number is a float32 one too, so a frozen matrix can stay as its checkpoint has it and be widened where it is
used: half the memory, and the same arithmetic. What is trained, and what an adapter has changed beyond what the type
can hold, stays in float32.

Shape letters: N rows, O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pretrain.core.models.layers import Linear, Saved, at

MARK = "narrow"  # on a layer whose weight is held in a narrower type than it computes in


class _Frozen(torch.autograd.Function):
    """x Wᵀ + b; the weight is widened again in the backward pass instead of being kept wide until then."""

    @staticmethod
    def forward(ctx: Saved, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return F.linear(x_NI, weight_OI.to(x_NI.dtype), bias_O)

    @staticmethod
    def backward(ctx: Saved, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NO,) = grads
        (weight_OI,), (x_asks, _, bias_asks) = ctx.saved_tensors, ctx.needs_input_grad
        grad_NI = grad_NO @ weight_OI.to(grad_NO.dtype) if x_asks else None
        return grad_NI, None, grad_NO.sum(0) if bias_asks else None


def _forward(self: Linear, x: Tensor) -> Tensor:
    weight_OI = self.weight.T if isinstance(self, Conv1D) else self.weight
    if torch.is_autocast_enabled(x.device.type):  # to which the type of a weight is nothing new
        return F.linear(x, weight_OI, self.bias)
    out: Tensor = _Frozen.apply(x.reshape(-1, x.shape[-1]), weight_OI, self.bias)
    return out.view(*x.shape[:-1], -1)


def narrow(model: nn.Module, dtype: torch.dtype) -> int:
    """Hold the frozen matrices of linear layers in `dtype`, those that lose nothing by it; the bytes this frees.

    Embeddings, and a head that shares theirs, stay: too much reads them directly. So do layers that `transformers`
    keeps in float32, which it casts their inputs to.
    """
    if dtype == torch.float32:
        return 0
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    wide = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    freed = 0
    for name, module in model.named_modules():
        if not isinstance(module, Linear) or type(module) not in (nn.Linear, Conv1D) or name.rpartition(".")[2] in wide:
            continue
        weight = module.weight
        if weight.requires_grad or weight.dtype != torch.float32 or id(weight) in shared:
            continue
        held = weight.detach().to(dtype)
        if torch.equal(held.to(weight.dtype), weight.detach()):
            weight.data = held
            freed += weight.numel() * (4 - held.element_size())
            setattr(module, MARK, True)
            vars(module)["forward"] = _forward.__get__(module)
    return freed


def is_narrow(model: nn.Module) -> bool:
    """Whether any layer's weight is held in a narrower type than it computes in."""
    return any(getattr(module, MARK, False) for module in model.modules())


def widened(layer: nn.Module) -> Tensor:
    """The layer's weight in the type it computes in."""
    weight: Tensor = at(layer, "weight")
    wide = not getattr(layer, MARK, False) or torch.is_autocast_enabled(weight.device.type)
    return weight if wide else weight.float()


def finite(tensor: Tensor) -> bool:
    """Whether all of its floats are finite; of eight bits torch does not tell."""
    return bool(torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float()).all())


def stored_as(model: nn.Module, dtype: torch.dtype) -> bool:
    """Give weights of a wider type this one, if it holds all of their numbers; False where it does not."""
    wide = [p for p in model.parameters() if p.is_floating_point() and p.itemsize > dtype.itemsize]
    if not all(bool((p.detach().abs() <= torch.finfo(dtype).max).all()) for p in wide):
        return False
    for parameter in wide:
        parameter.data = parameter.data.to(dtype)
    return True
