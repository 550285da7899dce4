"""Training speed: the `transformers` Trainer, a bare PyTorch loop and our loop, plain and compiled, on the same tokens.

    python benchmarks/training_speed.py [--rounds 3]

Each runs in a process of its own, in turn, several rounds; a row is the median of the steps after the warm-up over all
rounds. Model: Llama, 4 layers, width 256, 4 heads, feed-forward 688, vocabulary 4096, tied; batches of 8 × 256 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROWS, LENGTH, VOCABULARY, WARMUP, STEPS = 8, 256, 4096, 4, 12
MODEL = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip


def data() -> Any:
    """The same random tokens for all."""
    import torch

    return torch.randint(0, VOCABULARY, (WARMUP + STEPS, ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def model() -> Any:
    """The same random weights for all."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**MODEL))


def trainer(clock: list[float]) -> None:
    """`transformers.Trainer` with its defaults but for the batch, AdamW and no saving."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.append(time.perf_counter())

    rows = [{"input_ids": row, "labels": row} for row in data().flatten(0, 1)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=ROWS, max_steps=WARMUP + STEPS, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, learning_rate=1e-3, use_cpu=True,
        )  # fmt: skip
        Trainer(model(), arguments, train_dataset=rows, callbacks=[Clock()]).train()


def bare(clock: list[float]) -> None:
    """The loop that one writes by hand."""
    import torch

    net = model().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for batch_BL in data():
        net(input_ids=batch_BL, labels=batch_BL).loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.append(time.perf_counter())


class Rows:
    """What the loop asks of a loader, over fixed tokens, one document a row."""

    def __init__(self, objective: Any, clock: list[float]) -> None:
        self.objective, self.clock, self.tokens = objective, clock, data().numpy()

    def step(self, step: int, progress: float) -> list[list[Any]]:
        """One micro-batch."""
        import numpy as np
        import torch

        from pretrain.core.batch import Context, Row, Vocabulary

        if step:
            self.clock.append(time.perf_counter())
        start, none = np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int64)
        rows = [Row(row.astype(np.int32), start, none, 0, i) for i, row in enumerate(self.tokens[step])]
        context = Context(Vocabulary(VOCABULARY, 0), LENGTH, np.random.default_rng(0), progress)
        return [[self.objective.prepare(rows, context) | {"tokens": torch.tensor(ROWS * LENGTH)}]]

    def state(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}


def ours(clock: list[float], *, compiled: bool = False) -> None:
    """The whole of our loop, with its log, TensorBoard, clipping and meter; without saving, as the others."""
    from pretrain.objectives.language.causal_lm import CausalLM
    from pretrain.optim.optimizers.adamw import AdamW
    from pretrain.optim.schedules.constant import Constant
    from pretrain.training.budget import Budget
    from pretrain.training.loop import Settings, train

    settings = Settings(budget=Budget(steps=WARMUP + STEPS), save_every=0, bar=False, compile=compiled)
    objective = CausalLM()
    with tempfile.TemporaryDirectory() as folder:
        train(model(), Rows(objective, clock), [objective], AdamW(), Constant(), settings, Path(folder))
        clock.append(time.perf_counter())


LOOPS = {"trainer": trainer, "bare": bare, "ours": ours, "ours_compiled": partial(ours, compiled=True)}


def measure(which: str) -> dict[str, Any]:
    """Run one of the loops here."""
    import resource

    import torch

    from pretrain.core.hardware import matrix_rate

    clock: list[float] = []
    LOOPS[which](clock)
    seconds = [b - a for a, b in zip(clock[WARMUP - 1 :], clock[WARMUP:])]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mib": peak, "rate": matrix_rate(torch.device("cpu"))}


def step_flops() -> float:
    """Forward and backward of one step: 6 a weight and token, and causal attention at half its square."""
    width, layers = 256, 4
    weights = layers * (4 * width**2 + 3 * width * 688) + VOCABULARY * width
    return ROWS * LENGTH * (6 * weights + 6 * layers * LENGTH * width)


def main() -> None:
    """Run all in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=LOOPS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    results: dict[str, list[dict[str, Any]]] = {which: [] for which in LOOPS}
    for _ in range(arguments.rounds):
        for which, runs in results.items():
            command = [sys.executable, __file__, "--one", which]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    rate = statistics.median(run["rate"] for runs in results.values() for run in runs)
    speeds = {w: [ROWS * LENGTH / s for run in runs for s in run["seconds"]] for w, runs in results.items()}
    medians = {which: statistics.median(values) for which, values in speeds.items()}
    limit = rate / step_flops() * ROWS * LENGTH
    print(f"float32 matrix rate {rate / 1e9:.0f} GFLOP/s, which allows {limit:,.0f} tokens/s\n")
    print("| loop | tokens/s (median) | min | max | x Trainer | x bare | of the limit | peak MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for which, values in speeds.items():
        peak = statistics.median(run["peak_mib"] for run in results[which])
        ratios = f"{medians[which] / medians['trainer']:.2f} | {medians[which] / medians['bare']:.2f}"
        print(
            f"| {which} | {medians[which]:,.0f} | {min(values):,.0f} | {max(values):,.0f} | {ratios} "
            f"| {medians[which] / limit:.0%} | {peak:,.0f} |"
        )


if __name__ == "__main__":
    main()
