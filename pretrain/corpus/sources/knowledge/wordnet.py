"""WordNet: concepts with the words that name them, what they mean, and which broader concept each belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError, unknown
from pretrain.core.packages import Package
from pretrain.corpus.sources._files import Document, Source, evenly, lines_of
from pretrain.corpus.sources._paths import located, stamps
from pretrain.corpus.sources._skipped import Skipped

PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}  # a file each, and the letter of its concepts
HYPERNYM = ("@", "@i")  # of a class, and of an instance
# The lexicographers' files, by their numbers: lexnames(5WN).
FILES = (
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute",
    "noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group",
    "noun.location", "noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant", "noun.possession",
    "noun.process", "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition", "verb.consumption",
    "verb.contact", "verb.creation", "verb.emotion", "verb.motion", "verb.perception", "verb.possession",
    "verb.social", "verb.stative", "verb.weather", "adj.ppl",
)  # fmt: skip
# offset, number of the file, kind, how many words (hexadecimal), the words and their numbers, pointers | what it means
LINE = re.compile(r"(\d{8}) (\d\d) [nvasr] ([0-9a-f]{2}) ([^|]*)\| (.+)")


@dataclass(frozen=True)
class WordNet(Source):
    """The concepts of WordNet, of a folder with its files `data.noun`, … or, with `package`, of one inside it.

    Debian has it: `{wordnet: usr/share/wordnet, package: {debian: wordnet-base}}`. A document a concept: `text` is
    `WORDS: MEANING`, the words that name it parted by commas; `words` are these as a list, `concept` is its number
    (`n02084071`), `broader` that of the first concept that it is a kind or an instance of (its own where there is
    none), and the domain the subject that its lexicographers had, `noun.animal`. `parts` are noun, verb, adj and adv;
    adjectives and adverbs have no broader concepts.
    """

    wordnet: str
    parts: tuple[str, ...] = ("noun", "verb")
    limit: Count | None = None  # at most so many concepts, from all of them alike
    package: Package | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.parts:
            if part not in PARTS:
                raise unknown("part of WordNet", part, PARTS)
        if not self.parts:
            raise PretrainError(f"parts []: accepted: at least one of {', '.join(PARTS)}")

    def domains(self) -> tuple[str, ...]:
        return tuple(name for name in FILES if name.split(".")[0] in self.parts)

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        yield from evenly([document for part in self.parts for document in self._concepts(part, skipped)], self.limit)

    def _concepts(self, part: str, skipped: Skipped) -> Iterator[Document]:
        name, paths = f"data.{part}", [path for _, path in located(self.wordnet, self.package, (), Skipped())]
        path = next((path for path in paths if path.name == name), None)
        if path is None:
            raise PretrainError(f"{self.wordnet}: no {name}; accepted: a folder with the files of WordNet")
        for line in lines_of(path, skipped):
            if line[:2].strip():  # its licence is indented
                document = concept(line, PARTS[part])
                if document is None:
                    skipped.add("lines that are no concept", f"{Path(name)}: {line[:40]}")
                else:
                    yield document

    def state(self) -> object:
        return stamps(self.wordnet, self.package)


def concept(line: str, letter: str) -> Document | None:
    """The document of a line of a file `data.PART`; None of a line that is none, as wndb(5WN) says it."""
    parts = LINE.match(line)
    if parts is None:
        return None
    offset, file, count, rest, meaning = parts.groups()
    fields, number = rest.split(), int(count, 16)
    words, pointers = fields[: 2 * number : 2], fields[2 * number + 1 :]
    if len(words) < number or int(file) >= len(FILES) or not number:
        return None
    broader = next(
        (f"{kind}{place}" for symbol, place, kind in zip(pointers[::4], pointers[1::4], pointers[2::4], strict=False)
         if symbol in HYPERNYM), f"{letter}{offset}",
    )  # fmt: skip
    names = [word.replace("_", " ") for word in words]
    return {
        "text": f"{', '.join(names)}: {meaning.strip()}", "domain": FILES[int(file)], "id": f"{letter}{offset}",
        "words": names, "concept": f"{letter}{offset}", "broader": broader,
    }  # fmt: skip
