"""Sequences that random networks make of noise, and of one another's sequences.

Shape letters: B rows of the buffer, N those written at a time, L symbols of a row, S those of a seed, V the symbols.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np

from pretrain.core.bounds import Count, Ge, Le, NonNegative, Whole
from pretrain.core.errors import PretrainError
from pretrain.corpus.sources._files import Document, Size, Source
from pretrain.corpus.sources._skipped import Skipped

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn


@dataclass(frozen=True)
class RandomComputation(Source):
    """Universal pre-training by iterated random computation (arXiv:2506.20057): `random_computation` sequences.

    A buffer of rows of `length` symbols, each at first one symbol all along. In each round `reset` rows (so many of one
    symbol, so many of random ones) take the places of others; then a new random LSTM (`layers` of `width`) writes over
    `replaced` rows: it begins with `seed_length` symbols of other rows, from a place that these share, and goes on by
    its likeliest symbol (`temperature` 0, else it draws), reading beside each of its own symbols that of the row which
    it writes over. Its weights are PyTorch's times u^layers, u uniform in `scale` (the authors' code multiplies once
    for each layer), those of the embedding times `embedding_scale`. `drawn` rows of the buffer are then documents.
    `iterated: false` lets the networks read noise alone and never what others wrote (the paper's ablation, for which
    `replaced` is the sum of `reset`); `shuffled` puts each document's symbols in a random order: noise as frequent.

    A document's text has a character for each symbol, its number the symbol: with a tokenizer of `bytes` a token, since
    the default is the 128 of ASCII where the paper has the 256 of a byte, of which half are no text (with `symbols:
    256` those from 128 on are two bytes in UTF-8). The networks' FLOPs are the stage's. What an LSTM does with so large
    weights hangs on the last bits: another processor's documents are others.
    """

    random_computation: Count
    length: Count = 512
    buffer: Count = 2080
    replaced: Count = 104
    drawn: Count = 52
    symbols: Annotated[int, Ge(2), Le(256)] = 128
    width: Count = 128
    layers: Count = 4
    scale: tuple[NonNegative, ...] = (1.0, 3.5)
    embedding_scale: NonNegative = 1e-8
    temperature: NonNegative = 0.0
    seed_length: Count = 8
    reset: tuple[Whole, ...] = (50, 50)
    iterated: bool = True
    shuffled: bool = False
    seed: Whole = 0
    domain: str = "random computation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.scale) != 2 or self.scale[0] > self.scale[1]:
            raise PretrainError(f"scale {list(self.scale)}: accepted: [lowest, highest]")
        if len(self.reset) != 2:
            raise PretrainError(f"reset {list(self.reset)}: accepted: [rows of one symbol, rows of random ones]")
        if self.seed_length >= self.length:
            raise PretrainError(f"seed_length {self.seed_length}: accepted: less than the length of {self.length}")
        for name, rows in (("replaced", self.replaced), ("drawn", self.drawn), ("reset", sum(self.reset))):
            if rows > self.buffer:
                raise PretrainError(f"{name}: {rows} rows: accepted: at most the {self.buffer} of the buffer")
        if not self.iterated and self.replaced != sum(self.reset):
            raise PretrainError(f"replaced {self.replaced}: accepted: without iteration the {sum(self.reset)} of reset")

    @property
    def rounds(self) -> int:
        """How many random networks it takes."""
        return -(-self.random_computation // self.drawn)

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        for number, row_L in enumerate(self._rows()):
            yield {"text": "".join(map(chr, row_L.tolist())), "domain": self.domain, "id": f"{self.seed}:{number}"}

    def size(self) -> Size:
        wide = max(0, self.symbols - 128) / self.symbols  # of a random row's characters, those of two bytes
        return Size((1 + wide) * self.length * self.random_computation, self.random_computation)

    def flops(self) -> float:
        """Those of the products of the networks: of 4 gates by their input and state, and of the head."""
        width, rows = self.width, self.rounds * self.replaced
        gates = 4 * width * (3 * width + 2 * width * (self.layers - 1))
        written = self.length - self.seed_length
        return 2.0 * rows * ((self.length - 1) * gates + written * width * self.symbols)

    def _rows(self) -> Iterator[NDArray[np.int64]]:
        rng, order = np.random.default_rng(self.seed), np.random.default_rng([self.seed, 1])
        buffer_BL = np.tile(rng.integers(self.symbols, size=(self.buffer, 1)), (1, self.length))
        for start in range(0, self.random_computation, self.drawn):
            self._write(buffer_BL, rng)
            for row in rng.choice(self.buffer, self.drawn, replace=False)[: self.random_computation - start]:
                yield order.permutation(buffer_BL[row]) if self.shuffled else buffer_BL[row].copy()

    def _noise(self, length: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """The rows of `reset`: those of one symbol each, then those of random ones."""
        same, random = self.reset
        same_NL = np.tile(rng.integers(self.symbols, size=(same, 1)), (1, length))
        return np.concatenate([same_NL, rng.integers(self.symbols, size=(random, length))])

    def _write(self, buffer_BL: NDArray[np.int64], rng: np.random.Generator) -> None:
        """A round: noise into some rows of the buffer, and what a new network writes into others."""
        if self.iterated:
            noisy = rng.choice(self.buffer, sum(self.reset), replace=False)
            buffer_BL[noisy] = self._noise(self.length, rng)
            sources, over = (rng.choice(self.buffer, self.replaced, replace=False) for _ in range(2))
            start = int(rng.integers(self.length - self.seed_length))
            seed_NS, beside_NL = buffer_BL[sources, start : start + self.seed_length], buffer_BL[over]
        else:
            seed_NS, beside_NL = (self._noise(size, rng) for size in (self.seed_length, self.length))
            over = rng.choice(self.buffer, self.replaced, replace=False)
        chosen = int(rng.integers(2**63)), float(rng.uniform(self.scale[0], self.scale[1]))
        buffer_BL[over] = self._written(seed_NS, beside_NL, *chosen)

    def _written(
        self, seed_NS: NDArray[np.int64], beside_NL: NDArray[np.int64], number: int, scale: float
    ) -> NDArray[np.int64]:
        """What the network of this number writes."""
        import torch

        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(number)
            network = random_network(self.symbols, self.width, self.layers, scale, self.embedding_scale)
            seed, beside = torch.from_numpy(seed_NS), torch.from_numpy(beside_NL)
            return continued(*network, seed, beside, self.temperature).numpy()


Network = tuple["nn.Embedding", "nn.LSTM", "nn.Linear"]


def random_network(symbols: int, width: int, layers: int, scale: float, embedding_scale: float) -> Network:
    """An embedding, an LSTM that reads two symbols at once, and a head, by torch's own random numbers."""
    from torch import nn

    embedding, head = nn.Embedding(symbols, width), nn.Linear(width, symbols)
    lstm = nn.LSTM(2 * width, width, num_layers=layers, batch_first=True)
    for weight in lstm.parameters():
        weight.data *= scale**layers
    embedding.weight.data *= embedding_scale
    return embedding, lstm, head


def continued(
    embedding: nn.Embedding, lstm: nn.LSTM, head: nn.Linear, seed_NS: Tensor, beside_NL: Tensor, temperature: float
) -> Tensor:
    """`seed_NS` and what the network writes after it, as long as `beside_NL`, whose symbols it reads beside its own."""
    import torch

    (rows, start), length = seed_NS.shape, beside_NL.shape[1]
    row_NL = torch.cat([seed_NS, seed_NS.new_zeros(rows, length - start)], 1)
    state, read = None, 0
    for place in range(start, length):
        pair = torch.cat([embedding(row_NL[:, read:place]), embedding(beside_NL[:, read:place])], -1)
        out_N1E, state = lstm(pair, state)
        logits_NV = head(out_N1E[:, -1])
        if temperature:
            choice_N1 = torch.multinomial(torch.softmax(logits_NV / temperature, -1), 1)
        else:
            choice_N1 = logits_NV.argmax(-1, keepdim=True)
        row_NL[:, place : place + 1] = choice_N1
        read = place
    return row_NL
