"""pretrain: the whole life of a pretrained model on a limited budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["PretrainError", "load", "run", "use_methods"]

if TYPE_CHECKING:
    from pretrain.core.checkpoint import load
    from pretrain.core.errors import PretrainError
    from pretrain.core.registry import use_methods
    from pretrain.engine import run

_HOMES = {
    "load": "pretrain.core.checkpoint",
    "run": "pretrain.engine",
    "use_methods": "pretrain.core.registry",
    "PretrainError": "pretrain.core.errors",
}


def __getattr__(name: str) -> object:
    """Import on first use, so that `import pretrain` and the command line stay quick."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pretrain' has no attribute {name!r}")
