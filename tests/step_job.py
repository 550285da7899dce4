"""One of two processes: counts the exchanges of a training's steps: FOLDER PREPARED STRATEGY."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from training_job import parts

from pretrain.training.loop import _start, step

STEPS = 5


def main(folder: Path, prepared: Path, strategy: str) -> None:
    """The first step has shapes that are new, and says so in an exchange of its own; each other has one."""
    training = _start(*parts(folder, prepared, 99, strategy), None, [])
    exchange, seen = dist.all_reduce, []

    def counted(tensor: torch.Tensor, *given: object, **named: object) -> object:
        seen.append(tensor.device.type)
        return exchange(tensor, *given, **named)

    dist.all_reduce = counted
    numbers = []
    for _ in range(STEPS):
        step(training)
        numbers.append(len(seen))
    assert numbers == [2, 3, 4, 5, 6] and set(seen) == {"cpu"}, numbers


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
