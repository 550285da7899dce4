"""What feed-forward layers put out after their nonlinearity, as a model runs.

Shape letters: B rows, L positions, F width of a feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from pretrain.core.errors import PretrainError
from pretrain.core.models.families import at, blocks, family

_NAMES = ("act_fn", "act", "intermediate_act_fn")  # of the nonlinearity in `transformers`' feed-forwards


def nonlinearities(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The nonlinearity of each block's feed-forward, by where the block is: `0`, `1`, …; of a decoder `decoder.0`, ….

    A gated feed-forward has its nonlinearity on the gate. Raises `PretrainError` where a block has no such module.
    """
    entry = family(model)
    sides: dict[str, str] = {"": "encoder"} | ({"decoder.": "decoder"} if entry.decoder_blocks else {})
    modules: dict[str, nn.Module] = {}
    for before, side in sides.items():
        for depth, block in enumerate(blocks(model, side)):
            place = at(block, "intermediate" if entry.name == "bert" else entry.feed_forward)
            module = next((getattr(place, n) for n in _NAMES if isinstance(getattr(place, n, None), nn.Module)), None)
            if module is None:
                raise PretrainError(
                    f"{name}: block {before}{depth} has no feed-forward with one nonlinearity: accepted: models of "
                    "llama, gpt2, bert, modernbert, t5"
                )
            modules[f"{before}{depth}"] = module
    return modules


@contextmanager
def activations(model: nn.Module, name: str) -> Iterator[dict[str, list[Tensor]]]:
    """While open, each forward pass adds `activation_BLF` of every feed-forward to its list."""
    modules = nonlinearities(model, name)
    seen: dict[str, list[Tensor]] = {place: [] for place in modules}
    if len({id(module) for module in modules.values()}) < len(modules):
        raise PretrainError(f"{name}: blocks share a nonlinearity: accepted: one for each")

    def take(place: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _, __, out: seen[place].append(out)

    handles = [module.register_forward_hook(take(place)) for place, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
