"""Whether what meets numbers its tokens and its labels alike: two checkpoints, or a checkpoint and a tokenizer.

As many rows in two tables say nothing of what they stand for. Read from files alone, so that a recipe can be refused
before anything is run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.core.errors import PretrainError
from pretrain.core.files import read_json
from pretrain.core.folders import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.core.method import Method

Numbers = Mapping[str, int]  # of the tokens
Labels = tuple[str, ...]  # what a classifier answers with: what kind of answers they are, and their names in order
FILE = "tokenizer.json"
END, PAD, UNKNOWN, MASK, CLS, SEP = "<|endoftext|>", "<|pad|>", "<|unk|>", "<|mask|>", "<|cls|>", "<|sep|>"
# GPT-4's splitting rule with single digits: words with one leading space, punctuation runs, line breaks, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def special_tokens(algorithm: str, *, mask: bool, cls: bool, sentinels: int, extra: Iterable[str]) -> list[str]:
    """The special tokens of a tokenizer of our own, in the order of their numbers."""
    special = [END, PAD] + ([UNKNOWN] if algorithm == "unigram" else []) + ([MASK] if mask else [])
    return special + ([CLS, SEP] if cls else []) + [f"<extra_id_{i}>" for i in range(sentinels)] + list(extra)


def stored_numbers(place: Path | str) -> Numbers | None:
    """The tokens of a `tokenizer.json` in a stage's folder or a checkpoint; None where there is none that is known."""
    path = tokenizer_of(Path(place)) / FILE
    return _numbers(path, os.stat(path).st_mtime_ns) if path.is_file() else None


@lru_cache(maxsize=4)
def _numbers(path: Path, _: int) -> Numbers | None:
    facts = read_json(path)
    model = facts.get("model") if isinstance(facts, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # a Unigram model's, with their scores
        vocabulary = {str(entry[0]): number for number, entry in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict):
        return None
    return vocabulary | {entry["content"]: entry["id"] for entry in facts.get("added_tokens") or []}


def numbers_of(tokenizer: PreTrainedTokenizerBase | None) -> Numbers | None:
    """The tokens of an open tokenizer, or of the one that a processor holds."""
    held = tokenizer if hasattr(tokenizer, "get_vocab") else getattr(tokenizer, "tokenizer", None)
    return None if held is None else held.get_vocab()


def check_alike(label: str, numbers: Mapping[str, Numbers | None], place: tuple[str | int, ...] = ()) -> None:
    """Refuse vocabularies, by whose they are, that number a token otherwise; the error names the first.

    One may go on where another ends. None is of what has no tokenizer, or none that is known.
    """
    known = [(name, table) for name, table in numbers.items() if table is not None]
    for position, (name, table) in enumerate(known):
        for other, before in known[:position]:
            difference = _first_difference(table, before)
            if difference is not None:
                number, token, there = difference
                raise PretrainError(
                    f"{label}: token {number} is {token!r} in {name} and {there} in {other}; accepted: vocabularies "
                    "of which the shorter is the beginning of the longer",
                    place=place,
                )


def labels_in(config: Mapping[str, object], architecture: str = "") -> Labels | None:
    """The labels of a classifier's configuration; None of what is none, and of one whose classes have no names.

    `architecture` is the name of the model's class, where it is another than the configuration says.
    """
    listed, names = config.get("architectures"), config.get("id2label")
    kind = architecture or (str(listed[0]) if isinstance(listed, list) and listed else "")
    if "Classification" not in kind or not isinstance(names, Mapping):
        return None
    ordered = tuple(str(name) for _, name in sorted((int(number), name) for number, name in names.items()))
    if all(name == f"LABEL_{number}" for number, name in enumerate(ordered)):
        return None
    usual = "regression" if len(ordered) == 1 else "single_label_classification"
    return (str(config.get("problem_type") or usual), *ordered)


def labels_of(model: PreTrainedModel) -> Labels | None:
    """`labels_in` of an open model."""
    return labels_in(model.config.to_dict(), type(model).__name__)


def stored_labels(place: Path | str) -> Labels | None:
    """`labels_in` of a checkpoint, or of a stage's folder; None where there is none, or none that is known."""
    places = (Path(place, *inner, "config.json") for inner in (("checkpoint",), ()))
    config = next((read_json(path) for path in places if path.is_file()), None)
    try:
        return labels_in(config) if isinstance(config, dict) else None
    except (ValueError, TypeError):  # numbers that are none, which is said where it is opened
        return None


def check_labels(label: str, tables: Mapping[str, Labels | None], place: tuple[str | int, ...] = ()) -> None:
    """Refuse classifiers, by whose they are, of which one calls a class otherwise; the error names the first."""
    known = [(name, table) for name, table in tables.items() if table is not None]
    for name, table in known[1:]:
        first, expected = known[0]
        for number, pair in enumerate(zip_longest(table, expected), -1):
            if pair[0] != pair[1]:
                theirs, ours = (("none" if number >= 0 else "unknown") if each is None else repr(each) for each in pair)
                what = f"label {number}" if number >= 0 else "problem_type"
                raise PretrainError(
                    f"{label}: {what} is {theirs} in {name} and {ours} in {first}; accepted: classifiers of the same "
                    "labels in the same order",
                    place=place,
                )


def check_named(folder: Path, labels: Labels | None) -> None:
    """Refuse a classifier that calls two of its classes by one name: its answers could not be told apart."""
    _, *names = labels or ("",)
    for number, name in enumerate(names):
        if (before := names.index(name)) < number:
            raise PretrainError(
                f"{folder / 'config.json'}: id2label calls {before} and {number} both {name!r}; accepted: a name for "
                "each class"
            )


def _first_difference(table: Numbers, other: Numbers) -> tuple[int, str, str] | None:
    """The least number that stands for another token; the token that has it, and what is said of it in the other."""
    names = {number: token for token, number in other.items()}
    apart: list[tuple[int, str, str]] = []
    for token, number in table.items():
        if names.get(number, token) != token:
            apart.append((number, token, repr(names[number])))
        elif other.get(token, number) != number:
            apart.append((number, token, f"token {other[token]}"))
    return min(apart, default=None)


def check_references(
    method: Method, numbers: Numbers | None, whose: str, place: tuple[str | int, ...] = (), skip: tuple[str, ...] = (),
    locate: Callable[[str, str], Path] = lambda reference, field: Path(reference), labels: Labels | None = None,
) -> None:  # fmt: skip
    """Refuse a method whose checkpoints must share the tokens of `whose` vocabulary, and its `labels`, and do not.

    References in `skip` are of stages that have not run.
    """
    for name, reference in method.vocabularies().items():
        if reference not in skip:
            at, what = (*place, *name.split(".")), f"{name} {reference}"
            if numbers is not None:
                check_alike(method.name, {whose: numbers, what: stored_numbers(locate(reference, name))}, at)
            if labels is not None:
                check_labels(method.name, {whose: labels, what: stored_labels(locate(reference, name))}, at)
