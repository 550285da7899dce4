"""The compute meter: FLOPs counted from the operations that really ran, and peak memory.

A multiply-add counts as two operations, as everywhere in the field. Matrix products, convolutions, attention and
decompositions are counted, forward, backward, recomputed, of auxiliary models and of the optimiser; elementwise work is
not. The count of a step depends on its shapes only, so it is taken once for each shape, while a real step runs, and
then remembered.

A method may leave work out that this machine does all the same: products with the zeros of a sparse matrix. What a
step spends on each of such matrices is counted apart, so that the share that is zero can be taken off.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker

T = TypeVar("T")


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


def _in_place_product(self: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return math.prod(a) * 2 * b[-1]


def _singular_vectors(a: Any, *_: Any, **__: Any) -> int:
    """Of an m × n matrix, m ≥ n, with thin U and V: 6 m n² + 20 n³ (Golub and Van Loan, Matrix Computations, 8.6.3)."""
    *many, rows, columns = a
    m, n = max(rows, columns), min(rows, columns)
    return math.prod(many) * (6 * m * n**2 + 20 * n**3)


# What `FlopCounterMode` does not know: the attention kernel of CPUs, products that add to a tensor in place, and
# decompositions.
_UNKNOWN = {
    torch.ops.aten._linalg_svd: _singular_vectors,
    torch.ops.aten.addmm_: _in_place_product,
    torch.ops.aten.baddbmm_: _in_place_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


_counting: ContextVar[bool] = ContextVar("counting", default=False)


def counting() -> bool:
    """Whether FLOPs are being counted, and nothing is compiled."""
    return _counting.get()


@contextmanager
def _counter() -> Iterator[FlopCounterMode]:
    """While open, counts FLOPs. Eagerly: a frame first seen under the counter would never be compiled afterwards."""
    before = _counting.set(True)
    try:
        counter = FlopCounterMode(display=False, custom_mapping=_UNKNOWN)
        with torch.compiler.set_stance("force_eager"), counter:
            yield counter
    finally:
        _counting.reset(before)


def count_flops(work: Callable[[], T]) -> tuple[T, int]:
    """Run `work` once and count its FLOPs."""
    with _counter() as counter:
        result = work()
    return result, int(counter.get_total_flops())


@contextmanager
def matrix_products(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """While open, counts the FLOPs of each linear layer's matrix products, forward and backward, by the layer's name.

    A call on N rows costs 2 N · |W|, the gradient of its input as much, and that of its weight as much again. What
    activation checkpointing recomputes is a call without gradients of its own.
    """
    spent, recomputed = dict.fromkeys(layers, 0), ModuleTracker()
    handles = []
    for name, layer in layers.items():

        def count(layer: nn.Module, inputs: tuple[Any, ...], _: Any, name: str = name) -> None:
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


class Meter:
    """FLOPs by shape: of all work, and of the linear layers whose zeros a method takes off.

    Both are JSON-like and are saved with the training state, so a resumed run never recounts.
    """

    def __init__(self, counts: dict[str, int] | None = None, products: dict[str, dict[str, int]] | None = None) -> None:
        self.counts: dict[str, int] = dict(counts or {})
        self.products: dict[str, dict[str, int]] = dict(products or {})

    def knows(self, key: Hashable, zeros: Collection[str] = ()) -> bool:
        """Whether the work `key` has been counted, with the products of layers that have `zeros`."""
        return str(key) in self.counts and (not zeros or str(key) in self.products)

    @contextmanager
    def counting(self, key: Hashable, layers: Mapping[str, nn.Module] | None = None) -> Iterator[None]:
        """While open, counts the FLOPs of work that `key` names, if it is met for the first time, into `counts`.

        Those of `layers` are counted apart, for `skipped`.
        """
        name = str(key)
        if self.knows(name, layers or ()):
            yield
            return
        with matrix_products(layers or {}) as products, _counter() as counter:
            yield
        self.counts[name] = int(counter.get_total_flops())
        if layers:
            self.products[name] = products

    def run(self, key: Hashable, work: Callable[[], T], layers: Mapping[str, nn.Module] | None = None) -> tuple[T, int]:
        """Run `work` under `counting`; returns its result and its FLOPs."""
        with self.counting(key, layers):
            result = work()
        return result, self.counts[str(key)]

    def flops(self, keys: Iterable[Hashable], zeros: Mapping[str, float]) -> tuple[int, int]:
        """The FLOPs of all this work, and those of products with zeros among them."""
        keys = list(keys)
        return sum(self.counts[str(key)] for key in keys), sum(self.skipped(key, zeros) for key in keys)

    def skipped(self, key: Hashable, zeros: Mapping[str, float]) -> int:
        """How many FLOPs of the work `key` are products with zeros, by the share of zeros in each layer's weight."""
        return int(sum(share * self.products[str(key)][layer] for layer, share in zeros.items()))


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes at the peak so far: allocated on a CUDA device, else resident in this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
