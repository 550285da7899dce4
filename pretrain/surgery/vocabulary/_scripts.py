"""Writing scripts, as Unicode has them: which tokens occur in text of some of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import regex

from pretrain.core.errors import PretrainError

SHARED = "Common"  # digits, punctuation, spaces, and accents (Inherited), which belong to every script
Part = Literal["start", "middle", "end"]  # of a character's bytes


def check_scripts(method: str, scripts: Sequence[str]) -> None:
    """Refuse names that Unicode does not have."""
    for number, name in enumerate(scripts):
        if not re.fullmatch(r"\w+", name) or _compiled(name) is None:
            raise PretrainError(
                f"{method}: script {name!r}: accepted: a script of Unicode by its name or code, as Latin, Latn, "
                "Cyrillic, Arabic, Ethiopic, Han",
                place=("scripts", number),
            )


@cache
def _compiled(*names: str, repeat: str = "") -> regex.Pattern[str] | None:
    try:
        return regex.compile("[" + "".join(rf"\p{{Script={name}}}" for name in names) + "]" + repeat)
    except regex.error:
        return None


def _pattern(*names: str, repeat: str = "") -> regex.Pattern[str]:
    pattern = _compiled(*names, repeat=repeat)
    assert pattern is not None, f"unknown scripts {names}"
    return pattern


def script_of(text: str, scripts: Sequence[str]) -> str | None:
    """The first of the scripts that a text has a character of, `Common` if it has none; None if it has of others."""
    if not _pattern(*scripts, SHARED, "Inherited", repeat="*").fullmatch(text):
        return None
    return next((name for name in scripts if _pattern(name).search(text)), SHARED)


def of_bytes(scripts: Sequence[str]) -> Callable[[bytes], str | None]:
    """`script_of` for bytes, which may begin and end within a character: of a script that has one with such bytes.

    None also of bytes that stand in no text.
    """
    parts = _parts(tuple(scripts))

    def script(data: bytes) -> str | None:
        lead = next((i for i, byte in enumerate(data) if byte & 0xC0 != 0x80), len(data))
        if lead == len(data):
            return parts.get(("end", data)) or parts.get(("middle", data))
        for last in range(len(data), max(lead, len(data) - 4) - 1, -1):
            try:
                text = data[lead:last].decode()
            except UnicodeDecodeError:
                continue
            held = [parts.get(("end", data[:lead]))] if lead else []
            held += [script_of(text, scripts)] if text else []
            held += [parts.get(("start", data[last:]))] if last < len(data) else []
            return None if None in held else next((name for name in held if name != SHARED), SHARED)
        return None

    return script


@cache
def _parts(scripts: tuple[str, ...]) -> dict[tuple[Part, bytes], str]:
    """Each part of the bytes of the scripts' characters, and the first script that has it."""
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]))
    parts: dict[tuple[Part, bytes], str] = {}
    for name in (SHARED, "Inherited", *scripts):
        for character in _pattern(name).findall(every):
            data, script = character.encode(), SHARED if name == "Inherited" else name
            for cut in range(1, len(data)):
                parts.setdefault(("start", data[:cut]), script)
                parts.setdefault(("end", data[cut:]), script)
            for start in range(1, len(data) - 1):
                for end in range(start + 1, len(data)):
                    parts.setdefault(("middle", data[start:end]), script)
    return parts


@cache
def byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for: itself where it can be seen, else from U+0100."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + number): byte for number, byte in enumerate(others)}
