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
from pretrain.core.foreign.paths import MORE_TEMPLATES, strays
from pretrain.core.foreign.reading import read_bytes
from pretrain.core.foreign.weights import Stored

LAYERS = re.compile(r"(num_)?(.*_)?(layers|n_layers?|depth)|layers|num_blocks|block_count")
MOST_LAYERS = 10_000
MOST = 1 << 40  # of any whole number in a configuration
TYPES = re.compile(r"b?float16|float(32|64|[48]_\w+)?|half|double|u?int(8|16|32|64)?|bool")  # of torch
KINDS = (  # names of fields, whether a value is one of theirs, and which are
    (re.compile(r"(.*_)?(eps|epsilon)"), lambda n: _number(n) and 0 <= n <= 1, "a number from 0 to 1"),
    (
        re.compile(r"(.*_)?(theta|freq_base|base_freq)|rotary_emb_base|factor"),
        lambda n: _number(n) and 0 < n < math.inf,
        "a number above 0",
    ),
    (
        re.compile(r"(.*_)?max_position_embeddings|n_positions|max_seq_len|max_(source|target)_positions"),
        lambda n: _number(n) and n >= 1,
        "1 or more",
    ),
    (
        re.compile(r"n_heads?|num_(.*_)?heads|(.*_)?attention_heads"),
        lambda n: not _number(n) or n >= 0,
        "0 or more",
    ),
    (
        re.compile(r"(torch_)?dtype"),
        lambda word: not isinstance(word, str) or TYPES.fullmatch(word) is not None,
        "float32, bfloat16, float16, float64",
    ),
)
FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}  # as transformers marks them
SLACK = 1 << 24  # weights that a model may have beside those of its files
# How many weights a number of the files may stand for: two where they are tied, and after a surgery, which may keep a
# weight of one bit in a word of 32, or a matrix as two thin ones, so many words' more.
PLAIN, OPERATED = 2, 64
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
    _check_kinds(path, config)
    for steps, value in _numbers(config, ()):
        name = ".".join(steps)
        if math.isnan(value):
            raise PretrainError(f"{path}: {name} NaN: accepted: a number")
        if LAYERS.fullmatch(steps[-1]) and value > MOST_LAYERS:
            raise PretrainError(f"{path}: {name} {value:g}: accepted: at most {MOST_LAYERS:,}")
        if abs(value) > MOST and isinstance(value, int):
            raise PretrainError(f"{path}: {name} {value:.3g}: accepted: at most {MOST:.3g}")
    size = config.get("vocab_size")
    for name in INPUTS if isinstance(size, int) else ():
        token = config.get(name)
        if isinstance(token, int) and isinstance(size, int) and token >= size > 0:
            raise PretrainError(f"{path}: {name} {token}: accepted: a token of the vocabulary, from 0 to {size - 1}")


def _check_kinds(path: Path, config: Mapping[str, object], steps: tuple[str, ...] = ()) -> None:
    """Refuse what `KINDS` do not accept, whatever its type."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            _check_kinds(path, value, (*steps, str(name)))
            continue
        for pattern, inside, accepted in KINDS:
            if value is not None and pattern.fullmatch(str(name)) and not inside(value):
                raise PretrainError(f"{path}: {'.'.join((*steps, str(name)))} {value!s:.40}: accepted: {accepted}")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: object, steps: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int | float]]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _numbers(each, (*steps, str(name)))
    elif steps and isinstance(value, int | float) and not isinstance(value, bool):
        yield steps, value


def check_fields(path: Path, fields: Mapping[str, object], stored: Mapping[str, object]) -> None:
    """`check_config` and `check_layers` of the fields of a GGUF file, `llama.block_count` and such."""
    tables: dict[str, dict[str, object]] = {}
    for name, value in fields.items():
        group, _, last = name.rpartition(".")
        if not group.startswith(("general", "tokenizer")):
            tables.setdefault(group, {})[last] = value
    check_config(path, tables)
    check_layers(path, tables, stored)


def check_layers(path: Path, config: Mapping[str, object], stored: Mapping[str, object]) -> None:
    """Refuse more layers than the files hold tensors, which would be built one after another before any is read."""
    for steps, value in _numbers(config, ()):
        if LAYERS.fullmatch(steps[-1]) and value > max(64, 2 * len(stored)):
            name = ".".join(steps)
            raise PretrainError(f"{path}: {name} {value:g}: accepted: layers of which the files hold the weights")


def check_count(path: Path, built: int, stored: Mapping[str, Stored], *, surgical: bool = False) -> None:
    """Refuse a configuration of a model that is much larger than its files."""
    held = sum(each.count for each in stored.values())
    if built > (OPERATED if surgical else PLAIN) * held + SLACK:
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
    """The folder, or one in its place without what others than we read and should not: byte-order marks in JSON, at
    which they stumble, and templates that are links out of it.
    """
    odd = (
        {path.name for path in folder.glob("*.json") if path.is_file() and json.marked(path)} if folder.is_dir() else {}
    )
    out = strays(folder) if folder.is_dir() else set()
    if not odd and not out:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="pretrain-") as place:
        for path in folder.iterdir():
            if path.name in odd:
                Path(place, path.name).write_text(texts.decode(read_bytes(path, json.MOST)), encoding="utf-8")
            elif path.name == MORE_TEMPLATES and path.is_dir():
                Path(place, path.name).mkdir()
                for each in (each for each in path.iterdir() if f"{path.name}/{each.name}" not in out):
                    Path(place, path.name, each.name).symlink_to(each.absolute())
            elif path.name not in out:
                Path(place, path.name).symlink_to(path.absolute())
        yield Path(place)
