"""What is recorded of a claim: the runs of both sides, the search before them, the verdict and the regime."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.files import JSONObject, digest, read_sealed, sealed, write_json
from pretrain.core.quick.quantities import short
from pretrain.experiments.claims import Claim
from pretrain.experiments.protocol import SIDES, Search
from pretrain.experiments.sequential import EQUAL, Standing
from pretrain.experiments.trials import Outcome
from pretrain.experiments.verdict import BETTER, UNDECIDED, WORSE, share_to_reach

PROTOCOL = 2  # 1: three seeds, one tuning seed, ranges as given, bases of under one token a weight
REPRODUCED, NOT_REPRODUCED, UNDER_TRAINED = "reproduced", "not reproduced", "under-trained"
WORDS = {BETTER: REPRODUCED, WORSE: NOT_REPRODUCED, UNDECIDED: UNDECIDED, EQUAL: EQUAL}

Result = JSONObject  # what is in a result's file


def result(
    claim: Claim,
    scale: str,
    runs: Mapping[str, Sequence[Outcome]],
    search: Search,
    searched: Mapping[str, Sequence[Outcome]],
    verdict: Standing,
) -> Result:
    """The record of a claim that has come to its end."""
    from pretrain.core.hardware import describe

    finals = {side: [run["final"] for run in runs[side]] for side in SIDES}
    curves = {side: [run["curve"] for run in runs[side]] for side in SIDES}
    both = {"method": ("method", "baseline"), "baseline": ("baseline", "method")}
    reach = {
        side: share_to_reach(curves[a], curves[b], claim.better) if claim.curve is not None else None
        for side, (a, b) in both.items()
    }
    regime = runs["baseline"][0].get("regime", {})
    return {
        "name": claim.name,
        "scale": scale,
        "size": claim.size,
        "protocol": PROTOCOL,
        "claim": claim.model_dump(mode="json", exclude={"path"}),
        "word": word(verdict.word, search.edges, regime, statistics.mean(finals["baseline"]), claim.better),
        "verdict": asdict(verdict),
        "mean": {side: statistics.mean(values) for side, values in finals.items()},
        "deviation": {side: statistics.stdev(values) for side, values in finals.items()},
        "also": {
            name: {
                side: [f([run["also"][name] for run in runs[side]]) for f in (statistics.mean, statistics.stdev)]
                for side in SIDES
            }
            for name in claim.also
        },
        "regime": regime,
        "compute_to_reach": reach,
        "chosen": dict(search.chosen or {}),
        "edges": dict(search.edges),
        "tuned": searched,
        "runs": runs,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": describe(),
    }


def word(standing: str, edges: Mapping[str, bool], regime: Mapping[str, float], baseline: float, better: str) -> str:
    """A verdict needs a baseline that has learnt something, and a search that has found its best.

    `regime`: `tokens_per_weight` of the trained model and `bigram`, what counts of adjacent tokens come to in the
    metric, where they say anything.
    """
    worse = (baseline >= regime["bigram"]) if better == "lower" and "bigram" in regime else False
    if worse or regime.get("tokens_per_weight", 1.0) < 1:
        return UNDER_TRAINED
    return UNDECIDED if any(edges.values()) else WORDS[standing]


def write(result: Result, folder: Path) -> Path:
    """A file of its own for each outcome: a rerun that gives the same numbers replaces it, another stands beside it."""
    mark = digest([result["claim"], [[run["final"] for run in runs] for runs in result["runs"].values()]])[:8]
    size = f"-{result['size']}" if result["size"] else ""
    path = folder / f"{result['name']}-{result['scale']}{size}-{mark}.json"
    write_json(path, sealed(result))
    return path


def recorded(*folders: Path | str) -> list[Result]:
    """All results recorded in the folders, oldest first."""
    paths = [path for folder in folders for path in Path(folder).glob("*.json")]
    return sorted(map(read_sealed, paths), key=lambda result: result["finished"])


def check_budgets(claim: Claim, scale: str, runs: Mapping[str, Sequence[Outcome]], within: float = 0.01) -> None:
    """Both sides of a pair must have spent the same FLOPs to 1%; at smoke scale a step is more than that."""
    if claim.equal != "flops" or scale == "smoke":
        return
    for seed, (a, b) in enumerate(zip(runs["baseline"], runs["method"], strict=True)):
        if abs(a["flops"] - b["flops"]) > within * max(a["flops"], b["flops"]):
            spent = " FLOPs against ".join(short(side["flops"], digits=4) for side in (a, b))
            raise PretrainError(
                f"claim {claim.label!r}, seed {seed}: {spent}; accepted: equal to {within:.0%}: a smaller step "
                "or a larger budget"
            )
