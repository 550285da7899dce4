"""The router's training: the authors' loss, the dense model as teacher, and a router that learns what it is shown."""

from __future__ import annotations

import copy

import pytest
import torch
from test_objectives import context, rows
from test_read_me import SMALL, mixed, plainly, text
from test_training import small

from pretrain.core.errors import PretrainError
from pretrain.core.models.attention import attend
from pretrain.core.models.families import base, blocks
from pretrain.objectives.distillation.read_me_router import ReadMeRouter, distinct
from pretrain.surgery.experts.read_me import ReadMe, dense, inside, mixtures, router_of
from pretrain.training.budget import Budget
from pretrain.training.loop import Settings


def values_of(plain, batch):
    """What goes into each `down_proj` of a dense model."""
    seen = []
    handles = [
        block.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for block in blocks(plain)
    ]
    with torch.no_grad():
        base(plain)(input_ids=batch["tokens_BL"], **attend(plain, batch, causal=True))
    for handle in handles:
        handle.remove()
    return seen


def authors_loss(value_NF, logit_NX, mask_XF):
    """`loss_func` of the authors' `train_red.py` in its steps: masks are of the neurons that not all experts have."""
    number = int(mask_XF[0].sum())
    ranks = [number - 1, int(number / 5 * 4), int(number / 5 * 3), int(number / 5 * 2), int(number / 5)]
    weight_NF, ordered_NF = torch.zeros_like(value_NF), value_NF.sort(-1, descending=True).values
    for rank in ranks:
        weight_NF += (value_NF > ordered_NF[..., rank, None]).float()
    likeness_NX = weight_NF @ mask_XF.T.float() / 3 / number  # divided last, so that equal counts stay equal
    likeness_NX = (likeness_NX - likeness_NX.mean()) * 10
    soft = -(likeness_NX.softmax(-1) * logit_NX.log_softmax(-1)).sum() / len(value_NF)
    label_N = likeness_NX.argmax(-1)
    hard = torch.nn.CrossEntropyLoss(label_smoothing=0.5)(logit_NX, label_N)
    return 0.75 * hard + 0.25 * soft, (label_N == logit_NX.argmax(-1)).float().mean()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_loss_is_the_authors_summed_over_blocks(tiny, name, checkpointing):
    plain = plainly(tiny, name)
    model = ReadMe(**SMALL)(copy.deepcopy(plain), text()).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective = ReadMeRouter()
    objective.modules(model)
    batch = objective.prepare(rows([20, 31], [45]), context(60))
    result = objective.loss(model, batch)
    router = router_of(model, "test")
    with dense(model, "test"):
        base(model)(input_ids=batch["tokens_BL"], **attend(model, batch, causal=True))
        logit_BLX = router(router.given)
    inside_BL = batch["document_BL"] != 0
    assert int(batch["weight"]) == 96 == int(inside_BL.sum())
    losses, accuracies = zip(
        *(
            authors_loss(value[inside_BL], logit_BLX[inside_BL], distinct(ffn.members_XM, ffn.neurons))
            for value, ffn in zip(values_of(plain, batch), mixtures(model), strict=True)
        ),
        strict=True,
    )
    torch.testing.assert_close(result.value, sum(losses), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.parts["accuracy"], torch.stack(accuracies).mean())
    torch.testing.assert_close(result.nll_BL.sum() / 96, result.value.detach())
    learnt = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in learnt} == {id(p) for p in router.parameters()}
    wanted = torch.autograd.grad(sum(losses), learnt)
    for ours, theirs in zip(torch.autograd.grad(result.value, learnt), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_the_dense_model_teaches_whatever_the_router_says(tiny):
    model = mixed(tiny)
    objective = ReadMeRouter()
    batch = objective.prepare(rows([20, 31]), context(60))
    first = values_of(plainly(tiny), batch)
    seen = []
    for ffn in mixtures(model):
        ffn.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    objective.loss(model, batch)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, first, strict=True))
    router = router_of(model, "test")
    assert (
        router.choosing
        and router.given is None
        and not any(
            ffn.down_proj._forward_pre_hooks and len(ffn.down_proj._forward_pre_hooks) > 1 for ffn in mixtures(model)
        )
    )


def test_only_the_router_moves_and_it_learns(tiny, prepared, tmp_path):
    model = ReadMe(**SMALL)(plainly(tiny, vocab_size=512), text())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = Settings(budget=Budget(steps=30), bar=False, save_every=0)
    done = small(prepared, lambda *_, **__: model, tmp_path, settings=settings, objective=ReadMeRouter())
    after = done.trainee.model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        name for name in after if ".router." in name
    }
    objective = ReadMeRouter()
    batch = objective.prepare(rows([60], [50]), context(60))
    taught = objective.loss(done.trainee.model, batch)
    fresh = objective.loss(ReadMe(**SMALL)(plainly(tiny, vocab_size=512), text()), batch)
    assert bool(taught.value < fresh.value)


def test_a_block_whose_experts_are_the_same_teaches_nothing(tiny):
    model = mixed(tiny)
    objective = ReadMeRouter()
    batch = objective.prepare(rows([30]), context(40))
    mixtures(model)[0].members_XM[:] = mixtures(model)[0].members_XM[0]
    objective.modules(model)
    alone = objective.loss(model, batch)
    likeness = objective.likeness(values_of(plainly(tiny), batch)[1], mixtures(model)[1].members_XM)
    assert objective.likeness(torch.zeros(1, 2, 48), mixtures(model)[0].members_XM) is None
    router = router_of(model, "test")
    with dense(model, "test"), torch.no_grad():
        base(model)(input_ids=batch["tokens_BL"], **attend(model, batch, causal=True))
        log_BLX = router(router.given).log_softmax(-1)
    nll_BL = -(objective.target(likeness) * log_BLX).sum(-1)
    torch.testing.assert_close(alone.value, nll_BL[:, :30].mean(), atol=1e-5, rtol=1e-5)
    mixtures(model)[1].members_XM[:] = mixtures(model)[1].members_XM[0]
    with pytest.raises(PretrainError, match="experts of the same neurons: accepted: two experts or more, that differ"):
        objective.modules(model)


def test_neurons_of_all_experts_count_for_none(tiny):
    members_XM = torch.tensor([[0, 1, 2], [1, 2, 4], [1, 2, 5]])
    assert inside(members_XM, 6).sum(1).tolist() == [3, 3, 3]
    assert distinct(members_XM, 6).nonzero().tolist() == [[0, 0], [1, 4], [2, 5]]


def test_a_model_without_a_router_is_refused(tiny):
    with pytest.raises(
        PretrainError, match="read_me_router: the model has no router: accepted: one that the surgery read_me"
    ):
        ReadMeRouter().modules(tiny())
    with pytest.raises(PretrainError, match="experts of the same neurons: accepted: two experts or more"):
        ReadMeRouter().modules(mixed(tiny, domains=1))
    with pytest.raises(PretrainError, match="alpha 2.0: accepted: from 0 to 1"):
        ReadMeRouter(alpha=2.0)
