"""Configurations of models that others have made: what no file can mean is refused before a model is built of it."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain.core.errors import PretrainError
from pretrain.core.foreign import json, texts
from pretrain.core.foreign.reading import read_bytes
from pretrain.core.foreign.weights import Stored

LAYERS = re.compile(r"(num_)?(.*_)?(layers|n_layers?|depth)|layers|num_blocks")
MOST_LAYERS = 10_000
MOST = 1 << 40  # of any whole number in a configuration
FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}  # as transformers marks them
SLACK = 1 << 24  # weights that a model may have beside those of its files
INPUTS = ("pad_token_id", "decoder_start_token_id")  # tokens that are put in without being in any text


def whole_floats(value: object) -> Any:
    """What JSON has of a configuration, with the numbers that it has no words for: `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping):
        tag = value.get("__float__")
        if len(value) == 1 and isinstance(tag, str) and tag in FLOATS:
            return FLOATS[tag]
        return {name: whole_floats(each) for name, each in value.items()}
    return [whole_floats(each) for each in value] if isinstance(value, list) else value


def check_config(path: Path, config: Mapping[str, object]) -> None:
    """Refuse numbers that no model has: layers beyond `MOST_LAYERS`, tokens outside the vocabulary."""
    for steps, value in _numbers(config, ()):
        name = ".".join(steps)
        if LAYERS.fullmatch(steps[-1]) and value > MOST_LAYERS:
            raise PretrainError(f"{path}: {name} {value:g}: accepted: at most {MOST_LAYERS:,}")
        if abs(value) > MOST and isinstance(value, int):
            raise PretrainError(f"{path}: {name} {value:.3g}: accepted: at most {MOST:.3g}")
    size = config.get("vocab_size")
    for name in INPUTS if isinstance(size, int) else ():
        token = config.get(name)
        if isinstance(token, int) and isinstance(size, int) and token >= size > 0:
            raise PretrainError(f"{path}: {name} {token}: accepted: a token of the vocabulary, from 0 to {size - 1}")


def _numbers(value: object, steps: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int | float]]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _numbers(each, (*steps, str(name)))
    elif steps and isinstance(value, int | float) and not isinstance(value, bool):
        yield steps, value


def check_layers(path: Path, config: Mapping[str, object], stored: Mapping[str, Stored]) -> None:
    """Refuse more layers than the files hold tensors, which would be built one after another before any is read."""
    for steps, value in _numbers(config, ()):
        if LAYERS.fullmatch(steps[-1]) and value > max(64, 2 * len(stored)):
            name = ".".join(steps)
            raise PretrainError(f"{path}: {name} {value:g}: accepted: layers of which the files hold the weights")


def check_count(path: Path, built: int, stored: Mapping[str, Stored]) -> None:
    """Refuse a configuration of a model that is much larger than its files."""
    held = sum(each.count for each in stored.values())
    if built > 2 * held + SLACK:
        raise PretrainError(
            f"{path}: a model of {built:,} weights, of which the files hold {held:,}; accepted: the sizes of the files"
        )


def check_types(path: Path, kinds: Mapping[str, bool], stored: Mapping[str, Stored]) -> None:
    """Refuse weights of whole numbers or bits where the model has numbers with a point (`kinds`, by name)."""
    ends = {name.rpartition(".")[2]: floating for name, floating in kinds.items()}
    for name, each in stored.items():
        floating = kinds.get(name, ends.get(name.rpartition(".")[2], False))
        if floating and not each.floating:
            raise PretrainError(f"{path}: {name} is of {each.dtype}; accepted: floating-point weights")


def check_record(path: Path, record: Mapping[str, object]) -> None:
    """Refuse a `pretrain.json` whose parts are not what a checkpoint is written with."""
    surgery = record.get("surgery", [])
    if not isinstance(surgery, list) or not all(map(_is_entry, surgery)):
        raise PretrainError(f"{path}: surgery {str(surgery)[:80]!r}: accepted: a list of {{method, config}}")
    for name in ("lineage", "checksums"):
        if not isinstance(record.get(name), dict | None):
            raise PretrainError(f"{path}: {name} {str(record.get(name))[:80]!r}: accepted: a JSON object")
    if record.get("dtype") not in (None, "float32"):
        raise PretrainError(f"{path}: dtype {str(record.get('dtype'))[:80]!r}: accepted: float32, or none")


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("method"), str) and isinstance(entry.get("config"), dict)


@contextmanager
def unmarked(folder: Path) -> Iterator[Path]:
    """The folder, or one in its place whose JSON has no byte-order marks, at which other readers than ours stumble."""
    odd = (
        {path.name for path in folder.glob("*.json") if path.is_file() and json.marked(path)} if folder.is_dir() else {}
    )
    if not odd:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="pretrain-") as place:
        for path in folder.iterdir():
            if path.name in odd:
                Path(place, path.name).write_text(texts.decode(read_bytes(path, json.MOST)), encoding="utf-8")
            else:
                Path(place, path.name).symlink_to(path.absolute())
        yield Path(place)
