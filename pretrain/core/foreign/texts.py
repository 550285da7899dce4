"""Text from bytes: what encoding a byte-order mark says, and characters that are none."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import TypeVar, cast

T = TypeVar("T")
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_HALF = re.compile("[\ud800-\udfff]")
REPLACED = "\ufffd"


def encoding_of(head: bytes) -> str:
    """The encoding that the first four bytes of a text tell by their mark; UTF-8 without one."""
    return next((name for mark, name in MARKS if head.startswith(mark)), "utf-8")


def marked(head: bytes) -> bool:
    """Whether a text begins with a byte-order mark."""
    return encoding_of(head) != "utf-8"


def decode(data: bytes) -> str:
    """A whole text, its byte-order mark left out; `UnicodeDecodeError` for bytes that are none in that encoding."""
    return data.decode(encoding_of(data[:4]))


def is_broken(text: str) -> bool:
    """Whether a text holds halves of characters (lone surrogates), which no file and no tokenizer takes."""
    return not text.isascii() and _HALF.search(text) is not None


def mended(text: str) -> str:
    """The text with each half of a character replaced by U+FFFD."""
    return _HALF.sub(REPLACED, text) if is_broken(text) else text


def mended_in(value: T) -> T:
    """A value as JSON gives it with its texts mended, keys included."""
    made: object = mended(value) if isinstance(value, str) else value
    if isinstance(value, dict):
        made = {mended(name) if isinstance(name, str) else name: mended_in(each) for name, each in value.items()}
    elif isinstance(value, list):
        made = [mended_in(each) for each in value]
    return cast("T", made)


def broken_in(value: object) -> str | None:
    """The first text with half of a character in a value as JSON and YAML give it, keys included; None without one."""
    return next(filter(is_broken, strings_in(value)), None)


def strings_in(value: object) -> Iterator[str]:
    """All texts in a value, keys included."""
    inner = [value]
    while inner:
        item = inner.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            inner += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            inner += item
