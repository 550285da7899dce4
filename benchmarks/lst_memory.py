"""Full fine-tuning, LoRA and LST: the peak memory of a training step, and what it is made of.

    python benchmarks/lst_memory.py [--width 512] [--layers 6] [--rows 8] [--length 512] [--reduction 8] [--drop 4]

One Llama, one batch of random tokens, AdamW, the chunked cross-entropy of `causal_lm`; `--steps` steps of each case in
a fresh process. Counted in each: the bytes of parameters, of gradients, of the optimiser's states, and of all that
autograd saves between the passes (each storage once, parameters not). Measured: the peak of the process's resident
memory above what it held before the model was made; on a GPU the peak of what is allocated. The share is that of
the sum of the four. Times are of the last step and depend on what else runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from pretrain.core.hardware import pick_device
from pretrain.core.method import method_class
from pretrain.core.models.families import new_model
from pretrain.core.models.fast import accelerate
from pretrain.optim.optimizers.adamw import AdamW

VOCABULARY, MIB = 4096, 2**20
CASES = ("full", "lora", "lst")
PARTS = ("parameters", "gradients", "optimiser", "saved")


def made(settings: argparse.Namespace) -> Any:
    """The case's model."""
    width = settings.width
    fields = {
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": width * 43 // 16,
        "num_hidden_layers": settings.layers, "num_attention_heads": width // 64, "tie_word_embeddings": True,
    }  # fmt: skip
    model: Any = new_model("llama", fields)
    if settings.case == "lora":
        model = method_class("lora")(rank=8, where="all")(model)
    if settings.case == "lst":
        model = method_class("lst")(reduction=settings.reduction, drop_every=settings.drop)(model)
    return model


def resident() -> int:
    """The bytes of resident memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure(settings: argparse.Namespace) -> dict[str, float]:
    """One case, in this process."""
    importlib.import_module("peft.tuners.lora")  # what is imported is no part of a step's memory
    device, objective = pick_device(), method_class("causal_lm")()
    source = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(0, VOCABULARY, (settings.rows, settings.length), generator=source).to(device)
    batch = {
        "tokens_BL": tokens_BL, "target_BL": tokens_BL.roll(-1, 1), "document_BL": torch.ones_like(tokens_BL),
        "position_BL": torch.arange(settings.length, device=device).expand_as(tokens_BL),
    }  # fmt: skip
    before = resident()
    model = made(settings).to(device).train()
    accelerate(model)
    optimizer = AdamW().build(model.named_parameters())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[str, float] = {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    for number in range(settings.steps + 1):  # in the last what is saved is counted, which keeps some of it longer
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        start = time.perf_counter()
        if number < settings.steps:
            value = objective.loss(model, batch).value  # type: ignore[attr-defined]
        else:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                value = objective.loss(model, batch).value  # type: ignore[attr-defined]
            found["saved"] = sum(kept.values())
        value.backward()
        found["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number < settings.steps:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            found["peak"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak
            found["seconds"] = time.perf_counter() - start
    states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    found["optimiser"] = sum(v.nbytes for v in states)
    found["parameters"] = sum(p.nbytes for p in model.parameters())
    return found


def main() -> None:
    """Measure each case in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 512), ("layers", 6), ("rows", 8), ("length", 512), ("reduction", 8), ("drop", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--case", choices=CASES)
    settings = parser.parse_args()
    if settings.case:
        print(json.dumps(measure(settings)))
        return
    found = {}
    for case in CASES:
        # What is freed goes back to the system at once, so that the peak is not one of a fragmented heap.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
        command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found[case] = json.loads(done.stdout.splitlines()[-1])
    total = {case: sum(one[part] for part in PARTS) for case, one in found.items()}
    print(
        "| case | trained | parameters MiB | gradients MiB | optimiser MiB | saved MiB | sum | x full "
        "| peak MiB | x full | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for case, one in found.items():
        sizes = " | ".join(f"{one[part] / MIB:.1f}" for part in PARTS)
        shares = total[case] / total["full"], one["peak"] / found["full"]["peak"]
        print(
            f"| {case} | {one['trained']:.0f} | {sizes} | {total[case] / MIB:.1f} | {shares[0]:.3f} "
            f"| {one['peak'] / MIB:.1f} | {shares[1]:.3f} | {one['seconds']:.1f} |"
        )


if __name__ == "__main__":
    main()
