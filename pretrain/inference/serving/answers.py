"""The shapes of OpenAI's answers: whole ones, and pieces of a stream."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from pretrain.inference.serving.jobs import Answer, Piece

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pretrain.core.files import JSONObject


@dataclass
class Shape:
    """Answers of a chat or of a completion, as they are sent; `chat` says which."""

    model: str
    kind: Literal["chat", "completion"]
    answers: Sequence[Answer]
    prompts: int = 1  # of the request, each with as many answers
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""

    def __post_init__(self) -> None:
        self.id = self.id or f"{'chatcmpl' if self.kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"
        self.tokens = [0] * len(self.answers)

    def whole(self, texts: Sequence[str], finishes: Sequence[str | None]) -> JSONObject:
        """All answers at once."""
        choices = []
        for number, (text, finish) in enumerate(zip(texts, finishes, strict=True)):
            message = {"role": "assistant", "content": text, "refusal": None}
            content: JSONObject = {"message": message} if self.kind == "chat" else {"text": text}
            choices.append({"index": number, **content, "logprobs": None, "finish_reason": finish})
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return self._object(name) | {"choices": choices, "usage": self.usage()}

    def begin(self, number: int) -> JSONObject | None:
        """What a stream says before an answer's first piece."""
        return self._chunk(number, {"role": "assistant", "content": ""}, None) if self.kind == "chat" else None

    def piece(self, number: int, piece: Piece) -> list[JSONObject]:
        """A piece of an answer; a chat's end is one of its own."""
        self.tokens[number] = piece.tokens
        if self.kind == "completion":
            return [self._chunk(number, {"text": piece.text}, piece.finish)]
        chunks = [self._chunk(number, {"content": piece.text}, None)] if piece.text else []
        return [*chunks, self._chunk(number, {}, piece.finish)] if piece.finish else chunks

    def last(self) -> JSONObject:
        """How many tokens there were, at the end of a stream that is asked for them."""
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return self._object(name) | {"choices": [], "usage": self.usage()}

    def usage(self) -> JSONObject:
        """Tokens of the prompts, each once, and of the answers."""
        each = len(self.answers) // self.prompts
        read, written = sum(len(answer.ids) for answer in self.answers[::each]), sum(self.tokens)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _object(self, name: str) -> JSONObject:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def _chunk(self, number: int, content: JSONObject, finish: str | None) -> JSONObject:
        held = {"delta": content} if self.kind == "chat" else content
        choice = {"index": number, **held, "logprobs": None, "finish_reason": finish}
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return self._object(name) | {"choices": [choice]}


def event(value: JSONObject) -> bytes:
    """One event of a stream: https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


DONE = b"data: [DONE]\n\n"
STILL_HERE = b": still here\n\n"  # a comment, which clients pass over


def vectors(model: str, features_NE: NDArray[np.float32], encoding: str, tokens: int) -> JSONObject:
    """An answer of embeddings, as numbers or as the base64 of their bytes, little-endian."""

    def written(vector_E: NDArray[np.float32]) -> str | list[float]:
        if encoding == "base64":
            return base64.b64encode(vector_E.astype("<f4").tobytes()).decode("ascii")
        return [float(number) for number in vector_E]

    data = [
        {"object": "embedding", "index": number, "embedding": written(vector_E)}
        for number, vector_E in enumerate(features_NE)
    ]
    return {
        "object": "list", "data": data, "model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }  # fmt: skip
