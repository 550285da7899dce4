"""Codebooks: an activation becomes the mean of the few codes of a codebook that point most nearly as it does.

A codebook of a model has a name, its place: `3.attention.1` is that of the second head of the fourth block,
`3.attention` that of all of the block's heads at once, `3.feed_forward` that after the feed-forward. A code is
`PLACE:NUMBER`.

Shape letters: B rows, L positions, N tokens, H codebooks side by side, D width of each, K codes, J codes of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.core.errors import PretrainError, nearest
from pretrain.core.models.families import blocks
from pretrain.core.models.layers import Like

EPS = 1e-5  # of the layer norm


class Codebooks(nn.Module):
    """H codebooks of K codes, each for its D of an activation's numbers, which a layer norm of its own comes before.

    y = 1/J · Σ c over the J codes c of the greatest cosine with n = LayerNorm(x). Going back, n gets y's gradient as if
    it were y, and so do the codes that are in y.
    """

    def __init__(self, part: str, heads: int, codes: int, width: int, k: int, alike: Like) -> None:
        super().__init__()
        self.part, self.k = part, k  # where in its block it is, J
        self.codes = nn.Parameter(torch.zeros(heads, codes, width, **alike))
        self.scale = nn.Parameter(torch.ones(heads, width, **alike))
        self.shift = nn.Parameter(torch.zeros(heads, width, **alike))
        self.forced: dict[int, Tensor] = {}  # by head, the codes that stand in the place of the least near
        self.log: list[list[Tensor]] | None = None  # where open, by head `id_BLJ` of each pass
        self.errors: list[Tensor] | None = None  # where open, `error_BL` of each pass

    def normed(self, x_BLE: Tensor) -> Tensor:
        """What is compared with the codes, `n_NHD`."""
        heads, _, width = self.codes.shape
        x_NHD = x_BLE.reshape(-1, heads, width)
        return F.layer_norm(x_NHD, (width,), eps=EPS) * self.scale + self.shift

    @torch.no_grad()
    def nearest(self, n_NHD: Tensor) -> Tensor:
        """`id_NHJ`: the codes of the greatest cosine, the nearest first; compared in float32 or wider."""
        wide = torch.promote_types(n_NHD.dtype, torch.float32)
        with torch.autocast(n_NHD.device.type, enabled=False):
            unit_HKD = F.normalize(self.codes.to(wide), dim=-1)
            chosen = [
                (n_NHD[:, head].to(wide) @ unit_KD.T).topk(self.k).indices for head, unit_KD in enumerate(unit_HKD)
            ]
        for head, codes_F in self.forced.items():
            chosen[head][:, self.k - len(codes_F) :] = codes_F
        return torch.stack(chosen, 1)

    def mean(self, id_NHJ: Tensor) -> Tensor:
        """`y_NHD`: the mean of these codes."""
        heads, codes, _ = self.codes.shape
        first_H1 = torch.arange(heads, device=id_NHJ.device)[:, None] * codes
        return F.embedding(id_NHJ + first_H1, self.codes.flatten(0, 1)).mean(-2)

    def forward(self, x_BLE: Tensor) -> Tensor:
        """The activation made of codes; its type is the input's."""
        n_NHD = self.normed(x_BLE)
        id_NHJ = self.nearest(n_NHD)
        y_NHD = self.mean(id_NHJ)
        for head, passes in enumerate(self.log or ()):
            passes.append(id_NHJ[:, head].unflatten(0, x_BLE.shape[:-1]))
        # In training always, so that what is computed again in the backward pass is what was computed before.
        if self.errors is not None or (self.training and torch.is_grad_enabled()):
            error_N = (y_NHD - n_NHD.detach()).square().sum((1, 2))
            if self.errors is not None:
                self.errors.append(error_N.view(x_BLE.shape[:-1]))
        y_NHD = y_NHD + (n_NHD - n_NHD.detach())  # adds 0, and hands the gradient on
        return y_NHD.reshape(x_BLE.shape).to(x_BLE.dtype)

    def extra_repr(self) -> str:
        """What `print` says."""
        heads, codes, width = self.codes.shape
        return f"{self.part}, heads={heads}, codes={codes}, width={width}, k={self.k}"


class Place(NamedTuple):
    """One codebook: the module that holds it, and its number there."""

    module: Codebooks
    head: int


def modules_of(model: nn.Module) -> list[Codebooks]:
    """The modules that hold codebooks, in the order of the blocks."""
    return [module for module in model.modules() if isinstance(module, Codebooks)]


def codebooks(model: nn.Module) -> dict[str, Place]:
    """The model's codebooks by name, in the order in which a pass comes to them."""
    places: dict[str, Place] = {}
    for number, block in enumerate(blocks(model)):
        for module in sorted(modules_of(block), key=lambda each: each.part):
            heads = len(module.codes)
            for head in range(heads):
                name = f"{number}.{module.part}" + (f".{head}" if heads > 1 else "")
                places[name] = Place(module, head)
    return places


def coded(name: str, model: nn.Module) -> dict[str, Place]:
    """`codebooks`; a clear error of the method `name` for a model without any."""
    places = codebooks(model)
    if not places:
        raise PretrainError(
            f"{name}: the model has no codebooks: accepted: one that the surgery codebook_features made"
        )
    return places


@contextmanager
def errors_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """While open, each pass adds `error_BL` of each module: ‖y - n‖² of a token, n held fixed."""
    modules, errors = modules_of(model), list[Tensor]()
    for module in modules:
        module.errors = errors
    try:
        yield errors
    finally:
        for module in modules:
            module.errors = None


@contextmanager
def fired(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """While open, each pass adds to each codebook's list which of its codes each token has, `id_BLJ`."""
    places = codebooks(model)
    seen: dict[str, list[Tensor]] = {name: [] for name in places}
    modules = modules_of(model)
    for module in modules:
        module.log = [seen[name] for name, place in places.items() if place.module is module]
    try:
        yield seen
    finally:
        for module in modules:
            module.log = None


def parsed(name: str, model: nn.Module, codes: Sequence[str]) -> dict[str, list[int]]:
    """The numbers of `PLACE:NUMBER`s by place.

    Raises `PretrainError` for a place or a code that the model does not have, and for more codes of a place than a
    token has.
    """
    places = coded(name, model)
    numbers: dict[str, list[int]] = {}
    for code in codes:
        place, _, number = code.partition(":")
        if place not in places:
            known = list(places)
            raise PretrainError(
                f"{name}: codes {code!r}: no codebook {place!r}{nearest(place, known)}; accepted: PLACE:NUMBER, the "
                f"places {known[0]} to {known[-1]}"
            )
        count = places[place].module.codes.shape[1]
        if not number.isdecimal() or int(number) >= count:
            raise PretrainError(f"{name}: codes {code!r}: accepted: {place}:0 to {place}:{count - 1}")
        numbers.setdefault(place, []).append(int(number))
    for place, these in numbers.items():
        most = places[place].module.k
        if len(these) > most:
            raise PretrainError(
                f"{name}: {len(these)} codes of {place}: accepted: at most {most}, as many as a token has"
            )
    return numbers


@contextmanager
def forced(name: str, model: nn.Module, codes: Sequence[str]) -> Iterator[None]:
    """While open, every token has these codes, in the place of those of its own that are least near."""
    places = codebooks(model)
    for place, numbers in parsed(name, model, codes).items():
        module, head = places[place]
        module.forced[head] = torch.tensor(numbers, device=module.codes.device)
    try:
        yield
    finally:
        for module, _ in places.values():
            module.forced.clear()
