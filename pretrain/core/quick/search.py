"""A small search over names, titles and sentences: whole words in any form and spelling, the nearest first.

Words are compared by their stems, so that `quantise`, `quantization` and `quantised` are one, `code` is not `decoder`,
and `fine-tuning` is `finetuning`. Only where no row has a word in some form is its beginning taken, and then any part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from itertools import pairwise
from typing import TypeVar

Row = TypeVar("Row")
Fields = Sequence[tuple[float, str]]  # of a row: texts, and what a hit in each is worth

ENDINGS = (
    "ifications", "ification", "ifiers", "ifier", "ifying", "ified", "ifies", "ify", "izations", "ization", "izers",
    "izer", "izing", "ized", "izes", "ize", "ations", "ation", "ators", "ator", "ating", "ated", "ates", "ate",
    "ments", "ment", "ions", "ion", "ings", "ing", "ers", "er", "ed", "es", "ly", "s", "e",
)  # fmt: skip
KEPT = {"if": "if", "iz": "iz"}  # what of an ending belongs to the stem
SHORTEST = 3  # letters that a stem keeps
CLOSE = 0.65  # of two names, from which one is suggested for the other
EXACT, BEGINNING, PART = 1.0, 0.4, 0.1


@cache
def stem(word: str) -> str:
    """A word without its ending, in one spelling."""
    word = re.sub(r"is(e|ed|es|er|ers|ing|ation|ations)$", r"iz\1", word.lower()) if len(word) > 5 else word.lower()
    word = re.sub(r"our(s|ed|ing|al|s?)$", r"or\1", word) if len(word) > 4 else word
    word = re.sub(r"yz(e|ed|es|er|ing)$", r"ys\1", word)
    for ending in ENDINGS:
        kept = KEPT.get(ending[:2], "")
        if word.endswith(ending) and len(word) - len(ending) + len(kept) >= SHORTEST and not word.endswith("ss"):
            word = word.removesuffix(ending) + kept
            break
    return word[:-1] if len(word) > SHORTEST and word[-1] == word[-2] else word  # distill, distil; running, run


def words(text: str) -> list[str]:
    """Of a text, where a capital inside a name begins none."""
    return re.findall(r"[a-z0-9]+", text.lower())


@dataclass(frozen=True)
class _Indexed:
    """A text's stems with those of neighbours written as one, and its words as they stand."""

    stems: frozenset[str]
    plain: tuple[str, ...]


@cache
def _indexed(text: str) -> _Indexed:
    plain = words(text)
    joined = [a + b for a, b in pairwise(plain)]
    return _Indexed(frozenset(map(stem, plain + joined)), tuple(plain))


def search(rows: Iterable[Row], asked: Sequence[str], fields: Callable[[Row], Fields]) -> list[Row]:
    """The rows that have all the words, the best first; rows in their order where no words are asked."""
    rows, wanted = list(rows), [part for text in asked for part in text.split()]
    if not wanted:
        return rows
    texts = [[(worth, _indexed(text)) for worth, text in fields(row)] for row in rows]
    scores = [0.0] * len(rows)
    alive = set(range(len(rows)))
    for word in wanted:
        for hit in (_exact, _beginning, _part):
            hits = {n: max((worth * hit(word, text) for worth, text in texts[n]), default=0.0) for n in alive}
            if any(hits.values()):
                break
        alive = {n for n in alive if hits[n] > 0}
        for n in alive:
            scores[n] += hits[n]
    return [rows[n] for n in sorted(alive, key=lambda n: (-scores[n], n))]


def _exact(word: str, text: _Indexed) -> float:
    parts = words(word)
    whole = stem("".join(parts)) in text.stems
    if not parts or not (whole or all(stem(part) in text.stems for part in parts)):
        return 0.0
    named = tuple(parts) == text.plain or ("".join(parts),) == text.plain
    return EXACT * (2 if named else 1) + EXACT / (1 + len(text.plain))  # a short text says it more plainly


def _beginning(word: str, text: _Indexed) -> float:
    asked = "".join(words(word))
    return BEGINNING if len(asked) >= SHORTEST and any(each.startswith(asked) for each in text.plain) else 0.0


def _part(word: str, text: _Indexed) -> float:
    asked = "".join(words(word))
    return PART if len(asked) > SHORTEST and any(asked in each for each in text.plain) else 0.0


def closest(asked: str, rows: Iterable[Row], name: Callable[[Row], str], fields: Callable[[Row], Fields]) -> list[Row]:
    """Up to three rows for words that name none: those that have some of the words, or are spelt much alike."""
    rows = list(rows)
    given = "".join(words(asked))

    def alike(row: Row) -> float:
        return SequenceMatcher(None, given, "".join(words(name(row)))).ratio()

    spelt = [row for row in sorted(rows, key=alike, reverse=True)[:3] if alike(row) >= 0.75]
    stems = {stem(word) for word in words(asked) if len(word) >= SHORTEST}
    shared = []
    for row in rows:
        score = sum(worth for worth, text in fields(row) for each in stems if each in _indexed(text).stems)
        shared += [(score, row)] if score else []
    sharing = [row for _, row in sorted(shared, key=lambda pair: -pair[0])]
    near = [row for row in sorted(rows, key=alike, reverse=True) if alike(row) >= CLOSE]
    return list({id(row): row for row in [*spelt, *sharing, *near]}.values())[:3]
