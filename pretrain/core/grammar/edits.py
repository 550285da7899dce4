"""Edits of a text by tokens, as the shared tasks on grammatical error correction write and count them.

In the M2 format an edit is a line, `A FIRST END|||TYPE|||CORRECTION|||REQUIRED|||-NONE-|||0`: the tokens of the text
with errors from FIRST up to END, which white space parts, and what stands in their place when it is right. An edit of
no token (FIRST = END) puts its correction before FIRST. Precision, recall and F0.5 are of edits that are the same in
tokens and correction.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from pretrain.core.errors import PretrainError, brief

_TOKEN = re.compile(r"\S+")
_LINE = re.compile(r"A (\d+) (\d+)\|\|\|([^|]*)\|\|\|(.*)\|\|\|REQUIRED\|\|\|-NONE-\|\|\|\d+")
OUTSIDE = "O"


class Edit(NamedTuple):
    """Tokens `first` to `end` of a text with errors, the type of the error, and what is right in their place."""

    first: int
    end: int
    type: str
    correction: str


def token_spans(text: str) -> list[tuple[int, int]]:
    """Where the tokens of a text begin and end."""
    return [match.span() for match in _TOKEN.finditer(text)]


def to_m2(edits: Iterable[Edit]) -> str:
    """The edits as lines of M2."""
    return "\n".join(f"A {e.first} {e.end}|||{e.type}|||{e.correction}|||REQUIRED|||-NONE-|||0" for e in edits)


def from_m2(lines: str) -> list[Edit]:
    """The edits that lines of M2 say; those that say there is none (`A -1 -1|||noop|||…`) are passed over."""
    edits = []
    for line in filter(None, lines.split("\n")):
        if line.startswith("A -1 -1|||noop|||"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise PretrainError(
                f"edit {brief(line)}: accepted: A FIRST END|||TYPE|||CORRECTION|||REQUIRED|||-NONE-|||0"
            )
        edits.append(Edit(int(match[1]), int(match[2]), match[3], match[4]))
    return edits


def corrected(text: str, edits: Iterable[Edit]) -> str:
    """The text with each edit's correction in the place of its tokens; all other characters stay."""
    spans, ordered = token_spans(text), sorted(edits)
    wrong = next((b for a, b in pairwise(ordered) if b.first < a.end), None)
    wrong = wrong or next((e for e in ordered if not e.first <= e.end <= len(spans)), None)
    if wrong is not None:
        raise PretrainError(
            f"edit of the tokens {wrong.first} to {wrong.end} of {len(spans)}: accepted: edits beside one another"
        )
    for first, end, _, correction in reversed(ordered):
        if first < end:
            begin, stop = spans[first][0], spans[end - 1][1]
            if (
                not correction
            ):  # with the white space that parted it from what follows, or at the end from what was before
                stop = spans[end][0] if end < len(spans) else stop
                begin = spans[first - 1][1] if first and end == len(spans) else begin
        elif first < len(spans):
            begin = stop = spans[first][0]
            correction += " "
        else:
            begin = stop = spans[-1][1] if spans else len(text)
            correction = f" {correction}" if spans else correction
        text = text[:begin] + correction + text[stop:]
    return text


def tags_of(edits: Iterable[Edit], count: int) -> list[str]:
    """A tag for each of `count` tokens: `B-TYPE` for the first of an edit, `I-TYPE` for others of it, else `O`."""
    tags = [OUTSIDE] * count
    for first, end, kind, _ in edits:
        tags[first:end] = [f"{'I' if n else 'B'}-{kind}" for n in range(end - first)]
    return tags


def aligned(source: Sequence[str], target: Sequence[str]) -> list[Edit]:
    """The edits that make the tokens `source` those of `target`: each run of tokens that are not the same is one.

    By the alignment of least cost (Levenshtein's), of equals that which replaces tokens rather than puts some in, and
    puts some in rather than leaves some out: what ERRANT (Bryant et al., ACL 2017) gives with `-lev -merge all-merge`.
    Its other ways of aligning and merging ask for a tagger.
    """
    n_S, n_T = len(source), len(target)
    cost = [[*range(n_T + 1)], *([i] + [0] * n_T for i in range(1, n_S + 1))]
    step = [["I"] * (n_T + 1), *(["D"] + [""] * n_T for _ in range(n_S))]
    for i in range(1, n_S + 1):
        for j in range(1, n_T + 1):
            if source[i - 1] == target[j - 1]:
                cost[i][j], step[i][j] = cost[i - 1][j - 1], "M"
            else:
                ways = [cost[i - 1][j - 1], cost[i][j - 1], cost[i - 1][j]]
                least = min(ways)
                cost[i][j], step[i][j] = least + 1, "SID"[ways.index(least)]
    same, i, j = [(n_S, n_T)], n_S, n_T
    while i or j:
        taken = step[i][j]
        i, j = i - (taken != "I"), j - (taken != "D")
        if taken == "M":
            same.append((i, j))
    same.append((-1, -1))
    runs = [(a[0] + 1, b[0], a[1] + 1, b[1]) for a, b in pairwise(reversed(same))]
    return [Edit(a, b, "", " ".join(target[c:d])) for a, b, c, d in runs if a < b or c < d]


class Counts(NamedTuple):
    """Of edits: those that are right, those proposed, and the true ones."""

    hits: float
    proposed: float
    true: float

    def scores(self, beta: float = 0.5) -> tuple[float, float, float]:
        """Precision, recall and F_beta = (1 + β²) P R / (β² P + R); of nothing proposed, or nothing true, 1."""
        precision = self.hits / self.proposed if self.proposed else 1.0
        recall = self.hits / self.true if self.true else 1.0
        both = beta**2 * precision + recall
        return precision, recall, (1 + beta**2) * precision * recall / both if both else 0.0


def counted(proposed: Iterable[Edit], true: Iterable[Edit], *, correction: bool = True) -> Counts:
    """How many of the edits proposed are true: in tokens and, unless they are only to be detected, in correction."""
    sides = [{(e.first, e.end, e.correction if correction else "") for e in edits} for edits in (proposed, true)]
    return Counts(len(sides[0] & sides[1]), len(sides[0]), len(sides[1]))
