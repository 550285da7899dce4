"""Arrays in files (`.npy`): of numbers alone, and no longer than their files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.core.foreign.reading import open_file

HEAD = 4096  # bytes of a header, of which a plain one has 128


def read_array(path: Path) -> NDArray[Any]:
    """The array of a `.npy` file, mapped; `OSError` or `ValueError` for any other."""
    try:
        with open_file(path) as file:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version} of its format, where 1.0 and 2.0 are read")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file, max_header_size=HEAD)
            size = path.stat().st_size - file.tell()
    except (OSError, ValueError):
        raise
    except Exception as error:  # the header is Python's own notation, and its parser has many words
        raise ValueError("its header is damaged") from error
    if dtype.hasobject or dtype.kind not in "iufb" or fortran or not all(0 <= each < 1 << 62 for each in shape):
        raise ValueError("it holds no plain numbers")
    if math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"its header says {shape} of {dtype}, and {size} bytes follow")
    mapped: NDArray[Any] = np.load(path, mmap_mode="r", max_header_size=HEAD)
    return mapped
