"""A recipe for what lies in a folder: looked at, checked against what is asked for, written, and told."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import typer

from pretrain.core.errors import PretrainError, nearest, unknown
from pretrain.core.files import output_file, write_text
from pretrain.core.foreign.paths import expanded
from pretrain.core.quick.quantities import WIDE, quantity
from pretrain.corpus.payload import belongs
from pretrain.new import TASKS
from pretrain.new.fitting import fitted
from pretrain.new.look import Look, look
from pretrain.new.plans import Asked
from pretrain.new.start import Start, start_of
from pretrain.new.tables import MOST_CLASSES, OWN, Table
from pretrain.new.words import contents, labels, looked_at, uneven_labels, unused

NAMED, HEAD = re.compile(r"^name: *['\"]?([\w.-]+)", re.M), 10_000  # of a recipe, in so many bytes
BEGIN = {"continue": "goes on with", "chat": "tunes", "compress": "makes smaller"}
HEADS = {"continue": ("causal", "masked", "seq2seq"), "chat": ("causal", "seq2seq"), "compress": ("causal", "masked")}
WANTED = {"classify": ("classify", "tag"), "regress": ("regress",), "chat": ("chat",)}  # kinds of tables
HOLDS = {"classify": "labels", "regress": "numbers", "tag": "a tag for each word", "chat": "texts, nearly each another"}
ACCEPTED = {"classify": "whose values come again", "regress": "of numbers", "chat": "of answers"}
FEWEST = 8  # rows that tell whether values come again
LABELLED = ("classify", "regress")
LACKING = {"classify": "texts with labels", "regress": "texts with numbers", "chat": "conversations or answers"}


@dataclass(frozen=True)
class Columns:
    """The columns of a table that the user names."""

    text: str | None = None
    label: str | None = None
    pair: str | None = None


def write(
    place: str,
    columns: Columns = Columns(),
    *,
    task: str | None = None,
    init: str | None = None,
    output: Path | None = None,
    budget: str | None = None,
    force: bool = False,
) -> None:
    """Look at what is there, write a recipe for it, and say what was seen, guessed and left out."""
    if task is not None and task not in TASKS:
        raise unknown("task", task, TASKS)
    path = expanded(place)
    target = output or Path(f"{name_of(path)}.yaml")
    if not path.exists() and not re.search(r"[*?\[]|://", place):
        raise PretrainError(_absent(place, path))
    seconds = None if budget is None else _seconds(budget)
    seen = look(place, **asdict(columns), table=task in WANTED)
    chosen = task or _guess(seen, init)
    seen = _settled(seen, place, columns) if chosen in LABELLED else seen
    if seen.table is not None:
        seen = replace(seen, table=_as_asked(seen.table, task, seen.place, columns.label))
    if seen.table is not None and seen.table.commas:
        seen = replace(seen, table=_without_commas(seen.table, chosen, seen.place))
    start = None if init is None else start_of(init)
    if start is not None and start.held is not None and seen.table is None:
        seen = replace(seen, share=min(filter(None, start.held)))
    _check(seen, chosen, start, guessed=task is None)
    idle = _unread(seen.table, chosen, place, asdict(columns))
    name = free_name(target)
    asked = Asked(name, seen, chosen, start if chosen != "pretrain" else None, seconds)
    file = _free(target, force and not (target.exists() and path.exists() and target.samefile(path)))
    text_of, odd = fitted(asked, str(target))
    write_text(file, text_of)
    _say(asked, target, task is None, odd)
    if idle:
        typer.echo(idle)
    if budget is not None and "seconds" not in (budgets := _budgets(text_of)) and budgets == _unasked(asked):
        enough = (
            "more passes over the text than the recipe's teach little" if "budget:" in text_of else "nothing is trained"
        )
        typer.echo(f"--budget {budget} changes nothing: {enough}")
    if name != run_name(target):
        typer.echo(f"its name is {name}: runs/{run_name(target)} is the run of another recipe")
    typer.echo(f"wrote {target}; next: pretrain run {target} --dry-run, then: pretrain run {target}")


def _budgets(text: str) -> str:
    lines = text.splitlines()
    return " ".join(line.partition("#")[0].strip() for line in lines if line.lstrip().startswith("budget:"))


def _unasked(asked: Asked) -> str:
    """The budgets that the recipe has where none is asked for."""
    return _budgets(fitted(replace(asked, seconds=None), asked.name)[0])


def name_of(path: Path) -> str:
    """A recipe's name, from a folder's or a file's."""
    stem = path.absolute().name.split(".")[0] if not path.is_dir() else path.resolve().name
    return re.sub(r"[^\w-]+", "-", stem).strip("-") or "mine"


def run_name(target: Path) -> str:
    """The name of a recipe, and of its run's folder, from that of its file: all of it but `.yaml`."""
    return re.sub(r"[^\w-]+", "-", re.sub(r"\.ya?ml$", "", target.name)).strip("-") or "mine"


def free_name(target: Path) -> str:
    """A name that no other recipe beside it has, and no other run: two recipes of a name would share a folder."""
    name = run_name(target)
    if target.exists():  # written over: its run goes on
        return name
    beside = [path for path in sorted(target.absolute().parent.glob("*.y*ml")) if path.is_file()]
    taken = {
        match[1] for path in beside if (match := NAMED.search(path.read_bytes()[:HEAD].decode("utf-8", "replace")))
    }
    taken |= {path.stem for path in beside}
    names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    return next(each for each in names if each not in taken and not (Path("runs") / each / "run.json").exists())


def _free(target: Path, force: bool) -> Path:
    """Where the recipe is written; what is there is written over if that is asked for."""
    taken = f"{target} exists; accepted: a name that is free, with --output, or --force to write over it"
    return output_file(target, force, taken)


def _absent(place: str, path: Path) -> str:
    """What is said of a path at which nothing lies."""
    folder = path.parent
    while not folder.is_dir():
        path, folder = folder, folder.parent
    names = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    there = f" ({folder}: {some})" if names else ""
    return (
        f"{place!r}: no such file or folder{nearest(path.name, names)}{there}; accepted: one to learn from, or "
        "--starter with a name for a recipe to be edited"
    )


def write_starter(name: str, output: Path | None, force: bool, others: tuple[object, ...]) -> None:
    """A recipe of no folder, to be edited."""
    if any(others) or not re.fullmatch(r"[\w-]+(\.ya?ml)?", name):
        raise PretrainError(
            f"--starter {name!r}: accepted: a name of letters and digits, and at most --output, --force"
        )
    target = output or Path(f"{Path(name).stem}.yaml")
    place = _free(target, force)
    starter = Path(__file__).parents[1].joinpath("starter.yaml").read_text(encoding="utf-8")
    write_text(place, starter.replace("NAME", target.stem))
    typer.echo(f"wrote {target}, a starter: edit it, then: pretrain run {target}")


def _seconds(budget: str) -> float:
    value = quantity(budget.strip(), duration=True) if not re.fullmatch(r"[\d.]+\s?[kMBGTPE]", budget.strip()) else None
    if value is None or value <= 0:
        raise PretrainError(f"--budget {budget!r}: accepted: a time, 30min or 2h")
    return float(value)


def _guess(seen: Look, init: str | None) -> str:
    kind = seen.table.kind if seen.table else ""
    task = next((task for task, kinds in WANTED.items() if kind in kinds), None)
    if task is not None:
        return task
    return "continue" if init is not None and seen.kind != "images" else "pretrain"


def _settled(seen: Look, place: str, columns: Columns) -> Look:
    """With the label that the user chooses, on a terminal and where several columns may be it."""
    table = seen.table
    if (
        table is None
        or not table.doubts
        or columns.label is not None
        or not (sys.stdin.isatty() and sys.stdout.isatty())
    ):
        return seen
    candidates = [str(table.label), *table.doubts]
    answer = typer.prompt(f"which column is the label: {', '.join(candidates)}", default=table.label)
    if answer not in table.columns:
        raise unknown("column", answer, table.columns)
    return look(place, text=columns.text, label=answer, pair=columns.pair, table=True)


def _may_be_classes(table: Table) -> bool:
    """Whether its numbers are few enough for classes, and come again."""
    rows = sum(count for _, count in table.counts)
    return table.classes <= MOST_CLASSES and (rows < FEWEST or table.classes <= OWN * rows)


def _as_asked(table: Table, task: str | None, name: str, label: str | None = None) -> Table:
    """A table as the task takes it: labels that are numbers for classes, or for a quantity.

    `label` is the column that the user names. Raises `PretrainError` where the task cannot learn it.
    """
    if task == "regress" and table.kind == "classify" and table.numeric:
        return replace(table, kind="regress")
    if task == "classify" and table.kind == "regress":
        if not _may_be_classes(table):
            raise PretrainError(
                f"--task classify: {name} has {table.classes:,} different numbers in {table.label!r}; accepted: "
                f"--task regress, or a column of at most {MOST_CLASSES} labels that come again"
            )
        return replace(table, kind="classify")
    if label is not None and task in WANTED and table.kind in HOLDS and table.kind not in WANTED[task]:
        other = next(each for each, kinds in WANTED.items() if table.kind in kinds)
        columns = ", ".join(table.candidates) if task == "classify" else ""
        different = f" ({table.classes:,} different values)" if table.classes else ""
        raise PretrainError(
            f"--task {task}: --label {label!r} holds {HOLDS[table.kind]}{different}; accepted: "
            f"--task {other}, or a column {ACCEPTED[task]}{f' ({columns})' if columns else ''}"
        )
    return table


def _without_commas(table: Table, task: str, name: str) -> Table:
    """A table whose numbers have commas, for its texts alone; raises `PretrainError` where they are learnt."""
    if task in LABELLED:
        raise PretrainError(
            f"{name}: the numbers in {table.label!r} have commas ({table.commas}); accepted: a decimal point, and "
            "nothing between thousands (1234.5)"
        )
    faults = tuple(fault for fault in table.faults if not fault.field.startswith("required"))
    return replace(table, kind="prose", label=None, numeric=False, counts=(), faults=faults, odd=(), doubts=())


def _unread(table: Table | None, task: str, place: str, columns: Mapping[str, str | None]) -> str:
    """What is told of a column that the task does not read; raises `PretrainError` for columns of what is no table."""
    given = {option: column for option, column in columns.items() if column is not None}
    if table is None and given:
        option, column = next(iter(given.items()))
        raise PretrainError(f"--{option} {column!r}: {place} is no table, which has columns; accepted: a table")
    if task in WANTED:
        return ""
    idle = " and ".join(f"--{option} {column}" for option, column in given.items() if option != "text")
    return f"--task {task} learns of the texts alone: {idle} changes nothing" if idle else ""


def _check(seen: Look, task: str, init: Start | None, guessed: bool) -> None:
    """Refuse what no recipe can do."""
    table, place = seen.table, seen.place
    kind = table.kind if table else ""
    if task in BEGIN and init is None:
        why = f"{place} holds {contents(seen)}. {task}" if guessed else f"--task {task}"
        raise PretrainError(
            f"{why} {BEGIN[task]} a checkpoint; accepted: --init with its folder, a run, or its name on the hub "
            "(--init HuggingFaceTB/SmolLM2-135M)"
        )
    if task not in WANTED and table is not None and table.talk:
        raise PretrainError(f"--task {task}: {place} holds conversations; accepted: --task chat, or a column of texts")
    if seen.kind == "images" and task != "pretrain":
        raise PretrainError(
            f"--task {task}: {place} holds images; accepted: --task pretrain, which probes their labels"
        )
    if task in WANTED and kind not in WANTED[task]:
        has = f"; its columns: {', '.join(table.columns)}" if table else ""
        raise PretrainError(
            f"--task {task}: {place} holds no {LACKING[task]}{has}; accepted: a table of them, or --label"
        )
    if task in HEADS and init is not None and (init.kind not in HEADS[task] or init.family is None):
        raise PretrainError(
            f"--init {init.name!r} is a {init.config.get('model_type')} ({init.kind}); accepted for {task}: "
            f"{' or '.join(HEADS[task])} language models"
        )


def _say(asked: Asked, target: Path, guessed: bool, odd: Sequence[str]) -> None:
    seen, table = asked.look, asked.look.table
    typer.echo(f"{seen.place}: {contents(seen)}" + (f"; passed over: {seen.over}" if seen.over else ""))
    notes = []
    if guessed:
        notes.append(f"guessed --task {asked.task}")
    if table is not None and table.numeric and guessed and asked.task in LABELLED:
        taken, other = ("classes", "regress") if asked.task == "classify" else ("a quantity", "classify")
        otherwise = f": else --task {other}" if other == "regress" or _may_be_classes(table) else ""
        notes.append(f"the numbers in {table.label} are taken for {taken}{otherwise}")
    if table is not None and asked.task == "regress" and table.decades >= WIDE:
        notes.append(
            f"the numbers in {table.label} span {table.decades:.1f} decades: their logarithms are learnt (log)"
        )
    if table is not None and table.kind == "tag" and not guessed and asked.task == "classify":
        notes.append(f"{table.label} has a tag for each word, so --task classify gives each word one (tagging)")
    if table is not None and table.doubts and asked.task in LABELLED:
        notes.append(f"the label may as well be {' or '.join(table.doubts)}: --label")
    if table is not None and table.rare and asked.task == "classify":
        some = ", ".join(map(repr, table.rare[:3])) + (", …" if len(table.rare) > 3 else "")
        notes.append(
            f"a single row{looked_at(table)} has the label {some}: too few to learn it and to measure it; merge or "
            "drop such rows"
        )
    if table is not None and (table.unread or table.beside):
        notes.append(f"not read: {unused(table)}")
    if seen.others:
        notes.append(f"of {len(seen.others) + 1} tables the largest: {seen.files[0]}")
    if seen.undecoded:
        first, more = seen.undecoded[0], len(seen.undecoded) - 1
        notes.append(f"not UTF-8, so left out (on_error: skip): {first}" + (f" and {more:,} more" if more else ""))
    if not seen.share:
        notes.append("too few documents to hold any out, so nothing is measured")
    if asked.tuned is not None and asked.tuned.warning:
        notes.append(asked.tuned.warning)
    if notes:
        typer.echo("; ".join(notes))
    if table is not None and asked.task == "classify" and table.counts:
        typer.echo(labels(table))
        if skewed := uneven_labels(table):
            typer.echo(skewed)
    for fault in table.left_out if table is not None else ():
        typer.echo(f"{fault}" + (f"; left out by {fault.field}" if fault.field else ""))
    if table is not None and asked.task in LABELLED:
        kept = "all are kept" if belongs(str(table.label)) else "the first of each text is kept"
        for fault in table.contradicting:
            typer.echo(f"{fault}: {kept}; settle which is right")
    for line in odd:
        typer.echo(f"warning: {line}")
