"""The table of claims: made from the recorded results and from nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pretrain.core.quick.quantities import short
from pretrain.experiments.results import PROTOCOL, Result

HEAD = """# Claims

What each paper says, and what came out here at equal compute: the same data, the same seeds, the same number of values
tried for both sides. The search runs all values at a third of the budget, widens a range whose best is at an edge, and
runs the best two whole with two seeds. Then seeds are added (3, 4, 6, 8) until the interval of the paired difference,
over seeds and documents, lies on one side of zero; its noise is pooled over at least 20 runs of the baseline. After
eight seeds "equal" says that the difference is surely below 1.25 deviations of a pair. Each row says how many tokens a
weight its baseline has read, and what counts of adjacent tokens (bigrams) come to in the same metric: a baseline that
does not beat them, or has read less than a token a weight, is "under-trained", and a best value at an edge decides
nothing. "Not reproduced" is said of these scales. Rows of the earlier protocol (three seeds, ranges as given, models of
under one token a weight) are "superseded". A verdict stands once it is decided, whatever later runs tell of the noise.
[The page](claims.html) has the curves; `pretrain claim run NAME --scale cpu` runs what is not recorded yet, and
`pretrain claim table` makes this file from `claims/results/`. To repeat a row, take its file there, the runs in
`claims/outcomes/` and the queue's `--output` away.

"""
COLUMNS = (
    "claim", "what the paper says", "measured", "regime", "baseline", "method", "difference",
    "compute to reach the baseline", "verdict",
)  # fmt: skip
SUPERSEDED = "superseded"


def rows(results: Sequence[Result]) -> list[Result]:
    """A row for each result, by claim and scale, the newest first; `contradicted` where reruns differ in their word."""
    words, trends = defaultdict(set), _trends(results)
    for result in results:
        words[_key(result)].add(result["word"])
    table = []
    for result in sorted(results, key=lambda r: r["finished"], reverse=True):
        claim, low, high = result["claim"], *interval(result)
        table.append(
            {
                "name": result["name"], "scale": result["scale"], "size": result.get("size", ""),
                "title": claim["title"], "arxiv": claim["arxiv"],
                "claim": claim["claim"], "metric": claim["metric"], "better": claim["better"], "equal": claim["equal"],
                "budget": claim["scales"][result["scale"]]["budget"],
                "sides": {side: claim[side]["name"] for side in ("baseline", "method")},
                "mean": result["mean"], "deviation": result["deviation"], "also": result["also"],
                "difference": result["verdict"]["difference"], "low": low, "high": high,
                "compute_to_reach": result["compute_to_reach"], "word": word_of(result),
                "contradicted": len(words[_key(result)]) > 1,
                "regime": result.get("regime", {}), "trend": trends.get((result["name"], result["scale"]), ""),
                "seeds": len(result["runs"]["method"]), "finished": result["finished"],
                "cpu": result["environment"]["cpu"], "gpus": result["environment"]["gpus"],
            }
        )  # fmt: skip
    return sorted(table, key=lambda row: (row["name"], row["scale"], row["size"]))


def _key(result: Result) -> tuple[str | int, ...]:
    return result["name"], result["scale"], result.get("size", ""), _protocol(result)


def _trends(results: Sequence[Result]) -> dict[tuple[str, str], str]:
    """Where a claim was tested at several sizes: the newest share of the baseline's compute at each, by its budget."""
    newest: dict[tuple[str, str], dict[float, Result]] = defaultdict(dict)
    for result in sorted(results, key=lambda r: r["finished"]):
        if _protocol(result) == PROTOCOL:
            budget = result["claim"]["scales"][result["scale"]]["budget"]
            newest[result["name"], result["scale"]][budget] = result
    trends = {}
    for key, by_budget in newest.items():
        shares = {budget: r["compute_to_reach"]["method"] for budget, r in sorted(by_budget.items())}
        each = [
            f"{'more than all' if share is None else f'{share:.0%}'} at {short(b, digits=2)}"
            for b, share in shares.items()
        ]
        if len(each) > 1:
            trends[key] = "trend: " + ", ".join(each)
    return trends


def _protocol(result: Result) -> int:
    return int(result.get("protocol", 1))


def word_of(result: Result) -> str:
    """A result's word; what the earlier protocol said is superseded."""
    return str(result["word"]) if _protocol(result) == PROTOCOL else f"{SUPERSEDED}: {result['word']}"


def interval(result: Result) -> tuple[float, float]:
    """What the word is decided by: of the earlier protocol the wider of two intervals at each end."""
    verdict = result["verdict"]
    low, high = verdict.get("bootstrap", (verdict["low"], verdict["high"]))
    return min(verdict["low"], low), max(verdict["high"], high)


def markdown(results: Sequence[Result]) -> str:
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
        equal = "" if row["equal"] == "none" else f" at {short(row['budget'], digits=2)} {row['equal']}"
        contradicted = ", contradicted by a rerun" if row["contradicted"] else ""
        cells = (
            f"**{row['name']}** {link}",
            row["claim"],
            f"`{row['metric']}` ({row['better']} is better){equal}, {row['seeds']} seeds, "
            + ", ".join(filter(None, (row["scale"], row["size"]))),
            _regime(row["regime"]),
            *(f"{row['sides'][side]}: {means[side]}" for side in ("baseline", "method")),
            f"{row['difference']:+.3g} ({row['low']:+.3g} to {row['high']:+.3g})",
            "; ".join(filter(None, ("" if share is None else f"{share:.0%}", row["trend"]))),
            row["word"] + contradicted,
        )
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return HEAD + "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A text on one line, which ends no cell and begins no markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _regime(regime: dict[str, float]) -> str:
    parts = [f"{regime['tokens_per_weight']:.2g} tokens a weight"] if "tokens_per_weight" in regime else []
    return "; ".join(parts + ([f"bigrams {regime['bigram']:.4g}"] if "bigram" in regime else []))
