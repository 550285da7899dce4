"""Masked language modelling in which rare entities are read as what is known of them.

Shape letters: B examples, L tokens, E width, N facts of the batch, M tokens of a description, K texts to describe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch, Context, Example, Row
from pretrain.core.bounds import Count, NonNegative, PositiveShare, Share
from pretrain.core.errors import PretrainError
from pretrain.core.models.cross_entropy import IGNORE
from pretrain.core.models.families import at, embeddings
from pretrain.objectives import Loss, Objective, summed
from pretrain.objectives._fine_tuning import examples_of, filled, framed, inputs_of, named
from pretrain.objectives._masking import check_shares
from pretrain.objectives.knowledge._masked import encoded, hidden, masked_loss, new_layer

COLUMNS = ("entity_start", "entity_end", "entity_sign", "entity_relation", "entity_other")


@dataclass(frozen=True)
class DKPLM(Objective):
    """DKPLM: Decomposable Knowledge-enhanced Pre-trained Language Model for Natural Language Understanding (arXiv:2112.01047).

    Knowledge is used while the model is pretrained, and afterwards it is a plain encoder. The operation
    `long_tail_entities` has chosen entities of each text and a fact of each; the embeddings of an entity's tokens are
    replaced by a pseudo token made of the fact's other entity and its relation, by h + r = t of TransE:

        e = t - r where it is the fact's head, h + r where it is its tail
        t, h, r = LN(gelu(W Σ a h)),  a = softmax(v h)

    h the states that the same model gives of the name (of at most `description` tokens), Σ over its tokens. The loss is

        L = L_mlm + decoding_weight · L_decoding

    that of `masked_lm` (nothing of a replaced entity is hidden) and, of each token of a replaced entity, -log p of the
    head of the vocabulary at r ⊙ h, h its state: the fact is to be decoded again. v, W and the norm are trained beside
    the model and thrown away. Without entities the loss is that of `masked_lm`.

    As in the published code the head decodes the entity's own tokens; there t, h and r are learnt before by TransE and
    only projected, r stands at all other positions too, as the projection of ones, and the pseudo token has no
    position. The paper weighs the two losses alike.
    """  # noqa: E501

    families: ClassVar[tuple[str, ...]] = ("bert", "modernbert")
    task: ClassVar[str] = "masked"
    reads: ClassVar[Literal["rows", "examples"]] = "examples"
    fill: ClassVar[Literal["longest", "rows", "apart"]] = "longest"  # what a batch makes of its inputs

    rate: PositiveShare = 0.15
    masked: Share = 0.8
    random: Share = 0.1
    decoding_weight: NonNegative = 1.0
    description: Count = 32
    text: str = "text"

    def __post_init__(self) -> None:
        """Refuse shares of more than all."""
        super().__post_init__()
        check_shares(self.name, self.masked, self.random)

    @property
    def columns(self) -> tuple[str, ...]:
        """The text's, and those of `long_tail_entities`."""
        return (self.text, *COLUMNS)

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """The text."""
        return ((self.text,),)

    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """`masked_lm`'s tensors; `entity_BL`, the fact from 1 that a token is replaced by, its `sign_N`, its other
        entity and relation as rows of `name_KM` (`other_N`, `relation_N`), and `entity_target_BL`."""
        examples = examples_of(rows, self.name)
        batch = inputs_of(framed(context, [str(example.columns[self.text]) for example in examples]), context)
        facts, entity_BL = list[tuple[int, str, str]](), torch.zeros_like(batch["tokens_BL"])
        ends_B = (batch["mask_BL"].sum(-1) - int(context.vocabulary.eos is not None)).tolist()
        for b, example in enumerate(examples):
            for places, fact in self._entities(example, context):
                inside = [place for place in places if place < ends_B[b]]
                if inside:
                    facts.append(fact)
                    entity_BL[b, inside] = len(facts)
        plain_BL = batch["tokens_BL"]
        batch |= hidden(batch, self.rate, self.masked, self.random, context, self.name)
        replaced_BL = entity_BL > 0
        batch["tokens_BL"] = torch.where(replaced_BL, plain_BL, batch["tokens_BL"])
        batch["target_BL"] = batch["target_BL"].masked_fill(replaced_BL, IGNORE)
        batch["weight"] = (batch["target_BL"] != IGNORE).sum()
        batch["entity_BL"], batch["weight_decoding"] = entity_BL, replaced_BL.sum()
        batch["entity_target_BL"] = plain_BL.masked_fill(~replaced_BL, IGNORE)
        return batch | self._facts(facts or [(0, "", "")], context)

    def _entities(self, example: Example, context: Context) -> list[tuple[list[int], tuple[int, str, str]]]:
        """The places of each entity's tokens in the row, and its fact."""
        values = [example.columns.get(column) or [] for column in COLUMNS]
        if len({len(value) for value in values}) > 1:
            raise PretrainError(f"{self.name}: {named(example)}: {', '.join(COLUMNS)}: accepted: lists of one length")
        if not values[0]:
            return []
        assert context.encoder is not None, "framed asks for an encoder"
        _, spans = context.encoder.spans(str(example.columns[self.text]))
        before = int(context.vocabulary.begin is not None)
        entities = []
        for start, end, sign, relation, other in zip(*values, strict=True):
            places = [before + n for n, (first, last) in enumerate(spans) if first < end and last > start]
            entities.append((places, (int(sign), str(relation), str(other))))
        return entities

    def _facts(self, facts: Sequence[tuple[int, str, str]], context: Context) -> Batch:
        assert context.encoder is not None, "framed asks for an encoder"
        texts = [*dict.fromkeys(text for _, relation, other in facts for text in (relation, other))]
        begin = [] if context.vocabulary.begin is None else [context.vocabulary.begin]
        end = [] if context.vocabulary.eos is None else [context.vocabulary.eos]
        ids = [[*begin, *each[: self.description], *end] for each in context.encoder.ids(texts)]
        ids = [each or [context.vocabulary.pad] for each in ids]
        number = {text: place for place, text in enumerate(texts)}
        width = -(-max(map(len, ids)) // 8) * 8
        return {
            "name_KM": filled(ids, context.vocabulary.pad, width),
            "name_mask_KM": filled([[1] * len(each) for each in ids], 0, width),
            "sign_N": torch.tensor([sign for sign, _, _ in facts]),
            "relation_N": torch.tensor([number[relation] for _, relation, _ in facts]),
            "other_N": torch.tensor([number[other] for _, _, other in facts]),
        }

    def modules(self, model: nn.Module) -> nn.Module:
        """What makes vectors of names."""
        return Described(model)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """Both; parts are each without its weight."""
        assert isinstance(modules, Described), f"{self.name} trains a pooler beside the model: see `modules`"
        names = {"tokens_BL": batch["name_KM"], "mask_BL": batch["name_mask_KM"]}
        names["segment_BL"] = torch.zeros_like(batch["name_KM"])
        vector_KE = modules(encoded(model, names), batch["name_mask_KM"])
        relation_NE, other_NE = vector_KE[batch["relation_N"]], vector_KE[batch["other_N"]]
        pseudo_NE = other_NE + batch["sign_N"][:, None] * relation_NE
        place_BL, replaced_BL1 = (batch["entity_BL"] - 1).clamp(min=0), (batch["entity_BL"] > 0)[..., None]
        token_BLE: Tensor = embeddings(model)(batch["tokens_BL"])
        states_BLE = encoded(
            model, batch, inputs_embeds=torch.where(replaced_BL1, pseudo_NE[place_BL].to(token_BLE.dtype), token_BLE)
        )
        masked, nll_BL = masked_loss(model, states_BLE, batch)
        facts = {"target_BL": batch["entity_target_BL"], "weight": batch["weight_decoding"].clamp(min=1)}
        decoding, _ = masked_loss(model, states_BLE * relation_NE[place_BL].to(states_BLE.dtype), facts)
        parts = {"masked_lm": masked.detach(), "decoding": decoding.detach()}
        return summed({"masked_lm": masked, "decoding": self.decoding_weight * decoding}, parts, nll_BL)


class Described(nn.Module):
    """A vector of each name, of the states of its tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        width = at(model, "config").hidden_size
        self.attention, self.layer = new_layer(model, 1), new_layer(model, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, states_KME: Tensor, mask_KM: Tensor) -> Tensor:
        """`vector_KE`."""
        score_KM = self.attention(states_KME).squeeze(-1).masked_fill(mask_KM == 0, -torch.inf)
        pooled_KE = (score_KM.softmax(-1)[..., None] * states_KME).sum(1)
        return self.norm(nn.functional.gelu(self.layer(pooled_KE)))
