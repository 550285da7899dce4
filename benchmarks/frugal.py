"""How many FLOPs `recipes/frugal.yaml` takes to reach the end of `recipes/baseline.yaml`.

    python benchmarks/frugal.py [--seeds 10 11 12] [--shares 0.5 0.85] [--flops 1e12] [--jobs 2]

Both are sized by the dial, each for its own budget, and had their rates chosen on Python's standard library with seeds
0 and 1; here they run on other text, the modules of installed packages, with other seeds. The baseline gets the whole
budget, the frugal recipe each share of it, with a whole schedule each time. Where its bits per byte of test documents
cross the baseline's, in a straight line over the logarithm of the FLOPs, is the ratio of a seed. Beside it stands what
the baseline is worth: its tokens a weight and the bigram line. Writes `docs/frugal.json` and `docs/images/frugal.svg`.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pretrain.core.files import write_json, write_text
from pretrain.core.hardware import describe
from pretrain.experiments.drawing import draw
from pretrain.experiments.trials import Trial, run_all
from pretrain.experiments.verdict import CONFIDENCE, interval
from pretrain.recipe import load

ROOT = Path(__file__).parent.parent
SOURCES = "corpus.sources=[{packages: [sklearn, networkx, sympy], limit: 250}]"


def trial(name: str, seed: int, flops: float, output: Path) -> Trial:
    """One run of a recipe on the other corpus."""
    recipe = load(ROOT / "recipes" / f"{name}.yaml", [SOURCES, f"seed={seed}", f"model.budget={{flops: {flops}}}"])
    label = f"{name}-{seed}-{flops:.3g}"
    return Trial(
        label, recipe.raw, str(output / label), str(output / "stages"), "model", "flops", flops,
        "evaluation.bits_per_byte", "bits_per_byte",
    )  # fmt: skip


def crossing(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """The FLOPs at which losses at several budgets reach `target`, between two budgets; None where they do not."""
    for (f0, l0), (f1, l1) in pairwise(points):
        if l0 >= target >= l1:
            return f0 * math.exp(math.log(f1 / f0) * (l0 - target) / (l0 - l1 or 1.0))
    return None


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.85])
    parser.add_argument("--flops", type=float, default=1e12)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "frugal")
    given = parser.parse_args()
    queue = [("baseline", seed, 1.0) for seed in given.seeds]
    queue += [("frugal", seed, share) for seed in given.seeds for share in sorted(given.shares)]
    trials = [trial(name, seed, share * given.flops, given.output) for name, seed, share in queue]
    outcomes = dict(zip(queue, run_all(trials, jobs=given.jobs), strict=True))

    rows: list[dict[str, Any]] = []
    for seed in given.seeds:
        end = outcomes["baseline", seed, 1.0]
        tried = [outcomes["frugal", seed, share] for share in sorted(given.shares)]
        flops = crossing([(run["flops"], run["final"]) for run in tried], end["final"])
        losses = {f"{share:g}": run["final"] for share, run in zip(sorted(given.shares), tried, strict=True)}
        ratio = flops and flops / end["flops"]
        rows.append({"seed": seed, "baseline": end["final"], **end["regime"], "frugal": losses, "ratio": ratio})
        print(rows[-1])
    ratios = [row["ratio"] for row in rows]
    if None in ratios:
        raise SystemExit("a ratio lies outside of the shares that were tried; accepted: more --shares")
    low, high = interval(ratios)
    print(f"FLOPs of the baseline's that are enough: {statistics.mean(ratios):.3f} ({low:.3f} to {high:.3f})")
    found = {"ratio": statistics.mean(ratios), "low": low, "high": high, "confidence": CONFIDENCE, "seeds": rows}
    write_json(ROOT / "docs" / "frugal.json", found | {"flops": given.flops, "environment": describe()})
    shown = min((s for s in given.shares if s >= max(ratios)), default=max(given.shares))
    curves = {
        "AdamW, sized": [outcomes["baseline", seed, 1.0]["curve"] for seed in given.seeds],
        f"frugal, {shown:.0%} of the FLOPs": [outcomes["frugal", seed, shown]["curve"] for seed in given.seeds],
    }
    write_text(ROOT / "docs" / "images" / "frugal.svg", draw(curves, "bits_per_byte"))


if __name__ == "__main__":
    main()
