"""Codes that fire at every token, whatever the text is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from pretrain.core.errors import PretrainError
from pretrain.core.generation.rows import continue_rows, mask_of, prefill, stepper
from pretrain.core.models.discrete.codebooks import forced
from pretrain.core.models.families import family
from pretrain.decoding import Decoding

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from pretrain.core.generation.options import Options


@dataclass(frozen=True)
class CodeSteering(Decoding):
    """Codebook Features: Sparse and Discrete Interpretability for Neural Networks (arXiv:2310.17230).

    While the prompt is read and continued, each token of a model that `codebook_features` has made has the `codes`,
    each `PLACE:NUMBER` as `code_activations` lists them (`0.attention.13:4670`, `2.feed_forward:17`), in the place of
    as many of its own in that codebook, those of the least cosine, as the authors' code patches them. Without `codes`
    it is plain decoding.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    samples: ClassVar[bool] = True

    codes: tuple[str, ...] = ()

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts; returns `tokens_BN`, padded with `pad` after the end."""
        if not family(model).among(self.families):
            raise PretrainError(
                f"{self.name}: model family {family(model).name!r}: accepted: {', '.join(self.families)}"
            )
        if not self.codes:
            return self._plain(model, input_ids_BL, options)
        with forced(self.name, model, self.codes):
            return self._plain(model, input_ids_BL, options)

    def _plain(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        mask_BL = mask_of(self.name, input_ids_BL, options.attention_mask_BL)
        with torch.no_grad():
            logits_BV, cache = prefill(model, input_ids_BL, mask_BL)
            return continue_rows(input_ids_BL, logits_BV, stepper(model, cache, mask_BL), options)
