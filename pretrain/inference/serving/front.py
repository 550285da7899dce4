"""From a checked request to jobs: texts become tokens, what is not said is as the model and the server have it."""

from __future__ import annotations

import copy
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pretrain.core.batch import Vocabulary
from pretrain.core.bounds import fits, hints
from pretrain.core.encoding import Encoder, encoded
from pretrain.core.errors import PretrainError, unknown
from pretrain.core.models.families import vocabulary_of
from pretrain.core.models.features import Framing
from pretrain.inference.serving.api import (
    MOST_ANSWERS,
    MOST_TEXTS,
    ApiError,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Writing,
)
from pretrain.inference.serving.engine import Engine
from pretrain.inference.serving.jobs import Answer, Embedding
from pretrain.inference.serving.text import NEAR
from pretrain.stages import build_method
from pretrain.stages.decode import sampled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.decoding import Decoding

COMPLETION = 16  # tokens of a completion where the request does not say, as OpenAI's


@dataclass(frozen=True)
class Settings:
    """How a server is set up, beside the engine's limits."""

    name: str  # of the model, in requests
    max_tokens: int = 1024  # of an answer at most
    api_key: str = ""
    body_bytes: int = 1 << 20  # of a request
    pooling: str = "mean"  # of embeddings


@dataclass
class Front:
    """What makes jobs of requests. It may be asked from several threads, one at a time."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    settings: Settings
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        # A tokenizer of its own: one that encodes in a thread cannot decode in another.
        self.tokenizer = copy.deepcopy(self.tokenizer)
        self.encoder, self.vocabulary = Encoder(self.tokenizer), Vocabulary.of(self.tokenizer)
        self.lock = threading.Lock()
        self.entries = vocabulary_of(self.model) or len(self.tokenizer)
        self.writes, self.chats = self.model.can_generate(), bool(getattr(self.tokenizer, "chat_template", None))

    def check_model(self, name: str) -> None:
        """Refuse another model than the one that is served."""
        if name != self.settings.name:
            words = str(unknown("model", name, [self.settings.name]))
            raise ApiError(404, words, param="model", code="model_not_found")

    def chat(self, request: ChatRequest) -> list[Answer]:
        """The answers to a conversation."""
        self._check_writes()
        if not self.chats:
            raise PretrainError(
                f"the tokenizer of {self.settings.name} has no chat template; accepted: POST /v1/completions"
            )
        with self.lock:
            ids, _ = self.encoder.conversation([message.turn for message in request.messages], answering=True)
        return self._answers(request, [ids], "messages", shown=0)

    def complete(self, request: CompletionRequest) -> list[Answer]:
        """What follows each prompt, begun as a text is."""
        self._check_writes()
        before = [self.vocabulary.before] if self.vocabulary.before is not None else []
        prompts = []
        for prompt in request.prompts:
            ids = self._ids(prompt, special=True)
            begun = ids if not isinstance(prompt, str) else [*before, *ids]
            prompts.append(begun or [self.vocabulary.pad])
        encodes = bool(self.model.config.is_encoder_decoder)  # whose answers are texts of their own
        return self._answers(request, prompts, "prompt", shown=0 if encodes else NEAR)

    def embed(self, request: EmbeddingRequest) -> Embedding:
        """The texts to make vectors of."""
        if not request.inputs or len(request.inputs) > MOST_TEXTS:
            raise ApiError(400, f"input: {len(request.inputs)} texts: accepted: 1 to {MOST_TEXTS}", param="input")
        limit = self.engine.limits.length
        room = Framing(self.model, self.vocabulary, limit).length
        pieces = []
        for text in request.inputs:
            ids = self._ids(text, special=False)
            if not 0 < len(ids) <= room:
                raise ApiError(400, f"input: a text of {len(ids):,} tokens: accepted: 1 to {room:,}", param="input")
            pieces.append(np.array(ids, np.int64))
        return Embedding(pieces, self.settings.pooling)

    def _ids(self, text: str | list[int], *, special: bool) -> list[int]:
        """A text's tokens; names of special tokens stand for these only if `special`."""
        if not isinstance(text, str):
            if any(token >= self.entries for token in text):
                raise PretrainError(f"token {max(text)}: accepted: 0 to {self.entries - 1}")
            return text
        with self.lock:
            if not special:
                return self.encoder.ids([text])[0]
            ids: list[int] = encoded(self.tokenizer, text, add_special_tokens=False)["input_ids"]
            return ids

    def _check_writes(self) -> None:
        if not self.writes:
            name = type(self.model).__name__
            raise PretrainError(f"{name} predicts no next token; accepted: POST /v1/embeddings")

    def _answers(self, request: Writing, prompts: Sequence[list[int]], param: str, shown: int) -> list[Answer]:
        count, most = len(prompts) * request.n, min(MOST_ANSWERS, self.engine.limits.queue)
        if not 0 < count <= most:
            raise ApiError(400, f"{count} answers: accepted: 1 to {most}, prompts times n", param="n")
        method = self._method(request.method)
        temperature, top_p = sampled(self.model, method, request.temperature, request.top_p)
        seed = secrets.randbelow(1 << 62) if request.seed is None else request.seed
        answers = []
        for ids in prompts:
            new = self._room(request, ids, param)
            for number in range(request.n):
                each = seed + number
                shows = min(shown, len(ids))
                answers.append(Answer(ids, new, temperature, top_p, each, request.stops, method, shows))
        return answers

    def _room(self, request: Writing, ids: list[int], param: str) -> int:
        """How many tokens an answer to a prompt may have."""
        bound, asked = self.settings.max_tokens, request.max_tokens
        if asked is not None and asked > bound:
            raise ApiError(400, f"max_tokens {asked:,}: accepted: 1 to {bound:,}", param="max_tokens")
        usual = bound if isinstance(request, ChatRequest) else min(COMPLETION, bound)
        limits = self.engine.limits
        left = min(limits.length, limits.cache_tokens) - len(ids)
        if left < (asked or 1):
            words = f"{len(ids):,} tokens" + (f" and {asked:,} of the answer" if asked else "")
            most = f"{len(ids) + left:,} with the answer, the maximum context length"
            raise ApiError(
                400, f"{param}: {words}: accepted: at most {most}", param=param, code="context_length_exceeded",
            )  # fmt: skip
        return asked or min(usual, left)

    def _method(self, given: str | dict[str, object] | None) -> Decoding | None:
        """A decoding method of ours, by its name, or with fields; none that opens what lies on this machine."""
        if given is None:
            return None
        try:
            method: Decoding = build_method(given, "decoding")
        except ValueError as error:
            raise ApiError(400, f"method: {error}", param="method") from error
        fields = [name for name in given if name != "method"] if isinstance(given, dict) else []
        words = [name for name in fields if _takes_text(method, name)]
        if method.opens or words:
            what = f"field {words[0]}" if words else "it"
            raise ApiError(
                400, f"method {method.name}: {what} may open files of this machine; accepted: methods and fields of "
                "numbers", param="method",
            )  # fmt: skip
        return method


def _takes_text(method: Decoding, name: str) -> bool:
    """Whether a field takes any text, which may be a path."""
    hint = hints(type(method))[name]
    return any(fits(value, hint) for value in ("/", ("/",)))
