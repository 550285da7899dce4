"""Several optimisers as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pretrain.optim.optimizers._stepping import Stepping


class Together(Stepping):
    """Optimisers over parameters of their own, seen from outside as one: one list of groups, one state."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = [(part, len(part.param_groups)) for part in parts]

    def update(self) -> None:
        """One step of each."""
        first = 0
        for part, groups in self.parts:
            # Handed over anew each time: who loads a state may replace either.
            part.param_groups, part.state = self.param_groups[first : first + groups], self.state
            part.step()
            first += groups
