"""EntiGraph: of a few documents many, one for each pair and triple of what they speak of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pretrain.core.bounds import Count, NonNegative, Whole
from pretrain.core.errors import PretrainError, nearest
from pretrain.core.files import digest
from pretrain.core.foreign import json as foreign
from pretrain.data._generating import Generating, Prompt, filled, read_prompts
from pretrain.data._work import desk

if TYPE_CHECKING:
    from datasets import Dataset

    from pretrain.data._generating import Asking, Document, Written

BLOCK = 16  # documents whose texts are in memory at once
PLACES = {"entities": ("document",), "pairs": ("document", "entity1", "entity2")}
PLACES["triples"] = (*PLACES["pairs"], "entity3")


class Graph(NamedTuple):
    """What a document is about: its summary and its entities."""

    summary: str
    entities: tuple[str, ...]


@dataclass(frozen=True)
class EntiGraph(Generating):
    """Synthetic continued pretraining (arXiv:2409.07431).

    A small corpus is enlarged before a model goes on with it. Of each document a model lists the entities E_1 … E_n
    and a summary, as JSON (asked up to `attempts` times, until it can be read); then it is asked, with the document
    before it, to discuss it in relation to each of two entities and how these interact, for all n(n - 1)/2 pairs, and
    the same for the n(n - 1)(n - 2)/6 triples: at most `pairs` and `triples` of them, drawn by the document and `seed`
    (null: all, in the authors' code). Each answer is a document, the summary too, and stands in place of the one it is
    made of, which is trained on itself only with `real: true`. `entities` is the most that are taken of a document,
    the first; `title` a column whose text is put before the document's. Go on with a share of general text (0.1 in the
    paper) in the `mixture`, at a small rate.

    The prompts ask for what the paper's do, in other words; `prompts` is a file with others. Who writes (`generator`
    or `server`), and which answers are left out: docs/generators.md. The paper's is GPT-4 Turbo at temperature 1; it
    keeps answers that are cut, and draws the order of triples once for all documents.
    """

    temperature: NonNegative = 1.0
    max_new_tokens: Count = 2048
    pairs: Whole | None = None
    triples: Whole | None = None
    entities: Count | None = None
    attempts: Count = 5
    title: str = ""
    real: bool = False

    @cached_property
    def templates(self) -> dict[str, Prompt]:
        """The prompts for entities, pairs and triples."""
        read = (
            read_prompts(self.name, self.prompts, Path(__file__).with_suffix(".yaml"), [n], p)
            for n, p in PLACES.items()
        )
        return {name: prompt for each in read for name, prompt in each.items()}

    def __call__(self, corpus: Dataset) -> Dataset:
        """What is written of the documents, after each or in its place."""
        if self.title and self.title not in corpus.column_names:
            known = corpus.column_names
            raise PretrainError(
                f"entigraph: title {self.title!r}{nearest(self.title, known)}: accepted: a column ({', '.join(known)})",
                place=("title",),
            )
        without = 0
        with desk() as here:
            asking = self.asking(here)

            def write(documents: list[Document]) -> list[Written]:
                nonlocal without
                contents = [self.content(document) for document in documents]
                graphs = self._graphs(contents, asking)
                without += len(contents) - len(graphs)
                written: list[list[tuple[str, str]]] = [[] for _ in documents]
                for row, graph in graphs.items():
                    written[row] += [("summary", graph.summary)] if graph.summary else []
                for (row, name), text in asking.texts(self._asked(contents, graphs)):
                    written[row].append((name, text))
                return [*written]

            columns = ("text", self.title) if self.title else ("text",)
            made = self.grown(corpus, columns, write, real=self.real, block=BLOCK)
            asking.report(corpus, made, without_entities=without)
        return made

    def content(self, document: Document) -> str:
        """What is asked about: the text, after the document's title where it has one."""
        title = document.get(self.title) if self.title else None
        return f'"{title}".\n{document["text"] or ""}' if title else str(document["text"] or "")

    def _graphs(self, contents: Sequence[str], asking: Asking) -> dict[int, Graph]:
        """What each document is about, by its row; those of which no answer can be read are not there."""
        graphs: dict[int, Graph] = {}
        for attempt in range(self.attempts if self.temperature else 1):
            prompts = [
                (row, filled(self.templates["entities"], {"document": content}, attempt))
                for row, content in enumerate(contents)
                if row not in graphs and content.strip()
            ]
            for row, text in asking.texts(prompts, clean=readable, final=False):
                summary, *entities = foreign.loads(text)
                graphs[row] = Graph(summary, tuple(entities[: self.entities]))
        return dict(sorted(graphs.items()))

    def _asked(self, contents: Sequence[str], graphs: dict[int, Graph]) -> Iterator[tuple[tuple[int, str], Prompt]]:
        for row, graph in graphs.items():
            for of, most in ((2, self.pairs), (3, self.triples)):
                name = ("pairs", "triples")[of - 2]
                for chosen in self.chosen(contents[row], len(graph.entities), of, most):
                    values = {f"entity{n}": graph.entities[entity] for n, entity in enumerate(chosen, 1)}
                    prompt = filled(self.templates[name], values | {"document": contents[row]})
                    yield (row, "-".join([name[:-1], *map(str, chosen)])), prompt

    def chosen(self, content: str, entities: int, of: int, most: int | None) -> list[tuple[int, ...]]:
        """The pairs or triples of a document's entities that are asked about, in their order."""
        combined = list(combinations(range(entities), of))
        if most is None or most >= len(combined):
            return combined
        rng = np.random.default_rng(int(digest([self.seed, of, content])[:15], 16))
        return [combined[n] for n in np.sort(rng.permutation(len(combined))[:most])]


def readable(answer: str) -> str | None:
    """The summary and the entities, each once, of an answer with JSON in it, as a JSON list; None without entities."""
    start, end = answer.find("{"), answer.rfind("}")
    try:
        value = foreign.loads(answer[start : end + 1])
        summary, names = value.get("summary"), value["entities"]
        entities = [" ".join(name.split()) for name in names] if isinstance(names, list) else []
    except (foreign.NotJSON, KeyError, TypeError, AttributeError):
        return None
    entities = list(dict.fromkeys(filter(None, entities)))
    return json.dumps([summary.strip() if isinstance(summary, str) else "", *entities]) if entities else None
