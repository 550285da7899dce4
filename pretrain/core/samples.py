"""Samples for people to look at: what a stage leaves in `samples.json`, and the report draws.

A sample is `{"kind", "title", "label", "text", "input", "masked", "output"}`, all but `kind` and `input` optional:

- `image`: `input` and `output` are small PNGs as data URIs, `masked` is the input without what was hidden.
- `series`: `input` and `output` are lists of channels, each a list of numbers (null: nothing there); `masked` is a list
  of channels, each a list of `[start, end]` spans of points.
- `waveform`: `input` is a list of the least and the largest value in each bin, `output` of one number for each frame,
  from -1 to 1 (`measure` says of what); `masked` are spans of bins; also `seconds`, and `spectrogram`, a PNG.
- `text`: `input` and `output` are texts, `masked` is the input without what was hidden.

Pictures are small, numbers rounded, and all of a stage's samples within `MAX_BYTES`.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pretrain.core.errors import PretrainError
from pretrain.core.files import JSONObject, write_json

if TYPE_CHECKING:
    from PIL import Image

Sample = JSONObject
MAX_BYTES = 600_000  # of a stage's samples
IMAGES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # that are read; EPS is a program, which is never run
SIDE = 96  # pixels of a picture
POINTS = 240  # of a series
CHANNELS = 4
BINS = 300  # of a waveform
LETTERS = 600
TITLE = 160  # letters of a title, which a page wraps; of a longer one, a path or a name, both ends are kept
FRAMES, HEIGHT, WINDOW = 200, 64, 256  # of a spectrogram: its width, its height, the samples of a frame


def write_samples(folder: Path, samples: Iterable[Sample]) -> None:
    """Write `samples.json` into a stage's folder, as many of the samples as `MAX_BYTES` holds."""
    kept, size = [], 0
    for sample in samples:
        size += len(json.dumps(sample))
        if size > MAX_BYTES:
            break
        kept.append(sample)
    write_json(Path(folder) / "samples.json", {"samples": kept})


def document_samples(documents: Sequence[Mapping[str, object]]) -> list[Sample]:
    """A sample of each document whose columns can be shown."""
    samples = []
    for document in documents:
        column = next((name for name in SHOWN if document.get(name) is not None), None)
        if column is None:
            continue
        try:
            sample = SHOWN[column](document[column])
        except (OSError, ValueError, RuntimeError, TypeError, KeyError):  # a picture is worth no failed stage
            continue
        samples.append(sample | about(document, column))
    return samples


def about(document: Mapping[str, object], column: str) -> Sample:
    """What is said of a document beside what is shown of it."""
    title = str(document.get("id", ""))
    caption = {"title": title if len(title) <= TITLE else f"{title[: TITLE // 2]}…{title[-TITLE // 2 :]}"}
    if document.get("label") is not None:
        caption["label"] = str(document["label"])[:80]
    text = document.get("text")
    if column != "text" and isinstance(text, str):
        caption["text"] = text[:LETTERS]
    return caption


def text_sample(text: str) -> Sample:
    """The beginning of a text."""
    return {"kind": "text", "input": text[:LETTERS] + ("…" if len(text) > LETTERS else "")}


def eight_bits(image: Image.Image) -> Image.Image:
    """An image as it is, or one of 16 bits grey of 8, whose shades pillow's own conversion would cut off at 255.

    Raises `PretrainError` for numbers whose range nothing says: floats, and whole ones beyond 16 bits.
    """
    from PIL import Image

    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise PretrainError(f"an image of mode {image.mode} has no range of its own; accepted: 8 or 16 bits a channel")
    return Image.fromarray((pixels // 257).astype(np.uint8))


def image_sample(value: Image.Image | Mapping[str, bytes]) -> Sample:
    """An image, decoded or as it is stored, made small."""
    from PIL import Image

    image = value.copy() if isinstance(value, Image.Image) else Image.open(io.BytesIO(value["bytes"]), formats=IMAGES)
    image = eight_bits(image)
    image.thumbnail((SIDE, SIDE))
    return {
        "kind": "image",
        "input": picture(np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))),
    }


def picture(pixels: NDArray[np.uint8]) -> str:
    """Grey (H × W) or coloured (H × W × 3) pixels as the data URI of a PNG of at most `SIDE` pixels."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    held = io.BytesIO()
    image.save(held, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def series_sample(
    values_LC: ArrayLike, output_LC: ArrayLike | None = None, masked_LC: NDArray[np.bool_] | None = None
) -> Sample:
    """A series (time × channels), with what a model makes of it: as long, or longer for a forecast; NaN is nothing."""
    wanted = {"input": np.asarray(values_LC, np.float64)} | (
        {} if output_LC is None else {"output": np.asarray(output_LC, np.float64)}
    )
    steps = max(map(len, wanted.values()))
    sample: Sample = {"kind": "series"}
    for name, table_LC in wanted.items():
        whole_LC = np.full((steps, table_LC.shape[1]), np.nan)
        whole_LC[: len(table_LC)] = table_LC
        parts = np.array_split(whole_LC[:, :CHANNELS], min(steps, POINTS))
        sample[name] = [[_rounded(_mean(part_LC[:, c])) for part_LC in parts] for c in range(parts[0].shape[1])]
    if masked_LC is not None:
        whole_LC = np.zeros((steps, masked_LC.shape[1]), bool)
        whole_LC[: len(masked_LC)] = masked_LC
        sample["masked"] = [spans(hidden_L, min(steps, POINTS)) for hidden_L in whole_LC.T[:CHANNELS]]
    return sample


def audio_sample(value: Mapping[str, bytes]) -> Sample:
    """A stored recording."""
    import soundfile

    samples_LC, rate = soundfile.read(io.BytesIO(value["bytes"]), dtype="float32", always_2d=True)
    return waveform_sample(samples_LC.mean(axis=1), rate)


def waveform_sample(
    samples_L: NDArray[np.floating],
    rate: int,
    output_F: NDArray[np.floating] | None = None,
    masked_F: NDArray[np.bool_] | None = None,
) -> Sample:
    """A recording, and of its frames what a model says (`output_F`) and which were hidden from it (`masked_F`)."""
    bins = min(BINS, len(samples_L))
    loudest = max(float(np.abs(samples_L).max(initial=0.0)), 1e-9)
    parts = np.array_split(np.asarray(samples_L, np.float64) / loudest, bins)
    sample: Sample = {
        "kind": "waveform",
        "input": [[_rounded(part.min()), _rounded(part.max())] for part in parts],
        "seconds": round(len(samples_L) / rate, 3),
        "spectrogram": spectrogram(samples_L),
    }
    if output_F is not None:
        sample["output"] = [_rounded(_mean(part)) for part in np.array_split(output_F, min(bins, len(output_F)))]
    if masked_F is not None:
        edges = np.linspace(0, len(masked_F), bins + 1)
        nearest_B = np.minimum(((edges[:-1] + edges[1:]) / 2).astype(int), len(masked_F) - 1)
        sample["masked"] = spans(np.asarray(masked_F, bool)[nearest_B], bins)
    return sample


def spectrogram(samples_L: NDArray[np.floating]) -> str:
    """The loudness of frequencies over time, 60 decibels from black to white, low frequencies below, as a picture."""
    from PIL import Image

    padded_L = np.pad(np.asarray(samples_L, np.float64), (0, max(0, WINDOW - len(samples_L))))
    starts = np.linspace(0, len(padded_L) - WINDOW, FRAMES).astype(int)
    frames_FW = padded_L[starts[:, None] + np.arange(WINDOW)] * np.hanning(WINDOW)
    power_FK = np.abs(np.fft.rfft(frames_FW)) ** 2
    decibels_FK = 10 * np.log10(np.maximum(power_FK, 1e-12) / max(float(power_FK.max()), 1e-12))
    grey_KF = (255 * np.clip(1 + decibels_FK / 60, 0, 1)).astype(np.uint8).T[::-1]
    held = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(grey_KF)).resize((FRAMES, HEIGHT)).save(held, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def spans(hidden_L: NDArray[np.bool_], points: int) -> list[list[int]]:
    """`[start, end]` of each run of what is hidden, in as many points as are drawn."""
    drawn_P = [bool(part.mean() >= 0.5) for part in np.array_split(hidden_L, points)]
    edges = np.flatnonzero(np.diff([0, *map(int, drawn_P), 0]))
    return edges.reshape(-1, 2).tolist()


def _mean(values: NDArray[np.floating]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def _rounded(value: float) -> float | None:
    """A number with four digits; None for what is none."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


# What is shown of a document, by its column: the first that it has.
SHOWN: dict[str, Callable[[Any], Sample]] = {
    "image": image_sample,
    "audio": audio_sample,
    "series": series_sample,
    "text": text_sample,
}
