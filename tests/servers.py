"""A server that speaks OpenAI's protocol, in this process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Served:
    """`seen` holds what was sent: path, headers, body. `answer` gives a status, what is said, and further headers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self.url, self.at_once, self.most = "", 0, 0
        self.answer: Callable[[Any], tuple[int, bytes, dict[str, str]]] = lambda body: completion("said")
        self.seconds = 0.0
        self.lock = threading.Lock()

    @property
    def asked(self) -> list[str]:
        """What users said."""
        return [body["messages"][-1]["content"] for _, _, body in self.seen]


def completion(text: str | None, reason: str = "stop") -> tuple[int, bytes, dict[str, str]]:
    """A chat completion."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    usage = {"prompt_tokens": 7, "completion_tokens": len((text or "").split())}
    return 200, json.dumps({"choices": [choice], "usage": usage}).encode(), {}


@contextmanager
def serving():
    """A `Served` that answers at its `url`."""
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:
                served.seen.append((self.path, dict(self.headers), body))
                served.at_once += 1
                served.most = max(served.most, served.at_once)
                status, said, headers = served.answer(body)
            time.sleep(served.seconds)
            with served.lock:
                served.at_once -= 1
            self.send_response(status)
            for name, value in {"Content-Length": str(len(said)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{made.server_port}/v1"
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        made.shutdown()
        made.server_close()
        thread.join()
