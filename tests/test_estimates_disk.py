"""What a corpus is expected to take on the disk, of documents of several kinds."""

from __future__ import annotations

import json
import random

import pytest

from pretrain import recipe as recipes
from pretrain.core.files import write_text
from pretrain.forecast import forecast
from pretrain.identity import plan
from pretrain.stages import Job


def pieces(stories, count, low, high):
    """Stretches of real text, drawn by a seed."""
    whole, drawn = "\n\n".join(story["text"] for story in stories), random.Random(0)
    starts = [drawn.randrange(len(whole) - high) for _ in range(count)]
    return [whole[start : start + drawn.randint(low, high)] for start in starts]


def many(stories, folder):
    """Many small documents."""
    lines = [json.dumps({"text": text}) for text in pieces(stories, 4000, 60, 200)]
    write_text(folder / "many.jsonl", "\n".join(lines))


def few(stories, folder):
    """A few large documents."""
    for number, text in enumerate(pieces(stories, 8, 60_000, 90_000)):
        write_text(folder / f"{number}.txt", text)


def columns(stories, folder):
    """Documents with columns that cannot be packed, columns that can, and numbers."""
    drawn = random.Random(1)
    rows = [
        {"text": text, "label": drawn.choice("abc"), "url": f"https://example.org/{drawn.random()}", "score": drawn.random(), "stars": number % 5}
        for number, text in enumerate(pieces(stories, 1500, 200, 500))
    ]  # fmt: skip
    write_text(folder / "rows.jsonl", "\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("kind", [many, few, columns])
def test_a_corpus_takes_the_disk_that_it_was_planned_to(kind, stories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    kind(stories, tmp_path / "text")
    write_text(tmp_path / "r.yaml", "stages:\n- {stage: data, sources: [text/*], validation: 0.1, test: 0.1}\n")
    recipe = recipes.load(tmp_path / "r.yaml", [], tmp_path / "run")
    (planned,) = forecast(plan(recipe))
    stage = recipes.whole(recipe).stages[0]
    (tmp_path / "made").mkdir()
    stage.run(Job(tmp_path / "made", {}, say=lambda _: None))
    size = sum(path.stat().st_size for path in (tmp_path / "made").rglob("*") if path.is_file())
    records = 10_000  # what the run notes beside it: its record and the code that ran
    assert planned.estimate.disk_bytes - records == pytest.approx(size, rel=0.1)
