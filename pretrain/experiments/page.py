"""The page of claims: one HTML file, without a server or a network, from the recorded results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.core.method import methods
from pretrain.experiments.table import rows
from pretrain.experiments.verdict import Curve

POINTS = 60  # of a drawn band


def page(results: Sequence[dict[str, Any]]) -> str:
    """The whole page."""
    by_key = {(r["name"], r["scale"], r["finished"]): r for r in results}
    known = methods().values()
    kinds = {info.title: info.kind for info in known} | {info.name: info.kind for info in known}
    data = []
    for row in rows(results):
        result = by_key[row["name"], row["scale"], row["finished"]]
        curves = {side: [run["curve"] for run in runs] for side, runs in result["runs"].items()}
        drawn = {side: band(of) for side, of in curves.items()} if all(all(c) for c in curves.values()) else None
        finals = {side: [run["final"] for run in runs] for side, runs in result["runs"].items()}
        kind = kinds.get(row["name"], kinds.get(row["title"], ""))
        data.append(row | {"kind": kind, "curves": drawn, "finals": finals, "chosen": result["chosen"]})
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/[]", json.dumps(data, ensure_ascii=False).replace("</", "<\\/"))


def band(curves: Sequence[Curve]) -> dict[str, list[float]]:
    """Mean, lowest and highest of several curves at common points `x`, between their points in straight lines."""
    begin, end = max(c[0][0] for c in curves), min(c[-1][0] for c in curves)
    x = np.linspace(begin, max(begin, end), POINTS)
    values = np.stack([np.interp(x, [p[0] for p in curve], [p[1] for p in curve]) for curve in curves])
    rounded = {"x": x, "mean": values.mean(0), "low": values.min(0), "high": values.max(0)}
    return {name: [float(f"{v:.5g}") for v in line] for name, line in rounded.items()}
