"""Parts a text into the words of a dictionary, and writes the tag that each has there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import regex

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError, brief
from pretrain.core.folders import corpus_of
from pretrain.core.method import Ref
from pretrain.corpus.parts import iterate
from pretrain.data import DataOperation
from pretrain.data._mapped import check_text, mapped
from pretrain.data._work import desk

if TYPE_CHECKING:
    from datasets import Dataset

WORDS, TAGS, ENTITIES = "words", "tags", "entities"  # the columns that are written
NONE = "O"  # of a word that names nothing
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_RUN = regex.compile(rf"([{UNSPACED}]+)|([\p{{L}}\p{{N}}\p{{M}}_--{UNSPACED}]+)|[^\s]", regex.V1)
_ENTRY = regex.compile(r"\s*(\S.*?)(?:\s+(\d+))?\s+(\S+)\s*")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class DictionaryTags(DataOperation):
    """Mengzi: Towards Lightweight yet Ingenious Pre-trained Models for Chinese (arXiv:2110.06696).

    Of its linguistic objectives the annotation, which the paper has of spaCy (whose Chinese words are jieba's): each
    document gets its `words`, their parts of speech as `tags` and what they name as `entities`, lists of as many, for
    the objective `linguistic_mlm`. Text whose script has no spaces is parted into the words of the `dictionary` of
    which the product of frequencies, each as a share of all, is largest, as jieba does without its hidden Markov model;
    other scripts where letters and digits end. What is no word there is `unknown`, each sign and character by itself.

    The `dictionary` is a data stage. A document of it is a line `WORD [FREQUENCY] TAG`, as in jieba's, or where `tag`
    is given has the tag in that column and the word, or a list of them, in the column `word`; the first tag of a word
    counts. `letters` of a tag are the part of speech (in the scheme of Peking University one; the rest are its kinds);
    of the tags in `named` all is the entity, and the others' is O. Words of other scripts are looked up as they are,
    then in lower case. Nothing is inflected or told from its neighbours. Text is not changed.
    """

    computes: ClassVar[bool] = False
    adds: ClassVar[tuple[str, ...]] = (WORDS, TAGS, ENTITIES)
    speed: ClassVar[float] = 0.6e6

    dictionary: Ref
    word: str = "text"
    tag: str | None = None
    letters: Count | None = 1
    named: tuple[str, ...] = ("nr", "nrt", "ns", "nt", "nz")
    unknown: str = "x"

    def __call__(self, corpus: Dataset) -> Dataset:
        """The corpus with the columns."""
        import datasets

        check_text(self.name, corpus)
        words, counts = Words.of(self._entries()), {TAGS: Counter[str](), ENTITIES: Counter[str]()}

        def tagged(texts: list[str]) -> Mapping[str, list[list[str]]]:
            parted = [words.parted(text or "") for text in texts]
            entries = [[words.tag(word) for word in each] for each in parted]
            made = {
                WORDS: parted,
                TAGS: [[(tag or self.unknown)[: self.letters] for tag in each] for each in entries],
                ENTITIES: [[tag if tag in self.named else NONE for tag in each] for each in entries],
            }
            for name, count in counts.items():
                count.update(tag for each in made[name] for tag in each)
            return made

        bare = corpus.remove_columns([name for name in self.adds if name in corpus.column_names])
        listed = datasets.List(datasets.Value("string"))
        made = mapped(bare, tagged, datasets.Features(bare.features | dict.fromkeys(self.adds, listed)))
        with desk() as here:
            seen = {name: dict(sorted(count.items())) for name, count in counts.items()}
            here.reports.append(
                {"method": self.name, "dictionary": len(words.tags), "words": counts[TAGS].total()} | seen
            )
        return made

    def _entries(self) -> Iterator[tuple[str, float, str]]:
        """Each word with its frequency and its tag."""
        folder = corpus_of(Path(self.dictionary))
        if not (folder / "corpus.json").exists():
            wrong = f"{self.name}: dictionary: {self.dictionary} is not a corpus (no corpus.json)"
            raise PretrainError(f"{wrong}; accepted: a data stage")
        columns = (self.word,) if self.tag is None else (self.word, self.tag)
        for split in SPLITS:
            for document in iterate(folder / split, columns):
                if self.tag is None:
                    yield from lines(str(document.get(self.word)), self.name)
                elif document.get(self.word) is None or document.get(self.tag) is None:
                    raise PretrainError(
                        f"{self.name}: dictionary: {brief(document)}: accepted: {' and '.join(columns)}"
                    )
                else:
                    value = document[self.word]
                    for word in value if isinstance(value, list) else [value]:
                        yield str(word), 1.0, str(document[self.tag])


def lines(text: str, name: str) -> Iterator[tuple[str, float, str]]:
    """The entries of lines `WORD [FREQUENCY] TAG`; a word may have blanks in it."""
    for line in text.splitlines():
        entry = _ENTRY.fullmatch(line)
        if entry is None:
            raise PretrainError(f"{name}: dictionary: {brief(line)}: accepted: lines WORD [FREQUENCY] TAG")
        yield entry[1], float(entry[2] or 1), entry[3]


class Words(NamedTuple):
    """A dictionary's words with the logarithm of each one's share, their tags, and the length of the longest."""

    shares: dict[str, float]
    tags: dict[str, str]
    longest: int
    least: float  # of a character that is no word

    @classmethod
    def of(cls, entries: Iterator[tuple[str, float, str]]) -> Words:
        """From words, frequencies and tags."""
        numbers, tags = dict[str, float](), dict[str, str]()
        for word, number, tag in entries:
            numbers[word] = numbers.get(word, 0.0) + number
            tags.setdefault(word, tag)
        total = math.log(max(1.0, sum(numbers.values())))
        shares = {word: math.log(max(1.0, number)) - total for word, number in numbers.items()}
        return cls(shares, tags, max(map(len, tags), default=1), -total)

    def tag(self, word: str) -> str | None:
        """A word's tag, if it has one."""
        return self.tags.get(word, self.tags.get(word.lower()))

    def parted(self, text: str) -> list[str]:
        """A text's words and signs, in order."""
        parts = list[str]()
        for match in _RUN.finditer(text):
            parts += self._likeliest(match[0]) if match[1] else [match[0]]
        return parts

    def _likeliest(self, run: str) -> list[str]:
        """The words of a run of which the product of shares is largest; of several the one whose first is longest."""
        best = [(0.0, 0)] * (len(run) + 1)
        for start in range(len(run) - 1, -1, -1):
            ends = range(start + 1, min(len(run), start + self.longest) + 1)
            ways = [(self.shares[run[start:end]] + best[end][0], end) for end in ends if run[start:end] in self.shares]
            best[start] = max(ways or [(self.least + best[start + 1][0], start + 1)])
        parts, place = list[str](), 0
        while place < len(run):
            parts.append(run[place : best[place][1]])
            place = best[place][1]
        return parts
