"""Surgeries on one checkpoint: the peak of memory beside what the dry run says, each in a fresh process.

    python benchmarks/surgery_memory.py [--width 576] [--layers 30] [--vocabulary 49152] [--rows 32] [--length 512]
                                        [--only awq,gptq]

A random Llama of the shape of SmolLM2-135M by default, random rows for those that calibrate. Measured: the peak of the
process's resident memory. Expected: `memory` of `pretrain run --dry-run` for a stage with that surgery alone.
`above` is the peak less what the process held with the model loaded, in multiples of the model's float32 weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from pretrain.core import checkpoint
from pretrain.core.files import read_json
from pretrain.core.method import method_class
from pretrain.core.models.families import new_model
from pretrain.stages._estimates import Left
from pretrain.stages._expected import operation
from pretrain.surgery import Inputs

CASES: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4}, "awq": {"ratios": 5}, "smooth_quant": {}, "w8a8": {}, "sparse_llm": {"epochs": 2},
    "lora": {"rank": 8}, "lst": {"reduction": 8}, "g_stack": {"growth": 2},
}  # fmt: skip
CALIBRATES = {"gptq", "awq", "smooth_quant", "sparse_llm", "lst"}
MIB = 2**20


def text(settings: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Batches of eight random rows."""
    source, made = torch.Generator().manual_seed(0), []
    for start in range(0, settings.rows, 8):
        size = (min(8, settings.rows - start), settings.length)
        ids_BL = torch.randint(3, settings.vocabulary, size, generator=source)
        positions = torch.arange(settings.length).expand(size)
        made.append({"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL), "position_ids": positions})
    return made


def resident() -> int:
    """The bytes of resident memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most there were."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(settings: argparse.Namespace) -> None:
    """One case, in this process."""
    name = settings.case
    method: Any = method_class(name, "surgery")(**CASES[name])
    model, tokenizer = checkpoint.load(settings.folder)
    before = resident()
    batches = text(settings) if name in CALIBRATES else []
    method(model, Inputs(tokenizer=tokenizer, batches=batches))
    left = Left(config=read_json(Path(settings.folder) / "config.json"), vocabulary=settings.vocabulary)
    estimate = operation({"checkpoint": left}, [method], settings.rows if batches else 0, settings.length)
    print(json.dumps({"before": before, "peak": peak(), "expected": estimate.memory_bytes}))


def main() -> None:
    """Each case after the other, and a table."""
    parser = argparse.ArgumentParser()
    for name, default in (("width", 576), ("layers", 30), ("vocabulary", 49152), ("rows", 32), ("length", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="")
    parser.add_argument("--case", default="")
    parser.add_argument("--folder", default="")
    settings = parser.parse_args()
    if settings.case:
        return measure(settings)
    fields = {
        "vocab_size": settings.vocabulary, "hidden_size": settings.width, "intermediate_size": settings.width * 8 // 3,
        "num_hidden_layers": settings.layers, "num_attention_heads": settings.width // 64,
        "num_key_value_heads": settings.width // 192, "tie_word_embeddings": True,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = new_model("llama", fields)
        weights = 4 * model.num_parameters()
        checkpoint.save(model, None, Path(folder))
        del model
        print(f"weights {weights / MIB:,.0f} MiB")
        print("| surgery | peak, MiB | expected, MiB | expected / peak | above |\n|---|--:|--:|--:|--:|", flush=True)
        for name in settings.only.split(",") if settings.only else CASES:
            command = [sys.executable, __file__, *sys.argv[1:], "--case", name, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"| {name} | failed: {done.stderr.strip().splitlines()[-1]} |")
                continue
            measured = json.loads(done.stdout.strip().splitlines()[-1])
            ratio, above = measured["expected"] / measured["peak"], (measured["peak"] - measured["before"]) / weights
            sizes = f"{measured['peak'] / MIB:,.0f} | {measured['expected'] / MIB:,.0f}"
            print(f"| {name} | {sizes} | {ratio:.2f} | {above:.2f} |", flush=True)


if __name__ == "__main__":
    main()
