"""What continuing prompts is expected to take, with the models that a method has beside the checkpoint's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain.core import checkpoint
from pretrain.core.meter import count_flops
from pretrain.core.models.families import new_model
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.stages import Job
from pretrain.stages._estimates import left_in
from pretrain.stages.decode import Decode, continue_prompt

SIZE = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def folders(prepared, tmp_path_factory):
    """A model of four blocks, and a draft of half its width, which do not know of one another."""
    tokenizer, made = load_tokenizer(prepared / "tokenizer"), {}
    for name, width, depth in (("model", 128, 4), ("draft", 64, 2)):
        made[name] = tmp_path_factory.mktemp(name)
        config = SIZE | {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": 2 * width}
        model = new_model("llama", config | {"vocab_size": len(tokenizer)}, task="causal")
        checkpoint.save(model, tokenizer, made[name], {"length": 64})
    return made


def estimate(folders, method=None):
    stage = Decode(checkpoint=str(folders["model"]), prompts=["x" * 40], max_new_tokens=60, method=method)
    given = {place: left_in(Path(folder)) for place, folder in stage.references().items()}
    return stage.estimate(given), stage.method


@pytest.mark.parametrize(
    "name, fields", [("proxy_tuning", ("expert", "anti_expert")), ("speculative_decoding", ("draft",))]
)
def test_the_models_beside_are_in_flops_memory_and_time(name, fields, folders):
    plain, _ = estimate(folders)
    whole, _ = estimate(folders, {"method": name} | dict.fromkeys(fields, str(folders["draft"])))
    weights = sum(parameter.numel() for parameter in checkpoint.load(folders["draft"])[0].parameters())
    assert whole.memory_bytes - plain.memory_bytes == pytest.approx(4 * len(fields) * weights)
    assert whole.seconds > plain.seconds and whole.disk_bytes == plain.disk_bytes


def test_three_models_that_read_the_same_tokens_take_the_flops_that_they_were_expected_to(folders):
    planned, method = estimate(
        folders, {"method": "proxy_tuning"} | dict.fromkeys(("expert", "anti_expert"), str(folders["draft"]))
    )
    assert planned.flops == pytest.approx(spent(folders, method), rel=0.3)  # how short tokens are is guessed


@pytest.mark.parametrize("gamma", [3, 8])
def test_a_draft_is_planned_between_one_that_always_agrees_and_one_that_does_by_chance(gamma, folders):
    def both(draft):
        fields = {"method": "speculative_decoding", "draft": str(folders[draft]), "gamma": gamma}
        planned, method = estimate(folders, fields)
        return planned.flops / spent(folders, method)

    assert both("draft") < 1 < both("model")


WAYS = {
    "plainly": None,
    "proxy_tuning": {"expert": "draft", "anti_expert": "draft"},
    "speculative_decoding": {"draft": "draft"},
    "suffix_decoding": {},
    "token_recycling": {"nodes": 80},
}


@pytest.mark.parametrize("name", WAYS)
def test_a_stage_counts_what_it_has_computed_and_not_what_it_might_have(name, folders, tmp_path):
    """Within a few percent of what the meter counts, of prompts of unlike lengths and fewer tokens than were asked for."""
    fields = WAYS[name]
    fields = fields and {field: str(folders[value]) if value in folders else value for field, value in fields.items()}
    method = None if fields is None else {"method": name} | fields
    prompts, fields = ["def f", "import os and then some more words"], {"temperature": 0.0, "max_new_tokens": 24}
    stage = Decode(checkpoint=str(folders["model"]), prompts=prompts, method=method, stop=["e"], **fields)
    inputs = {place: Path(folder) for place, folder in stage.references().items()}
    found, metered = count_flops(lambda: stage.run(Job(tmp_path, inputs)))
    given = {place: left_in(folder) for place, folder in inputs.items()}
    samples = json.loads((tmp_path / "samples.json").read_text())["samples"]
    assert any(sample["tokens"] < 24 for sample in samples)
    assert name == "token_recycling" or found["flops"] < stage.estimate(given).flops
    assert found["flops"] == pytest.approx(metered, rel=0.1)


def spent(folders, method):
    model, tokenizer = checkpoint.load(folders["model"])
    model.generation_config.eos_token_id = None
    torch.manual_seed(0)
    _, flops = count_flops(
        lambda: continue_prompt(model, tokenizer, "x" * 40, method=method, max_new_tokens=60, temperature=0)
    )
    return flops
