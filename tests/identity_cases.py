"""A stage that only counts its runs, and an editor of the package's code, for the tests of identity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import PlainSerializer, PlainValidator

import pretrain.stages
from pretrain import closure, engine, identity
from pretrain.core.method import InnerObjective, Method, Ref
from pretrain.core.registry import PACKAGE
from pretrain.recipe import check
from pretrain.stages import Job, Stage, build_dataclass, dump

RUNS: list[str] = []


@dataclass(frozen=True)
class Tool(Method):
    """A method that may hold another."""

    amount: int = 1
    inner: InnerObjective = None

    def held(self) -> dict[str, Any]:
        return super().held() if self.inner else {}


def build(value):
    return build_dataclass(Tool, value, "tool")


class Fake(Stage):
    stage: Literal["fake"] = "fake"
    tool: Annotated[Any, PlainValidator(build), PlainSerializer(dump)] = None
    neutral = ("speed",)
    source: Ref | None = None
    value: int = 0
    speed: int = 1
    options: dict[str, Any] = {}

    def progress(self, folder: Path) -> str:
        return "at step 3" if (folder / "half").exists() else ""

    def run(self, job: Job) -> dict[str, Any]:
        RUNS.append(job.name)
        if self.value < 0 and not (job.folder / "half").exists():
            (job.folder / "half").write_text("3 steps")
            raise OSError(28, "No space left on device", str(job.folder / "big"))
        (job.folder / "out").write_text(str(len(RUNS)))
        return {"metrics": {"resumed": float((job.folder / "half").exists())}}


@pytest.fixture
def fake_stages(monkeypatch):
    RUNS.clear()
    known = pretrain.stages.stage_classes() | {"fake": Fake}
    monkeypatch.setattr("pretrain.recipe.stage_classes", lambda: known)


@pytest.fixture
def edited(monkeypatch):
    """`edited("training/loop.py", old, new)`: from here on the package's file reads so."""
    changes: dict[Path, tuple[str, str]] = {}
    really = closure.read

    def read(path: Path) -> bytes:
        old, new = changes.get(path, ("", ""))
        return really(path).replace(old.encode(), new.encode())

    def edit(name: str, old: str, new: str) -> None:
        path = PACKAGE / name if not name.startswith("/") else Path(name)
        assert old.encode() in really(path)
        changes[path] = (old, new)
        forget()

    def forget() -> None:
        closure.parse.cache_clear()
        closure._fingerprint.cache_clear()

    monkeypatch.setattr(closure, "read", read)
    yield edit
    changes.clear()
    forget()


def raw(**first):
    stages = [
        {"stage": "fake", "name": "a"} | first, {"stage": "fake", "name": "b", "source": "a"},
        {"stage": "fake", "name": "c", "value": 7},
    ]  # fmt: skip
    return {"name": "r", "stages": stages}


def go(tmp_path, refresh=(), **first):
    RUNS.clear()
    said: list[str] = []
    engine.run(check(raw(**first), output=tmp_path / "run"), say=said.append, report=False, refresh=refresh)
    return said


def reasons(tmp_path, refresh=(), **first):
    planned = identity.plan(check(raw(**first), output=tmp_path / "run"), refresh=refresh)
    return {item.stage.name: identity.why(item) for item in planned}
