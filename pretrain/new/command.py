"""`pretrain new`, which looks for nothing before it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain.new import TASKS


def new(
    place: Annotated[str, typer.Argument(metavar="FOLDER|FILE", help="What to learn from; with --starter a name.")],
    task: Annotated[str | None, typer.Option(help=f"{', '.join(TASKS)}; guessed by default.")] = None,
    init: Annotated[
        str | None, typer.Option(help="The checkpoint to begin with: a folder, a run, a hub's name.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The recipe to write; by default NAME.yaml here.")] = None,
    budget: Annotated[str | None, typer.Option(help="How long its training may take: 30min, 2h.")] = None,
    text: Annotated[str | None, typer.Option(help="The column of a table's texts.")] = None,
    label: Annotated[str | None, typer.Option(help="The column of a table's labels or answers.")] = None,
    pair: Annotated[str | None, typer.Option(help="The column of second texts beside the first.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a recipe that is there.")] = False,
    starter: Annotated[bool, typer.Option("--starter", help="Write a recipe to be edited, of no folder.")] = False,
) -> None:
    """Write a commented recipe for what is in a folder or a file."""
    from pretrain.new.written import Columns, write, write_starter

    if starter:
        write_starter(place, output, force, (task, init, budget, text, label, pair))
        return
    columns = Columns(text, label, pair)
    write(place, columns, task=task, init=init, output=output, budget=budget, force=force)
