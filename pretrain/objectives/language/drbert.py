"""DrBERT: a stronger decoder between the encoder and the vocabulary while it is pretrained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch, Context, Row, document_mask
from pretrain.core.bounds import PositiveShare, ProperShare, Share, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.models.attention import attend
from pretrain.core.models.cross_entropy import IGNORE, linear_cross_entropy
from pretrain.core.models.families import at, attention_inputs, base, family, head
from pretrain.objectives import Loss, Objective
from pretrain.objectives._masking import check_shares
from pretrain.objectives.language._encoder_blocks import new_blocks, run
from pretrain.objectives.language.masked_lm import MaskedLM


@dataclass(frozen=True)
class DrBERT(Objective):
    """DrBERT: Unveiling the Potential of Masked Language Modeling Decoder in BERT pretraining (arXiv:2401.15861).

    Masked language modelling in which `layers` further blocks stand between the encoder and the head; they are thrown
    away after training, so that the encoder is a plain BERT. `attention` says which of the chosen positions the decoder
    may attend to: all (`full`), none but oneself (`unmasked`), or, with `gradual`, a random share `revealed` of them in
    its first block and all from the second on (the paper's Gradual Unmasking Attention). The head gets a chosen
    position's state from the encoder with probability `encoder_share`, else from the decoder. Without layers it is
    `masked_lm`.
    """

    version: ClassVar[int] = 2  # whole words fill the rate
    families: ClassVar[tuple[str, ...]] = ("bert",)
    task: ClassVar[str] = "masked"
    token_weights: ClassVar[bool] = True

    rate: PositiveShare = 0.15
    masked: Share = 0.8
    random: Share = 0.1
    whole_words: bool = False
    layers: Whole = 2
    attention: Literal["full", "unmasked", "gradual"] = "gradual"
    revealed: Share = 0.5
    encoder_share: ProperShare = 0.5

    def __post_init__(self) -> None:
        """Refuse shares of the chosen tokens of more than all."""
        super().__post_init__()
        check_shares(self.name, self.masked, self.random)

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """As masked LM's, with `revealed_BL` and `from_encoder_BL`: draws for each position."""
        if context.vocabulary.mask is None:
            raise PretrainError("drbert: no mask token; accepted: a tokenizer made with mask: true")
        plain = MaskedLM(rate=self.rate, masked=self.masked, random=self.random, whole_words=self.whole_words)
        batch = plain.prepare(rows, context)
        draw_2BL = context.rng.random((2, *batch["tokens_BL"].shape))
        batch["revealed_BL"] = torch.from_numpy(draw_2BL[0] < self.revealed)
        batch["from_encoder_BL"] = torch.from_numpy(np.less(draw_2BL[1], self.encoder_share))
        return batch

    def modules(self, model: nn.Module) -> nn.Module | None:
        """The decoder."""
        return new_blocks(model, self.layers) if self.layers else None

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean loss over the chosen tokens, and each one's own."""
        states_BLE = base(model)(input_ids=batch["tokens_BL"], **attend(model, batch, causal=False)).last_hidden_state
        if self.layers:
            mask_B1LL = document_mask(batch["document_BL"], causal=False)
            assert isinstance(modules, nn.ModuleList), "drbert trains a decoder beside the model: see `modules`"
            decoded_BLE = states_BLE
            for number, block in enumerate(modules):
                inputs = attention_inputs(model, mask_B1LL & self._visible(batch, number), batch["position_BL"])
                decoded_BLE = run(model, [block], decoded_BLE, inputs)
            states_BLE = torch.where(batch["from_encoder_BL"][..., None], states_BLE, decoded_BLE)
        states_BLE = at(model, str(family(model).head_transform))(states_BLE)
        weight_VE, bias_V = head(model)
        value, nll_BL = linear_cross_entropy(
            states_BLE, weight_VE, batch["target_BL"], bias_V=bias_V, weight_BL=batch.get("token_weight_BL"),
            targets=int(batch["weight"]),
        )  # fmt: skip
        return Loss(value, {}, nll_BL)

    def _visible(self, batch: Batch, number: int) -> Tensor:
        """`visible_B1LL`: what decoder block `number` may attend to, as far as choosing goes; oneself always."""
        shown_BL = batch["target_BL"] == IGNORE
        if self.attention == "full" or (self.attention == "gradual" and number > 0):
            shown_BL = torch.ones_like(shown_BL)
        elif self.attention == "gradual":
            shown_BL = shown_BL | batch["revealed_BL"]
        oneself_LL = torch.eye(shown_BL.shape[1], dtype=torch.bool, device=shown_BL.device)
        return shown_BL[:, None, None, :] | oneself_LL
