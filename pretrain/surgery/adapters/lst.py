"""A narrow transformer beside a frozen one, fed by its blocks' outputs: no gradient ever enters the backbone.

Shape letters: B rows, L positions, E width, S width of the side network, D width of a head of it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from pretrain.core.bounds import AnyNumber, Count, Ge, Positive
from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import at, base, blocks, embeddings, family, set_module
from pretrain.core.models.layers import like
from pretrain.dial.tuned import Layers, Tuning
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._calibration import batches_of, parts, plain_linears, weight_of
from pretrain.surgery._random import generator
from pretrain.surgery.adapters._adapters import freeze
from pretrain.surgery.adapters._ladder import Importance, cut, cut_norm, fisher, heads_of, kept_width

MARK = "pretrain_side_BLS"  # the side network's state travels on the tensor that a block of the backbone hands on


class _Ladder(nn.Module):
    """What a block of the backbone becomes; its own modules keep their names."""

    side: nn.Module | None  # the narrow block, unless it is dropped
    side_down: nn.Linear
    side_alpha: nn.Parameter
    side_temperature: float
    side_rotary_D: Tensor  # where positions rotate
    side_first: nn.Linear  # this one and the next two in the first block only
    side_depths: tuple[int, ...]  # of the blocks that have a narrow one
    side_backbone: int  # how many blocks there are
    side_up: nn.Linear  # this one and the next in the last block only
    side_norm: nn.Module

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The backbone's output with the side state on it; of the last block the side network's output."""
        if hasattr(self, "side_first"):
            state_BLS = self.side_first(hidden_states.detach())
            _make_room(kwargs.get("past_key_values", next((a for a in args if isinstance(a, Cache)), None)), self)
        elif hasattr(hidden_states, MARK):
            state_BLS = getattr(hidden_states, MARK)
        else:
            raise PretrainError("lst: a block was given another tensor than the block before it handed on")
        with torch.no_grad():
            x_BLE = super().forward(hidden_states, *args, **kwargs)
        if self.side is not None:
            gate = torch.sigmoid(self.side_alpha / self.side_temperature)
            state_BLS = gate * state_BLS + (1 - gate) * self.side_down(x_BLE)
            tables = kwargs.get("position_embeddings")
            if isinstance(tables, tuple):
                kwargs["position_embeddings"] = tuple(table[..., self.side_rotary_D] for table in tables)
            state_BLS = self.side(state_BLS, *args, **kwargs)
        if hasattr(self, "side_up"):
            return self.side_up(self.side_norm(state_BLS))
        setattr(x_BLE, MARK, state_BLS)
        return x_BLE


def _make_room(cache: object, block: _Ladder) -> None:
    """Layers for the side network's keys and values, after the backbone's: what moves those moves these too."""
    if not isinstance(cache, Cache) or getattr(cache, "layer_class_to_replicate", None) is not None:
        return  # one that grows by itself
    if len(cache.layers) == block.side_backbone:
        if cache.get_seq_length():
            raise PretrainError("lst: the cache was filled without the side network: accepted: an empty one")
        cache.layers.extend(copy.deepcopy(cache.layers[depth]) for depth in block.side_depths)


@functools.cache
def _laddered(kind: type) -> type[_Ladder]:
    """A block's class with another `forward`: what looks for blocks of the old class finds these."""
    return cast("type[_Ladder]", type(f"Ladder{kind.__name__}", (_Ladder, kind), {}))


@functools.cache
def _apart(kind: type) -> type[nn.Module]:
    """A class of the same name and methods that is not a `kind`: what collects the backbone's states passes it by."""
    body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    made = type(kind.__name__, (nn.Module,), body | {"forward": inspect.unwrap(cast("type[nn.Module]", kind).forward)})
    return cast("type[nn.Module]", made)


def ladder(model: nn.Module) -> list[_Ladder]:
    """The backbone's blocks, if they feed a side network."""
    return [block for block in blocks(model) if isinstance(block, _Ladder)]


@dataclass(frozen=True)
class LST(Surgery):
    """LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning (arXiv:2206.06522).

    The backbone is frozen and runs without gradients. Beside it a network of the same blocks at 1 / `reduction` of
    every width, but as many heads, starts from the projected embeddings, and before its block i

        s <- g s + (1 - g) W_i x_i,    g = sigmoid(alpha_i / temperature),    alpha_i = `alpha` at first,

    with x_i the output of the backbone's block i. Its normed and projected state is what the model's head gets in place
    of the backbone's, so the model's outputs are others at first. The side blocks are cut out of the backbone's:
    of the width the places that matter most in the embeddings, of each head and of the feed-forward those of their
    matrices. `importance`: the Fisher information of a causal model on the surgery's text, or the weights' magnitude;
    `auto` is the first where there is text. The projections are drawn. Block 0 and every `drop_every`th after it have
    no side block (0: all have one). Generation's cache holds the side network's keys and values after the backbone's.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert")
    backward: ClassVar[bool] = True
    calibration: ClassVar[float] = 4.0  # each block twice forward, and back

    reduction: Count = 8
    temperature: Positive = 0.1
    alpha: AnyNumber = 0.0
    drop_every: Literal[0] | Annotated[int, Ge(2)] = 4
    importance: Literal["auto", "fisher", "magnitude"] = "auto"

    def tuning(self, layers: Layers, before: Tuning | None) -> Tuning | None:
        """The side network, which alone has a way back, but for the head's."""
        shape = layers.shape
        kept = sum(1 for depth in range(shape.depth) if not self.drop_every or depth % self.drop_every)
        narrow = replace(
            shape, width=shape.width // self.reduction, intermediate=shape.intermediate // self.reduction, depth=kept,
            queries=(shape.queries or shape.width) // self.reduction,
            keys=(shape.keys or shape.queries or shape.width) // self.reduction, transform=False, beside=-1,
        )  # fmt: skip
        down, ends = kept * shape.width * narrow.width, shape.width * narrow.width
        biases = kept * (narrow.width + 1 + Layers(narrow, layers.kind).biases) + narrow.width + shape.width
        last = {"gpt2": 2, "bert": 0}.get(layers.kind, 1)  # numbers of the last norm for each of its places
        trained = narrow.body + (2 * kept + last) * narrow.width + down + 2 * ends + biases
        blocks = float(shape.depth + 2 * shape.decoder)
        flops = 6.0 * narrow.body + 4.0 * (down + ends) + 6.0 * ends
        return Tuning(
            trained, flops, attending=narrow.attending, unreached=float(shape.body / shape.density), blind=blocks
        )

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with its side network, which alone is trained from now on with a classifier's last layer."""
        self._check(model)
        importance = Importance(self._fisher(model, inputs))
        norm = self._norm(model)
        self._wrap(model)
        source, stack = generator(self.name, inputs), ladder(model)
        width_E = kept_width(model, importance, embeddings(model).weight.shape[1] // self.reduction)
        with torch.no_grad():
            for block in stack:
                if block.side is not None:
                    places_D = cut(model, block, block.side, width_E, importance)
                    if hasattr(block, "side_rotary_D"):
                        block.side_rotary_D.copy_(places_D)
                for name in ("side_first", "side_down", "side_up"):
                    if hasattr(block, name):
                        layer = getattr(block, name)
                        bound = layer.in_features**-0.5
                        for weight in layer.parameters():
                            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=source))
            if norm is not None:
                cut_norm(norm, stack[-1].side_norm, width_E)
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same structure, with numbers yet to be loaded."""
        self._check(model)
        self._wrap(model)
        return model

    def _check(self, model: PreTrainedModel) -> None:
        plain_linears(model, self.name, self.families)
        if ladder(model):
            raise PretrainError("lst: the model has a side network already; accepted: a model without")
        heads = heads_of(model)
        pairs = heads.width // (2 if heads.rotary else 1)  # rotary positions turn places in pairs
        sizes = (pairs, embeddings(model).weight.shape[1], _inner(model))
        fits = [r for r in range(1, pairs + 1) if not any(size % r for size in sizes)]
        if self.reduction not in fits:
            raise PretrainError(
                f"lst: reduction {self.reduction}: accepted: {', '.join(map(str, fits))}, "
                "which divide the model's widths"
            )

    @property
    def needs_text(self) -> bool:
        """Fisher information is of text."""
        return self.importance == "fisher"

    def _fisher(self, model: PreTrainedModel, inputs: Inputs | None) -> dict[int, Tensor] | None:
        headed = family(model).causal and model.get_output_embeddings() is not None
        if self.importance == "fisher" and not headed:
            raise PretrainError("lst: importance 'fisher': accepted: a causal language model; magnitude for others")
        if self.importance == "fisher" or (self.importance == "auto" and headed and inputs and inputs.batches):
            return fisher(model, batches_of(inputs, self.name))
        return None

    def _norm(self, model: PreTrainedModel) -> nn.Module | None:
        path = family(model).final_norm
        return None if path is None else at(base(model), path)

    def _wrap(self, model: PreTrainedModel) -> None:
        stack, table_VE, norm = blocks(model), embeddings(model).weight, self._norm(model)
        wide, narrow = table_VE.shape[1], table_VE.shape[1] // self.reduction
        alike, config = like(table_VE), self._narrow_config(model)
        kept = [depth for depth in range(len(stack)) if not self.drop_every or depth % self.drop_every]
        if not kept:
            raise PretrainError(f"lst: drop_every {self.drop_every}: accepted: 0, for {len(stack)} block")
        freeze(model)
        for depth, block in enumerate(stack):
            kind: type = type(block)
            block.__class__ = _laddered(kind)
            assert isinstance(block, _Ladder)
            block.side = None
            if depth in kept:
                side = _side_block(kind, config, depth, len(stack) + kept.index(depth), model.config)
                block.side = side.to(**alike)
                block.side_down = nn.Linear(wide, narrow, **alike)
                block.side_alpha = nn.Parameter(torch.full((1,), self.alpha, **alike))
                block.side_temperature = self.temperature
                if heads_of(model).rotary:
                    places_D = torch.zeros(config.head_dim, dtype=torch.long, device=table_VE.device)
                    block.register_buffer("side_rotary_D", places_D)
        first, last = ladder(model)[0], ladder(model)[-1]
        first.side_first, last.side_up = nn.Linear(wide, narrow, **alike), nn.Linear(narrow, wide, **alike)
        first.side_depths, first.side_backbone = tuple(kept), len(stack)
        last.side_norm = nn.Identity() if norm is None else _narrow_norm(norm, narrow)
        if norm is not None:
            set_module(base(model), family(model).final_norm or "", nn.Identity())
        for block in stack:
            block.train(model.training)

    def _narrow_config(self, model: PreTrainedModel) -> PreTrainedConfig:
        config = copy.deepcopy(model.config)
        wide = heads_of(model).width
        config.hidden_size = config.hidden_size // self.reduction
        if family(model).name == "llama":
            config.head_dim = wide // self.reduction
        inner = "n_inner" if family(model).name == "gpt2" else "intermediate_size"
        setattr(config, inner, _inner(model) // self.reduction)
        return config


def _inner(model: PreTrainedModel) -> int:
    """The feed-forward's width."""
    return weight_of(at(blocks(model)[0], parts(model)["up"][0])).shape[0]


def _side_block(
    kind: Callable[..., nn.Module], narrow: PreTrainedConfig, depth: int, place: int, config: PreTrainedConfig
) -> nn.Module:
    """A block of a narrow configuration whose keys and values are at `place` in a cache."""
    with torch.random.fork_rng(devices=[]):
        side = kind(narrow, depth)
    for module in list(side.modules()):
        if hasattr(module, "layer_idx"):
            # By the same configuration the model and its side network attend in the same way.
            vars(module).update(layer_idx=place, config=config)
        if module is side or type(module).__name__.endswith("Attention"):
            kind_of: type = type(module)
            module.__class__ = _apart(kind_of)
    return side


def _narrow_norm(norm: nn.Module, width: int) -> nn.Module:
    made = copy.deepcopy(norm).requires_grad_(True)
    for name, parameter in norm.named_parameters():
        setattr(made, name, nn.Parameter(parameter.detach()[:width].clone()))
    if isinstance(made, nn.LayerNorm | nn.RMSNorm):
        made.normalized_shape = (width,)
    return made
