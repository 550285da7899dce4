"""`pretrain evaluate`: a checkpoint on held-out text, or on labelled documents of a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, cast

import typer

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError, brief, listed, nearest, unknown
from pretrain.core.files import output_file, sealed, write_json
from pretrain.core.folders import corpus_at, newest_checkpoint
from pretrain.core.foreign.code import TRUST
from pretrain.core.quick.confusion import MOST, class_rows, classes_of, mistakes
from pretrain.core.quick.imports import opening
from pretrain.core.quick.quantities import counted, figure
from pretrain.core.registry import kinds
from pretrain.records import FEW_BYTES

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from pretrain.core.processors import Processor
    from pretrain.corpus.sources import Document, Files
    from pretrain.evaluation import Evaluation
    from pretrain.records import JSONObject

Placed: TypeAlias = "list[tuple[str, Document]]"  # documents with where they stand
OnError = Literal["stop", "skip"]
TEXT = "The column of a table's texts; by default that of the table which was trained on, or text."
DATA = "A corpus, a file, a folder or a glob."
SHOWN = 5  # wrong answers
FOLDERS = 8  # of a folder at most, for each to be measured alone
UNBOUNDED = 10_000  # columns that no terminal has
COUNTS = ("documents", "unlearnt")  # metrics that are numbers of documents
HEADER = "Whether a CSV's first row names its columns (by default if no number stands in it); else they are 0, 1, …"
EVALUATION = "NAME, or {method: NAME, field: value}; by default what fits the model's head."
OUTPUT = "A .json file for the record, beside what is printed."
TEMPERATURE = "Of drawing tokens; 0 takes the likeliest. The checkpoint's by default, or 0.8."
TOP_P = "The probability that is drawn from, the likeliest first: 1 is all, 0 the likeliest. The checkpoint's, or 0.95."
ON_ERROR = "What a row that cannot be read does: stop, or skip."


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a stage that wrote one, or a run.")],
    file: Annotated[str | None, typer.Argument(metavar="[DATA]", help=DATA)] = None,
    data: Annotated[str | None, typer.Option(help="The same, as an option.")] = None,
    split: Annotated[str, typer.Option(help="Which split of a corpus.")] = "test",
    max_documents: Annotated[Count, typer.Option(help="Of more so many are taken, from all alike.")] = 2000,
    whole: Annotated[bool, typer.Option("--all", help="Take all documents, however many they are.")] = False,
    evaluations: Annotated[list[str] | None, typer.Option("--evaluation", help=EVALUATION)] = None,
    text: Annotated[str | None, typer.Option(help=TEXT)] = None,
    label: Annotated[
        str | None,
        typer.Option(help="The column of what is true: a label, several (`a; b`), a number, tags, an answer."),
    ] = None,
    pair: Annotated[str | None, typer.Option(help="The column of second texts, for a classifier of pairs.")] = None,
    header: Annotated[bool | None, typer.Option("--header/--no-header", help=HEADER)] = None,
    on_error: Annotated[str | None, typer.Option(help=f"{ON_ERROR} By default as in the run that trained it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help=OUTPUT)] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over an output that is there.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)] = False,
) -> None:
    """Measure a checkpoint on held-out text, beside xz and zstd, or on labelled documents."""
    methods_of(evaluations or [], "evaluation", "--evaluation: ")
    place = newest_checkpoint(checkpoint)
    data, target = _asked(data, file), _target(output, force)
    folder = corpus_at(data, place)
    from pretrain.corpus.overlap import header_of, overlap_warning, skips, text_column
    from pretrain.corpus.sources import Files
    from pretrain.corpus.store import SPLITS, Corpus
    from pretrain.inference.beforehand import check_asked
    from pretrain.inference.rows import nulled

    if folder is not None and split not in SPLITS:
        raise unknown("split", split, SPLITS)
    policy = on_error_of(on_error or ("skip" if skips(place, data) else "stop"))
    source = Files(data, text=text or text_column(place), on_error=policy, header=header_of(place, header))
    most = sys.maxsize if whole else max_documents
    placed, count = (
        _read(source, most) if folder is None else ([], 0)
    )  # what is wrong is said before the model is there
    if not evaluations:
        check_asked(place, label, pair, [document for _, document in placed], source)
    with opening(place, trust_remote_code):
        from pretrain.core import checkpoint as checkpoints
        from pretrain.stages import evaluate as stage

        model, processor = stage.load_both(place)
    lineage = checkpoints.lineage(place)
    chosen: list[Evaluation] = methods_of(evaluations or [], "evaluation", "--evaluation: ")
    chosen = chosen or [_fitting(place, (model, processor), lineage, label, pair)]
    if folder is not None:
        count = Corpus(folder).info["documents"].get(split, 0)
        documents = stage.documents_of(Corpus(folder), split, most, chosen, processor)
    else:
        for method in chosen:
            placed = _labelled(placed, source, method, (model, processor))
        documents = [document for _, document in placed]
    seen = overlap_warning(documents, place, folder if split != "train" else None)
    _announce(len(documents), count if count > most else 0, chosen, seen)
    compressors = any(method.name == "held_out" for method in chosen) or bool(evaluations)
    result = stage.evaluate(
        model, processor, documents, chosen, compressors=compressors, length=lineage.get("length"), of=place
    )
    result |= {"taken": {"documents": len(documents), "of": count}} | ({"seen": seen} if seen else {})
    _write(target, record := cast("JSONObject", nulled(result)))
    typer.echo(json.dumps(record, indent=2)) if as_json else _print(result)


def _announce(documents: int, count: int, methods: Sequence[Evaluation], seen: str) -> None:
    """Say what is measured on how many documents, of how many where these are not all, and what is doubtful of them."""
    if seen:
        typer.echo(f"warning: {seen}", err=True)
    part = f" of {count:,}, from all alike (--all takes all)" if count else ""
    typer.echo(f"{counted(documents, 'document')}{part}: {', '.join(each.name for each in methods)} …", err=True)


def _asked(data: str | None, file: str | None) -> str:
    """What to measure on, given in its place or as an option."""
    given = [each for each in (data, file) if each is not None]
    if len(given) != 1:
        words = "is missing" if not given else f"{file} and --data {data}"
        raise PretrainError(
            f"evaluate: DATA {words}; accepted: {DATA[0].lower()}{DATA[1:].rstrip('.')}, as "
            "RUN/corpus is of a run in RUN, whose test split is then taken"
        )
    return given[0]


def _write(target: Path | None, record: JSONObject) -> None:
    """The record to a file, where one is asked for."""
    if target is not None:
        write_json(target, sealed(record))
        typer.echo(f"wrote {target}", err=True)


def _target(output: Path | None, force: bool) -> Path | None:
    """The file that the record is to be written to, refused before anything is measured."""
    if output is None:
        return None
    if output.suffix != ".json":
        raise PretrainError(f"--output {output}: accepted: a file that ends with .json")
    return output_file(output, force)


def on_error_of(given: str) -> OnError:
    """The option as a source has it."""
    if given not in ("stop", "skip"):
        raise PretrainError(f"--on-error {given!r}{nearest(given, ('stop', 'skip'))}; accepted: stop, skip")
    return cast("OnError", given)


def methods_of(texts: Sequence[str], kind: str, option: str = "") -> list[Any]:
    """The methods that an option names: NAME, or {method: NAME, field: value}."""
    from pretrain.recipe import parse
    from pretrain.stages import build_method

    assert kind in kinds(), kind
    try:
        return [build_method(parse(text), kind) for text in texts]
    except ValueError as error:
        raise PretrainError(f"{option}{error}") from error


def _fitting(
    place: Path, opened: tuple[PreTrainedModel, Processor], lineage: Mapping[str, object], label: str | None,
    pair: str | None,
) -> Evaluation:  # fmt: skip
    """The evaluation that fits a checkpoint's head."""
    from pretrain.inference.heads import evaluation_for, head_of, kind_of
    from pretrain.inference.several import Several
    from pretrain.stages import build_method

    if kind_of(opened[0]) == "several":
        return Several(head_of(place, *opened, pair=pair), label or "labels")
    method: Evaluation = build_method(evaluation_for(opened[0], lineage, label, pair), "evaluation")
    return method


def _read(source: Files, most: int) -> tuple[Placed, int]:
    """At most so many documents of files, from all alike, and how many there are."""
    from pretrain.corpus.sources import Skipped, evenly

    skipped = Skipped()
    try:
        every = list(source.placed(skipped))
    except PretrainError as error:
        message = str(error).replace(", or tables: text to read the file as it stands", " (--text)")
        raise PretrainError(
            message.replace("on_error: skip", "--on-error skip").replace("header: false", "--no-header")
        ) from error
    if skipped.reasons:
        typer.echo(f"passed over: {skipped}", err=True)
    # the text is there by the name that prompts may call it by
    placed = [(where, document | {source.text: document["text"]}) for where, document in evenly(every, most)]
    return _by_folder(placed, Path(source.files)), len(every)


def _by_folder(placed: Placed, root: Path) -> Placed:
    """With the folders as domains where all lie in a few folders and nothing else tells them apart."""
    if not root.is_dir() or len({document["domain"] for _, document in placed}) > 1:
        return placed
    inside = [Path(where).relative_to(root).parts if where.startswith(str(root)) else () for where, _ in placed]
    if not all(len(parts) > 1 for parts in inside) or not 1 < len({parts[0] for parts in inside}) <= FOLDERS:
        return placed
    named = zip(placed, inside, strict=True)
    return [(where, document | {"domain": parts[0]}) for (where, document), parts in named]


def _labelled(placed: Placed, source: Files, method: Evaluation, opened: tuple[PreTrainedModel, Processor]) -> Placed:
    """The documents that have what an evaluation compares with; what is wrong with one is told with its place."""
    from pretrain.corpus.sources._files import given
    from pretrain.inference.beforehand import check_columns

    data, objective = source.files, getattr(method, "method", None)
    if not hasattr(objective, "expected") or not placed:
        return placed
    check_columns(method.columns, [document for _, document in placed], source.text, data)
    answer = method.columns[-1]
    whole = [(where, d) for where, d in placed if all(given(d, column) for column in method.columns)]
    if lacking := [where for where, d in placed if not all(given(d, column) for column in method.columns)]:
        lost = f"{len(lacking):,} of {counted(len(placed), 'row')}, without a {answer!r}"
        typer.echo(f"warning: passed over: {lost} ({_first(lacking)})", err=True)
    reasons = [_misfit(document, answer, objective, opened) for _, document in whole]
    wrong = [where for (where, _), reason in zip(whole, reasons, strict=True) if reason]
    if wrong and (source.on_error == "stop" or len(wrong) == len(whole)):
        also = f" ({len(wrong):,} rows are such: {_first(wrong)})" if len(wrong) > 1 else ""
        raise PretrainError(f"{wrong[0]}: {next(filter(None, reasons))}, or --on-error skip{also}")
    kept = [pair for pair, reason in zip(whole, reasons, strict=True) if not reason]
    if wrong:
        rows = f"{counted(len(wrong), 'row')} with another {answer!r}"
        typer.echo(f"warning: passed over: {rows} ({_first(wrong)})", err=True)
    if not kept:
        raise PretrainError(f"{data}: no row has a {answer!r} to compare with; accepted: at least one")
    return kept


def _first(places: Sequence[str], most: int = 3) -> str:
    """The first few places."""
    return ", ".join(places[:most]) + (", …" if len(places) > most else "")


def _misfit(document: Document, answer: str, objective: Any, opened: tuple[PreTrainedModel, Processor]) -> str:
    """What is wrong with what is said to be true of a document; empty where nothing is."""
    import numpy as np

    from pretrain.core.batch import Context, Example
    from pretrain.core.models.heads import labels_of, other_column
    from pretrain.stages._training_data import vocabulary_of

    model, processor = opened
    names = labels_of(model)
    if objective.name == "classification" and str(document[answer]) not in names:
        value = str(document[answer])
        wrong = f"{answer} {brief(value)}{nearest(value, names)}{other_column(model, answer)}"
        return f"{wrong}; accepted: a label that it has learnt ({listed(names, value)})"
    try:
        objective.expected([Example(document, 0, 0)], Context(vocabulary_of(processor), 2, np.random.default_rng(0)))
    except PretrainError as error:
        return str(error)
    return ""


def _print(result: JSONObject) -> None:
    """Tables for a terminal: what is measured, and of a classifier each class and what is taken for what."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console()
    table = Table(Column("metric", overflow="fold"), "value", "95% interval")
    for name, value in result["metrics"].items():
        low, high = result["intervals"].get(name, (None, None))
        shown = f"{value:,.0f}" if name in COUNTS else figure(value)
        table.add_row(name, shown, "" if low is None else f"{figure(low)} to {figure(high)}")
    for domain, domain_metrics in result["domains"].items():
        for name, value in domain_metrics.items():
            low, high = result.get("domain_intervals", {}).get(domain, {}).get(name, (None, None))
            table.add_row(
                Text(f"{name}, {domain}"), figure(value), "" if low is None else f"{figure(low)} to {figure(high)}"
            )
    for tool, measured in result["compressors"].items():
        several = len(measured["domains"]) > 1
        for name, value in measured["metrics"].items():
            table.add_row(f"{name} of {tool}{', all text as one stream' if several else ''}", figure(value), "")
        for domain, values in measured["domains"].items() if several else ():
            if result.get("sizes", {}).get(domain, {}).get("bytes", FEW_BYTES) < FEW_BYTES:
                continue  # a compressor's own head is more than the text
            for name, value in values.items():
                table.add_row(f"{name} of {tool}, {domain} alone", figure(value), "")
    console.print(table)
    if (taken := result.get("taken")) and taken["documents"] < taken["of"]:
        typer.echo(f"of {taken['documents']:,} of {taken['of']:,} documents")
    if why := result.get("no_intervals"):
        typer.echo(f"no intervals: {why}")
    if confusion := result.get("confusion"):
        _print_classes(console, confusion)
    if wrong := result.get("mistakes"):
        classes = (Column(name, overflow="fold") for name in ("true", "answered"))
        table = Table("text", *classes, "probability", title="its surest mistakes")
        for row in wrong[:SHOWN]:
            table.add_row(*(Text(str(row[name])) for name in ("text", "true", "answered")), f"{row['probability']:.2f}")
        console.print(table)
    for name, words in result.get("yardsticks", {}).items():
        typer.echo(f"{name} is of {words}, chosen on the documents that it was trained on")


def _print_classes(console: Console, confusion: Mapping[str, Mapping[str, int]]) -> None:
    """Each class, and which are taken for which: all of them where the names fit side by side, else the commonest."""
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(Column("class", overflow="fold"), "documents", "answered", "precision", "recall", "F1")
    for row in class_rows(confusion):
        shares = [("-" if share is None else f"{share:.3f}") for share in (row.precision, row.recall)]
        table.add_row(Text(row.name), f"{row.count:,}", f"{row.answered:,}", *shares, f"{row.f1:.3f}")
    console.print(table)
    names = classes_of(confusion)
    table = Table("true \\ answered", *(Column(Text(name)) for name in names))
    for truth in names:
        table.add_row(Text(truth), *(f"{confusion.get(truth, {}).get(answer, 0):,}" for answer in names))
    wide = console.measure(table, options=console.options.update(max_width=UNBOUNDED)).maximum
    if len(names) > MOST or wide > console.width:
        title = "the commonest mistakes"
        table = Table(Column("true", overflow="fold"), Column("answered", overflow="fold"), "times", title=title)
        for truth, answer, times in mistakes(confusion):
            table.add_row(Text(truth), Text(answer), f"{times:,}")
    if table.row_count:
        console.print(table)
