"""Held-out loss, perplexity and bits per byte, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from pretrain.core.bounds import Count, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.files import digest
from pretrain.core.quick.quantities import counted
from pretrain.evaluation import Evaluation, Measured

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document


@dataclass(frozen=True)
class HeldOut(Evaluation):
    """Paloma: A Benchmark for Evaluating Language Model Fit (arXiv:2312.10523).

    The negative log-likelihood of whole documents, each token predicted once, as nats a token (`loss`), its exponential
    (`perplexity`), and per UTF-8 byte in bits (`bits_per_byte` = nll / ln 2 / bytes), which compares models whatever
    their tokenizer; overall and by domain. Text is encoded as for training: a special token's name in it is text. If
    the tokenizer has no token to begin a document with, nothing predicts its first token, which then takes its share
    of the bytes with it. What ends a document is predicted as well, unless `end` is off, as lm-eval has it: of
    texts of one window its `bits_per_byte` comes out. `length` inputs a window, advanced by `stride`; 0: the
    length that the checkpoint was trained at, or where that is not known the model's own (at most 1024), and half of
    it. The intervals of `loss` and `bits_per_byte` are by bootstrap over documents, each of which has its `nll`,
    `targets` and `bytes` in a row.
    """

    families: ClassVar[tuple[str, ...]] = ("causal",)
    windowed: ClassVar[bool] = True

    length: Whole = 0
    stride: Whole = 0
    resamples: Count = 1000
    seed: Whole = 0
    end: bool = True

    def __post_init__(self) -> None:
        """Refuse windows that leave tokens out."""
        super().__post_init__()
        if self.length and self.stride > self.length:
            raise PretrainError(
                f"held_out: stride {self.stride}, length {self.length}: accepted: stride at most length"
            )

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on documents with `text` and `domain`."""
        from pretrain.core.models.families import positions_of
        from pretrain.core.models.likelihood import document_nll

        length = self.length or min(1024, positions_of(model) or 1024)
        tokens = tokens_of(tokenizer, documents, end=self.end)
        nll_N = document_nll(model, tokens, length=length, stride=self.stride or max(1, length // 2))
        return measured(rows(tokenizer, documents, tokens, nll_N), self.resamples, self.seed)


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], *, end: bool = True
) -> list[NDArray[np.int64]]:
    """The documents as they are predicted: all tokens but the first of each are targets."""
    from pretrain.core.batch import Vocabulary
    from pretrain.evaluation._predictions import framed

    return framed(tokenizer, Vocabulary.of(tokenizer), [document["text"] for document in documents], end=end)


def rows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    tokens: Sequence[NDArray[np.int64]],
    nll_N: NDArray[np.float64],
) -> list[dict[str, str | float]]:
    """For each document `nll` (nats), `targets` and the `bytes` that they hold, with its `domain` and text's `digest`.

    `tokens` are those of `tokens_of`, `nll_N` what any model makes of them.
    """
    from pretrain.core.batch import Vocabulary
    from pretrain.core.models.likelihood import predicted_bytes

    texts = [document["text"] for document in documents]
    sizes_N = np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts])
    begins = Vocabulary.of(tokenizer).begin is not None
    bytes_N = predicted_bytes(sizes_N, np.array([len(t) for t in tokens]), begins=begins)
    if not bytes_N.any():
        raise PretrainError(
            f"held_out: no text to predict in {counted(len(documents), 'document')}; accepted: some text"
        )
    return [
        {
            "digest": digest(text)[:16], "domain": document.get("domain", "text"), "nll": float(nll),
            "targets": max(len(ids) - 1, 0), "bytes": float(size),
        }
        for document, text, ids, nll, size in zip(documents, texts, tokens, nll_N, bytes_N, strict=True)
    ]  # fmt: skip


def measured(documents: list[dict[str, str | float]], resamples: int = 1000, seed: int = 0) -> Measured:
    """The metrics of documents' rows, which hold all that they are made of."""
    from pretrain.core.models.likelihood import likelihoods
    from pretrain.evaluation._intervals import bounds, bounds_by_domain, resampled_sums

    sums_NK = np.array([[float(row[name]) for name in ("nll", "targets", "bytes")] for row in documents])
    nll_N, targets_N, bytes_N = sums_NK.T
    names = [str(row["domain"]) for row in documents]
    metrics, domains = likelihoods(nll_N, targets_N, bytes_N, names)
    whole = _means(resampled_sums(sums_NK, resamples, seed)).items()
    intervals = {name: bounds(value_R) for name, value_R in whole}
    apart = bounds_by_domain(sums_NK, names, _means, resamples, seed)
    return Measured(metrics, domains, intervals, documents, domain_intervals=apart)


def _means(sums_RK: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """What sums of nats, targets and bytes come to."""
    nll_R, (targets_R, bytes_R) = sums_RK[:, 0], np.maximum(sums_RK[:, 1:], 1).T
    return {"loss": nll_R / targets_R, "bits_per_byte": nll_R / np.log(2) / bytes_R}
