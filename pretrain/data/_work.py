"""Where an operation keeps what an interrupted run is to find again, and what it reports.

The data stage opens a desk around its operations; an operation called alone works at a desk that is gone afterwards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.core.errors import PretrainError, warn
from pretrain.core.files import SEAL, JSONObject, read_object, sealed, write_json


@dataclass
class Desk:
    """`folder` outlives a killed run; `flops` are what such a run spent on what was found there again."""

    folder: Path
    flops: int = 0
    reports: list[dict[str, object]] = field(default_factory=list)  # one an operation, for `corpus.json`

    def kept(self, name: str, make: Callable[[], JSONObject]) -> JSONObject:
        """What `make` gives, with the `flops` that it took: found again under its name, or made and kept.

        What is damaged is made anew, with a warning.
        """
        path = self.folder / f"{name}.json"
        if path.exists():
            try:
                row = read_object(path)
                if SEAL in row and row.get("of") == name:
                    self.flops += row["flops"]
                    return row
                finding = f"{path} is not what was kept"
            except PretrainError as error:
                finding = str(error)
            warn(f"{finding}; it is made anew")
        made = make()
        write_json(path, sealed({"of": name, **made}))
        return made


_DESK: ContextVar[Desk | None] = ContextVar("desk", default=None)


@contextmanager
def working(folder: Path) -> Iterator[Desk]:
    """Let the operations called inside keep their work in `folder`."""
    desk = Desk(Path(folder))
    token = _DESK.set(desk)
    try:
        yield desk
    finally:
        _DESK.reset(token)


@contextmanager
def desk() -> Iterator[Desk]:
    """The desk of the stage that runs, or a temporary one."""
    opened = _DESK.get()
    if opened is not None:
        yield opened
        return
    with tempfile.TemporaryDirectory(prefix="pretrain-work-") as folder:
        yield Desk(Path(folder))
