"""What the thread of the model is asked for: an answer to write, or vectors of texts; and what it says of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pretrain.decoding import Decoding


class Busy(Exception):
    """As many requests wait as may wait; `seconds` is when to ask again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Ending(Exception):
    """The server takes no more requests."""


@dataclass(frozen=True)
class Piece:
    """What is new of an answer: text, and at its end why it ended, `stop` or `length`."""

    text: str
    finish: str | None = None
    tokens: int = 0  # of the answer so far


@dataclass(frozen=True)
class Failed:
    """A job came to nothing; `error` is a `PretrainError` where the request can mend it."""

    error: Exception


@dataclass(frozen=True)
class Vectors:
    """`features_NE` of the texts of an embedding."""

    features_NE: NDArray[np.float32]


News: TypeAlias = Piece | Failed | Vectors
Send: TypeAlias = Callable[[News], None]  # called in the model's thread


@dataclass(eq=False)
class Job:
    """Either of them; `cancelled` is set by whoever asked, once nobody waits for it."""

    send: Send = field(default=lambda news: None, kw_only=True)
    cancelled: bool = field(default=False, kw_only=True)
    asked: float = field(default_factory=time.monotonic, kw_only=True)  # seconds of the clock
    first: float | None = field(default=None, kw_only=True)  # when its first token was there


@dataclass(eq=False)
class Answer(Job):
    """A text to write after the tokens `ids`; `shown` of them at the end stand right before it."""

    ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    method: Decoding | None = None
    shown: int = 0

    @property
    def room(self) -> int:
        """Tokens that its cache has to hold."""
        return len(self.ids) + self.max_new_tokens


@dataclass(eq=False)
class Embedding(Job):
    """Vectors of texts, given as tokens without their frame."""

    pieces: Sequence[NDArray[np.int64]]
    pooling: str = "mean"
