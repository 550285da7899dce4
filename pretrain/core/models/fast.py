"""Faster arithmetic for the Llama-like models of `transformers`, equal to theirs up to rounding.

What a step does besides matrix products is bound by memory: each elementwise operation reads and writes whole tensors.
Two of them are made of many such operations, and here of few, with gradients written out by hand. Measured on two
cores, forward and backward of 8 × 256 × 256: RMSNorm 1.43 -> 0.69 ms, rotary positions 3.0 -> 1.4 ms.
"""

from __future__ import annotations

from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.core.models.layers import Saved


class _Norm(nn.Module):
    """What an RMSNorm of `transformers` has; a name for its type, never made."""

    weight: Tensor
    variance_epsilon: float


class _RMSNorm(torch.autograd.Function):
    """y = w · x / rms(x);  ∂x = (w·g) / rms - x · ⟨w·g, x⟩ / (E · rms³)."""

    @staticmethod
    def forward(ctx: Saved, x_BLE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        norm_BL1 = torch.linalg.vector_norm(x_BLE, dim=-1, keepdim=True)
        inverse_BL1 = norm_BL1.square_().div_(x_BLE.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_BLE, weight_E, inverse_BL1)
        return (x_BLE * inverse_BL1).mul_(weight_E)

    @staticmethod
    def backward(ctx: Saved, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BLE,) = grads
        x_BLE, weight_E, inverse_BL1 = ctx.saved_tensors
        product_NE = (grad_BLE * x_BLE).flatten(0, -2)
        grad_weight_E = inverse_BL1.flatten() @ product_NE
        dot_BL1 = (product_NE @ weight_E).view_as(inverse_BL1)
        scale_BL1 = dot_BL1.mul_(inverse_BL1.pow(3))
        grad_x_BLE = (grad_BLE * weight_E).mul_(inverse_BL1)
        return grad_x_BLE.addcmul_(x_BLE, scale_BL1, value=-1 / x_BLE.shape[-1]), grad_weight_E, None


def _rms_forward(self: _Norm, hidden_states: Tensor) -> Tensor:
    if hidden_states.device.type == "cuda":  # one kernel forward, one backward
        return F.rms_norm(hidden_states, self.weight.shape, self.weight.to(hidden_states.dtype), self.variance_epsilon)
    if hidden_states.dtype != torch.float32 or self.weight.dtype != torch.float32:
        return type(self).forward(self, hidden_states)
    return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class _Rotary(torch.autograd.Function):
    """Each pair (x₁, x₂) turned by its angle; the gradient is turned back."""

    @staticmethod
    def forward(ctx: Saved, x_BHLD: Tensor, cos_BHLD: Tensor, sin_BHLD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BHLD, sin_BHLD)
        return _turn(x_BHLD, cos_BHLD, sin_BHLD, 1)

    @staticmethod
    def backward(ctx: Saved, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BHLD,) = grads
        cos_BHLD, sin_BHLD = ctx.saved_tensors
        return _turn(grad_BHLD, cos_BHLD, sin_BHLD, -1), None, None


def _turn(x_BHLD: Tensor, cos_BHLD: Tensor, sin_BHLD: Tensor, sign: int) -> Tensor:
    half = x_BHLD.shape[-1] // 2
    out_BHLD = x_BHLD * cos_BHLD
    out_BHLD[..., :half].addcmul_(x_BHLD[..., half:], sin_BHLD[..., :half], value=-sign)
    out_BHLD[..., half:].addcmul_(x_BHLD[..., :half], sin_BHLD[..., half:], value=sign)
    return out_BHLD


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """What `apply_rotary_pos_emb` of the Llama-like models computes; sine and cosine are the same in both halves."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)


def accelerate(model: nn.Module) -> None:
    """Use the faster arithmetic in this model's RMSNorms and rotary positions; what it does not know stays as it is.

    Names, parameters and results (up to rounding) are unchanged, and other models are not touched: an attention layer
    gets a copy of its class's `forward` in which one function has another body.
    """
    for module in model.modules():
        kind, forward = type(module).__name__, type(module).forward
        if kind in ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm"):
            module.forward = _rms_forward.__get__(module)
        elif kind in ("LlamaAttention", "Qwen2Attention", "Qwen3Attention", "MistralAttention"):
            code = getattr(forward, "__code__", None)
            if code is not None and "apply_rotary_pos_emb" in code.co_names:
                names = {**forward.__globals__, "apply_rotary_pos_emb": rotary}
                quick = FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
                quick.__kwdefaults__ = forward.__kwdefaults__
                module.forward = quick.__get__(module)
