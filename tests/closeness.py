"""What rounding alone explains, for comparisons that promise no bits.

A test promises **bits** (`torch.equal`, the marker `bits`) where both sides run the same kernels on the same layout of
memory: a model and the same one loaded, a training and its resumption. Where the other side takes another way to the
same number (plain `transformers` on weights that it maps from a file, another order of a sum, merged matrices, another
batch), the last bits are the processor's choice, and the test promises **rounding**: these tolerances. Comparisons of
integers, and of values that are copied and never computed, are exact and need neither.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SAFETY = 4.0


def rounding(terms: float, size: float, *, steps: float = 1, dtype: torch.dtype = torch.float32) -> float:
    """The largest difference that rounding explains between two computations of ⟨a, b⟩ = Σ aᵢbᵢ of `terms` terms.

    `size` is ‖a‖·‖b‖ (at least Σ|aᵢbᵢ|, by Cauchy and Schwarz). A sum of n terms in any order is off by at most
    n·u·Σ|aᵢbᵢ|, u = 2⁻²⁴ in float32, and as the single errors have random signs by λ·√n·u·Σ|aᵢbᵢ| but for a share of
    2·exp(-λ²/2) of the sums (Higham and Mary 2019, theorem 2.4; λ is `SAFETY`, 0.07% at 4, where kernels that sum in
    vectors and blocks stay far below). Both sides are off: twice that. Where the result went through `steps` such sums
    one after the other, each adds an error that is relative to what flows through and independent of the others: √steps.
    """
    return 2 * SAFETY * math.sqrt(terms * steps) * UNIT[dtype] * size


def autocast_rounding(size: float, *, steps: float = 1) -> float:
    """The largest difference that autocast to bfloat16 explains, of a loss of that size after `steps` products.

    Autocast rounds both factors of a product and what comes out of it to bfloat16, u = 2⁻⁸, and sums in float32: three
    errors for each of the `steps`, independent and relative to what flows through, so that they add up to √(3·steps)·u
    (and `SAFETY` of that but for a share of 0.07%). A loss is at most quadratic in what flows: twice that.
    """
    return 2 * SAFETY * math.sqrt(3 * steps) * UNIT[torch.bfloat16] * size


def products(model: nn.Module) -> tuple[int, int]:
    """The longest sum of a model's matrix products, and about how many sums follow one another in it.

    Twice the matrices: the norms and attention's two products stand between them.
    """
    matrices = [m for m in model.modules() if getattr(m, "weight", None) is not None and m.weight.ndim == 2]
    matrices = [m for m in matrices if not isinstance(m, nn.Embedding)]
    return max(getattr(m, "in_features", m.weight.shape[0]) for m in matrices), 2 * len(matrices)


def assert_rounding(
    found: Any,
    expected: Any,
    terms: float,
    *,
    steps: float = 1,
    size: float | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """`found` differs from `expected` by no more than `rounding`, in the coarser of the two types or in `dtype`.

    `size` is by default √terms · max|expected|: what the terms of the largest sum amount to where their signs are random.
    """
    found, expected = torch.as_tensor(found).detach(), torch.as_tensor(expected).detach()
    dtype = dtype or max(found.dtype, expected.dtype, key=lambda kind: UNIT[kind])
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    limit = rounding(terms, math.sqrt(terms) * largest if size is None else size, steps=steps, dtype=dtype)
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=limit)


def assert_same_model(
    found: Tensor, expected: Tensor, model: nn.Module, *, length: int = 0, dtype: torch.dtype | None = None
) -> None:
    """Two outputs of `model`'s computation, which other kernels or another order of sums may have made.

    `length` is how many positions attention sums over, where they are more than the model is wide; `dtype` the coarsest
    type on the way, where the outputs' own is finer.
    """
    terms, steps = products(model)
    assert_rounding(found, expected, max(terms, length), steps=steps, dtype=dtype)
