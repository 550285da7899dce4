"""How likely a model finds a text given another: a score of generated text.

Shape letters: B pairs of a batch, S source tokens, M target tokens, L both, N documents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.core.batch import Vocabulary
from pretrain.core.bounds import Count, Whole
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.models.cross_entropy import IGNORE, linear_cross_entropy
from pretrain.core.models.families import family, head, hidden, positions_of
from pretrain.evaluation import Evaluation, Measured
from pretrain.evaluation._intervals import bounds, bounds_of_means, resampled_sums
from pretrain.evaluation._pairs import Pair, causal_nll, filled_up, summed_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document


@dataclass(frozen=True)
class BARTScore(Evaluation):
    """BARTScore: Evaluating Generated Text as Text Generation (arXiv:2106.11520).

    The score of a target y given a source x is sum_t w_t log p(y_t | y_<t, x) with equal weights w_t = 1 / |y|, the end
    of the target among its tokens. `source` and `target` name the columns: document and hypothesis measure
    faithfulness, reference and hypothesis precision, hypothesis and reference recall. `both` scores the other direction
    as well (`bartscore_reverse`), and the mean of the two (`bartscore_f`). The model is an encoder-decoder, or a causal
    one that reads the source, `separator` and the target. Each side is cut to its first `length` tokens, and the source
    further where a model has too few positions for both. `judgement` names a column of numbers, of which
    `bartscore_spearman` is the rank correlation with the score (of `bartscore_f` with `both`). Documents without a
    source or a target are left out (`bartscore_skipped`). Intervals: bootstrap over documents.
    """

    families: ClassVar[tuple[str, ...]] = ("causal", "seq2seq")

    source: str = "source"
    target: str = "target"
    both: bool = False
    judgement: str = ""
    separator: str = "\n"
    length: Count = 1024
    resamples: Count = 1000
    seed: Whole = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        super().__post_init__()
        if self.source == self.target:
            raise PretrainError(f"bartscore: source and target {self.source!r}: accepted: two columns")

    @property
    def columns(self) -> tuple[str, ...]:
        """The source's, the target's and the judgement's."""
        return (self.source, self.target, *((self.judgement,) if self.judgement else ()))

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on documents with the source's and the target's column."""
        chosen = [d for d in documents if d.get(self.source) and d.get(self.target)]
        if not chosen:
            raise PretrainError(
                f"bartscore: none of {len(documents)} documents has {self.source!r} and {self.target!r}; "
                "accepted: columns with text"
            )
        vocabulary = Vocabulary.of(tokenizer)
        sides = [[str(d[column]) for d in chosen] for column in (self.source, self.target)]
        scores = {"bartscore": self.scores(model, tokenizer, vocabulary, *sides)}
        if self.both:
            scores["bartscore_reverse"] = self.scores(model, tokenizer, vocabulary, *sides[::-1])
            scores["bartscore_f"] = (scores["bartscore"] + scores["bartscore_reverse"]) / 2
        means_RK = resampled_sums(np.stack(list(scores.values()), axis=1), self.resamples, self.seed) / len(chosen)
        by_domain = defaultdict(list)
        names = [str(document.get("domain", "text")) for document in chosen]
        for name, score in zip(names, scores["bartscore"], strict=True):
            by_domain[name].append(score)
        measured = Measured(
            {name: float(score_N.mean()) for name, score_N in scores.items()}
            | {"bartscore_documents": float(len(chosen)), "bartscore_skipped": float(len(documents) - len(chosen))},
            {domain: {"bartscore": float(np.mean(values))} for domain, values in sorted(by_domain.items())},
            {name: bounds(means_RK[:, k]) for k, name in enumerate(scores)},
            domain_intervals=bounds_of_means("bartscore", scores["bartscore"], names, self.resamples, self.seed),
        )
        if self.judgement:
            value, interval = self._agreement(scores["bartscore_f" if self.both else "bartscore"], chosen)
            measured.metrics["bartscore_spearman"], measured.intervals["bartscore_spearman"] = value, interval
        return measured

    def scores(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        sources: Sequence[str],
        targets: Sequence[str],
    ) -> NDArray[np.float64]:
        """The score of each target given its source."""
        entry = family(model)
        if not entry.causal and not entry.decoder_blocks:
            raise PretrainError(
                f"{type(model).__name__} generates no text; accepted: a causal model, an encoder-decoder"
            )
        apart = [] if entry.decoder_blocks else encode(tokenizer, [self.separator])[0].tolist()
        end = [] if vocabulary.eos is None else [vocabulary.eos]
        read, written = (
            [ids[: self.length].tolist() for ids in encode(tokenizer, texts)] for texts in (sources, targets)
        )
        if entry.decoder_blocks:
            begin = [] if vocabulary.bos is None else [vocabulary.bos]
            pairs = [(begin + x + end, y + end) for x, y in zip(read, written, strict=True)]
            return -summed_nll(model, pairs, _encoder_decoder) / [len(y) for _, y in pairs]
        before = vocabulary.begin
        begin, limit = [] if before is None else [before], positions_of(model)
        least = 0 if begin or apart else 1  # source tokens that the target's first needs before it
        pairs = []
        for x, y in zip(read, written, strict=True):
            if isinstance(limit, int):
                room = limit + 1 - len(begin) - len(apart) - len(end)
                y = y[: max(1, room - least)]
                x = x[: max(least, room - len(y))]
            pairs.append((begin + x + apart, y + end))
        return -summed_nll(model, pairs, causal_nll) / [len(y) for _, y in pairs]

    def _agreement(
        self, score_N: NDArray[np.float64], documents: Sequence[Document]
    ) -> tuple[float, tuple[float, float]]:
        """Spearman's correlation with the judgements, and its interval."""
        from scipy.stats import rankdata

        judged = [i for i, d in enumerate(documents) if isinstance(d.get(self.judgement), int | float)]
        value_N = np.array([float(documents[i][self.judgement]) for i in judged])
        if len(np.unique(value_N)) < 2:
            raise PretrainError(
                f"bartscore: judgement {self.judgement!r} has {len(np.unique(value_N))} values in {len(documents)} "
                "documents; accepted: a column with two or more numbers"
            )

        def spearman(sample_K: NDArray[np.int64]) -> float:
            ranks_KN = rankdata(np.stack([score_N[judged][sample_K], value_N[sample_K]]), axis=1)
            ranks_KN = ranks_KN - ranks_KN.mean(1, keepdims=True)
            scale = np.sqrt((ranks_KN**2).sum(1).prod())
            return float(ranks_KN.prod(0).sum() / scale) if scale > 0 else 0.0

        rng, count = np.random.default_rng(self.seed), len(judged)
        drawn = [spearman(rng.integers(0, count, count)) for _ in range(self.resamples)]
        return spearman(np.arange(count)), bounds(np.array(drawn))


def _encoder_decoder(model: PreTrainedModel, pairs: Sequence[Pair], device: torch.device) -> list[float]:
    """The summed nll of each target; the decoder begins with the model's own start token."""
    begin = model.config.decoder_start_token_id
    begin = model.config.pad_token_id if begin is None else begin
    source_BS, target_BM = filled_up([x for x, _ in pairs], 0, device), filled_up([y for _, y in pairs], IGNORE, device)
    decoder_BM = filled_up([[begin, *y[:-1]] for _, y in pairs], 0, device)
    mask_BS = filled_up([[1] * len(x) for x, _ in pairs], 0, device)
    # Padding of the decoder stands at the end, where its causal mask hides it.
    states_BME = hidden(model, input_ids=source_BS, attention_mask=mask_BS, decoder_input_ids=decoder_BM)
    weight_VE, bias_V = head(model)
    return linear_cross_entropy(states_BME, weight_VE, target_BM, bias_V=bias_V)[1].double().sum(-1).tolist()
