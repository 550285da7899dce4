"""Undo what wrong decoding has done to texts, and take out signs that nothing shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pretrain.core.system.extras import extras_named
from pretrain.data import DataOperation
from pretrain.data._mapped import check_text, remade
from pretrain.data._work import desk

if TYPE_CHECKING:
    from datasets import Dataset

ROUNDS = 8  # at the most, until nothing changes
LONGEST = 1_000_000  # characters that are looked at together, as in ftfy
_ODD = re.compile(r"[^\t\n\f\r\x20-\x7e]")  # what an ASCII text seldom has; an escape sequence begins with one
_LINE = re.compile(rf"[^\n]{{0,{LONGEST - 1}}}\n|[^\n]{{1,{LONGEST}}}")


@dataclass(frozen=True)
class RepairText(DataOperation):
    """ftfy: fixes text for you (Zenodo 2019, 10.5281/zenodo.2591652).

    With the package ftfy, and what FineWeb's pipeline (arXiv:2406.17557) has it do: text that was decoded by a wrong
    encoding is decoded rightly (`Ã¼` becomes `ü`), HTML entities of texts without tags are resolved (not with `html`
    false), control characters and escape sequences of terminals go, lone surrogates become what they stood for. Quotes,
    ligatures, widths, line breaks and Unicode's normal forms are left as they are. Lines of plain ASCII are passed
    over, since nothing is to be done in them. A second time nothing changes. The report says how many documents and
    lines were changed. Text is changed.
    """

    computes: ClassVar[bool] = False
    speed: ClassVar[float] = 60e6
    shared: ClassVar[bool] = True

    html: bool = True

    def __call__(self, corpus: Dataset) -> Dataset:
        """The corpus with repaired texts."""
        check_text(self.name, corpus)
        self.repairer()  # a package that is missing is told at once
        documents = lines = 0

        def mend(texts: list[str], repaired: dict[int, tuple[str, int]]) -> dict[str, list[str]]:
            nonlocal documents, lines
            result = list(texts)
            for place, (text, changed) in repaired.items():
                result[place] = text
                lines += changed
            documents += len(repaired)
            return {"text": result}

        with desk() as here:
            after = remade(self.name, corpus, here, self.each_repaired, mend)
            here.reports.append({"method": self.name, "changed": documents, "lines": lines})
        return after

    def each_repaired(self, texts: list[str]) -> dict[int, tuple[str, int]]:
        """Of texts that change, by their places, what a repairer gives."""
        repair = self.repairer()
        every = ((place, repair(text)) for place, text in enumerate(texts))
        return {place: (text, changed) for place, (text, changed) in every if changed}

    def repairer(self) -> Callable[[str], tuple[str, int]]:
        """What repairs a text, and says how many lines it has changed."""
        with extras_named():
            from ftfy import TextFixerConfig, fix_text_segment
        settings = TextFixerConfig(
            fix_latin_ligatures=False, fix_character_width=False, uncurl_quotes=False, fix_line_breaks=False,
            normalization=None, explain=False,
        )  # fmt: skip
        plain = settings._replace(unescape_html=False)

        def once(text: str) -> tuple[str, int]:
            pieces, changed, html = [], 0, self.html
            for line in _LINE.findall(text):
                html = html and "<" not in line  # from the first tag on what looks like an entity may be code
                if not (_ODD.search(line) or (html and "&" in line)):
                    pieces.append(line)
                    continue
                pieces.append(fix_text_segment(line, settings if html else plain))
                changed += pieces[-1] != line
            return "".join(pieces), changed

        def repair(text: str) -> tuple[str, int]:
            total = 0
            for _ in range(ROUNDS):
                text, changed = once(text) if _ODD.search(text) or "&" in text else (text, 0)
                if not changed:
                    break
                total = max(total, changed)
            return text, total

        return repair
