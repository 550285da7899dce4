"""The files in which methods from outside may lie: those of folders, and of packages that declare an entry point."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from pretrain.core.errors import Terminated, warn

GROUP = "pretrain.methods"  # of entry points
NAME = re.compile(r"[\w-]+")  # of a method's file, and of the folders that it lies in


@dataclass(frozen=True)
class MethodFile:
    """A file from outside that may be a method."""

    path: Path
    module: str
    deep: bool  # whether it lies in a folder of the one that was named: there others lie too, and are no mistakes


@cache
def installed_files() -> list[MethodFile]:
    """The modules that installed packages declare: `name = "package.module"`, or a package of such modules."""
    files: list[MethodFile] = []
    for entry in entry_points(group=GROUP):
        try:
            spec = importlib.util.find_spec(entry.module)
        except Terminated:
            raise
        except (Exception, SystemExit) as error:  # finding a module imports the packages that it is in
            spec, reason = None, f" ({type(error).__name__}: {error})"
        else:
            reason = ""
        if spec is None or not (spec.origin or spec.submodule_search_locations):
            warn(f"entry point {entry.name} = {entry.value!r}: there is no such module{reason}")
            continue
        folders = list(map(Path, spec.submodule_search_locations or []))  # of a package, with or without `__init__.py`
        files += [file for folder in folders for file in files_below(folder, entry.module)]
        if not folders and spec.origin:
            files.append(MethodFile(Path(spec.origin), entry.module, False))
    return files


def files_below(folder: Path, package: str) -> list[MethodFile]:
    """The Python files of a folder and of those in it, links followed.

    Left out is what begins with `_` or `.`, a folder whose name no module can have, a run, a virtual environment.
    """
    files, seen = [], set[Path]()
    for here, folders, names in os.walk(folder, followlinks=True):
        place, deep = Path(here), Path(here) != folder
        if place.resolve() in seen or (deep and {"run.json", "pyvenv.cfg"} & {*names}):
            folders.clear()
            continue
        seen.add(place.resolve())
        folders[:] = sorted(name for name in folders if NAME.fullmatch(name) and not name.startswith("_"))
        inside = ".".join((package, *place.relative_to(folder).parts))
        named = [name for name in sorted(names) if name.endswith(".py") and not name.startswith(("_", "."))]
        files += [MethodFile(place / name, f"{inside}.{name[:-3]}", deep) for name in named]
    return files
