"""A code classifier and its 3 MB student: bytes on disk, latency, and what the genetic algorithm is worth.

    python benchmarks/compressor.py [--target 3e6] [--width 256] [--layers 4] [--vocabulary 4096] [--tokens 2e6]
        [--distil 2e6] [--random 3] [--length 256] [--seeds 1] [--output FOLDER]

The task is made of Python's standard library, without any labelling by hand: does a function of a module that has it
return a value (`return` with an expression)? The return statements are cut out of what the model reads. A BERT of
`--width` is pretrained by masked tokens and fine-tuned; its students of at most `--target` bytes, the genetic
algorithm's and `--random` ones drawn from the architectures of the same size (90% to 100% of the target), are
distilled on documents whose labels they never see (temperature 10) with equal tokens. Latency is the median over
`--repeats` inputs of `--length` tokens, one at a time, on one thread. Everything is a recipe in `--output` (by default
a temporary folder): run again with the same folder, finished cases are not run twice.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pretrain import engine
from pretrain.core.checkpoint import load
from pretrain.core.models.heads import labels_of
from pretrain.corpus.sources import PythonStdlib, read
from pretrain.recipe import check
from pretrain.surgery._architecture import GENES, Shape, flops, shape_of, size
from pretrain.surgery.compression.compressor import Compressor, fits


def functions(folder: Path, most: int) -> Path:
    """A file of functions, without their returns, labelled by whether they return a value; both labels alike often."""
    rows: dict[str, list[str]] = {"value": [], "nothing": []}
    for document in read(PythonStdlib()):
        try:
            tree = ast.parse(document["text"])
        except (SyntaxError, ValueError):
            continue
        lines = document["text"].splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and 3 <= node.end_lineno - node.lineno <= 60:
                returns = [n for n in ast.walk(node) if isinstance(n, ast.Return)]
                cut = {i for n in returns for i in range(n.lineno, n.end_lineno + 1)}
                text = "\n".join(lines[i - 1] for i in range(node.lineno, node.end_lineno + 1) if i not in cut)
                rows["value" if any(n.value is not None for n in returns) else "nothing"].append(text)
    rng, count = random.Random(0), min(most // 2, *map(len, rows.values()))
    chosen = [{"text": t, "label": label} for label, texts in rows.items() for t in rng.sample(texts, count)]
    rng.shuffle(chosen)
    path = folder / "functions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, chosen)), encoding="utf-8")
    return path


def teacher(settings: argparse.Namespace, data: Path, seed: int) -> list[dict[str, Any]]:
    """The corpus, and the large model, pretrained and fine-tuned."""
    width = settings.width
    model = {
        "family": "bert", "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": settings.layers,
        "num_attention_heads": max(1, width // 64), "max_position_embeddings": settings.length,
    }  # fmt: skip
    shared = {"stage": "train", "corpus": "corpus", "length": settings.length, "batch_rows": 16, "micro_rows": 8}
    return [
        {"name": "corpus", "stage": "data", "sources": [{"files": str(data)}], "validation": 0.05, "test": 0.15},
        {"name": "tokenizer", "stage": "tokenizer", "corpus": "corpus", "vocab_size": settings.vocabulary, "mask": True,
         "cls": True},
        shared | {"name": "pretrained", "tokenizer": "tokenizer", "model": model, "objective": "masked_lm",
                  "optimizer": {"method": "adamw", "lr": 5e-4}, "budget": {"tokens": settings.tokens}},
        shared | {"name": "teacher", "init": "pretrained", "objective": "classification",
                  "optimizer": {"method": "adamw", "lr": 5e-5}, "budget": {"tokens": settings.tokens}},
        {"name": "teacher-test", "stage": "evaluate", "checkpoint": "teacher", "corpus": "corpus", "compressors": False,
         "evaluations": [{"method": "task", "objective": "classification"}]},
    ]  # fmt: skip


def student(settings: argparse.Namespace, name: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """A student of an architecture in the space of `fields`, distilled and tested."""
    compressor = {"method": "compressor", "target_bytes": settings.target} | fields
    objective = {"method": "well_read_students", "teacher": "teacher", "temperature": 10.0, "label": None}
    return [
        {"name": f"{name}-new", "stage": "surgery", "checkpoint": "teacher", "corpus": "corpus",
         "length": settings.length, "calibration_rows": settings.rows, "surgeries": [compressor]},
        {"name": name, "stage": "train", "corpus": "corpus", "init": f"{name}-new", "length": settings.length,
         "batch_rows": 16, "micro_rows": 8, "objective": objective, "optimizer": {"method": "adamw", "lr": settings.lr},
         "budget": {"tokens": settings.distil}},
        {"name": f"{name}-test", "stage": "evaluate", "checkpoint": name, "corpus": "corpus", "compressors": False,
         "evaluations": [{"method": "task", "objective": "classification"}]},
    ]  # fmt: skip


def drawn(shape: Shape, settings: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Random architectures of 90% to 100% of the target, each as a space of one."""
    method, rng = Compressor(), random.Random(seed)
    found: list[dict[str, Any]] = []
    while len(found) < settings.random:
        genes = {name: rng.choice(getattr(method, name)) for name in GENES}
        made = shape.changed(genes)
        if fits(made, settings.target) and size(made) > 0.9 * settings.target:
            found.append({name: [value] for name, value in genes.items()})
    return found


@torch.no_grad()
def latency(folder: Path, settings: argparse.Namespace) -> float:
    """Milliseconds of a forward pass of one input."""
    model, _ = load(folder)
    took = []
    for number in range(settings.repeats + 3):
        ids = torch.randint(0, model.config.vocab_size, (1, settings.length))
        started = time.perf_counter()
        model(ids)
        took.append((time.perf_counter() - started) * 1e3 if number > 2 else 0.0)
    return statistics.median(took[3:])


def row(name: str, folder: Path, tested: dict[str, Any], settings: argparse.Namespace) -> dict[str, Any]:
    """What the table says of a model."""
    model, _ = load(folder)
    shape = shape_of(model.config, len(labels_of(model)))
    genes = " ".join(f"{getattr(shape, name)}" for name in ("layers", "width", "heads", "feed_forward", "vocabulary"))
    return {
        "name": name, "genes": genes, "bytes": size(shape),
        "file": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "gflops": flops(shape, settings.length) / 1e9, "ms": latency(folder, settings),
        "accuracy": tested["metrics"]["accuracy"],
    }  # fmt: skip


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=3e6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=float, default=2e6)
    parser.add_argument("--distil", type=float, default=2e6)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--random", type=int, default=3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        output = settings.output or Path(temporary)
        data = functions(output, settings.documents)
        for seed in range(settings.seeds):
            folder, stages = output / f"seed-{seed}", teacher(settings, data, seed)
            engine.run(check({"name": "compressor", "seed": seed, "stages": stages}, None, output=folder), report=False)
            model, _ = load(folder / "teacher" / "checkpoint")
            cases = {"ga": {}} | {
                f"random-{number}": fields
                for number, fields in enumerate(drawn(shape_of(model.config, 2), settings, seed))
            }
            for name, fields in cases.items():
                stages += student(settings, name, fields)
            recipe = check({"name": "compressor", "seed": seed, "stages": stages}, None, output=folder)
            done = engine.run(recipe, report=False).stages
            rows += [
                row(name, folder / name / "checkpoint", done[f"{name}-test"], settings) for name in ("teacher", *cases)
            ]
    print("| model | layers width heads ffn vocabulary | computed MB | file MB | GFLOPs | ms | x faster | accuracy |")
    print("|---|---|---|---|---|---|---|---|")
    slow = 0.0
    for one in rows:
        slow = one["ms"] if one["name"] == "teacher" else slow
        numbers = f"{one['bytes'] / 1e6:.3f} | {one['file'] / 1e6:.3f} | {one['gflops']:.4f} | {one['ms']:.2f}"
        print(f"| {one['name']} | {one['genes']} | {numbers} | {slow / one['ms']:.2f} | {one['accuracy']:.4f} |")


if __name__ == "__main__":
    main()
