"""The train stage: surgeries before training, and what objectives train beside the model comes out where it should."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_recipe import small_recipe

import pretrain
from pretrain import engine
from pretrain.core import checkpoint
from pretrain.core.checkpoint import lineage
from pretrain.core.errors import PretrainError
from pretrain.core.models.storage import stored_as
from pretrain.corpus.store import side, write_corpus
from pretrain.recipe import load


@pytest.fixture
def recipe(tmp_path, stories):
    (tmp_path / "r.yaml").write_text(small_recipe(tmp_path, stories[:30], budget={"steps": 3}))
    return tmp_path / "r.yaml"


def test_surgeries_are_done_before_training_and_restored_by_loading(recipe, tmp_path):
    done = engine.run(
        load(recipe, ["model.surgeries=[spike_no_more, {method: polycom, order: 2}]"], tmp_path / "out"),
        say=engine.silent,
    )
    folder = done.folder / "model" / "checkpoint"
    model, _ = pretrain.load(folder)
    names = dict(model.named_parameters())
    assert names["model.layers.0.mlp.act_fn.a"].tolist() != [0.0, 0.5, 0.5]  # trained
    assert type(model.get_input_embeddings()).__name__ == "ScaledEmbedding"
    assert {"polycom", "spike_no_more"} <= set(done.stages["model"]["methods"])
    assert lineage(folder)["flops"] == done.stages["model"]["flops"] > 0


def test_a_surgery_that_does_not_fit_the_model_stops_the_stage_with_its_name(recipe, tmp_path):
    with pytest.raises(PretrainError, match="stage 'model': pre_rmsnorm: family 'llama': accepted: gpt2"):
        engine.run(load(recipe, ["model.surgeries=[pre_rmsnorm]"], tmp_path / "out"), say=engine.silent)


def test_a_companion_gets_a_checkpoint_of_its_own_that_later_stages_may_use(recipe, tmp_path):
    objective = "model.objective={method: ctcd, companion: {num_hidden_layers: 2}}"
    done = engine.run(load(recipe, [objective], tmp_path / "out"), say=engine.silent)
    model, _ = pretrain.load(done.folder / "model" / "checkpoint")
    companion, tokenizer = pretrain.load(done.folder / "model" / "companion" / "checkpoint")
    assert len(model.model.layers) == 1 and len(companion.model.layers) == 2 and tokenizer is not None
    more = [f"model.init={done.folder / 'model' / 'companion'}", "model.model={}", "model.objective=causal_lm"]
    again = engine.run(load(recipe, more, tmp_path / "more"), say=engine.silent)
    assert again.stages["model"]["metrics"]["steps"] == 3


@pytest.mark.parametrize("objective", ["causal_lm", "classification"])
@pytest.mark.parametrize("test", ["gone", "damaged", "without labels"])
def test_the_test_split_is_never_opened(prepared, tmp_path, objective, test):
    rows = [{"text": f"{number} def f(): pass", "domain": "d", "id": str(number)} for number in range(60)]
    for number, row in enumerate(rows):
        row["label"] = None if side(row["text"], 0.2, 0.2) == "test" else "ab"[number % 2]
    write_corpus(rows, tmp_path / "c", validation=0.2, test=0.2, near_duplicates=None)
    (part,) = (tmp_path / "c" / "test").glob("*.parquet")
    if test == "gone":
        shutil.rmtree(part.parent)
    elif test == "damaged":
        part.write_bytes(b"damaged")
    (tmp_path / "r.yaml").write_text(
        f"""\
stages:
  - stage: train
    name: model
    corpus: {tmp_path / "c"}
    tokenizer: {prepared / "tokenizer"}
    model: {{family: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}}
    objective: {objective}
    length: 32
    batch_rows: 2
    evaluate_every: 1
    budget: {{steps: 2}}
"""
    )
    done = engine.run(load(tmp_path / "r.yaml", [], tmp_path / "out"), say=engine.silent)
    assert done.stages["model"]["metrics"]["steps"] == 2
    made = {path.name for path in done.folder.rglob(".tokens/*/*") if path.is_dir()}
    assert made == ({"train", "validation"} if objective == "causal_lm" else set())


def test_a_tokenizer_of_more_entries_than_the_checkpoint_has_rows_is_refused(recipe, tmp_path, tiny):
    checkpoint.save(tiny(vocab_size=399), None, tmp_path / "small")
    with pytest.raises(PretrainError, match="'model': the tokenizer has 400 entries, the model embeddings of 399"):
        engine.run(
            load(recipe, [f"model.init={tmp_path / 'small'}", "model.model={}"], tmp_path / "out"), say=engine.silent
        )


def test_an_adapter_on_a_bfloat16_checkpoint_is_trained_as_on_its_float32_copy(recipe, tmp_path, tiny):
    model, losses, types = tiny(vocab_size=400).to(torch.bfloat16), [], []
    for name in ("held", "wide"):
        checkpoint.save(model if name == "held" else model.float(), None, tmp_path / name)
        changes = [f"model.init={tmp_path / name}", "model.model={}", "model.surgeries=[lora]"]
        done = engine.run(load(recipe, changes, tmp_path / f"out-{name}"), say=engine.silent)
        log = (done.folder / "model" / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log if json.loads(line)["event"] == "step"])
        (path,) = (done.folder / "model" / "checkpoint").glob("*.safetensors")
        tensors = load_file(path)
        types.append({name.rpartition(".")[0].rpartition(".")[2]: t.dtype for name, t in tensors.items()})
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert types[0]["up_proj"] == types[0]["base_layer"] == torch.bfloat16 and types[0]["default"] == torch.float32
    assert set(types[1].values()) == {torch.float32}


def test_a_bfloat16_checkpoint_comes_out_in_bfloat16_trained_or_adapted_and_merged(recipe, tmp_path, tiny):
    checkpoint.save(tiny(vocab_size=400).to(torch.bfloat16), None, tmp_path / "held")
    changes = [f"model.init={tmp_path / 'held'}", "model.model={}"]
    plain = engine.run(load(recipe, changes, tmp_path / "plain"), say=engine.silent).folder / "model"
    adapted = engine.run(load(recipe, [*changes, "model.surgeries=[lora]"], tmp_path / "lora"), say=engine.silent)
    (tmp_path / "merge.yaml").write_text(
        f"stages: [{{stage: surgery, name: merged, checkpoint: {adapted.folder / 'model'}, surgeries: [merge_adapters]}}]"
    )
    merged = engine.run(load(tmp_path / "merge.yaml", [], tmp_path / "merge"), say=engine.silent).folder / "merged"
    before, _ = checkpoint.load(tmp_path / "held")
    for folder in (plain, merged):
        assert checkpoint.stored_dtype(folder / "checkpoint") == torch.bfloat16
        after, _ = checkpoint.load(folder / "checkpoint")
        assert {p.dtype for p in after.parameters()} == {torch.bfloat16}
        assert not torch.equal(
            after.model.layers[0].self_attn.q_proj.weight, before.model.layers[0].self_attn.q_proj.weight
        )
    model = tiny(vocab_size=400)
    model.lm_head.weight.data[0, 0] = 1e5  # more than float16 holds: it stays as it is
    assert not stored_as(model, torch.float16) and {p.dtype for p in model.parameters()} == {torch.float32}
