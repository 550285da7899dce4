"""Beginnings of the texts themselves, as they stand, for a model to go on from: whole words, each language in turn."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain, zip_longest

from pretrain.corpus.store import side
from pretrain.new.texts.languages import LANGUAGE_OF, prose_language

LONGEST, SHORTEST = 80, 12  # characters of a prompt
LETTERS = 0.6  # of a line at least, with its spaces
PATTERN = re.compile(r"%[-\d.]*[a-z]\b|\{\w*\}|\$\{|<[^>]*>|&\w+;|https?:|\\[a-z]|[|#=*_~-]{3}")  # no words of a text
BROKEN = re.compile(r"\S*[a-zß-ÿ]-$")  # a word that goes on in the next line
WORD = re.compile(r"\S+")
SENTENCE = re.compile(r"[\"'“„«(¿¡]?[A-ZÀ-ÞА-Я\u4e00-\u9fff\u3040-\u30ff].*[ \u3000-\u9fff]")
DEFINES = re.compile(
    r"(export |pub |public |private |static |async |inline |template |const )*"
    r"(def|class|function|fn|func|fun|struct|enum|interface|trait|impl|type|module|void|int|char|double|float|bool|let|sub)"
    r" [\w*$]"
)


def prompts(texts: Iterable[tuple[str, str]], share: float) -> tuple[str, ...]:
    """The first fitting line of each of the texts, which come with their kind: those that are held out first.

    One of each kind and language comes before the second of any.
    """
    groups: dict[tuple[str, str | None], list[str]] = {}
    for kind, text in sorted(texts, key=lambda pair: bool(share) and side(pair[1], share, share) == "train"):
        lines = beginnings(text[:4000], whole=len(text) <= 4000)
        if kind in LANGUAGE_OF:  # where something is defined, so that there is something to write
            lines = [line for line in text[:20_000].splitlines() if DEFINES.match(line)] + text[:4000].splitlines()
        line = next(filter(None, map(fitting, lines)), None)
        if line is not None:
            groups.setdefault((kind, prose_language(text[:20_000])), []).append(line)
    return tuple(dict.fromkeys(filter(None, chain(*zip_longest(*groups.values())))))


def beginnings(text: str, whole: bool = True) -> list[str]:
    """The paragraphs of a prose as they stand, line by line; those that begin a sentence first.

    A line that is no words, as under a heading, ends a paragraph as a blank one does. Of a text that is not `whole` the
    last paragraph may end in the middle of a word, and is left out.
    """
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip() and _of_words(line):
            paragraphs[-1].append(line)
        else:
            paragraphs.append([])
    standing = ["\n".join(lines) for lines in paragraphs if lines]
    standing = standing if whole or len(standing) == 1 else standing[:-1]
    return sorted(standing, key=lambda each: not SENTENCE.match(each.strip()))


def fitting(text: str) -> str | None:
    """A text as a prompt, a long one up to a word's end; None of one that is no words, or cannot be printed."""
    text = text.rstrip()
    if len(text) > LONGEST:
        words = list(WORD.finditer(text[: LONGEST + 1]))
        whole = [
            word.end() for word in words if word.end() <= LONGEST and not text[word.end() : word.end() + 1].strip()
        ]
        text = BROKEN.sub("", text[: whole[-1] if whole else LONGEST]).rstrip()
    return text if len(text.strip()) >= SHORTEST and all(map(_of_words, text.splitlines())) else None


def _of_words(line: str) -> bool:
    """Whether a line is words for the most part, and can be printed."""
    line = line.strip()
    words = sum(letter.isalpha() or letter.isspace() for letter in line)
    printed = line.replace("\t", " ").isprintable() and "\ufffd" not in line
    return printed and not PATTERN.search(line) and words >= LETTERS * len(line)
