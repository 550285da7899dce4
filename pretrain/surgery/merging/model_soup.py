"""Weight averages of models that were fine-tuned from one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core.bounds import AnyNumber, Count, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.folders import corpus_of
from pretrain.core.generation.finite import NotFinite
from pretrain.core.hardware import pick_device
from pretrain.core.method import InnerEvaluation, Ref
from pretrain.core.models.metrics import better
from pretrain.core.quick.vocabulary import check_alike, numbers_of
from pretrain.corpus.store import Corpus
from pretrain.surgery import Inputs, Surgery, report
from pretrain.surgery._merge import check, check_config, mean_into


@dataclass(frozen=True)
class ModelSoup(Surgery):
    """Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time
    (arXiv:2203.05482).

    The ingredients are the stage's checkpoint and its `models`, fine-tuned from one pretrained model. "uniform": θ =
    (1/k) Σ θ_i; with `weights`, of the checkpoint first, θ = Σ w_i θ_i / Σ w_i. "greedy": from the best ingredient to
    the worst by a held-out measure, each joins the mean of those that are in if that makes the measure no worse, so
    that the soup is never worse than the best ingredient; "best": that ingredient alone, what the paper compares with.
    The measure is `metric` of `evaluation` (`held_out`, or with its fields `{method: task, objective: classification}`)
    on at most `max_documents` validation documents of `corpus` in windows of `length` (0: the evaluation's own),
    `better` lower or higher (None: as the metric is). Sums are in float64 and rounded once: a soup of equal models is
    that model, bit for bit. The soup reads text as the checkpoint does. All ingredients are in memory, since each
    candidate is measured; a uniform soup of models that do not fit is `linear_merge`, which streams them.
    """

    version: ClassVar[int] = 2  # which way is better follows from the metric

    recipe: Literal["greedy", "uniform", "best"] = "greedy"
    weights: tuple[AnyNumber, ...] = ()
    corpus: Ref = ""
    evaluation: InnerEvaluation = "held_out"
    metric: str = "loss"
    better: Literal["lower", "higher"] | None = None
    max_documents: Count = 2000
    length: Whole = 0

    def __post_init__(self) -> None:
        """Refuse what fits no recipe."""
        super().__post_init__()
        if self.recipe != "uniform" and self.weights:
            raise PretrainError(f"model_soup: weights {list(self.weights)}: accepted: none with recipe {self.recipe}")
        if self.recipe != "uniform" and not self.corpus:
            raise PretrainError("model_soup: corpus '': accepted: one with validation documents, or recipe uniform")
        if self.weights and abs(sum(self.weights)) < 1e-9:
            raise PretrainError(f"model_soup: weights {list(self.weights)}: accepted: numbers whose sum is not 0")
        if self.recipe != "uniform":
            _ = self.sign
        known = [item.name for item in fields(self.measuring)]
        if self.length and "length" not in known:
            allowed = f"0 with {self.measuring.name}, which has no windows"
            raise PretrainError(f"model_soup: length {self.length}: accepted: {allowed}")

    @property
    def sign(self) -> int:
        """By what the metric is multiplied so that less is better."""
        return 1 if (self.better or better(self.metric)) == "lower" else -1

    @cached_property
    def measuring(self) -> Any:
        """The evaluation."""
        return self.held()["evaluation"]

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """A new model of the averaged weights."""
        inputs = inputs or Inputs()
        others = list(inputs.models)
        if not others:
            raise PretrainError("model_soup: models []: accepted: one or more models besides the checkpoint")
        for number, other in enumerate(others):
            check(self.name, model, other, f"models.{number}")
            check_config(self.name, model.config, other.config, f"models.{number}")
        tokenizers = {f"models.{number}": numbers_of(tokenizer) for number, tokenizer in enumerate(inputs.tokenizers)}
        check_alike(self.name, {"the checkpoint": numbers_of(inputs.tokenizer)} | tokenizers)
        ingredients = [model, *others]
        if len(self.weights) not in (0, 1, len(ingredients)):
            raise PretrainError(
                f"model_soup: weights {list(self.weights)}: accepted: {len(ingredients)}, the checkpoint's first, or 1 "
                "for all"
            )
        soup = copy.deepcopy(model)
        if self.recipe == "uniform":
            mean_into(soup, ingredients, self.weights if self.weights[1:] else [1.0] * len(ingredients))
            return soup
        return self._greedy(soup, ingredients, inputs)

    def _greedy(self, soup: PreTrainedModel, models: list[PreTrainedModel], inputs: Inputs | None) -> PreTrainedModel:
        """The recipe of the paper; measures in `soup`, which holds each candidate in turn."""
        measure, home = self._measure(None if inputs is None else inputs.tokenizer), soup.device
        cast(nn.Module, soup).to(pick_device())  # transformers' stub of `to` takes no device

        def loss(chosen: list[int]) -> float:
            mean_into(soup, [models[i] for i in chosen], [1.0] * len(chosen))
            return measure(soup)

        alone = [loss([i]) for i in range(len(models))]
        for number, measured in enumerate(alone):
            if not math.isfinite(measured):
                label = f"models.{number - 1}" if number else "the checkpoint"
                raise PretrainError(f"model_soup: {self.metric} of {label} is {measured}; accepted: a finite measure")
        order = sorted(range(len(models)), key=alone.__getitem__)
        chosen, best = order[:1], alone[order[0]]
        for candidate in order[1:] if self.recipe == "greedy" else ():
            joined = loss([*chosen, candidate])
            if joined <= best:
                chosen, best = [*chosen, candidate], joined
        mean_into(soup, [models[i] for i in chosen], [1.0] * len(chosen))
        best_alone = self.sign * alone[order[0]]
        metrics = {"ingredients": len(chosen), "best_ingredient": best_alone, "soup": self.sign * best}
        report(inputs, **{f"model_soup/{name}": value for name, value in metrics.items()})
        cast(nn.Module, soup).to(home)
        return soup

    def _measure(self, tokenizer: PreTrainedTokenizerBase | None) -> Callable[[PreTrainedModel], float]:
        """What is minimised: the metric, or its negative, of a model on the held-out documents."""
        if tokenizer is None:
            raise PretrainError("model_soup: the checkpoint has no tokenizer to read the held-out documents with")
        evaluate = replace(self.measuring, length=self.length) if self.length else self.measuring
        columns = dict.fromkeys(("text", "domain", "id", *evaluate.columns))
        documents = Corpus(corpus_of(Path(self.corpus))).sample("validation", self.max_documents, tuple(columns))
        if not documents:
            raise PretrainError(
                f"model_soup: corpus {self.corpus}: no validation documents; accepted: a corpus with some"
            )

        def measure(model: PreTrainedModel) -> float:
            try:
                metrics = evaluate(model.eval(), tokenizer, documents).metrics
            except NotFinite:
                return math.nan
            if self.metric not in metrics:
                raise PretrainError(
                    f"model_soup: metric {self.metric!r}: accepted: {', '.join(metrics)} of {evaluate.name}"
                )
            return self.sign * float(metrics[self.metric])

        return measure
