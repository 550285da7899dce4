"""More tokens for a model: rows of its embeddings and of its head for them.

Shape letters: V old tokens, N new tokens, E width, X a row's length (E, or 1 for a bias).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core.bounds import Count, NonNegative, Positive
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.folders import corpus_of
from pretrain.core.hardware import pick_device
from pretrain.core.method import Ref
from pretrain.core.models.families import embeddings
from pretrain.corpus.store import Corpus
from pretrain.dial.effort import Task, Work
from pretrain.surgery import Inputs, Surgery, report
from pretrain.surgery._random import generator
from pretrain.surgery._tokens import expand
from pretrain.surgery.vocabulary._cw2v import Settings, train

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class VocabularyExpansion(Surgery):
    """An Empirical Comparison of Vocabulary Expansion and Initialization Approaches for Language Models
    (arXiv:2407.05841).

    The tokens of `tokenizer` that the checkpoint's lacks are added to it; all old rows and ids stay. With a new row
    inside the convex hull of the old ones no new token is ever likelier than the likeliest old one, so that greedy
    decoding is as before. "cw2v": each new row is a mixture softmax(A B) of the old ones (A, B of `rank`), learnt by
    Word2Vec's skip-gram with negative sampling on `max_tokens` of the training documents of `corpus`, old rows fixed;
    embeddings and an untied head have mixtures of their own. "mean" of the old rows; "multivariate" normal with their
    mean and `sigma_scale` times their covariance; "univariate", each coordinate with its mean and variance; "random",
    normal with the configuration's initial deviation. But for "cw2v" the head's bias is the mean of the old ones.
    """

    new_vocabulary: ClassVar[bool] = True
    tokenizer: Ref
    initialisation: Literal["cw2v", "mean", "multivariate", "univariate", "random"] = "cw2v"
    corpus: Ref = ""
    sigma_scale: NonNegative = 1e-5
    rank: Count = 1024
    window: Count = 5
    negatives: Count = 5
    threshold: Positive = 2.0
    lr: Positive = 3e-4
    batch_size: Count = 4096
    epochs: Count = 5
    max_tokens: Count = 4_000_000

    def __post_init__(self) -> None:
        """Refuse what cannot be learnt from."""
        super().__post_init__()
        if (self.initialisation == "cw2v") != bool(self.corpus):
            raise PretrainError(
                f"vocabulary_expansion: corpus {self.corpus!r}: accepted: a corpus with initialisation cw2v, none with "
                "the others"
            )

    @property
    def estimated(self) -> bool:
        """Not of what is learnt, nor of products with as many rows as tokens turn out to be new."""
        return self.initialisation not in ("cw2v", "multivariate")

    def work(self, task: Task) -> Work:
        """Both tokenizers, of which the other is taken to be as large, and the mean and deviation of the rows."""
        return 2 * task.listed()

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model with more rows; the joined tokenizer is handed back in `inputs.extra`."""
        old, new = expand(self.name, model, self.tokenizer, inputs)
        if not new:
            return model
        source = generator(self.name, inputs)
        if self.initialisation == "cw2v":
            self._learn(model, old, new, source, inputs)
            return model
        deviation = float(getattr(model.config, "initializer_range", None) or 0.02)
        for table in tables(model):
            old_VX, way = table[old].double(), "mean" if table.ndim == 1 else self.initialisation
            table[new] = initial(old_VX, len(new), way, self.sigma_scale, deviation, source).to(table)
        return model

    def _learn(
        self, model: PreTrainedModel, old: list[int], new: list[int], source: torch.Generator, inputs: Inputs | None
    ) -> None:
        """Learn the mixtures and fill the new rows with them."""
        assert inputs is not None
        weight, *rest = tables(model)
        device, texts = pick_device(), self._texts(inputs.extra["tokenizer"], old, new)
        head = next((table for table in rest if table.ndim == 2), None)
        old_VE = weight[old].to(device, torch.float32)
        head_VE = None if head is None else head[old].to(device, torch.float32)
        settings = Settings(**{item.name: getattr(self, item.name) for item in fields(Settings)})
        with torch.enable_grad():
            inner, outer, losses = train(texts, old_VE, head_VE, len(new), settings, source)
        for table in tables(model):
            mixture = inner if table is weight else outer
            values = table[old].to(device, torch.float32)
            mixed = mixture.applied(values if values.ndim == 2 else values[:, None])
            table[new] = (mixed if table.ndim == 2 else mixed[:, 0]).to(table)
        report(inputs, **{"vocabulary_expansion/first_loss": losses[0], "vocabulary_expansion/last_loss": losses[-1]})

    def _texts(self, tokenizer: PreTrainedTokenizerBase, old: list[int], new: list[int]) -> list[NDArray[np.int64]]:
        """The training documents' tokens, renumbered: the old ones first."""
        number = np.zeros(max(old[-1], new[-1]) + 1, np.int64)
        number[old + new] = np.arange(len(old) + len(new))
        documents = Corpus(corpus_of(Path(self.corpus))).documents("train")
        texts: list[NDArray[np.int64]] = []
        left = self.max_tokens
        while left > 0 and (block := list(itertools.islice(documents, 256))):
            for tokens in encode(tokenizer, [document["text"] for document in block]):
                texts.append(number[tokens[: max(left, 0)]])
                left -= len(tokens)
        if sum(map(len, texts)) < 2:
            raise PretrainError(f"vocabulary_expansion: corpus {self.corpus} has no text to learn from; accepted: some")
        return texts


def tables(model: PreTrainedModel) -> list[Tensor]:
    """What has a row for each token: the embeddings, and of a head that is not tied to them the weight; its bias."""
    weight, head = embeddings(model).weight, model.get_output_embeddings()
    rows: list[Tensor] = [weight]
    if head is not None and head.weight is not weight:
        rows.append(head.weight)
    if getattr(head, "bias", None) is not None:
        rows.append(head.bias)
    return rows


def initial(
    old_VE: Tensor, count: int, way: str, sigma_scale: float, deviation: float, source: torch.Generator
) -> Tensor:
    """New rows by one of the simpler ways."""
    size, mean_E = (count, *old_VE.shape[1:]), old_VE.mean(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64).to(old_VE.device)

    if way == "mean":
        return mean_E.expand(size)
    if way == "random":
        return deviation * normal(*size)
    if way == "univariate":
        return mean_E + old_VE.std(0, correction=0) * normal(*size)
    # Σ_k z_k (e_k - mean) / √V with z normal has the covariance of the rows e.
    parts = [normal(min(512, count - start), len(old_VE)) @ (old_VE - mean_E) for start in range(0, count, 512)]
    return mean_E + (sigma_scale / len(old_VE)) ** 0.5 * torch.cat(parts)
