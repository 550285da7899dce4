"""Full weights, round-to-nearest and GPTQ: held-out perplexity and bytes on disk of a small model trained here.

    python benchmarks/quantisation.py [--bits 4 3 2] [--group -1 64] [--tokens 4e6] [--width 256] [--layers 4]
        [--rows 128] [--seeds 1] [--output FOLDER]

A Llama on Python's standard library (byte-level BPE of 4096 entries, rows of 256), the same trained weights for all
cases of a seed; calibration on `--rows` rows of training documents; perplexity of test documents, a window of 256 at a
time. "linears" are the bytes of the blocks' matrices with their scales and zeros, which the rest of the file, mostly
embeddings in float32, would hide in a model this small. Everything is a recipe in `--output` (by default a temporary
folder): run again with the same folder, finished cases are not run twice.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from pretrain import engine
from pretrain.core.checkpoint import load
from pretrain.core.models.families import linears
from pretrain.recipe import check

LENGTH = 256


def recipe(settings: argparse.Namespace, cases: dict[str, dict[str, Any]], seed: int) -> dict[str, Any]:
    """Train once; then each case a surgery and its evaluation."""
    width = settings.width
    model = {
        "family": "llama", "hidden_size": width, "intermediate_size": width * 43 // 16, "tie_word_embeddings": True,
        "num_hidden_layers": settings.layers, "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": LENGTH,
    }  # fmt: skip
    stages: list[dict[str, Any]] = [
        {"name": "corpus", "stage": "data", "sources": ["stdlib"], "seed": 0},
        {"name": "tokenizer", "stage": "tokenizer", "corpus": "corpus", "vocab_size": settings.vocabulary, "seed": 0},
        {
            "name": "full", "stage": "train", "corpus": "corpus", "tokenizer": "tokenizer", "model": model,
            "length": LENGTH, "batch_rows": 8, "optimizer": {"method": "adamw", "lr": 2e-3},
            "schedule": {"method": "cosine"}, "budget": {"tokens": settings.tokens},
        },
    ]  # fmt: skip
    for name, surgery in cases.items():
        if surgery:
            stages.append(
                {
                    "name": name, "stage": "surgery", "checkpoint": "full", "corpus": "corpus", "length": LENGTH,
                    "calibration_rows": settings.rows, "surgeries": [{"method": "gptq"} | surgery],
                }
            )  # fmt: skip
        stages.append(
            {
                "name": f"{name}-test", "stage": "evaluate", "checkpoint": name, "corpus": "corpus",
                "compressors": False, "max_documents": settings.documents,
            }
        )  # fmt: skip
    return {"name": "quantisation", "seed": seed, "stages": stages}


def sizes(checkpoint: Path) -> tuple[int, int]:
    """Bytes of the weights' file, and of the blocks' matrices in it (without biases, which stay as they are)."""
    whole = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    model, _ = load(checkpoint)
    tensors = [t for layer in linears(model).values() for n, t in layer.state_dict().items() if n != "bias"]
    return whole, sum(tensor.nbytes for tensor in tensors)


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group", type=int, nargs="+", default=[-1, 64])
    parser.add_argument("--tokens", type=float, default=4e6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path)
    settings = parser.parse_args()
    cases: dict[str, dict[str, Any]] = {"full": {}}
    for bits in settings.bits:
        for group in settings.group:
            label = f"int{bits}" + (f"-g{group}" if group > 0 else "")
            for solver in ("rtn", "gptq"):
                cases[f"{solver}-{label}"] = {"bits": bits, "group_size": group, "solver": solver}
    with tempfile.TemporaryDirectory() as temporary:
        output = settings.output or Path(temporary)
        perplexity: dict[str, list[float]] = {name: [] for name in cases}
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for seed in range(settings.seeds):
            folder = output / f"seed-{seed}"
            made = check(recipe(settings, cases, seed), None, output=folder)
            stages = engine.run(made, store=output / "stages", report=False).stages
            for name, surgery in cases.items():
                perplexity[name].append(stages[f"{name}-test"]["metrics"]["perplexity"])
                seconds[name].append(stages[name]["seconds"] if surgery else 0.0)
        print("| weights | perplexity | x full | file MB | linears MB | linears x float32 | seconds |")
        print("|---|---|---|---|---|---|---|")
        whole = sizes(output / "seed-0" / "full" / "checkpoint")[1]
        for name in cases:
            file, matrices = sizes(output / "seed-0" / name / "checkpoint")
            values = perplexity[name]
            ratio = statistics.mean(a / b for a, b in zip(values, perplexity["full"], strict=True))
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            numbers = f"{ratio:.4f} | {file / 1e6:.2f} | {matrices / 1e6:.3f} | {matrices / whole:.4f}"
            took = statistics.mean(seconds[name])
            print(f"| {name} | {statistics.mean(values):.2f}{spread} | {numbers} | {took:.1f} |")


if __name__ == "__main__":
    main()
