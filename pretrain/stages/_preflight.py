"""What the documents say before anything runs: whether files can be read, columns are there, and labels can be learnt.

Files are read for half a second of the processor, tables at their beginning, so that a plan is told at once, and a
least amount in any case; what is read is read as the stage will do it, and fails with the same words.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pretrain.core.errors import PretrainError, nearest, steps_of
from pretrain.core.files import read_object
from pretrain.core.method import Method
from pretrain.core.quick.confusion import doubtful
from pretrain.core.quick.quantities import counted, short
from pretrain.core.registry import info
from pretrain.corpus.look.glance import Glance
from pretrain.corpus.sources import Files, Skipped
from pretrain.corpus.sources._tables import is_number
from pretrain.stages._estimates import left_in
from pretrain.stages.data import Data

if TYPE_CHECKING:
    from pretrain.stages import Stage

ROWS = 10_000  # of each table, as many as `pretrain new` looks at
SECONDS = 0.5
SHORT = 60  # letters of a label
FEW, MANY = 5, 20  # rows of a label, of so many labels
LIKE_PYTHON = "text like Python's library"  # what a law of it is of, where another corpus is learnt
OF_TEXT_ALONE = "pretrain.objectives.language."
LEAST_TEXT = 500  # bytes: of less nothing can be learnt and held out


@dataclass(frozen=True)
class Seen:
    """What is known of documents: their columns (None: not all), and how often each value stands in one.

    Long values are known by `key_of`.
    """

    columns: tuple[str, ...] | None
    values: dict[str, Counter[str]]
    whole: bool  # whether all documents were looked at
    odd: tuple[str, ...] = ()  # what is likely a mistake
    domains: tuple[str, ...] | None = None  # None: not all are known
    places: dict[tuple[str, str], str] = field(default_factory=dict)  # where a column first has a value, in a file
    held_out: tuple[str, ...] = ()  # domains of a corpus's held-out documents alone
    rows: int = 0  # of tables, that were looked at


def seen_in_sources(stage: Data, before: Seen | None = None, seconds: float | None = None) -> Seen:
    """Read the beginnings of files; raises `PretrainError` for what the stage would fail at.

    `before` is what is known of the corpus that the stage goes on with; `seconds` are of reading.
    """
    columns: dict[str, None] = {}
    domains: list[tuple[str, ...] | None] = [operation.brings for operation in stage.operations]
    values: dict[str, Counter[str]] = {}
    odd: list[str] = []
    places: dict[tuple[str, str], str] = {}
    glance, known, whole, rows = Glance(SECONDS if seconds is None else seconds), True, True, 0
    for number, source in enumerate(stage.sources):
        domains.append(source.domains())
        if not isinstance(source, Files) or source.package is not None or "://" in source.files:
            known = whole = False
            continue
        taken, skipped, complete = 0, Skipped(), True
        names: dict[str, None] = {}
        try:
            for where, document in source.placed(skipped, rows=ROWS):
                columns |= dict.fromkeys(document)
                names[str(document["domain"])] = None
                taken += 1
                for name, value in _count(values, document):
                    places.setdefault((name, value), where)
                if glance.enough(sum(len(value) for value in document.values() if isinstance(value, str | bytes))):
                    complete = False
                    break
            odd += _left_out(source, skipped, taken)
            if complete and not taken and len(stage.sources) == 1 and not stage.corpus:
                why = f" (passed over: {skipped})" if skipped.reasons else ""
                raise PretrainError(f"{source.files}: no documents{why}; accepted: at least one that is not empty")
        except PretrainError as error:
            raise PretrainError(str(error), place=("sources", number)) from error
        complete, rows = complete and not skipped.begun, rows + skipped.rows
        domain = source.domain  # which may be a column's name; of so many rows in a row none has one
        domains[-1] = tuple(names) if complete or (domain and set(names) == {domain}) else None
        whole = whole and complete
    if stage.corpus:
        domains.append(before.domains if before is not None else None)
        whole = False
    if stage.corpus or any(op.adds or ".rewriting" in info(op.name).module for op in stage.operations):
        known = False  # which columns there are is known when these have run
    every = None if None in domains else tuple(dict.fromkeys(chain.from_iterable(filter(None, domains))))
    named = tuple(columns) if known and columns else None
    return Seen(named, values, whole, tuple(odd), every, places, rows=rows)


def _left_out(source: Files, skipped: Skipped, taken: int) -> Iterator[str]:
    """Refuse a source whose rows are all left out for a column that they lack; a line where most of them are."""
    lacking = {reason: count for reason, count in skipped.reasons.items() if reason.startswith("rows without")}
    rows = sum(lacking.values())
    if rows and not taken:
        if any(reason.startswith("rows without the column ") for reason in lacking):
            try:
                next(replace(source, on_error="stop").placed(Skipped(), rows=ROWS), None)
            except PretrainError as error:
                raise PretrainError(str(error).replace(", or on_error: skip", "")) from error
        row = next((document for _, document in replace(source, required=()).placed(Skipped(), rows=ROWS)), {})
        known = [name for name in row if name not in ("domain", "id")]
        for name in source.numbers:
            if f"rows without a number in {name}" in lacking and source.on_error == "skip":
                raise PretrainError(f"numbers {name!r}: no row has a number there; accepted: columns of numbers")
        missing = next((name for name in source.required if f"rows without {name}" in lacking), "")
        empty = "its column is empty in every row" if missing in known else f"no row has one{nearest(missing, known)}"
        others = [name for name in known if name != missing]
        raise PretrainError(f"required {missing!r}: {empty}; accepted: {', '.join(others)}")
    if rows > taken:
        why = ", ".join(map(skipped.counted, lacking))
        yield f"of the first {rows + taken:,} rows of {source.files!r} most are left out: {why}"


def _count(values: dict[str, Counter[str]], document: dict[str, object]) -> list[tuple[str, str]]:
    """Count the values of a document; their columns, each with its value's key."""
    keyed = [(name, key_of(value)) for name, value in document.items() if isinstance(value, str | int | float)]
    for name, key in keyed:
        values.setdefault(name, Counter())[key] += 1
    return keyed


def key_of(value: object) -> str:
    """A value as text; of a long one the beginning, and a digest that tells it from others."""
    text = str(value)
    if len(text) <= SHORT:
        return text
    return text[:SHORT] + "…" + blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def shown(key: str) -> str:
    """A value as a message has it, by its key."""
    return repr(key if len(key) <= SHORT else key[: SHORT + 1])


def seen_in_corpus(folder: Path, wanted: Sequence[str]) -> Seen:
    """The columns of a corpus that is there, and the values of those that are labels."""
    import pyarrow.parquet

    domains, held_out = _domains_of(folder)
    parts = sorted(path for split in ("train", "validation") for path in folder.glob(f"{split}/*.parquet"))
    if not parts:
        return Seen(None, {}, False, domains=domains, held_out=held_out)
    values: dict[str, Counter[str]] = {}
    try:
        columns = tuple(pyarrow.parquet.read_schema(parts[0]).names)
        for name in set(wanted) & set(columns):
            for part in parts:
                for value in pyarrow.parquet.read_table(part, columns=[name])[name].to_pylist():
                    _count(values, {name: value})
    except (OSError, ValueError):  # a damaged corpus is told by the stage that opens it
        return Seen(None, {}, False)
    return Seen(columns, values, True, domains=domains, held_out=held_out)


def _domains_of(corpus: Path) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Those of a corpus's training documents, and those of held-out documents alone."""
    with suppress(PretrainError, OSError, AttributeError, KeyError, TypeError):
        splits = read_object(corpus / "corpus.json")["domains"]
        every = dict.fromkeys(chain.from_iterable(splits.values()))
        return tuple(splits["train"]), tuple(name for name in every if name not in splits["train"])
    return None, ()


def domains_asked(stage: Stage) -> dict[tuple[str | int, ...], list[str]]:
    """The domains that a training's `mixture` and its methods name, by their places."""
    asked: dict[tuple[str | int, ...], object] = {("mixture",): getattr(stage, "mixture", None)}
    for place, method in stage.placed_methods():
        steps = steps_of(place)
        asked |= {(*steps, name): getattr(method, name) for name in getattr(method, "domain_fields", ())}
    return {
        place: [value] if isinstance(value, str) else list(cast("dict[str, float]", value))
        for place, value in (asked | _measured(stage)).items()
        if value
    }


def _measured(stage: Stage) -> dict[tuple[str | int, ...], object]:
    """The domains of held-out metrics that methods go by: of `loss/py` that is `py`."""
    asked: dict[tuple[str | int, ...], object] = {}
    for place, method in stage.placed_methods():
        kind, _, domain = str(getattr(method, "metric", "")).partition("/")
        if kind in ("loss", "bits_per_byte") and domain:
            asked[*steps_of(place), "metric"] = domain
    return asked


def check_domains(stage: Stage, seen: Seen) -> None:
    """Refuse domains that no training document has; of metrics those that no document has at all."""
    for place, names in domains_asked(stage).items():
        known = (*(seen.domains or ()), *(seen.held_out if place[-1] == "metric" else ()))
        for name in names if seen.domains is not None else ():
            if name not in known:
                raise PretrainError(
                    f"no document is of the domain {name!r}{nearest(name, known)}; "
                    f"accepted: {', '.join(sorted(known))}",
                    place=place,
                )


def columns_asked(stage: Stage) -> list[tuple[tuple[str | int, ...], Method, tuple[str, ...]]]:
    """Of each method of a stage that reads labelled documents its place, and the columns that it reads."""
    asked: list[tuple[tuple[str | int, ...], Method, tuple[str, ...]]] = []
    for place, method in stage.placed_methods():
        steps = steps_of(place)
        inner = getattr(method, "method", None) if method.name == "task" else method
        if isinstance(inner, Method) and (method.name == "task" or hasattr(inner, "predict")):
            asked.append((steps, inner, tuple(getattr(inner, "columns", ()))))
    return asked


def check_columns(stage: Stage, seen: Seen) -> Iterator[str]:
    """Refuse columns that no document has; a line for each thing about labels that is likely a mistake."""
    for place, method, columns in columns_asked(stage):
        for column in columns if seen.columns is not None else ():
            if column in (seen.columns or ()):
                continue
            named = next((f.name for f in fields(method) if getattr(method, f.name) == column), "")
            known = [name for name in seen.columns or () if name not in ("domain", "id")]
            raise PretrainError(
                f"no document has a column {column!r}{nearest(column, known)}; accepted: {', '.join(known)}",
                place=(*place, named) if named else place,
            )
        counts = seen.values.get(columns[-1]) if columns else None
        if counts and stage.stage == "train":
            learnt = _wrapped(method)
            if learnt == "regression":
                _check_numbers(columns[-1], counts, seen, place)
            elif learnt == "classification":
                yield from _labels(columns[-1], counts, None if seen.whole else seen.rows, place)


def labels_asked(stage: Stage) -> list[str]:
    """The columns whose values a stage learns as classes or as numbers."""
    asked = columns_asked(stage) if stage.stage == "train" else []
    return [columns[-1] for _, method, columns in asked if _wrapped(method) in ("classification", "regression")]


def _wrapped(method: Method) -> str:
    """The name of an objective, or of the one that it wraps."""
    inner = getattr(method, "wrapped", method)
    return str(getattr(inner, "name", method.name))


def other_labels(stage: Stage, trained: Stage) -> Iterator[str]:
    """A line for each evaluation that asks for the labels of another column than those that its model learns.

    An evaluation of labels is refused where the model learns none, since it is trained on the text alone.
    """
    _check_head(stage, trained)
    learnt = {columns[-1] for _, method, columns in columns_asked(trained) if _wrapped(method) == "classification"}
    for _, method, columns in columns_asked(stage) if len(learnt) == 1 else ():
        if _wrapped(method) == "classification" and columns[-1] not in learnt:
            yield f"asks for the labels of {columns[-1]!r}, and {trained.name!r} learns those of {min(learnt)!r}"


def _check_head(stage: Stage, trained: Stage) -> None:
    objective = getattr(trained, "objective", None)
    if not type(objective).__module__.startswith(OF_TEXT_ALONE):
        return
    for _, method, _ in columns_asked(stage):
        if getattr(getattr(method, "wrapped", method), "headed", False):
            raise PretrainError(
                f"{_wrapped(method)} measures labels, and {trained.name!r} learns none: its objective is "
                f"{getattr(objective, 'name', '')}; accepted: a checkpoint that {_wrapped(method)} has trained",
                place=("checkpoint",),
            )


def _check_numbers(column: str, counts: Counter[str], seen: Seen, place: tuple[str | int, ...]) -> None:
    """Refuse a column to be learnt as numbers that holds something else, which is named with its row."""
    odd = [value for value in counts if not is_number(value)]
    if not odd:
        return
    where = seen.places.get((column, odd[0]), "")
    rows = sum(counts[value] for value in odd)
    skip = ", or in its source numbers: [COLUMN] with on_error: skip, which pass such rows over, and count them"
    few = f"{skip.replace('COLUMN', column)} ({counted(rows, 'row')})" if rows < counts.total() / 2 else ""
    few = f" with a decimal point (1234.5){few}" if re.fullmatch(r"[-+]?[\d.,]*\d,\d[\d.,]*", odd[0]) else few
    raise PretrainError(
        f"{where + ': ' if where else ''}column {column!r} holds {shown(odd[0])}; accepted: numbers{few}", place=place
    )


def _labels(column: str, counts: Counter[str], first: int | None, place: tuple[str | int, ...]) -> Iterator[str]:
    """What is wrong with the values of a column of labels, of the `first` rows, or of all."""
    rows = sum(counts.values())
    whole, among = (True, f"{rows:,} rows") if first is None else (False, f"the first {first or rows:,} rows")
    of = "" if whole else f" (of {among})"
    if empty := counts.get(""):
        few = f"{counted(empty, 'row')}{of}"
        yield f"{few} without {column!r}, which is learnt like a label; required: [{column}] passes them over"
    if whole and len(counts) < 2:
        only = next(iter(counts))
        raise PretrainError(f"column {column!r} holds one label, {shown(only)}; accepted: 2 or more", place=place)
    singles = sorted(name for name, count in counts.items() if count == 1)
    if len(counts) > rows / 2 and rows >= 8:
        yield f"{column!r} has {len(counts):,} different values in {among}: names of rows rather than labels"
    elif len(counts) > max(MANY, rows / FEW):
        few = f"{rows / len(counts):.1f} rows each{of}"
        yield f"{column!r} has {len(counts):,} labels, {few}: few to learn a label from"
    elif singles and whole:
        some = ", ".join(map(shown, singles[:3])) + (", …" if len(singles) > 3 else "")
        what = "labels have a single row each" if len(singles) > 1 else "label has a single row"
        yield f"{len(singles):,} {what} ({some}): it can be learnt or measured, and not both; merge or drop them"
    short = {name: count for name, count in counts.items() if len(name) <= SHORT}
    for line in doubtful(column, short):
        yield line + of


def text_of(entry: dict[str, object], before: list[dict[str, object]]) -> str:
    """The text that the expectation of a training's loss is of: what its law was measured on."""
    size = entry["size"]
    if isinstance(size, dict):
        return f"the text that {size['law']} was measured on"
    name = entry.get("corpus")
    while corpus := next((e for e in before if e.get("name", e.get("stage")) == name), None):
        sources, name = corpus.get("sources"), corpus.get("corpus")
        if sources or name is None:
            alike = isinstance(sources, list) and all(isinstance(s, dict) and s.get("stdlib") for s in sources)
            return "Python's library" if alike and sources and name is None else LIKE_PYTHON
        before = before[: before.index(corpus)]
    return LIKE_PYTHON


def basis_of(entry: dict[str, object], before: list[dict[str, object]], unique: float | None) -> str:
    """What the size goes by, where its budget is passes over text of which operations are still to leave some out."""
    budget = entry.get("budget")
    given = (corpus.get("operations") for corpus in behind(entry, before))
    lists = [each for each in given if isinstance(each, list)]
    named = [str(each.get("method") if isinstance(each, dict) else each) for operations in lists for each in operations]
    if unique is None or not named or not isinstance(budget, dict) or "epochs" not in budget:
        return ""
    return (
        f"the size is chosen for {short(unique, 'B')} of training text a pass, all that the sources hold; how much "
        f"of it {', '.join(dict.fromkeys(named))} will leave is not known before the corpus is made"
    )


def behind(entry: dict[str, object], before: list[dict[str, object]]) -> Iterator[dict[str, object]]:
    """The data stage that a stage reads, and those that it goes on from."""
    corpus = next((e for e in before if e.get("name", e.get("stage")) == entry.get("corpus")), None)
    if corpus is not None:
        yield corpus
        yield from behind(corpus, before[: before.index(corpus)])


def unique_text(entry: dict[str, object], before: list[dict[str, object]]) -> float | None:
    """Bytes of training text, as the sources' sizes tell; None where they do not."""
    from pretrain.stages.data import Data, build_source

    corpus = next((e for e in before if e.get("name", e.get("stage")) == entry.get("corpus")), None)
    if corpus is None or corpus.get("stage") != "data":
        return left_in(Path(str(entry.get("corpus")))).bytes.get("train")
    again = (
        unique_text(corpus, before[: before.index(corpus)]) if corpus.get("corpus") else 0.0
    )  # of what it goes on from
    if again is None or not corpus.get("sources"):
        return again or None
    sizes = []
    try:
        sources = corpus.get("sources")
        for number, source in enumerate(sources if isinstance(sources, list) else []):
            try:
                sizes.append(build_source(copy.deepcopy(source)).size())
            except PretrainError as error:
                place = ("stages", before.index(corpus), "sources", number, *error.place)
                raise PretrainError(str(error), place=place) from error
        shares = [corpus.get(split, Data.model_fields[split].default) for split in ("validation", "test")]
        held_out = math.fsum(float(str(share)) for share in shares)
    except (ValueError, TypeError):  # told when the stage itself is checked
        return None
    known = [size.bytes for size in sizes if size is not None]
    whole = sizes and len(known) == len(sizes) and held_out < 1
    return again + math.fsum(known) * (1 - held_out) if whole else None


def not_there(entry: Mapping[str, object], before: Sequence[dict[str, object]]) -> float:
    """Refuse passes over text of an unknown size; a corpus that is not there at all is told of as a reference is."""
    corpus = str(entry.get("corpus"))
    if all(e.get("name", e.get("stage")) != corpus for e in before) and not Path(corpus).exists():
        return LEAST_TEXT
    raise PretrainError(
        f"budget of epochs: how much text {corpus!r} holds is not known before it is made, and so not which size fits; "
        "accepted: a budget of tokens, FLOPs or seconds, or the path of a corpus that is made",
        place=("budget",),
    )
