"""Models that the table of families does not know: they show themselves how documents share rows and logits follow."""

from __future__ import annotations

import pytest
import torch
import zoo
from small_recipe import MODEL, small_recipe
from torch.nn import functional as F

from pretrain.core.batch import spread
from pretrain.core.errors import PretrainError, PretrainWarning
from pretrain.core.models.attention import attend
from pretrain.core.models.families import blocks, encode_decode, family, head, hidden, linears, softcap
from pretrain.engine import run

ONE_STACK = [kind for kind in zoo.TASKS if zoo.TASKS[kind] != "seq2seq"]
APART = {"bloom", "openai-gpt", "minimax", "mamba", "mamba2", "falcon_mamba", "falcon_h1", "bamba", "jamba"}


def drawn(rows, length, seed=0):
    return torch.randint(3, zoo.ENTRIES, (rows, length), generator=torch.Generator().manual_seed(seed))


def row_of(*lengths, padding=0):
    document_BL = torch.tensor([[n for n, length in enumerate(lengths, 1) for _ in range(length)] + [0] * padding])
    position_BL = torch.tensor([[place for length in (*lengths, padding) for place in range(length)]])
    return document_BL, position_BL


def made(model, states):
    weight_VE, bias_V = head(model, capped=True)
    logits, cap = F.linear(states, weight_VE, bias_V), softcap(model)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def assert_near(ours, theirs):
    assert float((ours - theirs).abs().max()) <= 2e-4 * float(theirs.abs().max())


@pytest.mark.parametrize("kind", ONE_STACK)
def test_documents_of_a_row_have_the_logits_that_each_has_alone(kind):
    model, tokens_BL = zoo.make(kind), drawn(1, 24)
    document_BL, position_BL = row_of(9, 12, padding=3)
    batch = {
        "document_BL": document_BL,
        "position_BL": position_BL,
        "sizes_2": torch.tensor(spread(document_BL.numpy())),
    }
    with torch.no_grad():
        alone = torch.cat([model(input_ids=part).logits for part in tokens_BL[:, :21].split((9, 12), 1)], 1)
        inputs = attend(model, batch, causal=family(model).causal)
        assert_near(made(model, hidden(model, input_ids=tokens_BL, **inputs))[:, :21], alone)


@pytest.mark.parametrize("kind", zoo.SEQ2SEQ)
def test_pairs_of_a_row_have_the_logits_that_each_has_alone(kind):
    model, source_BL, target_BM = zoo.make(kind), drawn(1, 24), drawn(1, 12, seed=1)
    document_BL, owner_BM = row_of(9, 12, padding=3)[0], row_of(4, 6, padding=2)[0]
    with torch.no_grad():
        alone = torch.cat([
            model(input_ids=source, decoder_input_ids=target).logits
            for source, target in zip(source_BL[:, :21].split((9, 12), 1), target_BM[:, :10].split((4, 6), 1), strict=True)
        ], 1)  # fmt: skip
        assert_near(made(model, encode_decode(model, source_BL, target_BM, document_BL, owner_BM))[:, :10], alone)


@pytest.mark.parametrize("kind", zoo.TASKS)
def test_blocks_and_their_linear_layers_are_located(kind):
    model = zoo.make(kind)
    entry, layers = family(model), linears(model)
    assert entry.kind == zoo.TASKS[kind] and len(blocks(model)) in (1, 2, 3)
    attention, rest = linears(model, "attention"), linears(model, "feed_forward")
    assert layers and attention and {*attention} | {*rest} == {*layers} and not {*attention} & {*rest}


@pytest.mark.parametrize("kind", zoo.PADDED)
def test_a_model_that_padding_changes_says_so(kind):
    model, document_BL = zoo.make(kind), row_of(9, 12)[0]
    with torch.no_grad(), pytest.warns(PretrainWarning, match=f"{kind}.*changes a little with the padding"):
        inputs = attend(model, {"document_BL": document_BL, "position_BL": row_of(9, 12)[1]}, causal=False)
    assert hidden(model, input_ids=drawn(1, 21), **inputs).shape[:2] == (1, 21)


@pytest.mark.parametrize("kind", zoo.REFUSED)
def test_a_head_that_is_no_linear_layer_of_the_last_states_is_one_clear_error(kind):
    model, tokens_BL = zoo.make(kind), drawn(1, 8)
    more = {"decoder_input_ids": tokens_BL} if kind == "prophetnet" else {}
    with pytest.raises(PretrainError, match=f"model type '{kind}': .*accepted: a model "):
        hidden(model, input_ids=tokens_BL, **more)


@pytest.mark.parametrize("kind", ["gemma2", "mamba"])
def test_a_recipe_trains_adapts_quantises_and_measures_it(kind, tmp_path, stories):
    small = {name: value for name, value in zoo.fields(kind).items() if name != "vocab_size"}
    measured = {
        "stage": "evaluate",
        "name": "held",
        "checkpoint": "four",
        "corpus": "corpus",
        "evaluations": ["held_out"],
    }
    tuned = MODEL | {
        "name": "tuned", "init": "model", "model": {}, "budget": {"steps": 1}, "surgeries": [{"method": "lora", "rank": 2, "where": "all"}],
    }  # fmt: skip
    four = {
        "stage": "surgery", "name": "four", "checkpoint": "model", "corpus": "corpus", "calibration_rows": 2, "length": 32,
        "surgeries": [{"method": "gptq", "group_size": 8, "block_size": 16}],
    }  # fmt: skip
    text = small_recipe(
        tmp_path, stories[:30], tuned, four, measured, model={"family": kind, **small}, budget={"steps": 3}, evaluate_tokens=256,
    )  # fmt: skip
    (tmp_path / "r.yaml").write_text(text)
    done = run(tmp_path / "r.yaml", output=tmp_path / "run", report=False, say=lambda line: None).stages
    assert done["model"]["flops"] > 0 and done["tuned"]["flops"] > 0
    assert 0 < done["held"]["metrics"]["loss"] < 9
