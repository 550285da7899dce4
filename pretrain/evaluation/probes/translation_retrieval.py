"""Retrieval of a document's translation in another language."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from pretrain.core.batch import Vocabulary
from pretrain.core.bounds import AnyInteger, Count, Whole
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.models.features import Framing, text_features
from pretrain.evaluation import Evaluation, Measured
from pretrain.evaluation._intervals import bounds, resampled_sums
from pretrain.evaluation.probes.retrieval import ranks_among, scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document


@dataclass(frozen=True)
class TranslationRetrieval(Evaluation):
    """XTREME: A Massively Multilingual Multi-task Benchmark for Evaluating Cross-lingual Generalisation
    (arXiv:2003.11080).

    Its sentence retrieval (Tatoeba) on any parallel corpus: documents with one value in the column `translations` are
    translations of one another, their domains the languages. Each document is a query to each other language that has
    its translation, which is to be found by the cosine of pooled states of `layer` among all documents of that
    language. `recall@k`, `mrr@10` and `ndcg@10` as in `retrieval`, means over all queries, and by the query's domain;
    a text is its first `length` tokens. Without any tuning it measures how far states agree across languages. Interval:
    bootstrap over queries.
    """

    cut: ClassVar[bool] = True

    translations: str = "group"
    pooling: Literal["cls", "mean"] = "mean"
    layer: AnyInteger = -1
    length: Count = 128
    resamples: Count = 1000
    seed: Whole = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """The one that tells translations."""
        return (self.translations,)

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on documents with `text`, `domain` and the column."""
        places: dict[str, dict[str, int]] = defaultdict(dict)  # by language, by translation
        for number, document in enumerate(documents):
            if document.get(self.translations) is not None:
                places[str(document.get("domain", ""))].setdefault(str(document[self.translations]), number)
        pairs = {(a, b): sorted(places[a].keys() & places[b].keys()) for a, b in permutations(sorted(places), 2)}
        if not any(pairs.values()):
            raise PretrainError(
                f"translation_retrieval: no document has a translation in another domain (column "
                f"{self.translations!r}); accepted: some that have"
            )
        framing = Framing(model, Vocabulary.of(tokenizer), self.length)
        pieces = [ids[: framing.length] for ids in encode(tokenizer, [d["text"] for d in documents])]
        vectors_NE = text_features(model, pieces, framing, pooling=self.pooling, layer=self.layer)
        names: tuple[str, ...] = ()
        values: dict[str, list[np.ndarray]] = defaultdict(list)
        for (a, b), keys in pairs.items():
            if not keys:
                continue
            order = sorted(places[b])
            passage_NE = vectors_NE[[places[b][key] for key in order]]
            true_Q = np.array([order.index(key) for key in keys])
            names, scored_QK = scores(ranks_among(vectors_NE[[places[a][key] for key in keys]], passage_NE, true_Q))
            values[a].append(scored_QK)
        by_domain = {a: np.concatenate(parts) for a, parts in values.items()}
        every_QK = np.concatenate(list(by_domain.values()))
        means_RK = resampled_sums(every_QK, self.resamples, self.seed) / len(every_QK)
        return Measured(
            dict(zip(names, every_QK.mean(0).tolist(), strict=True)) | {"translation_queries": float(len(every_QK))},
            {a: dict(zip(names, scored_QK.mean(0).tolist(), strict=True)) for a, scored_QK in by_domain.items()},
            {name: bounds(means_RK[:, k]) for k, name in enumerate(names)},
        )
