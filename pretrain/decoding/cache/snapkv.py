"""Of a prompt that stays in the cache what its last tokens attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn import functional

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError
from pretrain.decoding.cache._press import Press, Read

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SnapKV(Press):
    """SnapKV: LLM Knows What You are Looking for Before Generation (arXiv:2404.14469).

    The last `window_size` tokens of a prompt, and of those before them the ones that they attend to most: the mean of
    their attention weights, smoothed by an average over `kernel_size` neighbours, the mean of the heads that share a
    head of keys. int(L (1 - `compression_ratio`)) tokens stay in all, the window at least. Checked against kvpress
    (NVIDIA/kvpress, 8bb29b9).
    """

    window_size: Count = 64
    kernel_size: Count = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_size % 2 == 0:
            raise PretrainError(f"snapkv: kernel_size {self.kernel_size}: accepted: an odd number")

    @property
    def whole(self) -> int:
        """The window, which always stays."""
        return self.window_size

    def scores(self, layer: Read, kept: int) -> Tensor:
        """What the window attends to; more than that for its own tokens."""
        weight_HL = layer.weights(self.window_size)[..., : -self.window_size].mean(1)
        smooth_HL = functional.avg_pool1d(weight_HL, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        score_GL = layer.by_key(smooth_HL)
        return functional.pad(score_GL, (0, self.window_size), value=float(score_GL.max()) + 1)
