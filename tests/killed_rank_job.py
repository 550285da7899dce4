"""One of some processes of the small training, of which the last kills itself once, as it comes to the fifth step:
FOLDER PREPARED STEPS STRATEGY."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import training_job

from pretrain.training.loader import Loader

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FIRST_LIFE = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"


class Killed(Loader):
    """A loader that takes its process with it."""

    def step(self, step: int, progress: float) -> Any:
        """The batches of a step, or a kill."""
        if FIRST_LIFE and step == 4 and RANK + 1 == SIZE:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(step, progress)


if __name__ == "__main__":
    training_job.Loader = Killed
    training_job.main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
