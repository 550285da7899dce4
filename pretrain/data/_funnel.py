"""What a funnel says: of each operation the documents and bytes before and after it, and why the rest was left out."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class Sizes(TypedDict):
    """How many documents, and the bytes of their payloads."""

    documents: int
    bytes: int


class Domain(TypedDict):
    """A domain before and after an operation, and how many of its documents were dropped for each reason."""

    before: Sizes
    after: Sizes
    reasons: dict[str, int]


class Dropped(TypedDict):
    """A document that was dropped, to look at: the beginning of its text."""

    reason: str
    measured: float | None
    domain: str
    id: str
    text: str


class Passage(TypedDict):
    """One operation: `before` less all `reasons` is `after`, as long as it adds and changes nothing."""

    operation: str
    before: Sizes
    after: Sizes
    reasons: dict[str, Sizes]  # the commonest first
    domains: dict[str, Domain]
    examples: list[Dropped]  # a few of each reason, drawn at random
    lengths: NotRequired[dict[str, int]]  # how many of those dropped are below each power of two of bytes
