"""One of some processes: reads a training's newest state, writes it anew as these processes hold it: FOLDER PREPARED
STRATEGY. No tensor may be made whole in any of them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from training_job import parts

from pretrain.training import state
from pretrain.training.background import Background
from pretrain.training.distributed import join
from pretrain.training.loop import _start


def forbidden(*_: object, **__: object) -> None:
    """In place of what makes a sharded tensor whole."""
    raise AssertionError("a tensor was made whole")


def main(folder: Path, prepared: Path, strategy: str) -> None:
    """Resume, and save into FOLDER/again."""
    world = join(torch.device("cpu"))
    DTensor.full_tensor = forbidden  # type: ignore[method-assign]
    training = _start(*parts(folder, prepared, 99, strategy), None, [])
    record = {"processes": world.size}
    with Background(world) as background:
        state.save(folder / "again", 1, training.trainee, training.optimizer, {}, record, world, 1, background)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
