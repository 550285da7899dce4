"""Vectors of texts, a lot at a time, so that answers go on between two.

Shape letters: N texts, E width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from pretrain.core.models.features import Framing, text_features
from pretrain.inference.serving.jobs import Embedding, Vectors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pretrain.core.batch import Vocabulary

LOT = 2048  # tokens


def embedded(model: PreTrainedModel, vocabulary: Vocabulary, job: Embedding) -> Iterator[None]:
    """Read one lot for each `next`; the last sends the vectors, each of length 1."""
    longest = max(map(len, job.pieces))
    framing = Framing(model, vocabulary, longest)
    order = sorted(range(len(job.pieces)), key=lambda number: len(job.pieces[number]))
    rows: dict[int, np.ndarray] = {}
    while len(rows) < len(order):
        lot = [order[len(rows)]]
        for number in order[len(rows) + 1 :]:
            if (len(lot) + 1) * len(job.pieces[number]) > LOT:
                break
            lot.append(number)
        pieces = [job.pieces[number] for number in lot]
        rows |= zip(lot, text_features(model, pieces, framing, pooling=job.pooling, batch_tokens=LOT), strict=True)
        if len(rows) < len(order):
            yield
        if job.cancelled:
            return
    features_NE = np.stack([rows[number] for number in range(len(order))])
    norms_N1 = np.linalg.norm(features_NE, axis=1, keepdims=True)
    job.send(Vectors(features_NE / np.maximum(norms_N1, np.finfo(np.float32).tiny)))
