"""A model put together from blocks of others, as they are."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pretrain.core.bounds import Count, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.method import Ref
from pretrain.core.models.families import family
from pretrain.dial.effort import Task, Work
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._growth import fresh
from pretrain.surgery._merge import weights
from pretrain.surgery.merging._streams import Place, Setting, Stored, at_place, check_settings, for_each, opened

LAYERS = ("num_hidden_layers", "n_layer", "layer_types")  # fields of a configuration that come out of the slices


class Origin(NamedTuple):
    """Where a block comes from."""

    model: int  # 0: the checkpoint
    block: int
    slice: int
    depth: float  # of the block in its slice: 0 of the first, 1 of the last (and of an only one)


@dataclass(frozen=True)
class Passthrough(Surgery):
    """SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling (arXiv:2312.15166).

    Depth up-scaling, and mergekit's `passthrough` for any models: the paper's 48 blocks are those of one model of 32,
    `slices: [[0, 0, 24], [0, 8, 32]]`, and training goes on.

    The blocks of the new model are those of `slices` one after another. A slice is a model (0: the checkpoint, 1: the
    first of `models`), a block and the one after the last. What comes before the blocks is
    the first slice's model's, what comes after them the last one's; a head that is tied is the embeddings. `scale`
    multiplies the weights: one for all slices or one for each; each is a number, a list of numbers spread over the
    slice's blocks, or a mapping from parts of weights' names to either (`*`: all others):
    `[{o_proj: 0.0, down_proj: 0.0, "*": 1.0}]` adds blocks that do nothing at first. Numbers are copied; those that are
    scaled are rounded once. The models are read weight by weight. Checked against mergekit 0.1.5 (arcee-ai/mergekit)
    on whole checkpoints.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert")
    shares_vocabulary: ClassVar[tuple[str, ...]] = ("models",)

    slices: tuple[tuple[Whole, Whole, Count], ...]
    models: tuple[Ref, ...] = ()
    scale: tuple[Setting, ...] = (1.0,)

    def __post_init__(self) -> None:
        """Refuse slices of models that are not there, and empty ones."""
        super().__post_init__()
        if not self.slices:
            raise PretrainError("passthrough: slices []: accepted: one or more [model, block, end]", place=("slices",))
        for which, start, end in self.slices:
            if which > len(self.models) or start >= end:
                raise PretrainError(
                    f"passthrough: slices {[which, start, end]}: accepted: [model, block, end], a model from 0 (the "
                    f"checkpoint) to {len(self.models)} and an end after the block",
                    place=("slices",),
                )
        check_settings(self.name, "scale", self.scale, len(self.slices))

    def work(self, task: Task) -> Work:
        """A new model of all the blocks that are listed."""
        return task.made(sum(end - start for _, start, end in self.slices) / max(1, task.layers.shape.depth))

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """A new model of the blocks."""
        entry = family(model)
        if entry.name not in self.families:
            raise PretrainError(f"passthrough: family {entry.name!r}: accepted: {', '.join(self.families)}")
        folders = {f"models.{number}": folder for number, folder in enumerate(self.models)}
        with opened(self.name, model, folders, inputs, but=LAYERS) as others:
            configs = [model.config, *(other.config for other in others)]
            origins = self._origins(configs)
            made = fresh(model, _config(configs, origins))
            self._fill(made, model, others, origins, entry.blocks)
        return made

    def _origins(self, configs: Sequence[PreTrainedConfig]) -> list[Origin]:
        """Where each block comes from."""
        origins = []
        for number, (which, start, end) in enumerate(self.slices):
            there = configs[which].num_hidden_layers
            if end > there:
                raise PretrainError(
                    f"passthrough: slices {[which, start, end]}: accepted: up to {there}, the blocks of the model",
                    place=("slices",),
                )
            steps = max(1, end - start - 1)
            depths = (1.0 if end - start == 1 else (block - start) / steps for block in range(start, end))
            origins += [Origin(which, start + step, number, depth) for step, depth in enumerate(depths)]
        return origins

    @torch.no_grad()
    def _fill(
        self, made: PreTrainedModel, model: PreTrainedModel, others: Sequence[Stored], origins: Sequence[Origin],
        blocks: str,
    ) -> None:  # fmt: skip
        """Copy the weights; those outside the blocks come before them or after in the order of the model."""
        inside, ours = re.compile(rf"(^|.*\.){re.escape(blocks)}\.(\d+)\."), weights(model)
        origin = origins[0]._replace(depth=0.0)
        for name, into in weights(made).items():
            match, source, here = inside.match(name), name, origin
            if match:
                here, origin = origins[int(match[2])], origins[-1]._replace(depth=0.0)
                begin, end = match.span(2)
                source = f"{name[:begin]}{here.block}{name[end:]}"
            value = others[here.model - 1].read(source) if here.model else ours.get(source)
            if value is None or value.shape != into.shape:
                label = f"models.{here.model - 1}" if here.model else "the checkpoint"
                raise PretrainError(
                    f"passthrough: {label} has no weight {source} of shape {tuple(into.shape)}; accepted: models that "
                    "are the same in each block; put together first, then operate"
                )
            scale = at_place(for_each(self.scale, here.slice), Place(source, here.depth))
            into.copy_(value if scale == 1 else value.double() * scale)


def _config(configs: Sequence[PreTrainedConfig], origins: Sequence[Origin]) -> PreTrainedConfig:
    """The checkpoint's configuration with these blocks."""
    config = copy.deepcopy(configs[0])
    config.num_hidden_layers = len(origins)
    if getattr(config, "layer_types", None):
        config.layer_types = [configs[origin.model].layer_types[origin.block] for origin in origins]
    return config
