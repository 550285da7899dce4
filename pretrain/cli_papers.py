"""`pretrain papers`: the papers and what stands for each here."""

from __future__ import annotations

import json
import textwrap
from typing import Annotated

import typer

from pretrain.core.errors import PretrainError, unknown
from pretrain.papers import STAGES, TIERS, Standing, find, papers, search, standings


def _names(incomplete: str) -> list[str]:
    """Names of papers that begin so, for shell completion."""
    return [paper.name for paper in papers() if paper.name.lower().startswith(incomplete.lower())]


def list_papers(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[SEARCH…] | show NAME|ARXIV", autocompletion=_names)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON rows.")] = False,
    tier: Annotated[str | None, typer.Option(help=f"Only those of a tier: {', '.join(TIERS)}.")] = None,
    modality: Annotated[str | None, typer.Option(help="Only those of a modality: text, code, vision, …")] = None,
    stage: Annotated[str | None, typer.Option(help=f"Only those of a stage of life: {', '.join(STAGES)}.")] = None,
) -> None:
    """List the papers with what stands for each, those that a SEARCH finds, or show one."""
    words = words or []
    rows = standings()
    if words[:1] == ["show"]:
        if len(words) < 2:
            raise PretrainError("papers show: accepted: the name or the arXiv number of one paper")
        row = find(rows, " ".join(words[1:]))
        typer.echo(json.dumps(row.row(), indent=2, ensure_ascii=False) if as_json else _page(row))
        return
    modalities = {name for row in rows for name in row.paper.modality}
    for column, given, accepted in (
        ("tier", tier, TIERS),
        ("modality", modality, modalities),
        ("stage", stage, STAGES),
    ):
        if given is not None and given not in accepted:
            raise unknown(column, given, accepted)
    chosen = [
        row
        for row in search(rows, words)
        if tier in (None, row.paper.tier) and stage in (None, row.paper.stage)
        and (modality is None or modality in row.paper.modality)
    ]  # fmt: skip
    if as_json:
        typer.echo(json.dumps([row.row() for row in chosen], indent=2, ensure_ascii=False))
        return
    for part in STAGES:
        _section(part, [row for row in chosen if row.paper.stage == part])
    standing = sum(row.status == "stands" for row in chosen)
    typer.echo(f"{len(chosen)} papers, {standing} of them stand here")


def _section(title: str, rows: list[Standing]) -> None:
    if not rows:
        return
    typer.secho(title, bold=True)
    width = min(max(len(row.paper.name) for row in rows), 32)
    for row in rows:
        holds = ", ".join([*row.methods, *([row.recipe] if row.recipe else [])]) or row.status
        verdict = f"  [{row.claims[0]}]" if row.claims else ""
        typer.echo(f"  {row.paper.name:<{width}}  {row.paper.arxiv or row.paper.venue or '':<10}  {holds}{verdict}")
    typer.echo("")


def _page(row: Standing) -> str:
    """One paper on a screen."""
    paper = row.paper
    lines = [
        f"{paper.title}" + (f" ({paper.link})" if paper.link else f" ({paper.venue})" if paper.venue else ""),
        "",
        *textwrap.wrap(paper.does, 100),
        "",
        f"stage of life:   {paper.stage}",
        f"tier, modality:  {paper.tier}, {', '.join(paper.modality)}",
        f"status:          {row.status}",
    ]
    lines += [f"methods:         {', '.join(row.methods)}"] if row.methods else []
    lines += [f"recipe:          {row.recipe}"] if row.recipe else []
    lines += [f"claim:           {claim}" for claim in row.claims]
    lines += [f"checked against: {row.check}"] if row.check else []
    return "\n".join(lines)
