"""Of a prompt that stays in the cache what the queries to come can be expected to attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from pretrain.core.bounds import Count, NonNegative, Whole
from pretrain.decoding.cache._press import Press, Read

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ExpectedAttention(Press):
    """Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution
    (arXiv:2510.00636).

    Queries before their rotation are taken as normal, with the mean and covariance of the prompt's after its first
    `n_sink` tokens; turned by the mean rotation R of the next `n_future_positions` they are N(m, S), and a key k is
    expected to get exp(k·m s + kᵀS k s² / 2), s the attention's scale, as a share of all keys' (without `covariance`
    exp(k·m s)), the mean of the heads that share a head of keys. A token's score is (that + `epsilon`) times the norm
    of its value, unless `value_norm` is off. int(L (1 - `compression_ratio`)) of L tokens stay, the first `n_sink`
    among them. Checked against the authors' code (NVIDIA/kvpress, 8bb29b9).
    """

    n_future_positions: Count = 512
    n_sink: Whole = 4
    covariance: bool = True
    value_norm: bool = True
    epsilon: NonNegative = 0.0

    @property
    def whole(self) -> int:
        """The sinks and one token after them."""
        return self.n_sink + 1

    def scores(self, layer: Read, kept: int) -> Tensor:
        """The expected shares of attention; more than any for the sinks."""
        mean_HD, spread_HDD = self._queries(layer)
        key_HLD = layer.key_GLD[:, self.n_sink :].float().repeat_interleave(layer.groups, 0)
        score_HL = (key_HLD @ mean_HD[..., None])[..., 0] * layer.scaling
        if self.covariance:
            score_HL = score_HL + ((key_HLD @ spread_HDD) * key_HLD).sum(-1) * layer.scaling**2 / 2
        score_GL = layer.by_key(score_HL.softmax(-1))
        if self.value_norm:
            score_GL = (score_GL + self.epsilon) * layer.value_GLD[:, self.n_sink :].float().norm(dim=-1)
        return functional.pad(score_GL, (self.n_sink, 0), value=float(score_GL.max()) + 1)

    def _queries(self, layer: Read) -> tuple[Tensor, Tensor]:
        """The mean and covariance of the queries to come."""
        query_HLD, length = layer.query_HLD.float(), layer.query_HLD.shape[1]
        turn_DD = torch.eye(query_HLD.shape[2], device=query_HLD.device)
        if layer.rotary is not None:
            place_1L = torch.arange(length + self.n_future_positions, device=query_HLD.device)[None]
            cos_1LD, sin_1LD = (angle_1LD.float() for angle_1LD in layer.rotary(query_HLD, place_1L))
            scale_LD = cos_1LD[0].square() + sin_1LD[0].square()  # 1, but where a rotation stretches as well
            back_HLD = query_HLD * cos_1LD[:, :length] - _half_turned(query_HLD) * sin_1LD[:, :length]
            query_HLD = back_HLD / scale_LD[:length]
            cos_D, sin_D = cos_1LD[0, length:].mean(0), sin_1LD[0, length:].mean(0)
            turn_DD = turn_DD * cos_D[:, None] + _half_turned(turn_DD).T * sin_D[:, None]
        query_HLD = query_HLD[:, self.n_sink :]
        mean_HD = query_HLD.mean(1)
        apart_HLD = query_HLD - mean_HD[:, None]
        spread_HDD = apart_HLD.transpose(1, 2) @ apart_HLD / query_HLD.shape[1]
        return mean_HD @ turn_DD.T, turn_DD @ spread_HDD @ turn_DD.T


def _half_turned(states: Tensor) -> Tensor:
    """(-b, a) of (a, b), halves of the last axis: what a rotation's sine goes with."""
    first, second = states.chunk(2, -1)
    return torch.cat([-second, first], -1)
