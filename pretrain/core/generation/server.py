"""Who completes a prompt elsewhere: a server that speaks OpenAI's protocol.

A prompt is in two parts: what the system says, and what the user does.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn, Protocol

from pretrain.core.errors import PretrainError
from pretrain.core.foreign import json as foreign

PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # of HTTP: what may be well a little later
LONGEST_WAIT = 60.0  # seconds before asking again
_TOO_LONG = re.compile(r"context[ _](length|window|size)|maximum context|too long|too many tokens", re.IGNORECASE)


@dataclass(frozen=True)
class Reply:
    """What was said, and the tokens that it took: of the prompt, new ones, and those of the prompt that were kept."""

    text: str
    prompt_tokens: int
    new_tokens: int
    kept_tokens: int = 0
    finished: bool = True  # by itself, and not for want of tokens


class Client(Protocol):
    """What completes prompts."""

    def complete(self, shared: str, rest: str, *, max_tokens: int) -> Reply:
        """What follows `shared` and `rest`."""


class TooLong(PretrainError):
    """A prompt that does not fit into the context of a server's model."""


class _Passing(PretrainError):
    """What may be well a little later; `wait` are the seconds that the server asks for."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class _Refused(urllib.request.HTTPRedirectHandler):
    """A server that sends elsewhere is not followed: the key is for the one that was named."""

    def redirect_request(self, *_: object) -> None:
        return None


_opener = urllib.request.build_opener(_Refused)


class ServerClient:
    """A server with `POST /chat/completions` below `url`, such as http://localhost:8000/v1.

    The shared part is the system's message, the rest the user's; servers keep keys and values as they please. What may
    pass (no connection, no answer in `timeout` seconds, too many requests, HTTP 5xx) is asked again up to `retries`
    times, after 1, 2, 4, … seconds, or as long as the server says. It may be asked from several threads.
    """

    def __init__(
        self, url: str, model: str, *, key: str = "", temperature: float = 0.0, top_p: float = 1.0,
        timeout: float = 600.0, retries: int = 0, pause: Callable[[float], object] = time.sleep,
    ) -> None:  # fmt: skip
        self.address, self.model, self.key = f"{check_url(url)}/chat/completions", model, key
        self.temperature, self.top_p, self.timeout = temperature, top_p, timeout
        self.retries, self.pause = retries, pause

    def complete(self, shared: str, rest: str, *, max_tokens: int, seed: int | None = None) -> Reply:
        """What the server's model says; one `PretrainError` where it says nothing of use, however often it is asked.

        `TooLong` where the prompt does not fit into its context.
        """
        messages = [{"role": "system", "content": shared}] if shared else []
        body = {
            "model": self.model, "messages": [*messages, {"role": "user", "content": rest}], "max_tokens": max_tokens,
            "temperature": self.temperature, "top_p": self.top_p,
        } | ({} if seed is None else {"seed": seed})  # fmt: skip
        for tried in range(self.retries + 1):
            try:
                return self._read(self._post(json.dumps(body).encode()))
            except _Passing as error:
                if tried == self.retries:
                    times = f" (asked {tried + 1} times)" if tried else ""
                    raise PretrainError(f"{error}{times}") from error
                self.pause(min(LONGEST_WAIT, 2.0**tried if error.wait is None else error.wait))
        raise AssertionError("unreachable")

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.address, body, headers, method="POST")
        try:
            with _opener.open(request, timeout=self.timeout) as answer:
                content: bytes = answer.read(foreign.MOST)
        except urllib.error.HTTPError as error:
            with error, suppress(OSError, http.client.HTTPException):
                self._refuse(error.code, error.read(1 << 16), error.headers.get("Retry-After"))
            self._refuse(error.code, b"", None)
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", None) or error
            raise _Passing(
                f"server {self.address}: {cause}; accepted: one that answers within {self.timeout:g} seconds"
            ) from error
        return content.decode("utf-8", "replace")

    def _refuse(self, code: int, content: bytes, after: str | None) -> NoReturn:
        reason = " ".join(content.decode("utf-8", "replace").split())[:200]
        message = f"server {self.address}: HTTP {code}: {reason}; accepted: HTTP 200"
        if code in PASSING:
            raise _Passing(message, _seconds(after))
        raise (TooLong if code in (400, 413, 422) and _TOO_LONG.search(reason) else PretrainError)(message)

    def _read(self, content: str) -> Reply:
        try:
            read = foreign.loads(content)
            (choice, *_), usage = read["choices"], read["usage"]
            text, ended = choice["message"]["content"], choice.get("finish_reason")
            if text is None and ended == "content_filter":
                text = ""
            kept = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"]), int(kept)
            return Reply(text + "", *tokens, finished=ended != "length")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise PretrainError(
                f"server {self.address} answers {' '.join(content.split())[:200]!r}; accepted: a chat completion with "
                "content and usage"
            ) from error


def check_url(url: str) -> str:
    """An address without the slash at its end; refused is one that is none, or that holds a password."""
    parts = urllib.parse.urlsplit(url)
    if "@" in parts.netloc:
        raise PretrainError("server: an address with a name or a password in it; accepted: one without")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise PretrainError(f"server {url!r}: accepted: an address such as http://localhost:8000/v1")
    return url.rstrip("/")


def _seconds(after: str | None) -> float | None:
    """What `Retry-After` says, a number of seconds or a date."""
    if after is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(after))
    with suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    return None


class Stopped(Exception):
    """Raised in a thread that waits, when no more answers are wanted."""


def pausing(stop: threading.Event) -> Callable[[float], None]:
    """A pause that ends with `Stopped` as soon as the event is set."""

    def pause(seconds: float) -> None:
        if stop.wait(seconds):
            raise Stopped

    return pause
