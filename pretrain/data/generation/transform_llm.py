"""TransformLLM: passages of a domain become texts of reading comprehension, by a bank of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError, nearest
from pretrain.core.files import digest
from pretrain.core.foreign import yaml
from pretrain.core.foreign.paths import expanded
from pretrain.data._chunks import chunks
from pretrain.data._generating import Generating, Prompt, filled, read_prompts
from pretrain.data._work import desk
from pretrain.data.generation._comprehension import formed, pairs, ruled

if TYPE_CHECKING:
    from datasets import Dataset

    from pretrain.data._generating import Document, Written


@dataclass(frozen=True)
class TransformLLM(Generating):
    """TransformLLM: Adapting Large Language Models via LLM-Transformed Reading Comprehension Text (arXiv:2410.21479).

    A document of the domain is cut into passages of whole sentences of about `tokens` tokens, and an affordable model
    turns each into reading comprehension: of the bank of prompts `tasks` are drawn by the passage and `seed` (of
    `kinds`, by default of all), and the questions and answers that it writes stand after the passage, which makes one
    new document. It stands in place of the real ones (`real: true` keeps these too); a passage none of whose answers
    can be used has none. Go on with a model on these texts and a share of general text in the `mixture`. An answer
    must have pairs of lines `Question: …` and `Answer: …`; numbers and marks before them are passed over, copies and
    halves are left out, and one without a pair is not used (`unfit`). Which others are not: docs/generators.md.

    The paper's bank and numbers (it converts over 500 million tokens of law for Phi-2 and Mistral-7B) were not at hand
    but for its abstract: the bank here is of our own, and `prompts` a file with another one, of any names. `rules:
    true` makes one question a passage by rules (a missing word, what follows, an order) for trials without a model.
    """

    tokens: Count = 500
    tasks: Count = 1
    kinds: tuple[str, ...] = ()
    real: bool = False
    rules: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({*self.kinds}) < len(self.kinds):
            raise PretrainError(f"transform_llm: kinds {list(self.kinds)}: accepted: each once", place=("kinds",))

    def _check_writer(self) -> None:
        if not self.rules:
            super()._check_writer()
        elif self.generator or self.server or self.prompts:
            raise PretrainError(
                "transform_llm: rules: accepted: without a generator, a server and prompts", place=("rules",)
            )

    @cached_property
    def bank(self) -> dict[str, Prompt]:
        """The prompts that are drawn from."""
        shipped = Path(__file__).with_suffix(".yaml")
        path = expanded(self.prompts) if self.prompts else shipped
        value, _ = yaml.loads(yaml.read_text(path), str(path))
        names = [*map(str, value)] if isinstance(value, dict) else ["questions"]
        if missing := next((kind for kind in self.kinds if kind not in names), None):
            raise PretrainError(
                f"transform_llm: kinds: {missing!r}{nearest(missing, names)}: accepted: {', '.join(names)}",
                place=("kinds",),
            )
        return read_prompts(self.name, self.prompts, shipped, self.kinds or names, ("text",))

    def __call__(self, corpus: Dataset) -> Dataset:
        """The passages with questions and answers, in place of the documents or after them."""
        with desk() as here:
            if self.rules:
                made = self.grown(corpus, ("text",), self._ruled, real=self.real)
                here.reports.append({"method": self.name, "rules": True})
                return made
            asking, bare = self.asking(here), 0

            def write(documents: list[Document]) -> list[Written]:
                nonlocal bare
                made_of: list[dict[int, list[str]]] = [{} for _ in documents]
                for (row, number), text in asking.texts(self._asked(documents), lambda text: formed(pairs(text))):
                    made_of[row].setdefault(number, []).append(text)
                bare += sum(not each for each in made_of)
                return [
                    [(f"comprehension-{n}", "\n\n".join([self.passages(document)[n], *each[n]])) for n in sorted(each)]
                    for document, each in zip(documents, made_of, strict=True)
                ]

            made = self.grown(corpus, ("text",), write, real=self.real)
            asking.report(corpus, made, documents_without_tasks=bare)
        return made

    def passages(self, document: Document) -> list[str]:
        """A document's passages."""
        return [passage.strip() for passage in chunks(str(document["text"] or ""), self.tokens)]

    def _asked(self, documents: list[Document]) -> Iterator[tuple[tuple[int, int], Prompt]]:
        for row, document in enumerate(documents):
            for number, passage in enumerate(self.passages(document)):
                for kind in self.drawn(passage):
                    yield (row, number), filled(self.bank[kind], {"text": passage})

    def drawn(self, passage: str) -> list[str]:
        """The prompts that are asked of a passage; all, where there are no more than are drawn."""
        names = [*self.bank]
        return [names[n] for n in self._random(passage).permutation(len(names))[: self.tasks]]

    def _random(self, passage: str) -> np.random.Generator:
        return np.random.default_rng(int(digest([self.seed, passage])[:15], 16))

    def _ruled(self, documents: list[Document]) -> list[Written]:
        return [
            [
                (f"comprehension-{number}", f"{passage}\n\n{task}" if task else passage)
                for number, passage in enumerate(self.passages(document))
                for task in [ruled(passage, self._random(passage))]
            ]
            for document in documents
        ]
