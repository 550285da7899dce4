"""What is passed over while documents are read: by reason how many, and the first names of each."""

from __future__ import annotations

from pathlib import Path

LISTED = 20  # names that are kept of each reason
LONGEST = 4_000_000  # characters of a document or a line: of text in tokens about 90 bytes of memory each
SHOWN = 3  # names that one line has of each reason


class Skipped:
    """Counts what was passed over, by reason, and keeps the first names; says what is too long to be taken."""

    def __init__(self, longest: int = LONGEST) -> None:
        self.longest = longest  # characters of a document, a line or a cell
        self.reasons: dict[str, int] = {}
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str | Path = "") -> None:
        """One more; `name` is a file, or a place in one: `FILE:LINE`."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if str(name) and len(names) < LISTED and str(name) not in names:
            names.append(str(name))

    def too_long(self, what: str, name: str | Path) -> None:
        """One more of what is beyond `longest`: `documents`, `lines`."""
        self.add(f"{what} of more than {self.longest:,} characters", name)

    def facts(self) -> dict[str, dict[str, int | list[str]]]:
        """As `corpus.json` has it."""
        return {reason: {"count": self.reasons[reason], "names": self.names[reason]} for reason in sorted(self.reasons)}

    def __str__(self) -> str:
        """One line: `2 binary (a.bin, b.bin), 1 hidden (.env)`."""
        parts = []
        for reason, count in sorted(self.reasons.items()):
            names = self.names[reason][:SHOWN]
            more = ", …" if names and count > len(names) else ""
            parts.append(f"{count:,} {reason}" + (f" ({', '.join(names)}{more})" if names else ""))
        return ", ".join(parts)
