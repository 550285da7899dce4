"""Searching methods and papers: words in any form and spelling, ranked; a name in any case; suggestions that are near."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.core.quick.search import closest, search, stem


def run(*words: str):
    return CliRunner().invoke(app, list(words))


def names(*words: str) -> list[str]:
    return [row["name"] for row in json.loads(run(*words, "--json").stdout)]


@pytest.mark.parametrize("alike", [
    "quantise quantize quantised quantization quantisation Quantizing quantizer", "prune pruning pruned prunes",
    "distil distill distillation distilling", "merge merging merged", "behaviour behavior", "tokeniser tokenizers",
    "classify classification classifier", "compress compression compressing", "run running", "analyse analyze",
])  # fmt: skip
def test_forms_and_spellings_of_a_word_are_one(alike):
    assert len({stem(word) for word in alike.split()}) == 1


@pytest.mark.parametrize("unlike", ["code decode encode", "lora dylora", "muon union", "grow group", "loss less"])
def test_other_words_are_others(unlike):
    assert len({stem(word) for word in unlike.split()}) == len(unlike.split())


@pytest.mark.parametrize("command", ["methods", "papers"])
@pytest.mark.parametrize("spellings", [("quantise", "QUANTIZATION", "quantised"), ("fine-tuning", "finetuning")])
def test_each_spelling_finds_the_same(command, spellings):
    each = [names(command, word) for word in spellings]
    assert each[0] and all(found == each[0] for found in each)


def test_what_bears_the_name_comes_first():
    assert names("methods", "LoRA")[0] == "lora" and names("methods", "Muon") == ["muon"]
    assert names("methods", "low", "rank")[0] == "lora" == names("methods", "low rank")[0]
    assert names("papers", "gptq")[0] == "GPTQ" and names("papers", "2210.17323") == ["GPTQ"]
    assert "gptq" in names("methods", "quantise")


def test_a_word_is_not_found_inside_another():
    assert not {"bag_of_words", "drbert", "retromae_v2"} & set(names("methods", "code"))  # of decoders and encoders
    assert "harness" in names("methods", "harn")  # its beginning, where no row has the word


def test_all_words_must_be_there_and_rows_keep_their_order_without_any():
    rows = ["a tree", "a red tree", "red"]
    assert search(rows, ["red", "trees"], lambda row: [(1, row)]) == ["a red tree"]
    assert search(rows, [], lambda row: [(1, row)]) == rows


@pytest.mark.parametrize("name", ["LoRA", "lora", "Sparse-LLM", "SparseLLM", "value embeddings"])
def test_a_method_is_shown_by_its_name_in_any_case(name):
    shown = run("methods", "show", *name.split())
    assert shown.exit_code == 0 and shown.stdout.splitlines()[0].endswith(")")


def test_suggestions_are_near():
    assert "gptq" in str(run("methods", "show", "quantise").exception)
    assert "GPTQ" in str(run("papers", "show", "quantise").exception)
    assert "methods that have it (pretrain methods muon): muon" in str(run("papers", "muon").exception)
    assert "pretrain methods show lora" in str(run("papers", "show", "LoRA").exception)
    assert "pretrain papers show DUSt3R" in str(run("methods", "show", "dust3r").exception)
    assert "nearest" not in str(run("papers", "show", "zzzz").exception)
    assert closest("growing nets", ["grow a net", "prune", "glowing vets"], str, lambda row: [(1, row)])[0] != "prune"
