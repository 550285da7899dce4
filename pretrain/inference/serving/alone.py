"""Answers that are written one at a time: by a decoding method, or of a model that `generate` alone can run.

Shape letters: L tokens of a prompt, N new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pretrain.core.generation.settings import StopStrings, options_of, settings_of
from pretrain.inference.serving.jobs import Answer, Piece
from pretrain.inference.serving.text import Writer
from pretrain.stages.decode import continued

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.core.batch import Vocabulary


def stops_of(model: PreTrainedModel, answer: Answer) -> tuple[str, ...]:
    """The texts that end an answer: the model's own, and those that were asked for."""
    strings = getattr(settings_of(model), "stop_strings", None) or ()
    return (*([strings] if isinstance(strings, str) else strings), *answer.stops)


def write_alone(
    model: PreTrainedModel, read: tuple[PreTrainedTokenizerBase, Vocabulary], answer: Answer,
    count: Callable[[int], None],
) -> None:  # fmt: skip
    """Write an answer, and send it piece by piece; `count` is told of new tokens.

    What a decoding method writes is sent at its end: before, it may take back tokens that it has tried.
    """
    tokenizer, vocabulary = read
    stops, length = stops_of(model, answer), len(answer.ids)
    writer = Writer(tokenizer, answer.ids[length - answer.shown :], stops)
    options = options_of(
        model, tokenizer, length, max_new_tokens=answer.max_new_tokens, temperature=answer.temperature,
        top_p=answer.top_p, stop=answer.stops, vocabulary=vocabulary,
    )  # fmt: skip
    ends, watched = options["eos"], options["stop"]
    end = frozenset(() if ends is None else [ends] if isinstance(ends, int) else ends)
    beams = getattr(settings_of(model), "num_beams", 1) or 1
    follow = _Following(answer, writer, end, count)
    at_once = answer.method is None and beams == 1
    options["stop"] = follow if at_once else _Watched(answer, watched if isinstance(watched, StopStrings) else None)
    torch.manual_seed(answer.seed)
    encodes = bool(model.config.is_encoder_decoder)
    input_1L = torch.tensor([list(answer.ids)], device=model.device)
    output_1N = continued(model, input_1L, options, answer.method)
    given = 1 if answer.method is None and encodes else input_1L.shape[1]
    follow.finish(output_1N[0, given:].tolist())


class _Watched:
    """Whether a method's new tokens are at their end, or nobody waits for them."""

    def __init__(self, answer: Answer, strings: StopStrings | None) -> None:
        self.answer, self.strings = answer, strings

    def __call__(self, new: Sequence[int]) -> bool:
        return self.answer.cancelled or (self.strings is not None and self.strings(new))


class _Following:
    """Sends what new tokens say, each as soon as it is there."""

    def __init__(self, answer: Answer, writer: Writer, end: frozenset[int], count: Callable[[int], None]) -> None:
        self.answer, self.writer, self.end, self.count = answer, writer, end, count
        self.seen, self.ended = 0, False

    def __call__(self, new: Sequence[int]) -> bool:
        text = self._taken(new)
        if text:
            self.answer.send(Piece(text, tokens=self.seen))
        return self.answer.cancelled or self.ended

    def finish(self, new: Sequence[int]) -> None:
        """Send the rest."""
        text = self._taken(new)
        rest = "" if self.writer.stopped else self.writer.end()
        if not self.answer.cancelled:
            self.answer.send(Piece(text + rest, "stop" if self.ended else "length", self.seen))

    def _taken(self, new: Sequence[int]) -> str:
        texts = []
        for token in new[self.seen :]:
            if self.ended:
                break
            self.seen += 1
            self.count(1)
            self.ended = token in self.end
            texts.append("" if self.ended else self.writer.push(token))
            self.ended = self.ended or self.writer.stopped
        return "".join(texts)
