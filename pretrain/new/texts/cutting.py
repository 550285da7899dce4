"""How a long text becomes many documents, where its files are too few to hold any out, or are many documents each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from pretrain.core.foreign.archives import BROKEN, open_text
from pretrain.corpus.sources import Files, Skipped
from pretrain.new.texts.opened import plain

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>")
FEWEST = 3  # of a separator in the beginning of a file
START = 1_000_000  # characters of the beginning
ENOUGH = 20_000  # bytes of text, from which on it is cut
MANY, SHORTEST, LONGEST = 200, 1000, 20_000  # pieces, and characters of one
READ = 4000  # pieces that are read at most


class Cut(NamedTuple):
    """Fields of the source: what stands between documents, or else the characters of a piece at most."""

    separator: str | None = None
    pieces: int | None = None


def beginning(path: Path, most: int = START) -> str:
    """The first characters of a text file."""
    try:
        with open_text(path, errors="replace") as opened:
            return opened.read(most)
    except BROKEN:
        return ""


def cut_of(files: Sequence[Path], size: float, share: float) -> Cut | None:
    """How files of so many bytes of text are cut, of which `share` can be held out as they are: None, not at all."""
    texts = plain(files)
    first = beginning(texts[0]) if texts else ""
    separator = next((mark for mark in SEPARATORS if first.count(mark) >= FEWEST), None)
    if separator is not None:
        return Cut(separator=separator)
    if share or size < ENOUGH:
        return None
    return Cut(pieces=max(SHORTEST, min(LONGEST, round(size / MANY / 1000) * 1000)))


def parts_of(files: Sequence[Path], cut: Cut) -> tuple[list[str], bool]:
    """Documents that the files are then, and whether these are all."""
    texts = (
        row["text"] for path in files for row in Files(str(path), on_error="skip", **cut._asdict()).documents(Skipped())
    )
    some = list(islice(texts, READ + 1))
    return some[:READ], len(some) <= READ
