"""Write each document into a prompt's template with its label's word, known or predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrain.core import checkpoint
from pretrain.core.batch import Context, Example, Vocabulary
from pretrain.core.bounds import Whole
from pretrain.core.checkpoint import lineage
from pretrain.core.encoding import Encoder
from pretrain.core.errors import PretrainError
from pretrain.core.files import JSONObject, digest
from pretrain.core.folders import checkpoint_of
from pretrain.core.hardware import pick_device
from pretrain.core.meter import count_flops
from pretrain.core.method import InnerObjective, Ref
from pretrain.data import DataOperation
from pretrain.data._columns import check_columns, check_filled
from pretrain.data._work import desk, stamps

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from pretrain.data._work import Desk
    from pretrain.objectives.labelled.prompt_classification import PromptClassification

SHARD = 512  # documents
Document = dict[str, object]  # its columns


@dataclass(frozen=True)
class PromptTemplate(DataOperation):
    """Don't Stop Pretraining? Make Prompt-based Fine-tuning Powerful Learner (arXiv:2305.01711).

    Prompt-based continued pretraining: a document's text becomes the template of `prompt`, a prompt_classification,
    filled with its columns and the word of its label, and ordinary masked_lm or causal_lm goes on with such texts
    before the prompt is tuned. The label is the document's own or, where it has none, what `model` predicts, a
    checkpoint tuned with the same prompt; with `relabel` it predicts all. It reads `length` tokens (0: as many as it
    was tuned with). Without a model each document must have its label.
    """

    prompt: InnerObjective
    model: Ref = ""
    relabel: bool = False
    length: Whole = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective.name != "prompt_classification":
            raise PretrainError(
                f"prompt_template: prompt {self.objective.name!r}: accepted: {{method: prompt_classification, …}}",
                place=("prompt",),
            )
        if self.objective.demonstrations:
            raise PretrainError("prompt_template: prompt demonstrations: accepted: false", place=("prompt",))
        if self.relabel and not self.model:
            raise PretrainError("prompt_template: relabel: accepted: with a model that predicts", place=("relabel",))

    @cached_property
    def objective(self) -> PromptClassification:
        """The prompt."""
        return self.held()["prompt"]

    def __call__(self, corpus: Dataset) -> Dataset:
        """The documents in the template, other columns as they were."""
        check_columns(self.name, corpus, self.objective.shown)
        with desk() as here:
            labels = self.labels(corpus, here)
            texts = []
            for number, (document, label) in enumerate(zip(corpus, labels, strict=True)):
                check_filled(self.name, number, document, self.objective.shown)
                texts.append(self.objective.filled(document, label))
            words = {f"{label} ({self.objective.word_of[label].strip()})": n for label, n in Counter(labels).items()}
            here.reports.append({"method": self.name, "labels": dict(sorted(words.items()))})
        return corpus.remove_columns("text").add_column("text", texts)

    def labels(self, corpus: Dataset, here: Desk) -> list[str]:
        """Each document's label: its own where that counts, else the model's."""
        column = self.objective.label
        labels: list[str | int | None] = [None] * len(corpus)
        if column in corpus.column_names and not self.relabel:
            labels = list(corpus[column])
        unlabelled = [number for number, label in enumerate(labels) if label is None]
        if unlabelled and not self.model:
            raise PretrainError(
                f"prompt_template: document {unlabelled[0]} has no {column!r}; accepted: one in each, or a model that "
                "predicts it"
            )
        self.objective.labels(label for label in labels if label is not None)
        predictor: _Predictor | None = None
        for start in range(0, len(unlabelled), SHARD):
            predictor = predictor or _Predictor(self.objective, self.model, self.length)
            numbers = unlabelled[start : start + SHARD]
            documents = [{name: corpus[number][name] for name in self.objective.shown} for number in numbers]
            for number, label in zip(numbers, predictor(documents, here), strict=True):
                labels[number] = label
        return [str(label) for label in labels]


class _Predictor:
    """The checkpoint that predicts; what is on the desk already is not predicted again."""

    def __init__(self, objective: PromptClassification, folder: str, length: int) -> None:
        self.path = checkpoint_of(Path(folder))
        self.objective, self.length = objective, length or lineage(self.path).get("length") or 512
        self.state = stamps(self.path)
        self.opened: tuple[PreTrainedModel, Context] | None = None

    def __call__(self, documents: Sequence[Document], here: Desk) -> list[str]:
        """The documents' labels."""
        key = [str(self.path.resolve()), self.state, self.length, asdict(self.objective), list(documents)]

        def predict() -> JSONObject:
            labels, flops = count_flops(lambda: self._predict(documents))
            return {"labels": labels, "flops": flops}

        return here.kept(digest(key)[:32], predict)["labels"]

    def _predict(self, documents: Sequence[Document]) -> list[str]:
        if self.opened is None:
            model, tokenizer = checkpoint.load(self.path, device=pick_device())
            if tokenizer is None:
                raise PretrainError(f"{self.path} has no tokenizer; accepted: a checkpoint that holds one")
            vocabulary = Vocabulary.of(tokenizer)
            self.objective.ready(model, (), vocabulary, 0)
            rng = np.random.default_rng(0)
            self.opened = model, Context(vocabulary, self.length, rng, encoder=Encoder(tokenizer))
        model, context = self.opened
        examples = [Example(document, 0, number) for number, document in enumerate(documents)]
        return self.objective.predictions(model, examples, context)
