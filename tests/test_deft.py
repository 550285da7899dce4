"""DEFT: the smooth count of activations, whom it wraps, and the exact count."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_objectives import context, rows

from pretrain import engine
from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class, nested
from pretrain.core.models.families import at, base, blocks, family
from pretrain.core.models.heads import with_head
from pretrain.inference import heads
from pretrain.recipe import check

deft = method_class("deft")
activation_density = method_class("activation_density")
VOCABULARY = Vocabulary(97, pad=0, bos=1, eos=2)
RELU = {
    "llama": {"hidden_act": "relu"}, "gpt2": {"activation_function": "relu"}, "bert": {"hidden_act": "relu"},
    "modernbert": {"hidden_activation": "relu"}, "t5": {"feed_forward_proj": "relu"},
}  # fmt: skip
WRAPS = {
    "llama": "causal_lm",
    "gpt2": "causal_lm",
    "bert": "masked_lm",
    "modernbert": "masked_lm",
    "t5": "span_corruption",
}


def labelled_batch():
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"tokens_BL": ids, "mask_BL": mask, "segment_BL": torch.zeros_like(ids), "label_B": torch.tensor([0, 1])}


def inner(model):
    """What each feed-forward's second matrix gets, of a plain one: the activations."""
    seen = []
    entry = family(model)
    for block in blocks(model):
        down = at(at(block, entry.feed_forward), entry.down)
        down.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    return seen


@pytest.mark.parametrize("name", ("gpt2", "bert"))
def test_the_loss_is_the_objectives_and_the_mean_share_of_activations_without_padding(tiny, name) -> None:
    still = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
    still |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if name == "bert" else {}
    model = with_head(tiny(name, **still), "sequence", ("a", "b"), VOCABULARY).train()
    batch, objective = labelled_batch(), deft(weight=0.7, epsilon=1e-3)
    alone = objective.wrapped.loss(model, batch).value
    found = objective.loss(model, batch)
    seen = inner(model)
    model(batch["tokens_BL"], attention_mask=batch["mask_BL"])
    real = batch["mask_BL"].bool()
    expected = np.mean([float((a[real] ** 2 / (a[real] ** 2 + 1e-3)).mean()) for a in seen])
    assert found.parts["density"].item() == pytest.approx(expected, rel=1e-5)
    assert found.value.item() == pytest.approx(alone.item() + 0.7 * expected, rel=1e-5)
    assert found.parts["objective"].item() == pytest.approx(alone.item(), rel=1e-6)
    assert objective.loss(model.eval(), batch).value.item() == pytest.approx(alone.item(), rel=1e-6)


def test_the_count_is_of_what_is_not_zero_as_epsilon_goes_to_none() -> None:
    a = torch.tensor([[[0.0, 2.0, -3.0, 0.0], [0.0, 0.0, 0.0, 5.0]]])
    assert deft(epsilon=1e-12).density(a).item() == pytest.approx(3 / 8)
    assert deft(epsilon=1.0).density(torch.tensor([[[1.0, 3.0]]])).item() == pytest.approx((0.5 + 0.9) / 2)
    assert deft(epsilon=1e-12).density(a, torch.tensor([[True, False]])).item() == pytest.approx(2 / 4)


@pytest.mark.parametrize("name", list(WRAPS))
def test_every_family_pays_and_adapters_learn_to_be_sparser(tiny, name) -> None:
    torch.manual_seed(0)
    model = method_class("lora")(rank=4, where="feed_forward")(tiny(name, **RELU[name])).train()
    objective = deft(objective=WRAPS[name], weight=5.0, epsilon=1e-4)
    assert objective.task == nested(WRAPS[name], "objective").task and not hasattr(objective, "predict")
    batch = objective.prepare(rows([20, 31], [45]), context(60))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-2)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    densities = []
    for _ in range(8):
        loss = objective.loss(model, batch)
        densities.append(loss.parts["density"].item())
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    assert densities[-1] < densities[0] - 0.05
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    if name == "t5":  # the mean of each side
        assert (loss.value - loss.parts["objective"]).item() == pytest.approx(
            10.0 * loss.parts["density"].item(), rel=1e-4
        )


@pytest.mark.parametrize("name", ("llama", "bert"))
def test_a_step_down_the_gradient_makes_a_smooth_nonlinearity_sparser(tiny, name) -> None:
    model = tiny(name).eval()
    for dropout in model.modules():
        dropout.training = False
    model.training = True  # the loss asks the model alone
    objective = deft(objective=WRAPS[name], weight=1.0, epsilon=1e-4)
    batch = objective.prepare(rows([20, 31], [45]), context(60))
    found = objective.loss(model, batch)
    layers = [p for n, p in model.named_parameters() if "mlp" in n or "intermediate" in n]
    gradients = torch.autograd.grad(found.value - objective.wrapped.loss(model, batch).value, layers)
    size = sum(g.square().sum() for g in gradients).item()
    with torch.no_grad():
        for layer, gradient in zip(layers, gradients, strict=True):
            layer -= 1e-5 / size * gradient
    after = objective.loss(model, batch).parts["density"].item()
    assert found.parts["density"].item() - after == pytest.approx(1e-5, rel=0.2)


def test_an_objective_on_labels_stays_one(tiny) -> None:
    objective = deft(objective={"method": "classification", "label": "kind"})
    assert objective.columns == ("text", "kind") and objective.labels(["b", "a"]) == ("a", "b")
    assert objective.parts() == ("classification",)
    model = objective.ready(tiny("bert"), ("a", "b"), VOCABULARY, 0)
    assert len(objective.predict(model.eval(), labelled_batch(), None)) == 2
    assert copy.deepcopy(objective) == objective
    assert objective.learnt("a", ("a", "b")) and not objective.learnt("c", ("a", "b"))
    wrapped = heads._objective({"method": "deft", "objective": {"method": "classification", "label": "kind"}})
    assert wrapped is not None and wrapped.columns == ("text", "kind")


def test_the_exact_count_is_by_block_over_tokens_without_padding(tiny, prepared) -> None:
    from pretrain.core.encoding import encode
    from pretrain.corpus.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(prepared / "tokenizer")
    model = tiny("t5", vocab_size=512, feed_forward_proj="relu")
    documents = [
        {"text": "import os", "domain": "a"}, {"text": "def f(x):\n    return x + 1\n" * 3, "domain": "b"}, {"text": ""}
    ]  # fmt: skip
    found = activation_density(batch=2)(model, tokenizer, documents)
    known = Vocabulary.of(tokenizer)
    seen, tokens = inner(model), 0
    active = np.zeros(2)
    for document in documents[:2]:
        ids = torch.tensor([[known.bos, *encode(tokenizer, [document["text"]])[0].tolist(), known.eos]])
        with torch.no_grad():
            model.get_encoder()(ids)
        active += [float((a != 0).float().mean(-1).sum()) for a in seen[-2:]]
        tokens += ids.shape[1]
        if document["domain"] == "a":
            assert found.domains["a"]["activation_density.1"] == pytest.approx(active[1] / tokens, rel=1e-5)
    assert found.metrics["activation_density.0"] == pytest.approx(active[0] / tokens, rel=1e-5)
    assert found.metrics["activation_density"] == pytest.approx(active.mean() / tokens, rel=1e-5)
    assert 0.2 < found.metrics["activation_density"] < 0.8
    gelu = tiny("gpt2", vocab_size=512)
    assert activation_density()(gelu, tokenizer, documents).metrics["activation_density"] == pytest.approx(1.0)
    assert activation_density(epsilon=0.5)(gelu, tokenizer, documents).metrics["activation_density"] < 0.1


def test_the_wrapped_objective_may_name_an_earlier_stage(prepared, tmp_path) -> None:
    model = {
        "family": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    shared = {
        "stage": "train", "corpus": str(prepared / "corpus"), "tokenizer": str(prepared / "tokenizer"), "model": model,
        "length": 32, "batch_rows": 2, "budget": {"steps": 2}, "evaluate_tokens": 64,
    }  # fmt: skip
    taught = {"method": "deft", "objective": {"method": "distillation", "teacher": "large"}}
    stages = [shared | {"name": "large"}, shared | {"name": "small", "objective": taught}]
    recipe = check({"stages": stages}, None, output=tmp_path / "out")
    assert recipe.stages[1].references()["objective.objective.teacher"] == "large"
    assert recipe.stages[1].methods() == ["adamw", "cosine", "deft", "distillation"]
    done = engine.run(recipe, say=engine.silent, report=False)
    assert done.stages["small"]["inputs"]["objective.objective.teacher"] == "large"
    assert done.stages["small"]["flops"] > done.stages["large"]["flops"]
    stages[1]["objective"]["objective"]["teacher"] = "larger"
    with pytest.raises(PretrainError, match="objective.objective.teacher: 'larger'.*accepted: an earlier stage"):
        check({"stages": stages}, None, output=tmp_path / "out")


def test_what_does_not_fit_is_one_clear_error(tiny, prepared) -> None:
    from pretrain.corpus.tokenizers import load_tokenizer

    with pytest.raises(PretrainError, match="weight -1: accepted: 0 or more"):
        deft(weight=-1)
    with pytest.raises(PretrainError, match="epsilon 0: accepted: above 0"):
        deft(epsilon=0)
    with pytest.raises(PretrainError, match="'causal_lmm'"):
        deft(objective="causal_lmm")
    with pytest.raises(PretrainError, match="objective 'deft': accepted: one that is not deft"):
        deft(objective="deft")
    with pytest.raises(PretrainError, match="epsilon -1: accepted: 0 or more"):
        activation_density(epsilon=-1)
    with pytest.raises(PretrainError, match="batch 0: accepted: 1 or more"):
        activation_density(batch=0)
    with pytest.raises(PretrainError, match="no document has text"):
        activation_density()(tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer"), [{"text": ""}])
    model = tiny()
    base(model).layers[1].mlp.act_fn = base(model).layers[0].mlp.act_fn
    with pytest.raises(PretrainError, match="blocks share a nonlinearity"):
        deft(objective="causal_lm").loss(model.train(), {})
