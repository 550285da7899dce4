"""Uniform grids of integers for weights, and integers packed into 32-bit words.

Shape letters: O outputs, I inputs, G groups of inputs, C inputs of one group, R rows of words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pretrain.core.bounds import Count

GroupSize = Literal[-1] | Count  # how many inputs of a row share a grid; -1: all
WORD = 32
ROUNDED = 17.0  # plain operations on a number that is rounded to the nearest point of its group's grid
SMALLEST, LARGEST = 2.0**-24, 65504.0  # of float16, in which scales are kept


@dataclass(frozen=True)
class Quantised:
    """A matrix on its grid: `scale_OG[:, g] * (code_OI - zero_OG[:, g])`, `g = group_I[i]` the group of input i.

    Codes are bytes: with a matrix of each layer at hand, floats would be as much as the model once more.
    """

    code_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    group_I: Tensor

    def dense(self) -> Tensor:
        """The weights that the codes stand for."""
        scale_OI, zero_OI = self.scale_OG[:, self.group_I], self.zero_OG[:, self.group_I]
        return scale_OI * (self.code_OI - zero_OI)


def grid(weight_OC: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """`scale_O` and `zero_O` of the min-max grid of each row; 0 is on the grid, and scales are float16 numbers."""
    low_O, high_O = weight_OC.amin(1).clamp(max=0), weight_OC.amax(1).clamp(min=0)
    if symmetric:
        high_O = torch.maximum(-low_O, high_O)
        low_O = -high_O
    empty_O = low_O == high_O
    low_O, high_O = low_O.masked_fill(empty_O, -1), high_O.masked_fill(empty_O, 1)
    scale_O = ((high_O - low_O) / (2**bits - 1)).clamp(SMALLEST, LARGEST)
    scale_O = scale_O.half().to(weight_OC.dtype)
    if symmetric:
        return scale_O, torch.full_like(scale_O, 2 ** (bits - 1))
    return scale_O, torch.round(-low_O / scale_O).clamp(0, 2**bits - 1)


def nearest(weight_OC: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The code of the grid point next to each weight; `scale` and `zero` broadcast."""
    return torch.clamp(torch.round(weight_OC / scale) + zero, 0, 2**bits - 1)


def groups_of(inputs: int, group_size: int) -> int:
    """How many groups there are; a size of -1 is one group, and the last may be smaller."""
    return 1 if group_size == -1 else -(-inputs // group_size)


def round_to_nearest(weight_OI: Tensor, bits: int, group_size: int, symmetric: bool) -> Quantised:
    """Each weight to the nearest point of its group's grid."""
    inputs = weight_OI.shape[1]
    size = inputs if group_size == -1 else group_size
    group_I = torch.arange(inputs, device=weight_OI.device) // size
    pairs = [grid(part_OC, bits, symmetric) for part_OC in weight_OI.split(size, dim=1)]
    scale_OG, zero_OG = (torch.stack(values, 1) for values in zip(*pairs, strict=True))
    code_OI = nearest(weight_OI, scale_OG[:, group_I], zero_OG[:, group_I], bits)
    return Quantised(code_OI.to(torch.uint8), scale_OG, zero_OG, group_I)


def words(count: int, bits: int) -> int:
    """How many words hold `count` codes."""
    return -(-count * bits // WORD)


def pack(code_NO: Tensor, bits: int) -> Tensor:
    """The codes of each column as one stream of bits, the lowest first, in int32 words: `word_RO`.

    32 codes fill `bits` words, so every 32nd code has the same place: in memory are the words and such a slice.
    """
    count, columns = code_NO.shape
    word_RO = torch.zeros(-(-count // WORD) * bits, columns, dtype=torch.int32, device=code_NO.device)
    for place in range(min(WORD, count)):
        part_NO = code_NO[place::WORD].to(torch.int32)
        row, shift = divmod(place * bits, WORD)
        word_RO[row::bits][: len(part_NO)] |= part_NO << shift  # bits beyond the word are dropped
        if shift + bits > WORD:
            word_RO[row + 1 :: bits][: len(part_NO)] |= part_NO >> (WORD - shift)
    return word_RO[: words(count, bits)]


def unpack(word_RO: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each column: `code_NO`, int32."""
    mask, device = 2**bits - 1, word_RO.device
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=device)
        code = word_RO[:, None, :] >> shifts[None, :, None] & mask
        return code.reshape(-1, word_RO.shape[1])[:count]
    start_N = torch.arange(count, device=device) * bits
    first_N, shift_N1 = start_N // WORD, (start_N % WORD)[:, None]
    long_RO = word_RO.long() & (2**WORD - 1)
    high_NO = long_RO[(first_N + 1).clamp(max=len(word_RO) - 1)]  # where a code ends in the same word it is masked
    return ((long_RO[first_N] | high_NO << WORD) >> shift_N1 & mask).to(torch.int32)
