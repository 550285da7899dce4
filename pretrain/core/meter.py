"""The compute meter: FLOPs counted from the operations that really ran, and peak memory.

A multiply-add counts as two operations, as everywhere in the field. Matrix products, convolutions, attention and
decompositions are counted, forward, backward, recomputed, of auxiliary models and of the optimiser; elementwise work is
not. What a step costs follows from its shapes and, since the output layer sees only the positions that have a target,
from its numbers of targets, in which it is affine. So work of one shape is counted while a real step runs until what
its targets cost is known, and from then on computed:

    cost(n) = Σ aᵢ cost(nᵢ)   where   n = Σ aᵢ nᵢ,  Σ aᵢ = 1

What activation checkpointing or a fused attention kernel computes a second time is work, but no progress: it is counted
apart, so that the share of the machine that a model makes use of (MFU) can leave it out.

A method may leave work out that this machine does all the same: products with the zeros of a sparse matrix. What a
step spends on each of such matrices is counted apart, so that the share that is zero can be taken off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper
from torch.utils.module_tracker import ModuleTracker

from pretrain.core.system.portable import peak_resident

T = TypeVar("T")
Shape = Sequence[int]
Operation = OpOverload[..., object]


def _attention(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))


def _product(a: Shape, b: Shape, *_: object, **__: object) -> int:
    return 2 * math.prod(a) * b[-1]


def _in_place_product(self: Shape, a: Shape, b: Shape, *_: object, **__: object) -> int:
    return _product(a, b)


def _grouped_product(a: Shape, b: Shape, *_: object, **__: object) -> int:
    """Of a mixture's experts: rows, each of which meets the matrix of one; backwards also pairs of rows, grouped."""
    return _product(a[-2:] if len(b) == 2 else a, b)  # b's columns are then those of all groups together


def _grouped_product_backward(a: Shape, b: Shape, *_: object, **__: object) -> int:
    return 2 * _grouped_product(a, b)


def _singular_vectors(a: Shape, *_: object, **__: object) -> int:
    """Of an m × n matrix, m ≥ n, with thin U and V: 6 m n² + 20 n³ (Golub and Van Loan, Matrix Computations, 8.6.3)."""
    *many, rows, columns = a
    m, n = max(rows, columns), min(rows, columns)
    return math.prod(many) * (6 * m * n**2 + 20 * n**3)


def _orthogonal(a: Shape, *_: object, **__: object) -> int:
    """QR of an n × n matrix, with Q: 8/3 n³ (Golub and Van Loan, Matrix Computations, 5.2)."""
    return math.prod(a[:-2]) * 8 * a[-1] ** 3 // 3


def _eigenvectors(a: Shape, *_: object, **__: object) -> int:
    """Of a symmetric n × n matrix: 9 n³ (Golub and Van Loan, Matrix Computations, 8.3)."""
    return math.prod(a[:-2]) * 9 * a[-1] ** 3


# What torch's own registry does not know: attention on CPUs, products of integers, those that add to a tensor in
# place, and decompositions.
_UNKNOWN: dict[object, Callable[..., int]] = {
    torch.ops.aten._linalg_svd: _singular_vectors,
    torch.ops.aten.linalg_qr: _orthogonal,
    torch.ops.aten._linalg_eigh: _eigenvectors,
    torch.ops.aten.addmm_: _in_place_product,
    torch.ops.aten.baddbmm_: _in_place_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._int_mm: _product,
}
# Products of experts, by namespace and name: of newer releases of torch, and of transformers once it is imported.
_OF_SOME = {
    ("aten", "_grouped_mm"): _grouped_product,
    ("transformers", "grouped_mm_fallback"): _grouped_product,
    ("transformers", "grouped_mm_fallback_backward"): _grouped_product_backward,
}
_BACKWARD = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_backward,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward,
    torch.ops.aten._scaled_dot_product_cudnn_attention_backward,
)
# What asks for a tensor's layout, which some kinds of tensors let a mode answer.
_LAYOUT = (
    "is_contiguous", "sym_is_contiguous", "is_strides_like_format", "is_non_overlapping_and_dense", "size", "sym_size",
    "stride", "sym_stride", "storage_offset", "sym_storage_offset", "numel", "sym_numel", "dim",
)  # fmt: skip
_OF_LAYOUT = {getattr(torch.ops.aten, name).default for name in _LAYOUT if hasattr(torch.ops.aten, name)}
_OF_LAYOUT |= {torch.ops.aten.is_contiguous.memory_format, torch.ops.prim.layout.default}


def _formulas() -> dict[object, Callable[..., int]]:
    """What computes an operation's FLOPs from its arguments and `out_val`, by the operation."""
    known = ((getattr(torch.ops, room), name, formula) for (room, name), formula in _OF_SOME.items())
    some = {getattr(room, name): formula for room, name, formula in known if hasattr(room, name)}
    return flop_registry | {operation: shape_wrapper(formula) for operation, formula in (_UNKNOWN | some).items()}


def _composite(func: Operation) -> bool:
    """Whether an operation is made of others, as `OpOverload.decompose` has it."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    if func is torch.ops.prim.device.default:
        return False
    return key in func.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


class _Counter(TorchDispatchMode):
    """A count of FLOPs, and of those among them that something is computed a second time for.

    It counts as torch's `FlopCounterMode` does, but looks an operation up once instead of at each call, and keeps no
    account of modules, which takes several times as long as the operations of a small model.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.repeated = 0
        self.formulas = _formulas() | dict.fromkeys(_BACKWARD, shape_wrapper(self._attention_backward))
        self.operations: dict[object, tuple[bool, Callable[..., int] | None]] = {}  # whether to take it apart; formula

    def __torch_dispatch__(
        self, func: Operation | HigherOrderOperator, types: object, args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:  # fmt: skip
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator) or func in _OF_LAYOUT:
            return NotImplemented
        if func not in self.operations:
            self.operations[func] = _composite(func), self.formulas.get(func._overloadpacket)
        apart, formula = self.operations[func]
        if apart:
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _attention_backward(self, grad: Shape, query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
        """Five products, the first of which makes the scores again."""
        self.repeated += 2 * math.prod(query) * key[-2]
        return int(sdpa_backward_flop_count(grad, query, key, value))

    def cost(self, products: dict[str, int] | None = None) -> Cost:
        return Cost(int(self.flops), int(self.flops - self.repeated), products or {})


_counters: list[_Counter] = []  # those that are open; backward passes run in threads of their own, which see it too


def counting() -> bool:
    """Whether FLOPs are being counted, and nothing is compiled."""
    return bool(_counters)


@contextmanager
def _counter() -> Iterator[_Counter]:
    """While open, counts FLOPs. Eagerly: a frame first seen under the counter would never be compiled afterwards."""
    counter = _Counter()
    _counters.append(counter)
    try:
        with torch.compiler.set_stance("force_eager"), counter:
            yield counter
    finally:
        _counters.remove(counter)


def count_flops(work: Callable[[], T]) -> tuple[T, int]:
    """Run `work` once and count its FLOPs."""
    with _counter() as counter:
        result = work()
    return result, counter.cost().flops


@contextmanager
def _repeating() -> Iterator[None]:
    before = [counter.flops - counter.repeated for counter in _counters]
    try:
        yield
    finally:  # checkpointing leaves the recomputation by an exception as soon as it has what it needs
        for counter, flops in zip(_counters, before, strict=True):
            counter.repeated = counter.flops - flops


def recomputing() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of `torch.utils.checkpoint`: what its second forward pass spends counts as recomputed."""
    return nullcontext(), _repeating()


@contextmanager
def matrix_products(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """While open, counts the FLOPs of each linear layer's matrix products, forward and backward, by the layer's name.

    A call on N rows costs 2 N · |W|, the gradient of its input as much, and that of its weight as much again. What
    activation checkpointing recomputes is a call without gradients of its own.
    """
    spent, recomputed = dict.fromkeys(layers, 0), ModuleTracker()
    handles = []
    for name, layer in layers.items():

        def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...], _: object, name: str = name) -> None:
            x, weight = inputs[0], layer.get_parameter("weight")
            products = 1
            if torch.is_grad_enabled() and not recomputed.is_bw:
                products += x.requires_grad + weight.requires_grad
            spent[name] += products * 2 * x.numel() // x.shape[-1] * weight.numel()

        handles.append(layer.register_forward_hook(count))
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Work:
    """What tells the cost of some work: its shapes, and the numbers in which it is affine."""

    shapes: str
    sizes: tuple[float, ...] = ()


@dataclass(frozen=True)
class Cost:
    """What some work spends, in FLOPs."""

    flops: int
    useful: int  # without what is computed a second time
    products: Mapping[str, int] = field(default_factory=dict)  # of linear layers with zeros, by name

    def skipped(self, zeros: Mapping[str, float]) -> int:
        """The products with zeros, by the share of zeros in each layer's weight."""
        return int(sum(share * self.products[layer] for layer, share in zeros.items()))


Counted = tuple[list[float], int, int, dict[str, int]]  # sizes, and a cost's three fields: JSON-like


class Meter:
    """What work costs that was met before, by its shapes.

    `counts` is JSON-like and is saved with the training state, so a resumed run never recounts.
    """

    def __init__(self, counts: Mapping[str, Sequence[Counted]] | None = None) -> None:
        self.counts: dict[str, list[Counted]] = {shapes: list(each) for shapes, each in (counts or {}).items()}

    def known(self, work: Work, zeros: Collection[str] = ()) -> Cost | None:
        """What `work` costs, with the products of layers that have `zeros`; None while that is to be counted."""
        counted = self.counts.get(work.shapes, [])
        at = _coordinates(counted, work.sizes)
        if at is None or not all(set(zeros) <= set(c[3]) for c in counted):
            return None

        def between(numbers: Sequence[int]) -> int:
            return round(float(at @ np.array(numbers, dtype=np.float64)))

        products = {name: between([c[3][name] for c in counted]) for name in counted[0][3]}
        return Cost(between([c[1] for c in counted]), between([c[2] for c in counted]), products)

    @contextmanager
    def counting(self, work: Work, layers: Mapping[str, nn.Module] | None = None) -> Iterator[None]:
        """While open, counts the FLOPs of `work`, if it is not known what it costs, into `counts`.

        Those of `layers` are counted apart, for `Cost.skipped`.
        """
        if self.known(work, layers or ()) is not None:
            yield
            return
        with matrix_products(layers or {}) as products, _counter() as counter:
            yield
        cost = counter.cost(products)
        like = [c for c in self.counts.get(work.shapes, []) if c[3].keys() == products.keys()]
        self.counts[work.shapes] = [*like, (list(work.sizes), cost.flops, cost.useful, dict(products))]

    def run(self, work: Work, call: Callable[[], T], layers: Mapping[str, nn.Module] | None = None) -> tuple[T, int]:
        """Call `call` under `counting`; returns its result and its FLOPs."""
        with self.counting(work, layers):
            result = call()
        return result, self.cost(work).flops

    def cost(self, work: Work) -> Cost:
        """What `work` costs, which has been counted."""
        cost = self.known(work)
        assert cost is not None, f"the meter has not counted {work}"
        return cost


def _coordinates(counted: Sequence[Counted], sizes: Sequence[float]) -> NDArray[np.float64] | None:
    """`sizes` as Σ aᵢ sizesᵢ with Σ aᵢ = 1, or None where it does not lie among those that were counted."""
    if not counted:
        return None
    points = np.array([[*c[0], 1.0] for c in counted]).T
    wanted = np.array([*sizes, 1.0])
    met = np.flatnonzero((points == wanted[:, None]).all(axis=0))
    if len(met):
        return np.eye(len(counted))[met[0]]
    scale = np.maximum(np.abs(points).max(axis=1), 1.0)
    at: NDArray[np.float64] = np.linalg.lstsq(points / scale[:, None], wanted / scale, rcond=1e-9)[0]
    return at if np.allclose(points @ at, wanted, rtol=1e-9, atol=1e-6) else None


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes at the peak so far: allocated on a CUDA device, else resident in this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()
