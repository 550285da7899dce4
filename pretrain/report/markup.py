"""HTML from values: the one place where text becomes markup, for every page that is written.

`tag` escapes all that is not `Html` already, so that what a corpus, a model or a recipe says is shown and never read as
markup; what a script reads goes through `script_json`.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

VOID = ("br", "img", "meta")  # elements without content
CLOSED = ("rect", "path")  # of a drawing: they close themselves
NUMBER = re.compile(r"[-+]?\d[^\n]{0,20}|–")  # a cell of it stays in one line: `1,234`, `12.3 MB`, `1.4 to 1.6`
HALF = re.compile("[\ud800-\udfff]")  # halves of characters, which have no bytes


class Html(str):
    """Markup; only `tag`, `join`, `fill` and a page's own templates make it."""

    __slots__ = ()


def escape(value: object) -> Html:
    """A value as text between or inside tags; `Html` stays as it is."""
    return value if isinstance(value, Html) else Html(HALF.sub("\ufffd", html.escape(str(value))))


def join(parts: Iterable[object], between: str = "") -> Html:
    """The parts, each escaped, one after the other."""
    return Html(escape(between).join(map(escape, parts)))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; `class_` and `data_label` are the attributes `class` and `data-label`, None is no attribute."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    words = [f'{key}="{escape(value)}"' for key, value in given.items()]
    opening = f"<{' '.join([name, *words])}{'/' if name in CLOSED else ''}>"
    return Html(opening if name in VOID + CLOSED else f"{opening}{join(children)}</{name}>")


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """A table, whose rows become cards with the heads as labels where a page is narrow; no number is broken in two."""
    head = tag("thead", tag("tr", *(tag("th", h) for h in heads)))
    body = [tag("tr", *map(_cell, heads, row)) for row in rows]
    return tag("div", tag("table", head, tag("tbody", *body)), class_="scroll")


def _cell(head: str, value: object) -> Html:
    number = NUMBER.fullmatch(str(value)) is not None
    return tag("td", value, data_label=head, class_="number" if number else None)


def script_json(value: object) -> Html:
    """JSON for a script element, which no text can close or turn into a comment."""
    text = json.dumps(_finite(value), allow_nan=False, default=str)
    return Html(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def part(name: str) -> Html:
    """A file of the pages' own styles, scripts and templates."""
    return Html((Path(__file__).with_name("template") / name).read_text(encoding="utf-8"))


def fill(template: str, parts: Mapping[str, object]) -> Html:
    """A page's template with its places `<!--NAME-->` filled at once, so that no part fills another's place."""
    return Html(re.sub("<!--([A-Z]+)-->", lambda place: escape(parts[place[1]]), template))


def _finite(value: object) -> object:
    """The value with None for what JSON cannot hold: NaN and infinity."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
