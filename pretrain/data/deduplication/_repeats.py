"""Runs of tokens that a corpus repeats: prefix doubling, as it sorts suffixes, ended at the length that decides.

Windows of a few tokens are told apart by one number that holds these tokens. A window of 2m tokens is a pair of windows
of m, so those that are alike are found by sorting pairs of numbers; what nothing is like is left out from there on.
How a suffix array orders what comes after that length makes no difference to which windows are equal. All of this is
done only where a hash of the whole window says that another may be like it: most of a corpus is out at once.

Shape letters: N tokens of a corpus, a mark after each document among them; P windows that are compared at once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

WINDOWS = 1 << 21  # compared at once
PORTIONS = 250  # at the most
END = -1  # the mark after a document, and of a window that is like no other
BITS = 63  # of a number that holds several tokens
_ODD = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93], np.uint64)  # mix bits
Numbers = NDArray[np.signedinteger]
Places = NDArray[np.int64]
Keys = Callable[[Places], NDArray[np.int64]]  # of the windows that begin at places: equal where these are, or END


def later(token_N: Numbers, length: int) -> NDArray[np.bool_]:
    """Which tokens lie in a window of `length` that is a later copy: an equal one ends before it begins.

    Takes at its peak 20 bytes a token, `token_N` included, and 80 for each of the windows that are compared at once. No
    window is over the mark after a document, END.
    """
    first_N = firsts(token_N, length)
    copy_N = np.zeros(len(first_N), bool)
    for start in range(0, len(first_N), WINDOWS):
        part_P = first_N[start : start + WINDOWS]
        place_P = np.arange(start, start + len(part_P))
        copy_N[start : start + WINDOWS] = (part_P != END) & (part_P <= place_P - length)
    return _spread(copy_N, length)


def firsts(token_N: Numbers, length: int) -> Numbers:
    """For each place where the first window of `length` begins that is equal to the one here; END where it is alone."""
    may_N = _spread(_candidates(token_N, length), length)
    bits = max(1, int(token_N.max(initial=0)).bit_length())
    size = min(length, BITS // bits)

    def packed(place_P: Places) -> NDArray[np.int64]:
        key_P, whole_P = np.zeros(len(place_P), np.int64), np.ones(len(place_P), bool)
        for by in range(size):
            here_P = token_N[place_P + by]
            key_P = (key_P << bits) | here_P
            whole_P &= here_P != END
        return np.where(whole_P, key_P, END)

    first_N = grouped(packed, may_N, size - 1)
    while size < length:
        step = min(size, length - size)
        first_N = grouped(_paired(first_N, step), may_N, step)
        size += step
    return first_N


def _candidates(token_N: Numbers, length: int) -> NDArray[np.bool_]:
    """Where windows begin that have their hash, of 63 bits, in common with others."""
    hash_N = np.zeros(len(token_N), np.int64)
    for start in range(0, len(token_N) - length + 1, WINDOWS):
        mixed_P = (token_N[start : start + WINDOWS + length - 1].astype(np.uint64) + np.uint64(2)) * _ODD[0]
        size = 1
        while size < length:
            step = min(size, length - size)
            mixed_P = (mixed_P[:-step] * _ODD[1] + mixed_P[step:]) * _ODD[0]
            mixed_P ^= mixed_P >> np.uint64(31)
            size += step
        hash_N[start : start + len(mixed_P)] = mixed_P * _ODD[0] >> np.uint64(1)
    every_N = np.ones(len(token_N), bool)
    return grouped(lambda place_P: hash_N[place_P], every_N, length - 1) != END


def _paired(first_N: Numbers, step: int) -> Keys:
    """Keys of windows by the windows that begin at their places, and `step` on."""

    def keys(place_P: Places) -> NDArray[np.int64]:
        a_P, b_P = first_N[place_P].astype(np.int64), first_N[place_P + step]
        return np.where((a_P == END) | (b_P == END), END, a_P * len(first_N) + b_P)

    return keys


def grouped(keys: Keys, may_N: NDArray[np.bool_], last: int) -> Numbers:
    """For each place that may be, of the `last` none, the first that has its key; END where it is the only one."""
    small = len(may_N) < np.iinfo(np.int32).max
    first_N: Numbers = np.full(len(may_N), END, np.int32) if small else np.full(len(may_N), END, np.int64)
    may_N = may_N[: max(0, len(may_N) - last)]
    portions = max(1, min(PORTIONS, -(-int(may_N.sum()) // WINDOWS)))
    portion_N = np.full(len(may_N), PORTIONS, np.uint8)
    for start in range(0, len(may_N), WINDOWS):
        place_P = start + np.flatnonzero(may_N[start : start + WINDOWS])
        key_P = keys(place_P)
        mixed_P = key_P.astype(np.uint64) * _ODD[0] >> np.uint64(32)
        portion_N[place_P] = np.where(key_P == END, PORTIONS, mixed_P % np.uint64(portions))
    for portion in range(portions):
        place_P = np.flatnonzero(portion_N == portion)
        if len(place_P):
            _mark(first_N, place_P, keys(place_P))
    return first_N


def _mark(first_N: Numbers, place_P: Places, key_P: NDArray[np.int64]) -> None:
    """Set the first place of the same key at those places whose key others have too."""
    order_P = np.argsort(key_P)
    key_P = key_P[order_P]
    several_P = np.concatenate([[False], key_P[1:] == key_P[:-1]])
    several_P[:-1] |= several_P[1:]
    key_P, place_P = key_P[several_P], place_P[order_P[several_P]]
    if len(key_P):
        starts = np.flatnonzero(np.concatenate([[True], key_P[1:] != key_P[:-1]]))
        sizes = np.diff(starts, append=len(key_P))
        first_N[place_P] = np.repeat(np.minimum.reduceat(place_P, starts), sizes)


def _spread(mark_N: NDArray[np.bool_], length: int) -> NDArray[np.bool_]:
    """The marks, and with each the `length - 1` places after it; changes what it is given."""
    reach = 1
    while reach < length:
        step = min(reach, length - reach)
        mark_N[step:] |= mark_N[:-step].copy()
        reach += step
    return mark_N
