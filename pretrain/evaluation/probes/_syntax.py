"""Python's syntax trees over code tokens, and the sequences that stand for them (AST-Probe, arXiv:2206.11719).

A tree becomes binary: a chain of nodes with one child each is one node with all their labels, and a node with more than
two children keeps its first and an unnamed node with the rest. Of n tokens then d (n - 1) are the heights of the lowest
common ancestors of neighbours, c (n - 1) their labels, and u (n) the labels of what holds one token alone; these give
the tree back.
"""

from __future__ import annotations

import ast
import io
import tokenize
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Labels = tuple[str, ...]  # of one node of a binary tree; none: it has no name
LAYOUT = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER"}
BAD_ROOT = ("no root",)  # what a recovered tree has at its root where the label says that nothing is there
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
_WHOLE = {"JoinedStr", "TemplateStr"}  # what stands inside a string is no code
_FAILURES = (SyntaxError, tokenize.TokenError, ValueError, RecursionError, MemoryError)


@dataclass(frozen=True)
class Tree:
    """A node that holds the tokens from `start` to before `end`; a child that is a number is a token."""

    label: str
    start: int
    end: int
    children: tuple[Tree | int, ...]


@dataclass(frozen=True)
class Snippet:
    """A function: its tokens, and its tree as sequences."""

    tokens: tuple[str, ...]
    d: tuple[int, ...]
    c: tuple[Labels, ...]
    u: tuple[Labels, ...]


class _Overlap(ValueError):
    """Nodes whose tokens overlap: no tree."""


def snippets(code: str, most: int) -> Iterator[Snippet]:
    """The outermost functions of a module with at most `most` tokens, without comments and docstrings.

    Code that does not parse has none.
    """
    code = code.replace("\r\n", "\n").replace("\r", "\n")
    try:
        module = ast.parse(code)
        tokens = _Tokens(code)
    except _FAILURES:
        return
    tokens.drop([text for node in ast.walk(module) if (text := _docstring(node))])
    todo: list[ast.AST] = [module]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            try:
                tree = tokens.tree(node)
            except (_Overlap, RecursionError):
                continue
            only_docstring = len(node.body) == 1 and _docstring(node) is not None
            if tree is not None and 2 <= tree.end - tree.start <= most and not only_docstring:
                d, c, u, _ = sequences(tree)
                yield Snippet(tuple(tokens.texts[tree.start : tree.end]), tuple(d), tuple(c), tuple(u))
                continue
        todo += reversed(list(ast.iter_child_nodes(node)))


def _docstring(node: ast.AST) -> ast.AST | None:
    if not isinstance(node, _DEFINITIONS) or not node.body or not isinstance(node.body[0], ast.Expr):
        return None
    value = node.body[0].value
    return value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


class _Tokens:
    """A module's tokens, a formatted string as one, and where they begin and end."""

    def __init__(self, code: str) -> None:
        self.lines = code.split("\n")
        self.texts: list[str] = []
        self.starts: list[tuple[int, int]] = []
        self.ends: list[tuple[int, int]] = []
        depth = 0
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            name = tokenize.tok_name[token.type]
            if name in LAYOUT:
                continue
            if not depth:
                self.texts.append(token.string)
                self.starts.append(token.start)
                self.ends.append(token.end)
            else:
                self.ends[-1] = token.end
            depth += name.endswith("STRING_START")
            depth -= name.endswith("STRING_END")
            if name.endswith("STRING_END") and not depth:
                self.texts[-1] = self._between(self.starts[-1], token.end)

    def _between(self, begin: tuple[int, int], end: tuple[int, int]) -> str:
        """The text from one place to another."""
        if begin[0] == end[0]:
            return self.lines[begin[0] - 1][begin[1] : end[1]]
        inside = self.lines[begin[0] : end[0] - 1]
        return "\n".join([self.lines[begin[0] - 1][begin[1] :], *inside, self.lines[end[0] - 1][: end[1]]])

    def span(self, node: ast.AST) -> tuple[int, int] | None:
        """The tokens that a node's own position holds."""
        if getattr(node, "end_lineno", None) is None:
            return None
        begin, finish = ((row, self._column(row, at)) for row, at in _ends(node))
        return bisect_left(self.starts, begin), bisect_right(self.ends, finish)

    def _column(self, row: int, at: int) -> int:
        """The column in characters of one in bytes."""
        line = self.lines[row - 1]
        return at if line.isascii() else len(line.encode("utf-8", "surrogatepass")[:at].decode("utf-8", "ignore"))

    def drop(self, nodes: Sequence[ast.AST]) -> None:
        """Forget the tokens of these nodes."""
        gone = {i for node in nodes if (span := self.span(node)) for i in range(*span)}
        kept = [i for i in range(len(self.texts)) if i not in gone]
        self.texts = [self.texts[i] for i in kept]
        self.starts, self.ends = [self.starts[i] for i in kept], [self.ends[i] for i in kept]

    def tree(self, node: ast.AST) -> Tree | None:
        """The tree of a node that holds tokens; some, such as an operator's, hold none of their own."""
        whole = type(node).__name__ in _WHOLE
        inside = [] if whole else [t for child in ast.iter_child_nodes(node) if (t := self.tree(child))]
        span = self.span(node)
        spans = [(t.start, t.end) for t in inside] + ([span] if span and span[0] < span[1] else [])
        if not spans:
            return None
        for decorator in getattr(node, "decorator_list", [])[:1]:
            first = (self.span(decorator) or (0, 0))[0]
            spans.append((first - 1, first))  # its @, which no position holds
        start, end = min(a for a, _ in spans), max(b for _, b in spans)
        children: list[Tree | int] = []
        at = start
        for child in sorted(inside, key=lambda t: t.start):
            if child.start < at:
                raise _Overlap(ast.dump(node)[:80])
            children += [*range(at, child.start), child]
            at = child.end
        return Tree(type(node).__name__, start, end, (*children, *range(at, end)))


def _ends(node: ast.AST) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]  # of nodes with a place


def sequences(tree: Tree | int) -> tuple[list[int], list[Labels], list[Labels], int]:
    """d, c and u of a tree, and its height."""
    if isinstance(tree, int):
        return [], [], [()], 0
    labels: Labels = (tree.label,)
    while len(tree.children) == 1 and isinstance(child := tree.children[0], Tree):
        tree = child
        labels += (tree.label,)
    if len(tree.children) == 1:
        return [], [], [labels], 0
    d, c, u, height = sequences(tree.children[-1])
    for number in range(len(tree.children) - 2, -1, -1):
        left_d, left_c, left_u, left_height = sequences(tree.children[number])
        height = max(left_height, height) + 1
        named = labels if number == 0 else ()
        d, c, u = [*left_d, height, *d], [*left_c, named, *c], [*left_u, *u]
    return d, c, u, height


def constituents(d: Sequence[float], c: Sequence[Labels], u: Sequence[Labels]) -> Counter[tuple[str, int, int]]:
    """The named nodes of the tree that the sequences stand for, each with its first token and the one after its last.

    The tokens between are parted where d is largest, at the first place if there are several.
    """
    constituents: Counter[tuple[str, int, int]] = Counter()
    todo = [(0, len(u))]
    while todo:
        start, end = todo.pop()
        labels = u[start]
        if end - start > 1:
            cut = start + int(np.argmax(d[start : end - 1]))
            labels = c[cut] or (BAD_ROOT if (start, end) == (0, len(u)) else ())
            todo += [(start, cut + 1), (cut + 1, end)]
        constituents.update((label, start, end) for label in labels)
    return constituents


def agreement(
    predicted: Counter[tuple[str, int, int]], true: Counter[tuple[str, int, int]]
) -> tuple[float, float, float]:
    """Precision, recall and F1 of named nodes."""
    both = (predicted & true).total()
    precision, recall = both / max(predicted.total(), 1), both / max(true.total(), 1)
    return precision, recall, 2 * precision * recall / (precision + recall) if both else 0.0
