"""Self-play: each prompt is answered by the model itself, and the answer that people gave is preferred to that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError, nearest
from pretrain.data._answers import Answer
from pretrain.data._generating import Generating
from pretrain.data._generator import Prompt
from pretrain.data._work import desk

if TYPE_CHECKING:
    from datasets import Dataset

CHOSEN, REJECTED = "chosen", "rejected"  # the columns that preference optimisation reads
NO_QUESTION, UNUSABLE, SAME = "no question or answer", "no answer of use", "the same answer"


@dataclass(frozen=True)
class Spin(Generating):
    """Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models (arXiv:2401.01335).

    The opponent, the checkpoint `generator` as its last tuning has left it, answers the `prompt` of each document (with
    the message `system` before it, where one is given), in its chat template. The document gets the columns `chosen`,
    its true answer `target`, and `rejected`, the opponent's; the objective `dpo` with the opponent as `reference` then
    has the paper's loss, ℓ(λ log(p_θ(y|x) / p_θt(y|x)) - λ log(p_θt'(y'|x) / p_θt(y'|x))) with the logistic ℓ and λ its
    `beta`. The next iteration has the tuned model as opponent. Documents that the opponent answers as they do, or with
    nothing that can be used (docs/generators.md; any length will do), are left out. Sampled answers differ by `seed`.
    """

    adds: ClassVar[tuple[str, ...]] = (CHOSEN, REJECTED)

    prompt: str = "text"
    target: str = "target"
    system: str = ""
    max_new_tokens: Count = 256
    unfinished: Literal["drop", "keep"] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompts", "domain", "only"):
            if getattr(self, name):
                raise PretrainError(
                    f"spin: {name} {getattr(self, name)!r}: accepted: none; prompts are the documents' own, and no "
                    "document is new", place=(name,),
                )  # fmt: skip

    def __call__(self, corpus: Dataset) -> Dataset:
        """The documents with an answer to prefer and one to prefer it to; the order is kept."""
        for name in (self.prompt, self.target):
            if name not in corpus.column_names:
                known = corpus.column_names
                raise PretrainError(f"spin: no column {name!r}{nearest(name, known)}; accepted: {', '.join(known)}")
        why = [NO_QUESTION] * len(corpus)
        kept, rejected = [], []
        with desk() as here:
            asking = self.asking(here)
            for (number, target), answer in asking.texts(self._asked(corpus, why)):
                why[number] = SAME if answer.strip() == target.strip() else ""
                if not why[number]:
                    kept.append(number)
                    rejected.append(answer)
            rows_D = np.flatnonzero([bool(each) for each in why])
            here.drop(self.name, corpus, rows_D, [why[row] for row in rows_D])
            made = corpus.remove_columns([name for name in (CHOSEN, REJECTED) if name in corpus.column_names])
            made = made.select(kept)
            made = made.add_column(CHOSEN, made[self.target][:]).add_column(REJECTED, rejected)
            asking.report(corpus, made)
        return made

    def fault(self, answer: Answer, prompt: Prompt, text: str | None, final: bool = True) -> str:
        """Why an answer is not used; a short one, and one that the prompt holds, are answers like others."""
        return super().fault(answer, prompt, text, False)

    def _asked(self, corpus: Dataset, why: list[str]) -> Iterator[tuple[tuple[int, str], Prompt]]:
        for number, row in enumerate(corpus.select_columns([self.prompt, self.target])):
            prompt, target = row[self.prompt], row[self.target]
            if prompt and target:
                why[number] = UNUSABLE
                yield (number, str(target)), Prompt(str(prompt), self.system)
