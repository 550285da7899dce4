"""3ML: what is masked is absent from the first blocks, and from nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.core.batch import Context, Row, Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.meter import count_flops
from pretrain.core.models.cross_entropy import IGNORE
from pretrain.objectives.language.mask_later import MaskLater
from pretrain.objectives.language.masked_lm import MaskedLM

VOCABULARY = Vocabulary(97, pad=0, bos=1, eos=2, mask=3, special=frozenset(range(4)))
FAMILIES = ["bert", "modernbert"]


def rows(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    result = []
    for index, pieces in enumerate(lengths):
        tokens = np.concatenate([[1, *rng.integers(4, 97, max(n - 2, 0)), 2][-n:] for n in pieces]).astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(pieces)[:-1]]).astype(np.int32)
        result.append(Row(tokens, starts, np.arange(len(pieces)), 0, index))
    return result


def context(length=60, seed=0):
    return Context(VOCABULARY, length, np.random.default_rng(seed))


def made(tiny, family="bert", noise=0.2, **fields):
    """With larger weights, so that what each block does is seen."""
    torch.manual_seed(0)
    model, objective = tiny(family), MaskLater(**fields)
    modules = objective.modules(model).eval()
    with torch.no_grad():
        for p in [*model.parameters(), *modules.parameters()]:
            p.add_(torch.randn_like(p) * noise)
    return model, objective, modules


def as_masked_lm(batch, length):
    """The same masks as `masked_lm` has them, row by row in the order of the text; for rows of one document each."""
    shown = batch["tokens_BK"].shape[1]
    masks = torch.full((len(batch["tokens_BK"]), batch["document_BS"].shape[1] - shown), VOCABULARY.mask)
    tokens_BS = torch.cat([batch["tokens_BK"], masks], 1)
    plain = {name: torch.zeros(len(tokens_BS), length, dtype=torch.long) for name in ("tokens_BL", "document_BL")}
    plain["position_BL"] = torch.arange(length).repeat(len(tokens_BS), 1)
    plain["target_BL"] = torch.full((len(tokens_BS), length), -100)
    for b in range(len(tokens_BS)):
        real = batch["document_BS"][b] > 0
        where = batch["position_BS"][b][real]
        for name, values in (("tokens_BL", tokens_BS), ("document_BL", batch["document_BS"]), ("target_BL", batch["target_BS"])):  # fmt: skip
            plain[name][b, where] = values[b][real]
    return plain


@pytest.mark.parametrize("family", FAMILIES)
def test_appended_before_the_first_block_it_is_masked_lm_on_the_same_masks(tiny, family):
    model, objective, modules = made(tiny, family, layer=0, decoder_layers=0)
    with torch.no_grad():
        modules.mask_E.copy_(model.get_input_embeddings().weight[VOCABULARY.mask])
    batch = objective.prepare(rows([60], [60], [51]), context())
    plain = as_masked_lm(batch, 60)
    assert int((plain["target_BL"] != -100).sum()) == int(batch["weight"])
    mine, theirs = objective.loss(model, batch, modules).value, MaskedLM().loss(model, plain).value
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
    with torch.no_grad():
        modules.mask_E.add_(1 + torch.arange(32.0))
    assert abs(objective.loss(model, batch, modules).value - theirs) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [None, 1])
def test_later_it_is_the_blocks_called_one_by_one(tiny, family, layer):
    model, objective, modules = made(tiny, family, layer=layer, decoder_layers=2, masked=1.0, random=0.0)
    batch = objective.prepare(rows([40]), context(40))
    # By another way: all positions go through every block, but the masked ones are not attended to until `layer`.
    plain = as_masked_lm(batch, 40)
    hidden = plain["tokens_BL"][0] == VOCABULARY.mask
    base, vectors = model.base_model, model.get_input_embeddings()(plain["tokens_BL"]).clone()
    vectors[0, hidden] = modules.mask_E
    positions = {"position_ids": plain["position_BL"]} if family == "bert" else {}
    start = base.embeddings(inputs_embeds=vectors, **positions)
    blocks = list(base.encoder.layer if family == "bert" else base.layers)
    norm = torch.nn.Identity() if family == "bert" else base.final_norm
    near = (plain["position_BL"][0][:, None] - plain["position_BL"][0]).abs() <= 3

    def through(block, states, allowed):
        if family == "bert":
            return block(states, torch.where(allowed, 0.0, -1e9)[None, None])
        allowed = allowed & near if block.attention_type == "sliding_attention" else allowed
        turns = base.rotary_emb(states, plain["position_BL"], block.attention_type)
        return block(states, attention_mask=torch.where(allowed, 0.0, -1e9)[None, None], position_embeddings=turns)

    everyone = torch.ones(40, 40, dtype=torch.bool)
    with torch.no_grad():
        states, cut = start, len(blocks) if layer is None else layer
        for number, block in enumerate(blocks):
            if number == cut:
                states = torch.where(hidden[None, :, None], start, states)
            states = through(block, states, everyone if number >= cut else everyone & ~hidden[None])
        states = norm(states)
        if cut == len(blocks):
            states = torch.where(hidden[None, :, None], start, states)
        for block in modules.blocks:
            states = through(block, states, everyone)
        logits = (model.cls if family == "bert" else lambda s: model.decoder(model.head(s)))(modules.norm(states))
        expected = torch.nn.functional.cross_entropy(logits[0], plain["target_BL"][0])
        assert objective.loss(model, batch, modules).value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_first_blocks_cost_only_the_tokens_shown(tiny):
    length = 64
    shared = rows([length], [length])
    flops = {}
    for layer in (0, 1, 2):
        model, objective, modules = made(tiny, layer=layer, decoder_layers=1, masked=1.0, random=0.0)
        batch = objective.prepare(shared, context(length))
        assert batch["tokens_BK"].shape[1] == length // 2 and batch["document_BS"].shape[1] == length
        _, flops[layer] = count_flops(lambda m=model, o=objective, b=batch, x=modules: o.loss(m, b, x).value)

    def block(tokens, width=32, inner=48):  # projections and feed-forward, attention; of two rows
        return 2 * (2 * tokens * (4 * width * width + 2 * width * inner) + 4 * tokens * tokens * width)

    assert flops[0] - flops[1] == flops[1] - flops[2] == block(length) - block(length // 2)


def test_every_batch_has_the_same_shape_and_the_rates_hold(tiny):
    lengths = [[100], [60, 40], [30, 30, 30], [55], [3, 3, 3, 3, 3, 3]]
    shapes = set()
    for seed in range(20):
        batch = MaskLater().prepare(rows(*lengths, seed=seed), context(100, seed))
        shapes.add(tuple(v.shape for v in batch.values()))
        assert int(batch["weight"]) == int((batch["target_BS"] != -100).sum())
    assert shapes == {((5, 60), (5, 100), (5, 100), (5, 100), ())}
    batch = MaskLater().prepare(rows([1000]), context(1000))
    target = batch["target_BS"][0]
    assert int((target[600:] != -100).sum()) == 400 and int((target != -100).sum()) == 499
    shown = (target[:600] != -100).nonzero()[:, 0]
    other = (batch["tokens_BK"][0, shown] != target[shown]).sum()
    assert 44 <= int(other) <= 50  # a tenth of the chosen, of which one in 93 is drawn as it was


def test_every_token_of_a_row_comes_back_once_at_its_place():
    given = rows([30, 20], [44, 1])
    batch = MaskLater(random=0.0).prepare(given, context(50))
    shown = batch["tokens_BK"].shape[1]
    for b, row in enumerate(given):
        original = np.where(batch["target_BS"][b] == -100, 0, batch["target_BS"][b])
        tokens = np.concatenate([batch["tokens_BK"][b], np.zeros(batch["document_BS"].shape[1] - shown, int)])
        real = np.flatnonzero(batch["document_BS"][b])
        place = row.starts_D[batch["document_BS"][b].numpy()[real] - 1] + batch["position_BS"][b].numpy()[real]
        assert sorted(place.tolist()) == list(range(len(row.tokens_L)))
        assert row.tokens_L[place].tolist() == np.where(original > 0, original, tokens)[real].tolist()


def test_rows_of_special_tokens_alone_are_shown_whole():
    tokens = np.array([1, 2] * 20, np.int32)
    row = Row(tokens, np.arange(0, 40, 2, dtype=np.int32), np.arange(20), 0, 0)
    batch = MaskLater().prepare([row, *rows([40])], context(40))
    assert int((batch["document_BS"][0] > 0).sum()) == 40 and batch["tokens_BK"].shape[1] == 40


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_have_the_loss_of_each_alone(tiny, family):
    model, objective, modules = made(tiny, family)
    batch = objective.prepare(rows([30, 20, 5]), context())
    nll_BS = objective.loss(model, batch, modules).nll_BL
    shown = batch["tokens_BK"].shape[1]
    for document in (1, 2, 3):
        mine = (batch["document_BS"][0] == document).nonzero()[:, 0]
        alone = {k: v[:, mine] for k, v in batch.items() if k.endswith("BS")}
        alone["tokens_BK"] = batch["tokens_BK"][:, mine[mine < shown]]
        alone["weight"] = (alone["target_BS"] != IGNORE).sum()
        assert torch.allclose(objective.loss(model, alone, modules).nll_BL[0], nll_BS[0, mine], atol=1e-5)


def test_a_model_learns_by_it_and_stays_what_it_was(tiny):
    model, objective, modules = made(tiny, noise=0.0)
    names = set(model.state_dict())
    batch = objective.prepare(rows([40, 20], [60]), context(64))
    parameters = [*model.parameters(), *modules.parameters()]
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    for _ in range(20):
        value = objective.loss(model, batch, modules).value
        value.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0] and set(model.state_dict()) == names


@pytest.mark.parametrize(
    "fields", [{"rate": 0.0}, {"masked": 1.5}, {"random": 0.3}, {"decoder_layers": -1}, {"decoder_layers": 0}]
)
def test_fields_that_cannot_be_are_named(fields):
    with pytest.raises(PretrainError, match=rf"mask_later: .*{next(iter(fields))} .* accepted: "):
        MaskLater(**fields)


def test_a_layer_the_model_lacks_is_named(tiny):
    with pytest.raises(PretrainError, match=r"mask_later: layer -1: accepted: 0 or more"):
        MaskLater(layer=-1)
    for layer, decoder_layers in ((3, 1), (2, 0)):
        with pytest.raises(PretrainError, match=rf"mask_later: layer {layer}: accepted: from 0 to "):
            MaskLater(layer=layer, decoder_layers=decoder_layers).modules(tiny("bert"))
