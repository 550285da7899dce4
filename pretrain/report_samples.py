"""The report's pictures of samples (`core/samples.py` says what they hold): images, series, waveforms and text.

All is drawn here, as SVG and escaped text, so that the page needs no script for it; what is not as it should be is left
out.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.core.samples import Sample

MAX_BYTES = 1_000_000  # of all samples in a page
WIDTH, TALL, WAVE, LINE = 600, 110, 80, 50  # units of a drawing: its width, and heights
PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+=*")
NAMES = {"input": "input", "masked": "seen", "output": "output"}


def panel(samples: list[Sample], left: int) -> tuple[str, int]:
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
    wide = "".join(text for kind, text in shown if kind != "image")
    images = "".join(text for kind, text in shown if kind == "image")
    more = f'<p class="note">{out} more are in samples.json.</p>' if out else ""
    images = f'<div class="samples images">{images}</div>' if images else ""
    return images + (f'<div class="samples">{wide}</div>' if wide else "") + more, left


def _figure(sample: object) -> str | None:
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
    return f"<figure>{inner}{_caption(sample)}</figure>" if inner else None


def _continuation(sample: Sample) -> str:
    prompt, text = html.escape(str(sample.get("prompt", ""))), html.escape(str(sample.get("continuation", "")))
    return f'<pre class="sample"><mark>{prompt}</mark>{text}</pre>'


def _caption(sample: Sample) -> str:
    label = f"<b>{html.escape(str(sample['label']))}</b> " if sample.get("label") is not None else ""
    title, text = html.escape(str(sample.get("title") or "")), html.escape(str(sample.get("text") or ""))
    return f"<figcaption>{label}{title}{f'<br>{text}' if text else ''}</figcaption>"


def _image(sample: Sample) -> str:
    """The pictures side by side."""
    known = {name: str(sample[name]) for name in NAMES if PNG.fullmatch(str(sample.get(name) or ""))}
    names = NAMES if len(known) > 1 else {"input": ""}
    cells = [
        f'<span><img src="{known[name]}" alt="{name}">{f"<small>{caption}</small>" if caption else ""}</span>'
        for name, caption in names.items()
        if name in known
    ]
    return f'<div class="pictures">{"".join(cells)}</div>' if cells else ""


def _series(sample: Sample) -> str:
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
        drawn = "".join(
            f'<path class="{name}" d="{_path(line, points, low, high, TALL)}"/>' for name, line in lines.items()
        )
        label = f"channel {number + 1}, {low:.4g} to {high:.4g}"
        shades = _shades(hidden[number], points, TALL) if number < len(hidden) else ""
        charts.append(_svg(TALL, shades + drawn, label))
    return "".join(charts) + _legend(sample) if charts else ""


def _waveform(sample: Sample) -> str:
    """The samples' range in each bin, what was hidden a shade; a spectrogram; the model's value for each frame."""
    bins = [_numbers(pair) for pair in sample["input"]]
    step = WIDTH / max(1, len(bins))
    bars = "".join(
        f"M{_short((i + 0.5) * step)} {_short(WAVE * (1 - high) / 2)}V{_short(WAVE * (1 - low) / 2 + 0.5)}"
        for i, (low, high) in enumerate(bins)
        if low is not None and high is not None
    )
    seconds = float(sample.get("seconds") or 0)
    shade = _shades(sample.get("masked"), len(bins), WAVE)
    drawn = _svg(WAVE, f'{shade}<path class="input" d="{bars}"/>', f"waveform, {seconds:.2f} seconds")
    if PNG.fullmatch(str(sample.get("spectrogram") or "")):
        drawn += f'<img class="wide" src="{sample["spectrogram"]}" alt="spectrogram">'
    values = _numbers(sample.get("output") or [])
    if any(v is not None for v in values):
        zero = f'<path class="zero" d="M0 {LINE / 2}H{WIDTH}"/>'
        line = f'<path class="output" d="{_path(values, len(values), -1, 1, LINE)}"/>'
        drawn += _svg(LINE, zero + line, "output for each frame, from -1 to 1")
    return drawn + _legend(sample, f"{seconds:.2f} s", str(sample.get("measure") or "output"))


def _text(sample: Sample) -> str:
    """The texts one below the other."""
    names = {name: caption for name, caption in NAMES.items() if isinstance(sample.get(name), str)}
    alone = len(names) == 1
    return "".join(
        f"{'' if alone else f'<small>{caption}</small>'}<pre>{html.escape(sample[name])}</pre>"
        for name, caption in names.items()
    )


DRAW: dict[str, Callable[[Sample], str]] = {
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


def _shades(spans: Iterable[Iterable[float]] | None, points: int, height: int) -> str:
    """What was hidden, as columns over the whole height."""
    step = WIDTH / max(1, points)
    return "".join(
        f'<rect class="hidden" x="{_short(start * step)}" width="{_short((end - start) * step)}" height="{height}"/>'
        for start, end in (map(float, span) for span in spans or [])
    )


def _svg(height: int, inner: str, label: str) -> str:
    return (
        f'<svg class="draw" viewBox="0 0 {WIDTH} {height}" preserveAspectRatio="none" style="height:{height}px" '
        f'role="img" aria-label="{html.escape(label)}"><title>{html.escape(label)}</title>{inner}</svg>'
    )


def _legend(sample: Sample, note: str = "", output: str = "output") -> str:
    keys = [("input", "input"), ("output", output), ("masked", "hidden")]
    present = [f'<i class="key {name}"></i>{html.escape(word)}' for name, word in keys if sample.get(name)]
    words = [note, *(present if len(present) > 1 else [])]
    return f"<small>{' '.join(filter(None, words))}</small>" if any(words) else ""


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
