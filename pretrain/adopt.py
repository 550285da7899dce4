"""`pretrain adopt`: what was made elsewhere (a corpus, a tokenizer, a checkpoint) becomes a stage's finished result.

It is opened first, as a later stage would open it. Then it is copied, or its files are linked; of a checkpoint a
`pretrain.json` of our own says where it is from and holds its checksums, so that a linked file that is replaced later
is an error and no other result.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError, nearest
from pretrain.core.exchange.beside import WEIGHTS as LINKED
from pretrain.core.exchange.beside import beside
from pretrain.core.files import SUMS, atomic_folder, digest, file_digest, locked, sweep, write_json
from pretrain.core.folders import checkpoint_of, corpus_of, files_below, place_of, tokenizer_of, verify
from pretrain.core.foreign.paths import expanded, travels
from pretrain.core.foreign.reading import open_file
from pretrain.core.processors import load_processor
from pretrain.corpus.store import SPLITS, Corpus, count_rows
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.engine import silent, write_record
from pretrain.identity import CODE, NOTED, Planned, keep_generations, plan, state_of
from pretrain.recipe import Recipe
from pretrain.records import Adopted, Metrics
from pretrain.runs.shelf import check_output

# Not taken along: weights that are never read, code that is never run, what tools leave.
LEFT = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.py", "__pycache__", ".*")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf")  # beside a tokenizer or a processor


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
    check_output(recipe.output)
    item = _chosen(plan(recipe, store), name)
    part, source = item.stage.writes, place_of(expanded(folder))
    if not source.is_dir():
        raise PretrainError(f"{folder} is no folder; accepted: a {part} made elsewhere")
    find, check = {
        "corpus": (corpus_of, _check_corpus), "tokenizer": (tokenizer_of, _check_tokenizer),
        "processor": (_processor_of, _check_processor), "checkpoint": (checkpoint_of, _check_checkpoint),
    }[part]  # fmt: skip
    source = find(source)
    marks = _digests(source, _taken(source, part))
    metrics = check(source)
    adopted: Adopted = {"source": str(folder), "fingerprint": digest(marks), "linked": link}
    item, started = item.at(item.generation + 1).afresh(), datetime.now(UTC)
    with locked(item.folder / ".lock"):
        sweep(item.folder)
        with atomic_folder(item.folder / part) as work:
            for file in marks:
                _take(source / file, work / file, link and (part != "checkpoint" or file.endswith(LINKED)))
            _check_unchanged(folder, marks, _digests(work, marks), _taken(source, part))
            if part == "checkpoint":
                _sign(work, source, item, adopted)
        write_json(item.folder / CODE, [])
        if link:
            adopted["state"] = state_of(item.folder / part)
        write_record(item, {"metrics": metrics, "adopted": adopted}, started, 0.0)
        keep_generations([item])  # last: until then what there was before is what the run shows
        (item.folder / NOTED).touch()
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


def _taken(source: Path, part: str) -> list[str]:
    """What of a folder is taken along, links followed."""
    left = LEFT if part in ("corpus", "checkpoint") else (*LEFT, *WEIGHTS)
    names = [path.relative_to(source) for path in files_below(source) if path != source / SUMS]
    if part != "corpus":
        names = [name for name in names if not beside(str(name)) or travels(source / name, source)]
    return sorted(str(name) for name in names if not any(Path(s).match(mark) for s in name.parts for mark in left))


def _digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """A digest by file."""
    with _readable():
        return {name: file_digest(folder / name) for name in names}


def _take(path: Path, target: Path, link: bool) -> None:
    """Copy a file, or link it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        target.symlink_to(path.resolve())
        return
    with _readable():
        file = open_file(path)
    with file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy, 1 << 20)


@contextmanager
def _readable() -> Iterator[None]:
    """Name the file that cannot be read."""
    try:
        yield
    except OSError as error:
        raise PretrainError(f"{error.filename} cannot be read: {error.strerror}; accepted: a file to read") from error


def _check_unchanged(folder: Path | str, before: dict[str, str], taken: dict[str, str], now: list[str]) -> None:
    """Refuse a folder that was written while it was taken in: what was opened is not what was taken."""
    odd = [name for name in before if taken[name] != before[name]] + sorted({*now} - {*before})
    if odd:
        raise PretrainError(f"{folder}: {odd[0]} changed while it was taken in; accepted: a folder that is whole")


def _check_corpus(folder: Path) -> Metrics:
    """Open a corpus and count its documents; its sizes are the stage's metrics."""
    verify(folder)
    info = Corpus(folder).info
    for split in SPLITS:
        rows, known = count_rows(folder / split), info["documents"][split]
        if rows != known:
            raise PretrainError(f"{folder / split}: {rows} documents; accepted: {known} by corpus.json")
    return {f"{measure}/{split}": info[measure][split] for measure in ("documents", "bytes") for split in SPLITS}


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
