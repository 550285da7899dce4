"""Grammatical errors: right texts get errors of grammar and spelling by rules, each token with a tag of its error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pretrain.core.bounds import Positive, Whole
from pretrain.core.files import digest
from pretrain.core.grammar.edits import Edit, tags_of, to_m2, token_spans
from pretrain.core.grammar.rules import Grammar, read_grammar, with_errors
from pretrain.core.grammar.sentences import sentences
from pretrain.core.method import Ref
from pretrain.data import DataOperation
from pretrain.data._generating import grown
from pretrain.data._mapped import check_text, mapped
from pretrain.data._work import desk

if TYPE_CHECKING:
    from datasets import Dataset

    from pretrain.data._generating import Document, Written

TARGET, TAGS, EDITS = "target", "tags", "edits"


@dataclass(frozen=True)
class GrammaticalErrors(DataOperation):
    """GECTurk: Grammatical Error Correction and Detection Dataset for Turkish (arXiv:2309.11346).

    Right texts get errors, from which correctors learn: a rule looks for its places (a conjunction that is written
    apart, a word that loses a vowel, …), and at each changes the tokens with its own probability, times `rate`; rules
    come in a random order, and no token is changed twice. `text` becomes the text with errors, and beside it stand
    `target`, what was right (for `seq2seq`), `tags`, for each token `B-TYPE`, `I-TYPE` or `O` (for `tagging`), and
    `edits`, lines of the M2 format which, applied, give `target` back to the character. With `sentences` each sentence
    becomes a document of its own, as in the paper. What is drawn follows from the text and `seed`. Held-out documents
    stay right: the evaluation `error_correction` puts errors into them.

    `language` is `turkish`, `english` or `german`, or one of the file `rules` (of the form of
    pretrain/core/grammar/rules.yaml); `types` are the rules that are used, by default all. Turkish has the
    25 rules of the authors' code with the probabilities that stand there, but lists of words of our own, and forms that
    can be told by their letters where theirs ask a morphological analyser. The rates of English and German are of our
    own. The authors drop sentences that inverse rules do not restore; here the edits restore each.
    """

    computes: ClassVar[bool] = False
    speed: ClassVar[float] = 1.2e6
    adds: ClassVar[tuple[str, ...]] = (TARGET, TAGS, EDITS)

    language: str = "english"
    rules: Ref = ""
    types: tuple[str, ...] = ()
    rate: Positive = 1.0
    sentences: bool = False
    seed: Whole = 0

    @cached_property
    def grammar(self) -> Grammar:
        """The rules."""
        return read_grammar(self.name, self.language, self.rules, self.types)

    def __call__(self, corpus: Dataset) -> Dataset:
        """The documents with errors, and the columns that say what is right."""
        import datasets

        check_text(self.name, corpus)
        grammar = self.grammar
        if self.sentences:
            corpus = grown(corpus, ("text",), _parted, domain="", only=(), real=False, block=256)
        bare = corpus.remove_columns([name for name in self.adds if name in corpus.column_names])
        counts: Counter[str] = Counter()
        wrong = 0

        def make(texts: Sequence[str]) -> dict[str, list[str]]:
            nonlocal wrong
            made = [self.with_errors(text or "", grammar) for text in texts]
            counts.update(edit.type for _, edits in made for edit in edits)
            wrong += sum(bool(edits) for _, edits in made)
            return {
                "text": [text for text, _ in made],
                TARGET: [text or "" for text in texts],
                TAGS: [" ".join(tags_of(edits, len(token_spans(text)))) for text, edits in made],
                EDITS: [to_m2(edits) for _, edits in made],
            }

        kinds = {name: datasets.Value("string") for name in self.adds}
        with desk() as here:
            made = mapped(bare, make, datasets.Features({**bare.features, **kinds}))
            here.reports.append({
                "method": self.name, "with_errors": wrong, "edits": sum(counts.values()),
                "types": dict(sorted(counts.items())),
            })  # fmt: skip
        return made

    def with_errors(self, text: str, grammar: Grammar) -> tuple[str, list[Edit]]:
        """A text with errors, and the edits that undo them."""
        rng = np.random.default_rng(int(digest([self.seed, text])[:15], 16))
        return with_errors(text, grammar, rng, self.rate)


def _parted(documents: list[Document]) -> list[Written]:
    return [
        [
            (f"sentence-{n}", each.strip())
            for n, each in enumerate(sentences(str(document["text"] or "")))
            if each.strip()
        ]
        for document in documents
    ]
