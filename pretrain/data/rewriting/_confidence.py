"""How good a model finds the response to a prompt, and which of two is better: BSDetector's (arXiv:2308.16175).

The model is asked with multiple choice; where the paper reads letters that are sampled, here are the probabilities
that they are sampled with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.checkpoint import lineage
from pretrain.core.encoding import encode, text_of
from pretrain.core.errors import PretrainError
from pretrain.core.generation.continuations import judge, sample
from pretrain.core.generation.settings import ends
from pretrain.core.hardware import pick_device
from pretrain.core.models.families import positions_of

QUESTIONS = (
    "Is the proposed answer (A) correct, (B) incorrect, or (C) are you not sure?",
    "Are you really sure that the proposed answer is correct? Choose again: (A) correct, (B) incorrect, (C) not sure.",
)
WHICH = "Which answer is better: (A), (B), or (C) neither?"
LETTERS = ("A", "B", "C")
VALUES = (1.0, 0.0, 0.5)  # of correct, incorrect, not sure
Similarity = Callable[[str, str], tuple[float, float]]  # of two responses: how alike, and whether equal


def consistency(response: str, sampled: Sequence[str], similarity: Similarity, alpha: float) -> float:
    """O = mean over sampled responses of α · likeness + (1 - α) · equality."""
    pairs = [similarity(other, response) for other in sampled]
    return float(np.mean([alpha * alike + (1 - alpha) * equal for alike, equal in pairs]))


def preferred(candidate: float, response: float) -> float:
    """The candidate's share of two confidences; a half where there are none."""
    return candidate / (candidate + response) if candidate + response else 0.5


@dataclass
class Judge:
    """A causal checkpoint that answers prompts and judges answers, each at most `answer` tokens long."""

    folder: Path
    length: int  # 0: that of its training
    answer: int

    def __post_init__(self) -> None:
        self.model, tokenizer = checkpoint.load(self.folder, device=pick_device())
        if tokenizer is None or not self.model.can_generate() or self.model.config.is_encoder_decoder:
            raise PretrainError(f"{self.folder}: accepted: a causal language model, with its tokenizer")
        self.tokenizer, self.vocabulary = tokenizer, Vocabulary.of(tokenizer)
        limit = positions_of(self.model)
        length = self.length or lineage(self.folder).get("length") or 512
        self.length = min(length, limit) if isinstance(limit, int) else length
        if self.length < self.answer + 2:
            raise PretrainError(f"length {self.length}: accepted: room for a prompt and {self.answer} tokens of answer")

    def _prompt(self, text: str, room: int) -> list[int]:
        """A prompt's tokens; one that is too long loses its beginning."""
        begin = [] if self.vocabulary.begin is None else [self.vocabulary.begin]
        ids = encode(self.tokenizer, [text])[0].tolist()
        return begin + ids[max(0, len(ids) - (self.length - room - len(begin))) :]

    def answers(self, prompt: str, count: int, temperature: float, seed: int = 0) -> list[str]:
        """`count` answers, sampled, or greedy at temperature 0."""
        made = sample(
            self.model, self._prompt(prompt, self.answer), count, max_new_tokens=self.answer, temperature=temperature,
            eos=ends(self.model, self.vocabulary), pad=self.vocabulary.pad,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return [text_of(self.tokenizer, ids, skip_special_tokens=True).strip() for ids in made]

    def certainty(self, prompt: str, response: str, reflection: Literal["choice", "likelihood"]) -> float:
        """S: what the model makes of a response when asked twice, or the mean probability of its tokens."""
        if reflection == "likelihood":
            end = [] if self.vocabulary.eos is None else [self.vocabulary.eos]
            after = encode(self.tokenizer, [response])[0].tolist()[: self.answer - len(end)] + end
            (judgement,) = judge(self.model, [(self._prompt(prompt, len(after)), after)])
            return float(np.exp(judgement.logp / max(judgement.tokens, 1)))
        asked = [f"Question: {prompt}\nProposed answer: {response}\n{question}\nAnswer: (" for question in QUESTIONS]
        return float(np.mean([np.dot(VALUES, share) for share in self._choices(asked)]))

    def preference(self, prompt: str, candidate: str, response: str) -> float:
        """The probability of choosing the candidate over the response, the mean over both orders."""
        pairs = ((candidate, response), (response, candidate))
        asked = [
            f"Question: {prompt}\nAnswer (A): {first}\nAnswer (B): {second}\n{WHICH}\nAnswer: ("
            for first, second in pairs
        ]
        first, second = self._choices(asked)
        return float(first[0] + second[1]) / 2

    def _choices(self, asked: Sequence[str]) -> list[list[float]]:
        """Of each question the shares of the letters."""
        letters = [ids.tolist() for ids in encode(self.tokenizer, LETTERS)]
        prompts = [self._prompt(text, max(map(len, letters))) for text in asked]
        judgements = judge(self.model, [(prompt, letter) for prompt in prompts for letter in letters])
        logp_QC = np.array([judgement.logp for judgement in judgements]).reshape(len(asked), len(letters))
        share_QC = np.exp(logp_QC - logp_QC.max(1, keepdims=True))
        shares: list[list[float]] = (share_QC / share_QC.sum(1, keepdims=True)).tolist()
        return shares
