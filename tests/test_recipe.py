"""Recipes: every mistake is one line with its place; overrides and bases do what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.core.quick.hub import offline
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
PLAIN = GOOD.replace("    optimizer: {method: adamw, lr: 1e-3}\n", "")


def recipe(tmp_path, text=GOOD, *overrides):
    (tmp_path / "r.yaml").write_text(text)
    return load(tmp_path / "r.yaml", overrides)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_split_that_is_to_be_empty_is_no_split_to_measure_on(tmp_path, split):
    text = GOOD + f"  - {{stage: evaluate, checkpoint: model, corpus: corpus, split: {split}}}\n"
    recipe(tmp_path, text)
    with pytest.raises(
        PretrainError, match=rf"evaluate.corpus: corpus 'corpus' has no {split} documents \({split}: 0\)"
    ):
        recipe(tmp_path, text, f"corpus.{split}=0")


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
        ("vocab_size: 512", "vocab_size: many", r"r.yaml:9: tokenizer.vocab_size: 'many': accepted: a whole number"),
        ("vocab_size: 512", "vocab_size: 100", r"r.yaml:7: tokenizer: vocab_size 100: accepted: 258 or more"),
        ("vocab_size: 512", "vocab_size: 266\n    sentinels: 9", r"vocab_size 266: accepted: 267 or more"),
        ("sources: [stdlib]", "sources: [stdlib]\n    validation: 0.6\n    test: 0.5", r"corpus: validation 0.6 and test 0.5 leave nothing to train on; accepted: shares"),
        ("    budget:", "    evaluate_every: 1.5\n    budget:", r"r.yaml:16: model.evaluate_every: 1.5: accepted: a whole number, or above 0, below 1$"),
        ("    budget:", "    batch_rows: 8\n    micro_rows: 3\n    budget:", r"batch_rows 8: accepted: a multiple of micro_rows \(3\)"),
        ("tokens: 1e4", "tokens: 1e4, steps: 2", r"r.yaml:16: model.budget: budget \{tokens 10000.0, steps 2.0\}: accepted: exactly one of tokens, steps, flops, seconds"),
        ("corpus: corpus\n    tok", "corpus: korpus\n    tok", r"r.yaml:12: model.corpus: 'korpus' \(did you mean 'corpus'\?\); accepted: an earlier stage \(corpus, tokenizer\)"),
        ("stage: tokenizer", "stage: tokeniser", r"r.yaml:7: (stages.1|[a-z]+).stage: unknown stage 'tokeniser' \(did you mean 'tokenizer'\?\)"),
        ("name: model", "name: corpus", r"two stages are named 'corpus'"),
        ("hidden_size: 32", "hiden_size: 32", r"r.yaml:14: model.model.hiden_size: unknown field 'hiden_size' of model family 'llama' \(did you mean 'hidden_size'\?\)"),
        ("[stdlib]", "[{flies: x}]", r"r.yaml:6: corpus.sources.0: .* is no source \(did you mean 'files'\?\); accepted: a path"),
        ("[stdlib]", "[{files: x, suffix: y}]", r"unknown field 'suffix' of source 'files' \(did you mean 'suffixes'\?\)"),
        ("seed: 3", "seed: -3", r"r.yaml:2: seed -3: accepted: a whole number of 0 or more"),
        ("seed: 3", "sede: 3", r"r.yaml:2: unknown field 'sede' \(did you mean 'seed'\?\)"),
        ("seed: 3", "seed: 3\nseed: 4", r"r.yaml:3: 'seed' is given twice"),
        ("seed: 3", "seed: [3", r"r.yaml:\d+: not valid YAML"),
        ("seed: 3", "seed: 3\nset: 5", r"r.yaml:3: set 5: accepted: a mapping from STAGE.field to a value"),
        ("seed: 3", "seed: 3\nset: {corpus.sources.5: a}", r"r.yaml:3: set 'corpus.sources.5': '5' of a list; accepted: a number from 0 to 0"),
        ("seed: 3", "seed: 3\nset: {model.length: -4}", r"r.yaml:3: model.length: -4: accepted: 2 or more"),
        ("name: small", "name: 5", r"r.yaml:1: name 5: accepted: letters"),
        ("name: small", "output: 5", r"r.yaml:1: output 5: accepted: a folder's path"),
        ("name: small", "? [a, b]\n: 5", r"r.yaml:1: a key that is a list or a mapping; accepted: a word"),
        ("name: small", "5: small", r"r.yaml:1: unknown field 5; accepted: name"),
        ("stage: data", "stage: data\n    7: x", r"r.yaml:6: corpus: field 7: accepted: a word"),
        ("stage: data", "stage: [data]", r"r.yaml:5: (stages.0|[a-z]+).stage: unknown stage \['data'\]"),
        ("name: corpus", "name: 7", r"r.yaml:4: stages.0.name 7: accepted: .*as text"),
        ("name: corpus", "name: train-2ff3c6929016", r"r.yaml:4: stages.0.name 'train-2ff3c6929016': a run has a folder"),
        ("name: corpus", "name: ladder", r"r.yaml:4: stages.0.name 'ladder': a run has a folder of such a name; accepted"),
        ("[stdlib]", "&s [*s]", r"r.yaml:6: stages.0.sources.0 holds itself"),
        ("model: {family", "model: &m {x: *m, family", r"r.yaml:14: stages.2.model.x holds itself"),
        ("lr: 1e-3", "lr: -1", r"r.yaml:15: model.optimizer: optimiser 'adamw': lr: -1: accepted: 0 or more"),
        ("lr: 1e-3", "lr: .nan", r"r.yaml:15: model.optimizer: optimiser 'adamw': lr: nan: accepted: a finite number"),
        ("lr: 1e-3", "lr: .inf", r"lr inf: accepted: a finite number"),
        ("lr: 1e-3", "beta2: 1.0", r"beta2: 1.0: accepted: from 0 to below 1"),
        ("lr: 1e-3", "beta1: -0.1", r"beta1: -0.1: accepted: from 0 to below 1"),
        ("lr: 1e-3", "eps: 0", r"eps: 0: accepted: above 0"),
        ("lr: 1e-3", "weight_decay: -0.1", r"weight_decay: -0.1: accepted: 0 or more"),
        ("tokens: 1e4", "steps: 1:30", r"r.yaml:16: model.budget: budget: steps: '1:30': accepted: "),
        ("tokens: 1e4", "tokens: .nan", r"budget: tokens: nan: accepted: a finite number"),
        ("vocab_size: 512", "vocab_size: 512\n    seed: -1", r"r.yaml:10: tokenizer.seed: -1"),
        ("[stdlib]", "[{stdlib: true, limit: 0}]", r"r.yaml:6: corpus.sources.0: source 'stdlib': limit: 0: accepted: 1 or more, or null"),
        ("[stdlib]", "[]", r"r.yaml:6: corpus.sources: \[\]: accepted: at least one"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_line_that_names_its_place(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(PretrainError, match=message) as caught:
        recipe(tmp_path, GOOD.replace(old, new, 1))
    assert "\n" not in str(caught.value)


REFERRING = {  # a field of each stage that names another
    "tokenizer": "vocab_size: 512\n    corpus: below",
    "train": "corpus: above\n    tokenizer: below\n    model: {family: llama}\n    budget: {steps: 1}",
    "evaluate": "checkpoint: below\n    corpus: above",
    "decode": "checkpoint: below\n    prompts: [a]",
    "surgery": "checkpoint: below\n    surgeries: [merge_adapters]",
}


@pytest.mark.parametrize("kind", REFERRING)
def test_a_reference_to_a_stage_further_down_or_to_itself_says_so(tmp_path, kind):
    text = "stages:\n  - name: above\n    stage: data\n    sources: [stdlib]\n"
    text += f"  - name: own\n    stage: {kind}\n    {REFERRING[kind]}\n"
    below = "  - name: below\n    stage: data\n    sources: [stdlib]\n"
    for stages, name, why in ((below, "below", "a stage that stands below"), ("", "own", "this stage itself")):
        with (
            offline(),
            pytest.raises(PretrainError, match=rf"own\.\w+: '{name}' is {why}.*; accepted: .*above") as caught,
        ):
            recipe(tmp_path, text.replace("below", name) + stages)
        assert "\n" not in str(caught.value) and "fetched" not in str(caught.value)


AUTO = """
stages:
  - {{name: text, stage: data, sources: [{text}]}}
  - {{name: more, stage: data, corpus: text, sources: ["*.txt"]{more}}}
  - {{name: own, stage: tokenizer, corpus: text}}
  - {{name: model, stage: train, corpus: {corpus}, tokenizer: own, size: auto, model: {{family: llama}}, budget: {{epochs: 2}}}}
  - {{name: later, stage: data, sources: ["*.txt"]}}
"""


def test_a_size_for_passes_says_what_of_the_text_is_not_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("once upon a time\n\n" * 4000)

    def sized(text="a.txt", more="", corpus="more"):
        (model,) = recipe(tmp_path, AUTO.format(text=text, more=more, corpus=corpus)).sizes
        return model

    with pytest.raises(PretrainError, match="model.corpus: 'later' is a stage that stands below"):
        sized(corpus="later")
    with pytest.raises(PretrainError, match="how much text 'more' holds is not known before it is made.*accepted"):
        sized(text="{package: {pypi: six==1.16.0}, files: '*.py'}")
    with pytest.raises(PretrainError, match=r"model.corpus: 'mroe' \(did you mean 'more'\?\)"):
        sized(corpus="mroe")
    twice, once = sized(), sized(corpus="text")
    assert twice.task.unique == pytest.approx(2 * once.task.unique) and not [*twice.warnings(), *once.warnings()]
    (line,) = sized(more=", operations: [gopher_quality]").warnings()
    assert "note:" in line and "gopher_quality will leave is not known" in line


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
        ("corpus.sources.5=a", r"--set 'corpus.sources.5': '5' of a list; accepted: a number from 0 to 0"),
        ("corpus.sources.x.y=a", r"--set 'corpus.sources.x.y': 'x' of a list"),
        ("corpus.validation.x.y=a", r"--set 'corpus.validation.x.y': 'y' is asked of|no fields|corpus.validation"),
        ("model.length.x=a", r"model.length"),
        ("stages=3", r"--set stages=3: stages 3: accepted: a list of at least one stage"),
        ("stages.0=3", r"--set stages.0=3: stages.0: accepted: a mapping with stage"),
        ("name=5", r"--set name=5: name 5: accepted: letters"),
        ("output=5", r"--set output=5: output 5: accepted: a folder's path"),
        ("set=5", r"--set 'set': accepted: one of name, seed, output, methods, stages, or STAGE.field"),
        ("model.optimizer.lr=-1", r"--set model.optimizer.lr=-1: model.optimizer: .*lr: -1"),
        ("corpus.sources=&a [*a]", r"--set .*holds itself"),
        ("model.model=[5", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_named(tmp_path, override, message):
    with pytest.raises(PretrainError, match=message):
        recipe(tmp_path, GOOD, override)


def test_fields_without_a_method_are_those_of_the_default_one(tmp_path):
    plain = recipe(tmp_path, PLAIN)
    found = recipe(tmp_path, PLAIN, "model.optimizer.lr=1e-4", "model.schedule.warmup=0.3").stages[2]
    assert found.optimizer == replace(plain.stages[2].optimizer, lr=1e-4) and found.optimizer.name == "adamw"
    assert found.schedule == replace(plain.stages[2].schedule, warmup=0.3) and found.schedule.name == "cosine"
    written = recipe(tmp_path, PLAIN + "    optimizer: {lr: 100}\n").stages[2]
    assert written.optimizer == replace(plain.stages[2].optimizer, lr=100)
    with pytest.raises(PretrainError, match=r"unknown field 'lrr' of optimiser 'adamw'"):
        recipe(tmp_path, PLAIN, "model.optimizer.lrr=1e-4")


def test_fields_without_a_method_inside_a_method_are_those_of_the_default_one():
    held = method_class("model_soup")(corpus="x", evaluation={"length": 3}).held()["evaluation"]
    assert held == method_class("held_out")(length=3)


def test_the_address_of_a_stage_is_the_same_however_its_default_is_said(tmp_path):
    plain = recipe(tmp_path, PLAIN).stages[2].config()
    assert recipe(tmp_path, PLAIN, f"model.optimizer.lr={plain['optimizer']['lr']}").stages[2].config() == plain


def test_a_base_is_taken_over_and_changed(tmp_path):
    (tmp_path / "base.yaml").write_text(GOOD)
    found = recipe(
        tmp_path, "base: base.yaml\nname: other\nset:\n  model.optimizer.lr: 5e-4\n  tokenizer.vocab_size: 300\n"
    )
    assert found.name == "other" and found.seed == 3
    assert found.stages[2].optimizer.lr == 5e-4 and found.stages[1].vocab_size == 300
    with pytest.raises(PretrainError, match="leads back to itself"):
        recipe(tmp_path, "base: r.yaml\n")


def test_a_mistake_in_a_base_names_that_file_and_its_line(tmp_path):
    (tmp_path / "base.yaml").write_text(GOOD.replace("lr: 1e-3", "lr: fast"))
    with pytest.raises(PretrainError, match=r"base.yaml:15: model.optimizer: .*'fast'"):
        recipe(tmp_path, "# one\n# two\nbase: base.yaml\nname: other\n")
    with pytest.raises(PretrainError, match=r"r.yaml:3: model.optimizer: .*'slow'"):
        recipe(tmp_path, "base: base.yaml\nset:\n  model.optimizer.lr: slow\n")
    with pytest.raises(PretrainError, match=r"r.yaml:2: name 5"):
        recipe(tmp_path, "base: base.yaml\nname: 5\n")
    with pytest.raises(PretrainError, match=r"r.yaml:1: base 'none.yaml': there is no .*none.yaml"):
        recipe(tmp_path, "base: none.yaml\n")
    (tmp_path / "base.yaml").write_text(GOOD + "x: 1\n")
    with pytest.raises(PretrainError, match=r"base.yaml:17: unknown field 'x'"):
        recipe(tmp_path, "base: base.yaml\n")


def test_a_source_that_is_not_there_is_named_with_its_line_before_anything_runs(tmp_path):
    from pretrain import engine

    text = GOOD.replace("[stdlib]", f"\n      - stdlib\n      - {{files: {tmp_path / 'none'}}}")
    with pytest.raises(PretrainError, match=r"r.yaml:8: corpus.sources.1: no files at"):
        engine.plan(recipe(tmp_path, text))
    text = GOOD.replace("[stdlib]", "[{packages: [numpi]}]")
    with pytest.raises(PretrainError, match=r"r.yaml:6: corpus.sources.0: package 'numpi' \(did you mean 'numpy'\?\)"):
        engine.run(recipe(tmp_path, text, f"output={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(PretrainError, match=r"recipe .*none.yaml cannot be read: no such file"):
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


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), True, 0, -1])
def test_a_weight_of_an_objective_is_a_finite_number_above_0(weight):
    from pretrain.stages.train import build_weighted

    with pytest.raises(ValueError, match="accepted: a number above 0"):
        build_weighted({"method": "causal_lm", "weight": weight})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.model.hidden_size=0",
            r"^--set model.model.hidden_size=0: model.model.hidden_size: model family 'llama': hidden_size 0: accepted: 1 or more",
        ),
        (
            "model.model.hidden_size=31",
            r"^--set model.model.hidden_size=31: .*hidden_size 31: accepted: a multiple of num_attention_heads 2",
        ),
        ("model.model.hidden_act=gelo", r"^--set .*hidden_act 'gelo' \(did you mean 'gelu'\?\): accepted: gelu"),
        ("model.model.hidden_size=wide", r"^--set .*hidden_size 'wide': accepted: a whole number"),
        ("model.model.attention_dropout=1.5", r"^--set .*attention_dropout 1.5: accepted: from 0 to below 1"),
        (
            "model.model.num_attention_heads=3",
            r"r.yaml:14 with --set model.model.num_attention_heads=3: .*hidden_size 32: accepted: a multiple of num_attention_heads 3",
        ),
        ("model.model=llama", r"^--set model.model=llama: model.model: 'llama': accepted: a mapping"),
        ("model.task=casual", r"^--set model.task=casual: model.task: unknown task 'casual' \(did you mean 'causal'"),
        (
            "model.budget=100k",
            r"^--set model.budget=100k: model.budget: budget '100k': accepted: a mapping with tokens, steps",
        ),
        ("model.budget=1h", r"budget '1h': .*epochs; a time is seconds: 30min, or 2h$"),
        ("model.budget.minutes=1", r"unknown field 'minutes' of budget; .*; a time is seconds: 30min, or 2h$"),
        ("model.budget={seconds: soon}", r"seconds: 'soon': accepted: seconds, or 30min, 2h"),
        ("model.length=4096", r"^--set model.length=4096: model.length: length 4096: this llama has 2048 positions"),
        ("model.init=.", r"r.yaml:10 with --set model.init=.: model: accepted: exactly one of init"),
        ("model.budget={}", r"^--set model.budget=\{\}: .*exactly one of tokens, steps, flops, seconds, epochs"),
    ],
)
def test_a_mistake_that_set_makes_is_blamed_on_it(tmp_path, override, message):
    with pytest.raises(PretrainError, match=message) as caught:
        recipe(tmp_path, GOOD, override)
    assert "\n" not in str(caught.value)
