"""Filling a number with sizes: which words are hidden where so many tokens are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def fill(sizes: Sequence[int], most: int) -> NDArray[np.bool_]:
    """Which of the sizes, tried one after another, still fit into `most`; one that does not is passed over."""
    fits, left = np.zeros(len(sizes), dtype=bool), most
    for number, size in enumerate(sizes):
        if size <= left:
            fits[number], left = True, left - size
        if not left:
            break
    return fits
