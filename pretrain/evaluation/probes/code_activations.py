"""Which codes of a model with codebooks fire, on what, and how well they tell the documents' domains apart.

Shape letters: B documents of a batch, L positions, N tokens, D domains, K codes of a codebook, J codes of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.core.bounds import Count, Whole
from pretrain.core.encoding import text_of
from pretrain.core.models.discrete.codebooks import Place, coded, fired
from pretrain.core.models.families import base
from pretrain.core.models.features import evaluating, framed
from pretrain.evaluation import Evaluation, Measured

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document

Ids = NDArray[np.int64]


@dataclass
class _Fires:
    """Of one codebook: how often each code fires in each domain, and where it did first."""

    counts_DK: Ids
    places: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # of a code, (row, position)


@dataclass(frozen=True)
class CodeActivations(Evaluation):
    """Codebook Features: Sparse and Discrete Interpretability for Neural Networks (arXiv:2310.17230).

    A code fires at a token that has it among its own. Over the documents' middles, `length` tokens at most of each:
    `codes`, how many the model has, `dead_codes`, the share that never fires, and `dead_codes.N.PART` of one block's.
    Where documents are of several domains, `code_precision`: a code's precision for a domain is the share of its tokens
    that are of it, and this is the mean over the codes that fire `least` times or more of the highest; `code_chance` is
    the share of tokens that are of the commonest domain, what a code that means nothing would have. `codes.json` lists
    of each codebook the `listed` codes that fire most: how often (`tokens`), the domain with its precision and recall
    (the share of its tokens that have the code), and `contexts` places of the text, `window` tokens of it before.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")

    cut: ClassVar[bool] = True

    length: Count = 128
    batch: Count = 16
    least: Count = 10
    listed: Whole = 100
    contexts: Count = 4
    window: Count = 8

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The shares over all tokens, and the list of codes."""
        places = coded(self.name, model)
        kept = framed(self.name, model, tokenizer, documents, self.length)
        domains = sorted({domain for _, domain in kept})
        rows, number_B = [ids for ids, _ in kept], np.array([domains.index(domain) for _, domain in kept])
        fires = {
            name: _Fires(np.zeros((len(domains), place.module.codes.shape[1]), np.int64))
            for name, place in places.items()
        }
        with evaluating(model):
            for first, ids in self._batches(model, rows):
                for name, id_RLJ in ids.items():
                    self._count(fires[name], id_RLJ, first, rows, number_B)
        tokens_D = np.bincount(number_B, [len(ids) for ids in rows], len(domains)).astype(np.int64)
        metrics = _dead(fires) | (self._precision(fires, tokens_D) if len(domains) > 1 else {})
        return Measured(metrics, listed=self._listing(tokenizer, fires, places, rows, domains, tokens_D))

    def _batches(self, model: PreTrainedModel, rows: list[list[int]]) -> Iterator[tuple[int, dict[str, Ids]]]:
        """The first row of each batch, and by codebook `id_BLJ`."""
        for start in range(0, len(rows), self.batch):
            these = rows[start : start + self.batch]
            most = max(map(len, these))
            input_BL = torch.tensor([row + [0] * (most - len(row)) for row in these], device=model.device)
            real_BL = torch.arange(most) < torch.tensor([len(row) for row in these])[:, None]
            with fired(model) as passes:
                base(model)(input_ids=input_BL, attention_mask=real_BL.long().to(model.device), use_cache=False)
            yield start, {name: each[0].cpu().numpy() for name, each in passes.items()}

    def _count(self, fires: _Fires, id_BLJ: Ids, first: int, rows: list[list[int]], number_B: Ids) -> None:
        for row, id_LJ in enumerate(id_BLJ, first):
            flat = id_LJ[: len(rows[row])].ravel()
            fires.counts_DK[number_B[row]] += np.bincount(flat, minlength=fires.counts_DK.shape[1])
            for code, where in zip(*np.unique(flat, return_index=True), strict=True):
                kept = fires.places.setdefault(int(code), [])
                if len(kept) < self.contexts:
                    kept.append((row, int(where) // id_BLJ.shape[2]))

    def _precision(self, fires: dict[str, _Fires], tokens_D: Ids) -> dict[str, float]:
        highest: list[float] = []
        for each in fires.values():
            total_K = each.counts_DK.sum(0)
            often_K = total_K >= self.least
            highest += (each.counts_DK.max(0)[often_K] / total_K[often_K]).tolist()
        chance = {"code_chance": float(tokens_D.max() / tokens_D.sum())}
        return chance | ({"code_precision": float(np.mean(highest))} if highest else {})

    def _listing(
        self, tokenizer: PreTrainedTokenizerBase, fires: dict[str, _Fires], places: dict[str, Place],
        rows: list[list[int]], domains: list[str], tokens_D: Ids,
    ) -> list[dict[str, str | float]]:  # fmt: skip
        """The codes that fire, of each codebook those that do most often first."""
        listing: list[dict[str, str | float]] = []
        for name in places:
            counts_DK = fires[name].counts_DK
            order = np.argsort(-counts_DK.sum(0), kind="stable")[: self.listed]
            for code in (int(number) for number in order if counts_DK[:, number].any()):
                domain = int(counts_DK[:, code].argmax())
                count = float(counts_DK[domain, code])
                entry: dict[str, str | float] = {"code": f"{name}:{code}", "tokens": float(counts_DK[:, code].sum())}
                if len(domains) > 1:
                    entry |= {"domain": domains[domain], "precision": count / float(counts_DK[:, code].sum())}
                    entry["recall"] = count / float(tokens_D[domain])
                for number, (row, place) in enumerate(fires[name].places[code]):
                    before = text_of(tokenizer, rows[row][max(0, place - self.window) : place])
                    entry[f"context_{number}"] = f"{before}[{text_of(tokenizer, rows[row][place : place + 1])}]"
                listing.append(entry)
        return listing


def _dead(fires: dict[str, _Fires]) -> dict[str, float]:
    """The shares of codes that never fire, of all and of each block's parts."""
    silent: dict[str, list[float]] = {}
    for name, each in fires.items():
        silent.setdefault(".".join(name.split(".")[:2]), []).extend((each.counts_DK.sum(0) == 0).tolist())
    every = [value for part in silent.values() for value in part]
    shares = {f"dead_codes.{part}": float(np.mean(values)) for part, values in silent.items()}
    return {"codes": float(len(every)), "dead_codes": float(np.mean(every))} | shares
