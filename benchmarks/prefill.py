"""Prefill of prompts of unequal length: padded to the longest, and packed into shared rows.

    python benchmarks/prefill.py [--family llama] [--prompts 64] [--median 64] [--sigma 1.0] [--rounds 5]

Lengths are log-normal, cut at `--longest`. Both give the logits after each prompt and a cache padded on the left; they
run in turn on the same prompts, and the time is the median of the paired ratios. What each gives is compared first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from pretrain.core.generation.rows import prefill
from pretrain.core.hardware import pick_device
from pretrain.core.models.families import new_model
from pretrain.decoding.cache.prepacking import Prepacking

VOCABULARY = 4096


def model_of(settings: argparse.Namespace) -> Any:
    """A model with random weights."""
    width, layers = settings.width, settings.layers
    if settings.family == "gpt2":
        fields = {"n_embd": width, "n_layer": layers, "n_head": width // 64, "n_positions": settings.longest}
    else:
        fields = {
            "hidden_size": width, "intermediate_size": width * 43 // 16, "num_hidden_layers": layers,
            "num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 128),
        }  # fmt: skip
    return new_model(settings.family, fields | {"vocab_size": VOCABULARY}).to(pick_device()).eval()


def prompts_of(settings: argparse.Namespace, seed: int, device: torch.device) -> list[torch.Tensor]:
    """Random tokens of log-normal lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (settings.median * torch.exp(settings.sigma * torch.randn(settings.prompts, generator=generator))).long()
    lengths = lengths.clamp(1, settings.longest).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).to(device) for n in lengths]


def padded(model: Any, prompts: list[torch.Tensor]) -> tuple[torch.Tensor, Any]:
    """The usual way: a row a prompt, padding on the left, the head on the last position only."""
    longest = max(map(len, prompts))
    ids_BL = torch.zeros(len(prompts), longest, dtype=torch.long, device=prompts[0].device)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        ids_BL[row, longest - len(prompt) :] = prompt
        mask_BL[row, longest - len(prompt) :] = 1
    with torch.no_grad():
        return prefill(model, ids_BL, mask_BL)


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, float, Any]:
    """Seconds, MiB at the peak on a GPU, and what came out."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    made = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begun
    return seconds, torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0, made


def compare(packed: Any, usual: Any, lengths: list[int]) -> float:
    """The largest difference of logits, keys and values."""
    gaps = [float((packed[0] - usual[0]).abs().max())]
    for mine, theirs in zip(packed[1].layers, usual[1].layers, strict=True):
        for row, length in enumerate(lengths):
            gaps.append(float((mine.keys[row, :, -length:] - theirs.keys[row, :, -length:]).abs().max()))
            gaps.append(float((mine.values[row, :, -length:] - theirs.values[row, :, -length:]).abs().max()))
    return max(gaps)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("llama", "qwen3", "gpt2"), default="llama")
    for name, value in (("width", 256), ("layers", 4), ("prompts", 64), ("longest", 1024), ("row", 0), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--median", type=float, default=64)
    parser.add_argument("--sigma", type=float, default=1.0)
    settings = parser.parse_args()
    model, method = model_of(settings), Prepacking(settings.row)
    device = model.device
    print("| round | tokens | longest | padded rows | packed rows | ms | ms | speed-up | peak MiB | peak MiB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    ratios, gap = [], 0.0
    for number in range(-1, settings.rounds):  # the first is not counted
        prompts = prompts_of(settings, max(number, 0), device)
        lengths = [len(prompt) for prompt in prompts]
        shapes: list[Any] = []
        hook = model.base_model.register_forward_pre_hook(
            lambda _, args, given, shapes=shapes: shapes.append((args[0] if args else given["input_ids"]).shape),
            with_kwargs=True,
        )
        usual_s, usual_mib, usual = timed(lambda prompts=prompts: padded(model, prompts), device)
        packed_s, packed_mib, packed = timed(lambda prompts=prompts: method.prefill(model, prompts), device)
        hook.remove()
        gap = max(gap, compare(packed, usual, lengths))
        if number < 0:
            continue
        ratios.append(usual_s / packed_s)
        print(
            f"| {number} | {sum(lengths)} | {max(lengths)} | {shapes[0][0]} × {shapes[0][1]} | {shapes[1][0]} × "
            f"{shapes[1][1]} | {1e3 * usual_s:.1f} | {1e3 * packed_s:.1f} | {ratios[-1]:.2f} | {usual_mib:.0f} "
            f"| {packed_mib:.0f} |"
        )
    median = statistics.median(ratios)
    print(f"\nmedian speed-up {median:.2f} ({min(ratios):.2f} to {max(ratios):.2f}); the target of 2 is", end=" ")
    print("met" if median >= 2 else "not met")
    print(f"largest difference of logits, keys and values: {gap:.1e}")


if __name__ == "__main__":
    main()
