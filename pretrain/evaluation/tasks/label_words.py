"""Classes by the likelihood of words after a prompt, with no tuning: calibrated, and several words a class.

Shape letters: N documents, W words of all labels, C labels, R resamples.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from pretrain.core.batch import Vocabulary
from pretrain.core.bounds import Whole
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError, brief
from pretrain.core.folders import corpus_of
from pretrain.core.method import Ref
from pretrain.core.models.families import positions_of
from pretrain.core.quick.confusion import confusion_of
from pretrain.corpus.store import Corpus
from pretrain.evaluation import Evaluation, Measured
from pretrain.evaluation._intervals import bounds, resampled_sums
from pretrain.evaluation._pairs import causal_nll, summed_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document


@dataclass(frozen=True)
class LabelWords(Evaluation):
    """Yuan 1.0: Large-Scale Pre-trained Language Model in Zero-Shot and Few-Shot Learning (arXiv:2110.04725).

    After the `template`, filled with a document's columns, the model says how likely each of the labels' `words` is as
    what comes next: p(w | x), over all words, sums to one. Calibration divides it by p(w | nothing), the mean over
    `content_free` texts in the columns' places, which takes away how much the model likes a word whatever is asked
    (the diagonal of Zhao et al., arXiv:2102.09690). Label expansion is to give a label several words: its score is the
    mean over them, and the answer the label of the greatest. `calibrate: false` and one word a label are the usual
    likelihoods. `accuracy` and `label_loss`, the mean of -log of the true label's share of the scores, in nats;
    `majority` is the accuracy of always answering the commonest label. With `shots` so many training examples of each
    label, drawn from the corpus `pool` by `seed`, are shown before each document, their first word filled in, parted by
    `separator`. Of prompts too long for the model the beginning is left out, and examples of labels without words are.
    Intervals: bootstrap over documents.
    """

    families: ClassVar[tuple[str, ...]] = ("causal",)
    cut: ClassVar[bool] = True

    words: dict[str, tuple[str, ...]]
    template: str = "{text}\n"
    label: str = "label"
    calibrate: bool = True
    content_free: tuple[str, ...] = ("N/A", "[MASK]", "")
    shots: Whole = 0
    pool: Ref = ""
    separator: str = "\n\n"
    resamples: Whole = 200
    seed: Whole = 0

    def __post_init__(self) -> None:
        """Refuse a template without a column, labels without words, words of two labels, and shots from nowhere."""
        super().__post_init__()
        try:
            shown = self.shown
        except ValueError as error:
            raise PretrainError(f"label_words: template {self.template!r}: {error}", place=("template",)) from error
        if not shown or not all(name.isidentifier() for name in shown):
            raise PretrainError(
                f"label_words: template {self.template!r}: accepted: text with at least one {{column}}",
                place=("template",),
            )
        every = [word for words in self.words.values() for word in words]
        if len(self.words) < 2 or not all(self.words.values()) or not all(every) or len({*every}) < len(every):
            raise PretrainError(
                f"label_words: words {brief(self.words)}: accepted: 2 or more labels, each with words of its own",
                place=("words",),
            )
        if bool(self.shots) != bool(self.pool):
            raise PretrainError(
                f"label_words: shots {self.shots}, pool {self.pool!r}: accepted: both, or neither", place=("shots",)
            )
        if self.calibrate and not self.content_free:
            raise PretrainError("label_words: content_free []: accepted: at least one text", place=("content_free",))

    @cached_property
    def shown(self) -> tuple[str, ...]:
        """The columns in the template."""
        return tuple(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.template) if name))

    @property
    def passes(self) -> float:
        """One for each word."""
        return float(sum(map(len, self.words.values())))

    @property
    def columns(self) -> tuple[str, ...]:
        """Those in the template, and the label's."""
        return (*self.shown, self.label)

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on documents that have the columns and a label with words."""
        labels = tuple(self.words)
        known = [d for d in documents if all(d.get(c) is not None for c in self.columns)]
        known = [d for d in known if str(d[self.label]) in self.words]
        if not known:
            raise PretrainError(
                f"label_words: no document has {', '.join(self.shown)} and in {self.label!r} one of "
                f"{brief(list(labels))}: accepted: at least one"
            )
        before = self._shown_before()
        share_NW = self.shares(model, tokenizer, [before + self._filled(d) for d in known])
        if self.calibrate:
            nothing = [before + self._filled(dict.fromkeys(self.shown, text)) for text in self.content_free]
            free_W = self.shares(model, tokenizer, nothing).mean(0)
            share_NW = share_NW / np.maximum(free_W / free_W.sum(), np.finfo(float).tiny)
        score_NC = self.scores(share_NW)
        true_N = np.array([labels.index(str(d[self.label])) for d in known])
        right_N = score_NC.argmax(1) == true_N
        loss_N = -np.log(np.maximum(score_NC[np.arange(len(known)), true_N] / score_NC.sum(1), np.finfo(float).tiny))
        values_N2 = np.stack([right_N.astype(float), loss_N], 1)
        names = ("accuracy", "label_loss")
        means_RK = resampled_sums(values_N2, self.resamples, self.seed) / len(known)
        metrics = dict(zip(names, values_N2.mean(0).tolist(), strict=True))
        metrics["majority"] = float(np.bincount(true_N).max() / len(known))
        metrics["documents"] = float(len(known))
        answered = [labels[number] for number in score_NC.argmax(1)]
        return Measured(
            metrics,
            intervals={name: bounds(means_RK[:, k]) for k, name in enumerate(names)} if self.resamples else {},
            confusion=confusion_of(answered, [labels[number] for number in true_N]),
        )

    def shares(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
    ) -> NDArray[np.float64]:
        """p(w | prompt) over all words of all labels, `share_NW`: rows sum to 1."""
        vocabulary, limit = Vocabulary.of(tokenizer), positions_of(model) or 1024
        begin = [] if vocabulary.begin is None else [vocabulary.begin]
        every = [word for words in self.words.values() for word in words]
        after = [ids.tolist() for ids in encode(tokenizer, every)]
        pairs = []
        for ids in encode(tokenizer, prompts):
            for word in after:
                room = max(1, limit + 1 - len(begin) - len(word))
                source = begin + ids[-room:].tolist()
                pairs.append((source or word[:1], word))  # where nothing stands before a word its first is given
        nll_NW = summed_nll(model, pairs, causal_nll).reshape(len(prompts), len(every))
        likely_NW = np.exp(nll_NW.min(1, keepdims=True) - nll_NW)
        return likely_NW / likely_NW.sum(1, keepdims=True)

    def scores(self, share_NW: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each label's score, `score_NC`: the mean over its words."""
        ends = np.cumsum([len(words) for words in self.words.values()])
        return np.stack([part_NK.mean(1) for part_NK in np.split(share_NW, ends[:-1], axis=1)], 1)

    def _filled(self, columns: Mapping[str, object]) -> str:
        return self.template.format(**{name: columns[name] for name in self.shown})

    def _shown_before(self) -> str:
        """The examples, label after label and round after round; nothing of none."""
        if not self.shots:
            return ""
        rows: dict[str, list[Document]] = {label: [] for label in self.words}
        for document in Corpus(corpus_of(Path(self.pool))).documents("train", (*self.columns, "id")):
            if all(document.get(c) is not None for c in self.columns) and str(document[self.label]) in rows:
                rows[str(document[self.label])].append(document)
        few = [label for label, some in rows.items() if len(some) < self.shots]
        if few:
            raise PretrainError(
                f"label_words: {self.pool} has {len(rows[few[0]])} training documents of label {few[0]!r}; accepted: "
                f"{self.shots} or more, as many as shots"
            )
        rng = np.random.default_rng(self.seed)
        drawn = {label: rng.choice(len(some), self.shots, replace=False) for label, some in rows.items()}
        shown = [(label, rows[label][drawn[label][k]]) for k in range(self.shots) for label in rows]
        return "".join(self._filled(d) + self.words[label][0] + self.separator for label, d in shown)
