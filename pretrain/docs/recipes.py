"""The page of the recipes."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

from pretrain.recipe import load


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
