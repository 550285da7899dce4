"""The pages of the methods: a page a kind, the table of all, and the stub of `pretrain.methods` for editors."""

from __future__ import annotations

from inspect import cleandoc

from pretrain.core.method import method_class
from pretrain.core.registry import MethodInfo, kinds, methods
from pretrain.docs.tables import HEAD, field_table, slug

WIDTH = 120  # of a line of code


def pages() -> dict[str, str]:
    """File name -> text."""
    by_kind = {kind: [m for m in methods().values() if m.kind == kind and m.ours] for kind in kinds()}
    result = {f"{slug(kind)}.md": _page(kind, rows) for kind, rows in by_kind.items() if rows}
    lines = [HEAD, "# Methods\n", "| method | kind | paper | model families |", "|---|---|---|---|"]
    for kind, rows in by_kind.items():
        for row in rows:
            name = f"[`{row.name}`]({slug(kind)}.md#{row.name})"
            lines.append(f"| {name} | {kind} | {_paper(row)} | {', '.join(row.families) or 'any'} |")
    return result | {"README.md": "\n".join(lines) + "\n"}


def _paper(row: MethodInfo) -> str:
    return f"[{row.title}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else row.title


def _page(kind: str, rows: list[MethodInfo]) -> str:
    return "\n".join([HEAD, f"# Methods of the kind: {kind}\n", *(_entry(row) for row in rows)]).rstrip() + "\n"


def _entry(row: MethodInfo) -> str:
    cls = method_class(row.name)
    body = cleandoc(cls.__doc__ or "").partition("\n\n")[2]
    return "\n".join([f"## {row.name}\n", f"*{_paper(row)}*\n", body + "\n", *field_table(cls)])


def stub() -> str:
    """The stub of `pretrain.methods`: each method's class under its name, for editors and type checkers."""
    rows = sorted((row for row in methods().values() if row.ours), key=lambda row: row.module)
    lines = [f"from {row.module} import {row.cls} as {row.cls}" for row in rows]
    lines = [line if len(line) <= WIDTH else line.replace("import ", "import (\n    ") + ",\n)" for line in lines]
    return "\n".join(["# Made by `make docs`.", *lines]) + "\n"
