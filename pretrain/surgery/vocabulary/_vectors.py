"""Word vectors from files, and from them those of a tokenizer's subwords.

Shape letters: W words, D their vectors' length, V tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from pretrain.core.encoding import encode_plain, ids_of, plain_backend
from pretrain.core.errors import PretrainError
from pretrain.core.files import read_json
from pretrain.core.folders import verify_file
from pretrain.core.foreign import json
from pretrain.core.foreign.archives import open_text
from pretrain.core.foreign.rows import lines

ACCEPTED = ".vec or .txt (a word and its numbers a line), .json ({word: numbers}), .safetensors (vectors, words)"
_LANGUAGE = re.compile(r"[a-z]{3}:(?=.)")  # before a word of ColexNet+
BATCH = 4096

LONGEST = 1 << 20  # characters of a line


def read(method: str, files: Sequence[str], most: int) -> tuple[list[str], NDArray[np.float32]]:
    """The words and vectors of all files, of each no more than the first `most` (0: all). Pickles are never read."""
    words: list[str] = []
    parts: list[NDArray[np.float32]] = []
    for file in files:
        path = Path(file)
        if not path.is_file() or path.suffix not in (".vec", ".txt", ".json", ".safetensors"):
            raise PretrainError(f"{method}: vectors {path}: accepted: a file {ACCEPTED}")
        try:
            file_words, vectors_WD = _read(path, most or None)
        except (ValueError, TypeError, KeyError, AttributeError, OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise PretrainError(f"{method}: vectors {path} cannot be read ({reason}); accepted: {ACCEPTED}") from error
        if vectors_WD.ndim != 2 or len(file_words) != len(vectors_WD) or not file_words:
            raise PretrainError(
                f"{method}: vectors {path}: {len(file_words)} words for {vectors_WD.shape}; accepted: {ACCEPTED}"
            )
        if parts and parts[0].shape[1] != vectors_WD.shape[1]:
            raise PretrainError(
                f"{method}: vectors {path} have {vectors_WD.shape[1]} numbers; accepted: {parts[0].shape[1]}, as in "
                "the first file: one space for all languages"
            )
        if not np.isfinite(vectors_WD).all():
            raise PretrainError(f"{method}: vectors {path} hold NaN or infinity; accepted: finite numbers")
        words += [_LANGUAGE.sub("", word).replace("$", " ") if _LANGUAGE.match(word) else word for word in file_words]
        parts.append(vectors_WD)
    return words, np.concatenate(parts)


def _read(path: Path, most: int | None) -> tuple[list[str], NDArray[np.float32]]:
    verify_file(path)
    if path.suffix == ".json":
        vectors = read_json(path)
        return list(vectors)[:most], np.array(list(vectors.values())[:most], np.float32)
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            words = json.loads((file.metadata() or {})["words"])
            return words[:most], file.get_tensor("vectors").astype(np.float32)[: len(words[:most])]
    words, rows = [], []
    with open_text(path, newline="\n") as file:
        for number, (_, line) in enumerate(lines(file, LONGEST)):
            if line is None:
                raise ValueError(f"a line of more than {LONGEST:,} characters")
            word, *numbers = line.rstrip("\r\n").rstrip(" ").split(" ")
            if number == 0 and len(numbers) == 1:
                continue  # how many words of which length
            if len(words) == most:
                break
            words.append(word)
            rows.append(np.array(numbers, np.float32))
    return words, np.array(rows, np.float32)


def subwords(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], vectors_WD: NDArray[np.float32], size: int
) -> NDArray[np.float64]:
    """The mean vector of the words that each of `size` tokens is part of; 0 where there is none.

    A word is tokenised as it is, after a space, and after a space with a capital letter; it counts as often as the
    token is in one of these.
    """
    backend = plain_backend(tokenizer)
    sum_VD, count_V = np.zeros((size, vectors_WD.shape[1])), np.zeros(size)
    for start in range(0, len(words), BATCH):
        batch = words[start : start + BATCH]
        for spelt in (batch, [f" {w}" for w in batch], [f" {w[:1].upper()}{w[1:]}" for w in batch]):
            for offset, encoding in enumerate(encode_plain(backend, tokenizer, spelt)):
                ids = _distinct(ids_of(encoding))
                sum_VD[ids] += vectors_WD[start + offset]
                count_V[ids] += 1
    return sum_VD / np.maximum(count_V, 1)[:, None]


def _distinct(ids: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(ids))
