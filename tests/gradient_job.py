"""One of two processes: PREPARED FOLDER ROUNDING. Each takes its part of a step; both must have the whole's
gradient."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from gradient_cases import all_cases, build, distance

from pretrain.core.models import families
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.training.distributed import World, join, wrap

CHOSEN = {
    "ddp": ("causal_lm", "electra", "bag_of_words", "self_distillation", "classification", "seq2seq", "deft",
            "random_token_substitution", "span_corruption"),
    "fsdp": ("causal_lm", "bag_of_words", "electra"),
}  # fmt: skip


class Poisoned(CausalLM):
    """Its loss is no number, though its gradient would be."""

    def loss(self, *given: Any) -> Any:
        """Infinity more than it was."""
        loss = super().loss(*given)
        return loss._replace(value=loss.value + torch.inf)


def main(prepared: Path, folder: Path, rounding: float) -> None:
    """Compare the two for a choice of objectives."""
    world = join(torch.device("cpu"))
    for strategy, case in itertools.product(CHOSEN, all_cases()):
        if case[0] not in CHOSEN[strategy]:
            continue
        made = build(*case, prepared, folder)
        whole, loss = made.gradients([[made.batch()]], World(0, 1, world.device))
        wrapped = wrap(made.trainee, families.blocks(made.trainee.model), world, strategy)
        # Uneven both ways: one process has a row and two, the other three rows at once.
        mine = [[made.batch(0, 1)], [made.batch(1, 3)]] if world.main else [[made.batch(3, 5)], [made.batch(5)]]
        parts, loss_of_parts = made.gradients(mine, world, wrapped)
        (both,) = (value / world.size for value in world.sum([loss_of_parts]))
        apart = distance(whole, parts)
        assert apart < rounding and abs(both / loss - 1) < rounding, (strategy, case, apart, loss, both)
        if case[0] == "causal_lm":
            made.trainee.objectives[0] = made.objective if world.main else Poisoned()
            parts, _ = made.gradients(mine, world, wrapped)
            # Any, since the embeddings of tokens that are in no row have no gradient.
            kept = [name for name, gradient in parts.items() if not gradient.isnan().any()]
            assert not kept, f"one process knows of it alone: {kept}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
