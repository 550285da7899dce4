"""The load-balancing loss of mixtures of experts: that of `transformers`, added to what is trained and not to what is told."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import zoo
from examples_training import Material
from policy_run import run, steps

from pretrain.core.batch import Context, Row, Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import new_model
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.policies.experts.router_balance import RouterBalance
from pretrain.training.budget import Budget
from pretrain.training.running import Trainee

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "jetmoe", "ernie4_5_moe")
VOCABULARY = Vocabulary(97, pad=0, bos=1, eos=2)


@pytest.fixture(scope="module")
def material(prepared, stories, tmp_path_factory):
    return Material(prepared, tmp_path_factory.mktemp("material"), stories)


def mixture(kind, **fields):
    return new_model(
        kind, zoo.fields(kind) | {"vocab_size": 97} | fields, task="causal", vocabulary=VOCABULARY, seed=1
    ).eval()


def batch_of(lengths, length=12):
    """Rows of one document each, the rest of them padding."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in lengths:
        tokens = torch.randint(3, 97, (number,), generator=generator).numpy().astype(np.int32)
        rows.append(Row(tokens, np.array([0]), np.array([len(rows)]), 0, len(rows)))
    return CausalLM().prepare(rows, Context(VOCABULARY, length, np.random.default_rng(0)))


@pytest.mark.parametrize("kind", MIXTURES)
def test_loss_and_gradient_are_those_of_transformers_with_router_logits(kind):
    model = mixture(kind, **{"aux_loss_coef" if kind == "jetmoe" else "router_aux_loss_coef": 0.37})
    twin, batch = copy.deepcopy(model), batch_of([12, 7, 9])
    trainee = Trainee(model, [CausalLM()], [1.0], [RouterBalance()])
    value, (loss,) = trainee([batch], [{"weight": 1.0}])
    mask_BL = (batch["document_BL"] != 0).long()
    labels_BL = batch["tokens_BL"].masked_fill(mask_BL == 0, -100)
    theirs = twin(input_ids=batch["tokens_BL"], attention_mask=mask_BL, labels=labels_BL, output_router_logits=True)
    torch.testing.assert_close(loss.parts["router_balance"], theirs.aux_loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value, theirs.loss, rtol=1e-5, atol=1e-6)
    plain = CausalLM().loss(copy.deepcopy(twin), batch).value
    torch.testing.assert_close(loss.logged[""], plain.detach())
    value.backward()
    theirs.loss.backward()
    for (name, ours), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(ours.grad, other.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["mixtral", "jamba", "granitemoehybrid"])
def test_of_packed_documents_it_is_that_of_their_tokens_alone(kind):
    """Of a type that cannot keep them apart in a row, and is given them one by one, too."""
    model, tokens, ends = (
        mixture(kind, **({"num_hidden_layers": 8} if kind == "jamba" else {})),
        np.arange(3, 13).astype(np.int32),
        np.array([4, 5]),
    )
    packed = Row(tokens, np.array([0, 7]), ends, 0, 0)
    alone = [Row(tokens[:7], np.array([0]), ends[:1], 0, 0), Row(tokens[7:], np.array([0]), ends[1:], 0, 1)]
    sums = []
    for rows in ([packed], alone):
        batch = CausalLM().prepare(rows, Context(VOCABULARY, 12, np.random.default_rng(0)))
        _, (loss,) = Trainee(model, [CausalLM()], [1.0], [RouterBalance()])([batch], [{"weight": 1.0}])
        sums.append(loss.parts["router_balance"])
    torch.testing.assert_close(*sums)


def test_what_is_held_in_padding_and_in_its_checkpointed_pass_changes_nothing():
    batch = batch_of([12, 7, 9])
    longer = {name: each.clone() for name, each in batch.items()}
    longer["tokens_BL"][batch["document_BL"] == 0] = 5
    sums = []
    for each, checkpointing in ((batch, False), (longer, False), (batch, True)):
        model = mixture("mixtral").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        value, (loss,) = Trainee(model, [CausalLM()], [1.0], [RouterBalance(0.5)])([each], [{"weight": 1.0}])
        value.backward()
        sums.append((value.detach(), loss.parts["router_balance"], model.get_input_embeddings().weight.grad))
    for other in sums[1:]:
        for ours, theirs in zip(sums[0][:2], other[:2], strict=True):
            torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(sums[0][2], sums[2][2])


def test_a_training_shares_the_tokens_out_and_tells_the_loss_of_the_text(material, tmp_path):
    """From routers that send nearly all to one expert; by micro-batches, and nothing is watched afterwards."""
    ends = {}
    for name, policies in (("with", [RouterBalance(1.0)]), ("without", [RouterBalance(0.0)])):
        fields = zoo.fields("mixtral") | {"num_experts_per_tok": 1, "vocab_size": 512}
        model = new_model("mixtral", fields, task="causal", vocabulary=Vocabulary.of(material.tokenizer), seed=1)
        run(material.prepared, model, tmp_path / name, *policies, budget=Budget(steps=12), micro_rows=4, log_every=1)
        rows = steps(tmp_path / name)
        assert not any(module._forward_hooks for module in model.modules())
        ends[name] = rows[-1]["parts"]["router_balance"]
        assert all(row["parts"]["router_balance"] >= 0.999 for row in rows)
        if name == "with":
            first = rows[0]["loss"]
        else:
            assert rows[0]["loss"] == pytest.approx(first, abs=1e-4)  # the log's loss is without it
    assert ends["with"] < ends["without"]


def test_what_it_cannot_balance_is_one_line(tiny):
    with pytest.raises(
        PretrainError, match="router_balance: LlamaForCausalLM: accepted: a mixture of experts .*mixtral"
    ):
        Trainee(tiny(), [CausalLM()], [1.0], [RouterBalance()])
    model = mixture("mixtral")
    vars(model.config)["router_aux_loss_coef"] = None
    with pytest.raises(PretrainError, match="router_balance: weight: the checkpoint has no router_aux_loss_coef"):
        Trainee(model, [CausalLM()], [1.0], [RouterBalance()])
    with pytest.raises(PretrainError, match="router_balance: weight -1: accepted: 0 or more"):
        RouterBalance(-1)
