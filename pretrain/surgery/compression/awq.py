"""Weights of a few bits, with those that large activations meet scaled up before they are rounded.

Shape letters: N tokens, O outputs, I inputs, C inputs of a group, B rows, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.bounds import Count, Share, Whole
from pretrain.core.models.families import at
from pretrain.dial.effort import Task, Work, through
from pretrain.dial.tuned import DOWN, OUTPUT, QUERIES
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._calibration import Blocks, output_of, parts, set_weight, weight_of, wide_type
from pretrain.surgery.compression._grid import ROUNDED, GroupSize, grid, nearest, round_to_nearest
from pretrain.surgery.compression._smoothing import Scaled, fold, places, stack_of
from pretrain.surgery.compression.gptq import GPTQ

LEAST = 1e-4  # of a scale


@dataclass(frozen=True)
class AWQ(Surgery):
    """AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration (arXiv:2306.00978).

    The inputs of linear layers that are large on the stage's text get large scales, s = mean|X|^r with √(max s · min s)
    set to 1: the weights are multiplied by s before they are rounded, and what makes the inputs (a norm; the values;
    what a gate multiplies) is divided by it. Of r = 0, 1 / `ratios`, … below 1 it is the one whose rounded weights
    leave the outputs of the attention, of the feed-forward or of the layer nearest to the whole model's. Then, but for
    queries and keys, each row's weights of a group are clipped to the share of their maximum, from 1 down to 1 -
    `max_shrink` in steps of 1 / `ratios`, that loses least on `clip_tokens` tokens (0: no clipping). Last they are
    rounded to the nearest point of `gptq`'s grids, and packed as it packs, or left dense. What enters a block is what
    the whole model before it gives.
    """

    needs_text = True
    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "modernbert")

    bits: Literal[2, 3, 4, 8] = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    ratios: Count = 20
    max_shrink: Share = 0.5
    clip_tokens: Whole = 512
    pack: bool = True

    def work(self, task: Task) -> Work:
        """Each place's outputs as they are and with each of the scales tried, and the clipping of each layer."""
        output, keys = task.part(OUTPUT), {(each.outputs, each.inputs) for each in task.inner if each.place == QUERIES}
        places = 4 if len(keys) == 1 else 3  # of values that heads share none stands behind the output's inputs
        passed = task.attention() + task.feed_forward() + task.part(DOWN) + (output if places == 4 else 0)
        passes = (3 + 2 * places) * task.forward + 2 * task.tokens * passed * (1 + self.ratios)
        clips = max(1, int(self.max_shrink * self.ratios)) if self.clip_tokens else 0
        clipping = 2.0 * min(task.tokens, self.clip_tokens) * task.linear * (1 + clips)
        return Work(passes + clipping) + through(task.linear, ROUNDED * (2 + self.ratios + clips))

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with its linear layers quantised."""
        training, stack = model.training, stack_of(self, model, inputs)
        for number, block in enumerate(stack.blocks):
            here = places(model, block)
            chosen = [self._scale(stack, number, place) for place in here]
            clipped = self._seen(model, stack, number) if self.clip_tokens else {}
            stack.advance(number)
            for place, scale_I in zip(here, chosen, strict=True):
                fold(block, place, scale_I)
                for name in place.layers:
                    if name in clipped:
                        clipped[name] = clipped[name] / scale_I
            for name, layer in stack.layers(number, [*clipped]).items():
                set_weight(layer, self.clipped(weight_of(layer), clipped[name]))
        return self._rounding()(model.train(training), inputs)

    def _rounding(self) -> GPTQ:
        return GPTQ(self.bits, self.group_size, self.symmetric, solver="rtn", pack=self.pack)

    def _rounded(self, weight_OI: Tensor) -> Tensor:
        return round_to_nearest(weight_OI, self.bits, self.group_size, self.symmetric).dense()

    def _scale(self, stack: Blocks, number: int, place: Scaled) -> Tensor:
        """The scales with which the least is lost."""
        block, layers = stack.blocks[number], stack.layers(number, place.layers)
        module = at(block, place.inside) if place.inside else next(iter(layers.values()))
        calls = stack.calls(number, module)
        outputs, kept = [output_of(module, *call) for call in calls], stack.kept_rows()
        total_I, tokens = torch.zeros(()), 0
        for seen in stack.seen(number, dict([next(iter(layers.items()))])):
            ((x_NI, _),) = seen.values()
            total_I, tokens = total_I + x_NI.abs().float().sum(0), tokens + len(x_NI)
        whole = {name: weight_of(layer) for name, layer in layers.items()}
        losses, scales = [], []
        for step in range(self.ratios):
            scale_I = (total_I / tokens).pow(step / self.ratios).clamp(min=LEAST)
            scales.append(scale_I / (scale_I.max() * scale_I.min()).sqrt())
            for name, layer in layers.items():
                set_weight(layer, self._rounded(whole[name] * scales[-1]) / scales[-1])
            losses.append(sum(
                (output_of(module, *call) - output_BLO)[kept_BL].float().square().sum().item()
                for call, output_BLO, kept_BL in zip(calls, outputs, kept, strict=True)
            ))  # fmt: skip
        for name, layer in layers.items():
            set_weight(layer, whole[name])
        return scales[min(range(self.ratios), key=losses.__getitem__)]

    def _seen(self, model: PreTrainedModel, stack: Blocks, number: int) -> dict[str, Tensor]:
        """What enters the layers of a block but those that make queries or keys, of tokens at even distances."""
        where, step = parts(model), max(1, stack.tokens() // self.clip_tokens)
        names = [*where["queries"][2:], *where["output"], *where["up"], *where["down"]]
        kept: dict[str, list[Tensor]] = {name: [] for name in names}
        for seen in stack.seen(number, stack.layers(number, names)):
            for name, (x_NI, _) in seen.items():
                kept[name].append(x_NI[::step].to(wide_type(x_NI)))
        return {name: torch.cat(rows) for name, rows in kept.items()}

    def clipped(self, weight_OI: Tensor, x_NI: Tensor) -> Tensor:
        """The weights between the bounds, for each row and group, with which the rounded ones lose least on `x_NI`."""
        size = weight_OI.shape[1] if self.group_size == -1 else self.group_size
        groups = zip(weight_OI.split(size, 1), x_NI.split(size, 1), strict=True)
        return torch.cat([self._clipped(weight_OC, x_NC) for weight_OC, x_NC in groups], 1)

    def _clipped(self, weight_OC: Tensor, x_NC: Tensor) -> Tensor:
        whole_ON, most_O1 = weight_OC @ x_NC.T, weight_OC.abs().amax(1, keepdim=True)
        best_O1, least_O1 = most_O1, torch.full_like(most_O1, torch.inf)
        for step in range(max(1, int(self.max_shrink * self.ratios))):
            bound_O1 = most_O1 * (1 - step / self.ratios)
            tried_OC = weight_OC.clamp(-bound_O1, bound_O1)
            scale_O1, zero_O1 = (part_O[:, None] for part_O in grid(tried_OC, self.bits, self.symmetric))
            rounded_OC = scale_O1 * (nearest(tried_OC, scale_O1, zero_O1, self.bits) - zero_O1)
            error_O1 = (rounded_OC @ x_NC.T - whole_ON).square().mean(1, keepdim=True)
            better_O1 = error_O1 < least_O1
            best_O1, least_O1 = torch.where(better_O1, bound_O1, best_O1), torch.where(better_O1, error_O1, least_O1)
        return weight_OC.clamp(-best_O1, best_O1)
