"""Constrained Word2Vec: skip-gram in which each new vector is a mixture of the old ones, and only mixtures are learnt.

Shape letters: P pairs, K negatives, V old tokens, N new tokens, R rank, E width, T tokens of text. Tokens are numbered
0 … V - 1 (old), V … V + N - 1 (new).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pretrain.core.errors import PretrainError

CHUNK = 512  # new tokens whose mixtures are made at once


@dataclass(frozen=True)
class Settings:
    """The hyperparameters of the skip-gram model."""

    rank: int
    window: int
    negatives: int
    threshold: float
    lr: float
    batch_size: int
    epochs: int


class Mixture:
    """softmax(left_NR @ right_RV): the shares that new tokens have of the old ones, and the vectors of both."""

    def __init__(self, old_VE: Tensor, count: int, rank: int, source: torch.Generator) -> None:
        self.old_VE, device = old_VE, old_VE.device
        self.left_NR = torch.rand(count, rank, generator=source).to(device).requires_grad_()
        self.right_RV = torch.rand(rank, len(old_VE), generator=source).to(device).requires_grad_()

    def shares(self, new: Tensor) -> Tensor:
        """The shares of some of the new tokens, numbered from 0."""
        return torch.softmax(self.left_NR[new] @ self.right_RV, dim=-1)

    def __call__(self, tokens: Tensor) -> Tensor:
        """The vectors of tokens in any shape."""
        count, is_new = len(self.old_VE), tokens >= len(self.old_VE)
        new, where = torch.unique(tokens[is_new] - count, return_inverse=True)
        vectors = F.embedding(tokens.clamp(max=count - 1), self.old_VE)
        mixed = [checkpoint(self._mixed, chunk, use_reentrant=False) for chunk in new.split(CHUNK)]
        return vectors.masked_scatter(is_new[..., None], torch.cat(mixed)[where])

    def _mixed(self, new: Tensor) -> Tensor:
        """The vectors of some of the new tokens; their shares, new times old ones, are made again on the way back."""
        return self.shares(new) @ self.old_VE

    @torch.no_grad()
    def applied(self, values_VX: Tensor) -> Tensor:
        """What the new tokens get of any values of the old ones."""
        numbers = torch.arange(len(self.left_NR), device=self.old_VE.device)
        return torch.cat([self.shares(chunk) @ values_VX for chunk in numbers.split(CHUNK)])


def train(
    texts: Sequence[NDArray[np.int64]], old_VE: Tensor, head_VE: Tensor | None, count: int, settings: Settings,
    source: torch.Generator,
) -> tuple[Mixture, Mixture, list[float]]:  # fmt: skip
    """Learn the mixtures of the embeddings and of the head (the same one where it is tied), and each epoch's loss.

    For a pair of a token i and a neighbour o, with negatives n: -ln σ(v_o · w_i) - Σ_n ln σ(-v_n · w_i).
    """
    inner = Mixture(old_VE, count, settings.rank, source)
    outer = inner if head_VE is None else Mixture(head_VE, count, settings.rank, source)
    factors = [x for mixture in dict.fromkeys((inner, outer)) for x in (mixture.left_NR, mixture.right_RV)]
    optimiser = torch.optim.Adam(factors, lr=settings.lr)
    counts = np.bincount(np.concatenate([*texts, np.zeros(0, np.int64)]), minlength=len(old_VE) + count)
    noise = torch.from_numpy(counts.astype(np.float64) ** 0.75)
    pair_P2 = pairs(texts, counts, settings, np.random.default_rng(int(source.initial_seed())))
    if not len(pair_P2):
        raise PretrainError("cw2v: the corpus has no two tokens beside each other; accepted: documents of more tokens")
    losses = []
    for _ in range(settings.epochs):
        total = 0.0
        for chosen in torch.randperm(len(pair_P2), generator=source).split(settings.batch_size):
            pair = torch.from_numpy(pair_P2[chosen.numpy()]).long()
            drawn = torch.multinomial(noise, len(pair) * settings.negatives, replacement=True, generator=source)
            tokens = torch.cat([pair[:, 1:], drawn.view(len(pair), -1)], dim=1).to(old_VE.device)
            loss = _loss(inner(pair[:, 0].to(old_VE.device)), outer(tokens))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(pair)
        losses.append(total / len(pair_P2))
    return inner, outer, losses


def _loss(w_PE: Tensor, v_PKE: Tensor) -> Tensor:
    """Of each pair the neighbour is the first of `v_PKE`, the rest are negatives."""
    score_PK = torch.einsum("pe,pke->pk", w_PE, v_PKE)
    sign = torch.ones_like(score_PK)
    sign[:, 1:] = -1
    return -F.logsigmoid(sign * score_PK).sum(1).mean()


def pairs(
    texts: Sequence[NDArray[np.int64]], counts: NDArray[np.int64], settings: Settings, rng: np.random.Generator
) -> NDArray[np.int32]:
    """The pairs (token, neighbour) at most `window` apart; a token of c occurrences is passed over with probability
    1 - √(threshold / c) as the first of a pair."""
    parts = [np.zeros((0, 2), np.int32)]
    for text_T in texts:
        kept_T = rng.random(len(text_T)) < np.sqrt(settings.threshold / np.maximum(counts[text_T], 1))
        for distance in range(1, min(settings.window, len(text_T) - 1) + 1):
            both = np.stack([text_T[:-distance], text_T[distance:]], axis=1).astype(np.int32)
            parts += [both[kept_T[:-distance]], both[kept_T[distance:], ::-1]]
    return np.concatenate(parts)
