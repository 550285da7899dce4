"""Programs that refine a text: read by a grammar of their own, and carried out; nothing of them is ever evaluated.

A program is a call a line. Of a document `keep_doc()` or `drop_doc()`; of its lines, which are numbered from 0,
`remove_lines(start=0, end=2)` (both included) or `remove_lines(all=True)`, `normalize(source_str="…", target_str="…")`
(no target: nothing), and `untouch_doc()` or `keep_chunk()`. Arguments are whole numbers, quoted strings and True, with
their names or without. Blank lines, comments and marks of code say nothing. Whatever else stands there is counted and
has no effect: a call of these that cannot be carried out is an error, any other line is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pretrain.corpus.copies.minhash import units

NEARLY_ALL, SHORT, DROP = "nearly all removed", "too few words", "drop_doc"  # why a document is dropped
MOST = 2.0
_NAME = re.compile(r"([a-z_]{1,32})\(")
_ARGUMENT = re.compile(
    r"""\s*(?:([a-z_]{1,32})\s*=\s*)?(?:([0-9]{1,9})|(True)|"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)')\s*"""
)
_REST = re.compile(r"\s*(?:#.*)?")
_ESCAPE = re.compile(r"\\(.)")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r"}
_FENCE = re.compile(r"```\w*")
_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {  # of each call's arguments, in their order
    "remove_lines": (("start", "line_start"), ("end", "line_end")),
    "normalize": (("source_str", "source"), ("target_str", "target")),
}
_PLAIN = ("untouch_doc", "keep_chunk", "keep_doc", "drop_doc")
Value = int | str | bool
Lines = tuple[int, int]  # the first and the last


class Program(NamedTuple):
    """What a program does: `lines` to remove (`everything`: all), strings to replace; and what it could not say."""

    lines: tuple[Lines, ...] = ()
    strings: tuple[tuple[str, str], ...] = ()
    everything: bool = False
    drop: bool = False
    keep: bool = False  # something said that all is to stay
    errors: int = 0
    refused: int = 0


class Refined(NamedTuple):
    """What became of a text: None where it is dropped, with the reason; and what the program did."""

    text: str | None
    reason: str = ""
    removed: int = 0  # lines
    replaced: int = 0  # strings
    missing: int = 0  # strings that are not there
    errors: int = 0
    refused: int = 0
    ignored: bool = False  # for its errors

    @property
    def words(self) -> int:
        """Of what is left."""
        return len(units(self.text or ""))


def read(text: str) -> Program:
    """The program that a text says."""
    lines: list[Lines] = []
    strings: list[tuple[str, str]] = []
    plain: set[str] = set()
    errors = refused = 0
    for line in map(str.strip, text.split("\n")):
        if not line or line.startswith("#") or _FENCE.fullmatch(line):
            continue
        name, arguments = _call(line)
        if name in _PLAIN and arguments == []:
            plain.add(name)
        elif name not in _NAMES:
            refused += 1
        elif (meant := _bound(name, arguments)) is None:
            errors += 1
        elif name == "normalize":
            strings.append((str(meant.get("source_str", "")), str(meant.get("target_str", ""))))
        elif "all" in meant:
            plain.add("all")
        else:
            lines.append((int(meant["start"]), int(meant["end"])))
    return Program(
        tuple(lines), tuple(strings), "all" in plain, "drop_doc" in plain, bool(plain & {*_PLAIN[:3]}), errors, refused
    )


def _call(line: str) -> tuple[str, list[tuple[str, Value]] | None]:
    """A call's name (of anything else none) and its arguments, None where they are no such; in time of its length."""
    begin = _NAME.match(line)
    if begin is None:
        return "", None
    arguments: list[tuple[str, Value]] = []
    place = begin.end()
    while (argument := _ARGUMENT.match(line, place)) is not None:
        name, number, _, double, single = argument.groups()
        string = double if double is not None else single
        value: Value = int(number) if number is not None else string if string is not None else True
        arguments.append((name or "", value))
        place = argument.end()
        if line[place : place + 1] != ",":
            break
        place += 1
    whole = line[place : place + 1] == ")" and _REST.fullmatch(line, place + 1) is not None
    return begin[1], arguments if whole else None


def _bound(name: str, arguments: Sequence[tuple[str, Value]] | None) -> Mapping[str, Value] | None:
    """The arguments by their names; None where a call has others than it may."""
    if arguments is None or (name == "remove_lines" and arguments == [("all", True)]):
        return None if arguments is None else {"all": True}
    names, kind = _NAMES[name], int if name == "remove_lines" else str
    bound: dict[str, Value] = {}
    if len(arguments) > len(names):
        return None
    for (given, value), place in zip(arguments, names, strict=False):
        known = next((each for each in names if given in each), None) if given else place
        if known is None or known[0] in bound or type(value) is not kind:
            return None
        bound[known[0]] = value
    if name == "normalize":
        return bound if str(bound.get("source_str", "")).strip() else None
    return bound if len(bound) == 2 and int(bound["start"]) <= int(bound["end"]) else None


def kept_document(text: str, program: str) -> Refined:
    """A document that its program drops or keeps."""
    asked = read(program)
    refused = asked.refused + asked.errors + len(asked.lines) + len(asked.strings) + asked.everything
    drop = asked.drop and not asked.keep
    return Refined(None if drop else text, DROP if drop else "", refused=refused)


def refined(text: str, program: str, *, most_removed: float, errors: int, least_words: int) -> Refined:
    """A text after a program that changes its lines.

    Strings are replaced in each line, then lines go by the numbers that they have all along; what would make the text
    `MOST` times as long is an error. A program of `errors`
    errors or more is not followed. Dropped is a text of whose words `most_removed` or more would go, and one of fewer
    than `least_words` words.
    """
    asked = read(program)
    lines, replaced, missing, beyond = text.split("\n"), 0, 0, 0
    for source, target in asked.strings:
        if not any(source in line for line in lines):  # as it stands; else as Python reads what stands in quotes
            source, target = (_ESCAPE.sub(lambda m: _ESCAPED.get(m[1], m[1]), each) for each in (source, target))
        count = sum(line.count(source) for line in lines)
        if sum(map(len, lines)) + count * (len(target) - len(source)) > MOST * len(text):
            beyond += 1
            continue
        replaced, missing = replaced + (count > 0), missing + (not count)
        lines = [line.replace(source, target) for line in lines] if count else lines
    spans = merged(asked.lines)
    wrong = asked.errors + beyond + sum(last >= len(lines) for _, last in spans)
    gone = {n for first, last in spans for n in range(first, min(last + 1, len(lines)))}
    gone = {*range(len(lines))} if asked.everything else gone
    left = "\n".join(line for number, line in enumerate(lines) if number not in gone)
    before, after = len(units(text)), len(units(left))
    outcome = Refined(None, "", len(gone), replaced, missing, wrong, asked.refused)
    if before and after / before <= 1 - most_removed and wrong < errors:
        return outcome._replace(reason=NEARLY_ALL)
    if after < least_words:
        return outcome._replace(reason=SHORT)
    if wrong >= errors:
        return Refined(text, errors=wrong, refused=asked.refused, ignored=True)
    return outcome._replace(text=left)


def merged(spans: Sequence[Lines]) -> list[Lines]:
    """Spans of lines in their order, those that touch as one."""
    made: list[Lines] = []
    for first, last in sorted(spans):
        if made and first <= made[-1][1] + 1:
            made[-1] = (made[-1][0], max(made[-1][1], last))
        else:
            made.append((first, last))
    return made


def written(lines: Sequence[Lines], strings: Sequence[tuple[str, str]]) -> str:
    """A program as it is taught: the lines to remove in their order, then the strings to replace."""
    calls = [f"remove_lines(start={first}, end={last})" for first, last in merged(lines)]
    calls += [
        f"normalize(source_str={_quoted(source)}, target_str={_quoted(target)})"
        for source, target in dict.fromkeys(strings)
    ]
    return "\n".join(calls) or "untouch_doc()"


def _quoted(text: str) -> str:
    """A string in quotes; one that has such itself, or ends in a backslash, with what Python puts before them."""
    if '"' in text or text.endswith("\\"):
        text = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
