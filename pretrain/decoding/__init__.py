"""Decoding: `(model, prompts) -> continuations`, or a context manager over the model's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pretrain.core.method import Method

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Decoding(Method):
    """Base of the decoding methods. One that can sample says so with `samples`; only then is it given a temperature."""

    kind: ClassVar[str] = "decoding"
    samples: ClassVar[bool] = False

    def generate(
        self,
        model: PreTrainedModel,
        input_ids_BL: torch.Tensor,
        *,
        attention_mask_BL: torch.Tensor | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        eos: int | None = None,
        pad: int = 0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Continue left-padded prompts; returns `tokens_BN`, prompts included, padded with `pad` after the end."""
        raise NotImplementedError
