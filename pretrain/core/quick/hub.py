"""Models named as on the Hugging Face hub: `gpt2`, `org/name`, `org/name@REVISION`, fetched once and then pinned.

The first time a name is met the hub says which revision it stands for; from then on the name means that one, whatever
happens on the hub, and no network is needed. Only safetensors, JSON and tokenizers' files are fetched: never pickles,
never code. A recipe is checked with the small files; the weights come when it runs.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.core.errors import PretrainError
from pretrain.core.exchange.opening import opened
from pretrain.core.files import atomic_folder, locked, read_json, sealed, sweep, write_json, write_text
from pretrain.core.folders import cache_folder, place_of, verify

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

RECORD = "hub.json"  # in a snapshot's folder: the repository, its revision, what has been fetched
NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@(?P<revision>[\w.-]+))?")
SMALL = ("*.json", "*.txt", "*.model", "*.tiktoken")  # configuration and tokenizers
WEIGHTS = ("*.safetensors",)
SECONDS = 10.0  # that the hub has to answer


_offline = ContextVar("offline", default=False)


@contextmanager
def offline() -> Iterator[None]:
    """While open, no network is asked: a name that is not pinned is an error."""
    token = _offline.set(True)
    try:
        yield
    finally:
        _offline.reset(token)


def looks_like(name: str) -> bool:
    """Whether a word may name a model on the hub."""
    return NAME.fullmatch(name) is not None and not name.endswith((".json", ".yaml", ".safetensors", ".bin", ".gguf"))


def located(name: str, field: str = "") -> Path:
    """The path of that name or, where there is none, the snapshot that the name is pinned to.

    What is no checkpoint but becomes one, a GGUF file or an adapter, is it already; in a `field` that is called
    `folder` it stays what it is: there an adapter is put into a model that is at hand.
    """
    path = place_of(name)
    path = path if path.exists() else pinned(name) or path
    return path if field.rpartition(".")[2] == "folder" else opened(path, cache_folder())


def pinned(name: str) -> Path | None:
    """The snapshot that a name stands for; None where it has never been asked for."""
    pin = _pin(name) if looks_like(name) else None
    if pin is None or not pin.exists():
        return None
    folder = pin.parent / str(read_json(pin)["revision"])
    return folder if (folder / RECORD).exists() else None


def snapshot(folder: Path) -> Mapping[str, str] | None:
    """The repository and the revision of a snapshot's folder; None for any other."""
    path = Path(folder) / RECORD
    return read_json(path) if path.exists() else None


def state(folder: Path) -> str | None:
    """What a snapshot is, for a stage's identity: `hub REPOSITORY@REVISION`."""
    facts = snapshot(folder)
    return f"hub {facts['repo']}@{facts['revision']}" if facts else None


def _pin(name: str) -> Path:
    match = NAME.fullmatch(name)
    assert match is not None, name
    home = cache_folder() / "hub" / match["repo"].replace("/", "--")
    return home / f"pin-{match['revision'] or 'main'}.json"


def pin(name: str) -> Path:
    """The snapshot of a name, its small files fetched where that has not been done; an error says how to get it."""
    known = pinned(name)
    if known is not None:
        return known
    match = NAME.fullmatch(name)
    assert match is not None, name
    path = _pin(name)
    with locked(path.with_suffix(".lock")):
        known = pinned(name)
        if known is not None:  # another process may have fetched it meanwhile
            return known
        info = _ask(match["repo"], match["revision"])
        files = [file.rfilename for file in info.siblings or []]
        revision = str(info.sha)
        target = path.parent / revision
        with locked(_lock(target)):
            if not (target / RECORD).exists():
                sweep(target.parent, target.name)
                with atomic_folder(target) as work:
                    _download(match["repo"], revision, work, SMALL)
                    weights = any(file.endswith(".safetensors") and "/" not in file for file in files)
                    write_json(work / RECORD, {"repo": match["repo"], "revision": revision, "weights": weights})
        write_text(path.parents[1] / "CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n")
        write_json(path, sealed({"revision": revision}))
    return target


def fetch_weights(folder: Path, say: Callable[[str], None]) -> None:
    """Fetch a snapshot's weights where they are not there; of any other folder nothing."""
    facts = snapshot(folder)
    if facts is None or any(folder.glob("*.safetensors")):
        return
    repo, revision = facts["repo"], facts["revision"]
    if not facts["weights"]:
        raise PretrainError(f"{repo!r} on the hub has no safetensors; accepted: a model that has: pickles are not read")
    with locked(_lock(folder)):
        if any(folder.glob("*.safetensors")):
            return
        say(f"fetching {repo} at {revision[:12]} from the hub")
        sweep(folder.parent, folder.name)
        verify(folder)
        with atomic_folder(folder) as work:  # whole or not at all, and its checksums those of all files
            _download(repo, revision, work, WEIGHTS)
            for path in folder.iterdir():
                shutil.copy(path, work)


def _lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _ask(repo: str, revision: str | None) -> ModelInfo:
    if _offline.get():
        raise PretrainError(
            f"{repo!r} is neither a folder nor a model that has been fetched: nothing is asked of the hub before a run"
        )
    try:
        import huggingface_hub

        return huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=SECONDS)
    except Exception as error:  # of the network, of the hub, or a package that is not there
        raise _unavailable(repo, error) from error


def _download(repo: str, revision: str, folder: Path, patterns: tuple[str, ...]) -> None:
    try:
        import huggingface_hub

        huggingface_hub.snapshot_download(
            repo, revision=revision, local_dir=folder, allow_patterns=list(patterns), ignore_patterns=["*/*"]
        )
    except Exception as error:
        raise _unavailable(repo, error) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes
    for path in [p for p in folder.rglob("*") if p.is_file() and not any(p.match(pattern) for pattern in patterns)]:
        path.unlink()


def _unavailable(repo: str, error: Exception) -> PretrainError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    folder = f"models/{repo.rpartition('/')[2]}"
    files = " ".join(f"'{pattern}'" for pattern in (*WEIGHTS, *SMALL))
    return PretrainError(
        f"the hub has not given {repo!r} ({reason}); where there is a network: hf download {repo} --include {files} "
        f"--local-dir {folder}, and then {folder} in its place"
    )
