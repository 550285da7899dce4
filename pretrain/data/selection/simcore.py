"""Keep the documents that lie nearest a target corpus in what a model makes of them, until they no longer resemble it.

Shape letters: N documents, T those of the target, E width, K centres.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, cast

import numpy as np

from pretrain.core.bounds import AnyInteger, Count, Positive, PositiveShare, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.files import digest
from pretrain.core.folders import checkpoint_of, corpus_of
from pretrain.core.hardware import pick_device
from pretrain.core.method import Ref
from pretrain.corpus.payload import identity
from pretrain.corpus.store import Corpus
from pretrain.data import DataOperation
from pretrain.data._work import desk, stamps
from pretrain.data.selection._scores import report

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from pretrain.core.files import JSONObject
    from pretrain.core.processors import Document, Processor
    from pretrain.data._work import Desk

SHARD = 512  # documents whose features are kept together


@dataclass(frozen=True)
class SimCore(DataOperation):
    """Coreset Sampling from Open-Set for Fine-Grained Self-Supervised Learning (arXiv:2303.11101).

    The corpus is the open set. A document's features are what `model` makes of it (the paper's: an encoder trained on
    the `target` corpus alone), at unit length; k-means finds `clusters` centres among those of the target's training
    documents (each is one where they are fewer). Round by round each centre takes the document that is most similar by
    cosine of all that no earlier round has taken. A round's value is the mean of these similarities; sampling ends
    before the first whose value is below `threshold` times that of round `patience`, and at `most` times as many
    documents as the target has. With a `share` of the corpus's documents it ends at so many instead. What the last
    round has too many is left out at random. Train on the target and what is kept: a data stage takes this one as its
    `corpus` and the target's sources.

    Any modality that the model has features of. The numbers of N documents and K centres are held in memory,
    8 N K bytes.
    """

    model: Ref
    target: Ref
    clusters: Count = 100
    threshold: Positive = 0.95
    patience: Count = 20
    most: Positive = 50.0
    share: PositiveShare | None = None
    length: Count = 512  # tokens that are read, from the middle of a text
    pooling: Literal["mean", "cls", "last"] = "mean"
    layer: AnyInteger = -1
    seed: Whole = 0

    def __call__(self, corpus: Dataset) -> Dataset:
        """The documents that were taken, in their order."""
        stored = Corpus(corpus_of(Path(self.target)))
        target = list(stored.documents("train", list))
        with desk() as here:
            reader = Reader(self, here)
            _, feature_TE = reader(target)
            read_N, feature_NE = reader(rows(corpus))
            if not len(feature_TE):
                raise PretrainError(
                    f"simcore: target {self.target}: no training document has anything to read; accepted: at least one"
                )
            kept, nearest_N = read_N, np.full(len(corpus), -1.0)  # of what has no features
            if len(read_N):
                similarity_NK = feature_NE @ centres(feature_TE, self.clusters, self.seed).T
                wanted = round(self.most * len(target) if self.share is None else self.share * len(corpus))
                stop = None if self.share is not None else (self.patience, self.threshold)
                kept = read_N[taken(similarity_NK, max(1, wanted), stop, self.seed)]
                nearest_N[read_N] = similarity_NK.max(1)
            here.reports.append(report(self.name, corpus, kept, nearest_N))
            return here.keep(self.name, corpus, kept, "not near the target", nearest_N)


class Reader:
    """A checkpoint, opened when there is something that it has not read yet."""

    def __init__(self, method: SimCore, here: Desk) -> None:
        self.method, self.here = method, here
        self.path = checkpoint_of(Path(method.model))
        self.state = [str(self.path.resolve()), stamps(self.path), method.length, method.pooling, method.layer]
        self.opened: tuple[PreTrainedModel, Processor | None] | None = None

    def __call__(self, documents: Iterable[Document]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The documents that have anything to read, by number, and their features, each of length 1."""
        numbers: list[int] = []
        blocks: list[NDArray[np.float32]] = []
        stream = iter(documents)
        for place, some in enumerate(iter(lambda: list(islice(stream, SHARD)), [])):
            name = digest([*self.state, [identity(each).hex() for each in some]])[:32]
            shard = cast("Shard", self.here.kept(name, partial(self._read, some)))
            if shard["read"]:
                flat = np.frombuffer(base64.b64decode(shard["features"]), dtype=np.float32)
                blocks.append(flat.reshape(len(shard["read"]), -1))
                numbers += [place * SHARD + number for number in shard["read"]]
        if not blocks:
            return np.empty(0, np.int64), np.empty((0, 0), np.float32)
        return np.array(numbers, dtype=np.int64), unit(np.concatenate(blocks))

    def _read(self, documents: Sequence[Document]) -> JSONObject:
        from pretrain.core import checkpoint
        from pretrain.core.meter import count_flops
        from pretrain.core.models.features import piece_features, readable

        self.opened = self.opened or checkpoint.load(self.path, device=pick_device())
        model, processor = self.opened
        if processor is None:
            raise PretrainError(f"{self.path} has no tokenizer; accepted: a checkpoint that holds one")
        method, known = self.method, {id(document): number for number, document in enumerate(documents)}
        read = readable(model, processor, documents, method.length)
        if not read:
            return {"read": [], "features": "", "flops": 0}
        pieces = [piece for _, piece in read]
        feature_NE, flops = count_flops(
            lambda: piece_features(model, processor, pieces, method.length, pooling=method.pooling, layer=method.layer)
        )
        packed = base64.b64encode(np.ascontiguousarray(feature_NE, dtype=np.float32).tobytes()).decode()
        return {"read": [known[id(document)] for document, _ in read], "features": packed, "flops": flops}


class Shard(TypedDict):
    """Which documents of a shard have anything to read, their features (float32, base64), and the FLOPs of all."""

    read: list[int]
    features: str
    flops: int


def rows(corpus: Dataset) -> Iterator[Document]:
    """The documents, files among them as bytes."""
    for table in corpus.with_format("arrow").iter(SHARD):
        yield from table.to_pylist()


def unit(vector_NE: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors at length 1; one of zeros stays."""
    return vector_NE / np.maximum(np.linalg.norm(vector_NE, axis=1, keepdims=True), 1e-12)


def centres(feature_TE: NDArray[np.float32], clusters: int, seed: int) -> NDArray[np.float32]:
    """The centres of k-means, each at length 1; the features themselves where they are no more than `clusters`."""
    from sklearn.cluster import KMeans

    if len(feature_TE) <= clusters:
        return feature_TE
    clustering = KMeans(clusters, n_init=10, random_state=seed).fit(feature_TE)
    return unit(clustering.cluster_centers_.astype(np.float32))


def taken(
    similarity_NK: NDArray[np.float32], wanted: int, stop: tuple[int, float] | None, seed: int
) -> NDArray[np.int64]:
    """The documents that rounds of all centres take, ascending: at most `wanted`.

    `stop` are a round, counted from 1, and a share: rounds end before the first whose mean similarity is below that
    share of the named one's.
    """
    order_NK = np.empty(similarity_NK.shape, np.int32)
    for k in range(similarity_NK.shape[1]):  # one by one: what argsort gives has 64 bits a place
        order_NK[:, k] = np.argsort(-similarity_NK[:, k], kind="stable")
    place_K = np.zeros(similarity_NK.shape[1], dtype=np.int64)
    taken_N = np.zeros(len(similarity_NK), dtype=bool)
    least, number = -np.inf, 0
    while (count := int(taken_N.sum())) < min(wanted, len(taken_N)):
        number += 1
        chosen_K = np.empty(len(place_K), dtype=np.int64)
        for k in range(len(place_K)):
            while place_K[k] < len(taken_N) and taken_N[order_NK[place_K[k], k]]:
                place_K[k] += 1
            chosen_K[k] = order_NK[place_K[k], k]
        value = float(similarity_NK[chosen_K, np.arange(len(chosen_K))].mean())
        if stop is not None and number == stop[0]:
            least = value * stop[1]
        if value < least:
            break
        new = np.unique(chosen_K)
        if count + len(new) > wanted:
            new = np.random.default_rng(seed).choice(new, wanted - count, replace=False)
        taken_N[new] = True
    return np.flatnonzero(taken_N)
