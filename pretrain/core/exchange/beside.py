"""Files of a checkpoint that are no model and no processor: they travel to what is made of it.

A model card, the modules of `sentence-transformers` with their pooling, labels, notes. Weights in whatever format,
code, and what model and processor write themselves stay behind; so do the modules of `sentence-transformers` where the
model has become wider or narrower than the pooling that they describe.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pretrain.core.errors import warn
from pretrain.core.files import JSON, SUMS, read_json
from pretrain.core.foreign.paths import READ, TEMPLATES, travels

MODULES = "modules.json"  # of sentence-transformers: its parts, with the folders of those that have files
SENTENCES = (MODULES, "sentence_bert_config.json", "config_sentence_transformers.json")
CARD = "README.md"
MOST_FILES, MOST_BYTES = 200, 64 << 20
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".pkl", ".npz", ".data",
    ".index.json", ".py", ".pyc", ".so", ".lock",
)  # fmt: skip
OURS = (*READ, *TEMPLATES, CARD, SUMS, "origin.json", "hub.json")  # of the checkpoint that they come from
FOLDERS = ("adapter", "onnx", "openvino", "additional_chat_templates")


def shard_size(source: Path | None) -> int | str:
    """The size of the files that weights are written in: of what came in shards that of its largest."""
    shards = [path.stat().st_size for path in source.glob("*-of-*.safetensors")] if source is not None else []
    return max(shards) if shards else "5GB"


def carry(source: Path | None, work: Path) -> None:
    """Copy what lies beside a checkpoint's model and processor into `work`, where the new ones have been written."""
    if source is None:
        return
    stale = _sentences(source) if _width(source) != _width(work) or _leads_out(source) else set()
    count = size = 0
    for path in _files(source):
        inside = path.relative_to(source)
        if inside.parts[0] in stale or (work / inside).exists():
            continue
        count, size = count + 1, size + path.stat().st_size
        if count > MOST_FILES or size > MOST_BYTES:
            warn(f"{source}: more than {MOST_FILES} files or {MOST_BYTES >> 20} MiB beside the model: not all are kept")
            return
        (work / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, work / inside)


def _files(source: Path) -> Iterator[Path]:
    """The regular files that may travel, those of the top first, and none that lies elsewhere."""
    for here, folders, names in os.walk(source):
        top = Path(here) == source
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not (top and f in FOLDERS))
        for name in sorted(names):
            path = Path(here, name)
            plain = not name.startswith(".") and not name.endswith(WEIGHTS) and not (top and name in OURS)
            if plain and path.is_file() and travels(path, source):
                yield path


def _width(folder: Path) -> JSON:
    config = read_json(folder / "config.json")
    return next((config[name] for name in ("hidden_size", "d_model", "n_embd", "dim") if name in config), None)


def _leads_out(source: Path) -> bool:
    """Whether a module of sentence-transformers lies, as `modules.json` has it, out of the folder; that is said."""
    rows = read_json(source / MODULES) if (source / MODULES).is_file() else []
    parts = [str(row.get("path") or "") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    odd = [part for part in parts if Path(part).is_absolute() or ".." in Path(part).parts or "\\" in part]
    if odd:
        warn(f"{source / MODULES}: {odd[0][:80]!r} leads out of the checkpoint: the modules are left out")
    return bool(odd)


def beside(name: str) -> bool:
    """Whether a file of a checkpoint, by its way from it, is a text beside the model: a card, a template, a note."""
    path = Path(name)
    ours = len(path.parts) == 1 and path.name in OURS and path.name not in (CARD, *TEMPLATES)
    return not ours and not path.name.endswith(WEIGHTS)


def _sentences(source: Path) -> set[str]:
    """What belongs to the modules of sentence-transformers: files and folders, by their names."""
    if not (source / MODULES).is_file():
        return set()
    rows = read_json(source / MODULES)
    parts = [row.get("path") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return {*SENTENCES, *(str(part).partition("/")[0] for part in parts if part)}
