"""Causal language modelling that keeps codes near what they stand for: for models that `codebook_features` has changed.

Shape letters: B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from pretrain.core.batch import Batch, Context, Row
from pretrain.core.bounds import NonNegative
from pretrain.core.models.cross_entropy import IGNORE
from pretrain.core.models.discrete.codebooks import coded, errors_of
from pretrain.objectives import Loss, Objective, sum_of
from pretrain.objectives._token_loss import token_loss
from pretrain.objectives.language.causal_lm import CausalLM


@dataclass(frozen=True)
class CodebookLM(Objective):
    """Codebook Features: Sparse and Discrete Interpretability for Neural Networks (arXiv:2310.17230).

    The loss of causal language modelling plus `alpha` times the sum over all codebooks of the mean of ‖y - n‖², y the
    mean of a token's codes and n the activation that they stand for, whose gradient goes to the codes alone: else they
    would grow without bound. `alpha` is 1 in the authors' code (its loss `aeloss`). The mean is over the tokens that
    have a target. Parts: `lm`, `reconstruction`.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    token_weights: ClassVar[bool] = True

    alpha: NonNegative = 1.0

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """As causal language modelling does."""
        return CausalLM().prepare(rows, context)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The loss of the tokens and that of the codes; each target's own loss is without the latter."""
        coded(self.name, model)
        with errors_of(model) as errors:
            plain = token_loss(model, batch, causal=True)
        has_target_BL = batch["target_BL"] != IGNORE
        counts_BL = has_target_BL * batch.get("token_weight_BL", 1)
        missed = (sum_of(errors) * counts_BL).sum() / has_target_BL.sum().clamp(min=1)
        parts = {"lm": plain.value.detach(), "reconstruction": missed.detach()}
        return Loss(plain.value + self.alpha * missed, parts, plain.nll_BL)
