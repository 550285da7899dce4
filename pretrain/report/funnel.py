"""What the operations on a corpus left out, for the report: the funnel, by reason and domain."""

from __future__ import annotations

from collections.abc import Mapping

from pretrain.core.quick.quantities import short
from pretrain.data._funnel import Passage, Sizes
from pretrain.report.markup import Html, join, table, tag

MAX_DOMAINS = 40  # of an operation, those that lost the most


def funnel(passages: list[Passage], name: str) -> Html:
    """All of it, of the corpus of a stage of that name; nothing where no operation left anything out."""
    if not any(passage["reasons"] for passage in passages):
        return join([])
    heads = ("operation", "before", "why", "dropped", "after")
    rows = [row for passage in passages for row in _rows(passage)]
    kept = f"Of each operation the documents and bytes of the training split. {name}/corpus/dropped.parquet lists all."
    parts = [tag("h3", "Dropped"), tag("p", kept, class_="note"), table(heads, rows)]
    domains = [row for passage in passages if len(passage["domains"]) > 1 for row in _by_domain(passage)]
    if domains:
        listed = table(("operation", "domain", "before", "why", "after"), domains)
        parts.append(tag("details", tag("summary", "Dropped, by domain"), listed))
    return join(parts)


def _rows(passage: Passage) -> list[tuple[object, ...]]:
    """One for each reason; the operation and its ends stand in the first."""
    ends = (_size(passage["before"]), _size(passage["after"]))
    reasons = list(passage["reasons"].items()) or [("", {"documents": 0, "bytes": 0})]
    rows: list[tuple[object, ...]] = []
    for number, (reason, size) in enumerate(reasons):
        share = size["documents"] / max(1, passage["before"]["documents"])
        dropped = f"{_size(size)} ({share:.1%})" if size["documents"] else ""
        first = (passage["operation"], ends[0]) if not number else ("", "")
        rows.append((*first, reason, dropped, ends[1] if number == len(reasons) - 1 else ""))
    return rows


def _by_domain(passage: Passage) -> list[tuple[object, ...]]:
    """The domains that lost documents, those that lost the most first."""
    lost = {domain: sum(row["reasons"].values()) for domain, row in passage["domains"].items()}
    chosen = sorted((d for d in lost if lost[d]), key=lambda d: (-lost[d], d))[:MAX_DOMAINS]
    rows: list[tuple[object, ...]] = []
    for domain in chosen:
        row = passage["domains"][domain]
        rows.append((passage["operation"], domain, _size(row["before"]), _words(row["reasons"]), _size(row["after"])))
    return rows


def _size(size: Sizes) -> str:
    return f"{size['documents']:,} · {short(size['bytes'], 'B')}"


def _words(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {why}" for why, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
