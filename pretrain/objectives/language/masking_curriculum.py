"""Masked language modelling whose prediction grows harder phase by phase: whole words, more of them, no hints."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import nn

from pretrain.core.batch import Batch, Context, Row
from pretrain.core.bounds import Positive, PositiveShare
from pretrain.core.errors import PretrainError
from pretrain.objectives import Loss, Objective
from pretrain.objectives.language.masked_lm import MaskedLM


@dataclass(frozen=True)
class MaskingCurriculum(Objective):
    """BIOptimus: Pre-training an Optimal Biomedical Language Model with Curriculum Learning for Named Entity Recognition (arXiv:2308.08625).

    Masked language modelling in phases, from what is easy to predict to what is hard. Of each phase `rates` says which
    share of the tokens is chosen, `whole_words` whether as whole words, and `corrupted` whether BERT's corruption is
    used (of the chosen 80% become the mask token, 10% another token, 10% stay; else all are masked). The paper's four:
    tokens, whole words, more of them, and without corruption. `shares` are the phases' shares of training, which the
    paper's table does not say: by default alike. Held-out loss is measured as in the first phase, BERT's own masking,
    so that it can be compared with that of `masked_lm`. Its other half, rows for new tokens: `contextual_rows`.
    """  # noqa: E501

    families: ClassVar[tuple[str, ...]] = ("masked",)
    task: ClassVar[str] = "masked"
    token_weights: ClassVar[bool] = True

    rates: tuple[PositiveShare, ...] = (0.15, 0.15, 0.2, 0.2)
    whole_words: tuple[bool, ...] = (False, True, True, True)
    corrupted: tuple[bool, ...] = (True, True, True, False)
    shares: tuple[Positive, ...] = (1.0, 1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        """Refuse phases of which not everything is said."""
        super().__post_init__()
        if not self.rates:
            raise PretrainError(f"{self.name}: rates []: accepted: one for each phase", place=("rates",))
        for name in ("whole_words", "corrupted", "shares"):
            if len(values := getattr(self, name)) != len(self.rates):
                accepted = f"{len(self.rates)}, as of rates"
                raise PretrainError(f"{self.name}: {name}: {len(values)} phases: accepted: {accepted}", place=(name,))

    @cached_property
    def phases(self) -> tuple[MaskedLM, ...]:
        """The objective of each phase."""
        settings = zip(self.rates, self.whole_words, self.corrupted, strict=True)
        return tuple(
            MaskedLM(rate=rate, whole_words=words, masked=0.8 if corrupted else 1.0, random=0.1 if corrupted else 0.0)
            for rate, words, corrupted in settings
        )

    def phase(self, progress: float) -> MaskedLM:
        """That of the moment at which a share `progress` of training is over."""
        ends = itertools.accumulate(share / sum(self.shares) for share in self.shares)
        return next((phase for phase, end in zip(self.phases, ends, strict=True) if progress < end), self.phases[-1])

    @property
    def predicted(self) -> float:
        """The share of positions with a target, on average over training."""
        return sum(rate * share for rate, share in zip(self.rates, self.shares, strict=True)) / sum(self.shares)

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """As masked LM's of the phase."""
        if context.vocabulary.mask is None:
            raise PretrainError(f"{self.name}: no mask token; accepted: a tokenizer made with mask: true")
        return self.phase(context.progress).prepare(rows, context)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean loss over the chosen tokens."""
        return self.phases[0].loss(model, batch)
