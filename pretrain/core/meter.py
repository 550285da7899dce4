"""The compute meter: FLOPs counted from the operations that really ran, and peak memory.

A multiply-add counts as two operations, as everywhere in the field. Matrix products, convolutions and attention are
counted, forward, backward, recomputed and of auxiliary models; elementwise work is not. The count of a step depends on
its shapes only, so it is taken once for each shape, while a real step runs, and then remembered.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

T = TypeVar("T")


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


def _in_place_product(self: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return math.prod(a) * 2 * b[-1]


# What `FlopCounterMode` does not know: the attention kernel of CPUs, and products that add to a tensor in place.
_UNKNOWN = {
    torch.ops.aten.addmm_: _in_place_product,
    torch.ops.aten.baddbmm_: _in_place_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def count_flops(work: Callable[[], T]) -> tuple[T, int]:
    """Run `work` once and count its FLOPs."""
    # Eagerly: a frame first seen under the counter would never be compiled afterwards.
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False, custom_mapping=_UNKNOWN) as counter:
        result = work()
    return result, int(counter.get_total_flops())


class Meter:
    """FLOPs by shape. `counts` is JSON-like and is saved with the training state, so a resumed run never recounts."""

    def __init__(self, counts: dict[str, int] | None = None) -> None:
        self.counts: dict[str, int] = dict(counts or {})

    def run(self, key: Hashable, work: Callable[[], T]) -> tuple[T, int]:
        """Run `work`, counting its FLOPs the first time that `key` is met; returns its result and its FLOPs."""
        name = str(key)
        if name in self.counts:
            return work(), self.counts[name]
        result, self.counts[name] = count_flops(work)
        return result, self.counts[name]


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes at the peak so far: allocated on a CUDA device, else resident in this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
