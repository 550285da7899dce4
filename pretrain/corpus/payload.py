"""What a document is made of: its payload, and what is about it.

A document is a dict of typed columns. The payload are the columns that make the example: its content (`text`, `image`,
`audio`, `series`) and what belongs to it (a label, a target). All other columns are about it, as `domain`, `id` and
`url` are. Documents with the same payload are copies; sizes and fingerprints are of payloads.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar, cast

import numpy as np

from pretrain.core.errors import PretrainError
from pretrain.corpus.sources import Document

if TYPE_CHECKING:
    import pyarrow
    from datasets import Features
    from numpy.typing import NDArray

T = TypeVar("T")

CONTENT = ("text", "image", "audio", "series")
# Words in the names of columns that belong to a document's content; any other column is about it.
BESIDE = {
    "answer", "answers", "b", "category", "choices", "chosen", "class", "completion", "context", "hypothesis",
    "instruction", "label", "labels", "messages", "negative", "negatives", "options", "output", "pair",
    "positive", "positives", "premise", "prompt", "query", "question", "rejected", "response", "second",
    "summary", "tag", "tags", "target", "targets",
}  # fmt: skip

ABOUT = (*CONTENT, "domain", "id", "group", "url", "path")  # columns that are no labels
SHORT = 60  # letters of a label at most
MOST_LABELS, OWN = 1000, 0.5  # different values of a column of labels; the share of the rows that may have their own
REMEMBERED = 1_000_000  # documents


class Placed(Document):
    """A document of a corpus that is read again, which stays on its side of the split."""

    split: str


@cache
def belongs(column: str) -> bool:
    """Whether a column is part of an example, as its label is, and not just about its content, as a `url` is."""
    return bool(BESIDE.intersection(re.split(r"[^a-z]+", column.lower())))


def beside(document: Document) -> str:
    """All that belongs to a document's content, written out; nothing for a plain one.

    What is the same once it is stored is written alike: 1 and 1.0, since a column of both is one of floats, tuples and
    lists, mappings whatever the order of their keys, and keys without a value.
    """
    columns = sorted((name, value) for name, value in document.items() if value is not None and belongs(name))
    return repr([(name, _as_stored(value)) for name, value in columns]) if columns else ""


def _as_stored(value: object) -> object:
    """A value with what a stored column does not tell apart made alike."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {str(key): _as_stored(value[key]) for key in sorted(value, key=str) if value[key] is not None}
    return [_as_stored(inner) for inner in value] if isinstance(value, list | tuple) else value


def in_payload(columns: Iterable[str]) -> list[str]:
    """The columns that make the payload."""
    return [name for name in columns if name in CONTENT or belongs(name)]


def only_text(document: Document) -> bool:
    """Whether text is all the content that a document has."""
    return [name for name in CONTENT if document.get(name) is not None] == ["text"]


def content(document: Document) -> bytes:
    """The content alone, without what belongs to it: of a document of text alone its UTF-8 bytes."""
    try:
        parts = {name: _bytes(name, document[name]) for name in CONTENT if document.get(name) is not None}
    except PretrainError as error:
        raise PretrainError(f"document {document.get('id')!r}: {error}") from error
    if not parts:
        accepted = ", ".join(CONTENT)
        raise PretrainError(f"document {document.get('id')!r} has no content; accepted: one of {accepted}")
    if list(parts) == ["text"]:
        return parts["text"]
    return b"".join(f"{name}\0{len(data)}\0".encode() + data for name, data in parts.items())


def payload(document: Document) -> bytes:
    """The whole payload; of a document of text alone its UTF-8 bytes."""
    other = beside(document)
    return content(document) + (b"\0" + other.encode("utf-8", "surrogatepass") if other else b"")


def bucket(size: int) -> str:
    """The power of two that a size in bytes is below: of 4 to 7 it is `8`."""
    return str(1 << size.bit_length())


def identity(document: Document) -> bytes:
    """16 bytes that copies of a document share."""
    return hashlib.blake2b(payload(document), digest_size=16).digest()


def _bytes(name: str, value: object) -> bytes:
    """A column of content as bytes: a file's without its path, a series' values and shape."""
    if name == "text":
        return str(value).encode()
    if name == "series":
        values_TC = _series(value)
        return str(values_TC.shape).encode() + values_TC.tobytes()
    data = value.get("bytes") if isinstance(value, dict) else None
    if not isinstance(data, bytes):
        raise PretrainError(f"column {name!r} holds {type(value).__name__}; accepted: {{bytes, path}}, a file's bytes")
    return data


def features_of(columns: Sequence[str], schema: pyarrow.Schema) -> Features:
    """The columns' types as `datasets` knows them: content by its name, the others as arrow has inferred them."""
    import datasets

    typed = {
        "image": datasets.Image(),
        "audio": datasets.Audio(decode=False),
        "series": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
    }
    inferred = datasets.Features.from_arrow_schema(schema)
    return datasets.Features({name: typed.get(name, inferred[name]) for name in columns})


def columns_in(value: object, within: str = "") -> Iterator[str]:
    """The names of a document's columns, and of those that objects in them hold: `meta`, `meta.author`."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield f"{within}{name}"
            yield from columns_in(each, f"{within}{name}.")
    elif isinstance(value, list):
        for each in value:
            if isinstance(each, dict | list):
                yield from columns_in(each, within)


def table_of(documents: Sequence[Document]) -> pyarrow.Table:
    """Documents as an Arrow table whose schema says the columns' types, null where a document lacks a column."""
    import pyarrow

    names = list(dict.fromkeys(name for document in documents for name in document))
    columns = {name: [document.get(name) for document in documents] for name in names}
    for name in ("image", "audio"):
        for value in columns.get(name, ()):
            if value is not None:
                _bytes(name, value)  # is a file
    types = {
        "image": pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
        "audio": pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
        "series": pyarrow.list_(pyarrow.list_(pyarrow.float32())),
    }
    arrays = {
        name: single_type(
            partial(pyarrow.array, [_plain(name, v) for v in values], types.get(name)), f"column {name!r}"
        )
        for name, values in columns.items()
    }
    return typed(pyarrow.table(arrays))


def typed(table: pyarrow.Table) -> pyarrow.Table:
    """The table with its columns' types noted in its schema, where it has columns that arrow alone cannot tell."""
    if not {"image", "audio", "series"}.intersection(table.column_names):
        return table
    features = features_of(table.column_names, table.schema)
    return table.replace_schema_metadata(features.arrow_schema.metadata)


def single_type(make: Callable[[], T], what: str = "a column") -> T:
    """What `make` gives; a column whose values are of several types is an error, which names it."""
    import pyarrow

    try:
        return make()
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, OverflowError) or "too large" in reason:
            accepted = "whole numbers from -2**63 to below 2**63, or texts"
            raise PretrainError(f"{what} holds numbers too large to store ({reason}); accepted: {accepted}") from error
        raise PretrainError(f"{what} holds several types ({reason}); accepted: one type a column") from error


def _plain(name: str, value: object) -> object:
    """A value as arrow takes it."""
    if name != "series" or value is None:
        return value
    values_TC = _series(value)
    if values_TC.ndim != 2:
        raise PretrainError(f"column 'series' has {values_TC.ndim} dimensions; accepted: 2, time x channels")
    return list(values_TC)


def _series(value: object) -> NDArray[np.float32]:
    """A series as it is kept; a finite value that would be infinite there is an error."""
    given = np.asarray(value, np.float64)
    with np.errstate(over="ignore"):
        kept = given.astype(np.float32)
    beyond = given[np.isinf(kept) & np.isfinite(given)]
    if len(beyond):
        raise PretrainError(f"column 'series' holds {beyond[0]:g}; accepted: numbers of float32, up to 3.4e+38")
    return kept


class Labels:
    """Which texts stand with more than one label, of documents that are seen one after another.

    Which column is the label is not known: all are counted that can be, of short values that come again, and those of
    `numbers`.
    """

    def __init__(self, numbers: Iterable[str] = ()) -> None:
        self.numbers = frozenset(numbers)
        self.first: dict[bytes, dict[str, int]] = {}  # of each content the values that it stood with first, hashed
        self.values: dict[str, set[int]] = {}  # of each column, up to one more than labels have
        self.contents: dict[str, set[bytes]] = {}  # of each column those with different values
        self.rows = 0
        self.contradicting: dict[str, dict[str, int | bool]] = {}  # once all are seen

    def over(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents, each of which is seen as it passes.

        After the last `contradicting` says by the column of labels how many texts stand with more than one, and whether
        each of these is kept, as where the column belongs to the payload; else the first is, and the others are copies.
        """
        for document in documents:
            self._see(document)
            yield document
        most = min(MOST_LABELS, OWN * self.rows)
        texts = {
            name: len(keys) for name, keys in sorted(self.contents.items())
            if name in self.numbers or len(self.values[name]) <= most
        }  # fmt: skip
        self.contradicting.update({name: {"texts": count, "kept": belongs(name)} for name, count in texts.items()})

    def _see(self, document: Document) -> None:
        """One more document; blank cells say nothing."""
        hashed = {
            name: hash(str(value))
            for name, value in document.items()
            if name not in ABOUT and isinstance(value, str | int | float) and 0 < len(str(value).strip()) <= SHORT
        }
        if not hashed or len(self.first) >= REMEMBERED:
            return
        self.rows += 1
        key = hashlib.blake2b(content(document), digest_size=16).digest()
        before = self.first.setdefault(key, hashed)
        for name, value in hashed.items():
            if len(values := self.values.setdefault(name, set())) <= MOST_LABELS:
                values.add(value)
            if before.setdefault(name, value) != value:
                self.contents.setdefault(name, set()).add(key)


def side(key: str, validation: float, test: float, salt: int = 0) -> str:
    """The split that a document belongs to, from the hash of its content or group; each `salt` draws other splits."""
    salted = f"{salt}\0{key}" if salt else key
    number = int.from_bytes(hashlib.sha256(salted.encode()).digest()[:8]) / 2**64
    return "test" if number < test else "validation" if number < test + validation else "train"


def key_of(document: Document) -> str:
    """What decides a document's side."""
    if document.get("group") is not None:
        return str(document["group"])
    return document["text"] if only_text(document) else hashlib.sha256(content(document)).hexdigest()


class Split(TypedDict):
    """Shares of the documents that are held out, and what draws them."""

    validation: float
    test: float
    split_seed: int


def split_in(facts: Mapping[str, object], path: Path) -> Split | None:
    """How the facts of a corpus say that it was split; None of one from before that was noted."""
    given = facts.get("split")
    if given is None:
        return None
    try:
        given = cast("Split", given)
        return Split(
            validation=float(given["validation"]), test=float(given["test"]), split_seed=int(given["split_seed"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PretrainError(f"{path}: split {given!r}: accepted: validation, test and split_seed") from error


def side_of(document: Document, validation: float, test: float, salt: int) -> str:
    """The split of a document: of one from a corpus the one that it has there."""
    return document.split if isinstance(document, Placed) else side(key_of(document), validation, test, salt)
