"""Cache augmentation: many places at once against one at a time, the frozen model, its checkpoint, and decoding."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_objectives import context, rows
from test_training import small
from transformers import DynamicCache

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.generation.loop import decode
from pretrain.core.models.cross_entropy import IGNORE
from pretrain.core.models.families import base, embeddings, head
from pretrain.decoding.deliberation.latent_deliberation import LatentDeliberation, deliberate
from pretrain.objectives.efficiency.cache_augmentation import CacheAugmentation
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.training.budget import Budget
from pretrain.training.loop import Settings

FAMILIES = ["llama", "qwen3", "gpt2"]
IDS_BL = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(0))
MASK_BL = (torch.arange(9) >= torch.tensor([[0], [3], [7]])).long()


def setting(tiny, family="llama", latents=3, ahead=4, traces=3, length=40, **fields):
    """The objective, a model and its coprocessor in float64, and a batch of two rows, one of two documents."""
    objective = CacheAugmentation(latents, ahead, traces)
    model = tiny(family, initializer_range=0.2, **fields).double()
    torch.manual_seed(1)
    coprocessor = objective.modules(model).eval() if latents else None
    if coprocessor is not None:  # not the model's own weights any more
        for p in coprocessor.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.1)
    return objective, model, coprocessor, objective.prepare(rows([18, 22], [31]), context(length))


def alone(model, coprocessor, latents, prefix, ahead):
    """The loss of each token of `ahead` after `prefix`, by plain passes over one document at one place."""
    cache = DynamicCache()
    logits = model(prefix[None], past_key_values=cache, use_cache=True).logits[:, -1:]
    if latents:
        copied = copy.deepcopy(cache)
        z = base(coprocessor)(torch.arange(latents)[None], past_key_values=copied, use_cache=True).last_hidden_state
        logits = model(inputs_embeds=z, past_key_values=cache, use_cache=True).logits[:, -1:]
    if len(ahead) > 1:
        logits = torch.cat([logits, model(ahead[None, :-1], past_key_values=cache, use_cache=True).logits], 1)
    return F.cross_entropy(logits[0], ahead, reduction="none")


def by_hand(objective, model, coprocessor, batch):
    """The losses of all targets, trace by trace, and those of the first targets."""
    found, first = [], []
    for row, place_M in enumerate(batch["place_BM"]):
        document_L, tokens_L = batch["document_BL"][row], batch["tokens_BL"][row]
        for trace, p in enumerate(place_M.tolist()):
            target_A = batch["target_BMA"][row, trace]
            ahead = target_A[target_A != IGNORE]
            if len(ahead):
                start = int((document_L == document_L[p]).nonzero()[0])
                assert torch.equal(ahead, tokens_L[p + 1 : p + 1 + len(ahead)])
                found.append(alone(model, coprocessor, objective.latents, tokens_L[start : p + 1], ahead))
                first.append(found[-1][0])
    return torch.cat(found), torch.stack(first)


@pytest.mark.parametrize(
    ("family", "latents", "ahead"), [("llama", 3, 4), ("qwen3", 3, 4), ("gpt2", 3, 4), ("llama", 1, 1), ("gpt2", 2, 9)]
)
def test_all_places_at_once_are_each_place_alone(tiny, family, latents, ahead):
    objective, model, coprocessor, batch = setting(tiny, family, latents, ahead)
    found = objective.loss(model, batch, coprocessor)
    wanted_N, first_M = by_hand(objective, model, coprocessor, batch)
    assert len(wanted_N) == batch["weight"] > len(first_M) - 1
    torch.testing.assert_close(found.value, wanted_N.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.parts["ahead_1"], first_M.mean(), rtol=1e-5, atol=1e-6)
    mine = torch.autograd.grad(found.value, list(coprocessor.parameters()))
    theirs = torch.autograd.grad(wanted_N.mean(), list(coprocessor.parameters()))
    for a, b in zip(mine, theirs, strict=True):
        assert bool(b.any())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("family", "ahead"), [("llama", 1), ("llama", 4), ("gpt2", 4)])
def test_without_latents_it_is_the_models_own_loss(tiny, family, ahead):
    objective, model, _, batch = setting(tiny, family, 0, ahead, traces=50 if ahead == 1 else 4)
    with torch.no_grad():
        found = objective.loss(model, batch)
        wanted_N, _ = by_hand(objective, model, None, batch)
    torch.testing.assert_close(found.value, wanted_N.mean(), rtol=1e-5, atol=1e-6)
    if ahead == 1:  # then each token that has a predecessor is a target once
        plain = CausalLM().loss(model, CausalLM().prepare(rows([18, 22], [31]), context(40)))
        torch.testing.assert_close(found.value, plain.value)


def test_places_are_drawn_without_repeat_and_targets_end_with_the_document():
    objective = CacheAugmentation(traces=12, ahead=6)
    batch = objective.prepare(rows([18, 22], [8]), context(40))
    document_BL, tokens_BL = batch["document_BL"], batch["tokens_BL"]
    assert len(set(batch["place_BM"][0].tolist())) == 12
    assert not torch.equal(batch["place_BM"], objective.prepare(rows([18, 22], [8]), context(40, seed=1))["place_BM"])
    targets = 0
    for row in range(2):
        for p, target_A in zip(batch["place_BM"][row].tolist(), batch["target_BMA"][row], strict=True):
            for a, target in enumerate(target_A.tolist(), 1):
                inside = p + a < 40 and document_BL[row, p + a] == document_BL[row, p] != 0
                assert target == IGNORE or (inside and target == tokens_BL[row, p + a])
                targets += target != IGNORE
    assert (batch["target_BMA"][1, :, 0] != IGNORE).sum() == 7  # a document of 8 has 7 places; the others are empty
    assert targets == batch["weight"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_and_recomputing_leave_the_frozen_model_alone(tiny, family):
    dropout = {"attention_dropout": 0.3} if family == "llama" else {"attn_pdrop": 0.3, "resid_pdrop": 0.3}
    objective, model, coprocessor, batch = setting(tiny, family, **dropout)
    wanted = objective.loss(model, batch, coprocessor).value
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(objective.loss(model.train(), batch, coprocessor).value, wanted)
    assert model.training


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_moves_the_coprocessor_only(tiny, prepared, tmp_path, family):
    model = tiny(family, vocab_size=512, **({"n_positions": 80} if family == "gpt2" else {}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objective = CacheAugmentation(latents=2, ahead=4, traces=6)
    settings = Settings(budget=Budget(steps=3), bar=False, save_every=0)
    done = small(prepared, lambda *_, **__: model, tmp_path, settings=settings, objective=objective)
    after = done.trainee.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None and not p.requires_grad for p in done.trainee.model.parameters())
    coprocessor = done.trainee.beside[0]
    moved = [name for name, p in coprocessor.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert len(moved) == len(list(coprocessor.parameters())), "all of the coprocessor learns"
    assert done.flops > 0


def test_augmenting_learns_what_the_model_does_not_know(tiny):
    objective, model, coprocessor, batch = setting(tiny, latents=4, ahead=4, traces=8)
    optimizer = torch.optim.AdamW(coprocessor.parameters(), lr=3e-3)
    with torch.no_grad():
        plain = CacheAugmentation(0, 4, 8).loss(model, batch).value
    for _ in range(15):
        objective.loss(model, batch, coprocessor).value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert objective.loss(model, batch, coprocessor).value < plain - 0.1


@pytest.mark.bits
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_the_coprocessor_is_the_same(tiny, tmp_path, family, tied):
    objective, model, coprocessor, batch = setting(tiny, family, tie_word_embeddings=tied)
    assert head(model)[0].requires_grad is False and embeddings(coprocessor).weight.shape == (3, 32)
    exported = objective.export(coprocessor)
    checkpoint.save(exported["coprocessor"], None, tmp_path / "c")
    loaded, _ = checkpoint.load(tmp_path / "c")
    wanted, found = (objective.loss(model, batch, one).value for one in (coprocessor, loaded))
    assert torch.equal(wanted, found)


@pytest.fixture
def trained(tiny, tmp_path):
    """`trained("gpt2")`: the objective, the model, its coprocessor and the decoding that names its checkpoint."""

    def make(family="llama", **fields):
        objective, model, coprocessor, _ = setting(tiny, family, **fields)
        checkpoint.save(coprocessor, None, tmp_path / "stage" / "coprocessor" / "checkpoint")
        return objective, model, coprocessor, LatentDeliberation(str(tmp_path / "stage" / "coprocessor"))

    return make


def test_a_stage_is_taken_for_the_coprocessor_in_its_folder(trained, tmp_path):
    _, model, _, method = trained()
    checkpoint.save(model, None, tmp_path / "stage" / "checkpoint")
    stage = LatentDeliberation(str(tmp_path / "stage"))
    given = {"max_new_tokens": 3}
    assert torch.equal(stage.generate(model, IDS_BL, **given), method.generate(model, IDS_BL, **given))


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_begins_with_what_training_predicts(tiny, trained, family):
    objective, model, coprocessor, _ = trained(family)
    ids_L = IDS_BL[0]
    batch = {
        "tokens_BL": ids_L[None], "document_BL": torch.ones(1, 9).long(), "position_BL": torch.arange(9)[None],
        "place_BM": torch.tensor([[8]]), "target_BMA": torch.tensor([[[5, IGNORE, IGNORE, IGNORE]]]),
    }  # fmt: skip
    with torch.no_grad():
        wanted_V = model.lm_head(objective.states(model, batch, coprocessor)[0, 0, 0])
        logits_BV, _, mask_BN = deliberate(model, coprocessor, 3, IDS_BL[:1], torch.ones(1, 9).long())
    torch.testing.assert_close(logits_BV[0], wanted_V, rtol=1e-5, atol=1e-5)
    assert mask_BN.shape == (1, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_whole_passes_whatever_the_padding(tiny, trained, family):
    _, model, coprocessor, method = trained(family)
    output_BN = method.generate(model, IDS_BL, attention_mask_BL=MASK_BL, max_new_tokens=6)
    assert torch.equal(output_BN[:, :9], IDS_BL)
    for row in range(3):
        ids_L = IDS_BL[row][MASK_BL[row] == 1]
        with torch.no_grad():
            cache = DynamicCache()
            base(model)(ids_L[None], past_key_values=cache, use_cache=True)
            z = base(coprocessor)(torch.arange(3)[None], past_key_values=cache, use_cache=True).last_hidden_state[0]
            x_LE = torch.cat([embeddings(model)(ids_L), z])
            for token in output_BN[row, 9:]:
                assert token == model(inputs_embeds=x_LE[None], use_cache=False).logits[0, -1].argmax()
                x_LE = torch.cat([x_LE, embeddings(model)(token[None])])
    assert not torch.equal(output_BN, decode(model, IDS_BL, attention_mask_BL=MASK_BL, max_new_tokens=6))


def test_a_recipe_names_the_coprocessor(trained):
    from pretrain.stages.decode import Decode

    stage = Decode(checkpoint="base", prompts=["a"], method={"method": "latent_deliberation", "coprocessor": "c"})
    assert stage.references() == {"checkpoint": "base", "method.coprocessor": "c"}


def test_what_cannot_be_is_refused(tiny, trained, tmp_path):
    for fields, message in (
        ({"latents": -1}, "latents -1: accepted: 0 or more"),
        ({"ahead": 0}, "ahead 0: accepted: 1 or more"),
        ({"traces": 0}, "traces 0: accepted: 1 or more"),
    ):
        with pytest.raises(PretrainError, match=message):
            CacheAugmentation(**fields)
    with pytest.raises(PretrainError, match="latents 0: nothing to train: accepted: 1 or more"):
        CacheAugmentation(latents=0).modules(tiny())
    with pytest.raises(PretrainError, match="family 'bert': accepted: llama, gpt2"):
        CacheAugmentation().modules(tiny("bert"))
    with pytest.raises(PretrainError, match="76 positions.*has 64; accepted: a length smaller by 12"):
        objective, model, coprocessor, batch = setting(tiny, "gpt2", 30, 6)
        objective.loss(model, batch, coprocessor)
    _, model, _, method = trained()
    with pytest.raises(PretrainError, match="hidden_size 32: accepted: the model's, 16"):
        method.generate(tiny(hidden_size=16), IDS_BL)
    with pytest.raises(PretrainError, match="model_type llama: accepted: the model's, gpt2"):
        method.generate(tiny("gpt2"), IDS_BL)
    checkpoint.save(model, None, tmp_path / "plain")
    with pytest.raises(PretrainError, match="an ordinary model: accepted: a stage that trained with"):
        LatentDeliberation(str(tmp_path / "plain")).generate(model, IDS_BL)
    _, model, _, method = trained("gpt2")
    with pytest.raises(PretrainError, match="72 positions, prompt, latents and new tokens: accepted: at most 64"):
        method.generate(model, IDS_BL, max_new_tokens=60)
