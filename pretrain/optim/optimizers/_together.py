"""Several optimisers as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import torch


class Together(torch.optim.Optimizer):
    """Optimisers over parameters of their own, seen from outside as one: one list of groups, one state."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = [(part, len(part.param_groups)) for part in parts]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of each; with a `closure` after it has computed the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        for part, groups in self.parts:
            # Handed over anew each time: who loads a state may replace either.
            part.param_groups, part.state = self.param_groups[first : first + groups], self.state
            part.step()
            first += groups
        return loss
