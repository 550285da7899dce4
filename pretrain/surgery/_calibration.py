"""Calibration: a model's blocks one after another on rows of text, each fed by the changed blocks before it.

Shape letters: B rows, L positions, E width, N tokens, I inputs of a linear layer, O its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pretrain.core.batch import Batch
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import at, base, blocks, family, linears, model_inputs, separated
from pretrain.core.models.layers import Linear
from pretrain.surgery import Inputs

Arguments = tuple[tuple[Tensor, ...], dict[str, Tensor]]  # of a block, beside the states


def batches_of(inputs: Inputs | None, name: str) -> Sequence[Batch]:
    """The calibration batches; a clear error where there are none."""
    if inputs is None or not inputs.batches:
        raise PretrainError(
            f"{name}: it needs text to calibrate on: accepted: a surgery stage with `corpus`, or Inputs(batches=...)"
        )
    return inputs.batches


def kept_tokens(batch: Batch) -> Tensor:
    """`kept_N`: which tokens of a batch are no padding."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten() > 0


def plain_linears(model: nn.Module, name: str, families: Sequence[str], *, inside: bool = False) -> dict[str, Linear]:
    """The linear layers of the blocks by qualified name; an error where the family or a layer is another.

    `inside`: a factorised layer gives its factors.
    """
    entry = family(model)
    if not entry.among(families):
        raise PretrainError(f"{name}: family {entry.name!r}: accepted: {', '.join(families)}")
    modules = linears(model)
    if inside:
        modules = {n: at(model, n) for path, layer in modules.items() for n in factors_of(path, layer)}
    layers: dict[str, Linear] = {}
    for path, layer in modules.items():
        if not isinstance(layer, Linear):
            raise PretrainError(f"{name}: {path} is a {type(layer).__name__}: accepted: plain linear layers")
        layers[path] = layer
    return layers


def factors_of(path: str, layer: nn.Module) -> list[str]:
    """The paths of a layer's factors, in the order of its forward pass; its own where it has none."""
    return [f"{path}.{name}" for name in getattr(layer, "factors", ())] or [path]


def parts(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The linear layers of a block in the order of its forward pass; those of a part share their input."""
    entry = family(model)

    def under(place: str, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"{place}.{name}".lstrip(".") for name in names)

    return {
        "queries": under(entry.attention, entry.queries), "output": under(entry.attention, (entry.output,)),
        "up": under(entry.feed_forward, entry.up), "down": under(entry.feed_forward, (entry.down,)),
    }  # fmt: skip


def wide_type(tensor: Tensor) -> torch.dtype:
    """Its own, and float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def output_of(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Tensor:
    """What a module gives for a batch, the first where it is several things."""
    out = module(*args, **kwargs)
    return out[0] if isinstance(out, tuple | list) else out


def weight_of(layer: Linear) -> Tensor:
    """`weight_OI`, in float32 at least; a copy."""
    weight = layer.weight.detach()
    weight = weight.T if isinstance(layer, Conv1D) else weight
    return weight.to(wide_type(weight), copy=True).contiguous()


def set_weight(layer: Linear, weight_OI: Tensor) -> None:
    """Put `weight_OI` into the layer."""
    layer.weight.data.copy_(weight_OI.T if isinstance(layer, Conv1D) else weight_OI)


def plain_layer(weight_OI: Tensor, bias_O: nn.Parameter | None, *, conv1d: bool) -> Linear:
    """A layer of that weight and bias."""
    outputs, inputs = weight_OI.shape
    with torch.device("meta"):
        made = Conv1D(outputs, inputs) if conv1d else nn.Linear(inputs, outputs, bias=bias_O is not None)
    made.weight = nn.Parameter(weight_OI.T.contiguous() if conv1d else weight_OI)
    made.register_parameter("bias", bias_O)
    return made


def inverse_factor(hessian_II: Tensor, damping: float, name: str) -> Tensor:
    """The upper Cholesky factor of (H + λI)⁻¹, λ = `damping` times the mean of H's diagonal."""
    H = hessian_II.double()
    mean = H.diagonal().mean()
    H = H + torch.eye(len(H), dtype=H.dtype, device=H.device) * (damping * mean if mean > 0 else 1.0)
    lower, failed = torch.linalg.cholesky_ex(H)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or not bool(torch.isfinite(upper).all()):
        raise PretrainError(f"{name}: damping {damping}: accepted: a greater one; the Hessian is singular without it")
    return upper


class Blocks:
    """The blocks with what enters them, batch by batch.

    One pass of the whole model notes each block's arguments: masks and positions do not depend on weights. From then
    on only the states go from block to block. Padding is left out of all that is handed on.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self.blocks = blocks(model)
        self.states: list[Tensor] = []  # what enters the next block
        self.arguments: list[list[Arguments]] = []  # by batch, by block
        self.kept: list[Tensor] = []  # which tokens are no padding
        for batch in (separated(model, batch) for batch in batches):
            self.kept.append(kept_tokens(batch))
            self._note(model, batch)

    def _note(self, model: PreTrainedModel, batch: Batch) -> None:
        noted: list[Arguments] = []

        def note(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            if not noted:
                self.states.append(args[0] if args else kwargs["hidden_states"])
            noted.append((args[1:], rest))

        handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self.blocks]
        try:
            base(model)(**model_inputs(model, batch))
        finally:
            for handle in handles:
                handle.remove()
        self.arguments.append(noted)

    def __len__(self) -> int:
        return len(self.blocks)

    def layers(self, number: int, names: Sequence[str]) -> dict[str, Linear]:
        """The modules of one block by their names in it."""
        return {name: at(self.blocks[number], name) for name in names}

    def _run(self, number: int, batch: int) -> Tensor:
        args, kwargs = self.arguments[batch][number]
        return output_of(self.blocks[number], (self.states[batch], *args), kwargs)

    @torch.no_grad()
    def advance(self, number: int) -> None:
        """Send the states through a block, as it is now."""
        self.states = [self._run(number, batch) for batch in range(len(self.states))]

    @torch.no_grad()
    def seen(self, number: int, layers: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Batch by batch, what enters and leaves the layers: `x_NI` and `y_NO`."""
        for batch in range(len(self.states)):
            noted: dict[str, tuple[Tensor, Tensor]] = {}
            with watched(layers, noted):
                self._run(number, batch)
            kept = self.kept[batch].to(self.states[batch].device)
            rows: dict[int, Tensor] = {}  # layers of one part share their input: it is copied once
            for x, _ in noted.values():
                rows.setdefault(id(x), token_rows(x, kept))
            yield {n: (rows[id(x)], token_rows(y, kept)) for n, (x, y) in noted.items()}

    def tokens(self) -> int:
        """How many tokens the batches have, padding left out."""
        return sum(int(kept.sum()) for kept in self.kept)

    def kept_rows(self) -> list[Tensor]:
        """`kept_BL` of each batch: which tokens are no padding."""
        return [k.view(x.shape[:2]).to(x.device) for k, x in zip(self.kept, self.states, strict=True)]

    @torch.no_grad()
    def calls(self, number: int, module: nn.Module) -> list[Arguments]:
        """What a module of a block is called with, batch by batch."""
        noted: list[Arguments] = []
        handle = module.register_forward_pre_hook(
            lambda _, args, kwargs: noted.append((args, kwargs)), with_kwargs=True
        )
        try:
            for batch in range(len(self.states)):
                self._run(number, batch)
        finally:
            handle.remove()
        return noted

    @torch.no_grad()
    def order(self, number: int, layers: Mapping[str, nn.Module]) -> list[list[str]]:
        """The layers of a block as its forward pass calls them; those that follow one another on one input together."""
        calls: list[tuple[str, Tensor]] = []
        handles = [
            layer.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, args[0])))
            for name, layer in layers.items()
        ]
        try:
            self._run(number, 0)
        finally:
            for handle in handles:
                handle.remove()
        groups: list[list[str]] = []
        last: Tensor | None = None
        for name, x in calls:
            if x is not last:
                groups.append([])
            groups[-1].append(name)
            last = x
        return groups

    def hessians(self, number: int, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """`2 / N · Σ x xᵀ` of each layer's inputs, in float32 at least."""
        sums: dict[str, Tensor] = {}
        tokens = 0
        for seen in self.seen(number, layers):
            products: dict[int, Tensor] = {}
            for name, (x_NI, _) in seen.items():
                if id(x_NI) not in products:
                    wide_NI = x_NI.to(wide_type(x_NI))
                    products[id(x_NI)] = 2 * wide_NI.T @ wide_NI
                sums[name] = sums[name] + products[id(x_NI)] if name in sums else products[id(x_NI)]
            tokens += len(next(iter(seen.values()))[0])
        return {name: total / max(1, tokens) for name, total in sums.items()}


def token_rows(x: Tensor, kept_N: Tensor) -> Tensor:
    """`x_NI` of the tokens that are no padding; all, of a layer that sees other places than the tokens'."""
    x_NI = x.reshape(-1, x.shape[-1])
    return x_NI[kept_N] if len(x_NI) == len(kept_N) else x_NI


@contextmanager
def watched(layers: Mapping[str, nn.Module], noted: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """While open, each layer's input and output come into `noted`."""

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            noted[name] = (args[0], out)

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
