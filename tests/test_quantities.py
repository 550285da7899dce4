"""Words people think in: counts with a letter, durations, passes over the data; names stay names."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_recipe import small_recipe

import pretrain
from pretrain import engine
from pretrain.core.errors import PretrainError
from pretrain.core.method import nested
from pretrain.core.quick.quantities import SCALES, TIMES, as_typed, duration, figure, quantity, short
from pretrain.corpus.shards import Shards
from pretrain.recipe import load
from pretrain.training.budget import Budget


@pytest.mark.parametrize(
    ("word", "value"),
    [("100k", 100_000), ("2M", 2_000_000), ("1B", 10**9), ("1.5k", 1500), ("0.3M", 300_000), ("2 M", 2_000_000), ("1_000k", 10**6),
     ("-2k", -2000), ("2P", 2 * 10**15), ("30min", None), ("k", None), ("2Mx", None), ("M2", None), ("1e3k", None), ("2m", None), ("", None)],
)  # fmt: skip
def test_counts_with_a_letter_are_numbers_and_whole_ones_are_whole(word, value):
    found = quantity(word)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("word", "seconds"),
    [("30min", 1800), ("2h", 7200), ("90s", 90), ("1h30min", 5400), ("1 h 30 min", 5400), ("0.5 s", 0.5), ("2d", 172_800), ("5m", 300),
     ("2k", 2000), ("90x", None), ("min", None), ("s90", None)],
)  # fmt: skip
def test_durations_are_seconds(word, seconds):
    assert quantity(word, duration=True) == seconds
    assert quantity("30min") is None


@given(st.integers(1, 10**6), st.sampled_from(sorted(SCALES)), st.sampled_from(sorted(TIMES)))
def test_every_letter_scales_by_what_it_stands_for(number, letter, unit):
    assert quantity(f"{number}{letter}") == number * SCALES[letter]
    assert quantity(f"{number}{unit}", duration=True) == number * TIMES[unit]


def test_only_where_numbers_and_no_text_are_asked_for_a_word_becomes_one():
    assert as_typed("2k", int) == 2000 and as_typed("2k", int | None) == 2000
    assert as_typed("2k", str) == "2k" == as_typed("2k", str | int | None)
    assert as_typed(["1k", 2], list[int]) == [1000, 2] and as_typed(("1k",), tuple[str, ...]) == ("1k",)
    assert as_typed({"2M": "3k"}, dict[str, float]) == {"2M": 3000}
    assert as_typed({"a": ["1k"]}, dict[str, list[int]]) == {"a": [1000]}


@pytest.fixture
def recipe(tmp_path, stories):
    def read(*overrides, **fields):
        (tmp_path / "r.yaml").write_text(small_recipe(tmp_path, stories[:30], **{"budget": {"steps": 3}} | fields))
        return load(tmp_path / "r.yaml", overrides, tmp_path / "out")

    return read


@pytest.mark.parametrize("change", ["model.clip=true", "model.batch_rows=yes", "model.optimizer.lr=true"])
def test_true_is_no_number_in_a_recipe_as_it_is_none_in_python(recipe, change):
    with pytest.raises(PretrainError, match="a (valid|whole|finite) (number|integer)"):
        recipe(change)


@pytest.mark.parametrize("word", ["2", "2.0", " 2 ", "1e2", "1_000", "inf"])
@pytest.mark.parametrize("field", ["length", "seed", "optimizer.lr", "schedule.warmup", "budget.steps", "clip"])
def test_a_number_in_quotes_is_a_text_in_every_field(recipe, field, word):
    with pytest.raises(PretrainError, match=f"{re.escape(repr(word))}: accepted: (a (whole|finite) number|null, or)"):
        recipe(f"model.{field}='{word}'")


@pytest.mark.parametrize("value", ["1", "0", "1.0", "'true'", "'1'", "'no'"])
@pytest.mark.parametrize("field", ["model.compile", "corpus.sources.0.secrets"])
def test_only_true_and_false_are_true_and_false(recipe, field, value):
    with pytest.raises(PretrainError, match=f"{re.escape(value)}: accepted: true or false"):
        recipe(f"{field}={value}")


def test_whole_floats_are_whole_numbers_and_words_of_a_field_are_words():
    assert type(as_typed(1e6, int)) is int and type(as_typed([2.0], list[int])[0]) is int
    assert (
        as_typed(2.5, int) == 2.5 and type(as_typed(2.0, float)) is float and type(as_typed(2.0, int | float)) is float
    )
    assert as_typed(1e300, int) == 1e300  # which no field takes
    assert as_typed("2", Literal["2"] | int) == "2" and as_typed("auto", Literal["auto"] | float) == "auto"
    assert as_typed(["2"], tuple[str, ...]) == ["2"] and as_typed("1", Any) == "1"


def test_a_method_that_another_holds_reads_its_fields_alike():
    assert nested({"method": "cosine", "warmup": "1k"}, "schedule").warmup == 1000
    with pytest.raises(PretrainError, match="warmup '2': accepted: 0 or more|warmup '2': accepted: a finite number"):
        nested({"method": "cosine", "warmup": "2"}, "schedule")


def test_recipes_and_overrides_take_them_everywhere_and_names_stay_names(recipe):
    fields = {
        "budget": {"tokens": "100k"}, "evaluate_tokens": "2k", "mixture": {"2M": "1k"}, "optimizer": {"method": "adamw", "lr": 1e-3},
        "schedule": {"method": "cosine", "warmup": "1k"}, "policies": [{"method": "domain_upsampling", "mixture": {"2M": 1}, "share": 0.5}],
        "model": {"family": "llama", "hidden_size": "0.016k", "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": "32k"},
    }  # fmt: skip
    found = recipe("tokenizer.vocab_size=0.5k", **fields)
    model = found.stages[2]
    assert model.budget.tokens == 100_000 and model.evaluate_tokens == 2000 and model.mixture == {"2M": 1000}
    assert model.schedule.warmup == 1000 and found.stages[1].vocab_size == 500
    assert model.fields()["vocab_size"] == 32_000 and model.fields()["hidden_size"] == 16
    assert recipe("model.budget.seconds=30min").stages[2].budget == Budget(seconds=1800)
    assert recipe("model.budget={flops: 2T}").stages[2].budget == Budget(flops=2e12)
    assert recipe("seed=1k").seed == 1000 and recipe("name=2M").name == "2M"
    weighted = recipe("model.objectives=[{method: causal_lm, weight: 1k}]").stages[2].weighted()
    assert [w.weight for w in weighted] == [1000]
    assert recipe("corpus.sources=[{files: 2M}]").stages[0].sources[0].files == "2M"
    with pytest.raises(PretrainError, match=r"--set model.budget.tokens=30min: model.budget.*'30min'"):
        recipe("model.budget.tokens=30min")


def test_epochs_are_passes_over_the_packed_rows_of_the_training_split(recipe):
    done = engine.run(recipe(budget={"epochs": 0.5}), say=engine.silent)
    (train,) = done.folder.glob(".tokens/*/train")
    rows = len(Shards(train).plan(32))
    assert rows > 100 and done.stages["model"]["metrics"]["steps"] == -(-rows // 4)  # half of them, two a step
    steps = [json.loads(line) for line in (done.folder / "model" / "log.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in steps if line["event"] == "step"]
    assert rates[-1] < rates[len(rates) // 2] / 2  # the schedule ends where the budget does
    assert done.stages["model"]["config"]["budget"] == {"epochs": 0.5}


@pytest.mark.parametrize(("epochs", "rows", "batch", "steps"), [(3, 100, 10, 30), (1, 101, 10, 11), (0.1, 100, 10, 1), (0.001, 100, 10, 1), (0.3, 100, 1, 30)])  # fmt: skip
def test_epochs_become_the_steps_that_take_all_rows_so_often(epochs, rows, batch, steps):
    assert Budget(epochs=epochs).resolved(rows, batch) == Budget(steps=steps)
    assert Budget(tokens=5).resolved(rows, batch) == Budget(tokens=5)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (7, "7"), (999, "999"), (999.4, "999"), (999.6, "1 k"), (1234, "1.23 k"), (999_499, "999 k"), (999_999, "1 M"), (86e9, "86 G"),
     (9.8649e12, "9.86 T"), (1.2e18, "1.2 E"), (3e22, "30,000 E"), (-2500, "-2.5 k"), (0.25, "0.25"), (math.inf, "inf"), (math.nan, "nan")],
)  # fmt: skip
def test_a_number_has_a_prefix_and_never_a_thousand_of_the_smaller_one(value, shown):
    assert short(value) == shown
    assert short(value, "B") == (f"{shown}B" if shown[-1].isupper() or shown[-1] == "k" else f"{shown} B")


def test_fewer_digits_are_no_exponent_either():
    assert (
        short(120_000, digits=2) == "120 k"
        and short(126, digits=2) == "130"
        and short(1_234_567, digits=4) == "1.235 M"
    )
    assert short(2500, "FLOPs", sign="+") == "+2.5 kFLOPs"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(16_384, "16,384"), (0.42129, "0.4213"), (12_345.6, "12,350"), (999_999.7, "1,000,000"), (9_999_999.9, "10 M"), (9_861_234_567_890, "9.861 T"),
     (1234567, "1,234,567"), (3.0, "3"), (2.5e-5, "0.000025"), (0.00012345, "0.0001234"), (1.5e-7, "1.5e-07"), (math.nan, "nan"), (-0.5, "-0.5")],
)  # fmt: skip
def test_a_figure_has_no_exponent_and_whole_ones_keep_their_digits(value, shown):
    assert figure(value) == shown
    assert figure(value, sign="+") == (shown if shown[0] == "-" else f"+{shown}")


@given(st.floats(1.1e-6, 1e21), st.integers(2, 6))
def test_what_is_shown_is_the_number_to_so_many_digits(value, digits):
    for text in (figure(value, digits), short(value, digits=digits)):
        number, _, letter = text.partition(" ")
        assert "e" not in text and float(number.replace(",", "")) * SCALES.get(letter, 1) == pytest.approx(
            value, rel=10 ** (1 - digits)
        )


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (0.84, "0.8 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3599.7, "1 h"), (7500, "2 h 5 min"),
     (86_399.8, "1 d"), (273_600, "3 d 4 h"), (3605, "1 h"), (math.inf, "inf s")],
)  # fmt: skip
def test_a_time_has_its_two_largest_units(seconds, shown):
    assert duration(seconds) == shown


@given(st.integers(60, 10**6))
def test_a_time_that_is_shown_can_be_read(seconds):
    assert quantity(duration(seconds), duration=True) == pytest.approx(seconds, rel=0.05)


def test_there_is_one_format_of_numbers_in_the_package():
    """A prefix or a unit of time is put beside a number in one file alone."""
    own = re.compile(
        r"""\.\d?[gf]\}\s?(?:[kMGTPE]?i?B|[kMGTPE]|s|min|h)\b|/ ?(?:1e[369]|1e1[258]|2 ?\*\* ?[234]0):|[/ ](?:60|3600):,?\.\d"""
    )
    package = Path(pretrain.__file__).parent
    wrong = [
        f"{path.relative_to(package)}:{number}: {line.strip()}"
        for path in package.rglob("*.py") if path.name != "quantities.py" and path.parts[-2:] != ("new", "plans.py")  # which writes what a recipe is to read
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if own.search(line)
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)
