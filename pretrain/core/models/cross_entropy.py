"""The last linear layer and its cross-entropy in one, without ever holding the logits of a whole batch.

The logits are made chunk by chunk, and each chunk's gradient is taken at once, while the chunk is in the cache:

    p = softmax(h Wᵀ + b);  ∂nll/∂h = (p - y) W;  ∂nll/∂W = (p - y)ᵀ h

Positions without a target are not computed.

Shape letters: B rows, L positions, N positions with a target, C of a chunk, E width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.core.models.layers import Saved

IGNORE = -100
LEAST_ROWS = 256  # below that each chunk's pass over the weight costs more than it saves
READABLE = ("cpu",)  # devices that the host does not wait for
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ coefficient · nll over N targets; the gradients are ready when the forward pass is."""

    @staticmethod
    def forward(
        ctx: Saved,
        h_NE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        coefficient_N: Tensor,
        needs: tuple[bool, bool, bool],
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        low = torch.get_autocast_dtype(h_NE.device.type) if torch.is_autocast_enabled(h_NE.device.type) else h_NE.dtype
        rows = max(LEAST_ROWS, CHUNK_BYTES.get(h_NE.device.type, 64 << 20) // (4 * weight_VE.shape[0]))
        w_VE = weight_VE.to(low)
        nll_N = torch.empty(len(h_NE), dtype=torch.promote_types(torch.float32, h_NE.dtype), device=h_NE.device)
        grad_h_NE = torch.empty_like(h_NE) if needs[0] else None
        grad_w_VE = torch.zeros_like(weight_VE) if needs[1] else None
        grad_b_V = torch.zeros_like(bias_V) if needs[2] and bias_V is not None else None
        # One buffer for all chunks: it stays in the cache, where a fresh one would not be.
        buffer_CV = torch.empty(min(rows, len(h_NE)), weight_VE.shape[0], dtype=low, device=h_NE.device)
        for start in range(0, len(h_NE), rows):
            part = slice(start, start + rows)
            h_CE, target_C = h_NE[part].to(low), target_N[part]
            logits_CV = torch.mm(h_CE, w_VE.T, out=buffer_CV[: len(h_CE)]).to(nll_N.dtype)
            if bias_V is not None:
                logits_CV += bias_V
            if softcap is not None:
                logits_CV = softcap * torch.tanh(logits_CV / softcap)
                slope_CV = 1 - (logits_CV / softcap).square()
            top_C, at_target_C = logits_CV.amax(-1), logits_CV.gather(-1, target_C[:, None])[:, 0]
            p_CV = torch.softmax(logits_CV, -1, out=logits_CV)
            # log Σ exp from the largest entry, whose probability is never near 0.
            nll_N[part] = top_C - p_CV.amax(-1).log() - at_target_C
            if not any(needs):
                continue
            c_C = coefficient_N[part].to(nll_N.dtype)
            p_CV = p_CV.scatter_add_(-1, target_C[:, None], torch.full_like(c_C, -1.0)[:, None])
            p_CV = (p_CV if softcap is None else p_CV.mul_(slope_CV)).to(low)
            if grad_h_NE is not None:
                grad_h_NE[part] = (p_CV @ w_VE) * c_C[:, None]
            if grad_w_VE is not None:
                scaled_CE = (h_CE * c_C[:, None]).to(low)
                if low == grad_w_VE.dtype:
                    grad_w_VE.addmm_(p_CV.T, scaled_CE)
                else:
                    grad_w_VE += p_CV.T @ scaled_CE
            if grad_b_V is not None:
                grad_b_V += c_C.to(low) @ p_CV
        ctx.save_for_backward(grad_h_NE, grad_w_VE, grad_b_V)
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * coefficient_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Saved, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, _ = grads
        # In place: the gradients are this function's own, and a graph is gone through once.
        h, w, b = (None if g is None else g.mul_(grad) for g in ctx.saved_tensors)
        return h, w, b, None, None, None, None


def linear_cross_entropy(
    hidden_BLE: Tensor,
    weight_VE: Tensor,
    target_BL: Tensor,
    *,
    bias_V: Tensor | None = None,
    weight_BL: Tensor | None = None,
    targets: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `softmax(hidden @ weight.T + bias)` against `target_BL` (-100: no target), in nats.

    Returns the sum of `weight_BL` · nll (weights of 1 when not given) over the number of targets, as a scalar to
    differentiate once, and the unweighted `nll_BL`, detached and 0 where there is no target. The idea of computing the
    gradient in the forward pass, chunk by chunk, is that of Liger Kernel (arXiv:2410.10989).

    `targets` is how many positions have a target, where the host knows it: else it has to wait for the device to learn
    it. The value is not a number where it is wrong. `softcap` c makes logits z those of c · tanh(z / c).
    """
    h_NE, target_N = hidden_BLE.flatten(0, -2), target_BL.flatten()
    has_target_N = target_N != IGNORE
    exact = torch.promote_types(torch.float32, h_NE.dtype)  # 1 / N in bfloat16 would scale the loss by up to 0.2%
    coefficient_N = torch.ones_like(target_N, dtype=exact) if weight_BL is None else weight_BL.flatten().to(exact)
    place_N = None
    if targets is not None and h_NE.device.type not in READABLE:
        place_N = has_target_N.byte().argsort(descending=True, stable=True)[:targets]
        right = has_target_N.sum() == targets
        coefficient_N = torch.where(right, coefficient_N, torch.nan)[place_N]
        h_NE, target_N = h_NE[place_N], target_N[place_N].clamp(min=0)
    elif not bool(has_target_N.all()):
        h_NE, target_N, coefficient_N = h_NE[has_target_N], target_N[has_target_N], coefficient_N[has_target_N]
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (h_NE, weight_VE, bias_V))
    coefficient_N = coefficient_N / max(len(target_N), 1)
    value, nll_N = _LinearCrossEntropy.apply(h_NE, weight_VE, bias_V, target_N, coefficient_N, needs, softcap)
    nll_BL = torch.zeros(target_BL.shape, dtype=nll_N.dtype, device=nll_N.device)
    if place_N is None:
        nll_BL.masked_scatter_(has_target_N.view_as(target_BL), nll_N)
    else:
        nll_BL.view(-1)[place_N] = nll_N
    return value, nll_BL
