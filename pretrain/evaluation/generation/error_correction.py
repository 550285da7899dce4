"""How well a model finds and corrects grammatical errors: precision, recall and F0.5 of edits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.core.batch import Context, Example, Vocabulary
from pretrain.core.bounds import Positive, Whole
from pretrain.core.encoding import Encoder
from pretrain.core.errors import PretrainError
from pretrain.core.files import digest
from pretrain.core.grammar.edits import OUTSIDE, Counts, Edit, aligned, counted
from pretrain.core.grammar.rules import read_grammar, with_errors
from pretrain.core.grammar.sentences import sentences
from pretrain.core.method import InnerObjective, Ref
from pretrain.core.models.families import positions_of
from pretrain.core.models.heads import answers_with_labels, labels_of
from pretrain.evaluation import Evaluation, Measured
from pretrain.evaluation._intervals import bounds, bounds_by_domain, resampled_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document
    from pretrain.objectives.labelled import FineTuning

METRICS = ("precision", "recall", "f05")


class Pair(NamedTuple):
    """A text with errors, what is right, and the edits from the one to the other with their types, where known."""

    source: str
    target: str
    edits: list[Edit]


@dataclass(frozen=True)
class ErrorCorrection(Evaluation):
    """GECTurk: Grammatical Error Correction and Detection Dataset for Turkish (arXiv:2309.11346).

    A model that has learnt by the `objective` is given texts with errors. An answer of `seq2seq` is a text: its edits
    are those of the least-cost alignment with the source's tokens, which white space parts, as are the true ones, with
    runs of wrong tokens as one edit; an edit that is the same in tokens and correction is a hit. P = hits / proposed,
    R = hits / true, F0.5 = 1.25 P R / (0.25 P + R), over all edits of all texts (`correction_precision`, …; of nothing
    proposed P is 1, of nothing to find R), and `correction_exact` is the share of texts that are right to the token.
    `detection_…` are the same of tokens, whether one is in an edit; of `tagging`, whose answer is a tag for each token,
    they are all there is. The texts are those of the columns `source` and `target`, or, where `source` is empty,
    held-out `text` is right and gets errors by the rules of `language`, `rules`, `types` and `rate`, drawn by the text
    and `seed`, sentence by sentence with `sentences`, as `grammatical_errors` has them; then the share that is
    corrected (of `tagging`: found) of each type's errors is listed. Texts are cut to `length` tokens by the objective
    (0: the length that the checkpoint was trained at). Intervals: bootstrap over texts.

    The authors count with the M2 scorer, which of all ways to write an answer as edits takes the one with most hits.
    """

    estimated: ClassVar[bool] = False

    objective: InnerObjective = "seq2seq"
    source: str = ""
    target: str = "target"
    language: str = "english"
    rules: Ref = ""
    types: tuple[str, ...] = ()
    rate: Positive = 1.0
    sentences: bool = False
    length: Whole = 0
    resamples: Whole = 200
    seed: Whole = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method.name not in ("seq2seq", "tagging") or self.method.columns[:-1] != ("text",):
            raise PretrainError(
                f"error_correction: objective {self.method.name!r}: accepted: seq2seq or tagging, that read 'text'",
                place=("objective",),
            )

    @cached_property
    def method(self) -> FineTuning:
        """The objective."""
        return self.held()["objective"]

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the texts, where they have errors already."""
        return (self.source, self.target) if self.source else ()

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on documents with text."""
        objective = self.method
        if not (answers_with_labels(model) if objective.headed else model.can_generate()):
            lack = "gives no labels" if objective.headed else "writes nothing"
            raise PretrainError(
                f"error_correction: a {type(model).__name__} {lack}; accepted: a checkpoint that {objective.name} has "
                "trained"
            )
        column = self.source or "text"
        chosen = [d for d in documents if d.get(column) and (not self.source or d.get(self.target) is not None)]
        if not chosen:
            raise PretrainError(
                f"error_correction: no document has {' and '.join(self.columns or ('text',))}: accepted: one at least"
            )
        pairs, names = self.pairs(chosen)
        length = self.length or min(512, positions_of(model) or 512)
        context = Context(
            Vocabulary.of(tokenizer), length, np.random.default_rng(self.seed), encoder=Encoder(tokenizer),
            labels=labels_of(model),
        )  # fmt: skip
        # Tags to predict in place of: the true ones may be of types that the model has not learnt.
        place = OUTSIDE if OUTSIDE in context.labels else next(iter(context.labels), OUTSIDE)
        true = [" ".join([place] * len(s.source.split())) if objective.headed else s.target for s in pairs]
        examples = [
            Example({"text": pair.source, objective.columns[-1]: value}, 0, number)
            for number, (pair, value) in enumerate(zip(pairs, true, strict=True))
        ]
        answers = objective.predictions(model, examples, context)
        return self._measured(pairs, answers, names)

    def pairs(self, documents: Sequence[Document]) -> tuple[list[Pair], list[str]]:
        """What is measured, with the documents' own errors or with those that the rules make, and of which domains."""
        names = [str(document.get("domain") or "text") for document in documents]
        if self.source:
            sides = [(str(d[self.source]), str(d[self.target])) for d in documents]
            return [Pair(a, b, aligned(a.split(), b.split())) for a, b in sides], names
        grammar = read_grammar(self.name, self.language, self.rules, self.types)
        made, domains = list[Pair](), list[str]()
        texts = [
            (each, name)
            for document, name in zip(documents, names, strict=True)
            for each in (sentences(str(document["text"])) if self.sentences else [str(document["text"])])
        ]
        for right, name in ((text.strip(), name) for text, name in texts if text.strip()):
            rng = np.random.default_rng(int(digest([self.seed, right])[:15], 16))
            wrong, edits = with_errors(right, grammar, rng, self.rate)
            made.append(Pair(wrong, right, edits))
            domains.append(name)
        return made, domains

    def _measured(
        self, pairs: Sequence[Pair], answers: Sequence[str] | Sequence[list[str]], names: Sequence[str]
    ) -> Measured:
        rows: list[list[float]] = []
        types: defaultdict[str, list[bool]] = defaultdict(list)
        generates = not self.method.headed
        for pair, answer in zip(pairs, answers, strict=True):
            words, right = pair.source.split(), pair.target.split()
            true = aligned(words, right)
            if isinstance(answer, str):
                proposed = aligned(words, answer.split())
                hits = {(e.first, e.end) for e in {*true} & {*proposed}}
                flagged = _tokens(proposed, len(words))
            else:
                proposed, flagged = [], {n for n, tag in enumerate(answer) if tag != OUTSIDE}
                hits = {(n, n + 1) for n in flagged}
            wrong = _tokens(true if generates else pair.edits, len(words))
            detected = Counts(len(flagged & wrong), len(flagged), len(wrong))
            exact = isinstance(answer, str) and answer.split() == right
            rows.append([*counted(proposed, true), *detected, exact, 1.0])
            for edit in pair.edits if not self.source else ():
                types[edit.type].append(any(a < edit.end and edit.first < b for a, b in hits))
        values_NK = np.array(rows)
        whole = _scores(values_NK.sum(0)[None], generates)
        sums_RK = resampled_sums(values_NK, self.resamples, self.seed) if self.resamples else None
        ends = (
            {name: bounds(values) for name, values in _scores(sums_RK, generates).items()}
            if sums_RK is not None
            else {}
        )
        domains = {name: values_NK[np.array(names) == name].sum(0)[None] for name in sorted({*names})}
        by_domain = {
            name: {m: float(v[0]) for m, v in _scores(sums, generates).items()} for name, sums in domains.items()
        }
        counts = {"errors": float(values_NK[:, 2].sum()), "texts": float(len(rows))}
        return Measured(
            {name: float(value[0]) for name, value in whole.items()} | counts,
            by_domain if len(by_domain) > 1 else {}, ends,
            listed=[
                {"type": name, "errors": len(right), "corrected" if generates else "detected": float(np.mean(right))}
                for name, right in sorted(types.items())
            ],
            domain_intervals=bounds_by_domain(
                values_NK, names, lambda sums_RK: _scores(sums_RK, generates), self.resamples, self.seed
            ) if self.resamples else {},
        )  # fmt: skip


def _tokens(edits: Sequence[Edit], count: int) -> set[int]:
    """The tokens that edits change; of what is put in, the one before which, or at the end after which, it stands."""
    places = (
        (e.first, e.end) if e.first < e.end else (min(e.first, count - 1), min(e.first, count - 1) + 1) for e in edits
    )
    return {token for first, end in places for token in range(max(first, 0), end)}


def _scores(sums_RK: NDArray[np.float64], generates: bool) -> dict[str, NDArray[np.float64]]:
    """The metrics of sums over documents, a row each: hits, proposed, true of edits and of tokens, exact, documents."""
    parts = {"correction": sums_RK[:, :3], "detection": sums_RK[:, 3:6]}
    scores = {
        f"{part}_{metric}": np.array(column)
        for part, counts_R3 in parts.items()
        if generates or part == "detection"
        for metric, column in zip(
            METRICS, zip(*(Counts(*row).scores() for row in counts_R3.tolist()), strict=True), strict=True
        )
    }
    return scores | ({"correction_exact": sums_RK[:, 6] / sums_RK[:, 7]} if generates else {})
