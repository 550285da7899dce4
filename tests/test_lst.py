"""Ladder side-tuning: the side network's arithmetic, its cut from the backbone, what is saved for its gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from examples import trained

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary, document_mask
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.core.models.families import at, attention_inputs, base, blocks, embeddings, family, hidden
from pretrain.core.models.heads import with_head
from pretrain.surgery import Inputs

lst = method_class("lst")
VOCABULARY = Vocabulary(97, pad=0, bos=1, eos=2)
IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
CAUSAL = ("llama", "qwen3", "gpt2")
FAMILIES = (*CAUSAL, "bert")


def deep(tiny, name, layers=3, **fields):
    return tiny(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": layers}, **fields)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits


def tensors(model, batch=IDS):
    """All that autograd saves in a forward pass, without parameters, one of each storage; and its bytes."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = base(model)(batch).last_hidden_state.square().mean()
    loss.backward()
    return list(found.values()), sum(t.untyped_storage().nbytes() for t in found.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_cut_at_no_reduction_and_fed_by_itself_the_side_network_is_the_backbone(tiny, name) -> None:
    model = deep(tiny, name, seed=3)
    for part in model.parameters():  # biases and norms too, so that a wrong place shows
        part.data += 0.02 * torch.randn(part.shape, generator=torch.Generator().manual_seed(part.numel()))
    before = logits(model)
    sided = lst(reduction=1, alpha=100.0, drop_every=0)(model)
    first, last = blocks(sided)[0].side_first, blocks(sided)[-1].side_up
    for layer in (first, last):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    assert torch.allclose(logits(sided), before, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_at_first_each_side_block_gets_half_its_state_and_half_the_backbones_projected(tiny, name) -> None:
    plain = deep(tiny, name, 4)
    sided = lst(reduction=4, drop_every=2)(copy.deepcopy(plain))
    seen = {}
    for depth, block in enumerate(blocks(sided)):
        if block.side is not None:
            block.side.register_forward_hook(lambda _, args, out, d=depth: seen.update({d: (args[0], out)}))
    with torch.no_grad():
        states = plain(IDS, output_hidden_states=True).hidden_states  # the last is normed: no block with it is read
        out = hidden(sided, input_ids=IDS) if name != "bert" else base(sided)(IDS).last_hidden_state
    assert list(seen) == [1, 3] and blocks(sided)[0].side is None
    first, last = blocks(sided)[0], blocks(sided)[-1]
    expected = (first.side_first(states[0]) + blocks(sided)[1].side_down(states[2])) / 2
    assert torch.allclose(seen[1][0], expected, atol=1e-6)
    assert seen[1][0].shape[-1] == 8
    assert torch.allclose(out, last.side_up(last.side_norm(seen[3][1])), atol=1e-6)
    blocks(sided)[1].side_alpha.data.fill_(0.05)  # over a temperature of 0.1
    with torch.no_grad():
        base(sided)(IDS)
    gate = torch.sigmoid(torch.tensor(0.5))
    expected = gate * first.side_first(states[0]) + (1 - gate) * blocks(sided)[1].side_down(states[2])
    assert torch.allclose(seen[1][0], expected, atol=1e-6)


@pytest.mark.parametrize("name", ("llama", "qwen3", "gpt2"))
def test_what_matters_little_is_cut_and_the_attention_of_the_rest_is_the_backbones(tiny, name) -> None:
    """Half of the width and of each head is zero in the backbone: the side block must be what is left."""
    model = deep(tiny, name, 2, seed=1)
    block, entry = blocks(model)[0], family(model)
    attention = at(block, entry.attention)
    torch.manual_seed(0)
    width = torch.randperm(32)[:16].sort().values
    heads, shared, dim = 4, 2 if name != "gpt2" else 4, 8
    gone = torch.ones(32, dtype=torch.bool)
    gone[width] = False
    embeddings(model).weight.data[:, gone] *= 1e-3
    pairs = torch.tensor([1, 3, 5, 7]) if name != "gpt2" else torch.tensor([0, 2, 3, 7])
    values = torch.tensor([[0, 1, 4, 6], [2, 3, 5, 7], [0, 1, 2, 3], [4, 5, 6, 7]])[:shared]
    with torch.no_grad():
        lost = torch.ones(dim, dtype=torch.bool)
        lost[pairs] = False
        lost_value = torch.ones(shared, dim, dtype=torch.bool).scatter(1, values, False)
        if name == "gpt2":
            fused = attention.c_attn
            q, k, v = (w.view(32, heads, dim) for w in fused.weight.split(32, dim=1))
            fused.bias.zero_()
            q[:, :, lost] = 0
            k[:, :, lost] = 0
            v[:, lost_value] = 0
            fused.weight[gone] = 0
            attention.c_proj.weight.view(heads, dim, 32)[lost_value] = 0
            attention.c_proj.weight[:, gone] = 0
        else:
            for layer in (attention.q_proj, attention.k_proj):
                layer.weight.view(-1, dim, 32)[:, lost] = 0
            attention.v_proj.weight.view(shared, dim, 32)[lost_value] = 0
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
                layer.weight[:, gone] = 0
            attention.o_proj.weight.view(32, heads, dim)[:, lost_value.repeat_interleave(2, dim=0)] = 0
            attention.o_proj.weight[gone] = 0
    plain = copy.deepcopy(model)
    sided = lst(reduction=2, drop_every=0)(model)
    narrow = at(blocks(sided)[0].side, entry.attention)
    with torch.no_grad():  # a head half as wide divides its scores by less; qwen3 norms queries and keys over its width
        if name == "gpt2":
            narrow.c_attn.weight[:, :16] /= 2**0.5
        elif name == "llama":
            narrow.q_proj.weight /= 2**0.5
        else:
            narrow.scaling = dim**-0.5
            for one, weight in ((narrow, 2**0.5), (at(blocks(plain)[0], entry.attention), 1.0)):
                for norm in (one.q_norm, one.k_norm):
                    norm.variance_epsilon = 0
                    norm.weight.fill_(weight)
    x = torch.randn(2, 6, 32)
    tables = {}
    if name != "gpt2":
        cos, sin = base(plain).rotary_emb(x, torch.arange(6)[None])
        tables["position_embeddings"] = (cos, sin)
    mask = torch.full((6, 6), -1e9).triu(1)[None, None]
    with torch.no_grad():
        wide_out = at(blocks(plain)[0], entry.attention)(x, attention_mask=mask, **tables)[0]
        if tables:
            kept = blocks(sided)[0].side_rotary_D
            assert kept.tolist() == [1, 3, 5, 7]
            tables["position_embeddings"] = (cos[..., kept], sin[..., kept])
        out = narrow(x[..., width], attention_mask=mask, **tables)[0]
    assert torch.allclose(out, wide_out[..., width], atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_gradient_enters_the_backbone_and_nothing_of_its_inside_is_saved(tiny, name) -> None:
    ids = torch.randint(3, 97, (4, 24), generator=torch.Generator().manual_seed(1))
    wide = {"n_embd": 64, "n_inner": 96} if name == "gpt2" else {"hidden_size": 64, "intermediate_size": 96}
    full = deep(tiny, name, **wide)
    _, whole = tensors(full, ids)
    sided = lst(reduction=4, drop_every=0)(deep(tiny, name, **wide))
    saved, some = tensors(sided, ids)
    states = [t for t in saved if t.numel() == 4 * 24 * 64]
    # Of each block its output, for the projection's gradient; the embeddings for the first; and the loss's input.
    assert len(states) == 3 + 1 + 1
    assert some < 0.45 * whole
    grown = {n for n, p in sided.named_parameters() if p.grad is not None}
    assert grown and grown == {n for n, p in sided.named_parameters() if p.requires_grad}
    assert all(".side" in n for n in grown)
    start = embeddings(sided).weight.detach()[ids].requires_grad_(True)
    base(sided)(inputs_embeds=start).last_hidden_state.sum().backward()
    assert start.grad is None


@pytest.mark.parametrize("name", CAUSAL)
def test_generation_with_a_cache_is_generation_without(tiny, name) -> None:
    model = trained(lst(reduction=4, drop_every=2)(deep(tiny, name)))
    more = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    asked = {"output_scores": True, "return_dict_in_generate": True}
    with_cache, without = (model.generate(IDS, use_cache=cache, **more, **asked) for cache in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    for ours, theirs in zip(with_cache.scores, without.scores, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert len(with_cache.past_key_values.layers) == 3 + 1  # blocks 0 and 2 have no side block
    beams = [model.generate(IDS, use_cache=cache, num_beams=3, **more) for cache in (True, False)]
    assert torch.equal(*beams)
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), IDS], dim=1)
    mask = (padded != 0).long()
    left = model.generate(padded, attention_mask=mask, **more)
    assert torch.equal(left[:, 15:], with_cache.sequences[:, 11:])
    static = model.generate(IDS, cache_implementation="static", **more)
    assert torch.equal(static, with_cache.sequences)


@pytest.mark.bits
@pytest.mark.parametrize("name", ("llama", "gpt2"))
def test_checkpointed_activations_give_the_same_gradients_and_packed_documents_stay_apart(tiny, name) -> None:
    still = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
    model = lst(reduction=4, drop_every=2)(deep(tiny, name, **still)).train()
    documents = torch.tensor([[1] * 5 + [2] * 6]).expand(2, -1)
    positions = torch.tensor([[*range(5), *range(6)]]).expand(2, -1)
    given = attention_inputs(model, document_mask(documents, causal=True), positions)

    def gradients():
        model.zero_grad()
        hidden(model, input_ids=IDS, **given).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients()
    assert plain and all(torch.allclose(again[n], plain[n], atol=1e-6) for n in plain)
    model.eval()
    other = IDS.clone()
    other[:, :5] = 7
    with torch.no_grad():
        one, two = (hidden(model, input_ids=ids, **given)[:, 5:] for ids in (IDS, other))
        alone = hidden(model, input_ids=IDS[:, 5:], use_cache=False)
    assert torch.equal(one, two) and torch.allclose(one, alone, atol=1e-5)


def test_states_that_transformers_collects_are_the_backbones(tiny) -> None:
    plain = deep(tiny, "llama")
    sided = lst(reduction=4, drop_every=0)(copy.deepcopy(plain))
    sided.set_attn_implementation("eager")
    with torch.no_grad():
        ours, theirs = (m(IDS, output_hidden_states=True, output_attentions=True) for m in (sided, plain))
    assert len(ours.hidden_states) == 4 and len(ours.attentions) == 3
    for one, other in zip(ours.hidden_states[:3], theirs.hidden_states[:3], strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_text_makes_the_fisher_information_decide(tiny) -> None:
    model = deep(tiny, "llama", 2)
    blocks(model)[0].input_layernorm.weight.data.copy_(torch.arange(32.0))  # what is cut from it says which places stay
    documents = torch.tensor([[1] * 5 + [2] * 6, [1] * 8 + [0] * 3])
    positions = torch.tensor([[*range(5), *range(6)], [*range(8), *range(3)]])
    batch = {"input_ids": IDS, "attention_mask": documents, "position_ids": positions}
    pieces = [IDS[:1, :5], IDS[:1, 5:], IDS[1:, :8]]
    plain = copy.deepcopy(model)
    sum(plain(piece, labels=piece).loss * (piece.shape[1] - 1) for piece in pieces).div(4 + 5 + 7).backward()
    scores = {"auto": embeddings(plain).weight.grad.square(), "magnitude": embeddings(plain).weight.abs()}
    for importance, score in scores.items():
        method = lst(reduction=4, drop_every=0, importance=importance)
        sided = method(copy.deepcopy(model), Inputs(batches=[batch]))
        kept = blocks(sided)[0].side.input_layernorm.weight.tolist()
        assert kept == score.sum(0).topk(8).indices.sort().values.float().tolist()
        assert not any(p.requires_grad or p.grad is not None for n, p in sided.named_parameters() if ".side" not in n)


def stepped(model, loss, steps):
    """The losses of some steps of what is trained."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        optimizer.step()
    return [float(value.detach()) for value in losses]


def test_a_side_network_learns_text(tiny) -> None:
    model = lst(reduction=4, drop_every=0)(deep(tiny, "llama", 2)).train()
    batch = {"tokens_BL": IDS, "document_BL": torch.ones_like(IDS), "position_BL": torch.arange(11).expand(2, -1)}
    batch |= {"target_BL": torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], dim=1)}
    losses = stepped(model, lambda: method_class("causal_lm")().loss(model, batch).value, 25)
    assert losses[-1] < losses[0] - 0.15


@pytest.mark.parametrize("name", ("llama", "bert"))
def test_a_side_network_learns_labels_with_a_new_head_and_the_head_is_trained(tiny, tmp_path, name) -> None:
    torch.manual_seed(0)
    sided = lst(reduction=2, drop_every=0)(deep(tiny, name, 2))
    classifier = with_head(sided, "sequence", ("no", "yes"), VOCABULARY).train()
    task = method_class("classification")()
    batch = {"tokens_BL": IDS, "mask_BL": torch.ones_like(IDS), "segment_BL": torch.zeros_like(IDS)}
    batch |= {"label_B": torch.tensor([0, 1])}
    losses = stepped(classifier, lambda: task.loss(classifier, batch).value, 30)
    assert losses[-1] < 0.3 * losses[0]
    moved = {n for n, p in base(classifier).named_parameters() if p.grad is not None}
    assert moved and all("side" in n or "pooler" in n for n in moved)  # bert's pooler is new with the head
    checkpoint.save(classifier, None, tmp_path / "c")
    again, _ = checkpoint.load(tmp_path / "c")
    assert task.predict(again, batch, None) == ["no", "yes"]
    assert {n for n, p in again.named_parameters() if p.requires_grad and "side" not in n} == {
        n for n, _ in again.named_parameters() if n.startswith(("score", "classifier"))
    }


def test_what_does_not_fit_is_one_clear_error(tiny) -> None:
    with pytest.raises(PretrainError, match="reduction 8: accepted: 1, 2, 4, which divide"):
        lst()(tiny())
    with pytest.raises(PretrainError, match="reduction 0: accepted: 1 or more"):
        lst(reduction=0)
    with pytest.raises(PretrainError, match="drop_every 1: accepted: 0, or 2 or more"):
        lst(drop_every=1)
    with pytest.raises(PretrainError, match="drop_every 4: accepted: 0, for 1 block"):
        lst(reduction=2)(deep(tiny, "llama", 1))
    with pytest.raises(PretrainError, match="temperature 0: accepted: above 0"):
        lst(temperature=0)
    with pytest.raises(PretrainError, match="importance 'size': accepted: auto, fisher, magnitude"):
        lst(importance="size")
    with pytest.raises(PretrainError, match="has a side network already"):
        lst(reduction=2)(lst(reduction=2)(tiny()))
    with pytest.raises(PretrainError, match="importance 'fisher': accepted: a causal language model"):
        lst(reduction=2, importance="fisher")(tiny("bert"))
    with pytest.raises(PretrainError, match="needs text to calibrate on"):
        lst(reduction=2, importance="fisher")(tiny())
    model = lst(reduction=2)(tiny())
    cache = tiny()(IDS, use_cache=True).past_key_values
    with pytest.raises(PretrainError, match="cache was filled without the side network"):
        model(IDS[:, :1], past_key_values=cache, use_cache=True)
