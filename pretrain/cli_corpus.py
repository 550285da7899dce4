"""`pretrain corpus`: what is in a folder, a file or a corpus, before a model learns from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.core.bounds import Ge
from pretrain.core.quick.quantities import counted, duration, short
from pretrain.corpus.look.glance import SECONDS

if TYPE_CHECKING:
    from pathlib import Path

    from pretrain.corpus.look.summary import Columns, Kind, Sample, Summary

WIDEST = 10  # kinds, domains and languages that a line lists
LINES = 8  # of a document
NAMES = 3  # of what was passed over for a reason
WHICH = {"0": "shortest", "5": "5%", "25": "25%", "50": "half", "75": "75%", "95": "95%", "100": "longest"}


def corpus(
    place: Annotated[str, typer.Argument(metavar="PLACE", help="A folder, a file, a glob, a URL, a corpus or a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    seconds: Annotated[
        Annotated[float, Ge(0.1)], typer.Option(help="Read for so long at most; of more a sample is read.")
    ] = SECONDS,
    text: Annotated[
        str | None, typer.Option(help="The column of tables' texts; by default `text`, or one that holds texts.")
    ] = None,
) -> None:
    """Summarize a folder of files, or a corpus: kinds, lengths, languages, copies, what is passed over, samples."""
    from pretrain.corpus.look.summary import summarized

    summary = summarized(place, seconds, lambda line: typer.echo(line, err=True), _columns(text))
    if as_json:
        typer.echo(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    typer.secho(f"{place}: {counted(summary['files'], 'file')}, {short(summary['bytes'], 'B')}", bold=True)
    for name, words in _lines(summary):
        typer.echo(f"  {name:<12}{words}")
    if summary["passed_over"]:
        typer.secho("passed over", bold=True)
    for reason, facts in summary["passed_over"].items():
        typer.echo(f"  {_passed_over(reason, facts)}")
    for sample in summary["samples"]:
        typer.echo("")
        _show(sample)


def _columns(text: str | None) -> Columns:
    """What tells the column of a table's texts, as `pretrain new` does, and whether its first row names its columns."""
    from pretrain.new.tables import Table, text_column

    known: dict[tuple[str, ...], Table] = {}

    def columns(path: Path, name: str) -> tuple[str, bool | None]:
        table = text_column(path, name, text, known)
        return table.text, table.header

    return columns


def _lines(summary: Summary) -> Iterator[tuple[str, str]]:
    from pretrain.records import of_pages

    read, copies = summary["read"], summary["copies"]
    if not summary["corpus"]:
        yield "kinds", _kinds(summary["kinds"])
    if names := summary["columns"]:
        first = ", ".join(f"{column} of {name}" for name, column in list(names.items())[:NAMES])
        yield "texts", f"in {first}{', …' if len(names) > NAMES else ''} (--text takes another column)"
    yield "documents", f"{read['documents']:,}, {short(read['text_bytes'], 'B')} of text"
    if not read["whole"]:
        about = f", about {read['expected']:,} in all" if read["expected"] else ""
        yield "", f"a sample{about}: {_part(summary)} in {duration(read['seconds'])} (--seconds reads more)"
    if summary["splits"]:
        yield "splits", ", ".join(f"{name} {count:,}" for name, count in summary["splits"].items())
    if any(summary["removed"].values()):
        yield "left out", ", ".join(f"{count:,} {name}" for name, count in summary["removed"].items() if count)
    if pages := of_pages(summary["pages"]):
        yield "pages", pages
    if not read["documents"]:
        return
    yield "domains", f"of documents: {_listed(summary['domains'], read['documents'])}"
    levels = [f"{WHICH[level]} {length:,}" for level, length in summary["characters"].items()]
    yield "characters", ", ".join(levels)
    languages = summary["languages"]
    if languages["missing"]:
        yield "languages", f"not told; {languages['missing']} tells them"
    elif languages["sample"]:
        sample = f" (of {counted(languages['sample'], 'document')})"
        yield "languages", _listed(languages["documents"], languages["sample"]) + sample
    share = copies["exact"] / read["documents"]
    exact = f"{copies['exact']:,} exact ({share:.1%})"
    yield "copies", f"{exact}, {copies['near']:,} near ones among {counted(copies['sample'], 'document')} at random"


def _part(summary: Summary) -> str:
    """How much was read of how much."""
    read = summary["read"]
    if summary["corpus"]:
        return f"{read['documents']:,} of {counted(sum(summary['splits'].values()), 'document')}"
    size, total = short(read["bytes"], "B"), short(summary["bytes"], "B")
    return f"{read['files']:,} of {counted(summary['files'], 'file')} ({size} of {total})"


def _kinds(kinds: Mapping[str, Kind]) -> str:
    parts = [f"{kind} {facts['files']:,} ({short(facts['bytes'], 'B')})" for kind, facts in kinds.items()]
    return ", ".join(parts[:WIDEST]) + _more(len(parts))


def _listed(counts: Mapping[str, int], total: int) -> str:
    parts = [f"{name or 'none'} {count / max(1, total):.0%}" for name, count in counts.items()]
    return ", ".join(parts[:WIDEST]) + _more(len(parts))


def _more(count: int) -> str:
    return f" and {count - WIDEST} more" if count > WIDEST else ""


def _passed_over(reason: str, facts: Mapping[str, str | int | list[str]]) -> str:
    """`12 hidden (.git, …)`."""
    from pretrain.corpus.sources._skipped import in_number

    names, count = facts["names"], facts["count"]
    assert isinstance(names, list) and isinstance(count, int), "as Skipped counts"
    shown = ", ".join(names[:NAMES]) + (", …" if count > NAMES else "")
    return in_number(reason, count) + (f" ({shown})" if shown else "")


def _show(sample: Sample) -> None:
    where = f"{sample['id']} · {sample['domain']} · {counted(sample['characters'], 'character')}"
    typer.secho(where, bold=True)
    lines = sample["text"].strip().splitlines()
    more = " …" if len(sample["text"]) < sample["characters"] or len(lines) > LINES else ""
    typer.echo("\n".join(f"  {line}" for line in lines[:LINES]) + more)
