"""Shards of documents measured by many processes, here or on a Ray cluster; what comes of each is given in order.

An operation hands over a function of a shard alone, and reads what it gives of the shards one after another, so that
nothing it does depends on how many processes there are. What takes this process less than the start of others is done
here. A function travels once, pickled, with the folders of methods that it may come from; no process inherits memory,
since the threads of Arrow and tokenizers make a fork unsafe.

On a cluster these are plain tasks of Ray. `ray.data` cuts a corpus into blocks of its own, which would be joined again
by number, and has nothing to look a shard up by that an interrupted run has measured.
"""

from __future__ import annotations

import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Self

from pretrain.core.errors import PretrainError
from pretrain.core.quick.quantities import duration
from pretrain.core.registry import added, use_methods
from pretrain.core.system.processes import cluster, end, end_with_parent, usable_cores, without_main
from pretrain.corpus.progress import EVERY

START = 2.0  # seconds of work that other processes have to take over before they are worth their start
HELD = 1 << 26  # characters of texts, about, that are on their way at once
Made = Any  # of documents: what is measured, and what comes of it
Rows = list[Made]
Pending = Made  # what it will come by: a future here, a reference on a cluster


class Shard(NamedTuple):
    """Some documents' texts, or what else is measured, and a name under which what comes of them may be known."""

    rows: Rows
    key: str = ""


class Workers:
    """Processes that measure shards: `count` on this machine (0: one a core), or those of the cluster at `ray`.

    They begin when there is enough to do, and end with the `with` that they are opened by. `say` is told how far an
    operation is, every half minute. `start`: seconds of work that are worth it; below 0 all is handed over.
    """

    def __init__(
        self, count: int = 1, ray: str = "", say: Callable[[str], None] = lambda text: None, start: float = START
    ) -> None:
        self.count, self.ray, self.say, self.start = count or usable_cores(), ray, say, start
        self._open = ExitStack()
        self._pool: _Here | _Cluster | None = None

    def __enter__(self) -> Self:
        if self.ray:  # what is wrong with the address is told at once
            self._opened()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None and error is not None:
            self._pool.abandon()
        self._open.close()
        self._pool = None

    def each(
        self, method: str, work: Callable[[Rows], Made], shards: Iterable[Shard], documents: int,
        known: Callable[[str], Made] = lambda key: None,
    ) -> Iterator[tuple[Shard, Made]]:  # fmt: skip
        """Each shard with what `work` gives of its rows, or with what is `known` by its key, in order.

        `work` is a pure function that can be pickled; one that cannot, or is of the program's main file, stays in this
        process. `documents` are how many there are in all. An error of `work` comes out here; where a process dies
        there is one that names the `method`.
        """
        far, stream = _Progress(method, documents, self.say), iter(shards)
        alone, took = self.count == 1 and not self.ray, 0.0
        payload = None if alone else _packed(work)
        while alone or payload is None or took * far.ahead() <= self.start:
            shard = next(stream, None)
            if shard is None:
                return
            begun, made = time.monotonic(), known(shard.key)
            if made is None:
                made = work(shard.rows)
                took += time.monotonic() - begun
            yield shard, made
            far.count(len(shard.rows))
        if payload is not None and not alone:
            yield from self._shared(method, payload, stream, far, known)

    def _opened(self) -> _Here | _Cluster:
        if self._pool is None:
            pool: _Here | _Cluster = _Cluster(self.ray) if self.ray else _Here(self.count)
            self._open.enter_context(pool)
            self._pool = pool
        return self._pool

    def _shared(
        self, method: str, payload: bytes, stream: Iterator[Shard], far: _Progress, known: Callable[[str], Made]
    ) -> Iterator[tuple[Shard, Made]]:
        pool, waiting, held = self._opened(), deque[tuple[Shard, Pending, bool]](), 0
        do = pool.prepared(payload)
        more = True
        while more or waiting:
            while more and len(waiting) < 2 * pool.size + 2 and held < HELD:
                shard = next(stream, None)
                more = shard is not None
                if shard is not None:
                    held += _weight(shard)
                    made = known(shard.key)
                    waiting.append((shard, made, True) if made is not None else (shard, do(method, shard.rows), False))
            if waiting:
                shard, made, there = waiting.popleft()
                held -= _weight(shard)
                yield shard, made if there else pool.result(method, made)
                far.count(len(shard.rows))


def _weight(shard: Shard) -> int:
    return sum(len(row) if isinstance(row, str | bytes) else sum(map(len, row)) for row in shard.rows)


class _Progress:
    """Tells every half minute how many of an operation's documents are done, and when they all will be."""

    def __init__(self, method: str, documents: int, say: Callable[[str], None]) -> None:
        self.method, self.documents, self.say = method, documents, say
        self.begun = self.last = time.monotonic()
        self.done = 0

    def count(self, documents: int) -> None:
        """So many more are done."""
        self.done += documents
        if time.monotonic() - self.last >= EVERY:
            self.last = time.monotonic()
            left = duration((self.last - self.begun) * self.ahead())
            self.say(f"{self.method}: {self.done:,} of {self.documents:,} documents, about {left} left")

    def ahead(self) -> float:
        """How many times as many are still to come."""
        return max(0, self.documents - self.done) / self.done if self.done else 0.0


def _packed(work: Callable[[Rows], Made]) -> bytes | None:
    """A function as another process can open it; None where none can."""
    try:
        inner = pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return None if b"__main__" in inner else pickle.dumps((added(), inner))


@lru_cache(maxsize=1)
def _opened(packed: bytes | str) -> Callable[[Rows], Made]:
    """The function that was packed, or lies packed in a file."""
    folders, inner = pickle.loads(packed if isinstance(packed, bytes) else Path(packed).read_bytes())
    for folder in folders:
        use_methods(folder)
    work: Callable[[Rows], Made] = pickle.loads(inner)
    return work


def _done(packed: bytes | str, rows: Rows) -> Made:
    return _opened(packed)(rows)


def _begin() -> None:
    """Of a process here: Ctrl-C is the business of the one that made it, without which it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


class _Here:
    """Processes on this machine."""

    def __init__(self, count: int) -> None:
        self.size, self.number = count, 0
        self.folder = TemporaryDirectory(prefix="pretrain-workers-")
        self.pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_begin)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *of: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.folder.cleanup()

    def prepared(self, payload: bytes) -> Callable[[str, Rows], Future[Made]]:
        """What hands rows over to the function that was packed."""
        self.number += 1
        path = Path(self.folder.name) / str(self.number)
        path.write_bytes(payload)

        def do(method: str, rows: Rows) -> Future[Made]:
            try:
                with without_main():
                    return self.pool.submit(_done, str(path), rows)
            except BrokenProcessPool as error:
                raise _died(method) from error

        return do

    def result(self, method: str, future: Future[Made]) -> Made:
        """What came of it."""
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise _died(method) from error

    def abandon(self) -> None:
        """Let what is under way be."""
        processes = list((getattr(self.pool, "_processes", None) or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        end(processes)


def _died(method: str) -> PretrainError:
    return PretrainError(
        f"{method}: a worker process was killed, as it is where memory runs out; accepted: fewer workers, or more "
        "memory; run again to go on"
    )


class _Cluster:
    """The cores of a Ray cluster; all its machines have this package, at the same release."""

    def __init__(self, address: str) -> None:
        self.address, self.size = address, 1
        self.open = ExitStack()
        self.ray: ModuleType

    def __enter__(self) -> Self:
        self.ray = self.open.enter_context(cluster(self.address, silent=True))
        self.size = max(1, int(self.ray.cluster_resources().get("CPU", 1)))
        self.task = self.ray.remote(_done)
        return self

    def __exit__(self, *of: object) -> None:
        self.open.close()

    def prepared(self, payload: bytes) -> Callable[[str, Rows], Pending]:
        """What hands rows over to the function that was packed."""
        put = self.ray.put(payload)
        return lambda method, rows: self.task.remote(put, rows)

    def result(self, method: str, reference: Pending) -> Made:
        """What came of it."""
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, PretrainError) else _failed(method, error.cause) from error
        except self.ray.exceptions.RayError as error:
            raise _failed(method, error) from error

    def abandon(self) -> None:
        """Let what is under way be: it ends when the cluster is left."""


def _failed(method: str, error: BaseException) -> PretrainError:
    return PretrainError(f"{method}: on the ray cluster: {type(error).__name__}: {error}; run again to go on")
