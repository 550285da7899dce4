"""Which result a path of a recipe means: `init: runs/base/model` is a link, and another `--set` lets it show another.

A stage's record keeps what each such path led to. When it leads elsewhere, that is said before anything runs, with what
differs between the two and the name, `runs/base/model@ADDRESS`, that means the earlier one whatever the link shows.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.folders import stage_at, stage_folders
from pretrain.core.system.portable import link_target
from pretrain.identity import Planned, field_changes, flat, newest, shortened
from pretrain.records import StageRecord, Target, code_changes, read_stage


def targets(item: Planned) -> list[Target]:
    """The finished results that a stage takes from paths of its recipe."""
    rows: list[Target] = []
    for place, value in item.stage.references().items():
        folders = item.inputs[place]
        names, paths = (value, folders) if isinstance(folders, list) else ([value], [folders])
        for name, path in zip(names, paths, strict=True):
            at = None if name in item.behind else stage_at(path)
            if at is not None and "address" in at[1]:
                rows.append({"place": place, "name": str(name), "folder": str(at[0]), "address": at[1]["address"]})
    return rows


def repointed(item: Planned) -> list[str]:
    """A line for each path of a stage that leads to another result than when a stage of its name was last finished.

    Of a stage that has not been run there is no earlier one: then where a path leads is said if its run has other
    results that it might have meant.
    """
    last = newest(item)
    before = {(row["place"], row["name"]): row for row in last[1].get("targets", [])} if last else {}
    lines = []
    if last and not item.finished and (then := last[1].get("identity")):
        lines += [f"warning: {line} since {last[0].name} was made" for line in code_changes(then, item.reads)]
    for now in targets(item):
        row = before.get((now["place"], now["name"]))
        if last is None or row is None or row["address"] == now["address"]:
            lines += [] if item.finished else _choice(now)
            continue
        kept = Path(row["folder"])
        known = _differences(_record(kept), _record(Path(now["folder"])))
        there = (kept / "stage.json").exists()
        again = f"; {_stable(now['name'], row['address'])} is the earlier one" if there else ", which is gone"
        lines.append(
            f"warning: {now['place']} {now['name']} leads to {Path(now['folder']).name} now, and led to "
            f"{kept.name} when {last[0].name} was made{known}{again}"
        )
    return lines


def _choice(target: Target) -> list[str]:
    """That a link leads to the newest of several results, if it does."""
    folder = Path(target["folder"])
    record = _record(folder)
    if record is None or "@" in target["name"] or folder.name in target["name"]:
        return []  # which was named by its address
    named = {path: other["name"] for path in results(folder.parent) if (other := _record(path))}
    others = [path for path, name in named.items() if path != folder and name == record["name"]]
    if not others:
        return []
    known = _differences(_record(others[-1]), record)
    return [
        f"{target['place']} {target['name']} leads to {folder.name}, one of {len(others) + 1} results of its name; "
        f"the one before is {others[-1].name}{known}; {_stable(target['name'], target['address'])} is this one always"
    ]


def results(home: Path) -> list[Path]:
    """The folders of finished stages in a run or a store, the oldest first."""
    paths = [path for path in home.glob("*-*/stage.json") if link_target(path.parent) is None]
    return [path.parent for path in sorted(paths, key=lambda path: path.stat().st_mtime)]


def _record(folder: Path) -> StageRecord | None:
    """What a finished stage records; `None` where it is gone, or damaged: what is said of it here is a note."""
    with suppress(PretrainError):
        return read_stage(folder / "stage.json")
    return None


def _stable(name: str, address: str) -> str:
    """The name of a result that no link changes: `runs/base/model/checkpoint` of an address, `runs/base/model@…`."""
    path = Path(name)
    home = path.parent if path.name in ("checkpoint", "corpus", "tokenizer", "processor") else path
    return f"{str(home).partition('@')[0]}@{address[:12]}"


def differences(before: StageRecord, after: StageRecord) -> list[str]:
    """The fields and inputs in which what a recipe said of two results differs, each a phrase."""
    sides = [flat(record["config"] | {"seed": record["seed"]}) for record in (before, after)]
    changes = field_changes(*sides)
    ways = [record.get("identity", {}).get("inputs", {}) for record in (before, after)]
    return changes + [f"another {place}" for place in ways[0] if ways[1].get(place, ways[0][place]) != ways[0][place]]


def _differences(before: StageRecord | None, after: StageRecord | None) -> str:
    changes = differences(before, after) if before and after else []
    return f" ({shortened(changes)})" if changes else ""


def made(run: Path) -> list[str]:
    """What a run has made, by names that stay: of the last checkpoint and of the last export."""
    lines = []
    for what, part in (("model", "checkpoint"), ("export", "export")):
        shown = [(name, folder) for name, folder in stage_folders(run).items() if (folder / part).is_dir()]
        lines += [f"{what}: {run / name}@{folder.name.rpartition('-')[2]}" for name, folder in shown[-1:]]
    return lines
