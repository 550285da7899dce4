"""Rules that put errors of grammar and spelling into a right text, as declarative data of a language.

A rule is a pattern of what is right and what is written wrongly in its place; it changes whole tokens, each at most
once, and each place with a probability of its own. The edits that undo all that give the text back to the character.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from pretrain.core.errors import PretrainError, brief, listed, nearest
from pretrain.core.foreign import yaml
from pretrain.core.foreign.paths import expanded
from pretrain.core.grammar.edits import Edit, token_spans

SHIPPED = Path(__file__).with_suffix(".yaml")
LANGUAGES = ("english", "german", "turkish")  # of that file
_PLACE = re.compile(r"\{(\d)(:lower|:upper)?\}")
_TYPE = re.compile(r"[a-z0-9_]+")
FORM = "{rate: SHARE, words: {RIGHT: WRONG}}, or starts in place of words, or {rate: SHARE, find: PATTERN, wrong: TEXT}"


@dataclass(frozen=True)
class Rule:
    """What is right, by a pattern; what is written in its place, by the match's text or as a template of its groups."""

    type: str
    rate: float
    pattern: re.Pattern[str]
    words: Mapping[str, str] = field(default_factory=dict)
    template: str = ""

    def wrong(self, match: re.Match[str], capitals: Mapping[str, str]) -> str:
        """What is written wrongly where it matches."""
        if self.words:
            return self.words[match[0]]

        def place(each: re.Match[str]) -> str:
            text = match[int(each[1])] or ""
            if each[2] == ":upper":
                return capital(text, capitals)
            return text[:1].translate(_small(tuple(capitals.items()))).lower() + text[1:] if each[2] else text

        return _PLACE.sub(place, self.template)


@dataclass(frozen=True)
class Grammar:
    """The rules of a language; `capitals` are those that are other than the usual (of `i` in Turkish `İ`)."""

    language: str
    rules: tuple[Rule, ...]
    capitals: Mapping[str, str] = field(default_factory=dict)


@cache
def _small(capitals: tuple[tuple[str, str], ...]) -> dict[int, str]:
    return {ord(great): small for small, great in capitals}


def capital(text: str, capitals: Mapping[str, str]) -> str:
    """The text with a capital."""
    return capitals.get(text[:1], text[:1].upper()) + text[1:]


def with_errors(text: str, grammar: Grammar, rng: np.random.Generator, rate: float = 1.0) -> tuple[str, list[Edit]]:
    """The text with errors, and the edits that undo them.

    The rules come in a random order. Each changes the places that it matches, of tokens that none has changed, with its
    own probability times `rate`.
    """
    spans = token_spans(text)
    starts = [start for start, _ in spans]
    free = [True] * len(spans)
    made: dict[int, tuple[int, str, str]] = {}  # by the first token: the end, what is written, the type
    for number in rng.permutation(len(grammar.rules)):
        rule = grammar.rules[number]
        for match in rule.pattern.finditer(text):
            if not match[0].strip():
                continue
            first, end = bisect_right(starts, match.start()) - 1, bisect_right(starts, match.end() - 1)
            if first < 0 or not all(free[first:end]):
                continue
            begin, stop = spans[first][0], spans[end - 1][1]
            right = text[begin:stop]
            wrong = text[begin : match.start()] + rule.wrong(match, grammar.capitals) + text[match.end() : stop]
            if wrong == right or not (_plain(right) and _plain(wrong)) or rng.random() >= rule.rate * rate:
                continue
            made[first] = (end, wrong, rule.type)
            free[first:end] = [False] * (end - first)
    parts, edits, place, tokens, before = list[str](), list[Edit](), 0, 0, 0
    for first, (end, wrong, kind) in sorted(made.items()):
        begin, stop = spans[first][0], spans[end - 1][1]
        parts += [text[place:begin], wrong]
        start, count = tokens + first - before, len(wrong.split())
        edits.append(Edit(start, start + count, kind, text[begin:stop]))
        place, before, tokens = stop, end, start + count
    return "".join([*parts, text[place:]]), edits


def _plain(text: str) -> bool:
    """Whether it is tokens with one blank between them, as an edit of M2 can hold it."""
    return bool(text) and text == " ".join(text.split())


def read_grammar(method: str, language: str, rules: str = "", types: Sequence[str] = ()) -> Grammar:
    """The rules of a language, of the file `rules` or of those that are shipped; of `types` alone where any are given.

    The file is YAML, `LANGUAGE: {capitals: {SMALL: GREAT}, rules: {TYPE: RULE}}`. A rule has a `rate`, and either
    `words` (right words, or several, each with what is written in its place; `starts`: beginnings of words) or `find`,
    a regular expression, with `wrong`, in which `{1}` is its first group, `{1:lower}` and `{1:upper}` that with a small
    and with a great letter first. Words that begin with a small letter stand for those with a capital too.
    """
    path = expanded(rules) if rules else SHIPPED
    languages = _languages(path) if rules else _shipped()
    given, known = _mapping(languages.get(language)), [*languages]
    if not (ruled := _mapping(given.get("rules"))):
        form = listed(known, language) or "a file of LANGUAGE: {rules: {TYPE: RULE}}"
        raise PretrainError(
            f"{method}: {path}: language {language!r}{nearest(language, known)}: accepted: {form}", place=("language",)
        )
    if missing := next((name for name in types if name not in ruled), None):
        raise PretrainError(
            f"{method}: types: {missing!r}{nearest(missing, ruled)}: accepted: {listed([*ruled], missing)}",
            place=("types",),
        )
    capitals = {small: str(great) for small, great in _mapping(given.get("capitals")).items()}
    made = tuple(
        _rule(f"{method}: {path}: {language}: {name}", name, rule, capitals)
        for name, rule in ruled.items()
        if not types or name in types
    )
    return Grammar(language, made, capitals)


def _languages(path: Path) -> dict[str, object]:
    return _mapping(yaml.loads(yaml.read_text(path), str(path))[0])


@cache
def _shipped() -> dict[str, object]:
    return _languages(SHIPPED)


def _mapping(value: object) -> dict[str, object]:
    return {str(name): each for name, each in value.items()} if isinstance(value, dict) else {}


def _rule(where: str, name: str, given: object, capitals: Mapping[str, str]) -> Rule:
    if not _TYPE.fullmatch(name):
        raise PretrainError(f"{where}: accepted: a type of small letters, digits and _", place=("rules",))
    fields = _mapping(given)
    kinds = {"words", "starts", "find"} & fields.keys()
    extra = {"wrong"} if kinds == {"find"} else set()
    rate, right = fields.get("rate"), fields.get(next(iter(kinds), ""))
    whole = len(kinds) == 1 and fields.keys() == {"rate", *kinds, *extra}
    if not whole or not isinstance(rate, int | float) or not 0 < rate <= 1 or not right:
        raise PretrainError(f"{where}: {brief(given)}: accepted: {FORM}", place=("rules",))
    if kinds == {"find"}:
        template = str(fields["wrong"])
        try:
            pattern = re.compile(str(right))
        except re.error as error:
            raise PretrainError(f"{where}: find {right!r}: {error}", place=("rules",)) from error
        most = max((int(m[1]) for m in _PLACE.finditer(template)), default=0)
        if most > pattern.groups:
            raise PretrainError(f"{where}: wrong {template!r}: group {most} of {pattern.groups}", place=("rules",))
        return Rule(name, float(rate), pattern, {}, template)
    if not isinstance(right, dict) or not all(isinstance(w, str) and w for pair in right.items() for w in pair):
        raise PretrainError(f"{where}: {brief(right)}: accepted: {{RIGHT: WRONG}}", place=("rules",))
    words = {capital(good, capitals): capital(bad, capitals) for good, bad in right.items()} | right
    ordered = sorted(words, key=lambda word: (-len(word), word))
    end = r"(?!\w)" if kinds == {"words"} else ""
    pattern = re.compile(rf"(?<![\w'’])(?:{'|'.join(map(re.escape, ordered))}){end}")
    return Rule(name, float(rate), pattern, words)
