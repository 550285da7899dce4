"""What the columns of a table are: a text, a label, tags, a second text, an answer, a conversation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain.core.errors import PretrainError, nearest
from pretrain.core.quick.quantities import decades
from pretrain.corpus.sources._containers import ending, reader_of
from pretrain.corpus.sources._files import Document, given, name_of
from pretrain.corpus.sources._skipped import Skipped
from pretrain.corpus.sources._tables import is_number, number
from pretrain.corpus.sources.content.chat import is_chat
from pretrain.new.faults import Broken, Fault, contradicting, headless, lacking, remedy, unnumbered, unreadable

ROWS, MUCH = 10_000, 16 << 20  # that are looked at at most, and characters of them
OWN = 0.5  # of the rows have a value that no other has: these are names, and no labels
MOST_CLASSES, MOST_RATINGS = 100, 20  # more different numbers than these, or broken ones, are a quantity
LONGEST_LABEL = 60
NUMBERS = 0.9  # of the cells of a column of numbers are such, at least
HALF = 0.5  # where the user names the column, or all other cells are blanks in words
BLANKS = ("", "-", "--", "?", "n/a", "na", "#n/a", "nan", "none", "null", "nil", "missing", "unknown", "tbd", "inf")
TEXTS = ("text", "content", "sentence", "review", "comment", "message", "body", "document", "abstract", "description",
         "question", "tweet", "title", "utterance", "headline", "input")  # fmt: skip
LABELS = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "rating", "stars", "score",
          "emotion", "tag", "type", "gold_label", "y")  # fmt: skip
# Words of the names of columns whose numbers are there to be learnt, and of those that nobody means to learn.
QUANTITIES = ("price", "value", "cost", "amount", "salary", "income", "grade", "points", "similarity", "weight", "age",
              "duration", "temperature")  # fmt: skip
BESIDES = ("id", "uuid", "index", "date", "time", "timestamp", "datetime", "year", "month", "day", "created", "updated",
           "url", "split", "fold")  # fmt: skip
COMMA = re.compile(r"[-+]?((\d{1,3}(\.\d{3})+|\d+),\d+|\d{1,3}(,\d{3})+(\.\d+)?)")  # 45,0 1.234,5 1,234.5
DATE = re.compile(r"\d{4}[-/.]\d{1,2}([-/.]\d{1,2}.*)?|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}.*|\d{1,2}:\d{2}(:\d{2})?.*")
PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text1", "text2"),
         ("text_a", "text_b"), ("sentence_a", "sentence_b"), ("question", "passage"), ("text", "query"))  # fmt: skip
SECOND = {"1": "2", "0": "1", "a": "b", "A": "B"}  # how the name of a column of second texts ends
ANSWERS = (("prompt", "response"), ("prompt", "completion"), ("prompt", "answer"), ("instruction", "output"),
           ("instruction", "response"), ("question", "answer"), ("input", "output"), ("source", "target"),
           ("article", "summary"), ("document", "summary"), ("text", "summary"), ("src", "tgt"),
           ("text", "target"))  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table, and what its first rows say of it. `kind` is classify, regress, tag, chat (pairs too) or prose."""

    columns: tuple[str, ...]
    rows: int  # that were read
    whole: bool  # whether these are all
    kind: str
    text: str
    label: str | None = None  # the column of labels, numbers, tags or answers
    pair: str | None = None  # of second texts
    more: str | None = None  # of what stands between the text and the answer
    counts: tuple[tuple[str, int], ...] = ()  # rows of each label, the commonest first
    numeric: bool = False  # whether the labels are numbers
    decades: float = 0.0  # of numbers to be learnt, all above 0: powers of ten that they span
    commas: str = ""  # one of these with a comma, which is not read as a number
    faults: tuple[Fault, ...] = ()  # rows that are left out
    odd: tuple[Fault, ...] = ()  # rows that are left out too where numbers are learnt: their label is none
    contradicting: tuple[Fault, ...] = ()  # rows of texts with more than one label
    header: bool | None = None  # False: its first row is one like the others
    doubts: tuple[str, ...] = ()  # columns that may be the label as well
    texts: tuple[str, ...] = ()  # those that were read
    unread: tuple[str, ...] = ()  # columns that hold texts as well, and are not used
    beside: tuple[str, ...] = ()  # further columns that are not used
    candidates: tuple[str, ...] = ()  # columns that hold labels
    keys: tuple[str, ...] = ()  # by which rows are put on a side of a split

    @property
    def classes(self) -> int:
        """How many labels there are."""
        return len(self.counts)

    @property
    def left_out(self) -> tuple[Fault, ...]:
        """The rows that the recipe leaves out."""
        return (*self.faults, *(self.odd if self.kind == "regress" else ()))

    @property
    def rare(self) -> tuple[str, ...]:
        """The labels that a single row has; of numbers that say how much none."""
        return tuple(sorted(name for name, count in self.counts if count == 1)) if self.kind == "classify" else ()

    @property
    def talk(self) -> bool:
        """Whether it holds whole conversations, whose answers the source gives as `target`."""
        return self.kind == "chat" and self.label == "target" and "target" not in self.columns


Rows = list[Document]
KINDS = {"prose": "texts without labels", "tag": "texts with a tag a word", "chat": "prompts with answers"}


def read_table(
    path: Path, name: str, *, text: str | None = None, label: str | None = None, pair: str | None = None,
    header: bool | None = None,
) -> Table:  # fmt: skip
    """What a table is; `text`, `label` and `pair` are columns that are known already."""
    wrong: list[Broken] = []
    placed, whole = _beginning(path, name, text or "text", wrong, header)
    rows = [row for _, row in placed]
    if not rows:
        first = f" ({': '.join(filter(None, wrong[0][:2]))})" if wrong else ""
        accepted = remedy(wrong[0]) if wrong else "rows under a header"
        raise PretrainError(f"{name}: no rows that can be read{first}; accepted: {accepted}")
    columns = tuple(dict.fromkeys(column for row in rows for column in row))
    if ending(path) in (".csv", ".tsv") and header is None:
        if not {text, label, pair} & set(columns) and headless(columns, rows):
            return read_table(path, name, text=text, label=label, pair=pair, header=False)
        header = False if columns == tuple(map(str, range(len(columns)))) else None
    for option, wanted in {"--text": text, "--label": label, "--pair": pair}.items():
        if wanted is not None and wanted not in columns:
            raise PretrainError(
                f"{option} {wanted!r}: {name} has no such column{nearest(wanted, columns)}"
                f"{', and no header, so they are numbered' if header is False else ''}; "
                f"accepted: {', '.join(columns)}"
            )
    _apart(columns, {"--text": text, "--label": label, "--pair": pair})
    table = _guessed(Table(columns, len(rows), whole, "prose", "", pair=pair, header=header), rows, name, text, label)
    texts = tuple(str(row[table.text]) for row in rows if given(row, table.text))
    groups = [str(row.get("id", name_of(where))) for where, row in placed]
    faults = [*unreadable(wrong), *lacking(placed, table.text, "without a text, passed over")]
    for column in filter(None, (table.pair, None if table.talk else table.label)):
        some = [(where, row) for where, row in placed if given(row, table.text)]
        faults += lacking(some, column, f"without a {column}", f"required: {column}")
    doubtful = (
        []
        if table.label is None or table.kind not in ("classify", "regress")
        else contradicting(placed, [table.text, *filter(None, [table.pair])], table.label)
    )
    unused = [name for name in columns if name not in (table.text, table.pair, table.label, table.more)]
    unread = tuple(name for name in unused if _is_text(rows, name))
    return replace(
        table, texts=texts, keys=tuple(dict.fromkeys(groups if table.talk else texts)), faults=tuple(faults),
        contradicting=tuple(doubtful),
        odd=tuple(unnumbered(placed, str(table.label)) if table.numeric else ()), unread=unread,
        beside=tuple(name for name in unused if name not in unread),
        candidates=tuple(name for name in columns if name != table.text and _is_label(rows, name)),
    )  # fmt: skip


def text_column(path: Path, name: str, text: str | None, known: dict[tuple[str, ...], Table]) -> Table:
    """The table with the column of its texts: `text`, or by default that of the name, else one that is guessed.

    Only as much as is needed is read; `known` are guesses of before, by the columns. Raises `PretrainError` where it
    has no such column, or none that holds texts.
    """
    reader = reader_of(path)
    assert reader is not None, "it was seen to be a table"
    row = next((row for _, row in reader(path, name, text or "text", lambda *each: None, Skipped())), {})
    columns = tuple(row)
    if (text or "text") in columns:
        return Table(columns, 0, False, "prose", text or "text")
    if columns not in known:
        known[columns] = read_table(path, name, text=text)
    return known[columns]


def _guessed(seen: Table, rows: Rows, name: str, text: str | None, label: str | None) -> Table:
    """What the columns are taken for."""
    pair, table = seen.pair, None
    for guess in (_chat, _labelled, _answered, _prose):  # the first that fits
        table = table or guess(seen, rows, text, label)
    if table is None:
        words = ", ".join(seen.columns)
        raise PretrainError(f"{name}: no column holds texts; accepted: --text with one of {words}")
    if pair is not None and table.kind not in ("classify", "regress"):
        raise PretrainError(
            f"--pair {pair!r}: {name} is taken for {KINDS[table.kind]}; accepted: a table with labels or numbers, "
            "which --label names"
        )
    if pair is not None and pair in (table.text, table.label):
        what = "the text" if pair == table.text else "the label"
        raise PretrainError(f"--pair {pair!r} is {what} already; accepted: another column, or --text and --label too")
    taken = {table.label: "the label", table.pair: "the second text"}.get("text")
    if taken is not None and table.text != "text":
        raise PretrainError(
            f"{name}: the column 'text' cannot be {taken} beside the texts in {table.text!r}, which a corpus calls by "
            "that name; accepted: another column, or the column under another name in the file"
        )
    return table


def _apart(columns: Sequence[str], asked: Mapping[str, str | None]) -> None:
    """Refuse options that name the same column."""
    for column in columns:
        options = [option for option, wanted in asked.items() if wanted == column]
        if len(options) > 1:
            others = ", ".join(name for name in columns if name != column)
            raise PretrainError(
                f"{' and '.join(options)} name the same column, {column!r}; accepted: a column each"
                f"{f' ({column}, {others})' if others else ''}"
            )


def _beginning(
    path: Path, name: str, text: str, wrong: list[Broken], header: bool | None
) -> tuple[list[tuple[str, Document]], bool]:
    """The first rows, each with where it stands, and whether these are all."""
    reader = reader_of(path, header)
    assert reader is not None, "it was seen to be a table"
    placed: list[tuple[str, Document]] = []
    size = 0
    for where, row in reader(path, name, text, lambda *each: wrong.append(each), Skipped()):
        if len(placed) >= ROWS or size > MUCH:
            return placed, False
        placed.append((where, row))
        size += sum(len(value) for value in row.values() if isinstance(value, str))
    return placed, True


def _values(rows: Rows, column: str) -> list[object]:
    return [row[column] for row in rows if given(row, column)]


def _first(names: Iterable[str], columns: Iterable[str]) -> str | None:
    """The column that has the first of some names, in whatever letters."""
    by_name = {column.lower(): column for column in columns}
    return next((by_name[name] for name in names if name in by_name), None)


def _chat(seen: Table, rows: Rows, text: str | None, label: str | None) -> Table | None:
    chats = [text] if text else seen.columns
    column = next((c for c in chats if (v := _values(rows, c)) and all(map(is_chat, v))), None)
    return None if column is None or label else replace(seen, kind="chat", text=column, label="target")


def _labelled(seen: Table, rows: Rows, text: str | None, label: str | None) -> Table | None:
    """Classes, numbers or tags beside a text."""
    pair = _pair(seen, rows, text, label)
    column = text or (pair[0] if pair else _text([name for name in seen.columns if name != label], rows))
    if column is None and label is not None and _is_text(rows, label):
        labels = ", ".join(n for n in seen.columns if _is_label(rows, n)) or "a column whose values come again"
        raise PretrainError(f"--label {label!r}: the column of texts is no label; accepted: {labels}")
    if column is None:
        return None
    others = [name for name in seen.columns if name not in (column, *(pair or ()))]
    candidates = [label] if label else [name for name in others if _is_label(rows, name)]
    named = _first(LABELS, candidates)
    if label is None and named is None and _answer(seen, rows, column) is not None:
        return None  # a text beside a text, and nothing that is called a label
    chosen = label or named or next(iter(candidates), None)
    if tagged := next((n for n in ([label] if label else others) if _is_tags(rows, column, n)), None):
        return replace(seen, kind="tag", text=column, label=tagged)
    if chosen is None:
        return None
    values = _values(rows, chosen)
    if label is not None and _is_text(rows, label) and not _is_label(rows, label):
        counts = tuple(Counter(map(str, values)).items())
        return replace(seen, kind="chat", text=column, label=label, counts=counts)  # an answer to each text
    if label is not None and _names_rows(label, values):
        different = len({str(value) for value in values})
        labels = ", ".join(name for name in seen.columns if name != column and _is_label(rows, name))
        raise PretrainError(
            f"--label {label!r}: {different:,} different values in {len(values):,} rows, so it names rows and labels "
            f"none; accepted: a column whose values come again{f' ({labels})' if labels else ''}"
        )
    numeric = _is_numeric(values, NUMBERS if label is None else HALF)
    kind = "regress" if numeric and _is_quantity(values) else "classify"
    named_all = (column, *(pair[1:] if pair else ()), chosen)
    whole = [row for row in rows if all(given(row, name) for name in named_all)]  # those that are documents
    doubts = () if label else tuple(n for n in candidates if n != chosen and (named is None or n.lower() in LABELS))
    if kind == "regress" and label is None:  # other numbers may be meant as well
        doubts += tuple(n for n in others if n not in (chosen, *doubts) and _may_be_learnt(rows, n))
    commas = next((str(value) for value in values if _has_comma(value)), "") if numeric else ""
    return replace(
        seen, kind=kind, text=column, commas=commas, pair=pair[1] if pair else None, label=chosen, doubts=doubts,
        numeric=numeric, decades=_decades(values) if kind == "regress" else 0.0,
        counts=tuple(Counter(str(row[chosen]) for row in whole).most_common()),
    )  # fmt: skip


def _pair(seen: Table, rows: Rows, text: str | None, label: str | None) -> tuple[str, str] | None:
    """The columns of first and second texts: as asked for, by names that are known, or by two that end in 1 and 2."""
    if seen.pair is not None:
        first = text or _text([name for name in seen.columns if name not in (seen.pair, label)], rows)
        return None if first is None else (first, seen.pair)
    columns = set(seen.columns) - {label}
    known = next((pair for pair in PAIRS if text in (None, pair[0]) and set(pair) <= columns), None)
    if known is not None:
        return known
    for first in seen.columns if text is None else [text]:
        second = first[:-1] + SECOND.get(first[-1:], "")
        if second in columns and second != first[:-1] and all(_is_text(rows, name) for name in (first, second)):
            return first, second
    return None


def _is_numeric(values: Sequence[object], least: float = NUMBERS) -> bool:
    """Whether values are numbers, but for a few cells, or for some that say that there is none.

    With decimal commas they are, too, so that they are taken for no labels.
    """
    numbers = sum(is_number(value) or _has_comma(value) for value in values)
    blank = sum(str(value).strip().lower() in BLANKS for value in values)
    whole = numbers + blank == len(values) and numbers >= HALF * len(values)
    return numbers > 0 and (whole or numbers >= least * len(values))


def _is_quantity(values: Sequence[object]) -> bool:
    """Whether numbers say how much, and name no classes: some are broken, or many are different."""
    numbers = {float(str(value)) for value in values if is_number(value)}
    if any(map(_has_comma, values)):
        return True
    return len(numbers) > MOST_RATINGS or any(value != int(value) for value in numbers)


def _may_be_learnt(rows: Rows, column: str) -> bool:
    """Whether a column holds numbers that say how much, under whatever name but that of a date or a number of rows."""
    values = _values(rows, column)
    if _words(column) & set(BESIDES) or _names_rows(column, values):
        return False
    return len(values) > 1 and _is_numeric(values) and _is_quantity(values)


def _decades(values: Sequence[object]) -> float:
    return decades([float(str(value)) for value in values if is_number(value)])


def _has_comma(value: object) -> bool:
    """Whether a cell is a number with a decimal comma, or with one at each thousand: which is not known of `1,234`."""
    return isinstance(value, str) and COMMA.fullmatch(value.strip()) is not None


def _names_rows(column: str, values: Sequence[object]) -> bool:
    """Whether nearly each row has a value of its own that is no quantity: an identifier, a running number."""
    distinct = {str(value) for value in values}
    if len(values) < 8 or len(distinct) <= OWN * len(values):
        return False
    if not _is_numeric(values, HALF):
        return True
    numbers = [n for value in values if is_number(value) and (n := number(str(value))) is not None]
    whole, running = all(n == int(n) for n in numbers), numbers == sorted(numbers)
    called = column.lower() in ("id", "index", "key", "row", "nr", "no", "number") or column.lower().endswith("_id")
    return len(distinct) == len(values) == len(numbers) and whole and (running or called)


def _answered(seen: Table, rows: Rows, text: str | None, label: str | None) -> Table | None:
    """A prompt and an answer."""
    answer = _answer(seen, rows, text)
    if answer is None:
        return None
    more = _first(("input", "context"), [c for c in seen.columns if c not in answer])
    whole = more is not None and all(row.get(more) is not None for row in rows)
    return replace(seen, kind="chat", text=answer[0], label=label or answer[1], more=more if whole else None)


def _answer(seen: Table, rows: Rows, text: str | None) -> tuple[str, str] | None:
    by_name = {column.lower(): column for column in seen.columns}
    pairs = [(by_name[a], by_name[b]) for a, b in ANSWERS if a in by_name and b in by_name]
    texts = [pair for pair in pairs if text in (None, pair[0]) and all(_is_text(rows, name) for name in pair)]
    return texts[0] if texts else None


def _prose(seen: Table, rows: Rows, text: str | None, label: str | None) -> Table | None:
    column = text or _text(seen.columns, rows)
    return None if column is None else replace(seen, text=column)


def _text(columns: Sequence[str], rows: Rows) -> str | None:
    """The column of texts: by its name, else the one with the longest."""
    texts = [name for name in columns if _is_text(rows, name)]
    named = _first(TEXTS, texts)
    return named or max(texts, key=lambda name: sum(len(str(v)) for v in _values(rows, name)), default=None)


def _is_text(rows: Rows, column: str) -> bool:
    """Words, mostly different from row to row."""
    values = _values(rows, column)
    if not values or not all(isinstance(value, str) for value in values):
        return False
    texts = [str(value) for value in values]
    several = sum(len(value.split()) > 1 for value in texts) >= len(texts) / 2
    return several and len(set(texts)) > len(texts) / 2 and not _is_number(values)


def _is_label(rows: Rows, column: str) -> bool:
    """Few short values that come again, or numbers under the name of a label."""
    values = _values(rows, column)
    if len(values) < 2 or not all(isinstance(value, str | int | float) for value in values):
        return False
    distinct, called = {str(value) for value in values}, column.lower() in LABELS
    words = _words(column)
    if not called and (words & set(BESIDES) or all(DATE.fullmatch(value) for value in distinct)):
        return False
    quantity = (called or bool(words & set(QUANTITIES))) and _is_numeric(values)
    short = max(map(len, distinct)) <= LONGEST_LABEL
    few = 2 <= len(distinct) <= min(MOST_CLASSES, len(values) / (1.5 if called else 4))
    return (short and few) or (quantity and len(distinct) > 1 and (called or not _names_rows(column, values)))


def _words(column: str) -> set[str]:
    """The words of a column's name, in small letters: `priceEUR`, `Price (EUR)` and `price_eur` have `price`."""
    return set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", column).lower()))


def _is_number(values: Iterable[object]) -> bool:
    return all(isinstance(v, int | float) or (isinstance(v, str) and number(v) is not None) for v in values)


def _is_tags(rows: Rows, text: str, column: str) -> bool:
    """Whether a column holds a tag for each word of the texts."""
    both = [(str(row[text]).split(), row[column]) for row in rows if given(row, text) and given(row, column)]
    tags = [value.split() if isinstance(value, str) else value for _, value in both]
    lists = all(isinstance(each, list) for each in tags) and any(len(words) > 1 for words, _ in both)
    return lists and all(len(each) == len(words) for each, (words, _) in zip(tags, both, strict=True))
