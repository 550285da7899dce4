"""A text's lines with their numbers, in pieces that a model can read."""

from __future__ import annotations

from typing import NamedTuple

from pretrain.data._chunks import chunks, count_tokens


class Piece(NamedTuple):
    """Lines of a text with their numbers before them; the first and the last of these."""

    text: str
    first: int
    last: int


def numbered(text: str, most: int) -> list[Piece]:
    """The lines as `[000]first`, in pieces of at most `most` tokens; a line that is longer stands in none."""
    pieces: list[Piece] = []
    held: list[str] = []
    tokens = 0
    lines = [f"[{number:03d}]{line}" for number, line in enumerate(text.split("\n"))]
    for number, line in enumerate(lines):
        size = count_tokens(line)
        if held and tokens + size > most:
            pieces.append(Piece("\n".join(held), number - len(held), number - 1))
            held, tokens = [], 0
        if size <= most:
            held.append(line)
            tokens += size
    if held:
        pieces.append(Piece("\n".join(held), len(lines) - len(held), len(lines) - 1))
    return pieces


def beginning(text: str, most: int) -> str:
    """A text's first whole sentences of at most `most` tokens."""
    return next(iter(chunks(text, most)), "")
