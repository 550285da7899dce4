"""What the writers of formats are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pretrain.core.processors import Processor


@dataclass(frozen=True)
class Export:
    """A model (whose weights a writer may change), its processor, and the options of formats."""

    model: PreTrainedModel
    processor: Processor | None
    source: Path  # the checkpoint
    numbers: str  # of GGUF: f32, f16, bf16, q8_0
    pooling: str  # of sentence-transformers: mean, cls, lasttoken
