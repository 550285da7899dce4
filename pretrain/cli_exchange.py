"""`pretrain convert` and `pretrain export`: checkpoints from other programs, and for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain.core.quick.imports import uncollected


def convert(
    source: Annotated[Path, typer.Argument(metavar="FROM", help="A GGUF file, or a folder with pytorch_model.bin.")],
    target: Annotated[Path, typer.Argument(metavar="TO", help="The checkpoint to write.")],
    model_type: Annotated[
        str | None, typer.Option(help="The type in transformers, where config.json says none and the weights fit more.")
    ] = None,
) -> None:
    """Write a checkpoint from GGUF, pickled weights or a config.json without model_type; nothing of it is run."""
    with uncollected():
        from pretrain.core.exchange.convert import convert as write

    made_by = write(source, target, model_type)["made_by"]
    if made_by.get("inferred"):
        typer.echo(f"model_type {made_by['model_type']}, by the tensors' names and shapes", err=True)
    if left_out := made_by.get("left_out"):
        typer.echo(f"left out: {', '.join(left_out)}, for which the model has no place", err=True)
    typer.echo(str(target))
