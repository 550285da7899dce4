"""Held-out loss, perplexity and bits per byte, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pretrain.core.errors import PretrainError
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
    of the bytes with it. `length` inputs a window, advanced by `stride`; 0: the length that the checkpoint was trained
    at, or where that is not known the model's own (at most 1024), and half of it. The intervals of `loss` and
    `bits_per_byte` are by bootstrap over documents.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")

    length: int = 0
    stride: int = 0
    resamples: int = 1000
    seed: int = 0

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on documents with `text` and `domain`."""
        from pretrain.core.batch import Vocabulary
        from pretrain.core.models.likelihood import document_nll, likelihoods, predicted_bytes
        from pretrain.evaluation._intervals import bounds, resampled_sums
        from pretrain.evaluation._predictions import framed

        vocabulary = Vocabulary.of(tokenizer)
        tokens = framed(tokenizer, vocabulary, _texts(documents), end=True)
        length = self.length or min(1024, getattr(model.config, "max_position_embeddings", None) or 1024)
        sizes_N = np.array([len(text.encode("utf-8", "surrogatepass")) for text in _texts(documents)])
        bytes_N = predicted_bytes(sizes_N, np.array([len(t) for t in tokens]), begins=vocabulary.begin is not None)
        if not bytes_N.any():
            raise PretrainError(f"held_out: {len(documents)} documents have no text to predict; accepted: some text")
        nll_N = document_nll(model, tokens, length=length, stride=self.stride or max(1, length // 2))
        targets_N = np.array([max(len(t) - 1, 0) for t in tokens])
        metrics, domains = likelihoods(nll_N, targets_N, bytes_N, [d.get("domain", "text") for d in documents])

        sums_RK = resampled_sums(np.stack([nll_N, targets_N, bytes_N], axis=1), self.resamples, self.seed)
        nll_R, (targets_R, bytes_R) = sums_RK[:, 0], np.maximum(sums_RK[:, 1:], 1).T
        intervals = {"loss": bounds(nll_R / targets_R), "bits_per_byte": bounds(nll_R / np.log(2) / bytes_R)}
        return Measured(metrics, domains, intervals)


def _texts(documents: Sequence[Document]) -> list[str]:
    return [document["text"] for document in documents]
