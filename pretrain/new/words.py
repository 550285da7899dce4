"""What is said of a place, in words."""

from __future__ import annotations

import json
import re

from pretrain.core.quick.quantities import counted, short
from pretrain.new.look import Look
from pretrain.new.tables import Table

LABELS = 12  # that are told with their rows
UNEVEN = 0.8  # of the rows, from which on one label is said to have nearly all
COLUMNS = 8  # that are told by their names
RESERVED = ("yes", "no", "on", "off", "true", "false", "null", "y", "n", "~")
PAIRED = ("classify", "regress")  # kinds of tables that may have two texts a row


def contents(look: Look) -> str:
    """`120 files of prose in English and French, 0.8 MB`."""
    size, table = short(look.bytes, "B"), look.table
    if table is not None:
        rows = ("" if table.whole else "more than ") + counted(table.rows, "row")
        rows += " without a header" if table.header is False else ""
        return f"a table of {rows}, {size}; {columns(table.kind, look)}"
    if look.kind == "images":
        folders = f" in {counted(len(look.classes), 'folder')}, taken for their labels" if look.classes else ""
        return f"{counted(len(look.files), 'image')}{folders}, {size}"
    languages = listed(look.languages)
    return f"{counted(len(look.files), 'file')} of {look.kind}{f' in {languages}' if languages else ''}, {size}"


def columns(kind: str, look: Look) -> str:
    """What the columns of its table are taken for."""
    table = look.table
    assert table is not None
    text = f"texts in {table.text}" + (f" and {table.pair}" if table.pair else "")
    if kind == "chat":
        return f"conversations in {table.text}" if table.talk else f"prompts in {table.text}, answers in {table.label}"
    if kind == "classify":
        return f"{text}, {counted(table.classes, 'label')} in {table.label}{looked_at(table)}"
    return {"regress": f"{text}, numbers in {table.label}", "tag": f"{text}, a tag a word in {table.label}"}.get(
        kind, text
    )


def looked_at(table: Table) -> str:
    """Which rows were looked at, where these are not all."""
    return "" if table.whole else f" (of the first {table.rows:,} rows)"


def unused(table: Table) -> str:
    """The columns that no stage reads: texts, which another option would take, and others; of very many the first."""
    texts = [f"the texts in {', '.join(table.unread)} (--text takes another column)"] if table.unread else []
    more = [f", and {len(table.beside) - COLUMNS} more"] if len(table.beside) > COLUMNS else []
    second = "; --pair reads a second text" if table.unread and table.kind in PAIRED and not table.pair else ""
    return ", ".join([*texts, *table.beside[:COLUMNS]]) + "".join(more) + second


def listed(names: tuple[str, ...], most: int = 3) -> str:
    """`A, B and C`, with how many more there are."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def labels(table: Table) -> str:
    """The labels of a classifier, each with its rows; of very many the commonest and the rarest."""
    counts = [f"{name!r} {count:,}" for name, count in table.counts]
    if len(counts) > LABELS:
        counts = [*counts[: LABELS // 2], "…", *counts[-LABELS // 2 :]]
    return f"rows of each label{looked_at(table)}: {', '.join(counts)}"


def uneven_labels(table: Table) -> str:
    """What is said of labels of which one has nearly all rows; empty of others."""
    (name, most), every = table.counts[0], sum(count for _, count in table.counts)
    if most < UNEVEN * every:
        return ""
    share = f"{most / every:.0%}"
    return f"{share} of the rows are {name!r}: to say so always is as often right; macro_f1 tells more than accuracy"


def commented(words: str) -> str:
    """What others have named, for a comment: on one line whatever it holds."""
    return " ".join("".join(each if each.isprintable() else " " for each in words).split())


def quoted(word: str) -> str:
    """A word as YAML reads it back: bare where that is safe."""
    bare = re.fullmatch(r"[A-Za-z_./~][\w./~-]*", word) and word.lower() not in RESERVED
    return word if bare else json.dumps(word, ensure_ascii=False)
