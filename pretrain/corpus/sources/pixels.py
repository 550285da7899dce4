"""Images as rows of numbers: a table with a pixel in each column and a label in one, as MNIST is often handed on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pretrain.core.bounds import AnyInteger, Count, Positive
from pretrain.core.errors import PretrainError
from pretrain.core.packages import Package
from pretrain.corpus.sources._files import Document, Source, evenly_read
from pretrain.corpus.sources._paths import located, stamps
from pretrain.corpus.sources._skipped import Skipped
from pretrain.corpus.sources._tables import column, rows_of
from pretrain.corpus.sources.images import png

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")


@dataclass(frozen=True)
class Pixels(Source):
    """Rows of CSV or TSV tables, each an image: pixels from the top left in rows, and `label`, a column or null.

    `shape` is height × width (× 3 for colours); by default images are square and grey. `white` is the largest value.
    Rows with another number of pixels, or with something that is no number, are passed over and counted.
    """

    pixels: str
    label: str | AnyInteger | None = -1  # a column's name or number; -1 is the last
    shape: tuple[Count, ...] | None = None
    white: Positive = 255.0
    limit: Count | None = None  # at most so many, from the whole table alike
    domain: str = "images"
    package: Package | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        good = self.shape is None or (
            len(self.shape) in (2, 3) and min(self.shape) > 0 and (*self.shape, 1)[2] in (1, 3)
        )
        if not good:
            raise PretrainError(f"shape {list(self.shape or ())}: accepted: [height, width] or [height, width, 3]")

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        yield from evenly_read(self._all, self.limit, skipped)

    def state(self) -> object:
        return stamps(self.pixels, self.package, SUFFIXES)

    def _all(self, skipped: Skipped) -> Iterator[Document]:
        for name, path in located(self.pixels, self.package, SUFFIXES, skipped):
            names, rows = rows_of(path, skipped)
            labelled = None if self.label is None else column(names, str(self.label), "label", path)
            make = partial(self._image, count=len(names) - (labelled is not None), path=path)
            for line, row in rows:
                label = {} if labelled is None else {"label": row.pop(labelled) if len(row) == len(names) else ""}
                data = make(row, skipped, place=f"{name}:{line}")
                if data is not None:
                    place = {"domain": self.domain, "id": f"{name}:{line}"}
                    yield {"image": {"bytes": data, "path": None}} | label | place

    def _image(self, row: list[str], skipped: Skipped, *, count: int, path: Path, place: str) -> bytes | None:
        from PIL import Image

        if not count:
            skipped.add("rows that are no image", place)
            return None
        side = math.isqrt(count)
        shape = self.shape or (side, side)
        if math.prod(shape) != count:
            raise PretrainError(f"{path.name} has {count} pixels a row; accepted: a shape of so many, [28, 28] of 784")
        try:
            values_N = np.array([float(cell) for cell in row])
        except ValueError:
            values_N = np.array([np.nan])
        if values_N.size != count or not np.isfinite(values_N).all():
            skipped.add("rows that are no image", place)
            return None
        grey = np.clip(np.rint(values_N * (255.0 / self.white)), 0, 255).astype(np.uint8).reshape(shape)
        return png(Image.fromarray(grey.squeeze(-1) if grey.ndim == 3 and grey.shape[-1] == 1 else grey))
