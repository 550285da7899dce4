"""The table of claims: made from the recorded results and from nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

HEAD = """# Claims

What each paper says, and what came out here at equal compute: the same data, the same seeds, the same number of
learning rates tried for both sides. A word is decided only where the 97% intervals of the paired difference (Student's
t and bootstrap) lie on one side of zero. "Not reproduced" is said of these scales: at `cpu`, models of about a million
weights. [The page](claims.html) has the curves; `pretrain claim run NAME --scale cpu` repeats a row, and
`pretrain claim table` makes this file from `claims/results/`.

"""
COLUMNS = (
    "claim", "what the paper says", "measured", "baseline", "method", "difference (97%)",
    "compute to reach the baseline", "verdict",
)  # fmt: skip


def rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each result, by claim and scale, the newest first; `contradicted` where reruns differ in their word."""
    words = defaultdict(set)
    for result in results:
        words[result["name"], result["scale"]].add(result["word"])
    found = []
    for result in sorted(results, key=lambda r: r["finished"], reverse=True):
        claim, low, high = result["claim"], *interval(result)
        found.append(
            {
                "name": result["name"], "scale": result["scale"], "title": claim["title"], "arxiv": claim["arxiv"],
                "claim": claim["claim"], "metric": claim["metric"], "better": claim["better"], "equal": claim["equal"],
                "budget": claim["scales"][result["scale"]]["budget"],
                "sides": {side: claim[side]["name"] for side in ("baseline", "method")},
                "mean": result["mean"], "deviation": result["deviation"], "also": result["also"],
                "difference": result["verdict"]["difference"], "low": low, "high": high,
                "compute_to_reach": result["compute_to_reach"], "word": result["word"],
                "contradicted": len(words[result["name"], result["scale"]]) > 1,
                "seeds": len(result["runs"]["method"]), "finished": result["finished"],
                "cpu": result["environment"]["cpu"], "gpus": result["environment"]["gpus"],
            }
        )  # fmt: skip
    return sorted(found, key=lambda row: (row["name"], row["scale"]))


def interval(result: dict[str, Any]) -> tuple[float, float]:
    """The wider of the two intervals at each end: what the word is decided by."""
    verdict = result["verdict"]
    low, high = verdict.get("bootstrap", (verdict["low"], verdict["high"]))
    return min(verdict["low"], low), max(verdict["high"], high)


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The table as `docs/claims.md`."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows(results):
        means = {
            side: "; ".join(
                [f"{row['mean'][side]:.4g} ± {row['deviation'][side]:.2g}"]
                + [f"`{name}` {both[side][0]:.4g} ± {both[side][1]:.2g}" for name, both in row["also"].items()]
            )
            for side in ("baseline", "method")
        }
        share = row["compute_to_reach"]["method"]
        link = f"[{row['title']}](https://arxiv.org/abs/{row['arxiv']})" if row["arxiv"] else row["title"]
        equal = "" if row["equal"] == "none" else f" at {row['budget']:.2g} {row['equal']}"
        contradicted = ", contradicted by a rerun" if row["contradicted"] else ""
        cells = (
            f"**{row['name']}** {link}",
            row["claim"],
            f"`{row['metric']}` ({row['better']} is better){equal}, {row['seeds']} seeds, {row['scale']}",
            *(f"{row['sides'][side]}: {means[side]}" for side in ("baseline", "method")),
            f"{row['difference']:+.3g} ({row['low']:+.3g} to {row['high']:+.3g})",
            "" if share is None else f"{share:.0%}",
            row["word"] + contradicted,
        )
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return HEAD + "\n".join(lines) + "\n"
