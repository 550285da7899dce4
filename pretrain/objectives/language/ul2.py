"""UL2: a mixture of denoisers, each announced by a mode token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pretrain.core.batch import Batch, Context, Row
from pretrain.core.bounds import Ge
from pretrain.core.errors import PretrainError
from pretrain.objectives import Loss, Objective
from pretrain.objectives._masking import choose_spans, corrupt
from pretrain.objectives.language.span_corruption import Pair, pairs_loss, pairs_to_batch


@dataclass(frozen=True)
class UL2(Objective):
    """UL2: Unifying Language Learning Paradigms (arXiv:2205.05131).

    Each document draws one of seven denoisers, all equally likely: R, short spans (mean 3 or 8, 15% hidden); X, long
    spans or many (mean 3 or 8 at 50%, mean `long_span` at 15% and at 50%); S, the text from a random point on (mean a
    quarter of it). A mode token stands before the input. Loss, packing and what happens where sentinels are too few are
    those of span corruption. The mode tokens `[R]`, `[S]`, `[X]` are the tokenizer's (`extra` of its stage).
    """

    version: ClassVar[int] = 3  # as many spans as there are sentinels
    families: ClassVar[tuple[str, ...]] = ("seq2seq",)
    task: ClassVar[str] = "seq2seq"

    long_span: Annotated[float, Ge(1)] = 64.0
    modes: tuple[str, str, str] = ("[R]", "[S]", "[X]")

    def denoisers(self) -> list[tuple[str, float, float | None]]:
        """(mode, rate, mean span; None: the end of the text)."""
        r, s, x = self.modes
        return [
            (r, 0.15, 3.0), (r, 0.15, 8.0), (s, 0.25, None), (x, 0.5, 3.0), (x, 0.5, 8.0),
            (x, 0.15, self.long_span), (x, 0.5, self.long_span),
        ]  # fmt: skip

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """As span corruption's, with a mode token before each input."""
        vocabulary = context.vocabulary
        known = {token: index for index, token in enumerate(vocabulary.tokens)}
        missing = [mode for mode in self.modes if mode not in known]
        if missing or len(vocabulary.sentinels) < 2:
            lacking = ", ".join(missing) or "sentinels"
            made = f"a tokenizer made with sentinels: 100 and extra: {list(self.modes)}"
            raise PretrainError(f"ul2: no {lacking}; accepted: {made}")

        def pair(tokens_L: NDArray[np.int64]) -> Pair:
            mode, rate, span = self.denoisers()[context.rng.integers(7)]
            hidden_L = (
                _end_of_text(len(tokens_L), rate, context.rng)
                if span is None
                else choose_spans(len(tokens_L), rate, span, context.rng, len(vocabulary.sentinels) - 1)
            )
            source, target = corrupt(tokens_L, hidden_L, vocabulary.sentinels)
            return np.concatenate([[known[mode]], source]), target

        return pairs_to_batch([[pair(p.astype(np.int64)) for p in row.pieces()] for row in rows], context)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean loss over the targets."""
        return pairs_loss(model, batch)


def _end_of_text(length: int, rate: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Hide the text from a random point on: a share that is uniform with mean `rate`."""
    hidden_L = np.zeros(length, dtype=bool)
    if length > 1:
        hidden_L[length - min(max(1, round(length * rng.uniform(0, 2 * rate))), length - 1) :] = True
    return hidden_L
