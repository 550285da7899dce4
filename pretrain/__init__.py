"""pretrain: the whole life of a pretrained model on a limited budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "PretrainError",
    "Trained",
    "evaluate",
    "generate",
    "load",
    "methods",
    "predict",
    "run",
    "train",
    "train_tokenizer",
    "use_methods",
]

if TYPE_CHECKING:
    from pretrain import methods
    from pretrain.core.errors import PretrainError
    from pretrain.core.registry import use_methods
    from pretrain.corpus.tokenizers import train_tokenizer
    from pretrain.engine import run
    from pretrain.inference.predict import predict
    from pretrain.interactive import Trained, evaluate, generate, load, train

_HOMES = {
    "PretrainError": "pretrain.core.errors",
    "Trained": "pretrain.interactive",
    "evaluate": "pretrain.interactive",
    "generate": "pretrain.interactive",
    "load": "pretrain.interactive",
    "predict": "pretrain.inference.predict",
    "run": "pretrain.engine",
    "train": "pretrain.interactive",
    "train_tokenizer": "pretrain.corpus.tokenizers",
    "use_methods": "pretrain.core.registry",
}


def __getattr__(name: str) -> object:
    """Import on first use, so that `import pretrain` and the command line stay quick."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "methods":
        return importlib.import_module("pretrain.methods")
    raise AttributeError(f"module 'pretrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
