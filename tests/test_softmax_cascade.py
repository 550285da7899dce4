"""The softmax cascade: where tokens leave, what the skipped blocks remember, thresholds, and what it all costs."""

from __future__ import annotations

import pytest
import torch
from decoding_cases import WIDE, learnt, padded, prompt

from pretrain.core.errors import PretrainError
from pretrain.core.files import read_json
from pretrain.decoding.ensembles._cascade import bounded_thresholds, cascaded, measure, paper_threshold
from pretrain.decoding.ensembles.softmax_cascade import FILE, NEVER, SoftmaxCascade

FIELDS = {"llama": {"num_hidden_layers": 4}, "qwen3": {"num_hidden_layers": 4}, "gpt2": {"n_layer": 4}}
FULL = SoftmaxCascade(exits=(1, 3), thresholds=(NEVER, NEVER))


def made(tiny, family="llama", **more):
    return tiny(family, **WIDE[family], **FIELDS[family], **more)


def reference(model, ids_1L, new, exits, thresholds):
    """No cache: after it has left, a token's state goes unchanged from block to block, and others see it there."""
    gpt2 = hasattr(model, "transformer")
    parts, norm = (model.transformer.h, model.transformer.ln_f) if gpt2 else (model.model.layers, model.model.norm)
    ids, depths, gaps = ids_1L[0].tolist(), [len(parts)] * ids_1L.shape[1], []
    chosen = []
    for number in range(new):
        states = model.get_input_embeddings()(torch.tensor([ids]))
        position_1T = torch.arange(len(ids))[None]
        more = {} if gpt2 else {"position_embeddings": model.model.rotary_emb(states, position_1T)}
        if gpt2:
            states = states + model.transformer.wpe(position_1T)
        if number:
            depths.append(len(parts))
        for depth, block in enumerate(parts, 1):
            stays = torch.tensor(depths)[None, :, None] < depth
            states = torch.where(stays, states, block(states, attention_mask=None, **more))
            if number and depth in exits and depths[-1] == len(parts):
                sure = float(model.lm_head(norm(states[:, -1])).float().softmax(-1).max())
                gaps.append(abs(sure - thresholds[exits.index(depth)]))
                if sure >= thresholds[exits.index(depth)]:
                    depths[-1] = depth
        ids.append(int(model.lm_head(norm(states[:, -1])).argmax()))
        chosen.append(depths[-1])
    return torch.tensor([ids]), chosen, min(gaps)


@pytest.mark.parametrize("family", list(FIELDS))
def test_tokens_and_depths_are_those_of_a_computation_without_a_cache(tiny, family):
    every = set()
    for seed in range(2):
        model, ids_1L = made(tiny, family, seed=seed).double(), prompt(7, seed)
        for thresholds in ((0.3, 0.4), (0.5, 0.2), (0.0, 0.0)):
            method = SoftmaxCascade(exits=(1, 3), thresholds=thresholds)
            with torch.no_grad():
                tokens_1N, depths, gap = reference(model, ids_1L, 14, (1, 3), thresholds)
            found = method.trace(model, ids_1L, max_new_tokens=14)
            assert gap > 1e-6 or thresholds == (0.0, 0.0)
            assert torch.equal(found.tokens_BN, tokens_1N) and found.depths == [depths]
            every |= set(depths)
    assert every == {1, 3, 4}


def test_at_zero_every_token_leaves_at_the_first_exit(tiny):
    model, (ids_BL, mask_BL) = made(tiny), padded((3, 11), 0)
    for exits in ((1, 3), (2,)):
        method = SoftmaxCascade(exits=exits, thresholds=(0.0,) * len(exits))
        found = method.trace(model, ids_BL, attention_mask_BL=mask_BL, max_new_tokens=9)
        assert found.depths == [[4] + [exits[0]] * 8] * 2  # the first is the whole model's: it has read the prompt


def test_the_operations_are_those_counted_by_hand(tiny):
    # Per token: attention 2 (q, o) 32 x 32 + 2 (k, v) 32 x 16, feed-forward 3 x 32 x 48, head 32 x 97.
    block, fill, head = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48, 2 * 32 * 16, 32 * 97
    seen = [2 * 32 * keys for keys in (6, 7)]  # q k and a v, over 4 heads of 8: the prompt of 5 and the new tokens
    model, ids_1L = tiny("llama", num_hidden_layers=4), prompt(5, 0)
    whole = sum(4 * (block + keys) + head for keys in seen)
    cases = [
        ((0.0, 0.0), sum(block + keys + head + 3 * fill for keys in seen)),
        ((NEVER, 0.0), sum(3 * (block + keys) + 2 * head + fill for keys in seen)),
        ((NEVER, NEVER), sum(4 * (block + keys) + 3 * head for keys in seen)),  # asking an exit costs
    ]
    for thresholds, macs in cases:
        found = SoftmaxCascade(exits=(1, 3), thresholds=thresholds).trace(model, ids_1L, max_new_tokens=3)
        assert (found.macs, found.full, found.share) == (macs, whole, macs / whole)
    twice = SoftmaxCascade(exits=(1, 3), thresholds=(0.0, 0.0)).trace(model, ids_1L.repeat(2, 1), max_new_tokens=3)
    assert (twice.macs, twice.full) == (2 * cases[0][1], 2 * whole)
    assert FULL.trace(model, ids_1L, max_new_tokens=1).share == 1.0
    gpt2 = tiny("gpt2", n_layer=4)  # its queries, keys and values are one projection of 32 x 96
    block, fill = 32 * 96 + 32 * 32 + 2 * 32 * 128, 32 * 96
    found = SoftmaxCascade(exits=(2,), thresholds=(0.0,)).trace(gpt2, ids_1L, max_new_tokens=2)
    assert found.macs == 2 * (block + 2 * 32 * 6) + head + 2 * fill


def random_measures(seed, exits=3, count=200):
    """Better with depth and with confidence; with equal confidences."""
    generator = torch.Generator().manual_seed(seed)
    confidence_MN = (torch.rand(exits + 1, count, generator=generator) * 40).round() / 40
    skill_M1 = torch.linspace(0.5, 0.9, exits + 1)[:, None]
    return confidence_MN, torch.rand(exits + 1, count, generator=generator) < confidence_MN**0.5 * skill_M1 + 0.1


def test_the_papers_threshold_is_the_least_that_is_within_the_drop_of_the_best_accuracy():
    for seed in range(5):
        confidence_MN, correct_MN = random_measures(seed)
        for drop in (0.0, 0.02, 0.1, 0.5, 1.0):
            for sure_N, right_N in zip(confidence_MN, correct_MN, strict=True):
                at = {float(d): right_N[sure_N >= d].double().mean().item() for d in sure_N.unique()}
                wanted = min(d for d, accuracy in at.items() if accuracy >= max(at.values()) - drop - 1e-9)
                assert paper_threshold(sure_N, right_N, drop) == wanted
    assert paper_threshold(sure_N, right_N, 1.0) == float(sure_N.min())


def test_bounded_thresholds_keep_the_whole_drop_within_the_bound_and_no_lower_ones_would():
    shares = []
    for seed in range(5):
        confidence_MN, correct_MN = random_measures(seed)
        whole = correct_MN[-1].double().mean().item()
        for drop in (0.0, 0.01, 0.05, 0.2):
            thresholds = bounded_thresholds(confidence_MN, correct_MN, drop, NEVER)
            accuracy, leaving = cascaded(confidence_MN, correct_MN, thresholds)
            assert whole - accuracy <= drop + 1e-9 and sum(leaving) == 200
            shares.append(leaving[-1])
            [alone] = bounded_thresholds(confidence_MN[[0, 3]], correct_MN[[0, 3]], drop, NEVER)
            for lower in confidence_MN[0].unique().tolist():
                if lower < alone:
                    assert whole - cascaded(confidence_MN[[0, 3]], correct_MN[[0, 3]], (lower,))[0] > drop
        assert shares[-4] > shares[-1]
    assert bounded_thresholds(torch.ones(2, 9), torch.tensor([[False] * 9, [True] * 9]), 0.5, NEVER) == (NEVER,)


def packed(seed=0):
    """Rows of two documents and padding, as surgeries are given them."""
    ids_BL = torch.cat([prompt(24, 10 * seed + row, 20) for row in range(6)])
    document_BL = torch.tensor([[1] * 10 + [2] * 11 + [0] * 3] * 6)
    position_BL = torch.tensor([[*range(10), *range(11), *range(3)]] * 6)
    return {"input_ids": ids_BL, "attention_mask": document_BL, "position_ids": position_BL}


@pytest.mark.bits
@pytest.mark.parametrize("family", list(FIELDS))
def test_confidences_are_those_of_each_document_alone(tiny, family):
    model, batch = made(tiny, family), packed()
    confidence_MN, correct_MN = measure(model, [batch, batch], (1, 3))
    rows = []
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    with torch.no_grad():
        for ids_L in batch["input_ids"]:
            for piece in (ids_L[:10], ids_L[10:21]):
                output = model(piece[None], output_hidden_states=True)
                for at in range(len(piece) - 1):
                    logits = [model.lm_head(norm(output.hidden_states[d][0, at])) for d in (1, 3)]
                    p = torch.stack([*logits, output.logits[0, at]]).softmax(-1)
                    rows.append((p.amax(-1), p.argmax(-1) == piece[at + 1]))
    assert confidence_MN.shape == (3, 2 * 6 * 19) and torch.equal(confidence_MN[:, :114], confidence_MN[:, 114:])
    assert torch.allclose(confidence_MN[:, :114], torch.stack([row[0] for row in rows], 1), atol=1e-5)
    assert torch.equal(correct_MN[:, :114], torch.stack([row[1] for row in rows], 1))


def test_calibrated_thresholds_are_written_read_and_keep_the_drop(tiny, tmp_path):
    model, batches = learnt(tiny(num_hidden_layers=3), 40), [packed(seed) for seed in range(3)]
    method = SoftmaxCascade()
    assert method.depths(model) == (1, 2)
    measured = measure(model, batches, (1, 2))
    for drop in (0.0, 0.02, 0.2):
        bound = method.calibrate(model, batches, drop, rule="bound", file=tmp_path)
        said = read_json(tmp_path / FILE)
        assert said["whole_accuracy"] - said["accuracy"] <= drop + 1e-9 and sum(said["leaving"]) == 3 * 114
        assert tuple(said["thresholds"]) == bound and cascaded(*measured, bound)[0] == said["accuracy"]
        paper = method.calibrate(model, batches, drop, file=tmp_path / "paper.json")
        for number, threshold in enumerate(paper):
            sure_N, right_N = measured[0][number], measured[1][number].double()
            best = max(float(right_N[sure_N >= d].mean()) for d in sure_N)
            assert float(right_N[sure_N >= threshold].mean()) >= best - drop - 1e-9
    for place, thresholds in ((tmp_path, bound), (tmp_path / "paper.json", paper)):
        ids_1L = prompt(6, 1, 20)
        ours = SoftmaxCascade(calibration=str(place)).trace(model, ids_1L, max_new_tokens=12)
        given = SoftmaxCascade(thresholds=thresholds).trace(model, ids_1L, max_new_tokens=12)
        assert torch.equal(ours.tokens_BN, given.tokens_BN) and ours.depths == given.depths
    assert 1 in {depth for row in given.depths for depth in row}  # 0.2 of the accuracy buys some exits


def test_mistakes_are_refused(tiny, tmp_path):
    model, ids_1L = made(tiny), prompt(4, 0)
    for fields, message in [
        ({}, r"thresholds \(\): accepted: one for each of the exits \(1, 2\)"),
        (
            {"exits": (1, 4), "thresholds": (0.5, 0.5)},
            r"exits \(1, 4\): accepted: rising numbers of blocks from 1 to 3",
        ),
        ({"exits": (2, 1)}, "accepted: rising numbers of blocks"),
        ({"exits": (0, 1)}, "accepted: a list, each 1 or more"),
        ({"thresholds": (0.5, 0.5), "calibration": str(tmp_path)}, "accepted: one of them"),
        ({"calibration": str(tmp_path / "none.json")}, "missing file"),
    ]:
        with pytest.raises(PretrainError, match=message):
            SoftmaxCascade(**fields).generate(model, ids_1L)
    for fields, message in [
        ({"thresholds": (-0.1,)}, "accepted: a list, each 0 or more"),
        ({"thresholds": (float("nan"),)}, "accepted: a list, each 0 or more"),
    ]:
        with pytest.raises(PretrainError, match=message):
            SoftmaxCascade(**fields)
    method = SoftmaxCascade(exits=(1,))
    method.calibrate(model, [packed()], 0.1, file=tmp_path)
    with pytest.raises(PretrainError, match=r"thresholds of exits \(1,\): accepted: those of exits \(2,\)"):
        SoftmaxCascade(exits=(2,), calibration=str(tmp_path)).generate(model, ids_1L)
    (tmp_path / "other.json").write_text('{"exits": [1]}')
    with pytest.raises(PretrainError, match="a file that `calibrate` wrote"):
        SoftmaxCascade(exits=(1,), calibration=str(tmp_path / "other.json")).generate(model, ids_1L)
    for given, message in [
        (([packed()], 1.5), "accuracy_drop 1.5: accepted: from 0 to 1"),
        (([], 0.1), "without text"),
        (([{"input_ids": ids_1L[:, :1]}], 0.1), "without text"),
    ]:
        with pytest.raises(PretrainError, match=message):
            method.calibrate(model, *given)
    with pytest.raises(PretrainError, match="rule 'sum': accepted: paper, bound"):
        method.calibrate(model, [packed()], 0.1, rule="sum")
    with pytest.raises(PretrainError, match="'bert': accepted: llama, gpt2"):
        method.calibrate(tiny("bert"), [packed()], 0.1)
