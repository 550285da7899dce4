"""Random numbers of surgeries."""

from __future__ import annotations

import torch

from pretrain.core.files import digest
from pretrain.surgery import Inputs


def generator(name: str, inputs: Inputs | None) -> torch.Generator:
    """A generator for the surgery `name`: the run's seed alone would repeat the numbers that made the model."""
    seed = (inputs or Inputs()).seed
    return torch.Generator().manual_seed(int(digest([name, seed])[:15], 16))
