"""Whether the columns and the task that the user names go together: each is refused, or told, where it cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pretrain.core.errors import PretrainError
from pretrain.new.tables import MOST_CLASSES, OWN, Table

WANTED = {"classify": ("classify", "tag"), "regress": ("regress",), "chat": ("chat",)}  # kinds of tables
HOLDS = {"classify": "labels", "regress": "numbers", "tag": "a tag for each word", "chat": "texts, nearly each another"}
ACCEPTED = {"classify": "whose values come again", "regress": "of numbers", "chat": "of answers"}
FEWEST = 8  # rows that tell whether values come again


def may_be_classes(table: Table) -> bool:
    """Whether its numbers are few enough for classes, and come again."""
    rows = sum(count for _, count in table.counts)
    return table.classes <= MOST_CLASSES and (rows < FEWEST or table.classes <= OWN * rows)


def as_asked(table: Table, task: str | None, name: str, label: str | None = None) -> Table:
    """A table as the task takes it: labels that are numbers for classes, or for a quantity.

    `label` is the column that the user names. Raises `PretrainError` where the task cannot learn it.
    """
    if task == "regress" and table.kind == "classify" and table.numeric:
        return replace(table, kind="regress")
    if task == "classify" and table.kind == "regress":
        if not may_be_classes(table):
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


def unread(table: Table | None, task: str, place: str, columns: Mapping[str, str | None]) -> str:
    """What is told of a column that the task does not read; raises `PretrainError` for columns of what is no table."""
    given = {option: column for option, column in columns.items() if column is not None}
    if table is None and given:
        option, column = next(iter(given.items()))
        raise PretrainError(f"--{option} {column!r}: {place} is no table, which has columns; accepted: a table")
    if task in WANTED:
        return ""
    idle = " and ".join(f"--{option} {column}" for option, column in given.items() if option != "text")
    return f"--task {task} learns of the texts alone: {idle} changes nothing" if idle else ""
