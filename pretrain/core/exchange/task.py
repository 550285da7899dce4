"""What the writers of formats are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.core.errors import PretrainError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pretrain.core.processors import Processor

OF = {"numbers": "gguf", "pooling": "sentence-transformers"}  # options, by the format that has them
PACKED = "packed weights have no form in ONNX; accepted: a checkpoint of whole weights (pack: false)"


def check_option(to: str, name: str, before: str = "") -> None:
    """Refuse an option of another format."""
    if to != OF[name]:
        raise PretrainError(f"{before}{name}: {to} has no such option; accepted: with {OF[name]} alone")


@dataclass(frozen=True)
class Export:
    """A model (whose weights a writer may change), its processor, and the options of formats."""

    model: PreTrainedModel
    processor: Processor | None
    source: Path  # the checkpoint
    numbers: str  # of GGUF: f32, f16, bf16, q8_0
    pooling: str  # of sentence-transformers: mean, cls, lasttoken
