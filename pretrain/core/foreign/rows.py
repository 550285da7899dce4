"""Text in lines: none longer than is asked for is ever held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TextIO

PIECE = 1 << 20


def lines(opened: TextIO, longest: int) -> Iterator[tuple[int, str | None]]:
    """The lines with their numbers, line ends included; None in place of one of more than `longest` characters."""
    number = 0
    while line := opened.readline(longest + 1):
        number += 1
        if len(line) <= longest or line.endswith(("\n", "\r")):
            yield number, line
            continue
        yield number, None
        while line and not line.endswith(("\n", "\r")):
            line = opened.readline(PIECE)
