"""A report's bars and curves can be told from what is behind them in both themes, and its words say what they are of."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from page_cases import example, put

import pretrain.report
from pretrain.core.files import read_json
from pretrain.corpus.store import Corpus, write_corpus
from pretrain.report.charts import COLOURS, GREYS, bits_chart
from pretrain.report.page import write

TEMPLATE = Path(pretrain.report.__file__).parent / "template"
CONTRAST = 3.0  # of graphics to what is beside them, WCAG 2.1, 1.4.11


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def themes() -> dict[str, dict[str, str]]:
    """The variables of the style, of the light theme and of the dark one, which says some anew."""
    style = (TEMPLATE / "style.css").read_text()
    dark = style[style.index("prefers-color-scheme: dark") :].partition("\n}")[0]
    read = lambda text: dict(re.findall(r"--(\w+): (#[0-9a-f]+)", text))  # noqa: E731
    light = read(style.partition("@media (prefers-color-scheme")[0])
    return {"light": light, "dark": light | read(dark)}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_bars_and_curves_stand_out_in_both_themes(theme):
    colours = themes()[theme]
    names = [re.fullmatch(r"var\(--(\w+)\)", colour)[1] for colour in (*COLOURS, *GREYS)] + ["accent"]
    for name in names:
        for behind in ("track", "card"):
            assert contrast(colours[name], colours[behind]) >= CONTRAST, f"{name} on {behind}"
    assert contrast(colours["track"], colours["card"]) > 1.15, "the end of a bar's track is seen"


def test_the_curves_have_the_bars_colours():
    assert (
        f"[{', '.join(map(str, range(len(COLOURS))))}].map(i => `var(--c${{i}})`)" in (TEMPLATE / "draw.js").read_text()
    )


def test_what_compressors_have_packed_is_said():
    bar = {"name": "xz -9e", "all": 1.7, "values": [1.6]}
    chart = {"split": "test", "title": "", "domains": ["a"], "more": 0, "few": [], "sizes": {}}
    chart |= {"models": [bar | {"name": "m"}], "tools": [bar]}
    assert "pack all text as one stream, and each domain as a stream of its own." in bits_chart(0, chart)
    assert "pack all text as one stream." in bits_chart(0, chart | {"domains": []})


def test_a_stage_that_is_called_samples_is_not_told_twice(tmp_path):
    folder = example(tmp_path)
    run = read_json(folder / "run.json")
    row = next(row for row in run["stages"] if row["name"] == "say")
    row["name"] = "samples"
    put(folder / "run.json", {k: v for k, v in run.items() if k != "seal"})
    page = write(folder).read_text()
    assert "<h2>Samples</h2>" in page and "Samples: samples" not in page and "<h2>Samples: encoder</h2>" in page


def test_documents_that_are_removed_as_copies_are_named(tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(f"word{n}" for n in rng.integers(0, 5000, 60)) for _ in range(300)]
    nearly = [f"{text} more" for text in texts[:25]]
    rows = [{"text": text, "domain": "d", "id": f"{n}.txt"} for n, text in enumerate([*texts, *texts[:25], *nearly])]
    info = write_corpus(iter(rows), tmp_path / "corpus", validation=0.1, test=0.1, near_duplicates=0.5)
    listed = [json.loads(line) for line in (tmp_path / "corpus" / "removed.jsonl").read_text().splitlines()]
    exact = [row["id"] for row in listed if row["why"] == "exact"]
    assert exact == [f"{n}.txt" for n in range(300, 325)] and info["removed"]["exact"] == 25
    assert [row["of"] for row in listed if row["why"] == "exact"] == [
        {"domain": "d", "id": f"{n}.txt"} for n in range(25)
    ]
    held = {d["id"] for split in ("validation", "test") for d in Corpus(tmp_path / "corpus").documents(split)}
    for row in listed:  # a text and the same with a word more
        twins = {int(each["id"][:-4]) % 325 for each in (row, row["of"])}
        assert row["why"] == "exact" or (len(twins) == 1 and row["of"]["id"] in held)
    near = [row["id"] for row in listed if row["why"] == "near"]
    assert len(near) == info["removed"]["near"] > 5 and set(near) <= {
        f"{n}.txt" for n in [*range(25), *range(325, 350)]
    }
    assert (
        info["copies"]
        == {"exact": exact[:20], "near": near[:20]}  # of what is like a held-out document
        == read_json(tmp_path / "corpus" / "corpus.json")["copies"]
    )
    folder = example(tmp_path / "run")
    put(
        folder / "data" / "corpus" / "corpus.json",
        {"domains": {}, "removed": info["removed"], "copies": info["copies"]},
    )
    page = write(folder).read_text()
    assert "Removed as copies" in page and "300.txt, 301.txt" in page and "data/corpus/removed.jsonl" in page


def test_without_copies_there_is_no_list(tmp_path):
    rows = [{"text": f"text {n} " * 9, "domain": "d", "id": str(n)} for n in range(9)]
    info = write_corpus(iter(rows), tmp_path / "corpus", validation=0.0, test=0.0)
    assert info["copies"] == {} and not (tmp_path / "corpus" / "removed.jsonl").exists()
