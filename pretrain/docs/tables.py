"""Tables of fields, and what all made pages share."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

from pretrain.core.bounds import words
from pretrain.core.method import default_of

HEAD = "<!-- Made from the docstrings by `make docs`; edit those. -->\n"


def slug(kind: str) -> str:
    return kind.replace(" ", "-")


def field_table(cls: type) -> list[str]:
    """The table of a dataclass's fields, where it has any."""
    if not is_dataclass(cls) or not fields(cls):
        return []
    lines = ["| field | type | accepted | default |", "|---|---|---|---|"]
    for item in fields(cls):
        default = default_of(item).replace("|", "\\|")
        default = default if default == "required" else f"`{default}`"
        kind, accepted = words(cls, item)
        lines.append(f"| `{item.name}` | `{kind.replace('|', 'or')}` | {accepted} | {default} |")
    return [*lines, ""]
