"""Taking in what was made elsewhere: a checkpoint, a corpus or a tokenizer becomes a finished stage of a recipe."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pretrain.core.errors import PretrainError
from pretrain.core.files import atomic_folder, digest, file_digest, locked, write_json
from pretrain.core.folders import checkpoint_of, corpus_of, tokenizer_of
from pretrain.planning import Planned

HOLDS = {"data": "corpus", "tokenizer": "tokenizer", "train": "checkpoint", "surgery": "checkpoint"}


def adopt(item: Planned, folder: Path, *, link: bool = False) -> Path:
    """Make `folder` the result of a planned stage, copied or linked to; returns the stage's folder.

    It is opened as the stage's readers would open it. Raises `PretrainError` where it is not what the stage writes, and
    where the stage is finished already.
    """
    name, kind = item.stage.name, item.stage.stage
    if kind not in HOLDS:
        raise PretrainError(f"{name} is a {kind} stage; accepted: one of kind {', '.join(HOLDS)}")
    if item.finished:
        raise PretrainError(f"{name} is finished in {item.folder}; accepted: a stage that has not been run")
    source = _opened(kind, Path(folder).expanduser())
    target = item.folder / HOLDS[kind]
    with locked(item.folder / ".lock", lambda: None):
        if link:
            target.unlink(missing_ok=True)
            target.symlink_to(source.resolve(), target_is_directory=True)
        else:
            with atomic_folder(target) as work:
                shutil.copytree(source, work, dirs_exist_ok=True)
        write_json(item.folder / "stage.json", _record(item, source))
    return item.folder


def _opened(kind: str, folder: Path) -> Path:
    """Where the thing itself is, after it was opened; what cannot be opened is an error."""
    if not folder.is_dir():
        raise PretrainError(f"{folder}: accepted: a folder")
    if kind == "data":
        from pretrain.corpus.store import Corpus

        corpus = Corpus(corpus_of(folder))
        for split, count in corpus.info["documents"].items():
            if sum(1 for _ in corpus.documents(split)) != count:
                raise PretrainError(f"{corpus.folder}: split {split} is not the {count} documents it says")
        return corpus.folder
    if kind == "tokenizer":
        from pretrain.corpus.tokenizers import load_tokenizer

        load_tokenizer(tokenizer_of(folder))
        return tokenizer_of(folder)
    from pretrain.core.checkpoint import load

    load(checkpoint_of(folder))
    return checkpoint_of(folder)


def _record(item: Planned, source: Path) -> dict[str, Any]:
    """What `stage.json` says of a stage that was not run here."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    files = sorted(path for path in source.rglob("*") if path.is_file())
    sums = [[str(path.relative_to(source)), file_digest(path)] for path in files]
    return {
        "name": item.stage.name, "stage": item.stage.stage, "address": item.address, "seed": item.seed,
        "config": {k: v for k, v in item.config.items() if k != "methods"}, "methods": item.config["methods"],
        "inputs": item.stage.references(), "addresses": item.addresses, "outside": item.outside,
        "generation": item.generation, "adopted": {"folder": str(source.resolve()), "fingerprint": digest(sums)},
        "metrics": {}, "flops": 0, "seconds": 0.0, "peak_memory_bytes": 0, "started": now, "finished": now,
        "environment": {},
    }  # fmt: skip
