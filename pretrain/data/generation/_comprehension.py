"""Questions on a passage and their answers: read from what a model wrote, or made by rules."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np

from pretrain.core.grammar.sentences import sentences

_MARK = re.compile(r"(?im)^[\s*#>-]*(?:\d{1,2}[.)]\s*)?\**(question|answer)(?:\s*\d{1,2})?\**\s*:\**[ \t]*")
_PLACEHOLDER = re.compile(r"^\[[^\]]*\]$")
_WORD = re.compile(r"\w{5,}")
GAP = "____"
Pair = tuple[str, str]


def pairs(text: str) -> list[Pair]:
    """The questions with the answers that follow them, each pair once; what has no other half is left out."""
    marks = list(_MARK.finditer(text))
    ends = [*(mark.start() for mark in marks), len(text)][1:]
    parts = [(m[1].lower(), text[m.end() : end].strip()) for m, end in zip(marks, ends, strict=True)]
    made: dict[Pair, None] = {}
    for (first, question), (second, answer) in pairwise(parts):
        whole = question and answer and not _PLACEHOLDER.match(question) and not _PLACEHOLDER.match(answer)
        if (first, second) == ("question", "answer") and whole:
            made[question, answer] = None
    return list(made)


def formed(made: list[Pair]) -> str | None:
    """Pairs as a text; None of none."""
    return "\n\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in made) or None


def ruled(passage: str, rng: np.random.Generator) -> str | None:
    """A question by a rule: a missing word, what follows, or an order; None of fewer than three sentences."""
    parts = list(dict.fromkeys(part for each in sentences(passage) if len(part := " ".join(each.split())) > 20))
    if len(parts) < 3:
        return None
    first, second = sorted(rng.permutation(len(parts) - 1)[:2].tolist())
    kind = int(rng.integers(3))
    words = list(_WORD.finditer(parts[second]))
    if kind == 0 and words:
        word = words[int(rng.integers(len(words)))]
        gap = f"{parts[second][: word.start()]}{GAP}{parts[second][word.end() :]}"
        return formed([(f'Which word is missing from the text in "{gap}"?', word[0])])
    if kind == 1:
        return formed([(f'What follows in the text after "{parts[first]}"?', parts[first + 1])])
    turned = bool(rng.integers(2))
    options = (parts[second], parts[first]) if turned else (parts[first], parts[second])
    right = "(B)" if turned else "(A)"
    return formed([(f'Which comes first in the text: (A) "{options[0]}" or (B) "{options[1]}"?', right)])
