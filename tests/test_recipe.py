"""Recipes: every mistake is one line with its place; overrides and bases do what they say."""

from __future__ import annotations

import pytest

from pretrain.core.errors import PretrainError
from pretrain.recipe import load

GOOD = """\
name: small
seed: 3
stages:
  - name: corpus
    stage: data
    sources: [stdlib]
  - stage: tokenizer
    corpus: corpus
    vocab_size: 512
  - name: model
    stage: train
    corpus: corpus
    tokenizer: tokenizer
    model: {family: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2}
    optimizer: {method: adamw, lr: 1e-3}
    budget: {tokens: 1e4}
"""


def recipe(tmp_path, text=GOOD, *overrides):
    (tmp_path / "r.yaml").write_text(text)
    return load(tmp_path / "r.yaml", overrides)


def test_a_good_recipe_is_read_with_defaults_and_methods(tmp_path):
    found = recipe(tmp_path)
    assert [s.name for s in found.stages] == ["corpus", "tokenizer", "model"] and found.seed == 3
    model = found.stages[2]
    assert model.optimizer.lr == 1e-3 and model.optimizer.beta2 == 0.95
    assert model.objective.name == "causal_lm" and model.schedule.name == "cosine"
    assert model.budget.tokens == 10000 and model.methods() == ["adamw", "causal_lm", "cosine"]
    assert model.references() == {"corpus": "corpus", "tokenizer": "tokenizer"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr: 1e-3", "lrr: 1e-3", r"r.yaml:15: model.optimizer: unknown field 'lrr' of optimiser 'adamw' \(did you mean 'lr'\?\); accepted: lr, weight_decay"),
        ("lr: 1e-3", "lr: fast", r"r.yaml:15: model.optimizer: optimiser 'adamw': lr: 'fast': .*number"),
        ("method: adamw", "method: adamv", r"r.yaml:15: model.optimizer: unknown optimiser 'adamv' \(did you mean 'adamw'\?\)"),
        ("method: adamw", "method: cosine", r"method 'cosine' is of kind 'schedule', not 'optimiser'"),
        ("    budget:", "    bugdet:", r"r.yaml:16: model.bugdet: unknown field \(did you mean 'budget'\?\); accepted: .*corpus|model.budget: missing"),
        ("vocab_size: 512", "vocab_size: many", r"r.yaml:9: tokenizer.vocab_size: 'many': .*integer"),
        ("tokens: 1e4", "tokens: 1e4, steps: 2", r"r.yaml:16: model.budget: budget: budget .*exactly one of tokens, steps, flops, seconds"),
        ("corpus: corpus\n    tok", "corpus: korpus\n    tok", r"r.yaml:12: model.corpus: 'korpus' \(did you mean 'corpus'\?\); accepted: an earlier stage \(corpus, tokenizer\)"),
        ("stage: tokenizer", "stage: tokeniser", r"r.yaml:7: stages.1.stage: unknown stage 'tokeniser' \(did you mean 'tokenizer'\?\)"),
        ("name: model", "name: corpus", r"two stages are named 'corpus'"),
        ("hidden_size: 32", "hiden_size: 32", r"r.yaml:10: model: unknown field 'hiden_size' of model family 'llama' \(did you mean 'hidden_size'\?\)"),
        ("[stdlib]", "[{flies: x}]", r"r.yaml:6: corpus.sources.0: .* is no source; accepted: a path"),
        ("[stdlib]", "[{files: x, suffix: y}]", r"unknown field 'suffix' of source 'files' \(did you mean 'suffixes'\?\)"),
        ("seed: 3", "seed: -3", r"r.yaml:2: seed -3: accepted: a whole number of 0 or more"),
        ("seed: 3", "sede: 3", r"r.yaml:2: unknown field 'sede' \(did you mean 'seed'\?\)"),
        ("seed: 3", "seed: 3\nseed: 4", r"r.yaml:3: 'seed' is given twice"),
        ("seed: 3", "seed: [3", r"r.yaml:\d+: not valid YAML"),
        ("[stdlib]", "[]", r"r.yaml:6: corpus.sources: \[\]: .*at least 1"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_line_that_names_its_place(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(PretrainError, match=message) as caught:
        recipe(tmp_path, GOOD.replace(old, new, 1))
    assert "\n" not in str(caught.value)


def test_overrides_reach_into_stages_and_methods(tmp_path):
    found = recipe(
        tmp_path,
        GOOD,
        "model.optimizer.lr=3e-4",
        "model.schedule=wsd",
        "stages.model.schedule.final=0.2",
        "model.budget.steps=7",
        "seed=9",
        "stages.1.vocab_size=600",
    )
    model = found.stages[2]
    assert model.optimizer.lr == 3e-4 and model.schedule.name == "wsd" and model.schedule.final == 0.2
    assert (
        model.budget.steps == 7
        and model.budget.tokens is None
        and found.seed == 9
        and found.stages[1].vocab_size == 600
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.lrr=1", "unknown field"),
        ("modle.length=4", r"no stage 'modle' \(did you mean 'model'\?\)"),
        ("length", "accepted: path.to.field=value"),
    ],
)
def test_a_wrong_override_is_named(tmp_path, override, message):
    with pytest.raises(PretrainError, match=message):
        recipe(tmp_path, GOOD, override)


def test_a_base_is_taken_over_and_changed(tmp_path):
    (tmp_path / "base.yaml").write_text(GOOD)
    found = recipe(
        tmp_path, "base: base.yaml\nname: other\nset:\n  model.optimizer.lr: 5e-4\n  tokenizer.vocab_size: 300\n"
    )
    assert found.name == "other" and found.seed == 3
    assert found.stages[2].optimizer.lr == 5e-4 and found.stages[1].vocab_size == 300
    with pytest.raises(PretrainError, match="leads back to itself"):
        recipe(tmp_path, "base: r.yaml\n")


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(PretrainError, match=r"recipe .*none.yaml cannot be read: No such file"):
        load(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["quickstart"])
def test_the_recipes_that_ship_are_good(name):
    from pathlib import Path

    assert load(Path(__file__).parent.parent / "recipes" / f"{name}.yaml").stages


def test_an_override_changes_one_stage_where_yaml_shares_a_value(tmp_path):
    shared = (
        GOOD.replace("optimizer: {", "optimizer: &o {")
        + "  - {stage: train, name: more, corpus: corpus, init: model, optimizer: *o, budget: {steps: 1}}\n"
    )
    found = recipe(tmp_path, shared, "model.optimizer.lr=0.5")
    assert found.stages[2].optimizer.lr == 0.5 and found.stages[3].optimizer.lr == 1e-3
