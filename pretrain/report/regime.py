"""What a run is worth: the tokens a weight of its model, the bigram line of its metric, its likelihoods by document.

Shape letters: D documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from pretrain.core import checkpoint
from pretrain.core.files import digest, read_json, read_object, sealed, write_json
from pretrain.core.folders import checkpoint_of, corpus_in
from pretrain.core.foreign.weights import header
from pretrain.core.processors import load_processor, tokenizer_in
from pretrain.corpus.shards import tokenise, tokens_key
from pretrain.corpus.store import Corpus
from pretrain.evaluation.likelihood._bigrams import bigram_lines
from pretrain.stages import Stage
from pretrain.stages.evaluate import Evaluate, documents_of
from pretrain.stages.train import Train
from pretrain.training.budget import MOST_HELD_OUT

PER = {"loss": "targets", "bits_per_byte": "bytes"}  # what the nats of a likelihood of text are divided by
# The evaluation that a likelihood is of; of labels there is one target a document.
ROWS = {"loss": "held_out", "bits_per_byte": "held_out", "label_loss": "task", "probe_loss": "probe"}

WHOLE = 20_000_000  # tokens of a corpus that are counted at most where all are asked for

Rows = list[dict[str, str | float]]  # of `documents.json`


class Line(TypedDict):
    """What counts of adjacent tokens come to on the documents that are judged, and on those of each domain."""

    bigram: float
    domains: NotRequired[dict[str, float]]


class Regime(TypedDict, total=False):
    """`bigram` is missing where the metric is no likelihood."""

    tokens_per_weight: float
    bigram: float


def regime(stages: Mapping[str, Stage], output: Path, store: Path, trained: str, metric: str) -> Regime:
    """Of the model that the stage `trained` has made; `metric` is STAGE.NAME. The stages lie in `output` by name."""
    folder = checkpoint_of(output / trained)
    tokens = float(checkpoint.lineage(folder).get("tokens", 0))
    row: Regime = {"tokens_per_weight": tokens / max(1, _weights(folder))}
    if lines := lines_of(stages, output, store, trained, metric):
        row["bigram"] = lines[0]["bigram"]
    return row


def lines_of(
    stages: Mapping[str, Stage], output: Path, store: Path, trained: str, metric: str, whole: bool = False
) -> list[Line]:
    """The bigram line of a metric STAGE.NAME; none where the metric is no likelihood of text.

    It is of as many tokens as the training has read; with `whole` it has its domains too, and a second one is of all
    training text, or of `WHOLE` tokens of it. Of a model that went on from another on other text than is judged there
    is none with `whole`: counts of that text alone say nothing of what it has learnt before.
    """
    judge, _, name = metric.partition(".")
    stage, training = stages[judge], stages[trained]
    if not (isinstance(stage, Evaluate) and isinstance(training, Train) and name.partition("/")[0] in PER):
        return []
    if whole and training.init and stage.corpus != training.corpus:
        return []
    tokens = _read_by(output / trained)
    seen = [tokens, *([max(tokens, WHOLE)] if whole else [])]
    return _bigram_lines(stage, training, output, store, name, seen, whole)


def training_line(training: Train, output: Path, store: Path) -> dict[str, float]:
    """The bigram line of the held-out metrics that a training of text logs, of as many tokens as it has read."""
    from pretrain.evaluation.likelihood._shards import shard_line

    folder = checkpoint_of(output / training.name)
    tokenizer, corpus = tokenizer_in(load_processor(folder)), Corpus(corpus_in(output, training.corpus))
    if tokenizer is None:  # it learns something else than text
        return {}
    places = store / ".tokens" / tokens_key(corpus, tokenizer)
    shards = tokenise(corpus, tokenizer, places, splits=["train", "validation"])
    seen = _read_by(output / training.name)
    most = training.evaluate_tokens if isinstance(training.evaluate_tokens, int) else MOST_HELD_OUT
    return shard_line(shards["train"], shards["validation"], seen=seen, length=training.length, max_tokens=most)


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


def _bigram_lines(
    stage: Evaluate, training: Train, output: Path, store: Path, name: str, seen: Sequence[int], apart: bool
) -> list[Line]:
    """What counts of so many adjacent tokens come to on the documents that are judged, which are tokenised once.

    `apart` is whether the domains are wanted, each by itself.
    """
    tokenizer = tokenizer_in(load_processor(checkpoint_of(output / str(stage.checkpoint))))
    assert tokenizer is not None, "a likelihood of text without a tokenizer"
    judged, read = (Corpus(corpus_in(output, reference)) for reference in (stage.corpus, training.corpus))
    key = tokens_key(read, tokenizer)
    cut = [] if stage.max_characters is None else [stage.max_characters]
    which = [key, judged.info["fingerprint"], stage.split, stage.max_documents, *cut, name]
    paths = {count: store / ".bigrams" / f"{digest([*which, count])[:16]}.json" for count in seen}
    lines = {count: _stored(path) for count, path in paths.items()}
    if missing := [count for count, line in lines.items() if line is None or (apart and "domains" not in line)]:
        shards = tokenise(read, tokenizer, store / ".tokens" / key, splits=["train"])["train"]
        documents = documents_of(
            judged, stage.split, stage.max_documents, stage.evaluations, tokenizer, stage.max_characters
        )
        for count, counted in zip(missing, bigram_lines(shards, tokenizer, documents, missing), strict=True):
            domains = sorted({str(row["domain"]) for row in counted.documents}) if "/" not in name else []
            by_domain = {each: float(_shares(counted.documents, f"{name}/{each}").mean()) for each in domains}
            lines[count] = made = Line(bigram=float(_shares(counted.documents, name).mean()), domains=by_domain)
            write_json(paths[count], sealed(dict(made)))
    return [line for count in seen if (line := lines[count]) is not None]


def _stored(path: Path) -> Line | None:
    """A line that was counted before."""
    return cast("Line", read_json(path)) if path.exists() else None


def _read_by(stage: Path) -> int:
    """The tokens that a training has read: of a model that went on from another without what that had read before."""
    tokens = read_object(stage / "stage.json").get("metrics", {}).get("tokens")
    return int(checkpoint.lineage(checkpoint_of(stage)).get("tokens", 0) if tokens is None else tokens)


def _weights(folder: Path) -> int:
    """How many numbers a checkpoint's files hold."""
    total = 0
    for path in folder.glob("*.safetensors"):
        total += sum(each.count for each in header(path).values())
    return total
