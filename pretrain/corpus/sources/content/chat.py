"""Conversations, lists of `{role, content}` (or `{from, value}`), as texts with targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeGuard

Turns = list[tuple[str, str]]  # who speaks, and what is said
SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
ANSWERS = "assistant"


def turns_of(value: object) -> Turns | None:
    """The turns of a conversation; None of what is none."""
    if not isinstance(value, list) or not value:
        return None
    turns: Turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            return None
        speaker, words = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(speaker, str) or not isinstance(words, str):
            return None
        turns.append((SPEAKERS.get(speaker, speaker), words))
    return turns


def is_chat(value: object) -> TypeGuard[list[object]]:
    """Whether a column's value is a conversation."""
    return turns_of(value) is not None


def exchanges(value: object) -> Iterator[tuple[str, str]]:
    """For each answer of a conversation all that comes before it, `user: …` and so on, and the answer."""
    before: list[str] = []
    for speaker, words in turns_of(value) or ():
        if speaker == ANSWERS and before and words.strip():
            yield "\n\n".join(before), words
        before.append(written([(speaker, words)]))


def written(turns: Turns) -> str:
    """A conversation as a text to read: `user: …` and so on."""
    return "\n\n".join(f"{speaker}: {words}" for speaker, words in turns)
