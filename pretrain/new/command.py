"""`pretrain new`, which looks for nothing before it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain.new import TASKS


def new(
    place: Annotated[
        str, typer.Argument(metavar="FOLDER|FILE", help="What to learn from; else the name of a starter.")
    ],
    task: Annotated[str | None, typer.Option(help=f"{', '.join(TASKS)}; guessed by default.")] = None,
    init: Annotated[
        str | None, typer.Option(help="The checkpoint to begin with: a folder, a run, a hub's name.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The recipe to write; by default NAME.yaml here.")] = None,
    budget: Annotated[str | None, typer.Option(help="How long its training may take: 30min, 2h.")] = None,
    text: Annotated[str | None, typer.Option(help="The column of a table's texts.")] = None,
    label: Annotated[str | None, typer.Option(help="The column of a table's labels or answers.")] = None,
) -> None:
    """Write a commented recipe for what is in a folder or a file."""
    from pretrain.new.written import write

    write(place, task=task, init=init, output=output, budget=budget, text=text, label=label)
