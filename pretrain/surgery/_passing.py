"""What blocks know of the pass that they are in beside their input: the tokens, and what an earlier block left.

The embedding notes the tokens of each pass; every block is given that note as an argument, which recomputing a block in
the backward pass repeats, so that it never sees the tokens of another pass.

Shape letters: B rows, L positions, E width, C width of the values, N tokens, H inputs of a mixture of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pretrain.core.errors import PretrainError
from pretrain.core.models.families import at, blocks, embeddings, family
from pretrain.core.models.layers import Linear, like, sides

FAMILIES = ("llama", "gpt2")
ENTRANCE = "entrance"


@dataclass
class Pass:
    """One forward pass."""

    tokens_BL: Tensor
    embedded_BLE: Tensor | None = None
    values_BLC: Tensor | None = None  # of the first block
    mixture_inputs: dict[int, Tensor] = field(default_factory=dict)  # `x_NH` by the mixture's number
    expert_BL: Tensor | None = None  # which of each block's experts a token takes


class Notes:
    """The newest pass; the embedding and all blocks of a model share one."""

    def __init__(self) -> None:
        self.now: Pass | None = None

    def begin(self, _: nn.Module, inputs: tuple[Tensor, ...], embedded_BLE: Tensor) -> None:
        """After the embedding has looked the tokens up."""
        self.now = Pass(inputs[0], embedded_BLE)


class Informed(nn.Module):
    """A block that knows the pass that it is in: mixed into the block's own class."""

    notes: Notes
    last: bool

    def __call__(self, *args: object, this_pass: Pass | None = None, **more: object) -> object:
        """The block's output; the note goes in from outside, so that what is recomputed is given the same."""
        this_pass = this_pass or self.notes.now
        if this_pass is None:
            raise PretrainError(
                "a model whose blocks read the tokens: this pass has none; accepted: input_ids, not inputs_embeds"
            )
        if self.last:
            self.notes.now = None
        return super().__call__(*args, this_pass=this_pass, **more)

    def forward(self, x_BLE: Tensor, *args: object, this_pass: Pass, **more: object) -> object:
        """The pass is handed to those of the block's modules that read it; they keep nothing of it."""
        if this_pass.tokens_BL.shape != x_BLE.shape[:-1]:
            raise PretrainError(
                f"a model whose blocks read the tokens: a block is given {tuple(x_BLE.shape[:-1])} of "
                f"{tuple(this_pass.tokens_BL.shape)} positions; accepted: all of them"
            )
        readers = [module for module in self.modules() if isinstance(module, Reader)]
        for reader in readers:
            reader.this_pass = this_pass
        try:
            entrance = self._modules.get(ENTRANCE)
            return super().forward(x_BLE if entrance is None else entrance(x_BLE), *args, **more)
        finally:
            for reader in readers:
                reader.this_pass = None


class Reader(nn.Module):
    """A module inside a block that reads the pass; that named `ENTRANCE` changes what the block is given."""

    this_pass: Pass | None = None

    def reads(self) -> Pass:
        """The pass that the block is in."""
        assert self.this_pass is not None, "called outside its block"
        return self.this_pass


_KINDS: dict[str, type[nn.Module]] = {}


def _informed(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a block of `kind` that is `Informed`: of the same name, and one for all models."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name not in _KINDS:
        _KINDS[name] = type(kind.__name__, (Informed, kind), {"__module__": kind.__module__})
    return _KINDS[name]


def inform(model: PreTrainedModel, name: str, families: Sequence[str] = FAMILIES) -> list[nn.Module]:
    """Tell the model's blocks of each pass; returns the blocks. Raises `PretrainError` for another family."""
    entry = family(model)
    if entry.name not in families:
        raise PretrainError(f"{name}: family {entry.name!r}: accepted: {', '.join(families)}")
    every = blocks(model)
    if isinstance(every[0], Informed):
        return every
    notes = Notes()
    embeddings(model).register_forward_hook(notes.begin)
    for number, block in enumerate(every):
        block.__class__ = _informed(type(block))
        vars(block).update(notes=notes, last=number + 1 == len(every))
    return every


class Values(Reader):
    """A projection whose last `width` outputs, the values, are mixed with others: `mixed` says how."""

    def __init__(self, linear: Linear, width: int, first: float, second: float) -> None:
        super().__init__()
        self.linear, self.width = linear, width
        self.share = nn.Parameter(torch.tensor([first, second], **like(linear.weight)))

    def mixed(self, values_BLC: Tensor) -> Tensor:
        """The values that attention takes."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """All outputs of the projection."""
        out: Tensor = self.linear(x)
        values_BLC = self.mixed(out[..., -self.width :]).to(out.dtype)
        rest = out[..., : -self.width]
        return values_BLC if not rest.shape[-1] else torch.cat([rest, values_BLC], -1)


def value_projections(model: PreTrainedModel, name: str) -> list[tuple[nn.Module, str, Linear, int]]:
    """Of each block its attention, the path there of what makes its values, that layer, and how wide values are."""
    entry, rows = family(model), []
    path = entry.queries[-1]
    for block in blocks(model):
        attention = at(block, entry.attention)
        layer = at(attention, path)
        if not isinstance(layer, nn.Linear | Conv1D):
            raise PretrainError(f"{name}: {path} is a {type(layer).__name__}: accepted: a linear layer")
        outputs, _ = sides(layer)
        rows.append((attention, path, layer, outputs // 3 if len(entry.queries) == 1 else outputs))
    return rows
