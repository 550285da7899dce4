"""Predictions for the rows of a file, or for texts in memory: in batches of alike lengths, and in their order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pretrain.core.bounds import Count, check_value
from pretrain.core.errors import PretrainError
from pretrain.core.folders import newest_checkpoint
from pretrain.core.foreign import texts
from pretrain.core.generation.finite import NotFinite
from pretrain.corpus.overlap import text_column
from pretrain.corpus.sources import Document, Skipped
from pretrain.corpus.sources._containers import Row
from pretrain.inference.beforehand import check_first_row, columns_read
from pretrain.inference.heads import Head, Predicted, head_of, predict_batch
from pretrain.inference.rows import batches, check, chunks, document_of, rows_of, text_in, writer
from pretrain.stages.evaluate import load_both

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pretrain.core.processors import Processor

BATCH = 32
Opened: TypeAlias = "Path | str | tuple[PreTrainedModel, Processor]"  # a checkpoint, or what is in one


def open_head(
    place: Opened, *, text: str = "text", pair: str | None = None, scores: bool = False, answer: int | None = None
) -> Head:
    """The model of a checkpoint, a stage or a run, ready to predict."""
    if isinstance(place, tuple):
        model, processor = place
        folder = Path(model.config._name_or_path or "/none")
    else:
        folder = newest_checkpoint(place)
        model, processor = load_both(folder)
    return head_of(folder, model, processor, text=text, pair=pair, scores=scores, answer=answer)


def predictions(
    head: Head, rows: Iterable[Row], batch: int = BATCH, skipped: Skipped | None = None
) -> Iterator[tuple[Row, Predicted]]:
    """Each row with what is predicted of it, in order; only a few thousand rows are held at once.

    Of an empty text nothing is predicted: what is added is None. A row without its column is an error, or with
    `skipped` counted there and left out.
    """
    read = False
    for chunk in chunks(_whole(rows, head), head.text):
        kept, sizes = list[Row](), list[int]()
        for row in chunk:
            try:
                given = [text_in(row, name, "--pair" if name == head.pair else "--text") for name in head.columns]
            except PretrainError as error:
                if skipped is None:  # of the first one there may be no row with the column
                    raise PretrainError(f"{error}, or --on-error skip" if read else str(error)) from error
                skipped.add("rows without text", row[0].partition(" (row")[0])
                continue
            kept.append(row)
            read = True
            whole = any(given) if head.kind in ("answer", "words") else None not in given  # a prompt may have gaps
            sizes.append(sum(len(text or "") for text in given) if whole else 0)
        done: dict[int, Predicted] = {number: dict.fromkeys(head.adds) for number, size in enumerate(sizes) if not size}
        head.tally["empty"] += len(done)
        ahead = [number for number, size in enumerate(sizes) if size]
        wrong: dict[int, NotFinite] = {}
        for places in batches([sizes[number] for number in ahead], batch):
            chosen = [ahead[place] for place in places]
            try:
                done.update(zip(chosen, predict_batch(head, [_given(head, kept[i][1]) for i in chosen]), strict=True))
            except NotFinite as error:
                bad = [chosen[row] for row in error.rows if len(error.rows) <= len(chosen) > row] or chosen
                wrong[min(bad)] = error
        if wrong:  # of which the first is named
            raise PretrainError(f"{kept[min(wrong)][0]}: {wrong[min(wrong)]}") from wrong[min(wrong)]
        yield from ((row, done[number]) for number, row in enumerate(kept))


def _whole(rows: Iterable[Row], head: Head) -> Iterator[Row]:
    """The rows with halves of characters, which no tokenizer takes and no file, replaced as in corpora, and counted."""
    for where, columns in rows:
        broken = texts.broken_in(columns) is not None
        head.tally["broken"] += broken
        yield where, texts.mended_in(columns) if broken else columns


def _given(head: Head, document: Document) -> Document:
    """A row with nothing where a column of text has no value."""
    return document | {name: "" for name in head.columns if document[name] is None}


def predict_file(
    head: Head, source: str, output: Path | None, batch: int = BATCH, *, force: bool = True,
    skipped: Skipped | None = None, header: bool | None = None,
) -> tuple[int, dict[str, str]]:  # fmt: skip
    """Write each row of a file with its predictions; how many rows, and the names of what is added by their usual ones.

    A column that the input has already stays: what is added is called `predicted_…` then. What cannot be read is an
    error, or with `skipped` counted there and left out. `header` says of a CSV whether it has one.
    """
    check(source, output, force)
    count, names = 0, dict[str, str]()
    with writer(output) as write:
        for (where, columns), added in predictions(head, rows_of(source, head.text, skipped, header), batch, skipped):
            if not count:
                names = {name: f"predicted_{name}" if name in columns else name for name in head.adds}
            both = next((name for name in names.values() if name in columns), None)
            if both is not None:
                raise PretrainError(
                    f"{where}: a column {both!r} that the first row has not; accepted: the same columns"
                )
            write(columns | {names[name]: value for name, value in added.items()})
            count += 1
        if skipped is not None and skipped.reasons and not count:
            raise PretrainError(f"{source}: no row can be read: {skipped}; accepted: at least one with {head.text!r}")
    return count, names


def predict(
    checkpoint: Opened,
    texts: Iterable[str | Mapping[str, object] | None],
    *,
    text: str | None = None,
    pair: str | None = None,
    scores: bool = False,
    batch_size: int = BATCH,
) -> list[Predicted]:
    """What a tuned checkpoint says of each text.

    By its head `label` and `score`, `labels` and `scores` (of several), `value`, `tags`, or `prediction`, an answer.
    `checkpoint` is a classifier of texts or tokens, a regressor or a sequence-to-sequence model: its folder, a stage
    that wrote it, or a run, whose last checkpoint it is; or a model and its tokenizer, as `pretrain.load` gives them.
    `texts` are texts or documents (`{"text": …}`; `text` names another column), with the column `pair` beside it for a
    classifier of pairs; of one that is empty or missing (None, NaN) nothing is predicted: its values are None. `scores`
    adds the probability of each label. Raises `PretrainError` for a checkpoint that predicts nothing of the kind, and
    for a document without its column.
    """
    if isinstance(texts, str | Mapping):
        raise PretrainError(f"texts {str(texts)[:40]!r}: accepted: a list of texts, or of documents with a text")
    if not isinstance(checkpoint, Path | str | tuple):
        raise PretrainError(f"checkpoint {type(checkpoint).__name__}: accepted: a path, or (model, tokenizer)")
    check_value("batch_size", batch_size, Count)
    texts = list(texts)
    text = text or _column(checkpoint, texts)
    whole = [document_of(each, text, number) for number, each in enumerate(texts)]
    rows = [(f"text {number}", document) for number, document in enumerate(whole)]
    try:
        if not isinstance(checkpoint, tuple):
            check_first_row(rows, columns_read(newest_checkpoint(checkpoint), text, pair), pair)
        head = open_head(checkpoint, text=text, pair=pair, scores=scores)
        return [added for _, added in predictions(head, rows, batch_size)]
    except PretrainError as error:
        raise PretrainError(
            str(error)
            .replace("--text with", "text with")
            .replace("--pair with", "pair with")
            .replace(", or --on-error skip", "")
        ) from error


def _column(checkpoint: Opened, texts: Sequence[str | Mapping[str, object] | None]) -> str:
    """`text`, or the column of the tables that were trained on, where documents have that and no `text`."""
    first = next((each for each in texts if isinstance(each, Mapping)), {})
    if "text" in first or not first:
        return "text"
    name = checkpoint[0].config._name_or_path or "/none" if isinstance(checkpoint, tuple) else checkpoint
    trained = text_column(newest_checkpoint(name)) if Path(name).exists() else "text"
    return trained if trained in first else "text"
