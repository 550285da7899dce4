"""Steps that are not finite: their update is not made, they are counted, and too many in a row end the training.

The loss is part of the gradient's check: `seed`, from which the backward pass begins, is no number where the loss is
none, so that the gradient's norm, which all processes share, tells of both.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


def seed(loss: Tensor) -> Tensor:
    """What the backward pass of a loss begins with: 1, or not a number where the loss is not finite."""
    return 1 + 0 * loss.detach()


class Guard:
    """Lets an optimiser make its update where the gradient's norm is finite.

    With `late` the optimiser itself leaves everything as it is, by a flag on the device (`found_inf` of torch's fused
    optimisers), and the host learns of it a step later, when it need not wait any more.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, late: bool = False) -> None:
        self.optimizer, self.late = optimizer, late and getattr(optimizer, "_step_supports_amp_scaling", False)
        self.skipped = self.in_row = 0  # steps, as far as the host knows
        self.unlogged: list[int] = []  # those skipped that the log has not told of yet
        self._unread: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()  # flags that the host has not seen

    def summary(self, steps: int) -> str:
        """What became of so many steps, in words; nothing where all were made."""
        last = f", the last {self.in_row} among them: the weights are those of step {steps - self.in_row:,}"
        skipped = f"{self.skipped:,} of {steps:,} steps were not finite and skipped"
        return (skipped + (last if self.in_row else "")) if self.skipped else ""

    def admits(self, norm: Tensor, step: int) -> bool:
        """Whether the optimiser is to be called; `norm` is that of the gradient of step number `step`."""
        wrong = ~norm.isfinite()
        if self.late:
            vars(self.optimizer).update(grad_scale=None, found_inf=wrong.float())
        self._unread.append((step, *_on_its_way(wrong)))
        if self.late:
            return True
        # The host waits for the gradient: with this optimiser only the host can leave the update out.
        self.read()
        return not self.in_row

    def read(self, unread: int = 0) -> None:
        """Take note of the flags, but for the newest `unread`, for which the host would have to wait."""
        while len(self._unread) > unread:
            step, wrong, arrived = self._unread.popleft()
            if arrived is not None:
                arrived.synchronize()
            if wrong.item():
                self.skipped, self.in_row = self.skipped + 1, self.in_row + 1
                self.unlogged.append(step)
            else:
                self.in_row = 0


def _on_its_way(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The flag as the host will have it, and the event after which it does: no wait for what is queued behind it."""
    if flag.device.type != "cuda":
        return flag, None
    host, arrived = torch.empty((), dtype=flag.dtype, pin_memory=True), torch.cuda.Event()
    host.copy_(flag, non_blocking=True)
    arrived.record()
    return host, arrived
