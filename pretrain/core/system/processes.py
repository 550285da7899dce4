"""Processes beside this one: what they share with it, how they end, and the machines of a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from threading import Thread
from types import ModuleType

from pretrain.core.errors import PretrainError

ANSWER = 10.0  # seconds that the head of a cluster has to answer in


def usable_cores() -> int:
    """How many cores this process may use: those that it is bound to, and no more than a container's share of them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return usable if quota == "max" else max(1, min(usable, int(quota) // int(period)))
    except (OSError, ValueError):
        return usable


def end(processes: Sequence[BaseProcess]) -> None:
    """Let them save and stop. Each is asked again until it is gone: what a pool has handed out it begins yet."""
    while processes:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(1)
        processes = [process for process in processes if process.is_alive()]


def end_with_parent() -> None:
    """Let this process be asked to end when the one that made it is gone, killed or not: nobody waits for it then."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=watch, daemon=True).start()


@contextmanager
def without_main() -> Iterator[None]:
    """Let processes that are spawned meanwhile leave the program's main file alone, which they would run once more."""
    main = sys.modules["__main__"]
    before = {name: getattr(main, name) for name in ("__spec__", "__file__") if hasattr(main, name)}
    main.__spec__ = None
    main.__dict__.pop("__file__", None)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(main, name, value)


def _check_answers(address: str) -> None:
    """Raise OSError where nothing answers at HOST:PORT: Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER):
            pass


@contextmanager
def cluster(address: str, *, silent: bool = False) -> Iterator[ModuleType]:
    """The package ray, joined to the cluster at an address (of a head, `auto`, `local`) as long as this is open.

    `silent`: what its workers and it itself say is not shown.
    """
    try:
        import ray
    except ImportError as error:
        raise PretrainError("a cluster needs ray; accepted: pip install 'pretrain[ray]'") from error
    try:
        _check_answers(address)
        if silent:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(address=address)
    except (OSError, ValueError, RuntimeError) as error:
        raise PretrainError(
            f"no ray cluster at {address!r}: {error}; accepted: the address of a head, auto, local"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
