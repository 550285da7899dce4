"""The report's pictures of samples (`core/samples.py` says what they hold): images, series, waveforms and text.

All is drawn here, as SVG and escaped text, so that the page needs no script for it; what is not as it should be is left
out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from pretrain.core.quick.quantities import duration, figure
from pretrain.report.markup import Html, join, tag

if TYPE_CHECKING:
    from pretrain.core.samples import Sample

MAX_BYTES = 1_000_000  # of all samples in a page
PROMPT, LINES = 160, 4  # characters and lines of a prompt that stands in two boxes
WIDTH, TALL, WAVE, LINE = 600, 110, 80, 50  # units of a drawing: its width, and heights
PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+=*")
NAMES = {"input": "input", "masked": "seen", "output": "output"}


def panel(samples: list[Sample], left: int) -> tuple[Html, int]:
    """The samples of a stage, as many as fit into `left` bytes, and what then is left."""
    shown, out = [], 0
    for sample in samples:
        size = len(json.dumps(sample, default=str))
        drawn = _figure(sample) if size <= left else None
        if drawn is None:
            out += size > left
            continue
        left -= size
        shown.append((sample.get("kind"), drawn))
    wide = [drawn for kind, drawn in shown if kind != "image"]
    images = [drawn for kind, drawn in shown if kind == "image"]
    parts = [tag("div", *images, class_="samples images")] if images else []
    parts += [tag("div", *wide, class_="samples")] if wide else []
    parts += [tag("p", f"{out} more are in samples.json.", class_="note")] if out else []
    return join(parts), left


def _figure(sample: object) -> Html | None:
    """One sample; None for what cannot be drawn."""
    if not isinstance(sample, dict):
        return None
    if "kind" not in sample:
        return _continuation(sample)
    draw = DRAW.get(str(sample["kind"]))
    try:
        inner = draw(sample) if draw else ""
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        return None
    return tag("figure", inner, _caption(sample)) if inner else None


def _continuation(sample: Sample) -> Html:
    """A prompt and what a model makes of it; beside it how the text itself goes on, where that is known."""
    prompt, text = tag("mark", sample.get("prompt", "")), sample.get("continuation", "")
    if not isinstance(sample.get("truth"), str):
        return tag("pre", prompt, text, class_="sample")
    whole = str(sample.get("prompt", ""))
    shown = _end_of(whole)  # both boxes have it
    end = prompt if shown == whole else tag("mark", shown, title=whole)
    model, truth = (
        tag("div", tag("small", title), tag("pre", end, words, class_="sample"))
        for title, words in (("the model", text), ("the text itself", sample["truth"]))
    )
    return tag("div", model, truth, class_="beside")


def _end_of(prompt: str) -> str:
    """The last lines of a prompt, so that a box has room for how it goes on."""
    end = "\n".join(prompt[-PROMPT:].split("\n")[-LINES:])
    return end if len(end) == len(prompt) else f"…{end[end.find(' ') + 1 :] if ' ' in end[:20] else end}"


def _caption(sample: Sample) -> Html:
    label = [tag("b", sample["label"]), " "] if sample.get("label") is not None else []
    text = [tag("br"), sample["text"]] if sample.get("text") else []
    return tag("figcaption", *label, sample.get("title") or "", *text)


def _image(sample: Sample) -> Html:
    """The pictures side by side."""
    known = {name: str(sample[name]) for name in NAMES if PNG.fullmatch(str(sample.get(name) or ""))}
    names = NAMES if len(known) > 1 else {"input": ""}
    cells = [
        tag("span", tag("img", src=known[name], alt=name), *([tag("small", caption)] if caption else []))
        for name, caption in names.items()
        if name in known
    ]
    return tag("div", *cells, class_="pictures") if cells else Html("")


def _series(sample: Sample) -> Html:
    """A chart for each channel: the input a line, the output a line over it, what was hidden a shade."""
    outputs, hidden, charts = sample.get("output") or [], sample.get("masked") or [], []
    for number, channel in enumerate(sample["input"]):
        lines = {"input": _numbers(channel)}
        if number < len(outputs):
            lines["output"] = _numbers(outputs[number])
        values = [v for line in lines.values() for v in line if v is not None]
        if not values:
            continue
        low, high = min(values), max(values)
        points = max(map(len, lines.values()))
        drawn = [tag("path", class_=name, d=_path(line, points, low, high, TALL)) for name, line in lines.items()]
        label = f"channel {number + 1}, {figure(low)} to {figure(high)}"
        shades = _shades(hidden[number], points, TALL) if number < len(hidden) else []
        charts.append(_svg(TALL, [*shades, *drawn], label))
    return join([*charts, _legend(sample)]) if charts else Html("")


def _waveform(sample: Sample) -> Html:
    """The samples' range in each bin, what was hidden a shade; a spectrogram; the model's value for each frame."""
    bins = [_numbers(pair) for pair in sample["input"]]
    step = WIDTH / max(1, len(bins))
    bars = "".join(
        f"M{_short((i + 0.5) * step)} {_short(WAVE * (1 - high) / 2)}V{_short(WAVE * (1 - low) / 2 + 0.5)}"
        for i, (low, high) in enumerate(bins)
        if low is not None and high is not None
    )
    seconds = float(sample.get("seconds") or 0)
    shades = _shades(sample.get("masked"), len(bins), WAVE)
    drawn = [_svg(WAVE, [*shades, tag("path", class_="input", d=bars)], f"waveform, {duration(seconds)}")]
    if PNG.fullmatch(str(sample.get("spectrogram") or "")):
        drawn.append(tag("img", class_="wide", src=sample["spectrogram"], alt="spectrogram"))
    values = _numbers(sample.get("output") or [])
    if any(v is not None for v in values):
        zero = tag("path", class_="zero", d=f"M0 {LINE / 2}H{WIDTH}")
        line = tag("path", class_="output", d=_path(values, len(values), -1, 1, LINE))
        drawn.append(_svg(LINE, [zero, line], "output for each frame, from -1 to 1"))
    return join([*drawn, _legend(sample, duration(seconds), str(sample.get("measure") or "output"))])


def _text(sample: Sample) -> Html:
    """The texts one below the other."""
    names = {name: caption for name, caption in NAMES.items() if isinstance(sample.get(name), str)}
    heads = {name: [] if len(names) == 1 else [tag("small", caption)] for name, caption in names.items()}
    return join(part for name in names for part in (*heads[name], tag("pre", sample[name])))


DRAW: dict[str, Callable[[Sample], Html]] = {
    "image": _image,
    "series": _series,
    "waveform": _waveform,
    "text": _text,
}


def _numbers(values: Iterable[object]) -> list[float | None]:
    """Finite numbers, and None for all else."""
    return [
        float(v) if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) else None
        for v in values
    ]


def _path(values: list[float | None], points: int, low: float, high: float, height: int) -> str:
    """A line through the values, broken where there is none; a single point is a short dash."""
    scale, step = (height - 6) / (high - low or 1), WIDTH / max(1, points - 1)
    parts, pen = [], "M"
    for i, value in enumerate(values):
        if value is None:
            pen = "M"
            continue
        alone = pen == "M" and (i + 1 == len(values) or values[i + 1] is None)
        parts.append(f"{pen}{_short(i * step)} {_short(height - 3 - (value - low) * scale)}{'h2' if alone else ''}")
        pen = "L"
    return "".join(parts)


def _shades(spans: Iterable[Iterable[float]] | None, points: int, height: int) -> list[Html]:
    """What was hidden, as columns over the whole height."""
    step = WIDTH / max(1, points)
    return [
        tag("rect", class_="hidden", x=_short(start * step), width=_short((end - start) * step), height=height)
        for start, end in (map(float, span) for span in spans or [])
    ]


def _svg(height: int, inner: Iterable[Html], label: str) -> Html:
    return tag(
        "svg", tag("title", label), *inner, class_="draw", viewBox=f"0 0 {WIDTH} {height}", preserveAspectRatio="none",
        style=f"height:{height}px", role="img", aria_label=label,
    )  # fmt: skip


def _legend(sample: Sample, note: str = "", output: str = "output") -> Html:
    keys = [("input", "input"), ("output", output), ("masked", "hidden")]
    present = [join([tag("i", class_=f"key {name}"), word]) for name, word in keys if sample.get(name)]
    words = [*([note] if note else []), *(present if len(present) > 1 else [])]
    return tag("small", join(words, " ")) if words else Html("")


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
