"""Evaluations: `(model, tokenizer, documents) -> {metric: value}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pretrain.core.method import Method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Evaluation(Method):
    """Base of the evaluations. `documents` are dicts with `text` and, where known, `domain`."""

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        """The metrics by name."""
        raise NotImplementedError
