"""`pretrain convert` and `pretrain export`: checkpoints from other programs, and for them."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pretrain.core.errors import PretrainError
from pretrain.core.exchange.task import check_option
from pretrain.core.folders import newest_checkpoint
from pretrain.core.foreign.code import TRUST, consenting_to
from pretrain.core.quick.imports import uncollected

Formats = StrEnum("Formats", ["gguf", "onnx", "sentence-transformers", "peft", "awq"])
Types = StrEnum("Types", ["f32", "f16", "bf16", "q8_0"])
Poolings = StrEnum("Poolings", ["mean", "cls", "lasttoken"])
LOGITS = ("logits_off", "logits_span", "logits_off_by_rounding")


def convert(
    source: Annotated[Path, typer.Argument(metavar="FROM", help="A GGUF file, or a folder with pytorch_model.bin.")],
    target: Annotated[Path, typer.Argument(metavar="TO", help="The checkpoint to write.")],
    model_type: Annotated[
        str | None, typer.Option(help="The type in transformers, where config.json says none and the weights fit more.")
    ] = None,
) -> None:
    """Write a checkpoint from GGUF, pickled weights or a config.json without model_type; nothing of it is run."""
    with uncollected(opens=source):
        from pretrain.core.exchange.convert import convert as write

    made_by = write(source, target, model_type)["made_by"]
    if made_by.get("inferred"):
        typer.echo(f"model_type {made_by['model_type']}, by the tensors' names and shapes", err=True)
    if left_out := made_by.get("left_out"):
        typer.echo(f"left out: {', '.join(left_out)}, for which the model has no place", err=True)
    typer.echo(str(target))


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a stage that wrote one, or a run.")],
    to: Annotated[Formats, typer.Option(help="The format of another program.")],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    numbers: Annotated[Types | None, typer.Option(help="Of GGUF: how matrices are stored; by default f16.")] = None,
    pooling: Annotated[
        Poolings | None, typer.Option(help="Of sentence-transformers: one vector of many; by default mean.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)] = False,
) -> None:
    """Write a checkpoint for another program and compare: GGUF, ONNX, sentence-transformers, peft, AWQ."""
    if os.path.lexists(output):  # a link to nothing too
        raise PretrainError(f"{output} is there already; accepted: a new folder")
    given = {"numbers": numbers and numbers.value, "pooling": pooling and pooling.value}
    of = {name: value for name, value in given.items() if value is not None}
    for name in of:
        check_option(to.value, name, "--")
    place = newest_checkpoint(checkpoint)
    with uncollected(opens=place):
        from pretrain.core.exchange.exporting import export as write

    with consenting_to(place, trust_remote_code):
        facts = write(place, output, to.value, **of)
    for name, value in facts.items():
        if name not in (*LOGITS, "vectors_off"):
            typer.echo(f"{name}: {value}", err=True)
    if LOGITS[0] in facts:
        off, span, rounded = (float(facts.get(name, 0.0)) for name in LOGITS)
        rounding = (
            f"; rounding the weights to {of.get('numbers', 'f16')} moves them by up to {rounded:.2g}" if rounded else ""
        )
        read = (
            f"logits are off by at most {off:.2g} from what was written"
            if off
            else "logits are those that were written"
        )
        typer.echo(f"read back: {read}, of a span of {span:.3g}{rounding}", err=True)
    if "vectors_off" in facts:
        off = float(facts["vectors_off"])
        typer.echo(f"read back: vectors of sentences differ by at most {off:.2g} from the checkpoint's", err=True)
    typer.echo(str(output))
