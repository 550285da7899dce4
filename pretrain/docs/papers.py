"""The page of the papers: what each does, and what stands for it here."""

from __future__ import annotations

from pathlib import Path

from pretrain.core.registry import methods
from pretrain.docs.tables import slug
from pretrain.papers import STAGES, STANDS, Standing, standings


def papers_page(root: Path) -> str:
    """The papers by stage of life and modality: what each does, what stands for it, what that was checked against."""
    rows = standings(root)
    standing = sum(row.status == STANDS for row in rows)
    lines = [
        "<!-- Made by `make docs` from pretrain/papers/papers.jsonl, the docstrings, the recipes and the claims. -->\n",
        "# Papers\n",
        f"{standing} of {len(rows)} papers stand here. `pretrain papers` lists and searches them, "
        "`pretrain papers show NAME` shows one. A verdict is that of the newest recorded run of a paper's "
        "[claim](claims.md).\n",
    ]
    for stage in STAGES:
        of_stage = [row for row in rows if row.paper.stage == stage]
        lines.append(f"## {stage.capitalize()}\n")
        for modality in sorted({_modality(row) for row in of_stage}):
            lines += [f"### {stage.capitalize()}: {modality}\n", "| paper | what it does | status |", "|---|---|---|"]
            lines += [_paper_row(row) for row in of_stage if _modality(row) == modality]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _modality(row: Standing) -> str:
    """The first of a paper's modalities, that which it is about."""
    return row.paper.modality[0]


def _paper_row(row: Standing) -> str:
    paper = row.paper
    title = f"[{paper.title}]({paper.link})" if paper.link else paper.title
    others = f", {', '.join(paper.modality[1:])} too" if paper.modality[1:] else ""
    kinds_of = {m.name: m.kind for m in methods().values()}
    holds = [f"[`{name}`](methods/{slug(kinds_of[name])}.md#{name})" for name in row.methods]
    holds += [f"[recipe](../{row.recipe})"] if row.recipe else []
    status = [f"**{row.status}**" + (": " + ", ".join(holds) if holds else "")]
    status += [f"claim {claim}" for claim in row.claims]
    status += [f"checked against {row.check}"] if row.check else []
    cells = (f"**{paper.name}** {title} ({paper.tier}{others})", paper.does, "; ".join(status))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
