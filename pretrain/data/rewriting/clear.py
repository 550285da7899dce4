"""CLEAR: documents whose response a model doubts are dropped, or are given a response that it finds better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pretrain.core.bounds import Count, NonNegative, Share, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.files import JSONObject, digest
from pretrain.core.folders import checkpoint_of
from pretrain.core.meter import count_flops
from pretrain.core.method import InnerObjective, Ref
from pretrain.data import DataOperation
from pretrain.data._columns import check_columns, check_filled
from pretrain.data._work import by_domain, desk, percentiles, stamps
from pretrain.data.rewriting._confidence import Judge, consistency, preferred

if TYPE_CHECKING:
    from datasets import Dataset

    from pretrain.data._work import Desk
    from pretrain.objectives.labelled.seq2seq import Seq2Seq

SHARD = 64  # documents
SHOWN = 20  # changes that are reported, and of each so many characters
CHARACTERS = 300
Pair = tuple[str, str]  # prompt and response


@dataclass(frozen=True)
class Clear(DataOperation):
    """Automated Data Curation for Robust Language Model Fine-Tuning (arXiv:2403.12776).

    `step: filter` keeps the documents whose response y to the prompt x has the confidence c(x, y) ≥ `threshold`
    (none: the median), and wants the model that is to be fine-tuned. `step: correct` wants the model that was tuned on
    what was left, and gives a document that model's greedy response y' in place of y where it is preferred to y with
    more than `threshold` (none: 0.8); a filter after it drops what stays doubtful. The confidence is BSDetector's
    (arXiv:2308.16175),

        c(x, y) = β · O + (1 - β) · S,    O = 1/k · Σ_i α · s(y, y_i) + (1 - α) · [y_i = y],

    over k = `responses` that are sampled at `temperature`. S is, with `reflection: choice`, the mean of two questions
    whether y is correct (A: 1), incorrect (B: 0) or uncertain (C: ½), each the expected value under the model's
    probabilities of the three letters; and y' is preferred with the probability of its letter against that of y and of
    neither, the mean over both orders. A model too small to be asked takes `reflection: likelihood`: S is the
    geometric mean of the probabilities of y's tokens, and y' is preferred with c(x, y') / (c(x, y') + c(x, y)).

    Prompt, response and the longest answer are those of `task`, a seq2seq as in tuning. The paper's s is what a model
    of entailment says; here it is ROUGE-L. `corpus.json` has what was changed.
    """

    model: Ref
    step: Literal["filter", "correct"] = "filter"
    task: InnerObjective = "seq2seq"
    threshold: Share | None = None
    reflection: Literal["choice", "likelihood"] = "choice"
    responses: Count = 5
    temperature: NonNegative = 1.0
    alpha: Share = 0.8
    beta: Share = 0.7
    length: Whole = 0
    seed: Whole = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective.name != "seq2seq":
            raise PretrainError(
                f"clear: task {self.objective.name!r}: accepted: {{method: seq2seq, …}}", place=("task",)
            )

    @cached_property
    def objective(self) -> Seq2Seq:
        """What says where prompts and responses are."""
        return self.held()["task"]

    def __call__(self, corpus: Dataset) -> Dataset:
        """The documents that are kept, or all with some responses changed."""
        with desk() as here:
            pairs = self.pairs(corpus)
            return self._filter(corpus, pairs, here) if self.step == "filter" else self._correct(corpus, pairs, here)

    def pairs(self, corpus: Dataset) -> list[Pair]:
        """Each document's prompt and response."""
        columns = self.objective.columns
        check_columns(self.name, corpus, columns)
        pairs = []
        for number, document in enumerate(corpus.select_columns(list(columns))):
            check_filled(self.name, number, document, columns)
            pairs.append((self.objective.prompt.format(**document), str(document[columns[-1]]).strip()))
        return pairs

    def _filter(self, corpus: Dataset, pairs: Sequence[Pair], here: Desk) -> Dataset:
        confidence_N = np.array([row["confidence"] for row in self._rows(pairs, here)])
        least = self.threshold if self.threshold is not None else float(np.median(confidence_N)) if len(pairs) else 0.0
        kept_N = np.flatnonzero(confidence_N >= least) if len(pairs) else np.arange(0)
        report = {"method": self.name, "step": self.step, "threshold": least, "documents": by_domain(corpus, kept_N)}
        here.reports.append(report | {"confidence_percentiles": percentiles(confidence_N)})
        return here.keep(self.name, corpus, kept_N, "low confidence", confidence_N)

    def _correct(self, corpus: Dataset, pairs: Sequence[Pair], here: Desk) -> Dataset:
        column = self.objective.columns[-1]
        if getattr(corpus.features[column], "dtype", None) not in ("string", "large_string"):
            raise PretrainError(
                f"clear: column {column!r} of {corpus.features[column]}: accepted: texts, to correct them"
            )
        rows = self._rows(pairs, here)
        least = 0.8 if self.threshold is None else self.threshold
        changed = {n: row["candidate"] for n, row in enumerate(rows) if row["preference"] > least}
        shown = [
            {"document": n, "before": pairs[n][1][:CHARACTERS], "after": y[:CHARACTERS]} for n, y in changed.items()
        ]
        report = {"method": self.name, "step": self.step, "threshold": least, "changed": len(changed)}
        preference_N = np.array([row["preference"] for row in rows])
        here.reports.append(report | {"changes": shown[:SHOWN], "preference_percentiles": percentiles(preference_N)})
        return corpus.map(
            lambda document, number: {column: changed.get(number, document[column])},
            with_indices=True, features=corpus.features, load_from_cache_file=False,
        )  # fmt: skip

    def _rows(self, pairs: Sequence[Pair], here: Desk) -> list[JSONObject]:
        """What the model makes of each pair; those on the desk are not judged again."""
        path = checkpoint_of(Path(self.model))
        state = stamps(path)
        opened: Judge | None = None
        rows: list[JSONObject] = []
        for start in range(0, len(pairs), SHARD):
            shard = pairs[start : start + SHARD]

            def work(shard: Sequence[Pair] = shard) -> JSONObject:
                nonlocal opened
                judging = opened = opened or Judge(path, self.length, self.objective.answer)
                made, flops = count_flops(lambda: [self._judged(judging, *pair) for pair in shard])
                return {"rows": made, "flops": flops}

            fields = asdict(self) | {"model": str(path.resolve()), "threshold": None}
            rows += here.kept(digest([fields, state, list(shard)])[:32], work)["rows"]
        return rows

    def _judged(self, judging: Judge, prompt: str, response: str) -> JSONObject:
        if self.step == "filter":
            return {"confidence": self.confidence(judging, prompt, response)}
        (candidate,) = judging.answers(prompt, 1, 0.0)
        if not candidate or candidate == response:
            return {"candidate": response, "preference": 0.0}
        if self.reflection == "choice":
            return {"candidate": candidate, "preference": judging.preference(prompt, candidate, response)}
        both = (self.confidence(judging, prompt, text) for text in (candidate, response))
        return {"candidate": candidate, "preference": preferred(*both)}

    def confidence(self, judging: Judge, prompt: str, response: str) -> float:
        """c(x, y); what is sampled follows from the prompt and `seed`."""
        seed = int(digest([self.seed, prompt])[:15], 16)
        sampled = judging.answers(prompt, self.responses, self.temperature, seed) if self.beta else []
        observed = consistency(response, sampled, self._alike, self.alpha) if self.beta else 0.0
        certain = judging.certainty(prompt, response, self.reflection) if self.beta < 1 else 0.0
        return self.beta * observed + (1 - self.beta) * certain

    def _alike(self, first: str, second: str) -> tuple[float, float]:
        measured = self.objective.metrics([first], [second])
        return measured["rouge_l"], float(first == second)
