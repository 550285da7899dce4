"""What each of the dial's defaults is worth, and what could stand beside them: one change at a time, equal FLOPs.

    python benchmarks/defaults.py [--flops 1.2e12] [--lr 0.015] [--ratio 2] [--beta2 0.999] [--seeds 0] [--only NAME …]

A Llama of width 48 × 2 blocks and 4,096 entries, about what the dial takes for minutes of a core, on Python's standard
library; bits per byte of its validation documents. `--lr` is Muon's rate for matrices; embeddings and head have
`--ratio` times that.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain import engine
from pretrain.core.files import write_json
from pretrain.core.hardware import describe
from pretrain.dial.choose import policies_for
from pretrain.recipe import Raw, check

ROOT = Path(__file__).parent.parent
ZERO = {"method": "zero_init"}
SHORT = policies_for("causal_lm", 256)
FRUGAL = [
    ZERO, {"method": "polycom", "activation": "polynorm"}, "value_embeddings", "input_skip",
    {"method": "logit_softcap", "cap": 15},
]  # fmt: skip


def changes(lr: float, ratio: float, beta2: float) -> dict[str, Raw]:
    """What differs from the dial's choice without its short rows, by name."""
    muon = {"method": "muon", "lr": lr, "adamw_lr": ratio * lr, "beta2": beta2}
    beside = {
        "polycom": {"activation": "polynorm"}, "value_embeddings": {}, "input_skip": {}, "value_residual": {},
        "logit_softcap": {"cap": 15}, "qk_norm": {},
    }  # fmt: skip
    return {
        "rows of full length": {"optimizer": muon},
        "without zero_init": {"optimizer": muon, "surgeries": []},
        "beta2 0.95": {"optimizer": muon | {"beta2": 0.95}},
        "beta2 0.997": {"optimizer": muon | {"beta2": 0.997}},
        "embeddings at the matrices' rate": {"optimizer": muon | {"adamw_lr": lr}},
        **{name: {"optimizer": muon, "surgeries": [ZERO, {"method": name, **f}]} for name, f in beside.items()},
        "relu2": {"optimizer": muon, "surgeries": [{"method": "relu2"}, ZERO]},
        "the dial: short rows first": {"optimizer": muon, "policies": SHORT},
        "the frugal recipe": {"optimizer": muon, "policies": SHORT, "surgeries": FRUGAL},
    }  # fmt: skip


def recipe(change: Raw, flops: float, seed: int) -> Raw:
    """One run."""
    corpus = {"name": "corpus", "stage": "data", "sources": ["stdlib"], "validation": 0.08, "test": 0.08}
    tokenizer = {"name": "tokenizer", "stage": "tokenizer", "corpus": "corpus", "vocab_size": 4096}
    train = {
        "name": "model", "stage": "train", "corpus": "corpus", "tokenizer": "tokenizer", "size": "auto",
        "model": {"family": "llama", "hidden_size": 48}, "budget": {"flops": flops}, "save_every": 0,
        "policies": [],
    }  # fmt: skip
    held_out = {"method": "held_out", "length": 256, "stride": 256}
    judged = {
        "name": "evaluation", "stage": "evaluate", "checkpoint": "model", "corpus": "corpus", "split": "validation",
        "evaluations": [held_out], "compressors": False,
    }  # fmt: skip
    return {"name": "defaults", "seed": seed, "stages": [corpus, tokenizer, train | change, judged]}


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", type=float, default=1.2e12)
    parser.add_argument("--lr", type=float, default=0.015)
    parser.add_argument("--ratio", type=float, default=2.0)
    parser.add_argument("--beta2", type=float, default=0.999)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "defaults")
    given = parser.parse_args()
    rows = []
    for name, change in changes(given.lr, given.ratio, given.beta2).items():
        for seed in given.seeds if given.only is None or name in given.only else []:
            made = check(recipe(change, given.flops, seed), output=given.output / f"{name}-{given.flops:.2g}-{seed}")
            result = engine.run(made, store=given.output / "stages", report=False, say=engine.silent)
            bits = result.stages["evaluation"]["metrics"]["bits_per_byte"]
            rows.append({"change": name, "seed": seed, "bits": bits, "flops": result.stages["model"]["flops"]})
            print(f"{name}, seed {seed}: {bits:.4f}", flush=True)
    write_json(given.output / "defaults.json", {"rows": rows, "environment": describe()})


if __name__ == "__main__":
    main()
