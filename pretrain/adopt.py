"""`pretrain adopt`: what was made elsewhere (a corpus, a tokenizer, a checkpoint) becomes a stage's finished result.

It is opened first, as a later stage would open it. Then it is copied, or its files are linked; of a checkpoint a
`pretrain.json` of our own says where it is from and holds its checksums, so that a linked file that is replaced later
is an error and no other result.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow
import pyarrow.parquet

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError, nearest
from pretrain.core.files import SUMS, atomic_folder, digest, file_digest, locked, sweep, write_json
from pretrain.core.folders import checkpoint_of, corpus_of, tokenizer_of, verify
from pretrain.core.foreign.paths import expanded
from pretrain.core.processors import load_processor
from pretrain.corpus.store import SPLITS, Corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.engine import silent, write_record
from pretrain.identity import CODE, Planned, keep_generations, plan, state_of
from pretrain.recipe import Recipe
from pretrain.records import Adopted, Metrics

# Not taken along: weights that are never read, code that is never run, what tools leave.
LEFT = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.py", "__pycache__", ".*")


def adopt(
    recipe: Recipe,
    name: str,
    folder: Path | str,
    *,
    store: Path | str | None = None,
    link: bool = False,
    say: Callable[[str], None] = silent,
) -> Path:
    """Take `folder` for what the stage `name` writes; returns the stage's folder.

    The result is of a new generation, as a refresh is: what the stage had made before is kept, and what later stages
    had made of that is not taken for theirs.
    Raises `PretrainError` for a folder that a later stage could not open.
    """
    item = _chosen(plan(recipe, store), name)
    part, source = item.stage.writes, expanded(folder)
    if not source.is_dir():
        raise PretrainError(f"{folder} is no folder; accepted: a {part} made elsewhere")
    find, check = {
        "corpus": (corpus_of, _check_corpus), "tokenizer": (tokenizer_of, _check_tokenizer),
        "processor": (_processor_of, _check_processor), "checkpoint": (checkpoint_of, _check_checkpoint),
    }[part]  # fmt: skip
    source = find(source)
    metrics = check(source)
    files = [path for path in _files(source) if path.is_file()]
    marks = {str(path.relative_to(source)): file_digest(path) for path in files}
    adopted: Adopted = {"source": str(folder), "fingerprint": digest(marks), "linked": link}
    item, started = item.at(item.generation + 1).afresh(), datetime.now(UTC)
    with locked(item.folder / ".lock"):
        sweep(item.folder)
        with atomic_folder(item.folder / part) as work:
            for path in files:
                target = work / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(path.resolve()) if link else shutil.copyfile(path, target)
            if part == "checkpoint":
                _sign(work, source, item, adopted)
        keep_generations([item])
        write_json(item.folder / CODE, [])
        if link:
            adopted["state"] = state_of(item.folder / part)
        write_record(item, {"metrics": metrics, "adopted": adopted}, started, 0.0)
    say(f"[{name}] {part} {'linked' if link else 'copied'} from {folder} to {item.folder}")
    return item.folder


def _chosen(planned: Iterable[Planned], name: str) -> Planned:
    """The stage of that name; it must write what others can read."""
    items = {item.stage.name: item for item in planned}
    fit = ", ".join(name for name, item in items.items() if item.stage.writes) or "none"
    if name not in items:
        raise PretrainError(f"no stage {name!r}{nearest(name, items)}; accepted: {fit}")
    if not items[name].stage.writes:
        kind = items[name].stage.stage
        raise PretrainError(f"stage {name!r} is of kind {kind}, which leaves nothing for others; accepted: {fit}")
    return items[name]


def _files(source: Path) -> list[Path]:
    """What of a folder is taken along, links followed."""
    return sorted(
        path
        for path in source.rglob("*")
        if path != source / SUMS
        and not any(part.match(mark) for part in map(Path, path.relative_to(source).parts) for mark in LEFT)
    )


def _check_corpus(folder: Path) -> Metrics:
    """Open a corpus and count its documents; its sizes are the stage's metrics."""
    verify(folder)
    info = Corpus(folder).info
    sizes = {
        (measure, split): info.get(measure, {}).get(split) for measure in ("documents", "bytes") for split in SPLITS
    }
    for (measure, split), size in sizes.items():
        if not isinstance(size, int):
            raise PretrainError(f"{folder / 'corpus.json'}: {measure}.{split} {size!r}: accepted: a whole number")
    if not isinstance(info.get("fingerprint"), str):
        raise PretrainError(f"{folder / 'corpus.json'}: fingerprint {info.get('fingerprint')!r}: accepted: a digest")
    for split in SPLITS:
        rows = 0
        for path in sorted((folder / split).glob("*.parquet")):
            try:
                rows += pyarrow.parquet.read_metadata(path).num_rows
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise PretrainError(
                    f"{path}: not a whole Parquet file ({' '.join(str(error).split())[:200]})"
                ) from error
        if rows != sizes["documents", split]:
            raise PretrainError(
                f"{folder / split}: {rows} documents; accepted: {sizes['documents', split]} by corpus.json"
            )
    return {f"{measure}/{split}": size for (measure, split), size in sizes.items()}


def _check_tokenizer(folder: Path) -> Metrics:
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise PretrainError(f"{folder} is no tokenizer; accepted: a folder with tokenizer.json")
    return {"vocabulary": len(load_tokenizer(folder))}


def _processor_of(folder: Path) -> Path:
    """The processor in a stage's folder, or the folder itself."""
    return folder / "processor" if (folder / "processor").is_dir() else folder


def _check_processor(folder: Path) -> Metrics:
    if load_processor(folder) is None:
        raise PretrainError(f"{folder} is no processor; accepted: a folder with preprocessor_config.json")
    return {}


def _check_checkpoint(folder: Path) -> Metrics:
    model, _ = checkpoint.load(folder)
    return {"parameters": model.num_parameters()}


def _sign(work: Path, source: Path, item: Planned, adopted: Adopted) -> None:
    """Write the checkpoint's own `pretrain.json`: its history, that it was adopted."""
    before, lineage = checkpoint.read_record(source), checkpoint.lineage(source)
    stages = [stage for stage in (*lineage.get("stages", []), lineage.get("made_by")) if stage]
    made_by = {
        "name": item.stage.name, "stage": item.stage.stage, "address": item.address, "methods": {}, "adopted": adopted
    }  # fmt: skip
    record = {"format": checkpoint.FORMAT, "surgery": before.get("surgery", [])}
    (work / checkpoint.RECORD).unlink(missing_ok=True)
    write_json(work / checkpoint.RECORD, record | {"lineage": lineage | {"stages": stages, "made_by": made_by}})
