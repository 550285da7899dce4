"""The dial: sizes in numbers, the law of loss, the choice for a budget, and `size: auto` in a recipe."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from pretrain import recipe as recipes
from pretrain.core.errors import PretrainError
from pretrain.core.quick.machine import Beside, efficiency, likely_beside, remembered_beside
from pretrain.core.quick.quantities import figure
from pretrain.dial import law as laws
from pretrain.dial import pace
from pretrain.dial.choose import LONGEST, Task, choose, optimizer_for
from pretrain.dial.law import Law, Rung, fit, unique_worth
from pretrain.dial.shapes import CAUSAL, Shape, depth_of, fields, shape_of, widths
from pretrain.optim.optimizers import adamw
from pretrain.stages._size import LAW, Settled

adamw_file = adamw.__file__

TRUE = Law(0.8, 60.0, 0.4, 60.0, 0.42, 0.5, {512: 2.1, 2048: 2.9, 8192: 3.6}, 1e12)


def rungs(noise: float = 0.0) -> list[Rung]:
    random = np.random.default_rng(0)
    sizes = itertools.product((40_000, 200_000, 900_000), (3e5, 1e6, 4e6), (512, 2048))
    return [
        Rung(body, vocabulary, seen, TRUE.bits(body, vocabulary, seen) * math.exp(random.normal(0, noise)), 6.0 * body)
        for body, seen, vocabulary in sizes
    ]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("width", [32, 96])
def test_a_shape_says_the_weights_and_the_flops_of_the_model_it_stands_for(family: str, width: int) -> None:
    import torch

    from pretrain.core.meter import count_flops
    from pretrain.core.models.families import new_model

    shape = shape_of(width, 500, gated=family != "gpt2")
    model = new_model(family, {"vocab_size": 500, **fields(shape, family, 64)}, task="causal").eval()
    embeddings = sum(
        p.numel() for n, p in model.named_parameters() if "wpe" in n or "bias" in n or "norm" in n or "ln_" in n
    )
    expected = shape.body + shape.vocabulary * shape.width
    assert sum(p.numel() for p in model.parameters()) - embeddings == expected
    tokens_BL = torch.randint(0, 500, (2, 64))

    def train() -> None:
        model(input_ids=tokens_BL).logits.float().logsumexp(-1).sum().backward()

    assert count_flops(train)[1] == pytest.approx(shape.flops(64) * 128, rel=0.02)


def test_widths_grow_by_less_than_half_and_hold_whole_heads() -> None:
    each = list(widths())
    assert all(1 < b / a <= 1.5 for a, b in itertools.pairwise(each))
    assert all(width % shape_of(width, 256).heads == 0 for width in each)
    assert [depth_of(width) for width in (64, 128, 256, 768)] == [2, 3, 5, 12]


def test_a_law_is_found_again_from_its_own_values() -> None:
    found = fit(rungs())
    for body, seen in ((20_000, 2e5), (3_000_000, 3e7)):
        assert found.bits(body, 1024, seen) == pytest.approx(TRUE.bits(body, 1024, seen), rel=0.01)


def test_the_interval_of_a_prediction_holds_the_truth_and_grows_with_the_distance() -> None:
    fitted = replace(fit(rungs(noise=0.004)), bytes_per_token=TRUE.bytes_per_token)
    near, far = fitted.predict(200_000, 2048, 2e6), fitted.predict(5_000_000, 2048, 1e8)
    for body, seen, prediction in ((200_000, 2e6, near), (5_000_000, 1e8, far)):
        assert prediction.low < TRUE.bits(body, 2048, seen) < prediction.high
    assert far.high / far.low > near.high / near.low


def test_a_few_runs_that_lie_beside_the_law_leave_its_floor_and_exponents_near_the_usual_ones() -> None:
    """A ladder's dozen runs once gave a floor of 0.3 and an exponent of 1.5, both at their bounds."""
    random = np.random.default_rng(3)
    true = Law(0.85, 11.5, 0.37, 30.0, 0.16, -0.67, {4096: 3.3, 16384: 3.9}, 1e12)
    for _ in range(5):
        sizes = itertools.product((26_624, 55_296, 100_352), (1.5e5, 4e5), (4096, 8192))
        few = [
            Rung(body, size, seen, true.bits(body, size, seen) * math.exp(random.normal(0, 0.015)), 1e11)
            for body, seen, size in sizes
        ]
        found = fit(few)
        assert 0.2 < found.alpha < 0.5
        assert 0.08 < found.beta < 0.32
        assert found.floor > laws.LEAST * 1.5
        assert (
            found.predict(55_296, 8192, 5e6).low < true.bits(55_296, 8192, 5e6) < found.predict(55_296, 8192, 5e6).high
        )


def test_runs_whose_loss_falls_ever_more_steeply_are_too_short_for_a_law_and_it_says_so() -> None:
    def ladder(*bits: float) -> Law:
        budgets = (1.6e10, 4.2e10, 1.25e11)
        runs = [
            Rung(body, 8192, flops / body, here * (1 + size / 100), flops)
            for size, body in enumerate((26_624, 55_296, 100_352))
            for flops, here in zip(budgets, bits, strict=True)
        ]
        return replace(fit(runs), bytes_per_token={8192: 3.6})

    short = ladder(2.555, 2.395, 2.175)  # measured: of eight times the FLOPs 1.96 was expected and 1.71 came
    assert "too short for a law: likely less" in short.doubt
    assert ladder(2.555, 2.395, 2.25).doubt == ""
    settled = Settled("model", Task(short), choose(Task(short, flops=1e12)), 1.0, "muon", "this corpus")
    assert not settled.certain and any("too short for a law" in line for line in settled.lines())


def test_a_law_is_not_asked_of_vocabularies_that_it_has_not_seen() -> None:
    longing = replace(TRUE, gamma=3.0, bytes_per_token={4096: 3.3, 8192: 3.6})  # the smaller the better, by far
    assert choose(Task(longing, flops=1e12)).shape.vocabulary == 4096
    assert choose(Task(longing, flops=1e12, unique=2e5)).shape.vocabulary < 4096, "the text is too little for these"
    assert choose(Task(replace(longing, gamma=-3.0), flops=1e12)).shape.vocabulary == 8192


def test_too_few_rungs_are_refused() -> None:
    with pytest.raises(PretrainError, match="rungs"):
        fit(rungs()[:5])


def test_text_read_again_counts_less_and_less() -> None:
    assert unique_worth(5e5, 1e6) == 5e5
    assert unique_worth(1e6, None) == 1e6
    worth = [unique_worth(passes * 1e6, 1e6) for passes in (1, 2, 4, 16, 1000)]
    assert worth == sorted(worth)
    assert worth[2] > 0.9 * 4e6  # four passes are nearly as good as new text (arXiv:2305.16264)
    assert worth[-1] < (1 + laws.REPEATS) * 1e6 * 1.001


def test_more_compute_means_more_weights_more_tokens_and_less_loss() -> None:
    choices = [choose(Task(TRUE, flops=flops)) for flops in (1e11, 1e12, 1e13)]
    for smaller, larger in itertools.pairwise(choices):
        assert smaller.shape.weights < larger.shape.weights
        assert smaller.tokens < larger.tokens
        assert smaller.prediction is not None and larger.prediction is not None
        assert smaller.prediction.bits > larger.prediction.bits


def test_no_other_size_is_expected_to_be_better() -> None:
    best = choose(Task(TRUE, flops=1e12))
    assert best.prediction is not None
    for width, vocabulary in itertools.product((32, 64, 128, 256), (512, 1024, 4096, 16384)):
        other = choose(Task(TRUE, flops=1e12, width=width, vocabulary=vocabulary))
        assert other.prediction is not None and other.prediction.bits >= best.prediction.bits


def test_no_vocabulary_is_chosen_beyond_those_that_the_law_has_seen() -> None:
    seen = replace(TRUE, gamma=-0.7, bytes_per_token={512: 2.1, 1024: 2.5})  # by which the larger is ever the better
    assert choose(Task(seen, flops=1e13)).shape.vocabulary == 1024
    assert choose(Task(seen, flops=1e13, vocabulary=8192)).shape.width > 32  # but the user's own is as good as any


def test_a_small_corpus_asks_for_a_smaller_model_and_vocabulary() -> None:
    endless, small = choose(Task(TRUE, flops=1e13)), choose(Task(TRUE, flops=1e13, unique=2e5))
    assert small.shape.vocabulary * 100 <= 2e5
    assert endless.prediction is not None and small.prediction is not None
    assert small.prediction.bits > endless.prediction.bits


def test_a_budget_of_tokens_gets_the_size_that_they_suit() -> None:
    by_compute = choose(Task(TRUE, flops=1e12))
    by_tokens = choose(Task(TRUE, tokens=by_compute.tokens))
    assert by_tokens.tokens == pytest.approx(by_compute.tokens)
    assert by_tokens.shape.width == pytest.approx(by_compute.shape.width, rel=0.51)


def test_a_budget_of_seconds_counts_what_a_step_takes_beside_its_products() -> None:
    slow, quick = (Task(TRUE, seconds=180, rate=1e11, width=width, vocabulary=2048) for width in (32, 256))
    for task in (slow, quick):
        assert choose(task).seconds == pytest.approx(180, rel=0.01)
    lost = [choose(task).flops / (180 * 1e11 * efficiency(task.width or 0)) for task in (slow, quick)]
    assert lost[0] < 0.75 and lost[1] > 0.9
    free = choose(Task(TRUE, seconds=180, rate=1e11))
    assert free.prediction is not None
    for width in (32, 64, 128):
        other = choose(Task(TRUE, seconds=180, rate=1e11, width=width)).prediction
        assert other is not None and other.bits >= free.prediction.bits


def test_logits_that_cost_seconds_make_a_smaller_vocabulary_the_choice() -> None:
    eager = replace(TRUE, gamma=-0.7)  # by which the larger is ever the better
    given = Task(eager, seconds=60, rate=1e11, width=64)
    free, dear = (choose(replace(given, beside=Beside(block=0.0, logit=logit))) for logit in (0.0, 1e-7))
    assert dear.shape.vocabulary < free.shape.vocabulary
    assert dear.seconds == pytest.approx(60, rel=0.01)
    products = dear.flops / (1e11 * efficiency(64))
    assert products + dear.tokens * dear.shape.vocabulary * 1e-7 == pytest.approx(60, rel=0.01)


def test_what_blocks_and_logits_take_is_told_by_the_steps_of_two_decoders(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(pace, "matrix_rate", lambda device: 1e11)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.5, 0.5))
    true, busy = Beside(block=5e-3, logit=3e-9), itertools.count()

    def step(shape, device):
        tokens = pace.ROWS * pace.LENGTH
        products = tokens * shape.flops(pace.LENGTH) / (1e11 * efficiency(pace.WIDTH))
        seconds = products + true.seconds(shape.depth, tokens * shape.vocabulary)
        return lambda: seconds * (10 if next(busy) % 5 == 0 else 1)  # when something else runs

    monkeypatch.setattr(pace, "_step", step)
    assert remembered_beside("cpu") is None and likely_beside() == Beside()
    measured = pace.measure(torch.device("cpu"))
    assert (measured.block, measured.logit) == (pytest.approx(5e-3), pytest.approx(3e-9))
    assert remembered_beside("cpu") == likely_beside() == measured
    true = Beside(block=5e-2, logit=3e-8)  # while something else runs all the time
    assert pace.measure(torch.device("cpu")) == likely_beside() == measured
    true = Beside(block=4e-3, logit=2e-9)
    assert pace.measure(torch.device("cpu")).block == likely_beside().block == pytest.approx(4e-3)
    true = Beside(block=1e-3, logit=1e-9)
    monkeypatch.setattr(os, "getloadavg", lambda: (999.0, 1.0, 1.0))
    assert pace.measure(torch.device("cpu")).block == pytest.approx(4e-3)  # not measured


def test_a_machines_pace_is_measured_without_a_trace_in_what_is_drawn_later(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.5, 0.5))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    measured = pace.measure(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert 0 <= measured.block < 1 and 0 <= measured.logit < 1e-5


def test_far_beyond_its_rungs_a_law_is_not_asked() -> None:
    choice = choose(Task(TRUE, flops=1e20))
    assert choice.prediction is None
    assert 10 < choice.tokens_per_weight < 40


RECIPE = {
    "name": "auto",
    "stages": [
        {"name": "corpus", "stage": "data", "sources": [{"stdlib": True, "limit": 60}]},
        {"name": "tokenizer", "stage": "tokenizer", "corpus": "corpus", "vocab_size": "auto"},
        {
            "name": "model", "stage": "train", "corpus": "corpus", "tokenizer": "tokenizer", "size": "auto",
            "model": {"family": "llama"}, "budget": {"flops": 2e9},
        },
    ],
}  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "auto.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def test_auto_says_every_number_and_keeps_what_the_user_has_written(written: Path, tmp_path: Path) -> None:
    checked = recipes.load(written, ["model.length=64", "model.optimizer={method: adamw, weight_decay: 0.2}"], tmp_path)
    entry = checked.raw["stages"][2]
    assert entry["length"] == 64 and entry["model"]["max_position_embeddings"] == 256, "room for a prompt"
    long = recipes.load(written, ["model.length=512"], tmp_path).raw["stages"][2]
    assert long["length"] == long["model"]["max_position_embeddings"] == 512, "no more than it is trained on"
    assert entry["optimizer"]["weight_decay"] == 0.2 and entry["optimizer"]["lr"] > 0
    assert isinstance(checked.raw["stages"][1]["vocab_size"], int)
    assert {"hidden_size", "num_hidden_layers", "initializer_range"} <= set(entry["model"])
    fixed = recipes.load(written, ["model.model.hidden_size=96", "tokenizer.vocab_size=300"], tmp_path)
    assert fixed.raw["stages"][2]["model"]["hidden_size"] == 96
    assert fixed.sizes[0].choice.shape.vocabulary == 300


def test_the_second_moment_remembers_as_many_tokens_whatever_the_batch() -> None:
    choice = replace(choose(Task(TRUE, flops=1e12)), length=1000)
    decays = {rows: optimizer_for("muon", replace(choice, batch_rows=rows))["beta2"] for rows in (1, 100, 1000)}
    assert decays[1] == LONGEST  # no longer than a short run is
    assert 100 * math.log(decays[1000]) / math.log(decays[100]) == pytest.approx(1000, rel=0.01)
    assert decays[1000] == pytest.approx(0.5**0.1, abs=1e-3)  # a tenth of the half-life
    assert set(optimizer_for("lion", choice)) == {"lr"}  # whose momentum is no second moment
    assert optimizer_for("of_mine", choice) == {}


@pytest.mark.parametrize("asked", ["soap", "{method: lion}", "{method: schedule_free, beta1: 0.8}"])
def test_an_optimiser_whose_rate_was_measured_gets_a_rate_for_the_size(
    written: Path, tmp_path: Path, asked: str
) -> None:
    sized = [
        recipes.load(written, [f"model.optimizer={asked}", f"model.budget.flops={flops}"], tmp_path).sizes[0]
        for flops in (1e10, 1e14)
    ]
    assert sized[0].lr and sized[1].lr and sized[0].lr > 2 * sized[1].lr
    assert not sized[0].warnings()


@pytest.mark.usefixtures("clean")
def test_a_rate_that_nobody_has_tuned_is_told_before_the_run(written: Path, tmp_path: Path) -> None:
    from pretrain.cli import app

    folder = tmp_path / "mine"
    folder.mkdir()
    source = Path(adamw_file).read_text().replace("class AdamW(", "class Mine(")
    (folder / "mine_w.py").write_text(source)
    told = "the rate of mine_w is not tuned"
    for command in ("plan", "run"):
        more = ["--dry-run"] if command == "run" else []
        words = ["--methods", str(folder), command, str(written), "--set", "model.optimizer=mine_w", *more]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        assert told in result.output
        again = CliRunner().invoke(app, [*words, "--set", "model.optimizer={method: mine_w, lr: 0.01}"])
        assert again.exit_code == 0 and told not in again.output


def test_a_field_of_the_optimiser_keeps_what_else_the_dial_has_chosen(written: Path, tmp_path: Path) -> None:
    usual = recipes.load(written, [], tmp_path).sizes[0].optimizer
    assert isinstance(usual, dict) and set(usual) == {"method", "lr", "adamw_lr", "beta2"}
    for field, value in (("lr", 0.003), ("adamw_lr", 0.5), ("beta2", 0.9), ("weight_decay", 0.2)):
        changed = recipes.load(written, [f"model.optimizer={{{field}: {value}}}"], tmp_path).sizes[0].optimizer
        assert changed == usual | {field: value}


def test_the_expected_loss_is_of_the_optimiser_that_the_law_was_fitted_with(written: Path, tmp_path: Path) -> None:
    def expected(optimizer: str) -> str:
        (chosen,) = recipes.load(written, [f"model.optimizer={optimizer}"], tmp_path).sizes
        return next(line for line in chosen.lines() if line.startswith("expected"))

    assert expected("muon").endswith("by a law of runs with muon")
    assert expected("soap").endswith("by a law of runs with muon; with soap it was not measured")


@pytest.mark.parametrize("unique", [None, 1e5])
@pytest.mark.parametrize("vocabulary", [None, 300, 50_000])
def test_the_expected_loss_lies_within_its_interval_and_no_size_named_beside_it_is_better(
    unique: float | None, vocabulary: int | None
) -> None:
    law = laws.load(LAW)
    for flops in (1e8, 1e10, 1e12, 1e14, law.largest * 90):
        task = Task(law, flops=flops, unique=unique, vocabulary=vocabulary)
        choice = choose(task)
        assert choice.prediction is not None
        assert choice.prediction.low < choice.prediction.bits < choice.prediction.high
        for what, bits in Settled("model", task, choice, None, "muon").others():
            assert bits >= 0.995 * choice.prediction.bits or vocabulary, (flops, what)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_a_step_moves_what_a_matrix_answers_as_much_at_any_width(width: int) -> None:
    import torch

    from pretrain.core.models.parameters import described
    from pretrain.optim.optimizers.muon import Muon

    choice = choose(Task(TRUE, flops=1e12))
    choice = replace(choice, shape=shape_of(width, choice.shape.vocabulary))
    torch.manual_seed(0)
    matrix = torch.nn.Linear(width, width, bias=False)
    before_EE, x_BE = matrix.weight.detach().clone(), torch.randn(100, width)
    matrix.weight.grad = torch.randn(width, width)
    Muon(**optimizer_for("muon", choice)).build(described(torch.nn.ModuleDict({"block": matrix}))).step()
    moved = (x_BE @ (matrix.weight.detach() - before_EE).T).square().mean().sqrt()
    # 0.2 √width times an orthogonal matrix, at a rate that falls by 1 / √width: 0.2 √64 times the rate at 64
    expected = 0.2 * 8 * optimizer_for("muon", replace(choice, shape=shape_of(64, 512)))["lr"]
    assert float(moved) == pytest.approx(expected, rel=0.2)


def test_a_sized_training_begins_with_short_rows_unless_they_are_too_short_or_the_recipe_says_its_policies(
    written: Path, tmp_path: Path
) -> None:
    def policies(*changes: str) -> list[dict[str, object]]:
        return recipes.load(written, list(changes), tmp_path).raw["stages"][2].get("policies", [])

    assert [policy["method"] for policy in policies()] == ["sequence_length_warmup"]
    assert [policy["method"] for policy in policies("model.length=128")] == ["sequence_length_warmup"]
    assert policies("model.length=64") == policies("model.length=250") == policies("model.objective=prefix_lm") == []
    assert policies("model.policies=[ema]") == ["ema"]


def test_a_sized_model_is_plain_and_its_blocks_begin_as_nothing(written: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import pretrain
    from pretrain.core.models.families import new_model
    from pretrain.surgery.architecture.zero_init import ZeroInit

    checked = recipes.load(written, [], tmp_path)
    assert checked.raw["stages"][2]["surgeries"] == [{"method": "zero_init"}]
    assert recipes.load(written, ["model.surgeries=[]"], tmp_path).raw["stages"][2]["surgeries"] == []
    for family in CAUSAL:
        shape = shape_of(32, 64, gated=family != "gpt2")
        new = ZeroInit()(new_model(family, {"vocab_size": 64, **fields(shape, family, 32)}, task="causal"))
        assert not any(p.any() for n, p in new.named_parameters() if n.endswith(("o_proj.weight", "c_proj.weight")))
    pretrain.run(str(written), overrides=["model.length=32", "model.budget={steps: 2}"], output=tmp_path / "run")
    folder = tmp_path / "run" / "model" / "checkpoint"
    plain, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert type(plain).__name__ == "LlamaForCausalLM"


def test_what_auto_has_written_out_is_a_recipe_of_the_same_stages(written: Path, tmp_path: Path) -> None:
    from pretrain.identity import plan

    first = recipes.load(written, (), tmp_path)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(first.raw))
    second = recipes.load(again, (), tmp_path)
    assert [item.address for item in plan(first)] == [item.address for item in plan(second)]


@pytest.mark.parametrize("budget", ["{steps: 500}", "{epochs: 1}", "{tokens: 1M}", "{seconds: 60}"])
def test_a_budget_may_be_of_any_unit(written: Path, tmp_path: Path, budget: str) -> None:
    checked = recipes.load(written, [f"model.budget={budget}"], tmp_path)
    assert checked.sizes[0].choice.tokens > 1e4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("model.size=large", "accepted: auto"),
        ("model.model={family: t5}", "accepted: model: {family: one of llama"),
        ("model.budget={years: 10}", "years"),
        ("corpus.sources=[{files: FOLDER/few.txt}]", "about 9.6 B of training text, too little to choose a model by; "),
        ("corpus.sources=[{files: FOLDER/none.txt}]", "size 'auto': about 0 B of training text"),
        ("model.model.hidden_size=0", "hidden_size 0: accepted: a whole number, 1 or more"),
        ("model.budget={tokens: 10, steps: 3}", "accepted: exactly one of tokens, steps, flops, seconds, epochs"),
        ("model.budget={}", "accepted: exactly one of tokens, steps, flops, seconds, epochs"),
        ("model.size={law: nowhere.json}", "nowhere.json"),
        ("model.model.hidden_size=wide", "accepted: a whole number"),
    ],
)
def test_what_the_dial_cannot_do_is_one_line(written: Path, tmp_path: Path, change: str, told: str) -> None:
    (tmp_path / "few.txt").write_text("ten bytes.")
    (tmp_path / "none.txt").touch()
    with pytest.raises(PretrainError) as caught:
        recipes.load(written, [change.replace("FOLDER", str(tmp_path))], tmp_path)
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("  - {stage: data, name: corpus, sources: [nowhere/at/all]}", "nowhere/at/all"),
        ("  - {stage: data, name: corpus, sources: [{files: 'no*.txt'}]}", "no*.txt"),
        ("  - {stage: tokenizer, name: other, corpus: corpus, vocab_size: some}", "vocab_size 'some'"),
    ],
)
def test_what_hinders_sizing_is_blamed_on_its_own_line(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "a.txt").write_text("some words " * 50)
    data = line if "data" in line else f"  - {{stage: data, name: corpus, sources: [{tmp_path / 'a.txt'}]}}"
    made = line if "vocab" in line else "  - {stage: tokenizer, name: other, corpus: corpus, vocab_size: auto}"
    model = "  - {stage: train, name: m, corpus: corpus, tokenizer: other, size: auto,\n     model: {family: llama}, "
    (tmp_path / "r.yaml").write_text(f"stages:\n{data}\n{made}\n{model}budget: {{flops: 1e9}}}}\n")
    with pytest.raises(PretrainError) as caught:
        recipes.load(tmp_path / "r.yaml", [], tmp_path)
    wrong = 2 if "data" in line else 3
    assert str(caught.value).startswith(f"{tmp_path / 'r.yaml'}:{wrong}: ") and told in str(caught.value)


def test_a_misspelt_budget_is_named_where_a_size_is_chosen_for_it(tmp_path: Path) -> None:
    text = "stages:\n  - {stage: train, name: m, corpus: c, size: auto, model: {family: llama},\n     bugdet: {flops: 1e9}}\n"
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(PretrainError, match=r"r.yaml:3: unknown field \(did you mean 'budget'\?\); accepted: name"):
        recipes.load(tmp_path / "r.yaml", [], tmp_path)


def test_why_a_vocabulary_is_that_large_is_told_where_the_dial_chose_it(written: Path, tmp_path: Path) -> None:
    chosen = recipes.load(written, [], tmp_path).sizes[0]
    entries = f"vocabulary {chosen.choice.shape.vocabulary:,}: of powers of two the best by the law"
    assert any(line.startswith(entries) and "bytes of text an entry are enough for" in line for line in chosen.lines())
    fixed = recipes.load(written, ["tokenizer.vocab_size=2048"], tmp_path).sizes[0]
    assert not any("by the law, whose runs" in line for line in fixed.lines())


def test_a_tokenizer_of_bytes_is_sized_for_its_entries(written: Path, tmp_path: Path) -> None:
    bytes_ = "stages.1={stage: tokenizer, name: tokenizer, corpus: corpus, algorithm: bytes}"
    assert recipes.load(written, [bytes_], tmp_path).sizes[0].choice.shape.vocabulary == 261


def test_plan_prints_what_is_chosen_and_what_is_expected(written: Path, tmp_path: Path) -> None:
    from pretrain.cli import app

    result = CliRunner().invoke(app, ["plan", str(written), "--budget", "flops=1e12", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "width" in result.output and "bits per byte" in result.output and "twice the width" in result.output


def test_a_plan_and_a_dry_run_say_the_same_of_passes(written: Path, tmp_path: Path) -> None:
    from pretrain.forecast import forecast
    from pretrain.identity import plan

    recipe = recipes.load(written, [], tmp_path)
    estimate = next(e.estimate for e in forecast(plan(recipe)) if e.item.stage.name == "model")
    assert estimate.passes is not None
    assert f"{figure(estimate.passes, 2)} passes)" in recipe.sizes[0].lines(estimate)[0]


def test_a_plan_takes_a_time_with_its_unit_as_its_budget(written: Path, tmp_path: Path) -> None:
    from pretrain.cli import app

    def printed(budget: str) -> str:
        words = ["plan", str(written), "--budget", budget, "--output", str(tmp_path)]
        return CliRunner().invoke(app, words, catch_exceptions=False).output

    assert printed("3min") == printed("seconds=180") != printed("30min")
    for wrong in ("100M", "3 parsecs", "years=3", "flops="):
        with pytest.raises(PretrainError, match="--budget .*: accepted: a time"):
            CliRunner().invoke(app, ["plan", str(written), "--budget", wrong], catch_exceptions=False)


def test_the_law_in_the_package_has_its_runs_and_fits_them() -> None:
    law = laws.load(LAW)
    assert len(law.rungs) > 12
    assert all(law.bits(r.body, r.vocabulary, r.bytes) == pytest.approx(r.bits, rel=0.05) for r in law.rungs)


@pytest.mark.processes
def test_a_ladder_fits_a_law_that_the_dial_goes_by(written: Path, tmp_path: Path) -> None:
    from pretrain.experiments.ladder import climb

    recipe = recipes.load(written, ["model.length=32", "model.evaluate_tokens=2000"], tmp_path / "run")
    told: list[str] = []
    law, settled = climb(recipe, told.append)
    assert len(told) - 1 == len(law.rungs) >= 8
    share = float(told[0].partition(" FLOPs, ")[2].partition("%")[0]) / 100  # what it is to take, before it begins
    assert share * recipe.sizes[0].choice.flops == pytest.approx(sum(rung.flops for rung in law.rungs), rel=0.15)
    again: list[str] = []
    climb(recipe, again.append)
    assert again[0].endswith("all are made") and again[1:] == told[1:]
    assert settled.task.law is law
    path = tmp_path / "run" / "ladder" / "law.json"
    assert laws.load(path) == law
    by_it = recipes.load(written, [f"model.size={{law: {path}}}"], tmp_path / "run")
    assert by_it.sizes[0].task.law == law


def test_a_shape_of_given_parts_counts_them() -> None:
    shape = Shape(width=8, depth=2, heads=2, intermediate=16, vocabulary=10)
    assert shape.body == 2 * (4 * 64 + 3 * 8 * 16)
    assert shape.weights == shape.body + 5 * 8 + 80
