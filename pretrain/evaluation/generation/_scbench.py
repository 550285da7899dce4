"""Shared contexts and the questions about them, made from local documents and random strings.

A question is the beginning of a line that the model completes, so that a model without instruction tuning can be asked.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from pretrain.core.errors import PretrainError
from pretrain.corpus.sources import Document

T = TypeVar("T")
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz0123456789"))
EXCERPT = 80  # characters of a document that stand for it in `many_shot`
Count = Callable[[Sequence[str]], list[int]]  # tokens of each text


@dataclass(frozen=True)
class Turn:
    """A query and what follows it, without the space between."""

    query: str
    answer: str


@dataclass(frozen=True)
class Shared:
    """A context and the queries about it."""

    context: str
    turns: tuple[Turn, ...]


class Maker:
    """What the generators draw from: one stream of random numbers, names that never come twice, room in tokens."""

    def __init__(
        self, documents: Sequence[Document], count: Count, *, seed: Sequence[int], room: int, turns: int,
        width: int, hops: int,
    ) -> None:  # fmt: skip
        self.documents, self.count, self.room, self.turns = documents, count, room, turns
        self.width, self.hops = width, hops
        self.rng = np.random.default_rng(seed)
        self.used: set[str] = set()

    def name(self, width: int = 0) -> str:
        """A random string that was not drawn before."""
        while True:
            drawn = "".join(self.rng.choice(LETTERS, width or self.width))
            if drawn not in self.used and not drawn.isdigit():
                self.used.add(drawn)
                return drawn

    def number(self) -> str:
        """A number of five digits that was not drawn before."""
        while True:
            drawn = str(self.rng.integers(10000, 100000))
            if drawn not in self.used:
                self.used.add(drawn)
                return drawn

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The same in another order."""
        return [items[i] for i in self.rng.permutation(len(items))]

    def filled(self, needed: list[str], more: Callable[[], str]) -> list[str]:
        """The lines that are needed and as many others as there is room for, in random order."""
        left, lines = self.room - sum(self.count(needed)), list(needed)
        while left > 0:
            made = [more() for _ in range(32)]
            for line, tokens in zip(made, self.count(made), strict=True):
                left -= tokens
                if left >= 0:
                    lines.append(line)
                else:
                    break
        return self.shuffled(lines)

    def haystack(self, needed: list[str]) -> list[str]:
        """Lines of documents, in their order, as many as there is room for beside those that are needed."""
        left = self.room - sum(self.count(needed))
        lines: list[str] = []
        for i in self.rng.permutation(len(self.documents)):
            candidates = [line.rstrip() + "\n" for line in self.documents[i]["text"].splitlines() if line.strip()]
            for line, tokens in zip(candidates, self.count(candidates), strict=True):
                left -= tokens
                if left < 0:
                    return lines
                lines.append(line)
        return lines

    def hidden(self, hay: list[str], needles: list[str]) -> list[str]:
        """The hay with the needles at random places, in their order."""
        at = np.sort(self.rng.integers(0, len(hay) + 1, len(needles)))
        lines = list(hay)
        for place, needle in zip(at[::-1], needles[::-1], strict=True):
            lines.insert(int(place), needle)
        return lines


def kv(maker: Maker) -> Shared:
    """Random keys and values; the value of a key."""
    pairs = [(maker.name(), maker.name()) for _ in range(maker.turns)]
    needed = [f"{key} = {value}\n" for key, value in pairs]
    lines = maker.filled(needed, lambda: f"{maker.name()} = {maker.name()}\n")
    return Shared("Keys and their values:\n" + "".join(lines), tuple(Turn(f"\n{k} =", v) for k, v in pairs))


def prefix_suffix(maker: Maker) -> Shared:
    """Random strings; the one with a given beginning and end, which others have alone."""
    half, needed, turns = max(2, maker.width // 2), [], []
    for _ in range(maker.turns):
        begin, end = maker.name(half), maker.name(half)
        whole = begin + maker.name(half) + end
        needed += [f"{whole}\n", f"{begin}{maker.name(half)}{maker.name(half)}\n"]
        needed += [f"{maker.name(half)}{maker.name(half)}{end}\n"]
        turns.append(Turn(f"\nThe string that begins with {begin} and ends with {end} is", whole))
    lines = maker.filled(needed, lambda: "".join(maker.name(half) for _ in range(3)) + "\n")
    return Shared("Strings:\n" + "".join(lines), tuple(turns))


def variable(maker: Maker) -> Shared:
    """Assignments among the lines of documents; the number that a variable stands for, some links away."""
    needles, turns = [], []
    for _ in range(maker.turns):
        names, number = [maker.name() for _ in range(maker.hops)], maker.number()
        needles += [[f"VAR {names[0]} = {number}\n", *(f"VAR {b} = VAR {a}\n" for a, b in pairwise(names))]]
        turns.append(Turn(f"\nThe number that VAR {names[-1]} stands for is", number))
    hay = maker.haystack([line for chain in needles for line in chain])
    for chain in needles:
        hay = maker.hidden(hay, chain)
    return Shared("".join(hay), tuple(turns))


def frequent(maker: Maker) -> Shared:
    """Words of the documents, some more often than others; the most frequent one, and how often others occur."""
    vocabulary: set[str] = set()
    for i in maker.rng.permutation(len(maker.documents)):
        vocabulary |= set(re.findall(r"\b[a-z]{3,10}\b", maker.documents[i]["text"]))
        if len(vocabulary) >= 20 * maker.turns + 200:
            break
    distinct = max(2 * maker.turns, 8)
    if len(vocabulary) < distinct:
        raise PretrainError(
            f"scbench: frequent: the documents have {len(vocabulary)} words of 3 to 10 letters; "
            f"accepted: {distinct} or more"
        )
    words = maker.shuffled(sorted(vocabulary))[:distinct]
    cost = float(np.mean(maker.count([f" {word}" for word in words])))
    weights = 1 / np.arange(1, distinct + 1)
    total = max(0, int(maker.room / cost) - distinct)
    counts = 1 + maker.rng.multinomial(total, weights / weights.sum())
    top = int(counts.argmax())
    counts[top] += (counts == counts[top]).sum() > 1  # one word is the most frequent
    text = " ".join(maker.shuffled([word for word, n in zip(words, counts, strict=True) for _ in range(n)]))
    others = maker.shuffled([i for i in range(distinct) if i != top])[: maker.turns - 1]
    turns = [Turn(f"\nThe number of times that {words[i]} occurs is", str(counts[i])) for i in others]
    turns.insert(int(maker.rng.integers(maker.turns)), Turn("\nThe most frequent word is", words[top]))
    return Shared(f"Words:\n{text}\n", tuple(turns))


def many_shot(maker: Maker) -> Shared:
    """Beginnings of documents and their domains, all domains alike; the domains of other documents."""
    by_domain: dict[str, list[str]] = defaultdict(list)
    for i in maker.rng.permutation(len(maker.documents)):
        document = maker.documents[i]
        excerpt = " ".join(document["text"].split())[:EXCERPT]
        if document.get("domain") and excerpt and excerpt not in maker.used:
            maker.used.add(excerpt)
            by_domain[document["domain"]].append(excerpt)
    rounds = max(map(len, by_domain.values()), default=0)
    order = [
        (excerpts[k], name) for k in range(rounds) for name, excerpts in sorted(by_domain.items()) if k < len(excerpts)
    ]
    shown, rest = order[: len(by_domain)], order[len(by_domain) :]
    if len(by_domain) < 2 or len(rest) < maker.turns:
        raise PretrainError(
            f"scbench: many_shot: {len(order)} documents of {len(by_domain)} domains; "
            f"accepted: two domains or more, and {maker.turns} documents besides one of each"
        )
    asked, rest = rest[: maker.turns], rest[maker.turns :]
    lines = [f"text: {text}\ndomain: {domain}\n" for text, domain in shown + rest]
    kept, left = [], maker.room
    for i, (line, tokens) in enumerate(zip(lines, maker.count(lines), strict=True)):
        left -= tokens
        if left < 0 and i >= len(shown):
            break
        kept.append(line)
    turns = [Turn(f"\ntext: {text}\ndomain:", domain) for text, domain in maker.shuffled(asked)]
    return Shared("".join(maker.shuffled(kept)), tuple(turns))


def mix(maker: Maker) -> Shared:
    """Documents with numbers hidden in them; in turn one of the numbers, and the rest of a line of a document."""
    names = [(maker.name(), maker.number()) for _ in range(maker.turns)]
    needles = [f"The number of {name} is {number}.\n" for name, number in names]
    hay = maker.haystack(needles)
    halves = []
    for line in hay:
        words = line.strip().split(" ")
        if len(words) >= 6 and len(line) <= 120 and all(words):
            halves.append((" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])))
    starts = Counter(head for head, _ in halves)
    begun = Counter(head for head in starts for line in hay if line.strip().startswith(head))
    unique = maker.shuffled([(head, rest) for head, rest in halves if begun[head] == 1])
    turns = [Turn(f"\nThe number of {name} is", number) for name, number in names]
    for place, (head, rest) in zip(range(1, maker.turns, 2), unique, strict=False):
        turns[place] = Turn(f"\n{head}", rest)
    return Shared("".join(maker.hidden(hay, maker.shuffled(needles))), tuple(turns))


TASKS: dict[str, Callable[[Maker], Shared]] = {
    "kv": kv,
    "prefix_suffix": prefix_suffix,
    "variable": variable,
    "frequent": frequent,
    "many_shot": many_shot,
    "mix": mix,
}


def right(continuation: str, answer: str) -> bool:
    """Whether the first line holds the answer as whole words; of numbers, whether the first is the answer."""
    line = continuation.strip().split("\n")[0]
    if answer.isdigit():
        number = re.search(r"\d+", line)
        return number is not None and number[0] == answer
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", line) is not None
