"""What is seen of long work where nobody looks at a terminal, and what is never done silently."""

from __future__ import annotations

import pytest

from pretrain.core.errors import PretrainError, PretrainWarning
from pretrain.corpus import progress
from pretrain.corpus.progress import reported
from pretrain.corpus.store import write_corpus
from pretrain.stages.decode import _fitting
from pretrain.training.log import EVERY, Left, Lines, Log

STEP = {"step": 1, "loss": 2.0, "tokens_per_second": 10.0, "elapsed": 1.0}


def lines_over(steps: int, seconds: float, start: float = 0.0, before: float = 0.0) -> list[str]:
    said: list[str] = []
    lines, left = Lines(said.append), Left()
    for step in range(steps + 1):
        elapsed, progress = before + seconds * step / steps, start + (1 - start) * step / steps
        lines.update(progress, elapsed, f"step {step}{left.words(progress, elapsed)}")
    return said


def test_a_quick_training_says_a_line_each_tenth():
    said = lines_over(1000, 20.0)
    assert [line.split()[0] for line in said] == [f"{ten}0%" for ten in range(1, 11)]
    assert said[4].endswith("  10 s left") and said[-1] == "100%  step 1000"


def test_a_slow_one_says_a_line_every_half_minute():
    assert len(lines_over(1000, 40 * EVERY)) >= 40


def test_one_that_is_gone_on_with_counts_the_time_left_from_there():
    assert lines_over(1000, 20.0, start=0.5)[0].split()[0] == "60%"
    assert lines_over(1000, 20.0, start=0.5, before=500.0)[0].endswith("16 s left")


def test_a_file_gets_lines_in_place_of_a_bar(tmp_path, capsys):
    with Log(tmp_path, main=True, from_step=0) as log:
        assert log.bar is None
        for part in (0.05, 0.1, 0.15, 0.2):
            log.write("step", STEP, part)
    assert len(capsys.readouterr().err.splitlines()) == 2
    with Log(tmp_path, main=True, from_step=0, bar=False) as log:
        log.write("step", STEP, 0.5)
        log.write("step", STEP, 1.0)
    assert capsys.readouterr().err == ""


def test_reading_says_how_far_it_is(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(progress, "EVERY", -1.0)
    assert list(reported("abc", said.append, "documents read")) == ["a", "b", "c"]
    assert said == ["0 documents read", "1 documents read", "2 documents read"]


def test_no_bar_of_a_library_is_drawn_and_its_switch_is_as_it_was(tmp_path, capfd):
    import datasets

    datasets.enable_progress_bars()
    documents = [{"text": f"number {n}", "domain": "a", "id": str(n)} for n in range(40)]
    write_corpus(iter(documents), tmp_path / "corpus", operations=[lambda corpus: corpus.filter(lambda row: True)])
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""
    assert not datasets.are_progress_bars_disabled()


def test_a_prompt_that_does_not_fit_loses_its_beginning_and_that_is_said():
    ids = list(range(100))
    assert _fitting(ids, 28, 128) == ids == _fitting(ids, 1000, None)
    with pytest.warns(PretrainWarning, match="the prompt has 100 tokens.*its first 12 tokens are cut off"):
        assert _fitting(ids, 40, 128) == ids[12:]
    with pytest.raises(PretrainError, match="no room for a prompt: 128 of the model's 128 positions"):
        _fitting(ids, 128, 128)
