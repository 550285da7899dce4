"""Experts that lie elsewhere than the model computes, in memory or in files, and are fetched when they are chosen.

The device has places for a few experts of all mixtures together. What a mixture's tokens choose and is not there is
fetched into the places that were used least recently; of a router that can be asked early (`Ahead`) the next mixture's
experts are fetched by another thread while the mixture before it computes. The model computes as it does without: its
own function on the same weights, which lie in other rows of a tensor.

Shape letters: S places, X experts, K experts of a token, N tokens, I hidden units of an expert, H width.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pretrain.core.errors import PretrainError
from pretrain.core.experts.places import Ahead, mixtures
from pretrain.core.models.families import at

Key = tuple[int, int]  # a mixture's number and an expert's
Rows = tuple[Tensor, Tensor]  # up_2IH, down_HI of an expert; of several with an axis before
WEIGHTS = ("gate_up_proj", "down_proj")


class Source(Protocol):
    """Where the experts lie."""

    def read(self, mixture: int, expert: int, into: Rows) -> None:
        """Write an expert's weights over `into`."""

    def like(self) -> Rows:
        """Tensors of the shapes and the type of an expert, wherever they are."""


class Memory:
    """Tensors of all experts of each mixture, `up_X2IH` and `down_XHI`."""

    def __init__(self, weights: Sequence[Rows]) -> None:
        self.weights = weights

    def read(self, mixture: int, expert: int, into: Rows) -> None:
        """Copy an expert."""
        for whole, part in zip(self.weights[mixture], into, strict=True):
            part.copy_(whole[expert], non_blocking=True)

    def like(self) -> Rows:
        """The first expert."""
        up_X2IH, down_XHI = self.weights[0]
        return up_X2IH[0], down_XHI[0]


@dataclass
class Traffic:
    """What a store has done: of the experts that tokens chose, a mixture and a pass at a time, where they were."""

    hits: int = 0  # there since an earlier pass
    prefetched: int = 0  # fetched while the mixture before computed
    misses: int = 0  # fetched when they were wanted
    bytes_fetched: int = 0
    seconds_waited: float = 0.0  # in which nothing was computed
    bytes_resident: int = 0  # at most at a time, on the device
    bytes_of_all: int = 0

    def metrics(self) -> dict[str, float]:
        """By the names that metrics have."""
        return {f"expert_{name}": value for name, value in vars(self).items()}


class ExpertStore:
    """The experts of a model, of which `resident` at most are on the device between the mixtures' turns.

    A mixture whose tokens choose more than that (a prompt's do) has all of them for as long as it computes.
    """

    def __init__(
        self, places: Sequence[tuple[nn.Module, nn.Module]], source: Source, *, resident: int, prefetch: bool,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.places, self.source, self.prefetch, self.device = places, source, prefetch, device
        up_2IH, down_HI = source.like()
        self.size = up_2IH.nbytes + down_HI.nbytes
        self.experts = int(at(places[0][0], "num_experts"))
        resident = min(resident, self.experts * len(places))
        self.held: Rows = (self._room(resident, up_2IH), self._room(resident, down_HI))
        self.free, self.slots = list(range(resident)), OrderedDict[Key, int]()  # the least recently used first
        self.fetching: dict[Key, Future[None]] = {}
        self.early: set[Key] = set()  # fetched before their turn, and not used yet
        self.chosen: dict[int, list[int]] = {}  # by the mixture's number, where its router was asked early
        total = self.size * self.experts * len(places)
        self.traffic = Traffic(bytes_resident=self.size * resident, bytes_of_all=total)
        self.worker = ThreadPoolExecutor(1, "experts")  # reads one after another: the order of their need
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.before: list[dict[str, nn.Parameter | None]] = []  # what the mixtures had
        self.handles: list[RemovableHandle] = []

    def _room(self, count: int, like: Tensor) -> Tensor:
        return torch.empty(count, *like.shape, dtype=like.dtype, device=self.device)

    def attach(self) -> None:
        """Have the mixtures compute with what the store holds; their own weights are put aside."""
        for number, (experts, _) in enumerate(self.places):
            self.before.append({name: experts._parameters.pop(name, None) for name in WEIGHTS})
            self._show(experts, self.held, len(self.held[0]))
            self.handles.append(experts.register_forward_pre_hook(partial(self._before, number)))
            self.handles.append(experts.register_forward_hook(self._after))

    def detach(self, home: torch.device) -> None:
        """Give the mixtures their own weights back, on the device that they were on, and end the thread."""
        self.worker.shutdown()
        for handle in self.handles:
            handle.remove()
        for (experts, router), weights in zip(self.places, self.before, strict=True):
            for name, weight in weights.items():
                vars(experts).pop(name)
                if weight is not None:
                    weight.data = weight.data.to(home)
                experts.register_parameter(name, weight)
            vars(experts)["num_experts"] = self.experts
            vars(router).pop("answer", None)

    def _show(self, experts: nn.Module, rows: Rows, count: int) -> None:
        vars(experts).update(zip(WEIGHTS, rows, strict=True), num_experts=count)

    def _before(self, number: int, experts: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Have the chosen experts there, and their numbers in the places that they are in."""
        x_NH, index_NK, *rest = args
        if number == 0:  # a pass begins; the one before may have been broken off
            self.chosen.clear()
            for _, router in self.places[1:]:
                vars(router).pop("answer", None)
        chosen = self.chosen.pop(number, None) or index_NK.unique().tolist()
        keys = [(number, expert) for expert in chosen]
        self._count(keys)
        slots, apart = [], None
        if len(keys) <= len(self.held[0]):
            slots = [self._hold(key, keys) for key in keys]
        else:
            apart = self._apart(keys)
        self._ask_ahead(number + 1, x_NH, keys if apart is None else ())
        self._wait(keys)
        in_order = at(experts, "config")._experts_implementation == "eager"  # which sums in the order of the places
        if apart is None and in_order:
            slots_S = torch.tensor(slots, device=self.device)
            apart = (self.held[0][slots_S], self.held[1][slots_S])
        if apart is None:
            self._show(experts, self.held, len(self.held[0]))
        else:
            slots = list(range(len(keys)))
            self._show(experts, apart, len(keys))
            resident = sum(each.nbytes for each in (*self.held, *apart))
            self.traffic.bytes_resident = max(self.traffic.bytes_resident, resident)
        place_X = torch.zeros(self.experts, dtype=index_NK.dtype)
        place_X[chosen] = torch.tensor(slots, dtype=index_NK.dtype)
        return x_NH, place_X.to(self.device)[index_NK], *rest

    def _after(self, experts: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        """Let go of what only this mixture needed."""
        self._show(experts, self.held, len(self.held[0]))

    def _count(self, keys: Sequence[Key]) -> None:
        for key in keys:
            if key not in self.slots:
                self.traffic.misses += 1
            elif key in self.early:
                self.traffic.prefetched += 1
            else:
                self.traffic.hits += 1
        self.early.difference_update(keys)

    def _hold(self, key: Key, needed: Collection[Key]) -> int:
        """The place of an expert, which is being fetched if it was not there; one of `needed` never gives way."""
        if key not in self.slots:
            if not self.free:
                old = next(other for other in self.slots if other not in needed)
                self._wait([old])
                self.free.append(self.slots.pop(old))
                self.early.discard(old)
            slot = self.free.pop()
            self.slots[key] = slot
            self.fetching[key] = self._fetch(key, (self.held[0][slot], self.held[1][slot]))
        self.slots.move_to_end(key)
        return self.slots[key]

    def _apart(self, keys: Sequence[Key]) -> Rows:
        """More experts than there are places for, for one turn."""
        up_X2IH, down_XHI = (self._room(len(keys), whole[0]) for whole in self.held)
        for row, key in enumerate(keys):
            into = (up_X2IH[row], down_XHI[row])
            if key not in self.slots:
                self.fetching[key] = self._fetch(key, into)
                continue
            self._wait([key])
            for part, whole in zip(into, self.held, strict=True):
                part.copy_(whole[self.slots[key]])
        return up_X2IH, down_XHI

    def _ask_ahead(self, number: int, x_NH: Tensor, needed: Collection[Key]) -> None:
        """Fetch what the next mixture's router chooses, as far as there are places, while this one computes."""
        if not self.prefetch or number == len(self.places):
            return
        router = self.places[number][1]
        if not isinstance(router, Ahead):
            return
        router.answer = router.route(x_NH)
        self.chosen[number] = router.answer[2].unique().tolist()
        wanted = [(number, expert) for expert in self.chosen[number]]
        room = len(self.held[0]) - len(needed)
        there = [key for key in wanted if key in self.slots]
        lacking = [key for key in wanted if key not in self.slots][: max(0, room - len(there))]
        kept = {*needed, *there, *lacking}
        for key in (*there, *lacking):
            self._hold(key, kept)
        self.early.update(lacking)

    def _fetch(self, key: Key, into: Rows) -> Future[None]:
        self.traffic.bytes_fetched += self.size
        ready = None
        if self.stream is not None:  # what still computes with a place is done before it is written over
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self.device))
        return self.worker.submit(self._read, key, into, ready)

    @torch.inference_mode()
    def _read(self, key: Key, into: Rows, ready: torch.cuda.Event | None) -> None:
        """In the store's thread: done when the weights are there."""
        if self.stream is None or ready is None:
            self.source.read(*key, into)
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            self.source.read(*key, into)
        self.stream.synchronize()

    def _wait(self, keys: Sequence[Key]) -> None:
        started = time.perf_counter()
        for key in keys:
            if key not in self.fetching:
                continue
            try:
                self.fetching.pop(key).result()
            except BaseException:  # what was not read is not there
                if key in self.slots:
                    self.free.append(self.slots.pop(key))
                raise
        self.traffic.seconds_waited += time.perf_counter() - started


_stores: WeakKeyDictionary[nn.Module, ExpertStore] = WeakKeyDictionary()


def store_of(model: nn.Module) -> ExpertStore | None:
    """The store that a model's mixtures compute with, if there is one."""
    return _stores.get(model)


def give_store(
    model: PreTrainedModel, name: str, families: Sequence[str], *, source: Source | None = None, resident: int = 0,
    prefetch: bool = True, device: torch.device,
) -> ExpertStore:  # fmt: skip
    """Have a model's mixtures compute with a store on the device; the source is the model's own weights by default.

    `resident` 0 is twice as many as a token is given. Raises `PretrainError` for other families and too few places.
    """
    routers, modules = mixtures(model, name, families), dict(model.named_modules())
    top_k: int = model.config.num_experts_per_tok
    resident = resident or 2 * top_k
    if resident < top_k:
        raise PretrainError(f"{name}: resident {resident}: accepted: {top_k} or more, as many as a token is given")
    places = [(modules[experts], modules[router]) for experts, router in routers.items()]
    if source is None:
        pairs = [(experts.get_parameter(WEIGHTS[0]), experts.get_parameter(WEIGHTS[1])) for experts, _ in places]
        if device.type == "cuda":  # which copies from pinned memory while it computes
            for parameter in (each for pair in pairs for each in pair):
                parameter.data = parameter.data.cpu().pin_memory()
        source = Memory([(up.data, down.data) for up, down in pairs])
    store = ExpertStore(places, source, resident=resident, prefetch=prefetch, device=device)
    store.attach()
    _stores[model] = store
    return store


@contextmanager
def borrowed_store(
    model: PreTrainedModel, name: str, families: Sequence[str], *, resident: int = 0, prefetch: bool = True
) -> Iterator[ExpertStore]:
    """While open, a model that is whole computes with a store, its experts in the machine's memory."""
    store = give_store(model, name, families, resident=resident, prefetch=prefetch, device=model.device)
    try:
        yield store
    finally:
        del _stores[model]
        store.detach(model.device)
