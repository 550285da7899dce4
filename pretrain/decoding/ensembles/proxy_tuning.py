"""A large model decodes as if it had been tuned, by the difference that tuning made to a small one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from pretrain.core.bounds import AnyNumber
from pretrain.core.generation.rows import continue_rows, mask_of, prefill, stepper
from pretrain.core.method import Ref
from pretrain.decoding import Decoding
from pretrain.decoding._beside import beside

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from pretrain.core.generation.options import Options


@dataclass(frozen=True)
class ProxyTuning(Decoding):
    """Tuning Language Models by Proxy (arXiv:2401.08565).

    The next token x is drawn from softmax(s_base(x) + alpha (s_expert(x) - s_anti_expert(x))), s the logits of the
    model, of a small tuned `expert` and of the same small model untuned, `anti_expert`. The paper's alpha is 1. All
    three read the same prompt and the same new tokens, each with a cache of its own, and need the same vocabulary;
    tables may go on with rows of padding. No weight of the model is touched.
    """

    samples: ClassVar[bool] = True
    shares_vocabulary: ClassVar[tuple[str, ...]] = ("expert", "anti_expert")

    expert: Ref
    anti_expert: Ref
    alpha: AnyNumber = 1.0

    def logits(self, base_BV: Tensor, expert_BV: Tensor, anti_expert_BV: Tensor) -> Tensor:
        """The logits that tokens are chosen from."""
        least = min(logits_BV.shape[1] for logits_BV in (base_BV, expert_BV, anti_expert_BV))  # rows of padding go
        return base_BV[:, :least] + self.alpha * (expert_BV[:, :least] - anti_expert_BV[:, :least]).to(base_BV.dtype)

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts with the three models; returns `tokens_BN`, padded with `pad` after the end."""
        mask_BL = mask_of(self.name, input_ids_BL, options.attention_mask_BL)
        three = [model, *beside(self.name, model, expert=self.expert, anti_expert=self.anti_expert)]
        with torch.no_grad():
            begun = [prefill(member, input_ids_BL, mask_BL) for member in three]
            steps = [stepper(member, cache, mask_BL) for member, (_, cache) in zip(three, begun, strict=True)]
            return continue_rows(
                input_ids_BL,
                self.logits(*(logits_BV for logits_BV, _ in begun)),
                lambda token_B: self.logits(*(step(token_B) for step in steps)),
                options,
            )
