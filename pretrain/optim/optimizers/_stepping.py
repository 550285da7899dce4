"""What `step` owes its caller, whatever an optimiser does in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch


class Stepping(torch.optim.Optimizer):
    """Base of the optimisers that are written here: a subclass says what one `update` of the parameters is."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; with a `closure` after it has computed the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    def update(self) -> None:
        """Move the parameters that have a gradient; none is recorded."""
        raise NotImplementedError
