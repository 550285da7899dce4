"""Whether the best rate at one width is the best at others, by the dial's rule.

    python benchmarks/transfer.py [--widths 64 128 256] [--factors 0.125 0.25 0.5 1 2] [--tokens 40000]

Trains the dial's own model at each width on as many tokens, with the dial's rate times each factor, and says where
the lowest held-out loss lies: at the vertex of the parabola through the best factor and its neighbours, over the
logarithm. The rule transfers where that moves by less than two from the narrowest to the widest.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from pretrain import engine
from pretrain.core.files import write_json
from pretrain.core.hardware import describe
from pretrain.recipe import Raw, check

ROOT = Path(__file__).parent.parent


def raw(width: int, seed: int, tokens: float) -> Raw:
    """The dial's model of a width, of the standard library."""
    corpus = {"name": "corpus", "stage": "data", "sources": ["stdlib"], "validation": 0.12, "test": 0.0}
    tokenizer = {"name": "tokenizer", "stage": "tokenizer", "corpus": "corpus", "vocab_size": 512}
    train = {
        "name": "model", "stage": "train", "corpus": "corpus", "tokenizer": "tokenizer", "size": "auto",
        "model": {"family": "llama", "hidden_size": width}, "budget": {"tokens": tokens},
        "evaluate_tokens": 100_000, "save_every": 0,
    }  # fmt: skip
    return {"name": "transfer", "seed": seed, "stages": [corpus, tokenizer, train]}


def loss(made: Raw, factor: float, output: Path) -> tuple[float, float]:
    """The rate at a factor of the dial's, and the held-out loss in bits per byte that it ends at."""
    given = check(made, output=output).sizes[0].optimizer
    assert isinstance(given, dict), "the dial has rates for its own optimiser"
    rates = {name: rate * factor for name, rate in given.items() if name in ("lr", "adamw_lr")}
    made["stages"][2]["optimizer"] = given | rates
    result = engine.run(check(made, output=output), store=output.parent / "stages", report=False, say=engine.silent)
    return rates["lr"], float(result.stages["model"]["metrics"]["bits_per_byte"])


def vertex(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at the bottom of the parabola through the lowest of the losses and those beside it."""
    lowest = min(max(1, losses.index(min(losses))), len(losses) - 2)
    (a, b, c), (x, y, z) = (map(float, losses[lowest - 1 : lowest + 2]), map(math.log, rates[lowest - 1 : lowest + 2]))
    step = (z - x) / 2
    bend = a - 2 * b + c
    return (
        math.exp(y + max(-step, min(step, step * (a - c) / (2 * bend))))
        if bend > 0
        else rates[losses.index(min(losses))]
    )


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--factors", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1.0, 2.0])
    parser.add_argument("--tokens", type=float, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "transfer")
    given = parser.parse_args()
    rows = []
    for width in given.widths:
        tried = []
        for factor in sorted(given.factors):
            made = raw(width, given.seed, given.tokens)
            tried.append(loss(made, factor, given.output / f"{width}-{factor:g}"))
            print(f"width {width}, rate {tried[-1][0]:.3g} ({factor:g}): {tried[-1][1]:.4f}", flush=True)
        rates, losses = zip(*tried, strict=True)
        dial = rates[0] / min(given.factors)
        rows.append(
            {"width": width, "dial": dial, "best": vertex(rates, losses) / dial, "rates": rates, "bits": losses}
        )
        print(f"width {width}: best at {rows[-1]['best']:.2f} times the dial's {dial:.3g}", flush=True)
    best = [row["best"] for row in rows]
    print(f"the best factor moves by {max(best) / min(best):.2f}")
    write_json(given.output / "transfer.json", {"rows": rows, "environment": describe()})


if __name__ == "__main__":
    main()
