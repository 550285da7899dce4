"""Images: files in folders, with the column `image`, `{bytes, path}` as `datasets.Image()` stores it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pretrain.core.bounds import Count
from pretrain.core.foreign.parsing import raise_memory
from pretrain.core.foreign.reading import read_bytes
from pretrain.core.packages import Package
from pretrain.core.samples import IMAGES, eight_bits
from pretrain.corpus.sources._files import Document, PathLabel, Source, any_case, evenly, path_label
from pretrain.corpus.sources._paths import located, stamps
from pretrain.corpus.sources._skipped import Skipped

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = any_case(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MOST = 256 << 20  # bytes of a file
ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


@dataclass(frozen=True)
class Images(Source):
    """Image files of a folder or a glob; `label` is a file's folder (`parent`) or its name (`stem`).

    The bytes are the file's own where that is a PNG or JPEG and nothing is to be changed, else a PNG: with `mode`
    images are converted, with `longest` those with a longer side are made smaller. A photograph that says how the
    camera was held is turned upright. Files of more than `max_pixels`, and broken ones, are passed over and counted.
    """

    images: str
    label: PathLabel = None
    mode: Literal["L", "RGB", "RGBA"] | None = None
    longest: Count | None = None  # pixels of the longer side
    max_pixels: Count = 1 << 26
    limit: Count | None = None  # at most so many, from the whole folder alike
    suffixes: tuple[str, ...] = SUFFIXES
    domain: str = "images"
    package: Package | None = None

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        for name, path in evenly(located(self.images, self.package, self.suffixes, skipped), self.limit):
            data = self._bytes(path, skipped)
            if data is not None:
                place = {"domain": self.domain, "id": name}
                yield {"image": {"bytes": data, "path": name}} | path_label(path, self.label) | place

    def state(self) -> object:
        return stamps(self.images, self.package, self.suffixes)

    def _bytes(self, path: Path, skipped: Skipped) -> bytes | None:
        """What is stored of a file; None, counted, for one that is no whole image."""
        from PIL import Image

        try:
            data = read_bytes(path, MOST)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` decides
                with Image.open(io.BytesIO(data), formats=IMAGES) as image:
                    if image.width * image.height > self.max_pixels:
                        skipped.add(f"images of more than {self.max_pixels} pixels", path)
                        return None
                    kind = image.format
                    image.load()  # all of it, since a file that ends too early still opens
                    made = self._changed(image)
            return data if made is image and kind in ("PNG", "JPEG") else png(made)
        except Image.DecompressionBombError:
            skipped.add(f"images of more than {self.max_pixels} pixels", path)
        except Exception as error:  # pillow has many ways to tell of a broken file
            raise_memory(error, path)
            skipped.add("no image" if isinstance(error, Image.UnidentifiedImageError) else "broken images", path)
        return None

    def _changed(self, image: Image.Image) -> Image.Image:
        """The image upright, in the mode and size that are asked for; the very same where it is so already."""
        from PIL import Image, ImageOps

        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if self.mode is not None and image.mode != self.mode:
            image = eight_bits(image).convert(self.mode)
        if self.longest is not None and max(image.size) > self.longest:
            scale = self.longest / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = (image.convert("RGB") if image.mode == "P" else image).resize(size, Image.Resampling.LANCZOS)
        return image


def png(image: Image.Image) -> bytes:
    """An image as PNG."""
    held = io.BytesIO()
    (image if image.mode in PNG_MODES else eight_bits(image).convert("RGB")).save(held, format="PNG")
    return held.getvalue()
