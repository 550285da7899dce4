"""What does not fit in memory is told by the field that makes it so large, and with what of it would fit."""

from __future__ import annotations

import re

import pytest
import yaml
from typer.testing import CliRunner

from pretrain import forecast as forecasts
from pretrain.cli import app
from pretrain.core.errors import PretrainError
from pretrain.forecast import check_fits, forecast
from pretrain.identity import plan
from pretrain.recipe import load
from pretrain.stages import _expected

MEMORY = 8e9


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A recipe that fits well in the memory that the machine is taken to have."""
    monkeypatch.setattr(forecasts, "memory", lambda: MEMORY)
    monkeypatch.setattr(_expected, "memory", lambda: MEMORY)
    (tmp_path / "texts.txt").write_text("some words of a text and others \n" * 4000)
    stages = [
        {"name": "corpus", "stage": "data", "sources": [str(tmp_path / "texts.txt")], "validation": 0, "test": 0},
        {"name": "tokenizer", "stage": "tokenizer", "corpus": "corpus", "vocab_size": 512},
        {"name": "model", "stage": "train", "corpus": "corpus", "tokenizer": "tokenizer", "length": 64, "batch_rows": 4,
         "budget": {"tokens": 100_000}, "model": {"family": "llama", "hidden_size": 64, "intermediate_size": 128,
         "num_hidden_layers": 2, "num_attention_heads": 2}},
    ]  # fmt: skip
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"stages": stages}))
    return path


@pytest.mark.parametrize(
    "name, size",
    [
        ("batch_rows", 100_000),
        ("model.hidden_size", 1_000_000),
        ("model.num_hidden_layers", 10_000),
        ("model.intermediate_size", 10_000_000),
        ("length", 100_000),
        ("model.vocab_size", 300_000_000),
    ],
)
def test_the_field_that_takes_the_most_is_named_and_what_fits_of_it_does(text, tmp_path, name, size):
    beside = {
        "length": [f"model.model.max_position_embeddings={size}"],
        "model.num_hidden_layers": ["model.model.hidden_size=512"],
    }.get(name, [])

    def check(value):
        recipe = load(text, [f"model.{name}={value}", *beside], tmp_path / "run")
        check_fits(forecast(plan(recipe)))

    with pytest.raises(PretrainError) as raised:
        check(size)
    called = name if name != "model.vocab_size" else "vocab_size"
    assert f"this machine has 8 GB; {called} {size:,} takes the most of it; accepted: {called} of about" in str(
        raised.value
    )
    most = int(re.search(r"of about ([\d,]+) at most", str(raised.value))[1].replace(",", ""))
    assert 4 < most < size
    check(most // 2 * 2)
    with pytest.raises(PretrainError, match="of memory"):
        check(2 * most)


def test_rows_that_are_computed_in_parts_are_blamed_by_their_own_field(text, tmp_path):
    recipe = load(text, ["model.batch_rows=100000", "model.micro_rows=50000"], tmp_path / "run")
    with pytest.raises(PretrainError, match="micro_rows 50,000 takes the most of it; accepted: micro_rows of about"):
        check_fits(forecast(plan(recipe)))


def test_a_vocabulary_that_no_text_gives_is_reckoned_as_what_can_come_out(text, tmp_path):
    corpus, tokenizer, model = forecast(plan(load(text, ["tokenizer.vocab_size=1000000"], tmp_path / "run")))
    entries = tokenizer.estimate.left.vocabulary
    assert 512 < entries < 10_000 and corpus.estimate.left.bytes["train"] > 100_000
    (odd,) = tokenizer.estimate.warnings
    assert "vocab_size 1,000,000" in odd.text and f"about {entries:,} come out, which estimates go by" in odd.text
    _, same, small = forecast(plan(load(text, [f"tokenizer.vocab_size={entries}"], tmp_path / "run")))
    assert model.estimate.memory_bytes == small.estimate.memory_bytes
    assert tokenizer.estimate.disk_bytes == same.estimate.disk_bytes


def test_a_budget_beyond_all_years_is_refused_without_a_table_of_its_digits(text, tmp_path):
    command = ["run", str(text), "--dry-run", "--output", str(tmp_path / "run"), "--set", "model.budget={epochs: 1e30}"]
    outcome = CliRunner().invoke(app, command)
    assert "model.budget.epochs: budget.epochs 1e+30: about" in str(outcome.exception) and outcome.output == ""
