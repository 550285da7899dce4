"""Held-out loss, perplexity and bits per byte, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pretrain.evaluation import Evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class HeldOut(Evaluation):
    """Paloma: A Benchmark for Evaluating Language Model Fit (arXiv:2312.10523).

    The negative log-likelihood of whole documents, each token predicted once, as nats a token (`loss`), its exponential
    (`perplexity`), and per UTF-8 byte in bits (`bits_per_byte` = nll / ln 2 / bytes), which compares models whatever
    their tokenizer; overall and by domain. `length` inputs a window, advanced by `stride`; 0: the model's own length
    (at most 1024), and half of it. `METRIC/low` and `METRIC/high` bound a 95% interval by bootstrap over documents.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")

    length: int = 0
    stride: int = 0
    resamples: int = 1000
    seed: int = 0

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        """The metrics on documents with `text` and `domain`."""
        from pretrain.core.batch import Vocabulary
        from pretrain.evaluation._likelihood import document_nll, summarise

        vocabulary = Vocabulary.of(tokenizer)
        # A document's end stands for its beginning where the tokenizer has no token for that.
        before = vocabulary.bos if vocabulary.bos is not None else vocabulary.eos
        ends = ([] if before is None else [before], [] if vocabulary.eos is None else [vocabulary.eos])
        encoded = tokenizer([d["text"] for d in documents], add_special_tokens=False)["input_ids"]
        tokens = [np.array(ends[0] + list(ids) + ends[1]) for ids in encoded]
        length = self.length or min(1024, getattr(model.config, "max_position_embeddings", None) or 1024)
        nll_N = document_nll(model, tokens, length=length, stride=self.stride or max(1, length // 2))
        targets_N = np.array([max(len(t) - 1, 0) for t in tokens])
        bytes_N = np.array([len(d["text"].encode("utf-8", "surrogatepass")) for d in documents])
        metrics = summarise(nll_N, targets_N, bytes_N, [d.get("domain", "text") for d in documents])
        return metrics | self._interval(nll_N, targets_N, bytes_N)

    def _interval(self, nll_N: Any, targets_N: Any, bytes_N: Any) -> dict[str, float]:
        rng = np.random.default_rng(self.seed)
        chosen_RN = rng.integers(0, len(nll_N), (self.resamples, len(nll_N)))
        nll_R = nll_N[chosen_RN].sum(-1)
        bounds = {
            "loss": nll_R / np.maximum(targets_N[chosen_RN].sum(-1), 1),
            "bits_per_byte": nll_R / np.log(2) / np.maximum(bytes_N[chosen_RN].sum(-1), 1),
        }
        ends = (("low", 2.5), ("high", 97.5))
        return {f"{name}/{end}": float(np.percentile(values, q)) for name, values in bounds.items() for end, q in ends}
