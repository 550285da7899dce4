"""The page of claims: one HTML file, without a server or a network, from the recorded results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pretrain.core.files import write_text
from pretrain.core.registry import methods
from pretrain.experiments.drawing import band
from pretrain.experiments.results import Result
from pretrain.experiments.table import markdown, rows
from pretrain.report.markup import fill, part, script_json


def page(results: Sequence[Result]) -> str:
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
    return fill(template, {"DATA": script_json(data), "ELEMENTS": part("elements.js")})


def write(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write `claims.md` and `claims.html` into `folder`."""
    written = {folder / "claims.md": markdown(results), folder / "claims.html": page(results)}
    for path, text in written.items():
        write_text(path, text)
    return list(written)
