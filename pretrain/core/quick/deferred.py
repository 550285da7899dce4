"""What transformers imports beside a model, and a model's answers do not need: it waits until something asks for it.

`torch._dynamo` (a compiler), torch's sharded tensors and `scipy.optimize` (a function of losses of detection) are
a fifth of the processor time that the answer of a small model takes.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

Names: TypeAlias = "Mapping[str, Callable[..., Any]]"


class Deferred(ModuleType):
    """A module that is imported when something of it is asked for besides the names that it is made with."""

    def __init__(self, name: str, names: Names) -> None:
        super().__init__(name, f"Stands for {name} until that is needed.")
        self.__dict__.update(names)
        top, *within = name.split(".")
        self.__spec__ = found = find_spec(top)
        folders = found.submodule_search_locations if found else None
        self.__path__ = [str(Path(folder, *within)) for folder in folders or ()]  # a module in it is imported alone

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what is asked of all modules
            raise AttributeError(name)
        return getattr(real(self.__name__), name)


def real(name: str) -> ModuleType:
    """The module itself, in place of what stands for it."""
    if isinstance(sys.modules.get(name), Deferred):
        del sys.modules[name]
    return importlib.import_module(name)


def _function(module: str, name: str) -> Callable[..., Any]:
    """A function that imports its module when it is called."""

    def call(*given: Any, **named: Any) -> Any:
        return getattr(real(module), name)(*given, **named)

    call.__name__ = name
    return call


def _disable(function: Any = None, recursive: bool = True, **_: Any) -> Any:
    """`torch._dynamo.disable`, by the mark that the compiler looks for."""
    if function is None:
        return lambda given: _disable(given, recursive)
    function._torchdynamo_disable = True
    return function


def _same(function: Any) -> Any:
    return function


def _standing() -> list[Deferred]:
    assign = _function("scipy.optimize", "linear_sum_assignment")
    compiling = {"disable": _disable, "assume_constant_result": _same, "allow_in_graph": _same}
    names: dict[str, Names] = {"torch._dynamo": compiling, "scipy.optimize": {"linear_sum_assignment": assign}}
    there = {name for name in names if name not in sys.modules and find_spec(name.partition(".")[0]) is not None}
    return [Deferred(name, names[name]) for name in names if name in there]


@contextmanager
def deferred() -> Iterator[None]:
    """Import transformers, or load a model, without what only compiling, detecting and sharding need.

    What is imported already stays as it is, and what is asked for is imported then. One of several processes, whose
    tensors may be sharded, waits with nothing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or "transformers.modeling_utils" in sys.modules:
        yield
        return
    from transformers import utils
    from transformers.utils import import_utils

    standing = _standing()
    sharding = import_utils.is_torch_distributed_available
    homes: list[Any] = [utils, import_utils]
    for home in homes:
        home.is_torch_distributed_available = lambda: False
    sys.modules.update({each.__name__: each for each in standing})
    try:
        yield
    finally:
        for home in homes:
            home.is_torch_distributed_available = sharding
        for each in standing:
            if sys.modules.get(each.__name__) is each:
                del sys.modules[each.__name__]
