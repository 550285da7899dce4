"""MInference on long prompts: time of the pass over the prompt, and perplexity of what follows, against all attention.

    python benchmarks/sparse_prefill.py [CHECKPOINT] [--lengths 4096 8192 16384] [--vertical 256] [--slash 256]
    python benchmarks/sparse_prefill.py CHECKPOINT --search patterns.json --sink 128 --local 512
    python benchmarks/sparse_prefill.py CHECKPOINT --patterns patterns.json

Prompts are modules of Python's standard library, one after another; the perplexity is that of the next `--new` tokens,
given one at a time to the cache that the prompt left. Dense and sparse run in turn on the same prompts; the first one
of a length also warms up, and is timed again. `--search` writes the patterns that it finds on `--calibration` tokens of
other modules, and goes on with them. "computed" is the share of the causal products of queries and keys. Without a
checkpoint the weights are random, and only the times mean something: the diagonals found are then scattered and much is
computed, unless `--search` keeps the cost at that of an A-shape of `--sink` and `--local`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import unittest.mock
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.core.checkpoint import load
from pretrain.core.encoding import encode
from pretrain.core.files import write_json
from pretrain.core.generation.forward import Forward
from pretrain.core.hardware import pick_device
from pretrain.core.models.families import new_model
from pretrain.corpus.sources import PythonStdlib, read
from pretrain.decoding.long_context._sparse_attention import choose
from pretrain.decoding.long_context.minference import MInference, search

VOCABULARY = 4096


def model_of(settings: argparse.Namespace) -> tuple[Any, Any]:
    """The checkpoint and its tokenizer, or a Llama with random weights and none."""
    if settings.checkpoint:
        return load(settings.checkpoint, device=pick_device())
    width = settings.width
    fields = {
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": width * 43 // 16,
        "num_hidden_layers": settings.layers, "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": max(settings.lengths) + settings.new,
    }  # fmt: skip
    return new_model("llama", fields).to(pick_device()).eval(), None


def rows_of(tokenizer: Any, length: int, count: int, *, calibrate: bool = False) -> torch.Tensor:
    """`count` rows of `length` tokens from every tenth module, or from others to calibrate on; `_DN`."""
    if tokenizer is None:
        return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(int(calibrate)))
    texts = [d["text"] for n, d in enumerate(read(PythonStdlib(docstrings=False))) if n % 10 == int(calibrate)]
    stream = np.concatenate(encode(tokenizer, texts))
    if len(stream) < length * count:
        raise SystemExit(f"{length * count} tokens asked for: accepted: up to {len(stream)}")
    return torch.from_numpy(stream[: length * count].reshape(count, length).astype(np.int64))


@torch.inference_mode()
def measure(model: Any, row_1N: torch.Tensor, length: int, method: MInference | None) -> tuple[float, float]:
    """Seconds of the pass over the first `length` tokens, and the loss of those that follow."""
    new = row_1N.shape[1] - length
    synchronise(model.device)
    started = time.perf_counter()
    if method is None:
        forward = Forward(model, length + new)
        logits_1V = forward.prefill(row_1N[:, :length])
    else:
        logits_1V, forward = method.prefill(model, row_1N[:, :length], new=new)
    synchronise(model.device)
    seconds, losses = time.perf_counter() - started, []
    for token_1 in row_1N[:, length:].T:
        losses.append(torch.nn.functional.cross_entropy(logits_1V.float(), token_1))
        logits_1V = forward.step(token_1[:, None])
    return seconds, float(torch.stack(losses).mean())


def computed(model: Any, row_1L: torch.Tensor, method: MInference) -> float:
    """The share of the causal products of queries and keys that the method computes."""
    chosen, length, whole = [], row_1L.shape[1], method.of(model)

    def noted(*given: Any, **more: Any) -> Any:
        chosen.append(choose(*given, **more))
        return chosen[-1]

    with unittest.mock.patch("pretrain.decoding.long_context.minference.choose", noted):
        method.prefill(model, row_1L)
    dense = sum(map(len, whole)) * length * (length + 1) / 2
    return (dense * (1 - len(chosen) / len(whole)) + sum(kept.pairs() for kept in chosen)) / dense


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def method_of(model: Any, tokenizer: Any, settings: argparse.Namespace) -> MInference:
    """The method as asked for, its patterns searched for first if that was asked for."""
    if not settings.search:
        return MInference(settings.patterns, vertical=settings.vertical, slash=settings.slash)
    row_1L = rows_of(tokenizer, settings.calibration, 1, calibrate=True).to(model.device)
    started = time.perf_counter()
    found = search(model, [row_1L], sink=settings.sink, local=settings.local)
    write_json(Path(settings.search), found)
    kinds = [head["pattern"] for layer in found["layers"] for head in layer]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    print(f"searched in {time.perf_counter() - started:.1f} s: {counts}\n", flush=True)
    return MInference(settings.search)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--patterns")
    parser.add_argument("--search")
    whole = {"new": 64, "documents": 4, "vertical": 256, "slash": 256, "sink": 128, "local": 512, "calibration": 8192}
    for name, value in (whole | {"width": 256, "layers": 4}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    settings = parser.parse_args()
    model, tokenizer = model_of(settings)
    if settings.checkpoint and tokenizer is None:
        raise SystemExit(f"{settings.checkpoint}: the checkpoint has no tokenizer")
    method = method_of(model, tokenizer, settings)
    print("| prompt | computed | dense s | sparse s | times as fast | dense perplexity | sparse perplexity |")
    print("|---|---|---|---|---|---|---|")
    for length in settings.lengths:
        rows_DN = rows_of(tokenizer, length + settings.new, settings.documents).to(model.device)
        rows = [rows_DN[:1], *rows_DN.split(1)]
        found = [[measure(model, row_1N, length, one) for one in (None, method)] for row_1N in rows]
        seconds = [statistics.median(pair[n][0] for pair in found[1:]) for n in (0, 1)]
        ratio = statistics.median(pair[0][0] / pair[1][0] for pair in found[1:])
        losses = [statistics.mean(pair[n][1] for pair in found[1:]) for n in (0, 1)]
        share = computed(model, rows_DN[:1, :length], method)
        print(
            f"| {length} | {share:.1%} | {seconds[0]:.3f} | {seconds[1]:.3f} | {ratio:.2f} | {math.exp(losses[0]):.3f} "
            f"| {math.exp(losses[1]):.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
