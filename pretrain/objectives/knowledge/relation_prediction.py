"""Masked language modelling of pairs of descriptions, together with the relation of what they describe.

Shape letters: B pairs, L tokens, R relations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from pretrain.core.batch import Batch, Context, Example, Row
from pretrain.core.bounds import NonNegative, PositiveShare, Share
from pretrain.core.errors import PretrainError, brief, listed
from pretrain.objectives import Loss, Objective, summed
from pretrain.objectives._fine_tuning import examples_of, named, read
from pretrain.objectives._masking import check_shares
from pretrain.objectives.knowledge._masked import encoded, hidden, masked_loss, new_pooled


@dataclass(frozen=True)
class RelationPrediction(Objective):
    """ESCOXLM-R: Multilingual Taxonomy-driven Pre-training for the Job Market Domain (arXiv:2305.12092).

    Continued pretraining on a taxonomy. The input is two descriptions, `begin text end pair end`, with `rate` of the
    tokens chosen as in `masked_lm`, anew each time; the loss is that of masked language modelling and the mean of
    -log p of the pair's `relation` (one of `relations`), with equal weights in the paper:

        L = L_mlm + relation_weight · L_relation,   p = softmax(W tanh(V h_[CLS] + b) + c)

    The pairs are made by `taxonomy_pairs`. V and W are trained beside the model and thrown away. In the authors'
    script: XLM-R large, 30,000 steps of 128 pairs at 1e-5 after a warm-up of 6%, with a weight decay of 0.01.
    """

    families: ClassVar[tuple[str, ...]] = ("bert", "modernbert")
    task: ClassVar[str] = "masked"
    reads: ClassVar[Literal["rows", "examples"]] = "examples"
    fill: ClassVar[Literal["longest", "rows", "apart"]] = "longest"  # what a batch makes of its inputs

    rate: PositiveShare = 0.15
    masked: Share = 0.8
    random: Share = 0.1
    relation_weight: NonNegative = 1.0
    text: str = "text"
    pair: str = "pair"
    relation: str = "relation"
    relations: tuple[str, ...] = ("random", "linked", "grouped")

    def __post_init__(self) -> None:
        """Refuse shares of more than all, and relations among which nothing is to be told."""
        super().__post_init__()
        check_shares(self.name, self.masked, self.random)
        if len({*self.relations}) < max(2, len(self.relations)):
            given = f"relations {list(self.relations)}"
            raise PretrainError(f"{self.name}: {given}: accepted: 2 or more, each once", place=("relations",))

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the two descriptions, and of the relation."""
        return (self.text, self.pair, self.relation)

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """The two descriptions."""
        return ((self.text, self.pair),)

    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """`tokens_BL` with tokens hidden, `target_BL`, `mask_BL`, `segment_BL` and `relation_B`."""
        examples = examples_of(rows, self.name)
        batch = read(examples, self.text, self.pair, context)
        batch |= hidden(batch, self.rate, self.masked, self.random, context, self.name)
        batch["relation_B"] = torch.tensor([self._number(example) for example in examples])
        number = torch.tensor(len(examples))
        return batch | {"weight_relation": number, "weight_accuracy": number}

    def _number(self, example: Example) -> int:
        value = str(example.columns.get(self.relation))
        if value not in self.relations:
            raise PretrainError(
                f"{self.name}: {named(example)}: {self.relation} {brief(value)}: accepted: one of relations "
                f"({listed(self.relations, value)})"
            )
        return self.relations.index(value)

    def modules(self, model: nn.Module) -> nn.Module:
        """The relation's head."""
        return new_pooled(model, len(self.relations))

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """Both losses; parts `masked_lm`, `relation` and the share of relations that are right, `accuracy`."""
        assert modules is not None, "relation_prediction trains a head beside the model: see `modules`"
        states_BLE = encoded(model, batch)
        masked, nll_BL = masked_loss(model, states_BLE, batch)
        logits_BR = modules(states_BLE[:, 0]).float()
        relation = nn.functional.cross_entropy(logits_BR, batch["relation_B"])
        right = (logits_BR.detach().argmax(-1) == batch["relation_B"]).float().mean()
        parts = {"masked_lm": masked.detach(), "relation": relation.detach(), "accuracy": right}
        return summed({"masked_lm": masked, "relation": self.relation_weight * relation}, parts, nll_BL)
