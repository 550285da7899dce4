"""Work behind training's back: one piece at a time, whose error comes up at the next piece or at the end."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist

from pretrain.core.errors import PretrainError
from pretrain.training.distributed import World


@cache
def _group() -> dist.ProcessGroup:
    """The processes' group for work in the background, whose exchanges do not meet those of training."""
    group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
    assert group is not None
    return group


class Background:
    """A thread for work that all processes take part in. Every process hands in the same pieces in the same order."""

    def __init__(self, world: World) -> None:
        self._group = _group() if world.size > 1 else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._work: Future[None] | None = None

    def hand_in(self, work: Callable[[], None]) -> None:
        """Begin a piece of work, once the one before is done."""
        self.wait()
        self._work = self._pool.submit(work)

    def wait(self) -> None:
        """Wait for the work; its error is raised here."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def together(self, part: Callable[[], None]) -> None:
        """Do a part of the work in all processes; none goes on before all are through, and an error of one is all's."""
        error: Exception | None = None
        try:
            part()
        except Exception as caught:
            error = caught
        failed = torch.tensor([float(error is not None)])
        if self._group is not None:
            dist.all_reduce(failed, group=self._group)
        if error is not None:
            raise error
        if failed.item():
            raise PretrainError("another process could not write the training state: its own error says why")

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except Exception:
            if kind is None:
                raise  # else what has ended the training is what is to be told
        finally:
            self._pool.shutdown()
