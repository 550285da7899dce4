"""The report's bars, drawn as elements whose widths are shares: bits per byte, and what each stage changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from pretrain.core.quick.quantities import counted, duration, figure, short
from pretrain.report.data import BITS, Page, StageRow, end_of, unit_of_loss
from pretrain.report.held_out import Bar, Chart
from pretrain.report.markup import Html, join, tag

COLOURS = tuple(f"var(--c{number})" for number in range(8))  # of models, in style.css for both themes; draw.js has them
GREYS = tuple(f"var(--g{number})" for number in range(4))  # of compressors
Ends = tuple[float, float]  # of an interval
T = TypeVar("T")
Column = tuple[str, dict[str, float], Callable[[float], str]]  # its title, its numbers by stage, how they are written


def bits_chart(number: int, chart: Chart) -> Html:
    """A group of bars for all text, then one for each domain; a line on a bar is its 95% interval.

    Of several charts each says which stages and which text it is of.
    """
    series = [*chart["models"], *chart["tools"]]
    greys = len(chart["models"])
    colours = [COLOURS[i % len(COLOURS)] if i < greys else GREYS[(i - greys) % len(GREYS)] for i in range(len(series))]
    values = [v for bar in series for v in (bar["all"], *bar["values"]) if v is not None]
    spans = [ends for bar in series for ends in (bar.get("interval"), *(bar.get("intervals") or ())) if ends]
    top = max([*values, *(ends[1] for ends in spans)], default=1.0) or 1.0
    rows = [_group("all text", [(bar, bar["all"], bar.get("interval")) for bar in series], colours, top)]
    for i, domain in enumerate(chart["domains"]):
        group = [(bar, _at(bar["values"], i), _at(bar.get("intervals") or [], i)) for bar in series]
        rows.append(_group(_named(domain, chart, any(ends for *_, ends in group)), group, colours, top))
    note = f"Bits for each byte of {chart['split']} text; lower is better."
    if chart["tools"]:
        note += " The compressors pack all text as one stream"
        note += ", and each domain as a stream of its own." if chart["domains"] else "."
    note += f" {chart['more']} more domains are under All metrics." if chart["more"] else ""
    if few := [_named(domain, chart, True) for domain in chart["few"]]:
        note += f" Too little text to be drawn: {'; '.join(few)}."
    title = [tag("h3", chart["title"])] if chart["title"] else []
    return join([*title, tag("p", note, class_="note"), tag("div", *rows, class_="bars", id=f"bars-{number}")])


def _at(values: Sequence[T | None], place: int) -> T | None:
    return values[place] if place < len(values) else None


def _named(domain: str, chart: Chart, certain: bool) -> str:
    """A domain with what was measured of it: `md (3 documents, 12 kB: too few for an interval)`."""
    size = chart["sizes"].get(domain)
    if size is None:
        return domain
    few = "" if certain else ": too few for an interval"
    return f"{domain} ({counted(size['documents'], 'document')}, {short(size['bytes'], 'B')}{few})"


def _group(
    title: str, bars: Sequence[tuple[Bar, float | None, Ends | None]], colours: Sequence[str], top: float
) -> Html:
    lines = []
    for (bar, value, ends), colour in zip(bars, colours, strict=True):
        if value is None:
            continue
        span = None
        if ends:
            place = f"left:{_percent(ends[0] / top)};width:{_percent((ends[1] - ends[0]) / top)}"
            span = tag("u", style=place, title=f"95% interval {ends[0]:.2f} to {ends[1]:.2f}")
        fill = tag("i", style=f"width:{_percent(value / top)};background:{colour}")
        track = tag("span", fill, *([span] if span else []), class_="track")
        lines.append(
            tag("div", tag("em", bar["name"], title=bar["name"]), track, tag("b", f"{value:.2f}"), class_="bar")
        )
    return tag("div", tag("h3", title), *lines, class_="group")


def _size(stage: StageRow) -> float:
    """The bytes of a checkpoint, or of what an export has written."""
    exported = (stage["metrics"] or {}).get("bytes", 0.0) if stage["stage"] == "export" else 0.0
    return float(stage["bytes"]) or exported


def changes(page: Page) -> Html:
    """A row for each stage: the size of what it wrote, the held-out loss of it, and the time that it took."""
    stages = [s for s in page["stages"] if s["seconds"] is not None]
    if not stages:
        return Html("")
    losses = {s["name"]: _loss(page, s) for s in page["stages"]}
    units = [name for name, *_ in losses.values() if name]
    unit = BITS if BITS in units else next(reversed(units), "")  # of one objective: losses of several do not compare
    shown = {stage: each for stage, each in losses.items() if each[0] == unit != ""}
    splits = {stage: split for stage, (*_, split) in shown.items()}
    alike = next(iter(splits.values())) if len({*splits.values()}) == 1 else ""  # else each number says its own
    splits = {} if alike else splits
    columns: list[Column] = [
        ("size", {s["name"]: size for s in page["stages"] if (size := _size(s))}, lambda v: short(v, "B")),
        (
            f"{alike} {'bits per byte' if unit == BITS else unit or 'loss'}".strip(),
            {stage: value for stage, (_, value, _) in shown.items()},
            lambda v: figure(v, 3),
        ),
        ("time", {s["name"]: s["seconds"] for s in stages if s["seconds"] is not None}, duration),
    ]
    rows = [tag("div", tag("em", "stage"), *(tag("span", name) for name, *_ in columns), class_="step head")]
    for s in stages:
        cells = [
            _cell(column, s["name"], _source(s) if i < 2 else "", splits if i == 1 else {})
            for i, column in enumerate(columns)
        ]
        rows.append(tag("div", tag("em", s["name"], " ", tag("small", s["stage"])), *cells, class_="step"))
    parts = [tag("div", *rows, class_="steps", id="changes")]
    if any(_source(s) in losses for s in stages):
        parts.insert(0, tag("p", "The percentages compare with the checkpoint that a stage began from.", class_="note"))
    return join(parts)


def _cell(column: Column, stage: str, before: str, splits: Mapping[str, str]) -> Html:
    """A bar, its number, and the change from what the stage began with, if both are of one split."""
    title, values, write = column
    if stage not in values:
        return tag("span")
    here, there = values[stage], values.get(before)
    comparable = splits.get(stage) == splits.get(before)
    change = f" {here / there - 1:+.0%}" if there and here != there and comparable else ""
    change += f" {splits[stage]}" if stage in splits else ""
    fill = tag("i", style=f"width:{_percent(here / (max(values.values()) or 1))}")
    return tag("span", tag("span", fill, class_="track"), tag("b", write(here)), tag("small", change), title=title)


def _source(stage: StageRow) -> str:
    """The stage whose checkpoint it began from; empty of one that measures, or makes a model anew."""
    inputs = stage["inputs"] or {}
    names = next((inputs[key] for key in ("init", "checkpoint", "models") if inputs.get(key)), "")
    first = (names or [""])[0] if isinstance(names, list) else names
    return first if stage["writes"] == "checkpoint" else ""


def _loss(page: Page, stage: StageRow) -> tuple[str, float, str]:
    """Of the model that a stage wrote: what the first evaluation of it says, else the end of its own training.

    The unit, the number, and the split that it was measured on.
    """
    for evaluation in page["evaluations"]:
        if evaluation["of"] == stage["name"]:
            metrics = evaluation.get("metrics") or {}
            for name, unit in ((BITS, BITS), ("loss", "loss of causal_lm (nats)")):
                if name in metrics:
                    return unit, metrics[name], evaluation.get("split", "test")
    training = next((t for t in page["trainings"] if t["name"] == stage["name"]), None)
    for name in (BITS, "loss") if training else ():
        if training and (value := end_of(page, training, name)) is not None:
            return (BITS if name == BITS else unit_of_loss(training)), value, "validation"
    return "", 0.0, ""


def _percent(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"
