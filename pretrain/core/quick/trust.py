"""What the files of a checkpoint may ask for and are never given: to fetch anything, to open what lies elsewhere.

`transformers` would do it for some file: fetch and import the kernels of an `attn_implementation: org/name`, open
another model for an `adapter_config.json` or an `audio_tokenizer`. Code in the folder itself: `core/foreign/code.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.files import read_json

CONFIGS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")  # of layers: `sdpa`, or kernels of the hub
ADAPTER, AUDIO, CODE = "adapter_config.json", "audio_tokenizer", "auto_map"

_lock, _state = threading.Lock(), {"inside": 0, "before": False}


def check_trust(folder: Path | str) -> None:
    """Refuse a checkpoint, or a processor, whose files ask for what lies elsewhere."""
    folder = Path(folder)
    if (folder / f"{AUDIO}_config.json").exists():
        raise PretrainError(f"{folder / AUDIO}_config.json: no other model is opened for it; accepted: none")
    for path, steps, value in _leaves(folder):
        if any(step.endswith(IMPLEMENTATIONS) for step in steps) and "/" in str(value):
            raise PretrainError(
                f"{path}: {'.'.join(steps)} {value!r}: kernels of the hub are never fetched or run; accepted: sdpa, "
                "eager, or the file without it"
            )
        if AUDIO in steps:
            raise PretrainError(f"{path}: {AUDIO}: no other model is opened for it; accepted: the file without it")


def check_whole(folder: Path | str) -> None:
    """Refuse a folder of an adapter, for which `transformers` would open another model."""
    path = Path(folder) / ADAPTER
    if path.exists():
        raise PretrainError(
            f"{path}: the folder is an adapter's, of another model; accepted: that model, and the surgery peft_adapter "
            "with this folder"
        )


def _leaves(folder: Path) -> Iterator[tuple[Path, tuple[str, ...], object]]:
    """The values in a folder's configurations that hold no others, with their files and the names that lead there."""
    for path in filter(Path.is_file, (folder / name for name in CONFIGS)):
        inner: list[tuple[tuple[str, ...], object]] = [((), read_json(path))]
        while inner:
            steps, value = inner.pop()
            if isinstance(value, dict):
                inner += [((*steps, str(name)), each) for name, each in value.items()]
            elif isinstance(value, list):
                inner += [(steps, each) for each in value]
            else:
                yield path, steps, value


@contextmanager
def offline() -> Iterator[None]:
    """While open, the hub's client connects to nothing, whatever a file asks for."""
    from huggingface_hub import constants

    with _lock:
        if not _state["inside"]:
            _state["before"] = constants.HF_HUB_OFFLINE
        _state["inside"] += 1
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        with _lock:
            _state["inside"] -= 1
            if not _state["inside"]:
                constants.HF_HUB_OFFLINE = bool(_state["before"])
