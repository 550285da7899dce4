"""Recordings: audio files, with the column `audio`, `{bytes, path}` as `datasets.Audio(decode=False)` has it."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np

from pretrain.core.bounds import Count, Ge, Le, NonNegative, Seconds
from pretrain.core.errors import PretrainError
from pretrain.core.foreign.parsing import raise_memory
from pretrain.core.foreign.reading import open_file, read_bytes
from pretrain.core.packages import Package
from pretrain.core.quick.quantities import Duration
from pretrain.corpus.sources._files import Document, PathLabel, Source, any_case, evenly, path_label
from pretrain.corpus.sources._paths import located, stamps
from pretrain.corpus.sources._skipped import Skipped

if TYPE_CHECKING:
    from soundfile import SoundFile

SUFFIXES = any_case(".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
MOST = 1 << 26  # samples of all channels that are held at once, by what a header says
BLOCK = 1 << 20  # frames
KEPT = ("WAV", "FLAC")  # formats whose bytes may stay as they are
WHOLE = 0.99  # of the length that a header says; that of an MP3 is an estimate, 0.2% off where it was measured


@dataclass(frozen=True)
class Audio(Source):
    """Audio files of a folder or a glob; `label` is a file's name (`stem`) or its folder (`parent`).

    The bytes are the file's own where that is WAV or FLAC and nothing is to be changed, else 16-bit FLAC. A recording
    of more than `longest` seconds is cut into pieces, which stay on one side of the split; what is shorter than
    `shortest` is left out. With `rate` all are resampled to so many samples a second, with `mono` channels averaged.
    """

    audio: str
    label: PathLabel = None
    rate: Annotated[int, Ge(1000), Le(384_000)] | None = None
    mono: bool = True
    shortest: Annotated[NonNegative, Duration()] = 0.1
    longest: Seconds = 30.0
    limit: Count | None = None  # at most so many files, from the whole folder alike
    suffixes: tuple[str, ...] = SUFFIXES
    domain: str = "audio"
    package: Package | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shortest >= self.longest:
            raise PretrainError(f"shortest {self.shortest}, longest {self.longest}: accepted: shortest below longest")

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        for name, path in evenly(located(self.audio, self.package, self.suffixes, skipped), self.limit):
            for number, (data, whole) in enumerate(self._pieces(path, skipped)):
                place = {"id": name} if whole else {"id": f"{name}#{number}", "group": name}
                label = path_label(path, self.label)
                yield {"audio": {"bytes": data, "path": name}} | label | {"domain": self.domain} | place

    def state(self) -> object:
        return stamps(self.audio, self.package, self.suffixes)

    def _pieces(self, path: Path, skipped: Skipped) -> Iterator[tuple[bytes, bool]]:
        """The recording's bytes in pieces, each with whether it is all of it; a broken file is counted."""
        import soundfile

        try:
            open_file(path).close()  # is a regular one
            with soundfile.SoundFile(path) as file:
                rate, whole = file.samplerate, file.frames <= self.longest * file.samplerate
                if file.frames < max(1.0, self.shortest * rate):
                    skipped.add(f"recordings of less than {self.shortest} seconds", path)
                    return
                most = math.floor(self.longest * rate)
                if min(file.frames, most) * file.channels > MOST:
                    skipped.add(f"recordings of more than {MOST:,} samples in {self.longest} seconds", path)
                    return
                same = file.channels == 1 or not self.mono
                if whole and same and self.rate in (None, rate) and file.format in KEPT:
                    for _ in _blocks(file, BLOCK):
                        pass  # all of it, since a file that ends too early still opens
                    yield read_bytes(path, 8 * MOST), True
                    return
                for samples_LC in _blocks(file, most):
                    if whole or len(samples_LC) >= self.shortest * rate:
                        yield self._flac(samples_LC, rate), whole
        except (soundfile.LibsndfileError, EOFError):
            skipped.add("no whole recordings", path)
        except (OSError, RuntimeError, ValueError, AssertionError) as error:
            raise_memory(error, path)
            skipped.add("unreadable", path)

    def _flac(self, samples_LC: np.ndarray, rate: int) -> bytes:
        import soundfile
        from scipy.signal import resample_poly

        if self.mono:
            samples_LC = samples_LC.mean(axis=1, keepdims=True)
        if self.rate not in (None, rate):
            shared = math.gcd(self.rate, rate)
            samples_LC = resample_poly(samples_LC, self.rate // shared, rate // shared, axis=0)
        held = io.BytesIO()
        soundfile.write(held, np.clip(samples_LC, -1, 1), self.rate or rate, format="FLAC", subtype="PCM_16")
        return held.getvalue()


def _blocks(file: SoundFile, size: int) -> Iterator[np.ndarray]:
    """A recording's samples, so many at a time; `EOFError` where it ends before its header says.

    `SoundFile.blocks` would go on for as long as the header says, with the samples that it has read before.
    """
    length, missing = 0, 0
    while length < file.frames and not missing:
        wanted = min(size, file.frames - length)
        samples_LC = file.read(wanted, dtype="float32", always_2d=True)
        length, missing = length + len(samples_LC), wanted - len(samples_LC)
        if missing and length < WHOLE * file.frames:
            raise EOFError
        if len(samples_LC):
            yield samples_LC
