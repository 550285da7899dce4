"""`pretrain papers`: the papers and what stands for each here. `pretrain methods`: the methods."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterable
from dataclasses import fields
from inspect import cleandoc
from typing import Annotated

import typer

from pretrain.core.bounds import words as bound_words
from pretrain.core.errors import PretrainError, nearest, unknown
from pretrain.core.method import declared_class, default_of
from pretrain.core.quick.search import closest
from pretrain.core.quick.search import search as ranked
from pretrain.core.registry import MethodInfo, info, kinds, methods
from pretrain.papers import STAGES, TIERS, Standing, find, paper_texts, papers, search, standings


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
        name = " ".join(words[1:])
        try:
            row = find(rows, name)
        except PretrainError as error:
            if (method := _method_of(name)) is None:
                raise
            raise PretrainError(f"no paper {name!r}, which is a method here: pretrain methods show {method}") from error
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
    if words and not chosen:
        raise PretrainError(_no_paper(rows, words))
    if words:
        _section("the nearest first", chosen)
    for part in () if words else STAGES:
        _section(part, [row for row in chosen if row.paper.stage == part])
    standing = sum(row.status == "stands" for row in chosen)
    typer.echo(f"{_count(len(chosen), 'paper')}, {standing} of them {'stands' if standing == 1 else 'stand'} here")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _no_paper(rows: list[Standing], words: list[str]) -> str:
    """That no paper has the words, and what is nearest: a paper, or methods of other papers than these."""
    asked = " ".join(words)
    like = closest(asked, rows, lambda row: row.paper.name, paper_texts)
    have = [row.name for row in ranked(methods().values(), words, _texts)]
    other = f"; methods that have it (pretrain methods {asked}): {', '.join(have[:5])}" if have else ""
    return (
        f"no paper has {asked!r}{_near(r.paper.name for r in like)}{other}; accepted: words of names, titles and texts"
    )


def _no_method(asked: str) -> str:
    """That no method has the words, and what is nearest: a method, or papers."""
    like = closest(asked, methods().values(), lambda m: m.name, _texts)
    have = [row.paper.name for row in search(standings(), [asked])]
    other = f"; papers that have it (pretrain papers {asked}): {', '.join(have[:5])}" if have else ""
    return f"no method has {asked!r}{_near(m.name for m in like)}{other}; accepted: words of names, titles and texts"


def _near(names: Iterable[str]) -> str:
    listed = ", ".join(names)
    return f"; nearest: {listed}" if listed else ""


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


def _method_names(incomplete: str) -> list[str]:
    """Method names that begin so, for shell completion."""
    return [name for name in methods() if name.startswith(incomplete)]


def list_methods(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[SEARCH…] | show NAME", autocompletion=_method_names)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON rows.")] = False,
    kind: Annotated[str | None, typer.Option(help="Only those of a kind.")] = None,
) -> None:
    """List the methods, those that a SEARCH finds, or show one."""
    words = words or []
    if words[:1] == ["show"]:
        if len(words) < 2:
            raise PretrainError("methods show: accepted: the name of one method")
        _show(" ".join(words[1:]))
        return
    if kind is not None and kind not in kinds():
        raise PretrainError(f"kind {kind!r}{nearest(kind, kinds())}: accepted: {', '.join(kinds())}")
    rows = ranked([m for m in methods().values() if kind in (None, m.kind)], words, _texts)
    if as_json:
        typer.echo(json.dumps([m.row() for m in rows], indent=2))
        return
    if not rows:
        raise PretrainError(_no_method(" ".join(words)))
    width = max(len(m.name) for m in rows)
    if words:
        for row in rows:
            typer.echo(f"  {row.name:<{width}}  {row.kind:<14}  {_titled(row)}")
        return
    last = None
    for row in sorted(rows, key=lambda m: (m.kind, m.name)):
        if row.kind != last:
            typer.secho(("" if last is None else "\n") + row.kind, bold=True)
            last = row.kind
        typer.echo(f"  {row.name:<{width}}  {_titled(row)}")


def _texts(method: MethodInfo) -> list[tuple[float, str]]:
    """What of a method is searched, and what a hit is worth."""
    named = [(8.0, method.name), (8.0, method.cls), (8.0, method.arxiv or "")]
    return [*named, (4.0, method.title), (3.0, method.kind), (2.0, method.about)]


def _titled(method: MethodInfo) -> str:
    return method.title + (f" (arXiv:{method.arxiv})" if method.arxiv else "")


def _spelling(name: str) -> str:
    """What `LoRA` and `lora`, `Sparse-LLM` and `sparse_llm` share."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _method_of(name: str) -> str | None:
    """The method of a name in any spelling."""
    known = {_spelling(each): each for each in methods()}
    known = {_spelling(m.cls): m.name for m in methods().values()} | known
    return known.get(_spelling(name))


def _show(name: str) -> None:
    method = _method_of(name)
    if method is None:
        paper = next((r.paper.name for r in standings() if _spelling(r.paper.name) == _spelling(name)), None)
        if paper is not None:
            raise PretrainError(f"no method {name!r}, which is a paper: pretrain papers show {shlex.quote(paper)}")
        like = closest(name, methods().values(), lambda m: m.name, _texts)
        hint = nearest(name, methods(), 0.72) or _near(m.name for m in like)
        raise PretrainError(f"unknown method {name!r}{hint}; accepted: a name of `pretrain methods`")
    row, cls = info(method), declared_class(method)
    typer.secho(f"{row.name} ({row.kind})", bold=True)
    typer.echo(cleandoc(cls.__doc__ or ""))
    typer.echo(f"\nmodel families: {', '.join(row.families) or 'any'}")
    for item in fields(cls):
        kind, accepted = bound_words(cls, item)
        typer.echo(f"  {item.name}: {kind} = {default_of(item)}" + (f"  ({accepted})" if accepted else ""))
