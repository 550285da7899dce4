"""Pairs of a taxonomy's descriptions, with the relation that their concepts have."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pretrain.core.bounds import Whole
from pretrain.core.errors import PretrainError
from pretrain.data import DataOperation
from pretrain.data._columns import check_columns
from pretrain.data._work import desk

if TYPE_CHECKING:
    from datasets import Dataset

PAIR, RELATION = "pair", "relation"  # the columns that are written
RELATIONS = ("random", "linked", "grouped")


@dataclass(frozen=True)
class TaxonomyPairs(DataOperation):
    """ESCOXLM-R: Multilingual Taxonomy-driven Pre-training for the Job Market Domain (arXiv:2305.12092).

    Each description gets a second one as its `pair` and, as `relation`, how that was drawn, each way as likely:
    `random`, of all; `linked`, of those of the same `concept` (in ESCO an occupation's titles and skills, whose pages
    link one another, in any language); `grouped`, of those of the same `group` (ESCO's major group of two digits). A
    random one may be of the group, and a grouped one of the concept, as with the authors. It is always another
    document: one that has no other of its concept, or of its group, is not drawn that way. Other columns stay. The
    objective `relation_prediction` learns from the pairs.
    """

    adds: ClassVar[tuple[str, ...]] = (PAIR, RELATION)
    computes: ClassVar[bool] = False
    speed: ClassVar[float] = 300e6

    concept: str = "concept"
    group: str = "domain"
    seed: Whole = 0

    def __call__(self, corpus: Dataset) -> Dataset:
        """The documents with a pair and a relation each."""
        check_columns(self.name, corpus, ("text", self.concept, self.group))
        if len(corpus) < 2:
            raise PretrainError(f"{self.name}: {len(corpus)} documents: accepted: 2 or more, to make pairs of")
        texts = corpus["text"][:]
        keys = {"linked": corpus[self.concept][:], "grouped": corpus[self.group][:]}
        members = {relation: _members(values) for relation, values in keys.items()}
        rng, pairs, relations = np.random.default_rng(self.seed), list[str](), list[str]()
        for number in range(len(texts)):
            of_way = {relation: members[relation].get(values[number], ()) for relation, values in keys.items()}
            ways = [name for name in RELATIONS if name == "random" or len(of_way[name]) > 1]
            way = ways[int(rng.integers(len(ways)))]
            others = range(len(texts)) if way == "random" else of_way[way]
            place = int(rng.integers(len(others) - 1))  # among those without this one
            pairs.append(texts[others[place] if others[place] < number else others[place + 1]])
            relations.append(way)
        with desk() as here:
            here.reports.append({"method": self.name, "relations": dict(sorted(Counter(relations).items()))})
        made = corpus.remove_columns([name for name in self.adds if name in corpus.column_names])
        return made.add_column(PAIR, pairs).add_column(RELATION, relations)


def _members(values: Sequence[object]) -> Mapping[object, Sequence[int]]:
    """The numbers of the documents of each value, in order; none of those without one."""
    members: dict[object, list[int]] = defaultdict(list)
    for number, value in enumerate(values):
        if value is not None:
            members[value].append(number)
    return members
