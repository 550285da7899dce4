"""Whether a ladder's law holds eight times beyond its largest rung.

    python benchmarks/ladder.py [--flops 9.6e12] [--seeds 0]

Climbs the ladder of a model of Python's standard library (`pretrain ladder`: runs of a 64th, a 24th and an eighth of
the budget), fits the law to these runs alone, lets the dial choose a model for the whole budget by it, trains that
model and compares the bits per byte of held-out text with what the law had said of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from pretrain import engine
from pretrain.core.files import write_json
from pretrain.core.hardware import describe
from pretrain.experiments.ladder import LAW, climb, summary
from pretrain.recipe import Recipe, check

ROOT = Path(__file__).parent.parent


def recipe(flops: float, output: Path, seed: int = 0, model: Mapping[str, object] | None = None) -> Recipe:
    """A model of `flops` of the standard library, sized by the dial, judged by whole validation documents."""
    corpus = {"name": "corpus", "stage": "data", "sources": ["stdlib"], "validation": 0.1, "test": 0.3}
    tokenizer = {"name": "tokenizer", "stage": "tokenizer", "corpus": "corpus", "vocab_size": "auto"}
    train: dict[str, object] = {
        "name": "model", "stage": "train", "corpus": "corpus", "tokenizer": "tokenizer", "size": "auto",
        "model": {"family": "llama"}, "budget": {"flops": flops}, "evaluate_tokens": 300_000, "save_every": 0,
    }  # fmt: skip
    return check({"name": "ladder", "seed": seed, "stages": [corpus, tokenizer, train | (model or {})]}, output=output)


def main() -> None:
    """Climb, predict, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", type=float, default=9.6e12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "ladder-check")
    given = parser.parse_args()
    law, settled = climb(recipe(given.flops, given.output))
    print(*summary(law, settled.choice), *settled.lines(), sep="\n", flush=True)
    said, sized = settled.choice.prediction, {"size": {"law": str(given.output / "ladder" / LAW)}}
    assert said is not None, "eight times the largest rung is within what a law is asked"
    rows = []
    for seed in given.seeds:
        chosen = recipe(given.flops, given.output / f"run-{seed}", seed, sized)
        result = engine.run(chosen, store=given.output / "stages", report=False, say=engine.silent)
        bits = result.stages["model"]["metrics"]["bits_per_byte"]
        rows.append({"seed": seed, "bits": bits, "off": said.bits / bits - 1, "flops": result.stages["model"]["flops"]})
        print(
            f"seed {seed}: {bits:.4f} bits per byte, predicted {said.bits:.4f} ({said.bits / bits - 1:+.2%})",
            flush=True,
        )
    print(f"{rows[0]['flops'] / law.largest:.2f} times the largest rung")
    found = {"predicted": vars(said), "runs": rows, "largest": law.largest, "environment": describe()}
    write_json(given.output / "check.json", json.loads(json.dumps(found)))


if __name__ == "__main__":
    main()
