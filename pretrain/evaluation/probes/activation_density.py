"""How many of the feed-forwards' activations are not zero.

Shape letters: B documents of a batch, L tokens, F width of a feed-forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from pretrain.core.bounds import Count, NonNegative
from pretrain.core.models.density import activations
from pretrain.core.models.families import base, family
from pretrain.core.models.features import evaluating, framed
from pretrain.evaluation import Evaluation, Measured

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document


@dataclass(frozen=True)
class ActivationDensity(Evaluation):
    """From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in Transformers
    (arXiv:2402.01911).

    The share of activations with |a| > `epsilon`, a being what the nonlinearity of each feed-forward puts out (of a
    gated one the gate's), over the tokens of the documents' middles, `length` at most of each: `activation_density`,
    the mean over blocks, and `activation_density.N` of block N. With `epsilon` 0 what is not exactly zero counts: a
    SiLU or GELU is dense then, but for the GELU's far negative side. Of an encoder-decoder the encoder is measured.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert", "modernbert", "t5")

    cut: ClassVar[bool] = True

    epsilon: NonNegative = 0.0
    length: Count = 128
    batch: Count = 16

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The shares, over all tokens and by domain."""
        kept = framed(self.name, model, tokenizer, documents, self.length)
        kept.sort(key=lambda row: len(row[0]))
        counts: dict[str, list[torch.Tensor]] = {}  # of each domain, [active by block …, tokens] of each document
        with evaluating(model):
            for start in range(0, len(kept), self.batch):
                rows = kept[start : start + self.batch]
                for (_, domain), sums in zip(rows, self._count(model, [ids for ids, _ in rows]), strict=True):
                    counts.setdefault(domain, []).append(sums)
        by_domain = {name: _shares(sums) for name, sums in sorted(counts.items()) if name}
        every = _shares([row for sums in counts.values() for row in sums])
        return Measured(every, by_domain if len(by_domain) > 1 else {})

    def _count(self, model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
        """For each row the mean share of active neurons summed over its tokens, by block, and its number of tokens."""
        lengths_B = torch.tensor([len(row) for row in rows], device=model.device)
        input_BL = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows], device=model.device)
        real_BL = torch.arange(input_BL.shape[1], device=model.device) < lengths_B[:, None]
        entry = family(model)
        inner = model.get_encoder() if entry.decoder_blocks else base(model)
        more = {} if entry.decoder_blocks or not entry.causal else {"use_cache": False}
        with activations(model, self.name) as seen:
            inner(input_ids=input_BL, attention_mask=real_BL.long(), **more)
        active = [(layer[0].abs() > self.epsilon).float().mean(-1) for layer in seen.values() if layer]
        sums = [(share_BL * real_BL).sum(1) for share_BL in active]
        return torch.stack([*sums, lengths_B.float()], dim=1).double().cpu()


def _shares(rows: list[torch.Tensor]) -> dict[str, float]:
    *sums, tokens = torch.stack(rows).sum(0).tolist()
    shares = {f"activation_density.{number}": value / tokens for number, value in enumerate(sums)}
    return {"activation_density": sum(shares.values()) / len(shares)} | shares
