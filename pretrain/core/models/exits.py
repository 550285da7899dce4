"""Exits of a causal model: a prediction from the states after some of its blocks.

Shape letters: B rows, L positions, N tokens of text, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core.batch import Batch
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import base, blocks, model_inputs

Maps: TypeAlias = "nn.ModuleDict | Mapping[str, Callable[[Tensor], Tensor]]"
HEADS = "exit_heads"  # a model's own exit classifiers: linear maps by the number of blocks before them


def thirds(layers: int) -> tuple[int, ...]:
    """Exits after a third and after two thirds of the blocks; none in the only block of a model."""
    return tuple(depth for depth in dict.fromkeys((layers // 3, 2 * layers // 3)) if depth > 0)


def check_exits(name: str, exits: tuple[int, ...], layers: int) -> None:
    """An error for exits that are not rising numbers of blocks below all of them."""
    if not exits or list(exits) != sorted(set(exits)) or not 1 <= exits[0] <= exits[-1] < layers:
        raise PretrainError(f"{name}: exits {exits}: accepted: rising numbers of blocks from 1 to {layers - 1}")


def exit_logits(norm: nn.Module, head: nn.Module, maps: Maps | None, states: Tensor, depth: int) -> Tensor:
    """The logits of an exit: the final norm and head on the states after `depth` blocks, or on their map."""
    return head(norm(states if maps is None else maps[str(depth)](states)))


def states_of_text(
    model: PreTrainedModel, batches: Iterable[Batch], depths: tuple[int, ...]
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Batch by batch `states_NE` after each of the depths, and the tokens that follow, where text has a next one.

    The blocks read the text whole: nothing is skipped before an exit's token.
    """
    parts, states = blocks(model), dict[int, Tensor]()

    def keep(depth: int, _: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        states[depth] = output[0] if isinstance(output, tuple) else output

    for batch in batches:
        ids_BL = batch["input_ids"].to(model.device)
        document_BL = batch.get("attention_mask", torch.ones_like(ids_BL)).to(model.device)
        hooks = [parts[depth - 1].register_forward_hook(partial(keep, depth)) for depth in depths]
        try:
            with torch.no_grad():
                base(model)(**model_inputs(model, batch))
        finally:
            for hook in hooks:
                hook.remove()
        asked_BL = (document_BL[:, 1:] == document_BL[:, :-1]) & (document_BL[:, 1:] > 0)
        yield [states[depth][:, :-1][asked_BL] for depth in depths], ids_BL[:, 1:][asked_BL]
