"""What is meant by a word that is not accepted, and where a value that does not fit comes from."""

from __future__ import annotations

import pytest

import pretrain
from pretrain import recipe
from pretrain.core.errors import PretrainError, nearest
from pretrain.core.method import method_class
from pretrain.corpus.sources import SOURCES, Files
from pretrain.forecast import check_documents
from pretrain.identity import plan
from pretrain.stages import stage_classes
from pretrain.stages.data import Data

RECIPE = """name: r
stages:
  - stage: data
    name: corpus
    sources:
      - files: text
  - stage: tokenizer
    corpus: corpus
    vocab_size: 300
  - stage: train
    name: model
    corpus: corpus
    tokenizer: tokenizer
    model: {family: gpt2, n_embd: 32, n_layer: 1, n_head: 2}
    objective: causal_lm
    optimizer: {method: adamw, lr: 0.001}
    budget: {steps: 2}
"""


@pytest.mark.parametrize(
    ("word", "accepted", "guess"),
    [
        ("optimiser", ["objective", "optimizer"], "optimizer"),
        ("normalize", ["normalise", "minimise"], "normalise"),
        ("colour", ["color", "cloud"], "color"),
        ("policy", ["policies"], "policies"),
        ("hidden-sizes", ["hidden_size"], "hidden_size"),
        ("file", [*SOURCES], "files"),
        ("path", [*SOURCES], "files"),
        ("intermediate_size", ["n_inner", "n_embd"], "n_inner"),
        ("d_model", ["hidden_size", "head_dim"], "hidden_size"),
        ("learning_rate", ["lr", "eps"], "lr"),
        ("batch_size", ["batch_rows", "micro_rows"], "batch_rows"),
        ("quantise", [*stage_classes()], "surgery"),
        ("finetune", [*stage_classes()], "train"),
        ("rnk", ["alpha", "rank"], "rank"),
    ],
)
def test_a_word_in_another_spelling_or_for_the_same_thing_is_guessed(word, accepted, guess):
    assert nearest(word, accepted) == f" (did you mean {guess!r}?)"


def test_what_is_like_nothing_gets_no_guess():
    assert nearest("zebra", ["lr", "files", "surgery"]) == ""


@pytest.mark.parametrize("name", ["lora", "adamw", "causal_lm", "cosine", "ema", "deduplicate", "held_out"])
def test_a_method_made_by_hand_tells_of_a_strange_name_as_a_recipe_does(name):
    with pytest.raises(PretrainError, match=r"unknown field 'nonsuch'; accepted fields: "):
        method_class(name)(nonsuch=4)


def test_each_kind_of_thing_that_is_made_by_hand_guesses():
    cases = {
        "LoRA: unknown field 'rnk' (did you mean 'rank'?); accepted fields: rank, alpha, dropout": lambda: (
            pretrain.methods.LoRA(rnk=4)
        ),
        "LoRA: rank is given twice; accepted: one value": lambda: pretrain.methods.LoRA(4, rank=4),
        "LoRA: 9 arguments; accepted fields: rank": lambda: pretrain.methods.LoRA(*range(9)),
        "SpeculativeDecoding: draft is missing; accepted: the name of an earlier stage, or a path": lambda: (
            pretrain.methods.SpeculativeDecoding()
        ),
        "Files: unknown field 'file' (did you mean 'files'?); accepted fields: files": lambda: Files(file="x"),
        "Files: files is missing; accepted: a text": lambda: Files(),
        "Data.source: unknown field (did you mean 'sources'?); accepted: name": lambda: Data(source=["x"]),
        "Data.validation: 2: accepted: from 0 to below 1": lambda: Data(sources=["x"], validation=2),
        "Data.sources.0: {'file': 'x'} is no source (did you mean 'files'?)": lambda: Data(sources=[{"file": "x"}]),
    }
    for line, make in cases.items():
        with pytest.raises(PretrainError) as caught:
            make()
        assert str(caught.value).startswith(line)
    assert pretrain.methods.LoRA(4, alpha=8.0).rank == 4


def planned(tmp_path, monkeypatch, *overrides, text=RECIPE):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir(exist_ok=True)
    (tmp_path / "text" / "a.txt").write_text("hello\n" * 50)
    (tmp_path / "r.yaml").write_text(text)
    loaded = recipe.load("r.yaml", overrides)
    return check_documents(loaded, plan(loaded))


AUTO = RECIPE.replace("{family: gpt2, n_embd: 32, n_layer: 1, n_head: 2}", "{family: llama}\n    size: auto").replace(
    "    optimizer: {method: adamw, lr: 0.001}\n", ""
)


@pytest.mark.parametrize(
    ("text", "override", "start"),
    [
        (RECIPE, "model.model.family=gpt3", ": model.model.family: unknown model family 'gpt3'"),
        (RECIPE, "model.model.intermediate_size=3", ": model.model.intermediate_size: unknown field"),
        (AUTO, "model.model.family=llam", ": size: auto chooses for new decoders (did you mean 'llama'?)"),
        (AUTO, "model.size=3", ": size 3: accepted: auto"),
        (RECIPE, "corpus.sources.0.files=nowhere", ": corpus.sources.0: no files at 'nowhere'"),
        (RECIPE, "corpus.sources.0={files: nowhere}", ": corpus.sources.0: no files at 'nowhere'"),
        (RECIPE, "corpus.sources=[nowhere]", ": corpus.sources.0: no files at 'nowhere'"),
        (RECIPE, "corpus.sources.0.txt=x", ": corpus.sources.0: unknown field 'txt'"),
    ],
)
def test_a_value_of_set_is_blamed_on_set_and_on_no_line(tmp_path, monkeypatch, text, override, start):
    with pytest.raises(PretrainError) as caught:
        planned(tmp_path, monkeypatch, override, text=text)
    assert str(caught.value).startswith(f"--set {override}{start}")


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("model.model.n_head=3", "r.yaml:14 with --set model.model.n_head=3: model.model.n_embd: "),
        ("corpus.sources.0.text=bod", "r.yaml:6 with --set corpus.sources.0.text=bod: corpus.sources.0: text 'bod'"),
    ],
)
def test_a_line_that_does_not_fit_what_is_set_is_named_with_it(tmp_path, monkeypatch, override, start):
    with pytest.raises(PretrainError) as caught:
        planned(tmp_path, monkeypatch, override)
    assert str(caught.value).startswith(start)


@pytest.mark.parametrize("text", ["", "# only words\n", "null\n", "---\n"])
def test_an_empty_recipe_is_called_empty(tmp_path, monkeypatch, text):
    line = r"^r.yaml: the recipe is empty; accepted: a mapping with stages: a list, and name, seed, output"
    with pytest.raises(PretrainError, match=line):
        planned(tmp_path, monkeypatch, text=text)
    with pytest.raises(PretrainError, match="^r.yaml:1: stages is missing: accepted: a list of at least one stage"):
        planned(tmp_path, monkeypatch, text="name: x\n")
