"""How few numbers fine-tuning needs: the smallest random subspace that comes near full fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from pretrain.core.batch import Context, Example, Vocabulary, to_device
from pretrain.core.bounds import Count, Positive, PositiveShare, Whole
from pretrain.core.encoding import Encoder
from pretrain.core.errors import PretrainError
from pretrain.core.models.heads import output
from pretrain.evaluation import Evaluation, Measured
from pretrain.evaluation.probes.probe import to_fit
from pretrain.objectives.labelled.classification import Classification
from pretrain.surgery.adapters.intrinsic_dimension import IntrinsicDimension

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document


@dataclass(frozen=True)
class IntrinsicDimensionD90(Evaluation):
    """Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning (arXiv:2012.13255).

    d90 is the smallest of `dimensions` with which a copy of the model, fine-tuned to tell the documents' `label` in a
    subspace of so many numbers (the surgery `intrinsic_dimension`, `said` or not), reaches `share` of the accuracy of a
    copy of which all is trained. In a subspace nothing else is trained: the new last layer stays as drawn. Each
    training is `steps` steps of Adam on `batch` documents, cut to `length` tokens, once for each of `rates` (of
    `subspace_rates`), and the best counts. A hash of its text puts a document on the side to fit or the side to test.
    Metrics: `intrinsic_d90` (not there when no dimension reaches it), `intrinsic_full_accuracy`,
    `intrinsic_accuracy.D` of each dimension, `intrinsic_majority` and `intrinsic_documents`, those tested.
    """

    estimated: ClassVar[bool] = False
    label: str = "label"
    dimensions: tuple[Count, ...] = (100, 200, 500, 1000, 2000)
    said: bool = True
    share: PositiveShare = 0.9
    steps: Count = 200
    batch: Count = 16
    length: Count = 128
    rates: tuple[Positive, ...] = (3e-4, 1e-3)
    subspace_rates: tuple[Positive, ...] = (1e-2, 1e-1)
    seed: Whole = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dimensions or list(self.dimensions) != sorted({*self.dimensions}):
            raise PretrainError(
                f"intrinsic_dimension_d90: dimensions {self.dimensions}: accepted: one or more that rise"
            )
        for name in ("rates", "subspace_rates"):
            if not getattr(self, name):
                raise PretrainError(f"intrinsic_dimension_d90: {name} (): accepted: one or more")

    @property
    def columns(self) -> tuple[str, ...]:
        """The label's."""
        return (self.label,)

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The accuracies and d90; the model stays as it is."""
        known = [d for d in documents if d.get(self.label) is not None and d.get("text")]
        examples = [Example(document, 0, number) for number, document in enumerate(known)]
        fit = [example for example in examples if to_fit(example.columns)]
        test = [example for example in examples if not to_fit(example.columns)]
        if not fit or not test:
            raise PretrainError(
                f"intrinsic_dimension_d90: {len(known)} labelled documents: accepted: more, for two sides"
            )
        objective, vocabulary = Classification(label=self.label), Vocabulary.of(tokenizer)
        labels = objective.labels(example.columns[self.label] for example in examples)
        rng = np.random.default_rng(self.seed)
        context = Context(vocabulary, self.length, rng, encoder=Encoder(tokenizer), labels=labels)
        start = objective.ready(copy.deepcopy(model), labels, vocabulary, self.seed)

        def best(dimension: int | None) -> float:
            rates = self.rates if dimension is None else self.subspace_rates
            return max(self._accuracy(start, objective, fit, test, context, dimension, rate) for rate in rates)

        dimensions = self._possible(start)
        full = best(None)
        accuracies = {dimension: best(dimension) for dimension in dimensions}
        fit_labels = [str(example.columns[self.label]) for example in fit]
        commonest = max(labels, key=fit_labels.count)
        metrics = {f"intrinsic_accuracy.{dimension}": accuracy for dimension, accuracy in accuracies.items()}
        metrics |= {"intrinsic_full_accuracy": full, "intrinsic_documents": float(len(test))}
        metrics["intrinsic_majority"] = sum(str(example.columns[self.label]) == commonest for example in test) / len(
            test
        )
        reached = [dimension for dimension, accuracy in accuracies.items() if accuracy >= self.share * full]
        return Measured(metrics | ({"intrinsic_d90": float(reached[0])} if reached else {}))

    def _possible(self, model: PreTrainedModel) -> list[int]:
        """The dimensions that hold a scale of each matrix and more."""
        scales = IntrinsicDimension(said=self.said).scales(model)
        possible = [dimension for dimension in self.dimensions if dimension > scales]
        if not possible:
            raise PretrainError(
                f"intrinsic_dimension_d90: dimensions {list(self.dimensions)}: accepted: one or more above {scales}, "
                "the number of matrices, each of which has a scale; or said: false"
            )
        return possible

    def _accuracy(
        self,
        start: PreTrainedModel,
        objective: Classification,
        fit: list[Example],
        test: list[Example],
        context: Context,
        dimension: int | None,
        rate: float,
    ) -> float:
        """Of a copy of the model, after its training."""
        model = copy.deepcopy(start).requires_grad_(True)
        if dimension is not None:
            model = IntrinsicDimension(dimension, said=self.said, seed=self.seed)(model)
            last = output(model)
            if last is not None:
                last[1].requires_grad_(False)
        model.train()
        rng = np.random.default_rng(self.seed)  # all copies learn from the same documents in the same order
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.seed)
            for _ in range(self.steps):
                chosen = rng.choice(len(fit), min(self.batch, len(fit)), replace=False)
                batch = to_device(objective.prepare([fit[i] for i in chosen], context), model.device)
                optimizer.zero_grad()
                objective.loss(model, batch).value.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        right = objective.expected(test, context)
        return float(np.mean([a == b for a, b in zip(objective.predictions(model, test, context), right, strict=True)]))
