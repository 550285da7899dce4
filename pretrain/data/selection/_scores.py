"""How likely a checkpoint finds each document of a corpus, shard by shard: an interrupted scoring goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import encoded
from pretrain.core.errors import PretrainError
from pretrain.core.files import JSONObject, digest
from pretrain.core.folders import checkpoint_of
from pretrain.core.hardware import pick_device
from pretrain.core.meter import count_flops
from pretrain.core.models.families import positions_of
from pretrain.core.models.likelihood import document_nll
from pretrain.data._work import Desk, by_domain, percentiles, stamps

if TYPE_CHECKING:
    from datasets import Dataset

SHARD = 512  # documents


class Shard(TypedDict):
    """What is kept of a shard of documents: of each its negative log-likelihood and tokens, and the FLOPs of all."""

    nll: list[float]
    tokens: list[int]
    flops: int


@dataclass(frozen=True)
class Likelihoods:
    """Of N documents: negative log-likelihood in nats, and how many tokens it is of."""

    nll_N: NDArray[np.float64]
    tokens_N: NDArray[np.int64]


def likelihoods(folder: str, corpus: Dataset, desk: Desk, *, length: int, stride: int | None = None) -> Likelihoods:
    """Score the corpus's documents with the checkpoint in `folder`; shards that are on the desk are not scored again.

    A window holds `length` inputs, or what the model can take where that is less; those of a longer document advance by
    `stride` (None: by all of it).
    """
    path = checkpoint_of(Path(folder))
    state = stamps(path)
    scorer: _Scorer | None = None
    shards: list[Shard] = []
    for start in range(0, len(corpus), SHARD):
        texts = corpus[start : start + SHARD]["text"]

        def score(texts: list[str] = texts) -> JSONObject:
            nonlocal scorer
            scorer = scorer or _Scorer(path, length, stride)
            return {**scorer(texts)}

        name = digest([str(path.resolve()), state, length, stride, texts])[:32]
        shards.append(cast("Shard", desk.kept(name, score)))
    return Likelihoods(
        np.array([x for part in shards for x in part["nll"]], dtype=np.float64),
        np.array([x for part in shards for x in part["tokens"]], dtype=np.int64),
    )


class _Scorer:
    """A checkpoint opened, and how it reads."""

    def __init__(self, path: Path, length: int, stride: int | None) -> None:
        self.path = path
        self.model, tokenizer = checkpoint.load(path, device=pick_device())
        if tokenizer is None:
            raise PretrainError(f"{path} has no tokenizer; accepted: a checkpoint that holds one")
        self.tokenizer = tokenizer
        self.length = min(length, positions_of(self.model) or length)
        self.stride = None if stride is None else min(stride, self.length)
        vocabulary = Vocabulary.of(tokenizer)
        before = vocabulary.begin
        self.ends = ([] if before is None else [before], [] if vocabulary.after is None else [vocabulary.after])

    def __call__(self, texts: Sequence[str]) -> Shard:
        """A shard's `nll` and `tokens`, and the FLOPs that it took."""
        tokens = encoded(self.tokenizer, list(texts), add_special_tokens=False)["input_ids"]
        documents = [np.array([*self.ends[0], *ids, *self.ends[1]]) for ids in tokens]
        batch_tokens = 65536 if self.model.device.type == "cuda" else 4096
        nll_N, flops = count_flops(
            lambda: document_nll(
                self.model, documents, length=self.length, stride=self.stride, batch_tokens=batch_tokens
            )
        )
        if not np.isfinite(nll_N).all():
            raise PretrainError(f"{self.path} gives a document a likelihood that is not finite")
        return {"nll": nll_N.tolist(), "tokens": [max(len(d) - 1, 0) for d in documents], "flops": flops}


def sizes(corpus: Dataset) -> NDArray[np.int64]:
    """The documents' bytes in UTF-8."""
    parts = (corpus[i : i + SHARD]["text"] for i in range(0, len(corpus), SHARD))
    return np.array([len(text.encode()) for texts in parts for text in texts], dtype=np.int64)


def report(name: str, corpus: Dataset, kept: NDArray[np.int64], score_N: NDArray[np.float64]) -> dict[str, object]:
    """The report of a selection: documents kept of each domain, and how the scores lie before and after."""
    sides = {"all": score_N, "kept": score_N[kept]}
    return {
        "method": name,
        "documents": by_domain(corpus, kept),
        "score_percentiles": {side: percentiles(scores) for side, scores in sides.items() if len(scores)},
    }
