"""Time per token and bytes of what is remembered, by context: Hedgehog's linear attention against softmax attention.

    python benchmarks/linear_attention.py [--contexts 1024,2048,4096,8192,16384] [--steps 16] [--rounds 7] [--threads 1]

A Llama with random weights (`--layers`, `--width`, `--heads`) and its copy after the surgery `hedgehog` read the same
context and then get one token at a time. Softmax attention is timed twice: by `transformers` with its growing cache,
which is what the linear attention is run by too, and by `decoding._forward`, whose cache is allocated once. In a round
each takes `--steps` tokens in turn; a number is the median over the rounds. The time of reading the context is beside.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from pretrain.core.generation.forward import Forward
from pretrain.core.hardware import pick_device
from pretrain.core.models.families import new_model
from pretrain.decoding.cache._pyramid import cache_bytes
from pretrain.surgery.architecture.hedgehog import Hedgehog

Step = Callable[[], Any]


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def by_model(model: Any, tokens_1L: torch.Tensor) -> tuple[Step, Any]:
    """Read the context; a step of the model's own forward pass, and its cache."""
    cache = model(tokens_1L, use_cache=True, logits_to_keep=1).past_key_values
    return lambda: model(tokens_1L[:, :1], past_key_values=cache, use_cache=True), cache


def by_forward(model: Any, tokens_1L: torch.Tensor, cache: Any, room: int) -> Step:
    """A step of `Forward`, which takes over the keys and values of the context."""
    forward = Forward(model, tokens_1L.shape[1] + room)
    for number, layer in enumerate(cache.layers):
        forward.update(layer.keys, layer.values, number)
    forward.length = tokens_1L.shape[1]
    return lambda: forward.step(tokens_1L[:, :1])


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What `work` returns, and its seconds."""
    synchronise(device)
    started = time.perf_counter()
    result = work()
    synchronise(device)
    return result, time.perf_counter() - started


@torch.inference_mode()
def measure(plain: Any, linear: Any, context: int, steps: int, rounds: int) -> dict[str, float]:
    """Milliseconds a token of the three, bytes of the two, seconds of reading the context."""
    tokens_1L = torch.randint(plain.config.vocab_size, (1, context), device=plain.device)
    (grown, cache), softmax = timed(lambda: by_model(plain, tokens_1L), plain.device)
    (state, own), reading = timed(lambda: by_model(linear, tokens_1L), plain.device)
    softmax_bytes = cache_bytes(cache)
    ways = {"transformers": grown, "loop": by_forward(plain, tokens_1L, cache, steps * (rounds + 1)), "linear": state}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, step in ways.items():
            _, seconds = timed(lambda step=step: [step() for _ in range(steps)], plain.device)  # type: ignore[misc]
            spent[name] += [seconds / steps * 1e3] if number else []  # the first round warms up
    found = {name: statistics.median(times) for name, times in spent.items()}
    sizes = {"softmax_bytes": softmax_bytes, "linear_bytes": cache_bytes(own)}
    return found | sizes | {"softmax_reading": softmax, "linear_reading": reading}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="1024,2048,4096,8192,16384")
    whole = {"steps": 16, "rounds": 7, "layers": 4, "width": 256, "heads": 4, "vocabulary": 4096, "threads": 1}
    for name, value in whole.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    contexts = [int(n) for n in settings.contexts.split(",")]
    fields = {
        "vocab_size": settings.vocabulary, "hidden_size": settings.width,
        "intermediate_size": settings.width * 43 // 16,
        "num_hidden_layers": settings.layers, "num_attention_heads": settings.heads,
        "max_position_embeddings": max(contexts) + settings.steps * (settings.rounds + 2),
    }  # fmt: skip
    plain: Any = new_model("llama", fields).to(pick_device()).eval()
    linear = Hedgehog()(copy.deepcopy(plain))
    print(
        f"{settings.layers} layers of {settings.width}, {settings.heads} heads, on {plain.device}; milliseconds a token"
    )
    print("| context | softmax, transformers | softmax, loop | Hedgehog | KiB softmax | KiB Hedgehog | reading, s |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for context in contexts:
        found = measure(plain, linear, context, settings.steps, settings.rounds)
        rows.append(found)
        print(
            f"| {context} | {found['transformers']:.2f} | {found['loop']:.2f} | {found['linear']:.2f} "
            f"| {found['softmax_bytes'] / 1024:.0f} | {found['linear_bytes'] / 1024:.0f} "
            f"| {found['softmax_reading']:.2f}, {found['linear_reading']:.2f} |",
            flush=True,
        )
    last, first = rows[-1], rows[0]
    growth = {name: last[name] / first[name] for name in ("transformers", "loop", "linear")}
    print(
        f"\nFrom {contexts[0]} to {contexts[-1]}: transformers × {growth['transformers']:.2f}, "
        f"loop × {growth['loop']:.2f}, Hedgehog × {growth['linear']:.2f}"
    )


if __name__ == "__main__":
    main()
