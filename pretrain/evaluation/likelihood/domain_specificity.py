"""How much of a domain a task is: what pretraining on the domain has done for the likelihood of its examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from pretrain.core.bounds import Count, PositiveShare, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.folders import checkpoint_of
from pretrain.core.method import Ref
from pretrain.evaluation import Evaluation, Measured
from pretrain.evaluation._intervals import bounds, bounds_of_means, resampled_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document

SCORE = "domain_specificity"


@dataclass(frozen=True)
class DomainSpecificity(Evaluation):
    """When Does Pretraining Help? Assessing Self-Supervised Learning for Law and the CaseHOLD Dataset (arXiv:2104.08671).

    The domain specificity of a task, by which the paper foretells what pretraining on the domain gains on it: the mean
    over the task's examples x of L_general(x) - L_domain(x), the pretraining losses of the checkpoint `general` and of
    the one that is measured, which went on from it, or began as it did, on text of the domain. Above 0 the examples are
    likelier to the model of the domain. L is the mean loss in nats over the tokens of an example, of which masked
    models hide `rate`, the same for both (`masked_loss`), and causal ones predict all (`held_out`). An example's text
    is that of the columns `texts` one below the other, of lists each of their values. Two models of one tokenizer:
    the losses of others are of other tokens. `general_loss` and `domain_loss` stand beside. Intervals: bootstrap over
    examples. The authors' script takes for L the loss on the task's labels under a head that has not been tuned.
    """  # noqa: E501

    families: ClassVar[tuple[str, ...]] = ("causal", "masked")
    shares_vocabulary: ClassVar[tuple[str, ...]] = ("general",)

    general: Ref
    texts: tuple[str, ...] = ("text",)
    rate: PositiveShare = 0.15
    length: Whole = 0
    resamples: Count = 1000
    seed: Whole = 0

    def __post_init__(self) -> None:
        """Refuse examples of nothing."""
        super().__post_init__()
        if not self.texts:
            raise PretrainError(f"{self.name}: texts []: accepted: at least one column", place=("texts",))

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the examples' texts."""
        return self.texts

    @property
    def passes(self) -> float:
        """Both models read each document."""
        return 2.0

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on documents with all of `texts`."""
        from pretrain.core import checkpoint

        chosen = [d for d in documents if all(d.get(column) is not None for column in self.texts)]
        examples: list[Document] = [
            {"text": self.text_of(d), "domain": d.get("domain", "text"), "id": d.get("id")} for d in chosen
        ]
        general, other = checkpoint.load(checkpoint_of(Path(self.general)), device=str(model.device))
        if other is None or other.get_vocab() != tokenizer.get_vocab():
            raise PretrainError(
                f"{self.name}: general {self.general}: another tokenizer than the model's; accepted: a checkpoint with "
                "the same one", place=("general",),
            )  # fmt: skip
        loss_N2 = np.stack([self.losses(each, tokenizer, examples) for each in (general, model)], axis=1)
        kept = np.flatnonzero(np.isfinite(loss_N2).all(1))
        if not len(kept):
            raise PretrainError(
                f"{self.name}: none of {len(documents)} documents has {', '.join(self.texts)} with a token to predict; "
                "accepted: at least one"
            )
        loss_N2, names = loss_N2[kept], [str(examples[n]["domain"]) for n in kept]
        score_N = loss_N2[:, 0] - loss_N2[:, 1]
        means_R3 = resampled_sums(np.column_stack([score_N, loss_N2]), self.resamples, self.seed) / len(kept)
        metrics = (SCORE, "general_loss", "domain_loss")
        whole = dict(zip(metrics, map(float, (score_N.mean(), *loss_N2.mean(0))), strict=True))
        by_domain = {
            name: {SCORE: float(score_N[np.array(names) == name].mean())} for name in sorted({*names})
        }  # fmt: skip
        rows: list[dict[str, str | float]] = [
            {"domain": name, SCORE: float(score)} for name, score in zip(names, score_N, strict=True)
        ]
        return Measured(
            whole, by_domain, {name: bounds(means_R3[:, k]) for k, name in enumerate(metrics)}, rows,
            domain_intervals=bounds_of_means(SCORE, score_N, names, self.resamples, self.seed),
        )  # fmt: skip

    def text_of(self, document: Document) -> str:
        """What of a document is read."""
        values = [document[column] for column in self.texts]
        lists = [value if isinstance(value, list | tuple) else [value] for value in values]
        return "\n".join(str(part) for each in lists for part in each)

    def losses(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Document]
    ) -> NDArray[np.float64]:
        """The mean loss of each example in nats a token; not a number where it has no token to predict."""
        from pretrain.core.models.families import family
        from pretrain.evaluation.likelihood.held_out import HeldOut
        from pretrain.evaluation.likelihood.masked_loss import MaskedLoss

        if not any(example["text"] for example in examples):
            return np.full(len(examples), np.nan)
        method: Evaluation = (
            HeldOut(length=self.length, resamples=1)
            if family(model).causal
            else MaskedLoss(rate=self.rate, length=self.length, resamples=1, seed=self.seed)
        )
        rows = method(model, tokenizer, examples).documents
        nll_N, targets_N = (np.array([float(row[name]) for row in rows]) for name in ("nll", "targets"))
        return np.where(targets_N > 0, nll_N / np.maximum(targets_N, 1), np.nan)
