"""What requests may say, as OpenAI's reference has it, and errors in its shape.

https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pretrain.core.errors import PretrainError, brief, nearest
from pretrain.core.foreign import json as foreign

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from pretrain.core.files import JSONObject

MOST_ANSWERS = 128  # of a request
MOST_TEXTS = 2048  # of a request for embeddings
MOST_STOPS = 16
MOST_MESSAGES = 512  # the template is filled in anew for each new sequence of roles
_TEXTS = "a text, a list of texts, a list of tokens, or a list of such lists; none of them empty"
CHOICES = {  # fields that take one thing or another, in words
    "prompt": _TEXTS, "input": _TEXTS, "stop": f"a text of 1 to 256 characters, or a list of at most {MOST_STOPS}",
    "content": "a text, or a list of parts {type: text, text: …}", "method": "a name, or {method: NAME, field: number}",
}  # fmt: skip
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
# What is not done here, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "logprobs": (False,),
    "top_logprobs": (0,), "echo": (False,), "suffix": ("",), "best_of": (1,), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "web_search_options": (), "reasoning_effort": ("none",), "verbosity": ("medium",),
}  # fmt: skip

Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
M = TypeVar("M", bound="Request")


class ApiError(Exception):
    """What a client is told: an HTTP status, and an error of OpenAI's shape."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, str(PretrainError(message)), param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> JSONObject:
        """The error as JSON."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Request(BaseModel):
    """What all requests say."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str


class StreamOptions(BaseModel):
    """Whether the last piece of a stream says how many tokens there were."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False  # nothing is padded here in any case


class Writing(Request):
    """A request for one answer or several."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] = []
    temperature: Finite | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 62)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    method: str | dict[str, object] | None = None  # of ours, by `extra_body`

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _streams(self) -> Writing:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: accepted: together with stream: true")
        return self


class CompletionRequest(Writing):
    """POST /v1/completions: texts, or their tokens, to go on with."""

    prompt: str | list[str] | Tokens | list[Tokens]

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each of them."""
        return several(self.prompt)


class Part(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """What somebody said."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str = ""

    @property
    def turn(self) -> tuple[str, str]:
        """Who said it, in the words of chat templates, and what."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return "system" if self.role == "developer" else self.role, text


class ChatRequest(Writing):
    """POST /v1/chat/completions: a conversation to answer."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> ChatRequest:
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens: accepted: either max_tokens or max_completion_tokens")
            self.max_tokens = self.max_completion_tokens
        return self


class EmbeddingRequest(Request):
    """POST /v1/embeddings: texts, or their tokens."""

    input: str | list[str] | Tokens | list[Tokens]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """Each of them."""
        return several(self.input)


def several(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """A text or a list of tokens alone, as a list of one."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return cast("list[str | list[int]]", [given])
    return cast("list[str | list[int]]", given)


def read(body: bytes, model: type[M]) -> M:
    """A request's body; `ApiError` 400 for what is none, the first mistake in one line."""
    try:
        given = foreign.loads(body.decode("utf-8"))
    except ValueError as error:  # no JSON, or not UTF-8
        raise ApiError(400, f"the body is no JSON: {error}; accepted: an object in UTF-8") from error
    if not isinstance(given, dict):
        raise ApiError(400, f"the body is {brief(given)}; accepted: an object")
    fields = {name: value for name, value in given.items() if value is not None and name not in IGNORED}
    for name in [name for name in fields if name in NEUTRAL and name not in model.model_fields]:
        value, neutral = fields.pop(name), NEUTRAL[name]
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral):
            accepted = f"{', or '.join(map(repr, neutral))}, or nothing" if neutral else "nothing"
            raise ApiError(400, f"{name} {brief(value)}: not done here; accepted: {accepted}", param=name)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _mistake(error, fields, model) from error


def _mistake(error: ValidationError, fields: JSONObject, model: type[Request]) -> ApiError:
    """The first mistake, told as one line; a field that is not known comes last."""
    first = min(error.errors(), key=lambda each: each["type"] == "extra_forbidden")
    place: list[str] = []
    for step in map(str, first["loc"]):
        if place and place[-1] in CHOICES and not step.isdigit():  # pydantic's name for one of them
            words = f"{'.'.join(place)} {brief(_at(fields, place))}: accepted: {CHOICES[place[-1]]}"
            return ApiError(400, words, param=".".join(place))
        place.append(step)
    return ApiError(400, _words(first, ".".join(place), model), param=".".join(place) or None)


def _at(fields: JSONObject, place: list[str]) -> object:
    """What stands at a place of a request."""
    value: foreign.JSON = fields
    for step in place:
        value = value[int(step)] if isinstance(value, list) else value[step] if isinstance(value, dict) else None
    return value


def _words(first: ErrorDetails, place: str, model: type[Request]) -> str:
    kind, name = first["type"], place.rpartition(".")[2]
    if kind == "extra_forbidden":
        known = list(model.model_fields) if place == name else []
        accepted = ", ".join(known) or "the fields of OpenAI's reference"
        return f"{place}: unknown field{nearest(name, known)}; accepted: {accepted}"
    if kind == "missing":
        return f"{place} is missing; accepted: a value for it"
    if kind == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    wanted = first["msg"].removeprefix("Input should be ").replace("'", "")
    return f"{place} {brief(first['input'])}: accepted: {wanted}"
