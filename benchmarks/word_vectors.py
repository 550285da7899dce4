"""Word vectors for the claim on OFA, made of packages' modules alone: `claims/bases/words.safetensors`.

    python benchmarks/word_vectors.py OUTPUT [--words 6000] [--width 64]

The words of code and comments (runs of letters) of numpy, torch, transformers and sympy, the standard library not
among them: counts of words at most five apart, their positive pointwise mutual information, and of that the leading
singular vectors times the root of the singular values. Stored as whole numbers from -127 to 127, which cosines hardly
tell from the unrounded ones.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter

import numpy as np
from safetensors.numpy import save_file
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import svds

from pretrain.corpus.sources import Packages, read

SOURCE = Packages(("numpy", "torch", "transformers", "sympy"), limit=400)


def vectors(texts: list[list[str]], words: list[str], width: int, window: int = 5) -> np.ndarray:
    """Each word's vector, of length 1."""
    number, size = {word: i for i, word in enumerate(words)}, len(words)
    counts = coo_matrix((size, size), dtype=np.float64).tocsr()
    for text in texts:
        ids = np.array([number[word] for word in text if word in number])
        for distance in range(1, min(window, len(ids) - 1) + 1):
            ones = np.ones(len(ids) - distance)
            counts += coo_matrix((ones, (ids[:-distance], ids[distance:])), shape=(size, size)).tocsr()
    both = (counts + counts.T).tocoo()
    often = np.asarray(both.sum(axis=1)).ravel()
    # ln P(a, b) / (P(a) P(b)), the context's counts to the power 0.75
    context = often**0.75 / (often**0.75).sum()
    mutual = np.log(both.data / (often[both.row] * context[both.col]))
    kept = mutual > 0
    matrix = coo_matrix((mutual[kept], (both.row[kept], both.col[kept])), shape=(size, size)).tocsr()
    left, singular, _ = svds(matrix, k=width, v0=np.ones(size))
    found = left * np.sqrt(singular)
    return found / np.linalg.norm(found, axis=1, keepdims=True).clip(1e-12)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--words", type=int, default=6000)
    parser.add_argument("--width", type=int, default=64)
    given = parser.parse_args()
    texts = [re.findall(r"[A-Za-z]+", document["text"]) for document in read(SOURCE)]
    words = [word for word, _ in Counter(word for text in texts for word in text).most_common(given.words)]
    found = vectors(texts, words, given.width)
    whole = np.round(found / np.abs(found).max(axis=1, keepdims=True).clip(1e-12) * 127).astype(np.int8)
    save_file({"vectors": whole}, given.output, metadata={"words": json.dumps(words)})


if __name__ == "__main__":
    main()
