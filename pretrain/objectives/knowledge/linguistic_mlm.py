"""Masked language modelling beside the tags of words and the order of sentences.

Shape letters: B examples, L tokens, T tags of a column.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch, Context, Example, Row
from pretrain.core.bounds import NonNegative, PositiveShare, Share
from pretrain.core.errors import PretrainError, brief, listed, nearest
from pretrain.core.grammar.sentences import sentences
from pretrain.core.models.cross_entropy import IGNORE
from pretrain.objectives import Loss, Objective, summed
from pretrain.objectives._fine_tuning import examples_of, filled, inputs_of, named
from pretrain.objectives._masking import check_shares
from pretrain.objectives._words import words_of_characters, words_of_tokens
from pretrain.objectives.knowledge._masked import encoded, hidden, masked_loss, new_layer, new_pooled

ORDER = "order"  # the name of the term that is no column's
TAKEN = (ORDER, "masked_lm", "accuracy")


@dataclass(frozen=True)
class LinguisticMLM(Objective):
    """Mengzi: Towards Lightweight yet Ingenious Pre-trained Models for Chinese (arXiv:2110.06696).

    The paper's pretraining objectives, of a model whose architecture stays BERT's. The input is two runs of sentences
    that follow one another, `begin first end second end`, in half of the cases in the wrong order, with `rate` of the
    tokens hidden as in `masked_lm`. The loss is the sum of those of the hidden tokens, of the order, told from the
    first state (ALBERT's sentence order prediction), and of each column of tags, told of each word from the state of
    its first token, hidden or not (parts of speech and named entities in the paper, tagged by spaCy):

        L = L_mlm + order_weight · L_order + tag_weight · sum over columns of L_tags

    `tags` gives each column's tags; a document has one tag a word (a list, or a text parted by white space). Words are
    those of the column `words` (a list), else what white space parts: Chinese has none, and `dictionary_tags` writes
    words and tags of it. A document that is too long begins at a sentence, drawn anew each time, and its two runs part
    at another; one of a single sentence has no order. The heads are trained beside the model and thrown away.

    The paper says neither the weights (here equal) nor from which input tags are told. It names a third objective,
    "dynamic gradient correction", for what masking does to a sentence, without a formula: it is not here.
    """

    families: ClassVar[tuple[str, ...]] = ("bert", "modernbert")
    task: ClassVar[str] = "masked"
    reads: ClassVar[Literal["rows", "examples"]] = "examples"
    fill: ClassVar[Literal["longest", "rows", "apart"]] = "longest"  # what a batch makes of its inputs

    tags: dict[str, tuple[str, ...]]
    rate: PositiveShare = 0.15
    masked: Share = 0.8
    random: Share = 0.1
    tag_weight: NonNegative = 1.0
    order_weight: NonNegative = 1.0
    text: str = "text"
    words: str | None = None

    def __post_init__(self) -> None:
        """Refuse shares of more than all, tags among which nothing is to be told, and columns named as other terms."""
        super().__post_init__()
        check_shares(self.name, self.masked, self.random)
        for column, names in self.tags.items():
            if len({*names}) < max(2, len(names)):
                wrong = f"{self.name}: tags {column}: {brief([*names])}: accepted: 2 or more, each once"
                raise PretrainError(wrong, place=("tags", column))
            if column in TAKEN:
                wrong = f"{self.name}: tags {column}: accepted: a column of another name than {', '.join(TAKEN)}"
                raise PretrainError(wrong, place=("tags", column))

    @property
    def columns(self) -> tuple[str, ...]:
        """The text's, the words' and those of tags."""
        return (self.text, *([self.words] if self.words else []), *self.tags)

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """The text."""
        return ((self.text,),)

    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """`tokens_BL` with tokens hidden, `target_BL`, `mask_BL`, `segment_BL`, `order_B` and `tag_BL` a column."""
        examples = examples_of(rows, self.name)
        begin = [] if context.vocabulary.begin is None else [context.vocabulary.begin]
        end = [] if context.vocabulary.eos is None else [context.vocabulary.eos]
        room = context.length - len(begin) - 2 * len(end)
        if room < 2:
            raise PretrainError(f"length {context.length}: accepted: room for text between the special tokens")
        inputs, words, orders = list[tuple[list[int], int]](), list[list[int]](), list[int]()
        for place, example in enumerate(examples):
            ids, word_T, starts = self._read(example, context)
            context.cut.update({place} if len(ids) > room else ())
            runs, order = drawn(len(ids), starts, room, context.rng)
            row, first_of = [*begin], [0] * len(begin)
            for start, stop in runs:
                row += [*ids[start:stop], *end]
                first_of += [*word_T[start:stop], *([0] * len(end))]
            inputs.append((row, len(begin) + runs[0][1] - runs[0][0] + len(end)))
            words.append(first_of)
            orders.append(order)
        batch = inputs_of(inputs, context)
        batch |= hidden(batch, self.rate, self.masked, self.random, context, self.name)
        order_B, word_BL = torch.tensor(orders), filled(words, 0, batch["tokens_BL"].shape[1])
        batch |= {"order_B": order_B, "weight_order": (order_B != IGNORE).sum()}
        for number, column in enumerate(self.tags):
            of_words = [self._tags(example, column) for example in examples]
            tag_BL = torch.stack([tags[word_L] for tags, word_L in zip(of_words, word_BL, strict=True)])
            batch |= {f"tag{number}_BL": tag_BL, f"weight_{column}": (tag_BL != IGNORE).sum()}
        return batch

    def _read(self, example: Example, context: Context) -> tuple[list[int], list[int], list[int]]:
        """A document's tokens, for each the number of the word that it is the first of, and where sentences begin."""
        if context.encoder is None:
            raise PretrainError(f"{self.name}: documents of text need a tokenizer: accepted: a tokenizer")
        text = str(example.columns[self.text])
        ids, spans = context.encoder.spans(text)
        try:
            numbers = words_of_characters(text, self._words(example))
        except ValueError as error:
            wrong = f"{self.name}: {named(example)}: {self.words}"
            raise PretrainError(f"{wrong}: accepted: words as they follow in its text") from error
        ends = [0, *accumulate(map(len, sentences(text)))]
        begins = [start for start, _ in spans]
        starts = sorted({bisect_left(begins, place) for place in ends[:-1]})
        return ids, words_of_tokens(numbers, spans), starts

    def _words(self, example: Example) -> list[str] | None:
        return None if self.words is None else parted(example.columns[self.words])

    def _tags(self, example: Example, column: str) -> Tensor:
        """The number of each word's tag, after that of no word."""
        tags, names = parted(example.columns[column]), self.tags[column]
        count = len(self._words(example) or str(example.columns[self.text]).split())
        if len(tags) != count:
            wrong = f"{self.name}: {named(example)} has {count} words and {len(tags)} {column}"
            raise PretrainError(f"{wrong}: accepted: as many")
        for tag in tags:
            if tag not in names:
                wrong = f"{self.name}: {named(example)}: {column} {brief(tag)}{nearest(tag, names)}"
                raise PretrainError(f"{wrong}: accepted: one of its tags ({listed(names, tag)})")
        return torch.tensor([IGNORE, *map(names.index, tags)])

    def modules(self, model: nn.Module) -> nn.Module:
        """The head of the order, and one for each column of tags."""
        return nn.ModuleList([new_pooled(model, 2), *(new_layer(model, len(names)) for names in self.tags.values())])

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The sum; parts are the loss of each, without its weight."""
        assert isinstance(modules, nn.ModuleList), f"{self.name} trains heads beside the model: see `modules`"
        states_BLE = encoded(model, batch)
        masked, nll_BL = masked_loss(model, states_BLE, batch)
        order_head, *tag_heads = modules
        losses = {ORDER: mean(order_head(states_BLE[:, 0]), batch["order_B"], int(batch["weight_order"]))}
        for number, (column, tag_head) in enumerate(zip(self.tags, tag_heads, strict=True)):
            labels_BL = batch[f"tag{number}_BL"]
            losses[column] = mean(tag_head(states_BLE), labels_BL, int(batch[f"weight_{column}"]))
        weights = {ORDER: self.order_weight}
        terms = {"masked_lm": masked} | {name: weights.get(name, self.tag_weight) * v for name, v in losses.items()}
        return summed(terms, {"masked_lm": masked.detach()} | {k: v.detach() for k, v in losses.items()}, nll_BL)


def mean(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """The mean cross-entropy of the labels that there are."""
    total = nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="sum")
    return total / max(1, count)


def parted(value: object) -> list[str]:
    """A list's texts, or what white space parts of a text."""
    return list(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, str) else str(value).split()


def drawn(length: int, starts: Sequence[int], room: int, rng: np.random.Generator) -> tuple[list[tuple[int, int]], int]:
    """Which of a document's tokens are the first run and which the second, and whether they have changed places.

    -100 of one run alone. `starts` are where its sentences begin.
    """
    able = [start for start in starts if start <= length - room]
    begin = able[int(rng.integers(len(able)))] if able else 0
    stop = min(length, begin + room)
    cuts = [start for start in starts if begin < start < stop]
    if not cuts:
        return [(begin, stop)], IGNORE
    cut, swapped = cuts[int(rng.integers(len(cuts)))], int(rng.integers(2))
    runs = [(begin, cut), (cut, stop)]
    return (runs[::-1] if swapped else runs), swapped
