"""Packages that only some methods need, each with the extra that brings it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from pretrain.core.errors import PretrainError

EXTRAS = {
    "soundfile": "audio", "lm_eval": "eval", "mkdocs": "docs", "PIL": "images", "pytorch_optimizer": "optimizers",
    "ray": "ray", "tensorboard": "tensorboard", "gguf": "gguf", "onnx": "onnx", "onnxruntime": "onnx",
    "onnxscript": "onnx", "py3langid": "language", "ftfy": "repair", "trafilatura": "documents", "pypdf": "documents",
    "warcio": "documents", "starlette": "serve", "uvicorn": "serve",
}  # fmt: skip


class MissingExtra(PretrainError):
    """A package is not installed that one of the extras brings."""


@contextmanager
def extras_named() -> Iterator[None]:
    """Tell of a package that is missing in one line which extra brings it."""
    try:
        yield
    except ImportError as error:
        words = {(error.name or "").partition(".")[0], *re.findall(r"\w+", str(error))}
        package = next((name for name in EXTRAS if name in words), None)
        if package is None:
            raise
        raise MissingExtra(f"{package} is missing; accepted: pip install 'pretrain[{EXTRAS[package]}]'") from error
