"""Preference optimisation: of two answers to a prompt a decoder learns to prefer the one that people prefer.

Shape letters: P pairs, B = 2 P sequences (all chosen, then all rejected), L tokens, E width, N targets, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pretrain.core.batch import Batch, Context, Example, Row, padded_length, rows_to_tensors
from pretrain.core.bounds import Positive, Share
from pretrain.core.encoding import ASSISTANT
from pretrain.core.errors import PretrainError
from pretrain.core.method import Ref
from pretrain.core.models.cross_entropy import IGNORE
from pretrain.core.models.families import head
from pretrain.core.models.fast import accelerate
from pretrain.corpus.sources.content.chat import Turns, turns_of
from pretrain.objectives import Loss, Objective
from pretrain.objectives._distil import Side, Teacher, in_chunks, open_teacher, states
from pretrain.objectives._fine_tuning import examples_of, filled, named


@dataclass(frozen=True)
class DPO(Objective):
    """Direct Preference Optimization: Your Language Model is Secretly a Reward Model (arXiv:2305.18290).

    With the implicit rewards r(y) = beta · (log π(y | x) - log π₀(y | x)), log-probabilities summed over an answer's
    tokens and its end, π₀ the `reference` (a checkpoint with the same tokenizer; without one, the model as it is at
    first), and d = r(chosen) - r(rejected), the mean over pairs of

        sigmoid:  -(1 - label_smoothing) · log σ(d) - label_smoothing · log σ(-d)
        ipo:      (d / beta - 1 / (2 beta))², each answer's log-probabilities by token   (arXiv:2310.12036)
        hinge:    max(0, 1 - d)   (arXiv:2305.10425)

    The columns are the `prompt`, and the answers `chosen` and `rejected`: texts, or conversations whose last message is
    the answer, with the prompt before it. They are framed by the tokenizer's chat template, where it has one, and else
    as `prompt`, newline, answer and end. A pair that is longer than `length` loses the beginning of its prompt, then
    the ends of its answers. Parts: `accuracy` (the share of pairs whose chosen answer has the higher reward), `margin`
    (the mean d), `chosen` and `rejected` (mean rewards).
    """

    families: ClassVar[tuple[str, ...]] = ("causal",)
    shares_vocabulary: ClassVar[tuple[str, ...]] = ("reference",)
    reads: ClassVar[Literal["rows", "examples"]] = "examples"
    own_evaluation: ClassVar[bool] = True
    predicted: ClassVar[float] = 0.5
    fill: ClassVar[Literal["longest", "rows", "apart"]] = "apart"

    reference: Ref = ""
    beta: Positive = 0.1
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    label_smoothing: Share = 0.0
    prompt: str = "text"
    chosen: str = "chosen"
    rejected: str = "rejected"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing >= 0.5 or (self.label_smoothing and self.loss_type != "sigmoid"):
            raise PretrainError(
                f"dpo: label_smoothing {self.label_smoothing}: accepted: below 0.5, with loss_type sigmoid",
                place=("label_smoothing",),
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The prompt's and the answers'."""
        return (self.prompt, self.chosen, self.rejected)

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """The two sequences."""
        return (self.prompt, self.chosen), (self.prompt, self.rejected)

    @property
    def effort(self) -> float:
        """The pass of the model as it is at first is a third of a step; a reference is counted by itself."""
        return 1.0 if self.reference else 4 / 3

    def modules(self, model: nn.Module) -> nn.Module:
        """The reference."""
        if self.reference:
            return Teacher(open_teacher(self.reference, model, self.name))
        first = copy.deepcopy(model)
        accelerate(first)
        return Teacher(first)

    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """The chosen sequences, then the rejected, one a row; `target_BL` on the answers, `weight` counts pairs."""
        examples, answers = examples_of(rows, self.name), []
        for column in (self.chosen, self.rejected):
            answers += [self._sequence(example, column, place, context) for place, example in enumerate(examples)]
        made = [
            Row(np.array(ids, np.int32), np.zeros(1, np.int32), np.array([i]), examples[0].domain, i)
            for i, (ids, _) in enumerate(answers)
        ]
        width = padded_length(max(row.tokens for row in made), context.length)
        batch = rows_to_tensors(made, width, context.vocabulary.pad)
        batch["target_BL"] = filled([target for _, target in answers], IGNORE, width)
        tokens = sum(row.tokens for row in made)
        return batch | {"weight": torch.tensor(len(examples)), "tokens": torch.tensor(tokens)}

    def _sequence(self, example: Example, column: str, place: int, context: Context) -> tuple[list[int], list[int]]:
        """A prompt with an answer, at most `length` tokens, and for each the next one where the answer has it."""
        assert context.encoder is not None, "examples come with an encoder"
        turns, encoder = self._turns(example, column), context.encoder
        if getattr(encoder.tokenizer, "chat_template", None):
            ids, number = encoder.conversation(turns)
            last = max(number)
            first = number.index(last)
            before, answer = ids[:first], [t for t, n in zip(ids[first:], number[first:], strict=True) if n == last]
        else:
            vocabulary = context.vocabulary
            begin = [] if vocabulary.before is None else [vocabulary.before]
            end = [] if vocabulary.eos is None else [vocabulary.eos]
            prompt, text = encoder.ids(["\n".join([*(words for _, words in turns[:-1]), ""]), turns[-1][1]])
            before, answer = [*begin, *prompt], [*text, *end]
        if not answer:
            raise PretrainError(f"dpo: {named(example)}: column {column!r} is empty: accepted: an answer")
        context.cut.update({place} if len(before) + len(answer) > context.length else ())
        answer = answer[: context.length - 1]
        before = before[max(0, len(before) + len(answer) - context.length) :] or [answer[0]]
        return [*before, *answer], [*([IGNORE] * (len(before) - 1)), *answer, IGNORE]

    def _turns(self, example: Example, column: str) -> Turns:
        """A conversation whose last message is the answer of a column."""
        value = example.columns[column]
        if isinstance(value, str):
            return [("user", str(example.columns[self.prompt])), (ASSISTANT, value)]
        turns = turns_of(value) or []
        if len(turns) < 2 or turns[-1][0] != ASSISTANT:
            raise PretrainError(
                f"dpo: {named(example)}: column {column!r}: accepted: a text, or a list of {{role, content}} that ends "
                f"with an answer of the {ASSISTANT}"
            )
        return turns

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean over the pairs; parts `accuracy`, `margin`, `chosen` and `rejected`."""
        if not isinstance(modules, Teacher):
            raise PretrainError("dpo: the reference is missing; accepted: what `modules` gives")
        ours_B = log_probabilities(model, batch)
        with torch.no_grad():
            theirs_B = log_probabilities(modules.model, batch)
        ratio_B = ours_B - theirs_B
        if self.loss_type == "ipo":
            ratio_B = ratio_B / (batch["target_BL"] != IGNORE).sum(-1)
        chosen_P, rejected_P = (self.beta * ratio_B).chunk(2)
        margin_P = chosen_P - rejected_P
        with torch.no_grad():
            parts = {"accuracy": (margin_P > 0).float().mean(), "margin": margin_P.mean(), "chosen": chosen_P.mean(),
                     "rejected": rejected_P.mean()}  # fmt: skip
        return Loss(self._losses(margin_P).mean(), parts)

    def _losses(self, margin_P: Tensor) -> Tensor:
        """Each pair's loss."""
        if self.loss_type == "sigmoid":
            smoothing = self.label_smoothing
            return -(1 - smoothing) * logsigmoid(margin_P) - smoothing * logsigmoid(-margin_P)
        if self.loss_type == "ipo":
            return (margin_P / self.beta - 1 / (2 * self.beta)).square()
        return (1 - margin_P).relu()


def log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """`log_p_B`, the sum of log p of the targets of each row."""
    states_BLE, target_BL = states(model, batch, causal=True), batch["target_BL"]
    has_target_BL = target_BL != IGNORE
    side = (states_BLE[has_target_BL], *head(model))
    nll_1N = in_chunks(_nll, side, side, target_BL[has_target_BL])
    nll_BL = torch.zeros_like(target_BL, dtype=nll_1N.dtype).masked_scatter(has_target_BL, nll_1N[0])
    return -nll_BL.sum(-1)


def _nll(ours: Side, _: Side, target_N: Tensor) -> Tensor:
    """`nll_1N` of the targets."""
    return nn.functional.cross_entropy(nn.functional.linear(*ours).float(), target_N, reduction="none")[None]
