"""The text of new tokens as they come: whole characters, and nothing that may yet be the beginning of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pretrain.core.encoding import text_of
from pretrain.inference.chat import HALF

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEAR = 8  # tokens before a new one that say how it is written
WINDOW = 4 * NEAR  # tokens that are decoded at most for a new one


class Writer:
    """What new tokens say after the tokens `before`, up to the first of the texts `stops`, which is left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int], stops: Sequence[str]) -> None:
        self.tokenizer, self.stops, self.stopped = tokenizer, tuple(filter(None, stops)), False
        self.ids = list(before[-NEAR:])
        self.given = len(self._text())  # characters of the text of `ids` that were handed on, or are the prompt's
        self.held = ""  # what may be the beginning of a stop text

    def push(self, token: int) -> str:
        """What may be shown once this token stands there; nothing after a stop text."""
        self.ids.append(token)
        text = self._text()
        ready = text.rstrip(HALF)
        piece, self.given = ready[self.given :], max(self.given, len(ready))
        if len(self.ids) > WINDOW and (ready == text or len(self.ids) > 2 * WINDOW):
            self.ids = self.ids[-NEAR:]
            self.given = len(self._text())
        return self._released(piece)

    def end(self) -> str:
        """What was held back, once no token follows: all of it, with a mark for a character that is not whole."""
        rest = self._released(self._text()[self.given :]) + self.held
        self.held = ""
        return rest

    def _text(self) -> str:
        return text_of(self.tokenizer, self.ids, skip_special_tokens=True) if self.ids else ""

    def _released(self, piece: str) -> str:
        text = self.held + piece
        if self.stopped or not piece:
            return ""
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self.held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of another, which is not all in it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
