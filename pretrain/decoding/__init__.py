"""Decoding: `(model, prompts) -> continuations`, or a context manager over the model's cache."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Unpack

from pretrain.core.method import Method

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from pretrain.core.generation.options import OptionFields, Options
    from pretrain.core.processors import Processor


class Decoding(Method):
    """Base of the decoding methods. One that can sample says so with `samples`; only then is it given a temperature.

    One whose tokens are those of plain decoding, sampled ones with the same numbers too, says so with `lossless`
    (in float32: in bfloat16 a pass over several tokens rounds otherwise, and of near ties another may win); one
    that has a way to read more tokens than the model has positions, with `longer`: for others a prompt is cut; one that
    holds less of a checkpoint than `load` does, with `opens`.
    """

    kind: ClassVar[str] = "decoding"
    samples: ClassVar[bool] = False
    lossless: ClassVar[bool] = False
    longer: ClassVar[bool] = False
    opens: ClassVar[bool] = False

    def computed(self, reference: str = "") -> float:
        """Positions that the model, or another that decodes beside it, by its field, computes for each new token."""
        return 1.0

    def load(self, folder: Path, *, device: torch.device) -> tuple[PreTrainedModel, Processor | None]:
        """The checkpoint's model as the method wants it, and its processor, as `core.checkpoint.load` gives them."""
        from pretrain.core.checkpoint import load

        return load(folder, device=device)

    def measured(self, model: PreTrainedModel) -> dict[str, float]:
        """Metrics of what it has done so far with a model that it has opened."""
        return {}

    def generate(self, model: PreTrainedModel, input_ids_BL: Tensor, **options: Unpack[OptionFields]) -> Tensor:
        """Continue left-padded prompts; returns `tokens_BN`, prompts included, padded with `pad` after the end.

        `options` are the fields of `core.generation.options.Options`: `max_new_tokens`, `temperature`, `eos`, …
        """
        from pretrain.core.generation.options import Options

        return self.decode(model, input_ids_BL, Options(**options))

    @abstractmethod
    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """What a method does for `generate`."""
        raise NotImplementedError
