"""Model cards: `README.md` of a checkpoint, with how it came about, by which papers, and what their claims came to.

What a card said before stays; the part between the two marks is written anew with each checkpoint.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.exchange.beside import CARD, carry
from pretrain.core.files import JSONObject, read_json
from pretrain.core.foreign.paths import travels
from pretrain.core.foreign.reading import read_bytes
from pretrain.core.foreign.texts import decode, mended
from pretrain.core.quick.quantities import figure, short
from pretrain.core.registry import info
from pretrain.core.system.shipped import CLAIMS, shipped

MOST = 1 << 20  # bytes of a card that travels
BEGIN, END = "<!-- pretrain: how it was made -->", "<!-- pretrain: end -->"
SHOWN = 4  # metrics of a stage
_PART = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END) + r"\n*", re.DOTALL)


def accompany(work: Path, lineage: JSONObject, source: Path | None) -> None:
    """Put beside a checkpoint what lay beside the one that it was made of, and its card."""
    carry(source, work)
    write_card(work, lineage, source)


def write_card(work: Path, lineage: JSONObject, source: Path | None = None) -> None:
    """Write `README.md` into a checkpoint: the card of `source`, where it has one, and the lineage below it."""
    before = _card(source / CARD) if source is not None and travels(source / CARD, source) else ""
    stages = [stage for stage in (*lineage.get("stages", []), lineage.get("made_by")) if isinstance(stage, dict)]
    if not stages and not before:
        return
    if not before:
        before = f"---\nlibrary_name: transformers\ntags:\n- pretrain\n---\n\n# {_plain(stages[-1].get('name'))}\n"
    text = before.rstrip() + "\n" + (f"\n{_part(stages, lineage)}" if stages else "")
    (work / CARD).write_text(text, encoding="utf-8")


def _card(path: Path) -> str:
    """A card without the part that is ours; empty where there is none that is a text."""
    with suppress(OSError, UnicodeDecodeError, PretrainError):
        return _PART.sub("", mended(decode(read_bytes(path, MOST))))
    return ""


def _part(stages: list[JSONObject], lineage: JSONObject) -> str:
    rows = ["| stage | kind | methods | FLOPs | measured |", "|---|---|---|---|---|"]
    for stage in stages:
        methods = ", ".join(f"`{_plain(name)}`" for name in stage.get("methods") or {})
        cells = (stage.get("name"), stage.get("stage"), methods, _flops(stage), _measured(stage))
        rows.append(f"| {' | '.join(map(_plain, cells))} |")
    data = [f"Trained on the corpus of fingerprint `{_plain(lineage['data'])[:16]}`."] if lineage.get("data") else []
    tokens = lineage.get("tokens")
    if isinstance(tokens, int | float):
        data.append(f"In all {short(tokens)} {_plain(lineage.get('unit') or 'tokens')}, {_flops(lineage)} FLOPs.")
    papers = [line for name in _methods(stages) if (line := _paper(name))]
    lines = [BEGIN, "## How it was made", "", *rows, "", " ".join(data), ""]
    lines += (
        ["Papers whose methods it was made by, and what their claims came to in pretrain's protocol:", ""]
        if papers
        else []
    )
    return "\n".join([*lines, *papers, END]) + "\n"


def _methods(stages: list[JSONObject]) -> list[str]:
    return list(dict.fromkeys(str(name) for stage in stages for name in stage.get("methods") or {}))


def _paper(name: str) -> str:
    """A line on a method's paper and the newest verdict on its claim; empty of a method without a paper."""
    try:
        row = info(name)
    except PretrainError:  # of a method from outside that is not here
        return ""
    if not row.title or not row.arxiv:
        return ""
    verdicts = [result for path in (shipped() / CLAIMS / "results").glob(f"{name}-*.json")
                if (result := read_json(path)).get("name") == name]  # fmt: skip
    newest = max(verdicts, key=lambda result: (result.get("protocol", 1), result["finished"]), default=None)
    word = f"{newest['word']} ({newest['scale']})" if newest else "not recorded"
    return f"- `{name}`: {row.title} ([arXiv:{row.arxiv}](https://arxiv.org/abs/{row.arxiv})); claim: {word}"


def _flops(record: JSONObject) -> str:
    value = record.get("flops")
    return short(value) if isinstance(value, int | float) and value else ""


def _measured(stage: JSONObject) -> str:
    metrics = stage.get("metrics")
    numbers = [(n, v) for n, v in metrics.items() if isinstance(v, int | float)] if isinstance(metrics, dict) else []
    return ", ".join(f"{_plain(name)} {figure(value)}" for name, value in numbers[:SHOWN])


def _plain(value: object) -> str:
    """A text in a cell of a table: one line, without what Markdown would take for its own."""
    return " ".join(str("" if value is None else value).split()).replace("|", "\\|").replace("<", "&lt;")[:400]
