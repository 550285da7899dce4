"""`pretrain runs`: list runs, show one, compare some, clean what none shows any more."""

from __future__ import annotations

import shutil
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import typer

from pretrain.core.errors import PretrainError
from pretrain.core.files import read_json
from pretrain.core.folders import run_of
from pretrain.core.foreign.paths import expanded
from pretrain.core.quick.quantities import counted, duration, figure, short
from pretrain.core.system.console import App
from pretrain.records import StageRecord, Status, read_stage
from pretrain.runs.shelf import (
    REMOVED,
    RUNS,
    Run,
    find_runs,
    hold,
    measured_on,
    open_run,
    remove,
    size_of,
    stored,
    unused,
)

app = App(name="runs", help="Runs: what is there, what they made, what they take, what can go.", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where runs lie.")]
WIDTH, NARROWEST = 80, 10  # characters: of a line where no terminal tells its own, of a column
COUNTS = (
    "tokens",
    "steps",
    "flops",
    "seconds",
    "skipped_steps",
    "skipped_at_end",
    "texts_read",
    "texts_cut",
    "best_step",
    "documents",
    "unlearnt",
)
MAIN = (
    "bits_per_byte",
    "f1",
    "accuracy",
    "mse",
    "exact_match",
    "ndcg@10",
    "probe_accuracy",
    "loss",
)  # the first there is
SHOWN, MOST = 4, 12  # metrics of a run that a list names, of a stage that is shown


@app.command("list")
def list_runs(folder: Folder = RUNS) -> None:
    """The runs of a folder, the newest last, with what they take."""
    runs = find_runs(folder, damaged=lambda error: typer.echo(f"warning: {error}; its run is left out", err=True))
    if not runs:
        raise PretrainError(f"{folder}: no run there; accepted: a folder in which `pretrain run` has written")
    rows: list[tuple[str, ...]] = [("run", "status", "stages", "finished", "time", "FLOPs", "size", "last measured")]
    for run in runs:
        done = f"{len(run.records)} of {len(run.stages)}"
        size = short(size_of(run.folder, *run.stages.values()), "B")
        spent = (duration(run.total("seconds")), short(run.total("flops")))
        rows.append((str(run.folder), run.status, done, _when(run.finished), *spent, size, _metrics(run)))
    _table(rows)
    typer.echo(f"{counted(len(runs), 'run')}, {short(size_of(*(home for run in runs for home in run.homes)), 'B')}")


@app.command("show")
def show(run: Annotated[Path, typer.Argument(help="A run, or what was printed of it.")]) -> None:
    """A run's stages by names that stay, and the results that it has beside those it shows."""
    shown = open_run(run_of(run))
    typer.echo(f"{shown.folder}: {shown.status}, {short(size_of(*shown.homes), 'B')}")
    recipe = read_json(shown.folder / "run.json").get("recipe")
    typer.echo(f"recipe: {recipe or 'none of a file'}, as it was run: {shown.folder / 'recipe.yaml'}\n")
    rows: list[tuple[str, ...]] = [("stage", "kind", "status", "name that stays", "time", "FLOPs", "size", "measured")]
    for name, folder in shown.stages.items():
        record = shown.records.get(name)
        kind, _, address = folder.name.rpartition("-")
        kind = record["stage"] if record else kind
        taken = shown.spent(name)
        spent = (duration(taken["seconds"]), short(taken.get("flops", 0.0))) if "seconds" in taken else ("", "")
        measured = _measured(record, MOST) if record else ""
        if "step" in taken:  # a training that was interrupted, or is under way: what it has counted, over all its parts
            measured = f"so far: step {taken['step']:,.0f}, tokens {figure(taken.get('tokens', 0))}"
        stable = f"{shown.folder / name}@{address}" if record else ""
        size = short(size_of(folder), "B")
        rows.append((name, kind, shown.statuses[name], stable, *spent, size, measured))
    _table(rows)
    for row in read_json(shown.folder / "run.json")["stages"]:
        if shown.statuses[row["name"]] == Status.FAILED and row.get("error"):
            typer.echo(f"\n{row['name']} failed: {row['error']}")
    others = [path for path in stored(shown.folder) if path.resolve() not in _resolved(shown)]
    if others:
        typer.echo("\nbeside these:")
    for path in others:
        _beside(shown, path)


def _resolved(run: Run) -> set[Path]:
    return {folder.resolve() for folder in run.stages.values()}


def _beside(run: Run, path: Path) -> None:
    """A line for a result that the run does not show: how it differs from the one it shows."""
    from pretrain.runs.targets import differences

    size = short(size_of(path), "B")
    if not (path / "stage.json").exists():
        typer.echo(f"  {path}  {size}  {Status.INTERRUPTED}")
        return
    record = read_stage(path / "stage.json")
    now = run.records.get(record["name"])
    unlike = "the run has no stage of its name"
    if record["name"] in run.stages:
        unlike = "with other settings than those of now, which are not finished"
    changes = ", ".join(differences(record, now)) if now else unlike
    stable = f"{run.folder / record['name']}@{path.name.rpartition('-')[2]}"
    typer.echo(f"  {stable}  {size}  finished {_when(record['finished'])}: {changes or 'asked again'}")


@app.command("compare")
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Runs, recipes that have been run, or folders of `compare`.")],
) -> None:
    """How runs differ: in what came of them, in what they took, and in what their recipes say."""
    from pretrain.runs.comparison import tables

    if len(runs) < 2:
        raise PretrainError(f"runs compare: {counted(len(runs), 'run')} given; accepted: two or more")
    for number, rows in enumerate(tables(runs)):
        if number:
            typer.echo("")
        _table(rows, fit=sys.stdout.isatty())


@app.command("clean")
def clean(
    runs: Annotated[list[Path], typer.Argument(help="Runs, or stores that runs share.")],
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing.")] = False,
    among: Annotated[
        list[Path] | None, typer.Option(metavar="FOLDER", help="Where else runs lie that may take from these.")
    ] = None,
) -> None:
    """Remove results that no run shows, was made of or names; what would go is listed, with sizes, before it goes."""
    going: list[Path] = []
    for place in runs:
        home = expanded(place) if (expanded(place) / ".runs").exists() else run_of(place)
        for left in home.glob(f"{REMOVED}*"):  # which were listed before that
            typer.echo(f"goes   {short(size_of(left), 'B'):>9}  {left}  (an interrupted removal has left it)")
        remove(home)
        roots = [root for root in dict.fromkeys([RUNS, home.parent, *(among or [])]) if root.is_dir()]
        going, kept, known = unused(home, roots)
        for folder, reason in kept.items():
            typer.echo(f"stays  {short(size_of(folder), 'B'):>9}  {home / folder.name}  ({reason})")
        for folder in going:
            typer.echo(f"goes   {short(size_of(folder), 'B'):>9}  {home / folder.name}  ({_what(folder)})")
        if not going:
            typer.echo(f"{home}: nothing to remove")
            continue
        freed = short(size_of(*going), "B")
        if not yes and not sys.stdin.isatty():
            typer.echo(f"{home}: nothing is removed without --yes, which frees {freed}")
            continue
        if yes or typer.confirm(f"Remove {len(going)} from {home} ({freed})?"):
            with hold(known, home):
                remove(home, [folder for folder in unused(home, roots)[0] if folder in going])
            typer.echo(f"{home}: {freed} freed")


def _what(folder: Path) -> str:
    if not (folder / "stage.json").exists():
        return Status.INTERRUPTED
    record = read_stage(folder / "stage.json")
    return f"{record['name']}, finished {_when(record['finished'])}"


def _metrics(run: Run) -> str:
    """What says most of how good a run's model is, where it was measured: bits per byte, or what its labels have."""
    if run.judged is None:
        return ""
    metrics, split = run.judged["metrics"], measured_on(run.judged)
    name = next((each for each in MAIN if each in metrics), None)
    if name is None:
        return f"{run.judged['name']}: {_measured(run.judged)}"
    return f"{run.judged['name']}: {f'on {split}: ' if split else ''}{name} {figure(metrics[name])}"


def _measured(record: StageRecord, most: int = SHOWN) -> str:
    """What a stage has measured, with the split that it was measured on; what it has counted stands apart."""
    split, metrics = measured_on(record), record["metrics"]
    if not split:
        return _few(metrics, most)
    counts = {name: value for name, value in metrics.items() if name in COUNTS}
    held = {name: value for name, value in metrics.items() if name not in COUNTS}
    parts = [f"on {split}: {_few(held, most)}"] if held else []
    return "; ".join([*parts, *([_few(counts, most - len(held))] if counts and len(held) < most else [])])


def _few(metrics: dict[str, float], most: int = SHOWN) -> str:
    whole_first = sorted(metrics.items(), key=lambda each: "/" in each[0])  # and then those of a domain
    return ", ".join(f"{name} {figure(value)}" for name, value in whole_first[:most])


def _when(moment: str) -> str:
    return moment[:16].replace("T", " ")


def _table(rows: list[tuple[str, ...]], fit: bool = False) -> None:
    """Plain columns, as wide as they must be, since names are to be copied whole; to `fit` the terminal, cells wrap."""
    columns = max(map(len, rows))
    rows = [(*row, *[""] * (columns - len(row))) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(columns)]
    room = shutil.get_terminal_size((WIDTH, 24)).columns - 2 * (columns - 1)
    while fit and sum(widths) > room and max(widths) > NARROWEST:
        widths[widths.index(max(widths))] -= 1
    for row in rows:
        cells = [(textwrap.wrap(cell, width) if fit else []) or [cell] for cell, width in zip(row, widths, strict=True)]
        for line in zip_longest(*cells, fillvalue=""):
            typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
