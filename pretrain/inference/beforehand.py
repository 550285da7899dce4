"""What is wrong with a question to a checkpoint, told by its records and the file alone, before its model is read."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from pretrain.core.errors import PretrainError, nearest
from pretrain.core.files import read_json
from pretrain.corpus.overlap import RECORD
from pretrain.corpus.sources import Document, Files
from pretrain.corpus.sources._containers import Row
from pretrain.inference.rows import text_in

CONTINUES = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")  # classes of models that predict nothing unless tuned to
LANGUAGE = (None, "causal_lm", "masked_lm")  # objectives that tune to nothing
PROMPTS = {"seq2seq": "prompt", "prompt_classification": "template"}  # where an objective names its columns
TRUTH = {"classification": "label", "regression": "label", "tagging": "tags", "seq2seq": "target",
         "prompt_classification": "label"}  # where an objective has the column of what is true  # fmt: skip
HOLE = "mask"  # in a template, which is no column


def columns_read(checkpoint: Path, text: str, pair: str | None) -> tuple[str, ...]:
    """The columns of a file that a checkpoint's head reads, as far as its record says."""
    trained = _objective(checkpoint)
    prompt = trained.get(PROMPTS.get(str(trained.get("method")), ""))
    if not isinstance(prompt, str):
        pair = pair or trained.get("pair")
        return (text, pair) if pair else (text,)
    names = dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(prompt) if name and name != HOLE)
    return tuple(text if name == "text" else name for name in names)


def check_predicts(checkpoint: Path, label: str | None = None) -> None:
    """Refuse a checkpoint that only continues text, or fills it in; with `label` it is asked for the labels there."""
    place = checkpoint / "config.json"
    config = read_json(place) if place.exists() else {}
    name = str(next(iter(config.get("architectures") or []), ""))
    if "auto_map" in config:  # what a class of its own does is not known by its name
        return
    if name.endswith(CONTINUES) and _objective(checkpoint).get("method") in LANGUAGE:
        raise PretrainError(no_answers(checkpoint, name) if label is None else no_labels(label, name))


def no_answers(checkpoint: Path, name: str) -> str:
    """What is said of a checkpoint whose model, of the class `name`, predicts nothing."""
    return (
        f"{checkpoint} holds a {name}, which predicts no labels or answers; accepted: a classifier, a tagger, a "
        "regressor or a sequence-to-sequence model; a language model continues text: pretrain generate"
    )


def no_labels(label: str, name: str) -> str:
    """What is said where such a model is to be measured by labels."""
    return (
        f"label {label!r}: a {name} predicts none; accepted: a checkpoint that has learnt labels or answers, or no "
        "label, for the likelihood of the text"
    )


def check_first_row(rows: Iterable[Row], columns: Sequence[str], pair: str | None) -> None:
    """Refuse rows of which the first has not the columns that are read."""
    for row in islice(rows, 1):
        for name in columns:
            text_in(row, name, "--pair" if name == pair else "--text")


def check_asked(
    checkpoint: Path, label: str | None, pair: str | None, documents: Sequence[Document], source: Files
) -> None:
    """Refuse documents without what a checkpoint's head is measured by, and labels of a model that gives none."""
    if label is not None:
        check_predicts(checkpoint, label)
    truth = labels_column(checkpoint, label)
    if documents and truth is not None:
        check_columns((*columns_read(checkpoint, "text", pair), truth), documents, source.text, source.files)


def check_columns(columns: Sequence[str], documents: Sequence[Document], text: str, data: str) -> None:
    """Refuse documents of which none has a column that is read; the last column is that of what is true."""
    known = dict.fromkeys(name for document in documents for name in document if name not in ("domain", "id"))
    shown = [name for name in known if name != "text" or text == "text"]  # as the file has them
    for column in columns:
        if column not in known:
            option = "--label" if column == columns[-1] else "--pair"
            raise PretrainError(
                f"{option} {column!r}: {data} has no such column{nearest(column, shown)}; accepted: {option} with "
                f"one of {', '.join(shown)}"
            )


def _objective(checkpoint: Path) -> Mapping[str, Any]:
    """What a checkpoint was last trained by, inside what wraps it; empty where its record says nothing."""
    record = checkpoint / RECORD
    lineage = (read_json(record).get("lineage") or {}) if record.exists() else {}
    objective = lineage.get("objective") or {}
    while "objective" in objective:
        objective = objective["objective"]
        objective = objective if isinstance(objective, Mapping) else {"method": objective}
    return cast("Mapping[str, Any]", objective)


def labels_column(checkpoint: Path, label: str | None) -> str | None:
    """The column of what is true: as it is asked for, or as the checkpoint was trained; None where that is unknown."""
    trained = _objective(checkpoint)
    known = trained.get(TRUTH.get(str(trained.get("method")), ""))
    return label or (str(known) if known else None)
