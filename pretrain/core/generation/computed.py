"""What models compute while a text is generated, counted where its positions enter a model: at the first block.

The loop here calls the blocks themselves and `generate` calls the model; both pass through the first block, once a
pass. A hook there costs next to nothing, and changes no token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import cycle

from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core.errors import PretrainError
from pretrain.core.models.families import blocks

Hook = Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]


@dataclass
class Computed:
    """What one model has done: passes, positions of them in all, and positions whose logits were made.

    `prompt` are the passes up to the first logits.
    """

    passes: int = 0
    positions: int = 0
    logits: int = 0
    prompt: int = 0


class _Counting:
    """Hooks on first blocks and heads; `by_name` what was counted, by the names that models were added under."""

    def __init__(self) -> None:
        self.by_name: dict[str, Computed] = {}
        self.known: list[nn.Module] = []
        self.hooks: list[Callable[[], None]] = []

    def add(self, name: str, model: PreTrainedModel) -> None:
        """Count a model from here on; one that is counted under another name is counted there alone."""
        first, times = _first_block(model)
        if first is None:
            return
        computed = self.by_name.setdefault(name, Computed())
        if any(first is other for other in self.known):
            return
        self.known.append(first)
        self._hook(first, _passing(computed, times))
        head = model.get_output_embeddings()
        if isinstance(head, nn.Module):
            self._hook(head, _answering(computed))

    def _hook(self, part: nn.Module, hook: Hook) -> None:
        self.hooks.append(part.register_forward_pre_hook(hook, with_kwargs=True).remove)


_counting: ContextVar[_Counting | None] = ContextVar("counting", default=None)


@contextmanager
def counting(model: PreTrainedModel) -> Iterator[dict[str, Computed]]:
    """While open, counts what the model computes, as "checkpoint", and each that is given to `count_too`.

    A model whose blocks nobody knows, or which has two stacks of them, is not counted.
    """
    inner = _Counting()
    before = _counting.set(inner)
    try:
        inner.add("checkpoint", model)
        yield inner.by_name
    finally:
        _counting.reset(before)
        for remove in inner.hooks:
            remove()


def count_too(name: str, model: PreTrainedModel) -> None:
    """Count a model that decodes beside the one that is counted, under a name of its own."""
    inner = _counting.get()
    if inner is not None:
        inner.add(name, model)


def _first_block(model: PreTrainedModel) -> tuple[nn.Module | None, int]:
    """The first block, and how often a pass goes through it: blocks may be one module at several places."""
    if model.config.is_encoder_decoder:
        return None, 0
    try:
        stack = blocks(model)
    except (PretrainError, AttributeError):
        return None, 0
    return (stack[0], sum(block is stack[0] for block in stack)) if stack else (None, 0)


def _passing(computed: Computed, times: int) -> Hook:
    turns = cycle(range(times))

    def passing(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if next(turns) == 0:
            computed.passes += 1
            computed.positions += _positions(args, kwargs)

    return passing


def _answering(computed: Computed) -> Hook:
    def answering(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        computed.logits += _positions(args, kwargs)
        computed.prompt = computed.prompt or computed.passes

    return answering


def _positions(args: tuple[object, ...], kwargs: dict[str, object]) -> int:
    """Of the states that a layer is given, the first of its tensors."""
    given = (value for value in (*args, kwargs.get("hidden_states"), *kwargs.values()) if isinstance(value, Tensor))
    states = next(given, None)
    return 0 if states is None else states.shape[:-1].numel()
