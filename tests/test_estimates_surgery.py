"""What surgeries are expected to compute and to take, against what they do: products of matrices, and all else."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from pretrain.core import checkpoint
from pretrain.core.method import nested
from pretrain.core.models.families import new_model
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.dial.configs import shape_from
from pretrain.stages._estimates import left_in, operating
from pretrain.stages.surgery import operation
from pretrain.surgery import Inputs, operate

ROWS, LENGTH = 8, 64
LLAMA = {
    "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 640, "vocab_size": 2000, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
FLOPS = {
    "pela": {}, "svfit": {}, "svfit of all": {"where": "all"}, "lora": {"init": "pissa"},
    "lora of orthogonal columns": {"init": "olora", "where": "all"}, "lora of nothing": {}, "dsee": {"rank": 4},
    "gptq": {}, "gptq step by step": {"true_sequential": True}, "awq": {"ratios": 4}, "smooth_quant": {},
    "sparse_llm": {"epochs": 2}, "sparse_llm at once": {"solver": "sparsegpt"}, "palettise": {},
    "sparse_llm by wanda": {"solver": "wanda"},
}  # fmt: skip
SECONDS = {
    "palettise": {"bits": 6}, "sparse_llm": {"solver": "magnitude"}, "pre_calibration": {}, "ties": {}, "della": {},
    "breadcrumbs": {}, "gptq": {}, "sparse_llm at once": {"solver": "sparsegpt"},
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    checkpoint.save(new_model("llama", LLAMA, task="causal"), None, folder, {})
    return folder


def surgery_of(name, fields, folder):
    models = {"models": [str(folder)]} if name in ("ties", "della", "breadcrumbs") else {}
    return nested({"method": name.split()[0]} | models | fields, "surgery")


def rows():
    tokens_BL = torch.randint(1, 2000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ones_BL = torch.ones_like(tokens_BL)
    return {"input_ids": tokens_BL, "attention_mask": ones_BL, "position_ids": ones_BL.cumsum(1) - 1}


def expected(surgeries, folder):
    rows = ROWS if any(surgery.needs_text for surgery in surgeries) else 0
    return operation({"checkpoint": left_in(folder)}, surgeries, rows, LENGTH)


def operated(surgery, folder):
    """FLOPs and processor time."""
    model, _ = checkpoint.load(folder)
    inputs = Inputs(batches=[rows()] if surgery.needs_text else [])
    begun = time.process_time()
    _, _, flops = operate([surgery], model, inputs)
    return flops, time.process_time() - begun


@pytest.mark.parametrize("name", FLOPS)
def test_a_surgery_takes_the_flops_that_it_was_expected_to(name, small):
    surgery = surgery_of(name, FLOPS[name], small)
    spent, _ = operated(surgery, small)
    assert expected([surgery], small).flops == pytest.approx(spent, rel=0.15)


def test_work_that_is_no_product_takes_time_as_it_was_expected_to(small):
    """Beside one another, since how fast this machine is does not matter: each within 2.5 times of what is usual."""
    opened, ratios = expected([], small).seconds, {}
    for name, fields in SECONDS.items():
        surgery = surgery_of(name, fields, small)
        planned = expected([surgery], small).seconds - opened
        ratios[name] = planned / operated(surgery, small)[1]
    usual = statistics.median(ratios.values())
    assert all(1 / 2.5 < ratio / usual < 2.5 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("name, more", [("palettise", {"restarts": 40}), ("pre_calibration", {"steps": 40})])
def test_more_starts_and_more_tries_are_planned_for(name, more, small):
    opened = expected([], small).seconds
    few, many = (expected([surgery_of(name, fields, small)], small).seconds - opened for fields in ({}, more))
    assert many > 2 * few
    assert expected([surgery_of(name, {}, small)] * 2, small).seconds - opened == pytest.approx(2 * few)


def test_new_blocks_and_new_tokens_take_time_as_they_were_expected_to(small, stories, tmp_path):
    """Beside one another, of a model and a tokenizer as large as one another: each within 2.5 times of what is usual."""
    texts, inputs = [story["text"] for story in stories], {}
    for name, entries in (("own", 1900), ("other", 2000)):
        inputs[name] = train_tokenizer(texts[:: 1 if name == "own" else 2], vocab_size=entries)
        inputs[name].save_pretrained(tmp_path / name)
    cases = {
        "g_stack": {"growth": 6}, "chat_template": {},
        "passthrough": {"models": [str(small)], "slices": [[n % 2, 0, 2] for n in range(6)]},
        "vocabulary_expansion": {"tokenizer": str(tmp_path / "other"), "initialisation": "mean"},
    }  # fmt: skip
    left, ratios = left_in(small), {}
    for name, fields in cases.items():
        surgery, took = nested({"method": name} | fields, "surgery"), []
        for _ in range(3):
            model, _ = checkpoint.load(small)
            begun = time.process_time()
            operate([surgery], model, Inputs(tokenizer=inputs["own"]))
            took.append(time.process_time() - begun)
        assert surgery.estimated
        ratios[name] = operating(left, shape_from(left.config), [surgery]).seconds / min(took)
    usual = statistics.median(ratios.values())
    assert all(1 / 2.5 < ratio / usual < 2.5 for ratio in ratios.values()), ratios


def test_a_plan_says_no_time_of_what_goes_by_what_is_not_known(small):
    learnt = {"method": "vocabulary_expansion", "tokenizer": str(small), "corpus": str(small)}
    vectors = {"method": "ofa", "tokenizer": str(small), "vectors": [str(small)]}
    for fields in (learnt, vectors):
        planned = expected([nested(fields, "surgery")], small)
        assert planned.seconds is None and planned.flops is None and planned.memory_bytes
