"""What is no checkpoint but becomes one: made of it once, in the cache, and opened from there.

A GGUF file, a folder of weights in AWQ's layout, and that of an adapter of `peft`, which names the model it goes on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.exchange import gguf_in
from pretrain.core.exchange.gguf_in import NEITHER, ORIGIN, gguf_at
from pretrain.core.files import locked, read_json, read_object
from pretrain.core.quick.trust import ADAPTER


def adapter_at(place: Path) -> Path | None:
    """The folder of an adapter of `peft` without its model; None of anything else."""
    apart = (place / ADAPTER).is_file() and not any((place / name).exists() for name in NEITHER)
    return place if apart else None


def is_awq(place: Path) -> bool:
    """Whether a folder holds weights that are packed in AWQ's layout, by its `config.json`."""
    path = place / "config.json"
    with suppress(PretrainError, OSError):
        packing = read_object(path).get("quantization_config") if path.is_file() else None
        return isinstance(packing, dict) and packing.get("quant_method") == "awq"
    return False


def opened(place: Path, cache: Path) -> Path:
    """The checkpoint that was made of what is none, the first time it is asked for; any other path as it is.

    Raises `PretrainError` for a damaged file, for an architecture that transformers cannot read from GGUF, for an
    adapter whose model is not at hand, and of a type that changes no layers.
    """
    path = gguf_at(place)
    if path is not None:
        return _made(path, cache / "gguf" / f"{path.stem[:80]}-{gguf_in.key(path)[:16]}", gguf_in.convert)
    # The others write checkpoints themselves, as this is asked by what reads them: imported by name, as methods are.
    if adapter_at(place) is not None:
        peft_in = importlib.import_module("pretrain.core.exchange.peft_in")
        return _made(place, cache / "peft" / f"{place.resolve().name[:80]}-{peft_in.key(place)[:16]}", peft_in.convert)
    if is_awq(place):
        awq_in = importlib.import_module("pretrain.core.exchange.awq_in")
        return _made(place, cache / "awq" / f"{place.resolve().name[:80]}-{awq_in.key(place)[:16]}", awq_in.convert)
    return place


def origin(folder: Path) -> str | None:
    """The state of a folder that was made of something else, for a stage's identity; None of any other."""
    path = folder / ORIGIN
    if not path.exists():
        return None
    facts = read_json(path)
    return f"{facts.get('format', 'gguf')} {facts['sha256']}"


def _made(path: Path, target: Path, convert: Callable[[Path, Path], None]) -> Path:
    """The folder `target`, which `convert` writes of `path` where it is not there; nothing is kept of what fails."""
    if not (target / ORIGIN).exists():
        lock = target.with_name(f".{target.name}.lock")
        with locked(lock):
            if not (target / ORIGIN).exists():
                try:
                    convert(path, target)
                except BaseException as error:
                    lock.unlink(missing_ok=True)
                    if isinstance(error, PretrainError) and str(target) in str(error):
                        raise PretrainError(
                            f"{path}: what is made of it cannot be kept: {error}; accepted: room there, or another "
                            "place for the cache ($PRETRAIN_CACHE)"
                        ) from error
                    raise
    return target
