"""What a run is worth: the tokens a weight of its model, the bigram line of its metric, its likelihoods by document.

Shape letters: D documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from pretrain.core import checkpoint
from pretrain.core.files import digest, read_json, sealed, write_json
from pretrain.core.folders import checkpoint_of, corpus_in
from pretrain.core.foreign.weights import header
from pretrain.core.processors import load_processor, tokenizer_in
from pretrain.corpus.shards import tokenise, tokens_key
from pretrain.corpus.store import Corpus
from pretrain.evaluation.likelihood._bigrams import bigram_line
from pretrain.stages import Stage
from pretrain.stages.evaluate import Evaluate, documents_of
from pretrain.stages.train import Train

PER = {"loss": "targets", "bits_per_byte": "bytes"}  # what the nats of a likelihood of text are divided by
# The evaluation that a likelihood is of; of labels there is one target a document.
ROWS = {"loss": "held_out", "bits_per_byte": "held_out", "label_loss": "task", "probe_loss": "probe"}

Rows = list[dict[str, str | float]]  # of `documents.json`


class Regime(TypedDict, total=False):
    """`bigram` is missing where the metric is no likelihood."""

    tokens_per_weight: float
    bigram: float


def regime(stages: Mapping[str, Stage], output: Path, store: Path, trained: str, metric: str) -> Regime:
    """Of the model that the stage `trained` has made; `metric` is STAGE.NAME. The stages lie in `output` by name."""
    folder = checkpoint_of(output / trained)
    tokens = float(checkpoint.lineage(folder).get("tokens", 0))
    row: Regime = {"tokens_per_weight": tokens / max(1, _weights(folder))}
    if (line := line_of(stages, output, store, trained, metric)) is not None:
        row["bigram"] = line
    return row


def line_of(stages: Mapping[str, Stage], output: Path, store: Path, trained: str, metric: str) -> float | None:
    """The bigram line of a metric STAGE.NAME; None where the metric is no likelihood of text."""
    judge, _, name = metric.partition(".")
    stage, training = stages[judge], stages[trained]
    if not (isinstance(stage, Evaluate) and isinstance(training, Train) and name.partition("/")[0] in PER):
        return None
    tokens = float(checkpoint.lineage(checkpoint_of(output / trained)).get("tokens", 0))
    return _bigram_line(stage, training, output, store, name, int(tokens))


def by_document(output: Path, metric: str) -> NDArray[np.float64] | None:
    """`nll_D`: what each document adds to a likelihood, so that the metric is their mean; None for another metric."""
    judge, _, name = metric.partition(".")
    path, evaluation = output / judge / "documents.json", ROWS.get(name.partition("/")[0], "")
    rows: Mapping[str, Rows] = read_json(path) if path.exists() else {}
    return _shares(rows[evaluation], name) if evaluation in rows else None


def _shares(documents: Rows, name: str) -> NDArray[np.float64]:
    kind, _, domain = name.partition("/")
    chosen = [row for row in documents if not domain or row["domain"] == domain]
    nll_D, per_D = (np.array([float(row[key]) for row in chosen]) for key in ("nll", PER.get(kind, "targets")))
    unit = math.log(2) if kind == "bits_per_byte" else 1.0
    return np.asarray(len(chosen) * nll_D / (unit * per_D.sum()))


def _bigram_line(stage: Evaluate, training: Train, output: Path, store: Path, name: str, seen: int) -> float:
    """What counts of adjacent tokens come to on the documents that are judged, from as many as the model has seen."""
    tokenizer = tokenizer_in(load_processor(checkpoint_of(output / str(stage.checkpoint))))
    assert tokenizer is not None, "a likelihood of text without a tokenizer"
    judged, read = (Corpus(corpus_in(output, reference)) for reference in (stage.corpus, training.corpus))
    key = tokens_key(read, tokenizer)
    cut = [] if stage.max_characters is None else [stage.max_characters]
    mark = digest([key, judged.info["fingerprint"], stage.split, stage.max_documents, *cut, name, seen])[:16]
    path = store / ".bigrams" / f"{mark}.json"
    if not path.exists():
        shards = tokenise(read, tokenizer, store / ".tokens" / key, splits=["train"])["train"]
        documents = documents_of(
            judged, stage.split, stage.max_documents, stage.evaluations, tokenizer, stage.max_characters
        )
        line = _shares(bigram_line(shards, tokenizer, documents, seen=seen).documents, name)
        write_json(path, sealed({"bigram": float(line.mean())}))
    return float(read_json(path)["bigram"])


def _weights(folder: Path) -> int:
    """How many numbers a checkpoint's files hold."""
    total = 0
    for path in folder.glob("*.safetensors"):
        total += sum(each.count for each in header(path).values())
    return total
