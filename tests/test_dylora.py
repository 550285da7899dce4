"""DyLoRA: the rank of a step, the components that it trains, and truncation without training."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from closeness import assert_rounding, assert_same_model, products
from examples import trained
from peft import LoraConfig, PeftModel, get_peft_model
from policy_run import run, steps

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.core.models.families import new_model
from pretrain.core.models.heads import with_head
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.surgery import Inputs
from pretrain.surgery.adapters._adapters import adapters
from pretrain.surgery.adapters.dylora import rank_of
from pretrain.training.budget import Budget

dylora = method_class("dylora")
truncate = method_class("dylora_truncate")
lora = method_class("lora")
merge = method_class("merge_adapters")
IDS = torch.tensor([[1, 5, 9, 11, 40, 2]])


def logits(model, **given):
    with torch.no_grad():
        return model.eval()(IDS, **given).logits


def seed_of(rank, highest):
    """A seed at which the step's rank is this."""
    return next(seed for seed in range(1000) if rank_of(seed, 1, highest, None) == rank)


def test_at_its_highest_rank_it_is_lora(tiny) -> None:
    ours = trained(dylora(rank=4, alpha=6.0, targets=("q_proj", "v_proj"))(tiny()))
    config = LoraConfig(r=4, lora_alpha=6.0, target_modules=["q_proj", "v_proj"])
    theirs = get_peft_model(tiny(), config)
    for name, module in adapters(ours).items():
        layer = theirs.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = module.A.data, module.B.data
    assert_same_model(logits(ours), logits(theirs), ours)


@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_truncated_to_a_rank_it_computes_what_training_did_at_that_rank(tiny, family, frozen) -> None:
    method = dylora(rank=4, where="all", frozen=frozen)
    fields = {} if family == "llama" else {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    seen = []
    for rank in range(1, 5):
        model = trained(method(tiny(family, **fields)))
        torch.manual_seed(seed_of(rank, 4))
        expected = model.train()(IDS).logits
        cut = truncate(rank=rank)(model)
        assert_same_model(logits(cut), expected, model)
        assert all(p.shape[0] == rank for name, p in cut.named_parameters() if ".lora_A." in name)
        seen.append(expected)
    assert all((a - b).abs().max() > 1e-3 for a in seen for b in seen if a is not b)


@pytest.mark.parametrize("frozen", (False, True))
def test_a_step_sends_gradients_to_the_components_of_its_rank(tiny, frozen) -> None:
    model = trained(dylora(rank=4, where="all", frozen=frozen)(tiny())).train()
    for rank in range(1, 5):
        torch.manual_seed(seed_of(rank, 4))
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        wanted = {rank - 1} if frozen else set(range(rank))
        for module in adapters(model).values():
            assert set(module.A.grad.any(1).nonzero().flatten().tolist()) == wanted
            assert set(module.B.grad.any(0).nonzero().flatten().tolist()) == wanted
            assert module.layer.weight.grad is None


def test_frozen_components_get_the_gradient_that_they_get_unfrozen(tiny) -> None:
    made = {}
    for frozen in (False, True):
        model = trained(dylora(rank=4, frozen=frozen)(tiny())).train()
        torch.manual_seed(seed_of(3, 4))
        model(IDS, labels=IDS).loss.backward()
        made[frozen] = [module.A.grad for module in adapters(model).values()]
    terms, steps = products(model)
    for free, frozen in zip(*made.values(), strict=True):
        assert_rounding(frozen[2], free[2], terms, steps=3 * steps)  # two products backward for one forward


def test_ranks_cover_their_range_as_often_as_their_distribution_says() -> None:
    uniform = Counter(rank_of(seed, 2, 5, None) for seed in range(1200))
    assert set(uniform) == {2, 3, 4, 5} and max(abs(n / 300 - 1) for n in uniform.values()) < 0.15
    p = 0.4
    geometric = Counter(rank_of(seed, 1, 4, p) for seed in range(1200))
    weights = torch.tensor([p * (1 - p) ** b for b in range(4)])
    shares = torch.tensor([geometric[rank] / 1200 for rank in range(1, 5)])
    assert torch.allclose(shares, weights / weights.sum(), atol=0.04)


def test_all_layers_have_one_rank_and_no_random_number_is_used_up(tiny) -> None:
    model = dylora(rank=8, where="all")(tiny()).train()
    ranks = []
    for seed in range(12):
        torch.manual_seed(seed)
        model(IDS)
        after = torch.rand(3)
        torch.manual_seed(seed)
        assert torch.equal(torch.rand(3), after)
        (rank,) = {int(module.step_rank()) for module in adapters(model).values()}
        ranks.append(rank)
    assert len(set(ranks)) > 4


def small(prepared, method, **fields):
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2} | fields
    vocabulary = Vocabulary.of(load_tokenizer(prepared / "tokenizer"))
    return method(new_model("llama", fields, vocabulary=vocabulary, seed=1), Inputs(seed=3))


@pytest.fixture
def drawn(monkeypatch):
    """The ranks that training used, in the order of the layers' forward passes."""
    from pretrain.surgery.adapters import dylora as module

    ranks, original = [], module.DynamicLowRank.step_rank

    def step_rank(self):
        ranks.append(int(original(self)))
        return original(self)

    monkeypatch.setattr(module.DynamicLowRank, "step_rank", step_rank)
    return ranks


def test_training_draws_a_rank_a_step_for_its_micro_batches_and_recomputed_activations(
    prepared, tmp_path, drawn
) -> None:
    method, settings = dylora(targets=("q_proj",)), {"budget": Budget(steps=8), "micro_rows": 4}
    model = small(prepared, method)
    run(prepared, model, tmp_path / "a", **settings)
    plain, by_step = list(drawn), [set(drawn[i : i + 4]) for i in range(0, len(drawn), 4)]  # 2 layers, 2 micro-batches
    assert len(plain) == 32 and all(len(ranks) == 1 for ranks in by_step) and len(set(plain)) > 2
    drawn.clear()
    again = small(prepared, method)
    run(prepared, again, tmp_path / "b", checkpointing=True, **settings)
    assert len(drawn) == 64 and [set(drawn[i : i + 8]) for i in range(0, 64, 8)] == by_step
    state = again.state_dict()
    assert all(torch.allclose(tensor, state[name], atol=1e-5) for name, tensor in model.state_dict().items())
    spent = [b - a for a, b in pairwise(row["flops"] for row in steps(tmp_path / "a"))]
    assert max(spent) < 1.002 * min(spent)  # whatever the rank; batches differ a little in their number of targets


@pytest.mark.bits
def test_an_interrupted_training_ends_with_the_same_weights(prepared, tmp_path) -> None:
    method = dylora(frozen=True)
    whole = small(prepared, method, attention_dropout=0.1)
    run(prepared, whole, tmp_path / "whole", budget=Budget(steps=4), save_every=2)
    run(
        prepared, small(prepared, method, attention_dropout=0.1), tmp_path / "cut", budget=Budget(steps=2), save_every=2
    )
    resumed = small(prepared, method, attention_dropout=0.1)
    run(prepared, resumed, tmp_path / "cut", budget=Budget(steps=4), save_every=2)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


@pytest.mark.bits
def test_a_checkpoint_reopens_and_peft_opens_its_adapter(tiny, tmp_path) -> None:
    method = dylora(rank=3, where="all", distribution="geometric", frozen=True)
    model = trained(method(tiny(), Inputs(seed=1)))
    checkpoint.save(model, None, tmp_path / "c")
    again, _ = checkpoint.load(tmp_path / "c")
    assert torch.equal(logits(again), logits(model))
    assert {m.range for m in adapters(again).values()} == {(1, 3, 0.15)} and checkpoint.surgery_of(again)
    theirs = PeftModel.from_pretrained(tiny(), tmp_path / "c" / "adapter")
    assert_same_model(logits(theirs), logits(model), model)


def test_a_head_put_on_afterwards_keeps_the_ranks_and_is_trained(tiny) -> None:
    adapted = trained(dylora(rank=4)(tiny("bert", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)))
    model = with_head(adapted, "sequence", ("a", "b"), Vocabulary(97, pad=0, bos=1, eos=2), seed=5)
    made = []
    for rank in (1, 4):
        torch.manual_seed(seed_of(rank, 4))
        made.append(model.train()(IDS).logits)
    assert not torch.equal(*made) and torch.allclose(made[1], logits(model), atol=1e-6)
    cut = truncate(rank=1)(model)
    assert torch.allclose(logits(cut), made[0], atol=1e-6) and cut.classifier.weight.requires_grad


def test_what_does_not_fit_is_one_clear_error(tiny) -> None:
    with pytest.raises(PretrainError, match="dylora: lowest 0: accepted: 1 or more"):
        dylora(lowest=0)
    with pytest.raises(PretrainError, match="lowest 5, rank 4"):
        dylora(lowest=5, rank=4)
    with pytest.raises(PretrainError, match="distribution 'normal': accepted: uniform, geometric"):
        dylora(distribution="normal")
    with pytest.raises(PretrainError, match="p 1: accepted: above 0, below 1"):
        dylora(p=1)
    with pytest.raises(PretrainError, match="targets q_prj"):
        dylora(targets=("q_prj",))(tiny())
    with pytest.raises(PretrainError, match="has no DyLoRA"):
        truncate(rank=1)(lora(rank=2)(tiny()))
    adapted = dylora(lowest=2, rank=4)(tiny())
    for rank in (1, 5):
        with pytest.raises(PretrainError, match=f"rank {rank}: accepted: the trained ranks, 2 to 4"):
            truncate(rank=rank)(adapted)
    with pytest.raises(PretrainError, match="adapted already"):
        dylora()(adapted)
