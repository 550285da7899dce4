"""All that is made: each file of the repository that `make docs` writes, with its text."""

from __future__ import annotations

from pathlib import Path

from pretrain.docs.commands import command_page
from pretrain.docs.guarantees import guarantees_page
from pretrain.docs.methods import pages, stub
from pretrain.docs.papers import papers_page
from pretrain.docs.recipes import recipe_page
from pretrain.docs.sources import source_page
from pretrain.docs.stages import stage_pages
from pretrain.docs.support import support_page

FOLDERS = ("methods", "stages")  # of pages that are all made


def made(root: Path) -> dict[Path, str]:
    """File -> text, for the repository at `root`."""
    docs = root / "docs"
    return {
        **{docs / "methods" / name: text for name, text in pages().items()},
        **{docs / "stages" / name: text for name, text in stage_pages().items()},
        docs / "commands.md": command_page(),
        docs / "guarantees.md": guarantees_page(root / "tests"),
        docs / "papers.md": papers_page(root),
        docs / "recipes.md": recipe_page(root / "recipes"),
        docs / "sources.md": source_page(),
        docs / "support.md": support_page(docs / "support.json"),
        root / "pretrain" / "methods" / "__init__.pyi": stub(),
    }


def stale(root: Path) -> list[Path]:
    """Pages that nothing makes any more, in the folders where all are made."""
    known = made(root)
    return [path for folder in FOLDERS for path in (root / "docs" / folder).glob("*.md") if path not in known]
