"""`pretrain predict`: what a tuned checkpoint says of the rows of a file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pretrain.core.bounds import Count
from pretrain.core.folders import newest_checkpoint
from pretrain.core.foreign.code import TRUST
from pretrain.core.quick.imports import opening
from pretrain.core.quick.quantities import counted, duration
from pretrain.inference.measuring import HEADER, ON_ERROR, TEXT, on_error_of


def predict(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a stage that wrote one, or a run.")],
    file: Annotated[
        str, typer.Argument(help=".jsonl, .csv, .tsv, .parquet, .txt (a text a line); - reads it from standard input.")
    ],
    text: Annotated[str | None, typer.Option(help=TEXT)] = None,
    pair: Annotated[str | None, typer.Option(help="The column of second texts, for a classifier of pairs.")] = None,
    header: Annotated[bool | None, typer.Option("--header/--no-header", help=HEADER)] = None,
    output: Annotated[
        Path | None, typer.Option(help="OUT.jsonl or OUT.csv; JSON lines to the screen by default.")
    ] = None,
    batch_size: Annotated[Count, typer.Option(help="Texts at once.")] = 32,
    scores: Annotated[bool, typer.Option("--scores", help="Each label's probability beside the likeliest.")] = False,
    on_error: Annotated[str, typer.Option(help=ON_ERROR)] = "stop",
    force: Annotated[bool, typer.Option("--force", help="Write over an output that is there.")] = False,
    max_new_tokens: Annotated[Count | None, typer.Option(help="Of an answer; by default as it was trained.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)] = False,
) -> None:
    """Label, tag, score or answer the rows of a file with a tuned checkpoint."""
    place = newest_checkpoint(checkpoint)  # what is wrong is said before anything large is imported
    from pretrain.corpus.overlap import header_of, text_column
    from pretrain.corpus.sources import Skipped
    from pretrain.inference.beforehand import check_first_row, check_predicts, columns_read
    from pretrain.inference.rows import check, rows_of

    check(file, output, force)
    check_predicts(place)
    text = text or text_column(place)
    skipped = Skipped() if on_error_of(on_error) == "skip" else None
    header = header_of(place, header)
    if skipped is None and file != "-":  # what is piped in can be read only once
        check_first_row(rows_of(file, text, Skipped(), header), columns_read(place, text, pair), pair)
    with opening(place, trust_remote_code):
        from pretrain.inference.predict import open_head, predict_file

        head = open_head(place, text=text, pair=pair, scores=scores, answer=max_new_tokens)
    start = time.perf_counter()
    count, names = predict_file(head, file, output, batch_size, force=force, skipped=skipped, header=header)
    seconds = time.perf_counter() - start
    added = ", ".join(names.values())
    if cut := head.tally["cut"]:
        longer = f"{counted(cut, 'text')} of more than {head.context.length:,} tokens"
        typer.echo(f"warning: {longer} {'are' if cut > 1 else 'is'} cut: no more is read", err=True)
    if broken := head.tally["broken"]:
        typer.echo(f"warning: halves of characters in {counted(broken, 'row')} are replaced", err=True)
    if empty := head.tally["empty"]:
        typer.echo(f"warning: null is added to {empty:,} of {counted(count, 'row')}, without a text", err=True)
    if skipped is not None and skipped.reasons:
        typer.echo(f"warning: left out: {skipped}", err=True)
    line = f"{counted(count, 'row')} in {duration(seconds)}"
    line += f": {added}" if count else f", since {file} holds none that can be read"
    typer.echo(f"{line}{f', in {output}' if output else ''}", err=True)
