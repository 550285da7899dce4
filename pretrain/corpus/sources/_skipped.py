"""What is passed over while documents are read: by reason how many, and the first names of each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from pretrain.core.foreign.reading import open_append

# Reasons by their words, in the order in which they are listed: what may do harm first, what is kept all the same last.
GROUPS = {
    "looks secret": r"secret|key or a password",
    "cannot be read": r"unreadable|bad |broken|not UTF|UTF-16|damaged|no (image|series|whole)|that are no image",
    "files left out": "",  # whatever stands nowhere else
    "documents and rows left out": r"^(documents|rows|lines|notebooks|recordings|images|series|sequences|tables) "
    r"|^conversations|^empty",
    "changed and kept": r" cut\b|replaced",
}
PLURALS = "answer|archive|conversation|document|ending|file|image|item|line|name|notebook|recording|row|sequence|table"
LISTED = 20  # names that are kept of each reason
LONGEST = 4_000_000  # characters of a document or a line: of text in tokens about 90 bytes of memory each
SHOWN = 3  # names that one line has of each reason


def in_number(reason: str, count: int) -> str:
    """A reason with how many there are, one in the singular."""
    if count == 1:
        single = re.sub(rf"\b({PLURALS})s\b", r"\1", reason, count=1)
        return f"1 {single.replace(' that are ', ' that is ', 1)}"
    return f"{count:,} {reason}"


class Skipped:
    """Counts what was passed over, by reason, and keeps the first names; says what is too long to be taken."""

    def __init__(self, longest: int = LONGEST) -> None:
        self.longest = longest  # characters of a document, a line or a cell
        self.reasons: dict[str, int] = {}
        self.names: dict[str, list[str]] = {}
        self.rows = 0  # of tables, that were read
        self.begun: list[str] = []  # tables of which only the first rows were asked for, and that have more
        self.pages: dict[str, int] = {}  # of HTML: how many, the letters of their text, and those that were taken

    def page(self, letters: int, taken: int) -> None:
        """One more page of HTML, of whose text so many letters were taken."""
        for name, count in (("pages", 1), ("letters", letters), ("taken", taken)):
            self.pages[name] = self.pages.get(name, 0) + count

    def add(self, reason: str, name: str | Path = "") -> None:
        """One more; `name` is a file, or a place in one: `FILE:LINE`."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if str(name) and len(names) < LISTED and str(name) not in names:
            names.append(str(name))

    def too_long(self, what: str, name: str | Path) -> None:
        """One more of what is beyond `longest`: `documents`, `lines`."""
        self.add(f"{what} of more than {self.longest:,} characters", name)

    def facts(self) -> dict[str, dict[str, str | int | list[str]]]:
        """As `corpus.json` has it."""
        return {
            reason: {"group": group_of(reason), "count": self.reasons[reason], "names": self.names[reason]}
            for reason in self.ordered()
        }

    def counted(self, reason: str) -> str:
        """A reason with how many there are: `2 rows without text`, `1 row without text`."""
        return in_number(reason, self.reasons[reason])

    def ordered(self) -> list[str]:
        """The reasons by their groups."""
        return sorted(self.reasons, key=lambda reason: (list(GROUPS).index(group_of(reason)), reason))

    def __str__(self) -> str:
        """One line: `2 binary (a.bin, b.bin), 1 hidden (.env)`."""
        parts = []
        for reason in self.ordered():
            count = self.reasons[reason]
            names = self.names[reason][:SHOWN]
            more = ", …" if names and count > len(names) else ""
            parts.append(self.counted(reason) + (f" ({', '.join(names)}{more})" if names else ""))
        return ", ".join(parts)


class Removed:
    """The documents removed as copies: the first names of each kind, and all in `removed.jsonl` of a corpus."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "removed.jsonl"
        self.names: dict[str, list[str]] = {}

    def add(self, kind: str, document: Mapping[str, object], kept: Mapping[str, object]) -> bool:
        """One more, `exact` or `near`, and the document that was kept, of which it is a copy; False: it is not kept."""
        name = str(document.get("id", ""))
        of = {"domain": kept.get("domain"), "id": str(kept.get("id", ""))}
        with open_append(self.path) as file:
            row = {"why": kind, "domain": document.get("domain"), "id": name, "of": of}
            file.write(json.dumps(row).encode() + b"\n")
        names = self.names.setdefault(kind, [])
        if name and len(names) < LISTED:
            names.append(name)
        return False


def group_of(reason: str) -> str:
    """The group of a reason."""
    order = [*(name for name in reversed(GROUPS) if name != "looks secret"), "looks secret"]
    fitting = [name for name in order if GROUPS[name] and re.search(GROUPS[name], reason)]
    return "looks secret" if "looks secret" in fitting else fitting[0] if fitting else "files left out"
