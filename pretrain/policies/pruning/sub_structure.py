"""Stage one of bert2BERT's pretraining: each step trains the top of a random sub-model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch
from pretrain.core.bounds import Count, Share
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import at, base, blocks, family, head
from pretrain.policies import Policy, State, Training


@dataclass(frozen=True)
class SubStructure(Policy):
    """bert2BERT: Towards Reusable Pretrained Language Models (arXiv:2110.07143).

    The first of the paper's two stages, meant for a model grown by the surgery `bert2bert`. For the first `share` of
    the budget each step draws one of the sub-models of the bottom l, 2l, …, L blocks (l = `layers`), all under the
    same head, and updates only its topmost l blocks and the head. Blocks above are not run and nothing is sent back
    below, so a step costs less; the FLOPs are counted for each depth. Then all is trained. Evaluation is of the whole
    model. The paper trains BERT_BASE so for 5 of 40 epochs with l = 3, and loses by doing it for much longer.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert")

    layers: Count = 3
    share: Share = 0.125

    def start(self, training: Training, state: State) -> None:
        """Make the blocks able to be left out, and the optimiser to pass over what is not trained."""
        model = training.model
        stack = blocks(model)
        if self.layers > len(stack):
            raise PretrainError(f"sub_structure: layers {self.layers}: accepted: from 1 to the {len(stack)} blocks")
        if training.world.size > 1 and training.settings.strategy != "ddp":
            raise PretrainError(f"sub_structure: strategy {training.settings.strategy}: accepted: ddp")
        window = Window(model, every=training.world.size > 1)
        state["window"] = [0, len(stack)]
        for index, block in enumerate(stack):
            block.forward = window.wrap(index, block.forward, state)
        training.optimizer.register_step_pre_hook(lambda *_: window.pass_over(*state["window"]))

    def before_step(self, training: Training, state: State, batches: Sequence[Batch]) -> None:
        """Draw the step's sub-model; a tensor of as many entries as it has blocks gives the meter its depth."""
        depth = len(blocks(training.model))
        state["window"] = [0, depth]
        if training.progress < self.share:
            tops = list(range(depth, 0, -self.layers))
            seed = np.random.SeedSequence((training.settings.seed, training.step, 3))
            top = tops[int(np.random.default_rng(seed).integers(len(tops)))]
            state["window"] = [max(0, top - self.layers), top]
            for batch in batches:
                batch["sub_structure_D"] = torch.zeros(top)


class Window:
    """Runs the blocks below `end` and trains those from `begin` on."""

    def __init__(self, model: nn.Module, every: bool) -> None:
        entry, core = family(model), base(model)
        self.blocks, self.every = blocks(model), every
        inside = {id(p) for block in self.blocks for p in block.parameters()}
        parts = [at(core, entry.final_norm)] if entry.final_norm else []
        parts += [at(model, entry.head_transform)] if entry.head_transform and hasattr(model, "cls") else []
        kept = {id(p) for part in parts for p in part.parameters()} | {id(p) for p in head(model, capped=True)}
        self.outside = [p for p in model.parameters() if id(p) not in inside]
        self.frozen = [p for p in self.outside if id(p) not in kept]

    def wrap(self, index: int, forward: Callable[..., Tensor], state: State) -> Callable[..., Tensor]:
        """A block's `forward` that the window may leave out or cut off from what is below."""
        block = self.blocks[index]

        def windowed(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
            begin, end = state["window"]
            if not block.training or (begin, end) == (0, len(self.blocks)):
                return forward(hidden_states, *args, **kwargs)
            if index >= end:
                return hidden_states
            if index < begin:
                with torch.no_grad():
                    return forward(hidden_states, *args, **kwargs)
            if index == begin:
                hidden_states = hidden_states.detach()
                if self.every:  # several processes exchange all gradients: those of the rest are zeros
                    rest = [p for i, b in enumerate(self.blocks) if not begin <= i < end for p in b.parameters()]
                    hidden_states = hidden_states + 0 * torch.stack([p.sum() for p in self.outside + rest]).sum()
            return forward(hidden_states, *args, **kwargs)

        return windowed

    def pass_over(self, begin: int, end: int) -> None:
        """Take away the gradients of what is not trained, so that nothing decays and no moment moves."""
        if (begin, end) == (0, len(self.blocks)):
            return
        out = [p for i, block in enumerate(self.blocks) if not begin <= i < end for p in block.parameters()]
        for parameter in self.frozen + out:
            parameter.grad = None
