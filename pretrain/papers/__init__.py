"""The papers that this project is about, and what stands for each of them here.

`papers.jsonl` holds a row a paper: what it is called, where it appeared, what it does. What stands for it is looked up
and not written there: the methods whose docstrings open with its title or arXiv number, the recipe in `recipes/papers`
whose header carries its title, the claims of that title with the newest recorded verdict. Only what is read from papers
and from code by hand is written in a row: `checked`, and `methods` where a paper is made of methods of other papers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pretrain.core.errors import PretrainError, nearest
from pretrain.core.files import read_json
from pretrain.core.quick.search import closest
from pretrain.core.quick.search import search as ranked
from pretrain.core.registry import PACKAGE, methods
from pretrain.core.system.shipped import shipped

STAGES = (
    "prepare data", "pretrain", "grow", "continue", "tune", "merge", "compress", "decode", "evaluate",
)  # of a model's life, in their order  # fmt: skip
TIERS = ("core", "modality", "study", "application", "reference")
CODE, TEXT, ABSTRACT = "the authors' code", "the paper's text", "the abstract alone"
STANDS, NOT_YET = "stands", "not here yet"
_TITLE = re.compile(r"""^title: *["']?(.*?)["']? *$""", re.MULTILINE)  # of a claim file
_NUMBER = re.compile(r"(?:arxiv:|https?://arxiv\.org/(?:abs|pdf)/)?(\d{4}\.\d{4,5})(?:v\d+)?(?:\.pdf)?")


@dataclass(frozen=True)
class Check:
    """What the methods of a paper were compared with; for code the repository, its commit and what was compared."""

    against: str = ABSTRACT
    repository: str | None = None
    commit: str | None = None
    what: str = ""

    def __str__(self) -> str:
        place = f" ({self.repository} at {self.commit[:12]})" if self.repository and self.commit else ""
        return self.against + place + (f": {self.what}" if self.what else "")


@dataclass(frozen=True)
class Paper:
    """A row of the file. `made_of` are methods that stand for it though their docstrings open with another paper."""

    name: str
    title: str
    arxiv: str | None
    venue: str | None
    tier: str
    modality: tuple[str, ...]
    stage: str
    does: str
    made_of: tuple[str, ...] = ()
    check: Check = Check()

    @property
    def link(self) -> str | None:
        """Where it can be read."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None


@dataclass(frozen=True)
class Claim:
    """A claim file, and the newest of its recorded results by the newest protocol; older protocols are superseded."""

    name: str
    verdict: str | None = None
    scale: str | None = None
    finished: str = ""
    protocol: int = 1

    def __str__(self) -> str:
        return f"{self.name}: {self.verdict} ({self.scale})" if self.verdict else f"{self.name}: not recorded"


@dataclass(frozen=True)
class Standing:
    """What there is of a paper."""

    paper: Paper
    methods: tuple[str, ...] = ()
    recipe: str | None = None
    claims: tuple[Claim, ...] = field(default=())  # the newest recorded first

    @property
    def status(self) -> str:
        """A paper stands where a method or a recipe of its own does."""
        return STANDS if self.methods or self.recipe else NOT_YET

    @property
    def check(self) -> Check | None:
        """What it was checked against; nothing where nothing stands."""
        return self.paper.check if self.status == STANDS else None

    def row(self) -> dict[str, str | list[str] | None]:
        """What `pretrain papers --json` prints."""
        paper, claim = self.paper, self.claims[0] if self.claims else None
        return {
            "name": paper.name, "title": paper.title, "arxiv": paper.arxiv, "venue": paper.venue, "tier": paper.tier,
            "modality": list(paper.modality), "stage": paper.stage, "does": paper.does, "methods": list(self.methods),
            "recipe": self.recipe, "claim": claim.name if claim else None,
            "verdict": claim.verdict if claim else None, "scale": claim.scale if claim else None,
            "checked": str(self.check) if self.check else None, "status": self.status,
        }  # fmt: skip


def key(text: str) -> str:
    """A title or name without case, blanks and punctuation: what two spellings of it share."""
    return re.sub(r"[^a-z0-9]+", "", text.lower().replace("+", "plus"))


def _paper(line: str) -> Paper:
    row = json.loads(line)
    return Paper(
        name=row["name"], title=row["title"], arxiv=row.get("arxiv"), venue=row.get("venue"), tier=row["tier"],
        modality=tuple(row["modality"]), stage=row["stage"], does=row["does"], made_of=tuple(row.get("methods", ())),
        check=Check(**row.get("checked", {})),
    )  # fmt: skip


@cache
def papers() -> tuple[Paper, ...]:
    """All papers, in the order of the file."""
    lines = (PACKAGE / "papers" / "papers.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(map(_paper, lines))


def standings(root: Path | None = None) -> list[Standing]:
    """What stands for each paper; recipes and claims are those under `root`, by default those of the package."""
    root = shipped() if root is None else root
    by_title, by_arxiv = _methods()
    recipes, claims = _recipes(root / "recipes" / "papers"), _claims(root / "claims")
    rows = []
    for paper in papers():
        names = {*by_title.get(key(paper.title), ()), *by_arxiv.get(paper.arxiv, ()), *paper.made_of}
        recipe = recipes.get(key(paper.title), recipes.get(key(paper.name)))
        ordered = sorted(claims.get(key(paper.title), ()), key=lambda claim: (claim.finished, claim.name), reverse=True)
        rows.append(Standing(paper, tuple(sorted(names)), recipe and f"recipes/papers/{recipe}", tuple(ordered)))
    return rows


def _methods() -> tuple[dict[str, list[str]], dict[str | None, list[str]]]:
    """The names of our methods by the title and by the number that their docstrings open with."""
    by_title: dict[str, list[str]] = {}
    by_arxiv: dict[str | None, list[str]] = {}
    for info in methods().values():
        if info.ours:
            by_title.setdefault(key(info.title), []).append(info.name)
            if info.arxiv:
                by_arxiv.setdefault(info.arxiv, []).append(info.name)
    return by_title, by_arxiv


def header(recipe: Path) -> str:
    """The title that a recipe's first comment carries: `# Title (arXiv:NUMBER).`, or the whole first sentence."""
    first = recipe.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
    return re.sub(r" \((?:arXiv:)?[^()]*\)\.?$", "", first).removesuffix(".")


def _recipes(folder: Path) -> dict[str, str]:
    """File names by the key of the title in the header, and by that of the file's own name."""
    files = sorted(folder.glob("*.yaml"))
    return {key(path.stem): path.name for path in files} | {key(header(path)): path.name for path in files}


def _claims(folder: Path) -> dict[str, list[Claim]]:
    """Claims by the key of their title. Only the heads of the files are read: parsing YAML takes its time."""
    newest: dict[str, Claim] = {}
    for result in map(read_json, sorted((folder / "results").glob("*.json"))):
        protocol = result.get("protocol", 1)
        word = result["word"] if protocol > 1 else f"superseded: {result['word']}"
        claim = Claim(result["name"], word, result["scale"], result["finished"], protocol)
        before = newest.get(claim.name, claim)
        newest[claim.name] = max(claim, before, key=lambda claim: (claim.protocol, claim.finished))
    by_title: dict[str, list[Claim]] = {}
    for path in sorted(folder.glob("*.yaml")):
        title = _TITLE.search(path.read_text(encoding="utf-8"))
        if title is not None:
            by_title.setdefault(key(title[1]), []).append(newest.get(path.stem, Claim(path.stem)))
    return by_title


def search(rows: Iterable[Standing], words: Sequence[str]) -> list[Standing]:
    """The rows that have all the words in some form, the best first."""
    return ranked(rows, words, paper_texts)


def paper_texts(row: Standing) -> list[tuple[float, str]]:
    """What of a row is searched, and what a hit is worth."""
    paper = row.paper
    rest = " ".join((paper.venue or "", paper.tier, *paper.modality, paper.stage, row.status))
    named = [(8.0, name) for name in (paper.name, *row.methods, paper.arxiv or "")]
    return [*named, (4.0, paper.title), (2.0, paper.does), (1.0, rest)]


def find(rows: Iterable[Standing], word: str) -> Standing:
    """The row of a name, a title, an arXiv number or a method; other words are an error that names the nearest."""
    rows, number = list(rows), _NUMBER.fullmatch(word.strip().lower())
    if number:
        for row in rows:
            if row.paper.arxiv == number[1]:
                return row
        raise PretrainError(f"no paper arXiv:{number[1]}{nearest(number[1], [r.paper.arxiv or '' for r in rows])}")
    known: dict[str, Standing] = {}
    for named in (_exact, _short, lambda row: row.methods):  # a name before a part of one, and that before a method
        for row in rows:
            for name in named(row):
                known.setdefault(name.lower(), row)
    by_key = {key(name): row for name, row in reversed(known.items())}
    if key(word) in by_key:
        return by_key[key(word)]
    hint = nearest(word.lower(), known, 0.8)
    like = closest(word, rows, lambda row: row.paper.name, paper_texts) if not hint else []
    near = f"; nearest: {', '.join(row.paper.name for row in like)}" if like else ""
    raise PretrainError(f"unknown paper {word!r}{hint}{near}; accepted: a name or arXiv number of `pretrain papers`")


def _exact(row: Standing) -> tuple[str, ...]:
    return row.paper.name, row.paper.title


def _short(row: Standing) -> list[str]:
    """`ODM (Online Data Mixing)` is ODM and Online Data Mixing too."""
    return [part for part in re.split(r" \(|\)| / ", row.paper.name) if part]
