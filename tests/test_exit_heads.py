"""Exit heads: trained beside a model that stays as it is, kept in checkpoints, used by the softmax cascade."""

from __future__ import annotations

import pytest
import torch
from decoding_cases import learnt, prompt

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.decoding.ensembles._cascade import measure
from pretrain.decoding.ensembles.softmax_cascade import NEVER, SoftmaxCascade
from pretrain.surgery import Inputs
from pretrain.surgery.architecture.exit_heads import ExitHeads


def rows(model, seed=0):
    """What the model itself would write, four rows of two documents each."""
    torch.manual_seed(seed)
    starts_BL = torch.randint(3, 20, (8, 1))
    ids_BL = model.generate(starts_BL, max_new_tokens=11, do_sample=True, eos_token_id=None, pad_token_id=0)
    document_BL = torch.tensor([[1] * 12 + [2] * 12] * 4)
    position_BL = torch.arange(12).repeat(4, 2)
    return {"input_ids": ids_BL.view(4, 24), "attention_mask": document_BL, "position_ids": position_BL}


@pytest.mark.bits
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_exits_learn_the_model_does_not_change_and_a_checkpoint_keeps_both(tiny, family, tmp_path):
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    model = learnt(tiny(family, **{depth: 3}), 30)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches, ids_1L = [rows(model, seed) for seed in range(4)], prompt(6, 0, 20)
    plain = model(ids_1L).logits
    inputs = Inputs(batches=batches)
    made = ExitHeads(epochs=3, lr=3e-3)(model, inputs)
    for name, tensor in before.items():
        assert torch.equal(made.state_dict()[name], tensor)
    assert torch.equal(made(ids_1L).logits, plain)
    assert all(part.requires_grad and part.grad is None for part in made.exit_heads.parameters()) and not made.training
    metrics = inputs.extra["metrics"]
    for number in (1, 2):
        assert metrics[f"exit_{number}_loss"] < metrics[f"exit_{number}_loss_before"] - 0.01
    checkpoint.save(made, None, tmp_path / "made", {})
    again, *_ = checkpoint.load(tmp_path / "made")
    assert torch.equal(again(ids_1L).logits, plain)
    for ours, theirs in zip(made.exit_heads.parameters(), again.exit_heads.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    method = SoftmaxCascade(thresholds=(0.4, 0.5))
    one, other = (method.trace(m, ids_1L, max_new_tokens=12) for m in (made, again))
    assert torch.equal(one.tokens_BN, other.tokens_BN) and one.depths == other.depths


def test_the_cascade_asks_the_trained_maps(tiny):
    model = learnt(tiny(num_hidden_layers=3), 10)
    identity = ExitHeads(exits=(2,)).restore(learnt(tiny(num_hidden_layers=3), 10))
    batch, ids_1L = rows(model), prompt(6, 0, 20)
    assert SoftmaxCascade().depths(identity) == (2,) and SoftmaxCascade().depths(model) == (1, 2)
    bare = measure(model, [batch], (2,))
    for ours, theirs in zip(measure(identity, [batch], (2,)), bare, strict=True):
        assert torch.allclose(ours.float(), theirs.float(), atol=1e-6)
    with torch.no_grad():
        identity.exit_heads["2"].weight.zero_()
        identity.exit_heads["2"].bias.copy_(model.model.embed_tokens.weight[5] * 0 + model.lm_head.weight[5])
    confidence_MN, _ = measure(identity, [batch], (2,))
    assert confidence_MN[0].unique().numel() == 1 and torch.allclose(confidence_MN[1], bare[0][1], atol=1e-6)
    found = SoftmaxCascade(thresholds=(0.0,)).trace(identity, ids_1L, max_new_tokens=4)
    norm = model.model.norm
    assert found.tokens_BN[0, -3:].tolist() == [int(model.lm_head(norm(model.lm_head.weight[5])).argmax())] * 3
    plain = SoftmaxCascade(exits=(2,), thresholds=(NEVER,))
    more = plain.trace(identity, ids_1L, max_new_tokens=3).macs - plain.trace(model, ids_1L, max_new_tokens=3).macs
    assert more == 2 * 32 * 32  # the map's own operations
    with pytest.raises(PretrainError, match=r"exits \(1,\): accepted: the trained ones among \(2,\)"):
        SoftmaxCascade(exits=(1,), thresholds=(0.5,)).generate(identity, ids_1L)


def test_mistakes_are_refused(tiny):
    model = tiny()
    batch = Inputs(batches=[{"input_ids": prompt(8, 0)}])
    with pytest.raises(PretrainError, match="exit_heads: it needs text to calibrate on"):
        ExitHeads()(model)
    with pytest.raises(PretrainError, match=r"exits \(2,\): accepted: rising numbers of blocks from 1 to 1"):
        ExitHeads(exits=(2,))(model, batch)
    with pytest.raises(PretrainError, match="BertForMaskedLM: accepted: a causal language model of llama, gpt2"):
        ExitHeads()(tiny("bert"), batch)
    with pytest.raises(PretrainError, match="has exit heads already"):
        ExitHeads()(ExitHeads(epochs=1)(model, batch), batch)
    for fields, message in (({"epochs": 0}, "epochs 0: accepted"), ({"lr": 0.0}, "lr 0.0: accepted: above 0")):
        with pytest.raises(PretrainError, match=message):
            ExitHeads(**fields)
