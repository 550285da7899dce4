"""What the tests of the server share: one that runs in this process, and clients of it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def served(model: Any, tokenizer: Any, *, name: str = "tiny", settings: Any = (), **limits: Any):
    """A `Client` of a server in a thread of this process."""
    uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")
    from pretrain.inference.serving.app import application
    from pretrain.inference.serving.command import _listen
    from pretrain.inference.serving.engine import Engine, Limits
    from pretrain.inference.serving.front import Front, Settings

    engine = Engine(
        model, tokenizer, Limits(**({"rows": 4, "cache_tokens": 4096, "queue": 64, "length": 512} | limits))
    )
    front = Front(model, tokenizer, engine, Settings(name, **dict(settings)))
    config = uvicorn.Config(
        application(front), log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=1
    )
    server, listening = uvicorn.Server(config), _listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    client = Client(listening.getsockname()[1], name, front)
    try:
        wait_for(lambda: client.get("/health")[0] == 200)
        yield client
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


class Client:
    """Asks a server; `key` goes with every request."""

    def __init__(self, port: int, name: str, front: Any) -> None:
        self.port, self.name, self.front, self.key = port, name, front, ""

    @property
    def engine(self) -> Any:
        """What answers."""
        return self.front.engine

    def get(self, path: str) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON or text, headers."""
        return self.ask("GET", path, None)

    def post(self, path: str, **fields: Any) -> tuple[int, Any, dict[str, str]]:
        """The same, of a request with the model's name in it."""
        return self.ask("POST", path, json.dumps({"model": self.name} | fields).encode())

    def ask(self, method: str, path: str, body: bytes | None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """The same, of any request."""
        connection = self.connection()
        try:
            connection.request(method, path, body, self.headers() | headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            kind = answer.headers.get("content-type", "")
            return answer.status, json.loads(text) if "json" in kind else text, dict(answer.headers)
        finally:
            connection.close()

    def headers(self) -> dict[str, str]:
        """Of each request."""
        return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})

    def connection(self) -> http.client.HTTPConnection:
        """To the server."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    @contextmanager
    def stream(self, path: str, **fields: Any):
        """An iterator of the events of a stream, `[DONE]` included; on leaving, the client is gone."""
        connection = self.connection()
        body = {"model": self.name, "stream": True} | fields
        connection.request("POST", path, json.dumps(body).encode(), self.headers())
        answer = connection.getresponse()
        try:
            yield events(answer)
        finally:
            answer.close()
            connection.close()

    def text(self, prompt: Any, **fields: Any) -> str:
        """What follows a prompt."""
        status, answer, _ = self.post("/v1/completions", prompt=prompt, **fields)
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def metric(self, name: str) -> float:
        """A number of `/metrics`."""
        lines = self.get("/metrics")[1].splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"pretrain_{name} "))


def events(answer: http.client.HTTPResponse):
    """What a stream says, piece by piece."""
    for line in answer:
        if line.startswith(b"data: "):
            data = line[6:].decode().strip()
            yield data if data == "[DONE]" else json.loads(data)


def joined(pieces: Any, chat: bool = False) -> dict[int, tuple[str, str | None]]:
    """The text and the end of each answer of a stream that ends as it should."""
    *chunks, last = pieces
    assert last == "[DONE]"
    texts: dict[int, str] = {}
    ends: dict[int, str | None] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            number = choice["index"]
            assert ends.get(number) is None, "a piece after the end"
            piece = choice["delta"].get("content", "") if chat else choice["text"]
            texts[number] = texts.get(number, "") + piece
            ends[number] = choice["finish_reason"]
    return {number: (texts[number], ends[number]) for number in texts}


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    """Until something holds."""
    until = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < until, "it never came"
        time.sleep(0.01)
