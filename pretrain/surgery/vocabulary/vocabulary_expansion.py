"""More tokens for a model: rows of its embeddings and of its head for them.

Shape letters: V old tokens, N new tokens, E width, X a row's length (E, or 1 for a bias).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.errors import PretrainError
from pretrain.core.method import Ref
from pretrain.surgery import Inputs, Surgery, report
from pretrain.surgery._random import generator

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WAYS = ("cw2v", "mean", "multivariate", "univariate", "random")


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

    tokenizer: Ref
    initialisation: Literal["cw2v", "mean", "multivariate", "univariate", "random"] = "cw2v"
    corpus: Ref = ""
    sigma_scale: float = 1e-5
    rank: int = 1024
    window: int = 5
    negatives: int = 5
    threshold: float = 2.0
    lr: float = 3e-4
    batch_size: int = 4096
    epochs: int = 5
    max_tokens: int = 4_000_000

    def __post_init__(self) -> None:
        """Refuse what cannot be learnt from."""
        super().__post_init__()
        if self.initialisation not in _WAYS:
            way = self.initialisation
            raise PretrainError(f"vocabulary_expansion: initialisation {way!r}: accepted: {', '.join(_WAYS)}")
        if (self.initialisation == "cw2v") != bool(self.corpus):
            raise PretrainError(
                f"vocabulary_expansion: corpus {self.corpus!r}: accepted: a corpus with initialisation cw2v, none with "
                "the others"
            )
        for name in ("rank", "window", "negatives", "batch_size", "epochs", "max_tokens"):
            if getattr(self, name) < 1:
                raise PretrainError(f"vocabulary_expansion: {name} {getattr(self, name)}: accepted: 1 or more")
        for name, least in (("sigma_scale", 0), ("threshold", 1e-9), ("lr", 1e-12)):
            if not getattr(self, name) >= least:
                accepted = "above 0" if least else "0 or more"
                raise PretrainError(f"vocabulary_expansion: {name} {getattr(self, name)}: accepted: {accepted}")

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model with more rows; the joined tokenizer is handed back in `inputs.extra`."""
        from pretrain.surgery._tokens import expand

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
        self, model: PreTrainedModel, old: list[int], new: list[int], source: torch.Generator, inputs: Any
    ) -> None:
        """Learn the mixtures and fill the new rows with them."""
        from pretrain.core.hardware import pick_device
        from pretrain.surgery.vocabulary._cw2v import Settings, train

        weight, *rest = tables(model)
        device, texts = pick_device(), self._texts(inputs.extra["tokenizer"], old, new)
        head = next((table for table in rest if table.ndim == 2), None)
        old_VE, head_VE = (None if t is None else t[old].to(device, torch.float32) for t in (weight, head))
        settings = Settings(**{item.name: getattr(self, item.name) for item in fields(Settings)})
        with torch.enable_grad():
            inner, outer, losses = train(texts, old_VE, head_VE, len(new), settings, source)  # type: ignore[arg-type]
        for table in tables(model):
            mixture = inner if table is weight else outer
            values = table[old].to(device, torch.float32)
            mixed = mixture.applied(values if values.ndim == 2 else values[:, None])
            table[new] = (mixed if table.ndim == 2 else mixed[:, 0]).to(table)
        report(inputs, **{"vocabulary_expansion/first_loss": losses[0], "vocabulary_expansion/last_loss": losses[-1]})

    def _texts(self, tokenizer: Any, old: list[int], new: list[int]) -> list[NDArray[np.int64]]:
        """The training documents' tokens, renumbered: the old ones first."""
        import itertools

        import numpy as np

        from pretrain.core.encoding import encode
        from pretrain.core.folders import corpus_of
        from pretrain.corpus.store import Corpus

        number = np.zeros(max(old[-1], new[-1]) + 1, np.int64)
        number[old + new] = np.arange(len(old) + len(new))
        documents = Corpus(corpus_of(Path(self.corpus))).documents("train")
        found: list[NDArray[np.int64]] = []
        left = self.max_tokens
        while left > 0 and (some := list(itertools.islice(documents, 256))):
            for tokens in encode(tokenizer, [document["text"] for document in some]):
                found.append(number[tokens[: max(left, 0)]])
                left -= len(tokens)
        if sum(map(len, found)) < 2:
            raise PretrainError(f"vocabulary_expansion: corpus {self.corpus} has no text to learn from; accepted: some")
        return found


def tables(model: PreTrainedModel) -> list[Tensor]:
    """What has a row for each token: the embeddings, and of a head that is not tied to them the weight; its bias."""
    weight = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings()
    found = [weight]
    if head is not None and head.weight is not weight:
        found.append(head.weight)
    if getattr(head, "bias", None) is not None:
        found.append(head.bias)
    return found


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
