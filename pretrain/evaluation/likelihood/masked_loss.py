"""How well a masked language model fills held-out text, by domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from pretrain.core.bounds import Count, PositiveShare, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.files import digest
from pretrain.core.quick.quantities import counted
from pretrain.evaluation import Evaluation, Measured
from pretrain.evaluation._intervals import bounds, bounds_by_domain, resampled_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.core.batch import Row, Vocabulary
    from pretrain.corpus.sources import Document

ROWS = 16  # of a batch


@dataclass(frozen=True)
class MaskedLoss(Evaluation):
    """BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding (arXiv:1810.04805).

    The loss of its masked language modelling on held-out documents: `masked_loss`, the mean of -log p(original) in nats
    over the tokens that are hidden, overall and by domain, so by language where a domain is one. Documents are cut into
    rows of `length` tokens (0: the length that the checkpoint was trained at, or at most 512), of each of which `rate`
    are chosen and 80% of those masked, 10% replaced; which, follows from the document's text and `seed` alone. It
    compares models of one tokenizer, or of tokenizers that split the text alike. Interval: bootstrap over documents.
    """

    families: ClassVar[tuple[str, ...]] = ("masked",)

    rate: PositiveShare = 0.15
    length: Whole = 0
    resamples: Count = 1000
    seed: Whole = 0

    @property
    def predicted(self) -> float:
        """Those that are hidden."""
        return self.rate

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on documents with `text` and `domain`."""
        from pretrain.core.batch import Vocabulary
        from pretrain.core.models.families import positions_of
        from pretrain.evaluation._predictions import framed

        length = self.length or min(512, positions_of(model) or 512)
        vocabulary, texts = Vocabulary.of(tokenizer), [document["text"] for document in documents]
        tokens = framed(tokenizer, vocabulary, texts, end=True)
        sums_N2 = self._sums(model, vocabulary, [digest(text) for text in texts], tokens, length)
        if not sums_N2[:, 1].any():
            raise PretrainError(
                f"masked_loss: no token to hide in {counted(len(documents), 'document')}; accepted: longer ones"
            )
        domains = np.array([str(document.get("domain", "text")) for document in documents])
        by_domain = {name: _mean(sums_N2[domains == name]) for name in sorted({*domains.tolist()})}
        whole = _means(resampled_sums(sums_N2, self.resamples, self.seed)).items()
        intervals = {name: bounds(value_R) for name, value_R in whole}
        apart = bounds_by_domain(sums_N2, domains.tolist(), _means, self.resamples, self.seed)
        rows: list[dict[str, str | float]] = [
            {"digest": digest(text)[:16], "domain": str(domain), "nll": float(nll), "targets": float(targets)}
            for text, domain, (nll, targets) in zip(texts, domains, sums_N2, strict=True)
        ]
        return Measured(_mean(sums_N2), by_domain, intervals, rows, domain_intervals=apart)

    def _sums(
        self, model: PreTrainedModel, vocabulary: Vocabulary, keys: Sequence[str],
        tokens: Sequence[NDArray[np.int64]], length: int,
    ) -> NDArray[np.float64]:  # fmt: skip
        """Each document's summed loss and its number of hidden tokens."""
        import torch

        from pretrain.core.batch import Context, Row, rows_to_tensors, to_device
        from pretrain.core.models.features import evaluating
        from pretrain.objectives.language.masked_lm import MaskedLM

        objective, sums_N2 = MaskedLM(rate=self.rate), np.zeros((len(tokens), 2))
        rows: list[Row] = []
        hidden: list[dict[str, torch.Tensor]] = []
        for number, (key, ids) in enumerate(zip(keys, tokens, strict=True)):
            rng = np.random.default_rng((self.seed, int(key[:16], 16)))
            start = np.zeros(1, np.int32)
            pieces = Row(ids.astype(np.int32), start, start.astype(np.int64), 0, number).cut(length)
            rows += pieces
            hidden += [objective.prepare([piece], Context(vocabulary, length, rng)) for piece in pieces]
        device = next(model.parameters()).device
        with evaluating(model), torch.no_grad():
            for first in range(0, len(rows), ROWS):
                some = slice(first, first + ROWS)
                batch = rows_to_tensors(rows[some], length, vocabulary.pad)
                batch |= {name: torch.cat([made[name] for made in hidden[some]]) for name in ("tokens_BL", "target_BL")}
                batch["weight"] = torch.stack([made["weight"] for made in hidden[some]]).sum()
                nll_BL = objective.loss(model, to_device(batch, device)).nll_BL
                assert nll_BL is not None
                each = zip(rows[some], hidden[some], nll_BL.double().sum(-1).tolist(), strict=True)
                for row, made, nll in each:
                    sums_N2[row.index] += nll, int(made["weight"])
        return sums_N2


def _mean(sums_N2: NDArray[np.float64]) -> dict[str, float]:
    nll, targets = sums_N2.sum(0).tolist()
    return {"masked_loss": nll / max(targets, 1.0)}


def _means(sums_R2: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    return {"masked_loss": sums_R2[:, 0] / np.maximum(sums_R2[:, 1], 1)}
