"""Tokens made of tokens that a model foresees: a step of the curriculum from characters to words.

Shape letters: B rows, L positions, V old tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core.batch import Batch
from pretrain.core.bounds import Count, Positive, PositiveShare
from pretrain.core.encoding import text_of, tokenizing
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import embeddings, family, model_inputs, separated
from pretrain.surgery import Inputs, Surgery, report
from pretrain.surgery._calibration import batches_of
from pretrain.surgery._random import generator
from pretrain.surgery._tokens import resize, state_of, with_state
from pretrain.surgery.vocabulary._trim import check
from pretrain.surgery.vocabulary.vocabulary_expansion import tables

Group = tuple[int, ...]  # tokens that stand one after another


@dataclass(frozen=True)
class VocabularyCurriculum(Surgery):
    """Scaling LLM Pre-training with Vocabulary Curriculum (arXiv:2502.17910).

    The model reads the stage's text. A run of tokens becomes one where each of it but the first is foreseen: the
    entropy of the model's prediction (with `measure: loss`, as the authors' code has it, the loss of the token that
    stands there) is below `threshold` nats and the row's `quantile`, and no greater than that of the token before. Runs
    are taken at random, as in that code, or the most `frequent` first, until there are `new_tokens`. A run of n tokens
    is merged from its left, (a, b), (ab, c), …, and each prefix that is no token yet becomes one, with the next
    number: text is split as before and then merged, and any text is still spelt exactly. The row of a new token in the
    embeddings, and in the head, is that of the last token of it: as an input it is what that one was, and as a target
    as likely. Training then goes on with the text in the new tokens (`init`, `tokenizer: null`).

    Byte-pair tokenizers, from `algorithm: bytes` on, whose tokens may grow across blanks; of one that parts text into
    words first no token does. The paper's text: 20 batches of 256 rows.
    """

    needs_text = True
    families: ClassVar[tuple[str, ...]] = ("causal",)
    calibration: ClassVar[float] = 1.0
    new_vocabulary: ClassVar[bool] = True

    new_tokens: Count = 3000
    measure: Literal["entropy", "loss"] = "entropy"
    threshold: Positive = 0.3
    quantile: PositiveShare = 0.6
    choose: Literal["random", "frequent"] = "random"

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model with more rows; the tokenizer with more merges is handed back in `inputs.extra`."""
        batches = batches_of(inputs, self.name)
        if not family(model).among(self.families):
            raise PretrainError(f"{self.name}: family {family(model).name!r}: accepted: {', '.join(self.families)}")
        inputs, tokenizer = check(self.name, model, inputs)
        state = state_of(tokenizer)
        if state["model"]["type"] != "BPE":
            raise PretrainError(
                f"{self.name}: the checkpoint's tokenizer is a {state['model']['type']}; accepted: BPE, as of "
                "`algorithm: bytes` or `bpe`"
            )
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        counts: Counter[Group] = Counter()
        for batch in batches:
            counts.update(self._groups(model, separated(model, batch), special))
        numbers, rows = tokenizer.get_vocab(), len(embeddings(model).weight)
        if (last := max(numbers.values())) >= rows:
            raise PretrainError(
                f"{self.name}: the checkpoint has {rows} rows and its tokenizer {last + 1} ids; accepted: as many rows "
                "or more"
            )
        made = merged(self._ordered(counts, inputs), numbers, self.new_tokens, Pieces(tokenizer))
        report(inputs, **{f"{self.name}/runs": len(counts), f"{self.name}/new_tokens": len(made)})
        if not made:
            raise PretrainError(
                f"{self.name}: threshold {self.threshold:g}: no token of the text is foreseen by less; accepted: "
                "more, or a model that is trained for longer",
                place=("threshold",),
            )
        grow(model, [(number, last) for _, _, number, last in made])
        state["model"]["vocab"] |= {first + second: number for first, second, number, _ in made}
        state["model"]["merges"] += [[first, second] for first, second, _, _ in made]
        inputs.extra["tokenizer"] = with_state(tokenizer, state)
        return model

    def _groups(self, model: PreTrainedModel, batch: Batch, special: set[int]) -> Iterable[Group]:
        """The runs of a batch of text."""
        ids_BL = batch["input_ids"]
        document_BL = batch.get("attention_mask", torch.ones_like(ids_BL))
        logits_BLV = model(**model_inputs(model, batch)).logits.float().cpu()
        surprise_BL = surprises(logits_BLV, ids_BL.cpu(), self.measure)
        for ids_L, document_L, surprise_L in zip(
            ids_BL.tolist(), document_BL.cpu().numpy(), surprise_BL.numpy(), strict=True
        ):
            text = document_L > 0
            if text.any():
                limit = min(self.threshold, float(np.quantile(surprise_L[text], self.quantile)))
                yield from runs(ids_L, document_L.tolist(), surprise_L.tolist(), limit, special)

    def _ordered(self, counts: Counter[Group], inputs: Inputs) -> list[Group]:
        """The runs in the order in which they become tokens."""
        groups = sorted(counts)
        if self.choose == "frequent":
            return sorted(groups, key=lambda group: -counts[group])
        order = torch.randperm(len(groups), generator=generator(self.name, inputs))
        return [groups[index] for index in order.tolist()]


def surprises(logits_BLV: Tensor, ids_BL: Tensor, measure: str) -> Tensor:
    """How little each token is foreseen from those before it, in nats; 0 for the first of a row."""
    log_p_BLV = logits_BLV[:, :-1].log_softmax(-1)
    if measure == "loss":
        value_BL = -log_p_BLV.gather(-1, ids_BL[:, 1:, None])[..., 0]
    else:
        value_BL = -(log_p_BLV.exp() * log_p_BLV).sum(-1)
    return torch.nn.functional.pad(value_BL, (1, 0))


def runs(
    ids_L: Sequence[int], document_L: Sequence[int], surprise_L: Sequence[float], limit: float, special: set[int]
) -> Iterable[Group]:
    """Runs of two tokens or more of a document, each but the first below `limit` and no more than the one before."""
    run: list[int] = []
    before, last = 0, math.inf
    for token, document, surprise in zip(ids_L, document_L, surprise_L, strict=True):
        plain = document > 0 and token not in special
        if not (plain and run and document == before and surprise < limit and surprise <= last):
            if len(run) > 1:
                yield tuple(run)
            run = []
        if plain:
            run.append(token)
        before, last = document, surprise
    if len(run) > 1:
        yield tuple(run)


class Pieces:
    """Whether a tokenizer lets tokens be one: where it parts text into words first, those of one word alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.splitter = tokenizer, tokenizer.backend_tokenizer.pre_tokenizer

    def whole(self, tokens: Sequence[int]) -> bool:
        """Whether their text is one piece."""
        with tokenizing():
            text = text_of(self.tokenizer, list(tokens))
            return self.splitter is None or len(self.splitter.pre_tokenize_str(text)) == 1


def merged(
    groups: Iterable[Group], numbers: dict[str, int], most: int, pieces: Pieces
) -> list[tuple[str, str, int, int]]:
    """New tokens: their two parts as they are spelt, their number, and that of the second part.

    `numbers` are the old tokens'. A prefix that is a token already is none anew, and the run goes on from it.
    """
    numbers = dict(numbers)
    spelt = {number: token for token, number in numbers.items()}
    made: list[tuple[str, str, int, int]] = []
    for group in groups:
        if not pieces.whole(group):
            continue
        prefix = spelt[group[0]]
        for last in group[1:]:
            if len(made) == most:
                return made
            token = prefix + spelt[last]
            if token not in numbers:
                numbers[token] = max(spelt) + len(made) + 1
                made.append((prefix, spelt[last], numbers[token], last))
            prefix = token
    return made


def grow(model: PreTrainedModel, rows: Sequence[tuple[int, int]]) -> None:
    """Give the model rows for new tokens, each a copy of an old one: pairs of the new number and the old."""
    needed = max(number for number, _ in rows) + 1
    if needed > len(embeddings(model).weight):
        resize(model, needed)
    new, old = map(list, zip(*rows, strict=True))
    for table in tables(model):
        table[new] = table[old]
