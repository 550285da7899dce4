"""JSON that others have written: bounded in size, depth and the digits of its numbers; whole characters alone.

Of a key that an object gives twice the last value counts: to look for one would make reading rows
dearer by a twentieth and more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from pretrain.core.errors import PretrainError
from pretrain.core.foreign import texts
from pretrain.core.foreign.parsing import raise_memory
from pretrain.core.foreign.reading import read_bytes

JSON: TypeAlias = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None

MOST = 64 << 20  # bytes of a file that is read whole
DEPTH = 200  # lists and objects in one another
DIGITS = 64  # of a whole number
VALUES = 4_000_000  # of a text, as its commas and brackets count them; the largest tokenizers have 2 million
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class NotJSON(ValueError):
    """What is no JSON, or beyond the bounds; the message says where and why."""


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise NotJSON(f"a number of {len(digits)} digits, where at most {DIGITS} are read")
    return int(digits)


_decoder = json.JSONDecoder(parse_int=_whole)


def loads(text: str, *, halves: bool = False) -> Any:
    """The value of a JSON text; `NotJSON` for any other. With `halves` lone surrogates of strings are let through."""
    if len(text) > VALUES and sum(map(text.count, ",[{")) > VALUES:
        raise NotJSON(f"more than {VALUES:,} values")
    try:
        value = _decoder.decode(text)
    except RecursionError as error:
        raise NotJSON(f"more than {DEPTH} lists or objects in one another") from error
    except json.JSONDecodeError as error:
        raise NotJSON(f"{error.msg}: line {error.lineno} column {error.colno} (char {error.pos})") from error
    _check(value, text, halves)
    return value


def _check(value: object, text: str, halves: bool) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH):
        level = [item for each in level for item in _inside(each) if type(item) is dict or type(item) is list]
        if not level:
            break
    else:
        raise NotJSON(f"more than {DEPTH} lists or objects in one another")
    if not halves and _HALF.search(text) and (broken := texts.broken_in(value)) is not None:
        raise NotJSON(f"half of a character (a lone surrogate) in {broken[:40]!r}")


def _inside(value: Any) -> Any:
    return value.values() if type(value) is dict else value


def read(path: Path | str, most: int = MOST, *, halves: bool = False) -> Any:
    """The value of a JSON file, with or without a byte-order mark; errors of one line name the file.

    With `halves` lone surrogates are let through. Raises `FileNotFoundError` where there is none.
    """
    try:
        return loads(texts.decode(read_bytes(path, most)), halves=halves)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (NotJSON, UnicodeDecodeError) as error:
        raise PretrainError(f"{path} is not valid JSON ({error}): truncated or damaged") from error
    except OSError as error:
        raise_memory(error, path)
        raise PretrainError(f"{path} cannot be read: {error.strerror or error}") from error


def marked(path: Path) -> bool:
    """Whether a file begins with a byte-order mark, which other readers than ours refuse."""
    with path.open("rb") as file:
        return texts.marked(file.read(4))


def items(opened: TextIO, longest: int) -> Iterator[Any]:
    """The items of a JSON array, read one after another: no more than one item of `longest` characters is held.

    Raises `NotJSON` for what is no array, or where it is damaged.
    """
    held, place, count = _more(opened, "", 1 << 16), 0, 0
    ended = not held
    place = _blank(held, 0)
    if held[place : place + 1] != "[":
        raise NotJSON("no array")
    place += 1
    while True:
        place = _blank(held, place)
        if len(held) - place < 2 and not ended:
            held, place, before = held[place:], 0, len(held) - place
            held = _more(opened, held, 1 << 16)
            ended = len(held) == before
            continue
        if held[place : place + 1] == "]":
            return
        if held[place : place + 1] == "," and count:
            place += 1
            place = _blank(held, place)
        elif count:
            raise NotJSON(f"item {count + 1}: neither a comma nor the end of the array")
        while True:
            try:
                value, end = _decoder.raw_decode(held, place)
                if end < len(held) or ended:  # a number may go on
                    break
                wrong: Exception = NotJSON("it ends in the middle of the array")
            except (json.JSONDecodeError, RecursionError) as error:
                wrong = error
            if isinstance(wrong, RecursionError):
                raise NotJSON(f"item {count + 1}: more than {DEPTH} lists or objects in one another") from wrong
            if ended:
                raise NotJSON(f"item {count + 1}: {getattr(wrong, 'msg', wrong)}") from wrong
            if len(held) - place > longest:
                raise NotJSON(f"item {count + 1}: {getattr(wrong, 'msg', wrong)}, or more than {longest:,} characters")
            size = max(1 << 16, len(held) - place)
            held, place, before = held[place:], 0, len(held) - place
            held = _more(opened, held, size)
            ended = len(held) == before
            place = _blank(held, 0)
        _check(value, held[place:end], True)
        yield value
        place, count = end, count + 1


def _more(opened: TextIO, held: str, size: int) -> str:
    return held + opened.read(size)


def _blank(text: str, place: int) -> int:
    """The first place from here on that is no blank."""
    match = re.compile(r"[ \t\n\r]*").match(text, place)
    return match.end() if match else place
