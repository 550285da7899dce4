"""How likely a checkpoint finds each document of a corpus, shard by shard: an interrupted scoring goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from pretrain.core.models.likelihood import document_nll, token_ranks
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
    shards = [
        cast("Shard", kept)
        for kept in _kept(folder, corpus, desk, [], lambda scorer, texts: {**scorer(texts)}, length, stride)
    ]
    return Likelihoods(
        np.array([x for part in shards for x in part["nll"]], dtype=np.float64),
        np.array([x for part in shards for x in part["tokens"]], dtype=np.int64),
    )


def learnable_losses(folder: str, corpus: Dataset, desk: Desk, *, length: int, top_k: int) -> NDArray[np.float64]:
    """Each document's median loss in nats, over those of its tokens that are among the model's `top_k` likeliest.

    A document without such a token has none to learn: 0, below all that have.
    """
    shards = _kept(
        folder, corpus, desk, ["learnable", top_k], lambda scorer, texts: scorer.learnable(texts, top_k), length
    )
    return np.array([x for part in shards for x in part["median"]], dtype=np.float64)


def _kept(
    folder: str, corpus: Dataset, desk: Desk, what: list[str | int],
    measure: Callable[[_Scorer, Sequence[str]], JSONObject], length: int, stride: int | None = None,
) -> Iterator[JSONObject]:  # fmt: skip
    """What `measure` gives of each shard of the corpus, by the checkpoint in `folder`; or what is on the desk of it."""
    path = checkpoint_of(Path(folder))
    state = stamps(path)
    scorer: _Scorer | None = None
    for start in range(0, len(corpus), SHARD):
        texts = corpus[start : start + SHARD]["text"]

        def score(texts: list[str] = texts) -> JSONObject:
            nonlocal scorer
            scorer = scorer or _Scorer(path, length, stride)
            return measure(scorer, texts)

        yield desk.kept(digest([*what, str(path.resolve()), state, length, stride, texts])[:32], score)


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
        documents = self.documents(texts)
        nll_N, flops = count_flops(
            lambda: document_nll(
                self.model, documents, length=self.length, stride=self.stride, batch_tokens=self.batch_tokens
            )
        )
        if not np.isfinite(nll_N).all():
            raise PretrainError(f"{self.path} gives a document a likelihood that is not finite")
        return {"nll": nll_N.tolist(), "tokens": [max(len(d) - 1, 0) for d in documents], "flops": flops}

    def learnable(self, texts: Sequence[str], top_k: int) -> JSONObject:
        """A shard's `median` losses of what is learnable, and the FLOPs that they took."""
        documents = self.documents(texts)
        ranked, flops = count_flops(
            lambda: token_ranks(self.model, documents, length=self.length, batch_tokens=self.batch_tokens)
        )
        losses = [nll_L[rank_L < top_k] for nll_L, rank_L in ranked]
        return {"median": [float(np.median(nll)) if len(nll) else 0.0 for nll in losses], "flops": flops}

    @property
    def batch_tokens(self) -> int:
        """How many tokens are read at once."""
        return 65536 if self.model.device.type == "cuda" else 4096

    def documents(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """The tokens of texts, with what stands before and after a document."""
        tokens = encoded(self.tokenizer, list(texts), add_special_tokens=False)["input_ids"]
        return [np.array([*self.ends[0], *ids, *self.ends[1]]) for ids in tokens]


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
