"""What this machine does well: device, precision, its own matrix rate, its allocator."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from pretrain.core.errors import PretrainError
from pretrain.core.quick.machine import cpu_name, remember_rate, remembered_rate


def pick_device() -> torch.device:
    """The first CUDA device, where float32 matrix products are in TF32 from now on, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda")


def precision(device: torch.device) -> torch.dtype | None:
    """The dtype to autocast matrix products to, or None for float32.

    bfloat16 only where the hardware multiplies it in tiles (CUDA, AMX): on CPUs without, even on those with AVX-512
    instructions for it, float32 is faster.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if "amx_bf16" in _cpu_flags() else None


def autocast(device: torch.device, name: str) -> AbstractContextManager[object]:
    """The arithmetic's precision, `auto`, `float32` or `bfloat16`: `auto` is what the hardware does well."""
    known = {"auto": precision(device), "float32": None, "bfloat16": torch.bfloat16}
    if name not in known:
        raise PretrainError(f"precision {name!r}: accepted: {', '.join(known)}")
    dtype = known[name]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@functools.cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


@functools.cache
def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product in the device's training precision: the best that any run has measured here.

    A core that is busy meanwhile makes a measurement too low.
    """
    return max(_measured_rate(device), remembered_rate(device.type) or 0.0)


def _measured_rate(device: torch.device) -> float:
    dtype = precision(device) or torch.float32
    size = 8192 if device.type == "cuda" else 1024
    apart = torch.Generator(device).manual_seed(0)  # so that nothing drawn later depends on whether it was measured
    a, b = torch.randn(2, size, size, device=device, dtype=dtype, generator=apart)
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    rate = 2 * size**3 / min(seconds)
    remember_rate(device.type, rate)  # for plans, which do not wait for torch
    return rate


def tune_allocator() -> None:
    """Keep freed memory in the process, so that a step does not fault its pages in anew, and flush denormals to zero.

    glibc hands large blocks back to the system at once; a training step frees and asks for the same ones again and
    again. Elsewhere than on glibc this does nothing.
    """
    torch.set_flush_denormal(True)
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        return


def describe() -> dict[str, object]:
    """The environment as reports and results record it."""
    versions = {}
    for package in ("pretrain", "torch", "transformers", "tokenizers", "datasets", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": versions,
    }
