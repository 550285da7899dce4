"""Web noise: documents get the menus, links and footers of pages, with the programs that take these out again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np

from pretrain.core.bounds import Count, Share, Whole
from pretrain.core.files import digest
from pretrain.data import DataOperation
from pretrain.data._generating import filled, grown
from pretrain.data._mapped import check_text, mapped
from pretrain.data._work import desk
from pretrain.data.rewriting._programs import Lines, written
from pretrain.data.rewriting.prox import TARGET, Prox

if TYPE_CHECKING:
    from datasets import Dataset

    from pretrain.data._generating import Document, Written

WORDS = (
    "Home", "About us", "Contact", "Products", "News", "Login", "Register", "Search", "Help", "FAQ", "Blog", "Gallery",
    "Archive", "Forum", "Careers", "Cart", "Sitemap", "Support", "Downloads", "Events",
)  # fmt: skip
SITES = ("example", "webshop", "weather", "travel", "recipes", "stadium", "radio", "garden")
SIGNS = (" | ", " > ", " · ", " - ")
FOOTERS = (
    "Copyright {year} {site}. All rights reserved.", "Privacy Policy | Terms of Service | Cookies",
    "Share this on: Facebook Twitter Email", "Subscribe to the newsletter of {site}",
    "Contact: info@{site}.example.org", "Last updated: {year}", "Back to top", "Page 1 of {number}",
)  # fmt: skip


class Noisy(NamedTuple):
    """A text with noise; the lines and the strings of it that are noise; whether nothing else is left."""

    text: str
    lines: tuple[Lines, ...] = ()
    strings: tuple[str, ...] = ()
    junk: bool = False


@dataclass(frozen=True)
class WebNoise(DataOperation):
    """Programming Every Example: Lifting Pre-training Data Quality like Experts at Scale (arXiv:2409.17115).

    The noise that the paper finds in every corpus, put into clean text, to see what `prox` takes out of it. With
    probability `rate` a document gets one to three lines of menus at its beginning, as many of footers at its end, a
    link as a line of its own and one at the end of another line; with probability `junk` nothing but menus, links and
    footers is left of it. What is drawn follows from the text and `seed`. Held-out documents stay clean.

    `learn` gives what a refining model learns from in place of the documents, as `prox` with `step: annotate` does:
    the `text` that it will read, in pieces of `tokens` tokens, and the `target`, at `document` level keep_doc() or
    drop_doc(), at `chunk` level the program that takes out just the noise. It stands in for the paper's annotator,
    Llama 3 70B, and knows the truth where that guesses.
    """

    computes: ClassVar[bool] = False
    speed: ClassVar[float] = 40e6

    rate: Share = 0.5
    junk: Share = 0.0
    learn: Literal["", "document", "chunk"] = ""
    tokens: Count = 1500
    seed: Whole = 0

    @property
    def adds(self) -> tuple[str, ...]:
        """The column of programs, where they are to be learnt."""
        return (TARGET,) if self.learn else ()

    def __call__(self, corpus: Dataset) -> Dataset:
        """The documents with noise, or what a refining model learns from."""
        check_text(self.name, corpus)
        counts = {"noisy": 0, "junk": 0}

        def noisy(texts: Sequence[str]) -> list[Noisy]:
            made = [self.noisy(text or "") for text in texts]
            counts["noisy"] += sum(bool(each.lines) for each in made)
            counts["junk"] += sum(each.junk for each in made)
            return made

        with desk() as here:
            if self.learn:
                made = self._learnt(corpus, noisy)
            else:
                made = mapped(corpus, lambda texts: {"text": [each.text for each in noisy(texts)]}, corpus.features)
            here.reports.append({"method": self.name, **counts})
        return made

    def _learnt(self, corpus: Dataset, noisy: Callable[[Sequence[str]], list[Noisy]]) -> Dataset:
        targets: list[str] = []

        def write(documents: list[Document]) -> list[Written]:
            rows = [self.rows(each) for each in noisy([str(document["text"] or "") for document in documents])]
            targets.extend(program for each in rows for _, _, program in each)
            return [[(name, text) for name, text, _ in each] for each in rows]

        made = grown(corpus, ("text",), write, domain="", only=(), real=False, block=256)
        made = made.remove_columns([TARGET]) if TARGET in made.column_names else made
        return made.add_column(TARGET, targets)

    def rows(self, noisy: Noisy) -> list[tuple[str, str, str]]:
        """A name, a text and its program for each piece of a document."""
        assert self.learn
        reader = Prox(generator="nobody", level=self.learn, tokens=self.tokens)
        made = []
        for number, (shown, (first, last)) in enumerate(reader.pieces(noisy.text)):
            program = "drop_doc()" if noisy.junk else "keep_doc()"
            if self.learn == "chunk":
                spans = [(max(a, first), min(b, last)) for a, b in noisy.lines if a <= last and b >= first]
                program = written(spans, [(string, "") for string in noisy.strings if string in shown])
            made.append((f"{self.learn}-{number}", filled(reader.templates[self.learn], {"text": shown}).user, program))
        return made

    def noisy(self, text: str) -> Noisy:
        """A text with noise, or as it is."""
        rng = np.random.default_rng(int(digest([self.seed, text])[:15], 16))
        junk, some = rng.random(2)
        if junk < self.junk:
            lines = [_line(rng) for _ in range(int(rng.integers(4, 13)))]
            return Noisy("\n".join(lines), ((0, len(lines) - 1),), (), True)
        if some >= self.rate or not text.strip():
            return Noisy(text)
        lines = text.split("\n")
        link, place = f" {_link(rng)}", int(rng.integers(len(lines)))
        strings = (link,) if link not in text else ()
        lines[place] += link if strings else ""
        marked = [(line, False) for line in lines]
        marked.insert(int(rng.integers(len(lines) + 1)), (_link(rng), True))
        top, bottom = rng.integers(1, 4, 2)
        marked = [*((_menu(rng), True) for _ in range(top)), *marked, *((_footer(rng), True) for _ in range(bottom))]
        spans = tuple((n, n) for n, (_, noise) in enumerate(marked) if noise)
        return Noisy("\n".join(line for line, _ in marked), spans, strings)


def _line(rng: np.random.Generator) -> str:
    return (_menu, _link, _footer)[int(rng.integers(3))](rng)


def _menu(rng: np.random.Generator) -> str:
    words = rng.permutation(len(WORDS))[: int(rng.integers(3, 7))]
    return SIGNS[int(rng.integers(len(SIGNS)))].join(WORDS[n] for n in words)


def _link(rng: np.random.Generator) -> str:
    site, page = SITES[int(rng.integers(len(SITES)))], WORDS[int(rng.integers(len(WORDS)))].lower().replace(" ", "-")
    return f"http://www.{site}.example.org/{page}?id={int(rng.integers(1, 1000))}"


def _footer(rng: np.random.Generator) -> str:
    site, year, number = SITES[int(rng.integers(len(SITES)))], int(rng.integers(2001, 2025)), int(rng.integers(2, 30))
    return FOOTERS[int(rng.integers(len(FOOTERS)))].format(site=site, year=year, number=number)
