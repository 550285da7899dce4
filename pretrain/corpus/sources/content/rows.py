"""The documents that rows with columns are: those of tables, and of data sets of the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pretrain.core.errors import PretrainError
from pretrain.corpus.sources._containers import Row, no_column
from pretrain.corpus.sources._files import Document, Wrong, given, name_of
from pretrain.corpus.sources._skipped import Skipped
from pretrain.corpus.sources._tables import is_number
from pretrain.corpus.sources.content.chat import exchanges, is_chat, turns_of, written

OnError = Literal["stop", "skip"]
Conversations = Literal["answers", "whole"]


@dataclass(frozen=True)
class Columns:
    """How rows are read: the fields of a source of these names."""

    text: str
    domain: str | None
    conversations: Conversations
    required: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    otherwise: str = ""  # what else is accepted where rows have no such column


def wrong_of(on_error: OnError, skipped: Skipped) -> Wrong:
    """What is done with what cannot be read."""

    def wrong(where: str, what: str, reason: str, accepted: str) -> None:
        if on_error == "stop":
            raise PretrainError(f"{where}: {what}; accepted: {accepted}, or on_error: skip")
        skipped.add(reason, name_of(where))

    return wrong


def documents_of(rows: Iterator[Row], name: str, columns: Columns, skipped: Skipped, wrong: Wrong) -> Iterator[Row]:
    """Documents from rows with columns, each with where it stands."""
    for where, row in rows:
        column = columns.text
        if column not in row and column.isdecimal() and int(column) < len(row):  # a column by its number
            column = list(row)[int(column)]
        if column not in row:
            names = ", ".join(sorted(row)) or "an object with columns"
            accepted = f"{names}{columns.otherwise}"
            wrong(where, no_column(column, row), f"rows without the column {column!r}", accepted)
            continue
        text = row[column]
        if not given(row, column):
            skipped.add("empty", name_of(where))
            continue
        absent = next((name for name in columns.required if not given(row, name)), None)
        if absent is not None:
            skipped.add(f"rows without {absent}", name_of(where))
            continue
        if not _of_numbers(row, columns.numbers, where, wrong):
            continue
        place = name_of(where)
        if is_chat(text):
            answers = list(_answers(text, columns, row, name, place))
            if not answers:
                skipped.add("conversations without an answer", name_of(where))
            yield from ((where, answer) for answer in answers)
            continue
        if not isinstance(text, str):
            wrong(where, f"column {column!r} is {type(text).__name__}, not text", "rows without text", "text")
            continue
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a character, as broken JSON holds
            skipped.add("not UTF-8", name_of(where))
            continue
        rest = {k: v for k, v in row.items() if k not in (column, "text", "domain", "id")}
        facts = {"text": text, "domain": _domain(columns, row, name), "id": str(row.get("id", place))}
        yield where, facts | rest


def counted_rows(rows: Iterator[Row], skipped: Skipped) -> Iterator[Row]:
    """The rows, which are counted."""
    for row in rows:
        skipped.rows += 1
        yield row


def _of_numbers(row: Document, columns: tuple[str, ...], where: str, wrong: Wrong) -> bool:
    """Whether a row has a number in each of some columns; it is told where not."""
    odd = next((name for name in columns if not is_number(row.get(name))), None)
    if odd is not None:
        what = f"column {odd!r} holds {row[odd]!r}, no number" if odd in row else no_column(odd, row)
        wrong(where, what, f"rows without a number in {odd}", "numbers")
    return odd is None


def _domain(columns: Columns, row: Document, name: str) -> str:
    """The domain of a row: the source's, the row's, or that of its file."""
    if columns.domain is not None and columns.domain not in row:
        return columns.domain
    return str(row.get(columns.domain or "domain") or _stem(name))


@lru_cache(maxsize=64)
def _stem(name: str) -> str:
    return Path(name).name.split(".")[0]


def _answers(chat: list[object], columns: Columns, row: Document, name: str, place: str) -> Iterator[Document]:
    """The documents of a conversation; all of one conversation lie on one side of the split."""
    known, domain = str(row.get("id", place)), _domain(columns, row, name)
    turns, answers = turns_of(chat) or [], list(exchanges(chat))
    if columns.conversations == "whole":
        if answers:
            messages = [{"role": role, "content": words} for role, words in turns]
            yield {"text": written(turns), "messages": messages, "domain": domain, "id": known}
        return
    for number, (text, answer) in enumerate(answers):
        yield {"text": text, "target": answer, "domain": domain, "id": f"{known}:{number}", "group": known}
