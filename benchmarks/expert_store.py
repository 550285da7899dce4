"""A mixture whose experts lie in files: how long decoding waits for them, on demand and fetched ahead.

    python benchmarks/expert_store.py [--blocks 8] [--width 512] [--inner 1408] [--experts 16] [--tokens 32] [--warm]

A Mixtral with random weights is saved as it is and with `pre_gated`. Each row decodes greedily after a prompt of one
token; the experts' files are put out of the system's cache before each token, unless `--warm`. `wait` is the time in
which nothing computed, `resident` the most that experts took of memory at a time, `peak` the process's, of a process
for each row.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pretrain.core import checkpoint
from pretrain.core.experts.store import store_of
from pretrain.core.models.families import new_model
from pretrain.decoding.offloading.expert_store import ExpertStore
from pretrain.surgery.experts.pre_gated import PreGated

ROWS = (
    ("whole model", "plain", None),
    ("plain, on demand", "plain", {}),
    ("pre-gated, on demand", "gated", {"prefetch": False}),
    ("pre-gated, fetched ahead", "gated", {}),
)


def make(settings: argparse.Namespace, folder: Path) -> None:
    """The two checkpoints, of the same weights."""
    fields = {
        "hidden_size": settings.width, "intermediate_size": settings.inner, "num_hidden_layers": settings.blocks,
        "num_attention_heads": settings.width // 64, "num_key_value_heads": settings.width // 64, "vocab_size": 4096,
        "num_local_experts": settings.experts, "num_experts_per_tok": 2, "initializer_range": 0.05,
    }  # fmt: skip
    model: Any = new_model("mixtral", fields).eval()
    checkpoint.save(model, None, folder / "plain")
    checkpoint.save(PreGated()(model), None, folder / "gated")


def forget(folder: Path) -> None:
    """Put the weights out of the system's cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@torch.no_grad()
def measure(settings: argparse.Namespace, folder: Path, fields: dict[str, Any] | None) -> dict[str, Any]:
    """Tokens, seconds a token and what the store tells."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    load = ExpertStore(source="disk", **fields).load if fields is not None else checkpoint.load
    model: Any = load(folder, device=cpu)[0]
    tokens, cache, seconds = [5], None, []
    for _ in range(settings.tokens):
        if not settings.warm:
            forget(folder)
        started = time.perf_counter()
        answer = model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
        seconds.append(time.perf_counter() - started)
        cache = answer.past_key_values
        tokens.append(int(answer.logits[0, -1].argmax()))
    store = store_of(model)
    found = store.traffic.metrics() if store is not None else {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"tokens": tokens, "seconds": sum(seconds) / len(seconds), "peak": peak, **found}


def row(settings: argparse.Namespace, folder: Path, fields: dict[str, Any] | None, into: Any) -> None:
    """What a process of its own puts into the queue."""
    into.put(measure(settings, folder, fields))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, size in (("blocks", 8), ("width", 512), ("inner", 1408), ("experts", 16), ("tokens", 32)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--warm", action="store_true")
    settings = parser.parse_args()
    apart = multiprocessing.get_context("spawn")
    print("| | ms a token | wait, ms | hits | ahead | on demand | MB fetched | resident, MB | peak, MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    written = {}
    with tempfile.TemporaryDirectory() as name:
        maker = apart.Process(target=make, args=(settings, Path(name)))
        maker.start()
        maker.join()
        for label, which, fields in ROWS:
            queue = apart.Queue()
            process = apart.Process(target=row, args=(settings, Path(name) / which, fields, queue))
            process.start()
            got = queue.get()
            process.join()
            assert written.setdefault(which, got["tokens"]) == got["tokens"], "other tokens than without the store"
            counts = [got.get(f"expert_{each}", 0) for each in ("hits", "prefetched", "misses")]
            sizes = [got.get(f"expert_{each}", 0) / 2**20 for each in ("bytes_fetched", "bytes_resident")]
            wait = got.get("expert_seconds_waited", 0.0) / settings.tokens
            cells = [1000 * got["seconds"], 1000 * wait, *counts, *sizes, got["peak"]]
            print(
                f"| {label} | " + " | ".join(f"{cell:,.1f}" if cell % 1 else f"{cell:,.0f}" for cell in cells) + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
