"""Finds what a text names of a set of facts, and chooses what is rare in text and rich in facts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import regex

from pretrain.core.bounds import Share, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.folders import corpus_of
from pretrain.core.method import Ref
from pretrain.corpus.parts import iterate
from pretrain.data import DataOperation
from pretrain.data._mapped import check_text
from pretrain.data._work import desk

if TYPE_CHECKING:
    from datasets import Dataset

START, END, SIGN = "entity_start", "entity_end", "entity_sign"  # the columns that are written: lists of numbers,
RELATION, OTHER = "entity_relation", "entity_other"  # and of texts
HEAD, TAIL = -1, 1  # of h + r = t: the head is t - r, the tail h + r
SPLITS = ("train", "validation", "test")
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"  # a character is a word
_LETTER = rf"[\p{{L}}\p{{N}}\p{{M}}--[{_UNSPACED}]]"
_WORD = regex.compile(rf"[{_UNSPACED}]|{_LETTER}+(?:['’-]{_LETTER}+)*", regex.V1)


class Fact(NamedTuple):
    """A triple, seen from one of its two entities."""

    sign: int
    relation: str
    other: str


@dataclass(frozen=True)
class LongTailEntities(DataOperation):
    """DKPLM: Decomposable Knowledge-enhanced Pre-trained Language Model for Natural Language Understanding (arXiv:2112.01047).

    Of each document the entities that the objective `dkplm` is to replace, with a fact of each. The facts are triples
    of `triples`, a data stage: the columns `head`, `relation` (none: the relation is called as the column `tail`) and
    `tail`, texts, or lists of names of the same thing. Where `concept` names a column, `tail` refers to the document
    that has this value there, and its `head` names the tail. An entity is found wherever one of its names stands, in
    any case, the longest first; words end where letters and digits do, and after each character of a script that has
    no spaces between words. Its weight in the document is

        KLT(e) = [Freq(e) < mean frequency] · KC(e)

    Freq the times that the corpus names it and KC the number of facts that it stands in; the `share` of the document's
    entities that have the highest are chosen, if it is above 0, and for each one of its facts, drawn by `seed`. Written
    are lists: where it begins and ends in the text, whether it is the fact's head (-1) or tail (1), the relation and
    the other entity. Text is not changed. The paper's weight has a third factor, how much a sentence's vector changes
    without the entity, and counts neighbours over several steps; these, and linking by context, are not here.
    """  # noqa: E501

    computes: ClassVar[bool] = False
    adds: ClassVar[tuple[str, ...]] = (START, END, SIGN, RELATION, OTHER)
    speed: ClassVar[float] = 0.4e6

    triples: Ref
    head: str = "head"
    relation: str | None = "relation"
    tail: str = "tail"
    concept: str | None = None
    share: Share = 0.5
    seed: Whole = 0

    def __call__(self, corpus: Dataset) -> Dataset:
        """The corpus with the columns."""
        import datasets

        check_text(self.name, corpus)
        facts, texts = self.facts(), [text or "" for text in corpus["text"][:]]
        longest = max((len(_WORD.findall(name)) for name in facts), default=0)
        mentions = [[*named(text, facts, longest)] for text in texts]
        frequency = Counter(name for each in mentions for name, _, _ in each)
        mean = frequency.total() / max(1, len(frequency))
        weights = {name: len(facts[name]) * (times < mean) for name, times in frequency.items()}
        rng, rows = np.random.default_rng(self.seed), list[dict[str, list[int] | list[str]]]()
        for each in mentions:
            ranked = sorted(each, key=lambda mention: -weights[mention[0]])[: math.floor(self.share * len(each) + 0.5)]
            chosen = sorted((start, end, name) for name, start, end in ranked if weights[name] > 0)
            drawn = [facts[name][int(rng.integers(len(facts[name])))] for _, _, name in chosen]
            rows.append({
                START: [start for start, _, _ in chosen], END: [end for _, end, _ in chosen],
                SIGN: [fact.sign for fact in drawn], RELATION: [fact.relation for fact in drawn],
                OTHER: [fact.other for fact in drawn],
            })  # fmt: skip
        with desk() as here:
            report: dict[str, object] = {"method": self.name, "entities": len(facts), "named": len(frequency)}
            rare = sum(times < mean for times in frequency.values())
            taken = sum(len(row[START]) for row in rows)
            here.reports.append(report | {"mentions": frequency.total(), "long_tail": rare, "chosen": taken})
        made = corpus.remove_columns([name for name in self.adds if name in corpus.column_names])
        for name in self.adds:
            kind = datasets.List(datasets.Value("int64" if name in (START, END, SIGN) else "string"))
            made = made.add_column(name, [row[name] for row in rows], feature=kind)
        return made

    def facts(self) -> dict[str, list[Fact]]:
        """The facts of each name, as `surface` has it."""
        documents = [*self._documents()]
        by_concept = {str(row[self.concept]): row[self.head] for row in documents if self.concept}
        facts = defaultdict[str, list[Fact]](list)
        for row in documents:
            tail = by_concept.get(str(row[self.tail])) if self.concept else row[self.tail]
            heads, tails = names_of(row[self.head]), names_of(tail)
            if not heads or not tails or heads == tails:
                continue
            relation = self.tail if self.relation is None else str(row[self.relation])
            for name in heads:
                facts[surface(name)].append(Fact(HEAD, relation, tails[0]))
            for name in tails:
                facts[surface(name)].append(Fact(TAIL, relation, heads[0]))
        return dict(facts)

    def _documents(self) -> Iterator[Mapping[str, object]]:
        folder = corpus_of(Path(self.triples))
        if not (folder / "corpus.json").exists():
            wrong = f"{self.name}: triples: {self.triples} is not a corpus (no corpus.json)"
            raise PretrainError(f"{wrong}; accepted: a data stage")
        columns = [name for name in (self.head, self.relation, self.tail, self.concept) if name is not None]
        for split in SPLITS:
            for document in iterate(folder / split, tuple(columns)):
                missing = next((name for name in columns if name not in document), None)
                if missing is not None:
                    raise PretrainError(f"{self.name}: triples: no column {missing!r}; accepted: a corpus with it")
                yield document


def names_of(value: object) -> list[str]:
    """A text, or the texts of a list, as names; blanks are single."""
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return [" ".join(str(each).split()) for each in values if _WORD.search(str(each))]


def surface(text: str) -> str:
    """What is compared of a name: from its first word to its last, in lower case, with single blanks."""
    spans = [match.span() for match in _WORD.finditer(text)]
    return " ".join(text[spans[0][0] : spans[-1][1]].lower().split()) if spans else ""


def named(text: str, facts: Mapping[str, Sequence[Fact]], longest: int) -> Iterator[tuple[str, int, int]]:
    """The names of `facts` that stand in a text, from the left and the longest first, and where they begin and end."""
    spans, place = [match.span() for match in _WORD.finditer(text)], 0
    while place < len(spans):
        start, size = spans[place][0], 0
        for more in range(min(longest, len(spans) - place), 0, -1):
            name = " ".join(text[start : spans[place + more - 1][1]].lower().split())
            if name in facts:
                size = more
                yield name, start, spans[place + more - 1][1]
                break
        place += max(1, size)
