"""How often a cache of experts has the next one, by what it drops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch

from pretrain.core.bounds import Count, Whole
from pretrain.core.models.features import evaluating, framed
from pretrain.evaluation import Evaluation, Measured
from pretrain.surgery.experts.read_me import experts_of, router_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document

NAMES = ("lru", "lookahead", "belady")  # the policies


def hits(trace: Sequence[int], capacity: int, lookahead: int | None = 0) -> int:
    """How many of a trace's experts are in a cache of `capacity` experts when they are asked for; it is empty at first.

    An expert that is not there is loaded, in the place of another once the cache is full: of the one that comes last
    among the next `lookahead` of the trace, and of those that are not among them the one that was used longest ago.
    With 0 that is LRU, and with None, which knows the whole trace, Belady's policy: no other has more hits.
    """
    end, following, later = len(trace), [0] * len(trace), dict[int, int]()
    for place in range(end - 1, -1, -1):
        following[place] = later.get(trace[place], end)
        later[trace[place]] = place
    reach, count, cached = (end if lookahead is None else lookahead), 0, dict[int, int]()  # expert: its latest place
    for place, expert in enumerate(trace):
        if expert in cached:
            count += 1
        elif len(cached) == capacity:

            def worth_least(other: int, place: int = place) -> tuple[bool, int]:
                coming = following[cached[other]]
                unseen = coming == end or coming - place > reach
                return unseen, -cached[other] if unseen else coming

            del cached[max(cached, key=worth_least)]
        cached[expert] = place
    return count


@dataclass(frozen=True)
class ExpertCache(Evaluation):
    """Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design (arXiv:2410.19123).

    Where fewer experts than there are fit in fast memory, `capacity` of them, the others are loaded when a token asks
    for them. A model after the surgery `read_me` knows which expert each token of a text takes before its first block
    is computed, and the same for all blocks. From these choices, without running the blocks: `hit_rate_lru`, the share
    of tokens whose expert is in a cache that drops the one used longest ago; `hit_rate_lookahead`, where it drops the
    one that the next `lookahead` tokens need last or not at all; and `hit_rate_belady`, where it knows the whole text,
    the most there can be. `stays` is the share of tokens that take the expert of the token before, and `experts_used`
    how many experts take one token in a hundred or more. Of each document the middle is read, `length` tokens at most,
    and the cache is empty before it. Numbers are of tokens, not of seconds: nothing is loaded.
    """

    families: ClassVar[tuple[str, ...]] = ("llama",)

    cut: ClassVar[bool] = True

    capacity: Count = 2
    lookahead: Whole = 16
    length: Count = 512

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The rates, over all tokens and by domain."""
        experts = router_of(model, self.name).out.out_features
        traces: dict[str, list[list[int]]] = {}
        with evaluating(model):
            for ids, domain in framed(self.name, model, tokenizer, documents, self.length):
                traces.setdefault(domain, []).append(experts_of(model, torch.tensor([ids]))[0].tolist())
        by_domain = {name: self._rates(rows, experts) for name, rows in sorted(traces.items()) if name}
        every = self._rates([row for rows in traces.values() for row in rows], experts)
        return Measured(every, by_domain if len(by_domain) > 1 else {})

    def _rates(self, traces: list[list[int]], experts: int) -> dict[str, float]:
        """Of some documents' traces."""
        tokens = sum(map(len, traces))
        rates: dict[str, float] = {}
        for name, lookahead in zip(NAMES, (0, self.lookahead, None), strict=True):
            rates[f"hit_rate_{name}"] = sum(hits(trace, self.capacity, lookahead) for trace in traces) / tokens
        same = sum(before == after for trace in traces for before, after in pairwise(trace))
        counts = [sum(trace.count(expert) for trace in traces) for expert in range(experts)]
        used = sum(100 * count >= tokens for count in counts)
        return rates | {"stays": same / max(1, tokens - len(traces)), "experts_used": float(used)}
