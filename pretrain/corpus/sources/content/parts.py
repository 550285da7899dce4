"""One long text as many documents: at what stands between them, and in pieces that end where a paragraph does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

ENDS = ("\n\n", "\n", " ")  # of a paragraph, a line, a word: where a text is cut, the first that is there


def parts(chunks: Iterable[str], separator: str | None, most: int) -> Iterator[str]:
    """The documents of a text that comes in chunks: of at most `most` characters each, and none of them blank."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        *whole, rest = rest.split(separator) if separator is not None else (rest, "")
        yield from (piece for text in whole for piece in cut(text, most))
        if len(rest) > most:  # of a document that has not ended yet
            *whole, rest = cut(rest, most)
            yield from whole
    yield from cut(rest, most)


def cut(text: str, most: int) -> Iterator[str]:
    """A text in pieces of at most `most` characters, of at least half as many but for the last; blank ones left out."""
    start = 0
    while start < len(text):
        end = _end(text, start, most)
        if not text[start:end].isspace():
            yield text[start:end]
        start = end


def _end(text: str, start: int, most: int) -> int:
    """Where the piece ends that starts there."""
    last = start + most
    if last >= len(text):
        return len(text)
    for mark in ENDS:
        place = text.rfind(mark, start + most // 2, last)
        if place >= 0:
            return place + len(mark)
    return last
