"""`pretrain serve` under load: tokens a second, and how long clients wait for the first token and for an answer.

    python benchmarks/serving.py CHECKPOINT [--clients 1 16] [--seconds 60] [--tokens 64] [--rows 16]
    python benchmarks/serving.py --url http://127.0.0.1:8000/v1 --model NAME    # another server of that protocol

Each client asks for one streamed answer after another, greedily, to questions of different lengths, until the time is
up; what is then being written is written to its end and counted with its time. Tokens are those of the answers, as the
server counts them in `usage`, or pieces of the stream where it does not. All clients are threads of this process, which
takes time of the same machine; tokens for each second of the server's processor time (`--pid` of another server) tell
more than those of the clock where others want its cores.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

QUESTIONS = [
    "Why is the sky blue?",
    "Explain to a child how a bicycle stays upright, and why it falls over when it stands still.",
    "Write a short letter to a neighbour whose dog barks at night.",
    "List the steps for making bread, from flour to loaf, and say at each step what can go wrong.",
    "What is the difference between a virus and a bacterium?",
    "Tell the story of a lighthouse keeper who finds a message in a bottle on the first day of winter.",
]


@dataclass
class Waits:
    """Of all clients: seconds to the first token and to the end of each answer, tokens, and what went wrong."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def started(checkpoint: str, rows: int, queue: int) -> Iterator[tuple[str, str, psutil.Process]]:
    """A server's address, its model's name and its process."""
    command = [
        sys.executable, "-m", "pretrain", "serve", checkpoint, "--port", "0", "--name", "served",
        "--rows", str(rows), "--queue", str(queue),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if match := re.search(r"at (http://\S+/v1)", line):
                yield match[1], "served", psutil.Process(process.pid)
                break
        else:
            sys.exit("the server did not start")
    finally:
        process.terminate()
        process.wait(60)


def ask(url: str, model: str, number: int, tokens: int, waits: Waits) -> None:
    """One answer."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=600)
    question = QUESTIONS[number % len(QUESTIONS)]
    body = {
        "model": model, "messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first, pieces, usage, done = time.perf_counter(), 0.0, 0, 0, False
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"{parts.path}/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"HTTP {answer.status}: {answer.read(300)!r}")
        for line in answer:
            data = line.removeprefix(b"data: ").strip()
            if not line.startswith(b"data: ") or data == b"[DONE]":
                done = done or data == b"[DONE]"
                continue
            piece = json.loads(data)
            usage = (piece.get("usage") or {}).get("completion_tokens") or usage
            choice = (piece.get("choices") or [{}])[0]
            if (choice.get("delta") or {}).get("content"):
                first, pieces = first or time.perf_counter() - began, pieces + 1
            done = done or choice.get("finish_reason") is not None
        if not done:
            raise RuntimeError("the stream ended before its end")
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        with waits.lock:
            waits.wrong.append(str(error))
        return
    finally:
        connection.close()
    with waits.lock:
        waits.tokens += usage or pieces
        waits.first.append(first)
        waits.whole.append(time.perf_counter() - began)


def loaded(url: str, model: str, clients: int, seconds: float, tokens: int) -> tuple[Waits, float]:
    """So many clients for so long; returns what they waited and how long all took."""
    waits, began = Waits(), time.perf_counter()

    def client(which: int) -> None:
        turn = 0
        while time.perf_counter() - began < seconds:
            ask(url, model, which + turn, tokens, waits)
            turn += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return waits, time.perf_counter() - began


def percentile(values: list[float], share: float) -> float:
    """The value below which such a share lies."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * share) - 1]


def main() -> None:
    """Print a row for each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="")
    parser.add_argument("--url", default="")
    parser.add_argument("--model", default="")
    parser.add_argument("--pid", type=int)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16)
    settings = parser.parse_args()
    if bool(settings.checkpoint) == bool(settings.url):
        parser.error("accepted: either a checkpoint or --url")
    print(
        "| clients | answers | tokens/s | a processor second | first token p50 | p99 | answer p50 | p99 | lost | MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    if settings.url:
        rows(settings.url, settings.model, psutil.Process(settings.pid) if settings.pid else None, settings)
        return
    with started(settings.checkpoint, settings.rows, 2 * max(settings.clients)) as (url, model, process):
        rows(url, model, process, settings)


def spent(process: psutil.Process | None) -> float:
    """Seconds of processor time that a server has taken."""
    times = process.cpu_times() if process is not None else None
    return times.user + times.system if times is not None else 0.0


def rows(url: str, model: str, process: psutil.Process | None, settings: argparse.Namespace) -> None:
    """One for each number of clients, after one answer to warm up."""
    ask(url, model, 0, 8, Waits())
    for clients in settings.clients:
        before = spent(process)
        waits, took = loaded(url, model, clients, settings.seconds, settings.tokens)
        times = [percentile(values, share) for values in (waits.first, waits.whole) for share in (0.5, 0.99)]
        worked = f"{waits.tokens / (spent(process) - before):.1f}" if process is not None else ""
        memory = f"{process.memory_info().rss / 2**20:,.0f}" if process is not None else ""
        speeds = [f"{waits.tokens / took:.1f}", worked]
        cells = [clients, len(waits.whole), *speeds, *(f"{seconds:.2f} s" for seconds in times)]
        print("|", " | ".join(map(str, [*cells, len(waits.wrong), memory])), "|", flush=True)
        for words in dict.fromkeys(waits.wrong):
            print(f"lost: {words}", file=sys.stderr)


if __name__ == "__main__":
    main()
