"""Of a prompt the last tokens stay in the cache, and those that all tokens attend to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from pretrain.core.bounds import Share
from pretrain.decoding.cache._press import Press, Read

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 256  # queries whose weights are there at once


@dataclass(frozen=True)
class H2O(Press):
    """H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (arXiv:2306.14048).

    Of a prompt of L tokens int(L (1 - `compression_ratio`)) stay: the share `recent` of them, half by default, are
    the last tokens, the others the heavy hitters: those to which the attention weights of all tokens sum up to most,
    the mean of the heads that share a head of keys. The prompt is pruned once, when it has been read, and new tokens
    stay, where the paper goes on dropping one for each. (kvpress has another policy, ObservedAttentionPress: it divides
    each sum by how many tokens see the key, so that early ones weigh less, and keeps no last tokens in any case.)
    """

    recent: Share = 0.5

    def scores(self, layer: Read, kept: int) -> Tensor:
        """The sums of weights; more than any for the last tokens."""
        length = layer.key_GLD.shape[1]
        sum_HL = torch.zeros(len(layer.query_HLD), length, device=layer.key_GLD.device)
        for end in range(length, 0, -BLOCK):  # a block sees no key after its own
            start = max(0, end - BLOCK)
            part = layer._replace(query_HLD=layer.query_HLD[:, :end], key_GLD=layer.key_GLD[:, :end])
            sum_HL[:, :end] += part.weights(end - start).sum(1)
        last = round(kept * self.recent)
        score_GL = layer.by_key(sum_HL)
        return score_GL if last == 0 else functional.pad(score_GL[:, :-last], (0, last), value=length + 1.0)
