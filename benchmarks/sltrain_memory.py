"""Full rank, low rank and SLTrain: bytes of parameters, gradients and optimiser states, and the time of a step.

    python benchmarks/sltrain_memory.py [--width 256] [--layers 4] [--rank 0.25] [--delta 0.03] [--steps 12]

One Llama, one batch of random tokens, AdamW; the three step in turn in one process, and the time is the median of the
paired ratios. The bytes are counted on the tensors that are there and checked against the paper's formula: an O × I
matrix of rank r and density delta has (O + I) r + ⌊delta · OI⌋ numbers instead of OI, as many again in gradients and
twice as many in AdamW's moments; the places of the sparse part take 4 bytes each. The matrices of "low rank" are never
made: x Aᵀ Bᵀ. On a GPU the peak of a step is shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from pretrain.core.hardware import pick_device
from pretrain.core.models.families import linears, new_model
from pretrain.optim.optimizers.adamw import AdamW
from pretrain.surgery.architecture.sltrain import SLTrain

ROWS, LENGTH, VOCABULARY = 8, 256, 4096
MIB = 2**20


class Case:
    """A model, its optimiser, and what was measured of them."""

    def __init__(self, settings: argparse.Namespace, delta: float | None, device: torch.device) -> None:
        width = settings.width
        fields = {
            "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": width * 43 // 16,
            "num_hidden_layers": settings.layers, "num_attention_heads": width // 64, "tie_word_embeddings": True,
        }  # fmt: skip
        model: Any = new_model("llama", fields)
        shapes = [layer.weight.shape for layer in linears(model).values()]
        rest = model.num_parameters() - sum(o * i for o, i in shapes)
        if delta is not None:
            model = SLTrain(settings.rank, delta)(model)
        layers = [layer for layer in linears(model).values() if delta is not None]
        rank = layers[0].A.shape[0] if layers else 0
        self.indices = sum(layer.indices.nbytes for layer in layers)
        self.places = sum(int((delta or 0) * o * i) for o, i in shapes)
        self.formula = rest + sum(o * i if delta is None else (o + i) * rank + int(delta * o * i) for o, i in shapes)
        self.model = model.to(device).train()
        self.optimizer = AdamW().build(self.model.named_parameters())
        self.bytes: dict[str, int] = {}

    def step(self, ids_BL: torch.Tensor) -> float:
        """Seconds of one step."""
        synchronise(ids_BL.device)
        start = time.perf_counter()
        self.model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss.backward()
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.requires_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronise(ids_BL.device)
        seconds = time.perf_counter() - start
        states = [v for state in self.optimizer.state.values() for k, v in state.items() if k.startswith("exp_avg")]
        self.bytes = {
            "parameters": sum(p.nbytes for p in self.model.parameters()),
            "gradients": gradients,
            "optimiser": sum(v.nbytes for v in states),
            "indices": self.indices,
        }
        return seconds

    def check(self, name: str) -> None:
        """The bytes that are there against those of the formula, in float32."""
        wanted = {
            "parameters": 4 * self.formula, "gradients": 4 * self.formula, "optimiser": 8 * self.formula,
            "indices": 4 * self.places,
        }  # fmt: skip
        if self.bytes != wanted:
            raise SystemExit(f"{name}: counted {self.bytes}, the formula says {wanted}")


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=float, default=0.25)
    parser.add_argument("--delta", type=float, default=0.03)
    parser.add_argument("--steps", type=int, default=12)
    settings = parser.parse_args()
    device = pick_device()
    ids_BL = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    cases = {
        "full rank": Case(settings, None, device),
        "low rank": Case(settings, 0.0, device),
        "SLTrain": Case(settings, settings.delta, device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    peaks: dict[str, int] = {}
    for number in range(settings.steps + 3):
        for name, case in cases.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            spent = case.step(ids_BL)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated(device) - before
            if number >= 3:
                seconds[name].append(spent)
    print("| what | parameters MiB | gradients MiB | optimiser MiB | indices MiB | sum x full | ms a step | x full |")
    print("|---|---|---|---|---|---|---|---|")
    whole = sum(cases["full rank"].bytes.values())
    for name, case in cases.items():
        case.check(name)
        sizes = " | ".join(f"{value / MIB:.2f}" for value in case.bytes.values())
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["full rank"], strict=True))
        share = sum(case.bytes.values()) / whole
        print(f"| {name} | {sizes} | {share:.3f} | {1e3 * statistics.median(seconds[name]):.1f} | {ratio:.3f} |")
    for name, peak in peaks.items():
        print(f"{name}: {peak / MIB:.1f} MiB more at the peak of a step than before it")
    print("All bytes are those of the formula.")


if __name__ == "__main__":
    main()
