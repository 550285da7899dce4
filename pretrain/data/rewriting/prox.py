"""ProX: a small model writes a program for each document, and what the program says is done to it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pretrain.core.bounds import Count, NonNegative, PositiveShare, Whole
from pretrain.core.errors import PretrainError
from pretrain.data._answers import Answer
from pretrain.data._generating import Generating, Prompt, filled, grown, read_prompts
from pretrain.data._mapped import check_text, mapped
from pretrain.data._work import Desk, desk
from pretrain.data.rewriting._numbered import beginning, numbered
from pretrain.data.rewriting._programs import Refined, kept_document, read, refined, written

if TYPE_CHECKING:
    from datasets import Dataset

    from pretrain.data._generating import Asking, Document, Written

BLOCK = 256  # documents that are annotated at a time
SYSTEM = "You are a helpful, respectful and honest assistant."
TARGET = "target"
NO_SEED = "no program"  # why a document is no example for a refining model
SCALES = {"education": "Educational score", "format": "Extraction Quality Score"}
NOISES = ("navigation", "links", "footer")
TOKENS = {"document": 2000, "chunk": 1500}
_CODE = re.compile(r"```(?:python)?\s*\n?(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Prox(Generating):
    """Programming Every Example: Lifting Pre-training Data Quality like Experts at Scale (arXiv:2409.17115).

    A small refining model (`generator` or `server`) writes a program for each document, greedily, and the program is
    carried out. At `level: document` it reads the document's first `tokens` tokens (null: 2000) and says keep_doc() or
    drop_doc(). At `level: chunk`, after that, it reads pieces of whole lines of at most `tokens` tokens (null: 1500)
    with their numbers, and says remove_lines(start, end), normalize(source_str, target_str) or untouch_doc(); the
    programs of a document's pieces are one. A line longer than `tokens` is not shown. Programs are read by a grammar
    and never evaluated: other lines are refused and counted. One of `errors` faulty calls (not to be read, or of lines
    that are not there) or more is not followed. A document of whose words a share of `most_removed` would go, or that
    is left with fewer than `least_words`, is dropped; these numbers are the authors' code's. What has no usable answer
    stays. Who writes: docs/generators.md.

    With `step: annotate` a strong model writes what a refining model is to learn: each row a `text` as that model
    will read it, and the program as `target`. Of documents it scores educational value and format from 0 to 5; they
    are kept with 3 for the first, or 2 and at least 4 for the second. Of chunks it is asked for menus, links and
    footers one by one, and the three programs are merged; one that is faulty, names what is not there or would remove
    `most_removed` leaves the chunk out. Tune any causal model on the rows by `seq2seq` with the prompt "{text}" (or by
    `chat`, whose `system` is this one's) for 3 to 5 epochs in batches of 64, a cosine from 1e-5 to 1e-6: the paper's
    for 0.3 billion weights, and 51,000 and 57,000 rows by Llama 3 70B. `system` is said to the refining model where
    its tokenizer has a chat template. The annotator's prompts are the paper's in other words.
    """

    step: Literal["refine", "annotate"] = "refine"
    level: Literal["document", "chunk"] = "chunk"
    tokens: Count | None = None
    errors: Count = 2
    most_removed: PositiveShare = 0.95
    least_words: Whole = 11
    system: str = SYSTEM
    max_new_tokens: Count = 256
    temperature: NonNegative = 0.0
    unfinished: Literal["drop", "keep"] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step == "refine" and self.domain:
            raise PretrainError(f"prox: domain {self.domain!r}: accepted: none; no document is new", place=("domain",))
        if self.step == "annotate" and self.only:
            raise PretrainError(
                f"prox: only {list(self.only)}: accepted: none with step: annotate, whose rows are all its own",
                place=("only",),
            )

    @property
    def adds(self) -> tuple[str, ...]:
        """The column of programs, where they are to be learnt."""
        return (TARGET,) if self.step == "annotate" else ()

    @cached_property
    def templates(self) -> dict[str, Prompt]:
        """What the refining model is given, and what the annotator is asked, by name."""
        asked = () if self.step == "refine" else tuple(SCALES) if self.level == "document" else NOISES
        shipped = Path(__file__).with_suffix(".yaml")
        return read_prompts(self.name, self.prompts, shipped, (self.level, *asked), ("text",))

    def pieces(self, text: str) -> list[tuple[str, tuple[int, int]]]:
        """What is shown of a document, piece by piece, and the numbers of the first and the last line in it."""
        most = self.tokens or TOKENS[self.level]
        if self.level == "chunk":
            return [(piece.text, (piece.first, piece.last)) for piece in numbered(text, most)]
        return [(shown, (0, text.count("\n")))] if (shown := beginning(text, most)) else []

    def __call__(self, corpus: Dataset) -> Dataset:
        """The documents after their programs, in order; or the rows that a refining model learns from."""
        check_text(self.name, corpus)
        with desk() as here:
            return (self._refine if self.step == "refine" else self._annotate)(corpus, here)

    def fault(self, answer: Answer, prompt: Prompt, text: str | None, final: bool = True) -> str:
        """Why an answer is not used; a program is short, and may be what the prompt has as an example."""
        return super().fault(answer, prompt, text, False)

    def _refine(self, corpus: Dataset, here: Desk) -> Dataset:
        asking, counts = self.asking(here), Counter[str]()
        wanted = self.meant(corpus)
        dropped: list[tuple[int, str, int]] = []
        number = 0

        def refine(texts: list[str]) -> dict[str, list[str]]:
            nonlocal number
            meant = {row: texts[row] or "" for row in range(len(texts)) if wanted[number + row]}
            programs = defaultdict[int, list[str]](list)
            for row, program in asking.texts(self._asked(meant)):
                programs[row].append(program)
            made = list(texts)
            for row, text in meant.items():
                outcome = self.outcome(text, "\n".join(programs[row]))
                _count(counts, text, outcome, bool(programs[row]))
                if outcome.text is None:
                    dropped.append((number + row, outcome.reason, outcome.words))
                elif outcome.text != text:
                    made[row] = outcome.text
            number += len(texts)
            return {"text": made}

        short = mapped(corpus, refine, corpus.features)
        rows_D = np.array([row for row, _, _ in dropped], np.int64)
        here.drop(
            self.name, corpus, rows_D, [why for _, why, _ in dropped], np.array([n for _, _, n in dropped], float)
        )
        made = short.select(np.setdiff1d(np.arange(len(corpus)), rows_D).tolist())
        asking.report(corpus, made, level=self.level, step=self.step, programs=dict(sorted(counts.items())))
        return made

    def _asked(self, texts: dict[int, str]) -> Iterator[tuple[int, Prompt]]:
        for row, text in texts.items():
            for shown, _ in self.pieces(text):
                yield row, filled(self.templates[self.level], {"text": shown})._replace(system=self.system)

    def outcome(self, text: str, program: str) -> Refined:
        """What a program makes of a document."""
        if self.level == "document":
            return kept_document(text, program)
        return refined(text, program, most_removed=self.most_removed, errors=self.errors, least_words=self.least_words)

    def _annotate(self, corpus: Dataset, here: Desk) -> Dataset:
        asking, counts = self.asking(here), Counter[str]()
        targets: list[str] = []
        bare: list[int] = []
        number = 0

        def write(documents: list[Document]) -> list[Written]:
            nonlocal number
            rows = self._rows([str(document["text"] or "") for document in documents], asking, counts)
            bare.extend(number + n for n, each in enumerate(rows) if not each)
            number += len(rows)
            targets.extend(program for each in rows for _, _, program in each)
            return [[(name, text) for name, text, _ in each] for each in rows]

        made = grown(corpus, ("text",), write, domain=self.domain, only=(), real=False, block=BLOCK)
        here.drop(self.name, corpus, np.array(bare, np.int64), NO_SEED)
        made = made.remove_columns([TARGET]) if TARGET in made.column_names else made
        made = made.add_column(TARGET, targets)
        asking.report(corpus, made, level=self.level, step=self.step, programs=dict(sorted(counts.items())))
        return made

    def _rows(self, texts: list[str], asking: Asking, counts: Counter[str]) -> list[list[tuple[str, str, str]]]:
        """Of each document the pieces with a program: a name, what the refining model will read, the program."""
        pieces = [self.pieces(text) for text in texts]
        asked = (
            ((row, number, name), filled(prompt, {"text": shown}))
            for row, each in enumerate(pieces)
            for number, (shown, _) in enumerate(each)
            for name, prompt in self.templates.items()
            if name != self.level
        )
        answers = defaultdict[tuple[int, int], dict[str, str]](dict)
        for (row, number, name), answer in asking.texts(asked):
            answers[row, number][name] = answer
        made: list[list[tuple[str, str, str]]] = [[] for _ in texts]
        for row, each in enumerate(pieces):
            for number, (shown, lines) in enumerate(each):
                answered = answers[row, number]
                program, reason = (
                    self.verdict(answered) if self.level == "document" else self.merged(texts[row], answered, lines)
                )
                counts[reason] += 1
                if program:
                    text = filled(self.templates[self.level], {"text": shown}).user
                    made[row].append((f"{self.level}-{number}", text, program))
        return made

    def verdict(self, answers: dict[str, str]) -> tuple[str, str]:
        """A document's program by its two scores; none, and why, where one is missing."""
        scores = {name: re.findall(rf"{SCALES[name]}:\W*([0-5])\b", answer) for name, answer in answers.items()}
        if not all(scores.get(name) for name in SCALES):
            return "", "without scores"
        education, form = (int(scores[name][-1]) for name in SCALES)
        keep = education >= 3 or (education == 2 and form >= 4)
        return ("keep_doc()" if keep else "drop_doc()"), ("kept" if keep else "dropped")

    def merged(self, text: str, answers: dict[str, str], lines: tuple[int, int]) -> tuple[str, str]:
        """The three programs of some lines of a text as one; none, and why, where one of them is at fault."""
        programs = [read(code) for answer in answers.values() for code in _CODE.findall(answer)[:1]]
        if len(programs) < len(NOISES):
            return "", "without programs"
        if any(each.errors or each.refused or each.everything or each.drop for each in programs):
            return "", "faulty"
        spans = [span for each in programs for span in each.lines]
        strings = [pair for each in programs for pair in each.strings]
        if not all(lines[0] <= first and last <= lines[1] for first, last in spans):
            return "", "of other lines"
        shown = "\n".join(text.split("\n")[lines[0] : lines[1] + 1])
        within = written([(first - lines[0], last - lines[0]) for first, last in spans], strings)
        outcome = refined(shown, within, most_removed=self.most_removed, errors=1, least_words=0)
        if outcome.missing or outcome.errors:
            return "", "of other strings"
        if outcome.text is None:
            return "", "too much removed"
        return written(spans, strings), ("changed" if spans or strings else "untouched")


def _count(counts: Counter[str], before: str, outcome: Refined, answered: bool) -> None:
    """What became of a document, for the report."""
    counts["documents without an answer"] += not answered
    counts["documents changed"] += outcome.text not in (None, before)
    counts["programs ignored for errors"] += outcome.ignored
    counts["lines removed"] += outcome.removed * (outcome.text is not None)
    counts["characters removed"] += len(before) - len(outcome.text) if outcome.text is not None else 0
    counts["strings normalised"] += outcome.replaced
    counts["strings that are not there"] += outcome.missing
    counts["calls at fault"] += outcome.errors
    counts["lines refused"] += outcome.refused
