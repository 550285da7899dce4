"""WRAP: passages of web documents are written anew in plain styles, and stand beside the real ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError
from pretrain.core.files import digest
from pretrain.core.grammar.sentences import sentences
from pretrain.data._chunks import chunks
from pretrain.data._generating import Generating, Prompt, filled, read_prompts
from pretrain.data._work import desk

if TYPE_CHECKING:
    from datasets import Dataset

    from pretrain.data._generating import Document, Written

Style = Literal["easy", "medium", "hard", "qa"]
_INTRODUCTION = re.compile(r"paraphras|the following|high[- ]quality english", re.IGNORECASE)
_END = re.compile(r"\n\n|:")


@dataclass(frozen=True)
class Wrap(Generating):
    """Rephrasing the Web: A Recipe for Compute and Data-Efficient Language Modeling (arXiv:2401.16380).

    A document is cut into passages of whole sentences of about `tokens` tokens (of more, a model leaves things out),
    and an instruction-tuned model writes each anew in one of `styles`, drawn by the passage and `seed`: `easy` (that a
    toddler understands), `medium` (as on Wikipedia), `hard` (terse and abstruse) or `qa` (questions and answers). What
    is written of a passage is a document of its own, after the real one, so that what is trained on is real and
    synthetic in the ratio 1:1, and each passage is seen twice; `real: false` leaves the real ones out. An introduction
    ("Here's a paraphrase of the passage:") is cut up to its blank line or colon, and where the first sentence still
    has such words the answer is left out.

    The prompts are the paper's, `prompts` a file with others. Who writes (`generator` or `server`), and which answers
    are left out: docs/generators.md. The paper's model is Mistral-7B-Instruct. It counts tokens and ends sentences by
    NLTK's rules, here both are by rules of any language; temperature, and what becomes of an answer that is cut, are
    not said.
    """

    styles: tuple[Style, ...] = ("medium",)
    tokens: Count = 300
    real: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.styles or len({*self.styles}) < len(self.styles):
            raise PretrainError(
                f"wrap: styles {list(self.styles)}: accepted: one or more of easy, medium, hard, qa, each once",
                place=("styles",),
            )

    @cached_property
    def templates(self) -> dict[str, Prompt]:
        """The prompt of each style."""
        return read_prompts(self.name, self.prompts, Path(__file__).with_suffix(".yaml"), self.styles, ("text",))

    def __call__(self, corpus: Dataset) -> Dataset:
        """Each document, and after it the passages that are written anew."""
        with desk() as here:
            asking = self.asking(here)

            def write(documents: list[Document]) -> list[Written]:
                written: list[list[tuple[str, str]]] = [[] for _ in documents]
                for (row, name), text in asking.texts(self._asked(documents), without_introduction):
                    written[row].append((name, text))
                return [*written]

            made = self.grown(corpus, ("text",), write, real=self.real)
            asking.report(corpus, made)
        return made

    def _asked(self, documents: list[Document]) -> Iterator[tuple[tuple[int, str], Prompt]]:
        for row, document in enumerate(documents):
            for number, passage in enumerate(chunks(str(document["text"] or ""), self.tokens)):
                style = self.style(passage)
                yield (row, f"{style}-{number}"), filled(self.templates[style], {"text": passage.strip()})

    def style(self, passage: str) -> Style:
        """The style that a passage is written in."""
        rng = np.random.default_rng(int(digest([self.seed, passage])[:15], 16))
        return self.styles[int(rng.integers(len(self.styles)))]


def without_introduction(text: str) -> str | None:
    """An answer without what it says of itself at its beginning; None where that cannot be told from the rest."""
    if _introduced(text):
        end = _END.search(text)
        text = text[end.end() :].strip() if end else ""
    return None if not text or _introduced(text) else text


def _introduced(text: str) -> bool:
    return bool(_INTRODUCTION.search(next(iter(sentences(text)), "")))
