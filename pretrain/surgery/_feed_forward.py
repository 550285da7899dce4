"""Another activation in each feed-forward; a gated one becomes a plain one of as many weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core.errors import PretrainError
from pretrain.core.models.families import at, blocks, family, set_module

# Where in a block's feed-forward the activation is, and the dropout after it.
ACTIVATION = {
    "llama": "act_fn", "gpt2": "act", "bert": "intermediate.intermediate_act_fn", "modernbert": "act", "t5": "act",
}  # fmt: skip
DROPOUT = {"modernbert": "drop", "t5": "dropout"}


class FeedForward(nn.Module):
    """down(activation(up(x))), in place of a gated feed-forward; the two matrices keep the names of the family."""

    def __init__(
        self, up: tuple[str, nn.Linear], down: tuple[str, nn.Linear], activation: nn.Module, drop: nn.Module
    ) -> None:
        super().__init__()
        self.names = (up[0], down[0])
        self.add_module(*up)
        self.act_fn = activation
        self.drop = drop
        self.add_module(*down)

    def forward(self, x: Tensor) -> Tensor:
        """One row a token."""
        up, down = (getattr(self, name) for name in self.names)
        return down(self.drop(self.act_fn(up(x))))


def replace_activations(
    model: PreTrainedModel, name: str, families: Sequence[str], make: Callable[[Tensor], nn.Module],
    source: torch.Generator | None, *, gate: bool = False,
) -> None:  # fmt: skip
    """Put `make(weight)`, for a matrix that it is to go with, in the place of each feed-forward's activation.

    A gated feed-forward of width f becomes a plain one of width 3f/2, which has as many weights, unless its `gate`
    stays. Its matrices are normal with the standard deviation of those they replace, or (without a `source`) not drawn.
    """
    entry = family(model)
    if entry.name not in families:
        raise PretrainError(f"{name}: family {entry.name!r}: accepted: {', '.join(families)}")
    for block in blocks(model) + (blocks(model, "decoder") if entry.decoder_blocks else []):
        old = at(block, entry.feed_forward)
        present = [n for n in entry.up if n and _has(old, n)]
        down = at(old, entry.down)
        activation = make(down.weight).train(model.training)
        if gate or (len(present) == 1 and entry.name != "modernbert"):  # whose gate is in the same matrix
            set_module(old, ACTIVATION[entry.name], activation)
            continue
        last = present[-1]  # Llama's `up_proj`
        up_name = "wi" if entry.name == "t5" else last
        width = down.weight.shape[1] * 3 // 2
        new_up = _drawn(at(old, last), (width, down.weight.shape[0]), source)
        new_down = _drawn(down, (down.weight.shape[0], width), source)
        drop = at(old, DROPOUT[entry.name]) if entry.name in DROPOUT else nn.Identity()
        made = FeedForward((up_name, new_up), (entry.down, new_down), activation, drop)
        set_module(block, _path(block, old), made.train(model.training))


def _has(module: nn.Module, path: str) -> bool:
    try:
        at(module, path)
    except AttributeError:
        return False
    return True


def _path(block: nn.Module, module: nn.Module) -> str:
    return next(name for name, inner in block.named_modules() if inner is module)


@torch.no_grad()
def _drawn(old: nn.Linear, shape: tuple[int, int], source: torch.Generator | None) -> nn.Linear:
    """A linear layer of another shape, normal with the old one's standard deviation; its bias is zero."""
    made = nn.Linear(shape[1], shape[0], old.bias is not None, old.weight.device, old.weight.dtype)
    if source is not None:
        made.weight.copy_(torch.empty(shape).normal_(0, old.weight.float().std().item(), generator=source))
        if made.bias is not None:
            made.bias.zero_()
    return made
