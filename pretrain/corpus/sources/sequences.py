"""Sequences of letters: proteins, DNA and molecules, as `text`, from FASTA, SwissProt, GenBank and SMILES files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError, unknown
from pretrain.core.packages import Package
from pretrain.corpus.sources._files import Document, Source, evenly_read, lines_of, numbered_lines, path_label
from pretrain.corpus.sources._paths import located, stamps
from pretrain.corpus.sources._skipped import Skipped
from pretrain.corpus.sources._tables import column, rows_of

Format = Literal["fasta", "swissprot", "genbank", "smiles"]
ENDINGS: dict[Format, tuple[str, ...]] = {
    "fasta": (".fasta", ".fa", ".faa", ".fna", ".ffn", ".fas", ".pro", ".nu"),
    "swissprot": (".dat", ".sprot", ".swiss", ".txt"),
    "genbank": (".gb", ".gbk", ".gp", ".genbank"),
    "smiles": (".smi", ".smiles", ".csv", ".tsv"),
}
LABELS = ("organism", "lineage", "family", "description", "parent", "stem")


@dataclass
class Record:
    """A sequence, and what its file says of it: `organism`, `lineage` (the broadest group), `family`, `description`."""

    name: str
    sequence: str = ""
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sequences(Source):
    """Files of a folder or a glob, each with many sequences; `format` goes by a file's ending where it is null.

    `label` is what the records say of themselves (`organism`, `lineage`, `family`, `description`), or the file's name
    (`stem`) or folder (`parent`); of SMILES tables it may be any column. Records without it, and those shorter than
    `shortest`, are passed over and counted. Sequences of more than `longest` letters are cut into pieces, which stay on
    one side of the split. Gaps and stops are dropped and letters become capitals, except in SMILES.
    """

    sequences: str
    format: Format | None = None
    label: str | None = None
    column: str = "smiles"  # of a table of SMILES
    shortest: Count = 1
    longest: Count | None = None
    limit: Count | None = None  # at most so many, from all alike
    domain: str = "sequences"
    package: Package | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.longest or self.shortest) < self.shortest:
            raise PretrainError(f"shortest {self.shortest}, longest {self.longest}: accepted: shortest at most longest")
        if self.format not in (None, "smiles") and self.label not in (None, *LABELS):
            raise unknown("label", str(self.label), LABELS)

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        yield from evenly_read(self._all, self.limit, skipped)

    def state(self) -> object:
        return stamps(self.sequences, self.package, self._suffixes())

    def _suffixes(self) -> tuple[str, ...]:
        """Of a folder's files those of the format, of a glob's all that it names."""
        if re.search(r"[*?\[]", self.sequences):
            return ()
        kinds = ENDINGS if self.format is None else {self.format: ENDINGS[self.format]}
        return tuple(end + more for ends in kinds.values() for end in ends for more in ("", ".gz"))

    def _all(self, skipped: Skipped) -> Iterator[Document]:
        for name, path in located(self.sequences, self.package, self._suffixes(), skipped):
            kind = self.format or format_of(path)
            for record in self._records(path, kind, skipped):
                if kind != "smiles":
                    record.sequence = re.sub(r"[^A-Za-z]", "", record.sequence).upper()
                if len(record.sequence) < self.shortest:
                    skipped.add("sequences that are too short", f"{name}:{record.name}")
                    continue
                label = self._label(record, path)
                if label is None:
                    skipped.add(f"sequences without {self.label}", f"{name}:{record.name}")
                    continue
                yield from self._pieces(record, f"{name}:{record.name}", label)

    def _records(self, path: Path, kind: Format, skipped: Skipped) -> Iterator[Record]:
        if kind == "smiles":
            return self._molecules(path, skipped)
        return {"fasta": fasta, "swissprot": swissprot, "genbank": genbank}[kind](lines_of(path, skipped))

    def _label(self, record: Record, path: Path) -> dict[str, str] | None:
        """`{"label": …}`, empty when none is asked for; None where the record does not say it."""
        match self.label:
            case None | "parent" | "stem" as label:
                return path_label(path, label)
        value = record.facts.get(self.label)
        return {"label": value} if value else None

    def _pieces(self, record: Record, name: str, label: dict[str, str]) -> Iterator[Document]:
        letters = record.sequence
        step = self.longest or len(letters)
        for start in range(0, len(letters), step):
            piece = letters[start : start + step]
            if len(piece) >= self.shortest:
                place = {"id": name} if step >= len(letters) else {"id": f"{name}@{start}", "group": name}
                yield {"text": piece} | label | {"domain": self.domain} | place

    def _molecules(self, path: Path, skipped: Skipped) -> Iterator[Record]:
        """Lines of `SMILES NAME`, or the rows of a table, whose columns are the facts."""
        if not path.name.removesuffix(".gz").endswith((".csv", ".tsv")):
            for number, line in numbered_lines(path, skipped):
                words = line.split(None, 1)
                if words and not (number == 1 and words[0].lower() == "smiles"):
                    yield Record(words[1] if len(words) > 1 else str(number), words[0])
            return
        names, rows = rows_of(path, skipped)
        place = column(names, self.column, "column", path)
        if self.label is not None and self.label not in ("parent", "stem"):
            column(names, self.label, "label", path)
        for number, row in rows:
            if len(row) == len(names) and row[place].strip():
                yield Record(str(number), row[place].strip(), dict(zip(names, row, strict=True)))


def format_of(path: Path) -> Format:
    """The format that a file's ending tells."""
    name = path.name.removesuffix(".gz")
    kind = next((kind for kind, ends in ENDINGS.items() if name.endswith(ends)), None)
    if kind is None:
        raise PretrainError(f"{path.name}: its ending tells no format; accepted: format: {', '.join(ENDINGS)}")
    return kind


def fasta(lines: Iterator[str]) -> Iterator[Record]:
    """`>NAME DESCRIPTION`, then letters. The organism is UniProt's `OS=…`, or what stands in brackets at the end."""
    record: Record | None = None
    parts: list[str] = []
    for line in lines:
        if line.startswith(">"):
            if record is not None:
                record.sequence = "".join(parts)
                yield record
            name, _, rest = line[1:].strip().partition(" ")
            record, parts = Record(name, facts={"description": rest.strip()}), []
            organism = re.search(r"\bOS=(.+?)(?= [A-Z]{2}=|$)", rest) or re.search(r"\[([^\[\]]+)\]\s*$", rest)
            if organism:
                record.facts["organism"] = organism[1].strip()
        elif record is not None and not line.startswith(";"):
            parts.append(line)
    if record is not None:
        record.sequence = "".join(parts)
        yield record


def swissprot(lines: Iterator[str]) -> Iterator[Record]:
    """Entries of UniProt's flat files: the lines ID, DE, OS, OC, the comment on the family, and SQ until `//`."""
    name, fields, letters, inside = "", {"OS": "", "OC": "", "DE": "", "CC": ""}, "", False
    for line in lines:
        code, rest = line[:2], line[5:].strip()
        if line.startswith("//"):
            if name and letters:
                yield Record(name, letters, _swiss_facts(fields))
            name, fields, letters, inside = "", dict.fromkeys(fields, ""), "", False
        elif code == "ID":
            name = rest.split()[0] if rest else ""
        elif code == "SQ":
            inside = True
        elif inside:
            letters += line
        elif code in fields:
            fields[code] += f"{rest} "


def _swiss_facts(fields: dict[str, str]) -> dict[str, str]:
    family = re.search(
        r"SIMILARITY: Belongs to the (?:[^.]+? superfamily\. )?([^.]+?) (?:super)?family\b", fields["CC"]
    )
    full = re.search(r"(?:Full=)?([^;{]+)", fields["DE"].removeprefix("RecName: ").removeprefix("SubName: "))
    facts = {
        "organism": fields["OS"].split(" (")[0].rstrip(". "),
        "lineage": fields["OC"].split(";")[0].rstrip(". "),
        "family": family[1] if family else "",
        "description": full[1] if full else "",
    }
    return {name: text.strip() for name, text in facts.items() if text.strip()}


def genbank(lines: Iterator[str]) -> Iterator[Record]:
    """Entries of GenBank's flat files: LOCUS, DEFINITION, ORGANISM with its lineage, and ORIGIN until `//`."""
    record: Record | None = None
    parts: list[str] = []
    part, lineage = "", ""
    for line in lines:
        word, rest = line[:12].strip(), line[12:].strip()
        if line.startswith("//"):
            if record is not None and parts:
                record.sequence, record.facts["lineage"] = "".join(parts), lineage.split(";")[0].strip(" .")
                yield record
            record, parts, part, lineage = None, [], "", ""
        elif word == "LOCUS":
            record = Record(rest.split()[0] if rest else "")
        elif record is None:
            continue
        elif part == "ORIGIN":
            parts.append(line)
        elif word and line[:5].strip():
            part = word
            if word in ("DEFINITION", "ORGANISM"):
                record.facts["description" if word == "DEFINITION" else "organism"] = rest
        elif part == "ORGANISM" and not word:
            lineage += f"{rest} "
