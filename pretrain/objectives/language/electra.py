"""ELECTRA: tell which tokens a small generator has replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ElectraConfig, ElectraForMaskedLM

from pretrain.core.batch import Batch, Context, Row, rows_to_tensors
from pretrain.core.bounds import NonNegative, PositiveShare
from pretrain.core.errors import PretrainError
from pretrain.core.models.attention import attend
from pretrain.core.models.cross_entropy import linear_cross_entropy
from pretrain.core.models.families import Arguments, at, base
from pretrain.objectives import Loss, Objective, summed
from pretrain.objectives._masking import choose_words


@dataclass(frozen=True)
class Electra(Objective):
    """ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators (arXiv:2003.10555).

    A generator of `generator_size` times the width, with the encoder's embeddings, learns to fill `rate` of the tokens
    hidden by the mask token; the encoder sees the tokens that it samples and tells for each whether it is the original.
    Loss: generator's -log p over the hidden + `discriminator_weight` · binary cross-entropy over all tokens; no
    gradient goes through the sampling. The generator and the encoder's binary head are thrown away.
    """

    version: ClassVar[int] = 3  # whole words fill the rate
    families: ClassVar[tuple[str, ...]] = ("bert",)
    task: ClassVar[str] = "base"

    rate: PositiveShare = 0.15
    generator_size: PositiveShare = 0.25
    discriminator_weight: NonNegative = 50.0
    whole_words: bool = False

    @property
    def predicted(self) -> float:
        """The generator's logits are made a second time to sample from: 8 FLOPs a weight, not 6."""
        return self.rate * 8 / 6

    @property
    def effort(self) -> float:
        """The encoder, and the generator: its matrices go by the square of its width, its attention by the width."""
        return 1 + 1.5 * self.generator_size**2

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """`tokens_BL` (the originals), and `hidden_BL`: True where the generator must fill in."""
        vocabulary = context.vocabulary
        if vocabulary.mask is None:
            raise PretrainError("electra: no mask token; accepted: a tokenizer made with mask: true")
        batch = rows_to_tensors(rows, context.length, vocabulary.pad)
        hidden_BL = np.zeros(batch["tokens_BL"].shape, dtype=bool)
        for b, row in enumerate(rows):
            tokens_L = row.tokens_L.astype(np.int64)
            hidden_BL[b, : len(tokens_L)] = choose_words(tokens_L, self.rate, vocabulary, context.rng, self.whole_words)
        batch |= {"hidden_BL": torch.from_numpy(hidden_BL), "mask": torch.tensor(vocabulary.mask)}
        tokens = (batch["document_BL"] > 0).sum()
        return batch | {
            "weight": batch["hidden_BL"].sum(), "weight_discriminator": tokens, "weight_replaced": tokens
        }  # fmt: skip

    def modules(self, model: nn.Module) -> nn.Module:
        """The generator, on the encoder's own embeddings, and the binary head."""
        config = at(model, "config")
        heads = max(1, round(config.num_attention_heads * self.generator_size))
        width = max(heads, round(config.hidden_size * self.generator_size) // heads * heads)
        generator = ElectraForMaskedLM(ElectraConfig(
            vocab_size=config.vocab_size, embedding_size=config.hidden_size, hidden_size=width,
            intermediate_size=max(1, round(config.intermediate_size * self.generator_size)),
            num_hidden_layers=config.num_hidden_layers, num_attention_heads=heads, pad_token_id=config.pad_token_id,
            max_position_embeddings=config.max_position_embeddings, hidden_dropout_prob=config.hidden_dropout_prob,
            attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        ))  # fmt: skip
        shared = at(base(model), "embeddings")
        if getattr(base(model), "pooler", None) is not None:
            at(base(model), "pooler").requires_grad_(
                False
            )  # nothing is asked of it, and processes wait for every gradient
        for name in ("word_embeddings", "position_embeddings"):
            setattr(generator.electra.embeddings, name, getattr(shared, name))
        generator.generator_lm_head.weight = shared.word_embeddings.weight
        width = config.hidden_size
        head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        return nn.ModuleDict({"generator": generator, "head": head})

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """Both losses; parts `generator`, `discriminator`, and the share of `replaced` tokens."""
        assert isinstance(modules, nn.ModuleDict), "electra trains modules beside the model: see `modules`"
        tokens_BL, hidden_BL, present_BL = batch["tokens_BL"], batch["hidden_BL"], batch["document_BL"] > 0
        inputs = attend(model, batch, causal=False)
        masked_BL = torch.where(hidden_BL, batch["mask"], tokens_BL)
        generated, logits_NV = self._generate(modules["generator"], masked_BL, batch, inputs)
        sampled_N = torch.multinomial(logits_NV.float().softmax(-1), 1)[:, 0]
        corrupted_BL = tokens_BL.masked_scatter(hidden_BL, sampled_N)

        states_BLE = base(model)(input_ids=corrupted_BL, **inputs).last_hidden_state
        score_BL = modules["head"](states_BLE)[..., 0].float()
        replaced_BL = corrupted_BL != tokens_BL
        discriminator_loss = nn.functional.binary_cross_entropy_with_logits(
            score_BL[present_BL], replaced_BL[present_BL].float()
        )
        parts = {"generator": generated.detach(), "discriminator": discriminator_loss.detach()}
        parts["replaced"] = replaced_BL.sum() / present_BL.sum()
        return summed({"generator": generated, "discriminator": self.discriminator_weight * discriminator_loss}, parts)

    def _generate(
        self, generator: nn.Module, masked_BL: Tensor, batch: Batch, inputs: Arguments
    ) -> tuple[Tensor, Tensor]:
        """The generator's loss and its logits at the hidden positions."""
        states_BLE = at(generator, "electra")(input_ids=masked_BL, **inputs).last_hidden_state
        states_NE = at(generator, "generator_predictions")(states_BLE[batch["hidden_BL"]])
        head = at(generator, "generator_lm_head")
        weight_VE, bias_V = head.weight, head.bias
        value, _ = linear_cross_entropy(
            states_NE[None], weight_VE, batch["tokens_BL"][batch["hidden_BL"]][None], bias_V=bias_V
        )
        with torch.no_grad():
            logits_NV = states_NE @ weight_VE.T + bias_V
        return value, logits_NV
