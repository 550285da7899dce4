"""What was measured on held-out text, by the text: a chart for each, of models beside compressors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NotRequired, TypedDict

from pretrain.core.quick.quantities import counted
from pretrain.records import FEW_BYTES, Evaluation, Measurement
from pretrain.report.numbers import BITS

MAX_DOMAINS = 12  # in a chart; a table has all
NAMED = 4  # domains in a chart's title
PAIRS = "pairs of tokens"  # the bigram line: counts of which token follows which
ALL_PAIRS = f"{PAIRS} in all training text"  # of which the model may have read a part


class Evaluated(Evaluation):
    """What a stage has measured."""

    name: str
    of: str  # the stage whose checkpoint it judged; empty where that is not known
    corpus: NotRequired[str]  # whose held-out text it is, as the recipe names it; empty where that is not known
    split: NotRequired[str]
    bigram: NotRequired[float | None]  # bits per byte of counts of adjacent tokens on the same text
    bigram_whole: NotRequired[float | None]  # of those in all training text, of which the model may have read a part
    bigram_domains: NotRequired[list[dict[str, float]]]  # of both, by domain


class Bar(TypedDict):
    """A model, or a compressor: its value over all text and by domain."""

    name: str
    all: float | None
    values: list[float | None]
    interval: NotRequired[tuple[float, float] | None]
    intervals: NotRequired[list[tuple[float, float] | None]]  # of the domains


class Chart(TypedDict):
    """Those measured on the same text."""

    split: str  # which part of a corpus it is
    title: str  # which stages, and which text; empty where there is no other chart
    domains: list[str]  # the largest first
    more: int
    few: list[str]  # domains of too little text to be drawn
    sizes: dict[str, dict[str, int]]  # where they are known, each domain's documents and bytes
    models: list[Bar]
    tools: list[Bar]


def bars(evaluations: Sequence[Evaluated]) -> list[Chart]:
    """Bits per byte by domain: the models measured on the same text side by side, with the compressors."""
    charts: dict[str, Chart] = {}
    named: dict[str, list[Evaluated]] = {}
    for evaluation in evaluations:
        metrics, by_domain = evaluation.get("metrics") or {}, evaluation.get("domains") or {}
        if BITS not in metrics:
            continue
        tools, sizes = evaluation.get("compressors") or {}, evaluation.get("sizes") or {}
        bytes_ = {domain: sizes.get(domain, {}).get("bytes", 0) for domain in by_domain}
        domains = sorted(by_domain, key=lambda domain: (-bytes_[domain], domain))
        key = json.dumps([text_of(evaluation), domains], sort_keys=True)
        named.setdefault(key, []).append(evaluation)
        if key not in charts:
            few = [domain for domain in domains if domain in sizes and bytes_[domain] < FEW_BYTES]
            enough = [domain for domain in domains if domain not in few] if len(domains) > 1 else []
            charts[key] = {
                "split": evaluation.get("split", "test"),
                "title": "",
                "domains": enough[:MAX_DOMAINS],
                "more": len(enough[MAX_DOMAINS:]),
                "few": few if len(domains) > 1 else [],
                "sizes": sizes,
                "models": [],
                "tools": [],
            }
            shown = charts[key]["domains"]
            charts[key]["tools"] = [_bar(tool, measured, shown) for tool, measured in tools.items()]
        model = evaluation.get("of") or evaluation["name"]  # two evaluations of one model bear their own names
        taken = any(bar["name"] == model for bar in charts[key]["models"])
        row = _bar(evaluation["name"] if taken else model, evaluation, charts[key]["domains"])
        row["interval"] = (evaluation.get("intervals") or {}).get(BITS)
        apart = evaluation.get("domain_intervals") or {}
        row["intervals"] = [(apart.get(domain) or {}).get(BITS) for domain in charts[key]["domains"]]
        by_domains = [*(evaluation.get("bigram_domains") or []), {}, {}]
        pairs = ((PAIRS, evaluation.get("bigram")), (ALL_PAIRS, evaluation.get("bigram_whole")))
        for (counts, line), values in zip(pairs, by_domains, strict=False):
            lines = sum(bar["name"].startswith(PAIRS) for bar in charts[key]["tools"])
            name = f"{counts}, for {row['name']}" if counts in [bar["name"] for bar in charts[key]["tools"]] else counts
            if line is not None and line not in [bar["all"] for bar in charts[key]["tools"]]:
                each = [values.get(domain) for domain in charts[key]["domains"]]
                charts[key]["tools"].insert(lines, {"name": name, "all": line, "values": each})
        charts[key]["models"].append(row)
    for key, chart in charts.items() if len(charts) > 1 else ():
        chart["title"] = _title(named[key])
    return list(charts.values())


def heading(charts: Sequence[Chart]) -> str:
    """`Test text`, by the split that was measured; of several splits each chart says its own."""
    splits = {chart["split"] for chart in charts}
    return f"{splits.pop().capitalize()} text" if len(splits) == 1 else "Text of evaluations"


def text_of(evaluation: Evaluated) -> list[object]:
    """What tells the text of an evaluation from another's: the same of two that were measured on the same documents."""
    return [evaluation.get(name) for name in ("corpus", "split", "documents", "compressors")]


def _title(evaluations: Sequence[Evaluated]) -> str:
    """Which stages measured, and on which text: `“after”: 24 test documents of “corpus” (prose, code)`."""
    names, first = ", ".join(f"“{each['name']}”" for each in evaluations), evaluations[0]
    domains, sizes = first.get("domains") or {}, first.get("sizes") or {}
    largest = sorted(domains, key=lambda domain: (-sizes.get(domain, {}).get("bytes", 0), domain))
    more = f" and {len(largest) - NAMED} more" if len(largest) > NAMED else ""
    count, split = first.get("documents"), first.get("split", "")
    what = f"{split} document".strip()
    text = counted(count, what) if isinstance(count, int) else f"{what}s"
    text += f" of “{first['corpus']}”" if first.get("corpus") else ""
    return f"{names}: {text}" + (f" ({', '.join(largest[:NAMED])}{more})" if largest else "")


def _bar(name: str, measured: Measurement, domains: list[str]) -> Bar:
    """The value over all text, and those of the domains in their order; None where there is none."""
    by_domain = measured.get("domains") or {}
    return {
        "name": name,
        "all": (measured.get("metrics") or {}).get(BITS),
        "values": [(by_domain.get(domain) or {}).get(BITS) for domain in domains],
    }
