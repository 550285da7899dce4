"""DupMAE: what the decoder may see, the three losses against plain loops, and that the encoder learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_bag_of_words import pieces_of
from test_objectives import VOCABULARY, context, rows
from test_training import small
from torch import nn

from pretrain.core.batch import Row, Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.objectives.retrieval.retromae_v2 import RetroMAEv2, contexts, pooled_scores
from pretrain.training.budget import Budget
from pretrain.training.loop import Settings


def parts_of(tiny, family="bert", **fields):
    model, objective = tiny(family), RetroMAEv2(**fields)
    torch.manual_seed(0)
    decoder = objective.modules(model).eval()
    return model, objective, decoder, objective.prepare(rows([20, 31], [45]), context(60))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_each_position_sees_its_own_sample_and_never_itself(whole, rate):
    rng = np.random.default_rng(0)
    tokens = np.concatenate([[1], rng.integers(27, 97, 40), [2]])
    visible = contexts(tokens, rate, VOCABULARY, rng, whole)
    assert visible[:, 0].all() and visible[:-1, -1].all() and not visible.diagonal()[1:].any()
    # Of 13 words hardly any are left at 80%, and some samples are the same.
    assert len({row.tobytes() for row in visible[1:-1]}) >= (35 if whole and rate > 0.5 else 40)
    hidden = ~visible[1:-1, 1:-1]
    np.fill_diagonal(hidden, False)
    wanted = round(rate * 40)
    if not whole:
        assert set(hidden.sum(1).tolist()) <= {wanted - 1, wanted}
        return
    # A position's own place is not counted as hidden; else the words fill what is wanted, but for a gap that no word fits.
    assert hidden.sum(1).max() <= wanted and hidden.sum(1).mean() > wanted - 1
    begins = VOCABULARY.starts_word_V[tokens]
    for i in range(40):
        for j in range(1, 40):
            if not begins[j + 1] and i not in (j, j - 1):
                assert hidden[i, j] == hidden[i, j - 1]


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_packed_documents_have_the_losses_of_each_alone(tiny, family):
    model, objective, decoder, batch = parts_of(tiny, family)
    with torch.no_grad():
        for layer in (decoder.query, decoder.key, decoder.value, decoder.output):
            layer.weight.mul_(20)  # so that attention and positions weigh in the loss
        (decoder.positions or model.base_model.embeddings.position_embeddings).weight.mul_(20)
    found = objective.loss(model, batch, decoder)
    masked, rebuilt, bags, words = 0.0, 0.0, [], 0
    for b, mine in pieces_of(batch):
        tokens, original = batch["tokens_BL"][b][mine], batch["original_BL"][b][mine]
        word = ~torch.from_numpy(VOCABULARY.special_V)[original]
        with torch.no_grad():
            out = model(tokens[None], output_hidden_states=True)
            logits, cls = out.logits[0], out.hidden_states[-1][0, :1]
            masked += F.cross_entropy(logits, batch["target_BL"][b][mine], reduction="sum")
            target = torch.bincount(original[word], minlength=97).clamp(max=1) / word.sum()
            bags.append(-(target * logits[1:].max(0).values.log_softmax(-1)).sum())
            layer = model.base_model.embeddings
            n = len(tokens)
            if family == "bert":
                query, memory = layer(inputs_embeds=cls.expand(1, n, -1)), layer(input_ids=original[None])
            else:
                table = decoder.positions.weight[:n]
                query = layer(inputs_embeds=(cls + table)[None])
                memory = layer(inputs_embeds=(layer.tok_embeddings(original) + table)[None])
            memory = torch.cat([cls[None], memory[:, 1:]], 1)
            states = decoder(query, memory, batch["visible_BLL"][b][mine][:, mine][None, None])
            scores = model.cls(states)[0] if family == "bert" else model.decoder(model.head(states))[0]
            rebuilt += F.cross_entropy(scores[word], original[word], reduction="sum")
            words += int(word.sum())
    expected = {"masked_lm": masked / batch["weight"], "decoder": rebuilt / words, "bag_of_words": sum(bags) / 3}
    for name, value in expected.items():
        assert float(found.parts[name]) == pytest.approx(float(value), rel=1e-4), name
    total = expected["masked_lm"] + expected["decoder"] + 0.1 * expected["bag_of_words"]
    assert found.value.item() == pytest.approx(float(total), rel=1e-4)


def test_the_decoder_is_torchs_attention_and_feed_forward(tiny):
    *_, decoder, batch = parts_of(tiny)
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    with torch.no_grad():
        for layer in (decoder.query, decoder.key, decoder.value, decoder.output):
            nn.init.normal_(layer.bias)
        attention.in_proj_weight.copy_(torch.cat([m.weight for m in (decoder.query, decoder.key, decoder.value)]))
        attention.in_proj_bias.copy_(torch.cat([m.bias for m in (decoder.query, decoder.key, decoder.value)]))
        attention.out_proj.load_state_dict(decoder.output.state_dict())
        query, memory = torch.randn(1, 60, 32), torch.randn(1, 60, 32)
        visible = batch["visible_BLL"][:1]
        mixed, _ = attention(query, memory, memory, attn_mask=~visible[0])
        x = decoder.attention_norm(query + mixed)
        expected = decoder.norm(x + decoder.down(F.gelu(decoder.up(x))))
        assert torch.allclose(decoder(query, memory, visible[:, None]), expected, atol=1e-5)


def test_a_rebuilt_token_depends_on_the_cls_state_and_on_what_is_visible_only(tiny):
    _, _, decoder, batch = parts_of(tiny)
    i, visible = 7, batch["visible_BLL"][:1]
    torch.manual_seed(0)
    query, memory = torch.randn(1, 60, 32), torch.randn(1, 60, 32, requires_grad=True)
    grad = torch.autograd.grad(decoder(query, memory, visible[:, None])[0, i].square().sum(), memory)[0][0]
    reached = grad.abs().sum(-1) > 0
    assert torch.equal(reached, visible[0, i]) and reached[0] and not reached[i] and not reached[20:].any()


def test_the_decoders_loss_reaches_the_encoder_through_the_cls_states_only(tiny):
    model, objective, decoder, batch = parts_of(tiny)
    states = torch.randn(2, 60, 32).requires_grad_()
    grad = torch.autograd.grad(objective._rebuild(model, decoder, states, batch), states)[0]
    first = (batch["position_BL"] == 0) & (batch["document_BL"] > 0)
    assert torch.equal(grad.abs().sum(-1) > 0, first)


def test_the_bags_scores_come_from_all_tokens_but_the_cls(tiny):
    model, _, _, batch = parts_of(tiny)
    states = torch.randn(2, 60, 32).requires_grad_()
    scores = pooled_scores(model, states, batch)
    grad = torch.autograd.grad(scores.sum(), states)[0].abs().sum(-1) > 0
    first = (batch["position_BL"] == 0) & (batch["document_BL"] > 0)
    assert scores.shape == (3, 97) and not grad[first].any() and not grad[batch["document_BL"] == 0].any()
    assert grad.any(-1).all()


def test_the_scores_of_one_piece_alone_are_held(tiny):
    """Of a piece of n tokens the backward pass keeps V numbers, not n · V; the gradients are those of a plain maximum."""
    model, objective, _, _ = parts_of(tiny)
    batch = objective.prepare(rows(*[[200]] * 8), context(200))
    states = torch.randn(8, 200, 32).requires_grad_()
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scores = pooled_scores(model, states, batch)
    weight, bias = model.get_output_embeddings().weight, model.get_output_embeddings().bias
    # The states once, the head, and one place (64 bits) for each entry of the vocabulary and piece.
    allowed = states.nbytes + weight.nbytes + 8 * 8 * 97
    assert sum(kept.values()) <= 1.1 * allowed < 8 * 199 * 97 * 4
    found = torch.autograd.grad(scores.square().sum(), states)[0]
    whole = torch.nn.functional.linear(states[:, 1:], weight, bias).amax(1)
    assert torch.allclose(scores, whole, atol=1e-6)
    assert torch.allclose(found, torch.autograd.grad(whole.square().sum(), states)[0], atol=1e-5)


def test_a_piece_of_a_single_token_does_no_harm(tiny):
    model, objective, decoder, _ = parts_of(tiny)
    row = Row(np.arange(30, 41, dtype=np.int32), np.array([0, 10], np.int32), np.array([0, 1]), 0, 0)
    found = objective.loss(model, objective.prepare([row], context(16)), decoder)
    found.value.backward()
    assert torch.isfinite(found.value) and all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_every_parameter_learns_and_the_losses_fall(tiny, family):
    model, objective, decoder, batch = parts_of(tiny, family)
    optimizer = torch.optim.AdamW([*model.train().parameters(), *decoder.train().parameters()], lr=1e-2)
    history = []
    for step in range(40):
        torch.manual_seed(1)
        found = objective.loss(model, batch, decoder)
        found.value.backward()
        assert step or all(p.grad is not None for p in [*model.parameters(), *decoder.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: float(part) for name, part in found.parts.items()})
    last, first = history[-1], history[0]
    assert last["masked_lm"] < 0.3 * first["masked_lm"] and last["decoder"] < 0.8 * first["decoder"]
    assert last["bag_of_words"] < 0.9 * first["bag_of_words"]


@pytest.mark.bits
def test_a_training_resumes_bit_for_bit_and_keeps_no_decoder(prepared, tiny, tmp_path):
    def run(folder, steps):
        settings = Settings(budget=Budget(steps=steps), save_every=2, bar=False)
        torch.manual_seed(0)
        return small(prepared, tiny, folder, settings=settings, objective=RetroMAEv2(), micro_rows=4, family="bert")

    whole = run(tmp_path / "a", 4)
    run(tmp_path / "b", 2)
    resumed = run(tmp_path / "b", 4)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.trainee.state_dict().values(), resumed.trainee.state_dict().values(), strict=True)
    )
    assert whole.model.state_dict().keys() == tiny("bert").state_dict().keys()


@pytest.mark.parametrize("fields", [{"rate": 0.0}, {"decoder_rate": 1.0}, {"bag_weight": -1.0}])
def test_a_wrong_field_is_named(fields):
    with pytest.raises(PretrainError, match=f"retromae_v2: {next(iter(fields))} .*accepted"):
        RetroMAEv2(**fields)


def test_a_tokenizer_that_lacks_what_is_needed_is_named():
    for vocabulary, what in ((Vocabulary(97, pad=0, bos=1), "mask"), (Vocabulary(97, pad=0, mask=3), "cls")):
        with pytest.raises(PretrainError, match=f"retromae_v2.*accepted: a tokenizer made with {what}"):
            RetroMAEv2().prepare(rows([20]), context(vocabulary=vocabulary))
