"""What the merges share that read the other models weight by weight, and whose settings vary over the blocks.

A setting is a number; or a list of numbers, spread evenly over the blocks from the first to the last, with straight
lines between them; or a mapping from parts of weights' names to either, of which the longest part that a weight's name
contains counts and `*` is for all others. What lies outside the blocks takes the first number of a list.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from pretrain.core.bounds import AnyNumber, PositiveShare, Share
from pretrain.core.checkpoint import Facts, checkpoint_of, inspected, load, surgery_of
from pretrain.core.errors import PretrainError
from pretrain.core.foreign.parsing import parsing
from pretrain.core.models.families import blocks, embeddings, family, in_table, repeated_blocks
from pretrain.core.processors import load_processor, tokenizer_in
from pretrain.core.quick.vocabulary import check_alike, check_labels, labels_in, labels_of, numbers_of
from pretrain.dial.effort import Task, Work, through
from pretrain.surgery import Inputs
from pretrain.surgery._merge import check_config, check_surgeries, weights

Setting = AnyNumber | tuple[AnyNumber, ...] | dict[str, AnyNumber | tuple[AnyNumber, ...]]
Between = Share | tuple[Share, ...] | dict[str, Share | tuple[Share, ...]]  # 0 and 1
Density = PositiveShare | tuple[PositiveShare, ...] | dict[str, PositiveShare | tuple[PositiveShare, ...]]
OTHERS = "*"
# What may differ from the checkpoint's, which is kept: how long a text may be, where that is no table's length.
_THEIRS = ("vocab_size", "max_position_embeddings", "max_window_layers")


class Place(NamedTuple):
    """Which weight of a model."""

    name: str
    depth: float  # of its block: 0 of the first (and outside the blocks), 1 of the last (and of an only one)


Combine = Callable[[Place, Tensor, Iterator[Tensor]], Tensor]


def at_place(setting: Setting, place: Place) -> float:
    """What a setting is for a weight."""
    if isinstance(setting, Mapping):
        parts = sorted((part for part in setting if part in place.name), key=len)
        setting = setting[parts[-1] if parts else OTHERS]
    if not isinstance(setting, list | tuple):
        return float(setting)
    position = place.depth * (len(setting) - 1)
    before = int(position)
    after, share = min(before + 1, len(setting) - 1), position - before
    return float((1 - share) * setting[before] + share * setting[after])


def check_settings(method: str, field: str, settings: Sequence[Setting], count: int = 1) -> None:
    """Refuse settings of which there is neither one nor one for each of `count` models, and those that leave gaps."""
    if len(settings) not in (1, count):
        each = f", or {count}, one for each model" if count > 1 else ""
        raise PretrainError(f"{method}: {field} {list(settings)}: accepted: 1 for all{each}", place=(field,))
    for setting in settings:
        parts = [*setting.values()] if isinstance(setting, Mapping) else [setting]
        if not parts or any(isinstance(part, list | tuple) and not part for part in parts):
            raise PretrainError(f"{method}: {field} {setting!r}: accepted: at least 1 number", place=(field,))
        if isinstance(setting, Mapping) and OTHERS not in setting:
            raise PretrainError(
                f"{method}: {field} {setting!r}: accepted: a mapping with {OTHERS!r} for all other weights",
                place=(field,),
            )


def for_each(settings: Sequence[Setting], number: int) -> Setting:
    """The setting of a model: its own, or the only one."""
    return settings[number if len(settings) > 1 else 0]


def numbers_in(settings: Sequence[Setting]) -> list[float]:
    """All the numbers in settings."""
    parts = [part for each in settings for part in (each.values() if isinstance(each, Mapping) else (each,))]
    return [float(n) for part in parts for n in (part if isinstance(part, list | tuple) else (part,))]


def places(model: PreTrainedModel) -> dict[str, Place]:
    """Where each weight of the model lies; an encoder-decoder has two stacks of blocks."""
    names = {id(module): name for name, module in model.named_modules()}
    every = repeated_blocks(model)
    if in_table(model) and family(model).decoder_blocks:
        every = [*every, *blocks(model, "decoder")]
    stacks: dict[str, list[str]] = {}
    for name in (names[id(block)] for block in every):
        stacks.setdefault(name.rpartition(".")[0], []).append(name)
    depths = {
        name: index / (len(stack) - 1) if len(stack) > 1 else 1.0
        for stack in stacks.values() for index, name in enumerate(stack)
    }  # fmt: skip
    located = {}
    for name in weights(model):
        around = accumulate(name.split("."), "{}.{}".format)
        located[name] = Place(name, next((depths[outer] for outer in around if outer in depths), 0.0))
    return located


class Stored:
    """A checkpoint whose weights are read one by one, each when it is asked for."""

    def __init__(
        self, label: str, config: PreTrainedConfig, files: Mapping[str, safe_open], names: Mapping[str, str]
    ) -> None:
        self.label, self.config = label, config
        self._files, self._names = files, names  # open files by the names in them; those by the model's names

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight, without reading it."""
        stored = self._stored(name)
        return tuple(self._files[stored].get_slice(stored).get_shape())

    def _stored(self, name: str) -> str:
        if name not in self._names:
            raise PretrainError(f"{self.label} does not have the weight {name}; accepted: a model of the same weights")
        return self._names[name]

    def read(self, name: str) -> Tensor:
        """A weight, on the CPU."""
        stored = self._stored(name)
        with parsing(f"{self.label}: {stored} cannot be read", "a whole safetensors file"):
            tensor: Tensor = self._files[stored].get_tensor(stored)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise PretrainError(f"{self.label}: {stored} holds NaN or infinity; accepted: finite weights")
        return tensor


@contextmanager
def opened(
    method: str, model: PreTrainedModel, folders: Mapping[str, str], inputs: Inputs | None, *, but: Sequence[str] = ()
) -> Iterator[list[Stored]]:
    """The checkpoints in `folders`, by what they are called in errors: models of the class and tokens of `model`.

    Fields of their configurations that are in `but` may differ from the model's.
    """
    tokenizers = {"the checkpoint": numbers_of(inputs.tokenizer) if inputs else None}
    labels = {"the checkpoint": labels_of(model)}
    with ExitStack() as stack:
        models = []
        for label, folder in folders.items():
            place = checkpoint_of(Path(folder))
            facts = inspected(place)
            if facts.model_class is not type(model):
                raise PretrainError(
                    f"{method}: {label} is a {facts.model_class.__name__}; accepted: a {type(model).__name__}, as the "
                    "checkpoint is"
                )
            check_surgeries(method, surgery_of(model), facts.record.get("surgery", []), label)
            check_config(method, model.config, facts.config, label, but=(*_THEIRS, *but))
            labels[label] = labels_in(facts.config.to_dict(), facts.model_class.__name__)
            tokenizers[label] = numbers_of(tokenizer_in(load_processor(place)))
            models.append(_open(f"{method}: {label}", stack, place, facts))
        check_alike(method, tokenizers)
        check_labels(method, labels)
        yield models


def _open(label: str, stack: ExitStack, place: Path, facts: Facts) -> Stored:
    """A checkpoint's weights by the names that its model has for them.

    Files may name them otherwise (experts one by one, no prefix, a surgery's layers); then the model is loaded once and
    its weights are written anew beside, so that no more than one such model is in memory.
    """
    with torch.device("meta"):
        expected = facts.model_class(facts.config)
    files = _handles(stack, facts.files)
    names = {name: _stored_name(expected, name, files) for name in weights(expected)}
    if None not in names.values() and not facts.record.get("surgery") and _alike(expected, names, files):
        return Stored(
            label, facts.config, files, {name: stored for name, stored in names.items() if stored is not None}
        )
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="merge-")))
    table = weights(load(place)[0])
    save_file({name: tensor.contiguous() for name, tensor in table.items()}, folder / "weights.safetensors")
    return Stored(
        label, facts.config, _handles(stack, [folder / "weights.safetensors"]), {name: name for name in table}
    )


def _alike(expected: PreTrainedModel, names: Mapping[str, str | None], files: Mapping[str, safe_open]) -> bool:
    """Whether what the files hold has the shapes of the model's weights."""
    return all(
        tuple(files[stored].get_slice(stored).get_shape()) == tuple(tensor.shape)
        for (_, stored), tensor in zip(names.items(), weights(expected).values(), strict=True) if stored is not None
    )  # fmt: skip


def _handles(stack: ExitStack, files: Sequence[Path]) -> dict[str, safe_open]:
    """The open file of each name."""
    handles: dict[str, safe_open] = {}
    for path in files:
        with parsing(f"{path} is truncated or damaged", "a whole safetensors file"):
            handle = stack.enter_context(safe_open(path, framework="pt"))
            handles |= dict.fromkeys(handle.keys(), handle)
    return handles


def _stored_name(model: PreTrainedModel, name: str, files: Mapping[str, safe_open]) -> str | None:
    """Under what name a weight lies in the files: the model's, that of what it is tied to, or that without prefix."""
    if name in files:
        return name
    state = model.state_dict(keep_vars=True)
    tied = [other for other, tensor in state.items() if tensor is state.get(name) and other in files]
    bare = name.removeprefix(f"{model.base_model_prefix}.")
    return tied[0] if tied else bare if bare in files else None


def streamed(task: Task, models: int) -> Work:
    """What it takes to read each weight of the model and of so many others in float64, and to round their sum."""
    return through(task.numbers, 8 + 15 * models)


@torch.no_grad()
def merge(
    method: str, model: PreTrainedModel, folders: Mapping[str, str], combine: Combine, inputs: Inputs | None
) -> PreTrainedModel:
    """Give each weight of the model what `combine` makes of it and the others' of its name, read as they are asked for.

    `combine` is given them in float64, and its result is rounded once. Of vocabularies the rows that all have are
    merged, and the model's others stay. Weights that are no floating-point numbers must be equal.
    """
    with opened(method, model, folders, inputs) as others:
        rows = len(embeddings(model).weight)
        where = places(model)
        for name, into in weights(model).items():
            shapes = [other.shape(name) for other in others]
            for label, shape in zip(folders, shapes, strict=True):
                longer = into.ndim and shape[1:] == into.shape[1:] and len(into) == rows
                if shape != tuple(into.shape) and not longer:
                    raise PretrainError(f"{method}: {label} has {name} of shape {shape}; accepted: {tuple(into.shape)}")
            if into.is_floating_point():
                common = min((shape[0] for shape in (into.shape, *shapes) if shape), default=0)
                part = into[:common] if into.ndim else into
                part.copy_(combine(where[name], part.double(), _read(name, others, part)))
            elif any(not torch.equal(other.read(name), into.cpu()) for other in others):
                raise PretrainError(f"{method}: {name} ({into.dtype}) differs, and has no mean; accepted: equal values")
    return model


def _read(name: str, others: Sequence[Stored], like: Tensor) -> Iterator[Tensor]:
    for other in others:
        tensor = other.read(name)
        yield (tensor[: len(like)] if like.ndim else tensor).to(like.device, torch.float64)
