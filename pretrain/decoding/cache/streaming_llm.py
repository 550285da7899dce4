"""A prompt's first tokens and its last ones stay in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pretrain.core.bounds import Whole
from pretrain.decoding.cache._press import Press, Read

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StreamingLLM(Press):
    """Efficient Streaming Language Models with Attention Sinks (arXiv:2309.17453).

    Of a prompt of L tokens the first `n_sink` stay in the cache, attention sinks, and as many of the last as make
    int(L (1 - `compression_ratio`)) with them. The prompt is pruned once, when it has been read, as in kvpress: keys
    keep their positions and new tokens stay, where the paper moves the positions together and goes on dropping.
    Checked against kvpress (NVIDIA/kvpress, 8bb29b9).
    """

    n_sink: Whole = 4

    @property
    def whole(self) -> int:
        """The sinks and one token after them."""
        return self.n_sink + 1

    def scores(self, layer: Read, kept: int) -> Tensor:
        """1 for what stays, 0 for the others."""
        score_GL = torch.ones_like(layer.key_GLD[..., 0])
        score_GL[:, self.n_sink : layer.key_GLD.shape[1] - kept + self.n_sink] = 0
        return score_GL
