"""Objectives beside causal LM: what is hidden, what is asked, and that models learn it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core.batch import Context, Row, Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.corpus.shards import Shards
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.objectives._masking import choose_spans, choose_words, corrupt
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.objectives.language.electra import Electra
from pretrain.objectives.language.masked_lm import MaskedLM
from pretrain.objectives.language.span_corruption import SpanCorruption
from pretrain.objectives.language.ul2 import UL2
from pretrain.training.loader import Loader

TOKENS = tuple(["<pad>", "<s>", "</s>", "<mask>", *(f"<extra_id_{i}>" for i in range(20)), "[R]", "[S]", "[X]"]
               + [("Ġ" if i % 3 == 0 else "") + f"t{i}" for i in range(70)])  # fmt: skip
VOCABULARY = Vocabulary(
    97, pad=0, bos=1, eos=2, mask=3, sentinels=tuple(range(4, 24)), special=frozenset(range(24)), tokens=TOKENS
)
SENTINELS = set(VOCABULARY.sentinels)


def rows(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    result = []
    for index, pieces in enumerate(lengths):
        tokens = np.concatenate([[1, *rng.integers(27, 97, n - 2), 2] for n in pieces]).astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(pieces)[:-1]]).astype(np.int32)
        result.append(Row(tokens, starts, np.arange(len(pieces)), 0, index))
    return result


def context(length=60, progress=0.0, seed=0, vocabulary=VOCABULARY):
    return Context(vocabulary, length, np.random.default_rng(seed), progress)


@settings(max_examples=100)
@given(
    st.integers(2, 300),
    st.floats(0.05, 0.6, allow_subnormal=False),
    st.floats(1, 64, allow_subnormal=False),
    st.integers(0, 99),
)
def test_spans_hide_the_rate_and_the_first_token_stays(length, rate, span, seed):
    hidden = choose_spans(length, rate, span, np.random.default_rng(seed))
    assert hidden.sum() == min(max(round(length * rate), 1), length - 1)
    assert not hidden[0]


@settings(max_examples=100)
@given(st.integers(2, 120), st.floats(0.05, 0.6, allow_subnormal=False), st.integers(0, 99))
def test_corruption_loses_nothing(length, rate, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(27, 97, length)
    hidden = choose_spans(length, rate, 3.0, rng, len(SENTINELS) - 1)
    source, target = corrupt(tokens, hidden, VOCABULARY.sentinels)
    spans, current = {}, None
    for token in target.tolist():
        if token in SENTINELS:
            current = token
            spans[current] = []
        else:
            spans[current].append(token)
    assert spans.pop(current) == []  # the last sentinel ends the target
    restored = [t for token in source.tolist() for t in (spans[token] if token in SENTINELS else [token])]
    assert restored == tokens.tolist()
    assert len(source) - len(spans) == np.count_nonzero(~hidden)  # all that is hidden is out of sight


@settings(max_examples=60)
@given(st.integers(2, 400), st.floats(0.05, 0.9, allow_subnormal=False), st.integers(1, 30), st.integers(0, 99))
def test_at_most_so_many_spans_hide_the_rate_all_the_same(length, rate, most, seed):
    hidden = choose_spans(length, rate, 1.0, np.random.default_rng(seed), most)
    assert hidden.sum() == min(max(round(length * rate), 1), length - 1)
    assert np.count_nonzero(np.diff(np.concatenate([[0], hidden.astype(int)])) == 1) <= most


@pytest.mark.parametrize(("made", "expected"), [
    (SpanCorruption(rate=0.5), (0.5, 0.5)),
    (UL2(), (1.95 / 7, 2.45 / 7)),  # one denoiser in seven hides the last quarter on average, six hide anywhere
], ids=["span_corruption", "ul2"])  # fmt: skip
def test_where_sentinels_are_too_few_the_end_of_a_document_is_hidden_like_its_beginning(made, expected):
    """1024 tokens at 50% in spans of 3 would be 171 spans; there are 100 sentinels."""
    sentinels = tuple(range(4, 104))
    tokens = (*(f"<{i}>" for i in range(297)), "[R]", "[S]", "[X]")
    vocabulary = Vocabulary(
        300, pad=0, bos=1, eos=2, mask=3, sentinels=sentinels, special=frozenset([*range(104), 297, 298, 299]),
        tokens=tokens,
    )  # fmt: skip
    rng, shares = np.random.default_rng(0), np.zeros(2)
    for _ in range(300):
        # Each token's number tells where in the document it stands: 104 in its first half, 105 in the other.
        row = Row(np.repeat([104, 105], 512).astype(np.int32), np.array([0], np.int32), np.array([0]), 0, 0)
        batch = made.prepare([row], Context(vocabulary, 1024, rng))
        shares += [(batch["target_BM"] == token).sum() / 512 for token in (104, 105)]
    assert shares / 300 == pytest.approx(expected, abs=0.03)


def test_more_spans_than_sentinels_are_refused():
    hidden = np.tile([False, True], 25)
    with pytest.raises(PretrainError, match="corrupt: 25 spans: accepted: fewer than the 20 sentinels"):
        corrupt(np.arange(27, 77), hidden, VOCABULARY.sentinels)


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_whole_words_of_real_text_are_hidden_at_the_rate_that_is_asked(prepared, rate):
    """BERT goes on with the next word when one does not fit; what is left is a gap that no word of the row fits."""
    vocabulary = Vocabulary.of(load_tokenizer(prepared / "tokenizer"))
    shards, rng = Shards(prepared / "tokens" / "train"), np.random.default_rng(0)
    hidden = allowed = 0
    for length in (64, 128):
        loader = Loader(shards, [CausalLM()], vocabulary, length=length, batch_rows=64)
        for tokens_L in loader.step(0, 0.0)[0][0]["tokens_BL"].numpy():
            tokens = tokens_L[tokens_L != vocabulary.pad]
            hidden += int(choose_words(tokens, rate, vocabulary, rng, whole_words=True).sum())
            allowed += int((~vocabulary.special_V[tokens]).sum())
    assert hidden / allowed == pytest.approx(rate, rel=0.02)


@settings(max_examples=60)
@given(st.integers(5, 200), st.floats(0.05, 0.5, allow_subnormal=False), st.integers(0, 99))
def test_whole_words_are_hidden_whole_and_special_tokens_never(length, rate, seed):
    rng = np.random.default_rng(seed)
    tokens = np.concatenate([[1], rng.integers(27, 97, length), [2]])
    hidden = choose_words(tokens, rate, VOCABULARY, rng, whole_words=True)
    assert not hidden[0] and not hidden[-1] and (hidden.sum() >= 1) == (round(rate * length) >= 1)
    for i in range(2, length + 1):
        if not VOCABULARY.starts_word_V[tokens[i]]:
            assert hidden[i] == hidden[i - 1]
    exact = choose_words(tokens, rate, VOCABULARY, rng, whole_words=False)
    assert exact.sum() == round(rate * length)


def test_masked_lm_hides_80_10_10_and_asks_for_the_originals():
    given_ = rows([2000], seed=1)
    batch = MaskedLM(rate=0.5).prepare(given_, context(2000))
    original, shown, target = (
        torch.from_numpy(given_[0].tokens_L.astype(np.int64)),
        batch["tokens_BL"][0],
        batch["target_BL"][0],
    )
    chosen = target != -100
    assert int(batch["weight"]) == int(chosen.sum()) == round(0.5 * 1998)
    assert torch.equal(target[chosen], original[chosen]) and torch.equal(shown[~chosen], original[~chosen])
    assert abs((shown[chosen] == 3).float().mean() - 0.8) < 0.05
    assert 0.08 < (shown[chosen] == original[chosen]).float().mean() < 0.15
    rates = [
        int(MaskedLM(rate=0.3, final_rate=0.1).prepare(given_, context(2000, p))["weight"]) / 1998
        for p in (0.0, 0.5, 1.0)
    ]
    assert rates == pytest.approx([0.3, 0.2, 0.1], abs=0.001)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_masked_lm_loss_is_the_models_own(tiny, name):
    model = tiny(name)
    batch = MaskedLM().prepare(rows([50], [50]), context(50))
    with torch.no_grad():
        logits = model(batch["tokens_BL"]).logits
        expected = F.cross_entropy(logits.flatten(0, 1), batch["target_BL"].flatten())
    assert torch.allclose(MaskedLM().loss(model, batch).value, expected, rtol=1e-5)


@pytest.mark.parametrize("objective", [SpanCorruption(), UL2()])
def test_packed_pairs_have_the_loss_of_each_pair_alone(tiny, objective):
    model = tiny("t5")
    batch = objective.prepare(rows([25, 31], [52]), context(60))
    together = objective.loss(model, batch)
    total = 0.0
    for b in range(2):
        for document in range(1, int(batch["document_BL"][b].max()) + 1):
            source = batch["tokens_BL"][b][batch["document_BL"][b] == document]
            mine = batch["owner_BM"][b] == document
            with torch.no_grad():
                logits = model(input_ids=source[None], decoder_input_ids=batch["decoder_BM"][b][mine][None]).logits[0]
            total += float(F.cross_entropy(logits, batch["target_BM"][b][mine], reduction="sum"))
            assert batch["decoder_BM"][b][mine][0] == 0
            assert torch.equal(batch["decoder_BM"][b][mine][1:], batch["target_BM"][b][mine][:-1])
    assert float(together.value) == pytest.approx(total / float(batch["weight"]), rel=1e-4)


def test_ul2_mixes_seven_denoisers_and_announces_each():
    assert [d[1:] for d in UL2().denoisers()] == [
        (0.15, 3.0),
        (0.15, 8.0),
        (0.25, None),
        (0.5, 3.0),
        (0.5, 8.0),
        (0.15, 64.0),
        (0.5, 64.0),
    ]
    counts = {24: 0, 25: 0, 26: 0}
    ctx = context(200)
    for seed in range(300):
        batch = UL2().prepare(rows([100], seed=seed), ctx)
        mode = int(batch["tokens_BL"][0, 0])
        counts[mode] += 1
        if mode == 25:  # S: one sentinel, at the end of what is shown
            shown = batch["tokens_BL"][0][batch["document_BL"][0] > 0].tolist()
            assert shown[-1] == 4 and sum(t in SENTINELS for t in shown) == 1
    assert 60 < counts[24] < 115 and 22 < counts[25] < 66 and 130 < counts[26] < 215


def electra_parts(tiny, seed=0):
    model, objective = tiny("bert").base_model, Electra()
    torch.manual_seed(seed)
    return model, objective, objective.modules(model), objective.prepare(rows([30, 20], [48]), context(50))


def test_electras_generator_is_small_and_shares_the_encoders_embeddings(tiny):
    model, _, modules, _ = electra_parts(tiny)
    generator = modules["generator"]
    assert generator.config.hidden_size == 8 and generator.config.num_attention_heads == 1
    assert generator.electra.embeddings.word_embeddings is model.embeddings.word_embeddings
    assert generator.generator_lm_head.weight is model.embeddings.word_embeddings.weight
    assert generator.electra.embeddings.position_embeddings is model.embeddings.position_embeddings


@pytest.mark.bits
def test_electras_encoder_gives_no_gradient_to_the_generator(tiny):
    model, objective, modules, batch = electra_parts(tiny)
    torch.manual_seed(0)
    found = objective.loss(model, batch, modules)
    assert float(found.value) == pytest.approx(
        float(found.parts["generator"]) + 50 * float(found.parts["discriminator"]), rel=1e-5
    )
    only_encoder = [
        p
        for n, p in modules["generator"].named_parameters()
        if "word_emb" not in n and "position_emb" not in n and "lm_head.weight" not in n
    ]
    torch.manual_seed(0)
    told = objective.loss(model, batch, modules).value - found.parts["generator"]
    both = torch.autograd.grad(told, only_encoder, allow_unused=True, retain_graph=True)
    torch.manual_seed(0)
    heavier = Electra(discriminator_weight=5000.0).loss(model, batch, modules).value
    same = torch.autograd.grad(heavier, only_encoder, allow_unused=True)
    for a, b in zip(both, same, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_token_that_the_generator_gets_right_counts_as_original(tiny):
    model, objective, modules, batch = electra_parts(tiny)
    torch.manual_seed(0)
    share = float(objective.loss(model, batch, modules).parts["replaced"])
    hidden = float(batch["hidden_BL"].sum() / (batch["document_BL"] > 0).sum())
    assert 0 < share <= hidden
    with torch.no_grad():  # a generator that is sure of one token, which is then everywhere the original
        modules["generator"].generator_lm_head.bias.fill_(-1e4)[50] = 1e4
    batch["tokens_BL"] = torch.where(batch["hidden_BL"], 50, batch["tokens_BL"])
    assert float(objective.loss(model, batch, modules).parts["replaced"]) == 0


@pytest.mark.parametrize(
    ("objective", "family"), [(MaskedLM(), "bert"), (Electra(), "bert"), (SpanCorruption(), "t5"), (UL2(), "t5")]
)
def test_a_model_learns_to_solve_it(tiny, objective, family):
    model = tiny(family).train()
    model = model.base_model if objective.task == "base" else model
    modules = objective.modules(model)
    batch = objective.prepare(rows([40, 20], [60]), context(64))
    parameters = [*model.parameters(), *(modules.parameters() if modules else [])]
    optimizer = torch.optim.AdamW(dict.fromkeys(parameters), lr=1e-2)
    losses = []
    for _ in range(25):
        torch.manual_seed(1)
        found = objective.loss(model, batch, modules)
        found.value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(found.value))
    assert min(losses[-5:]) < 0.8 * losses[0]


@pytest.mark.parametrize("objective", [MaskedLM(), Electra(), SpanCorruption(), UL2()])
def test_a_tokenizer_that_lacks_what_is_needed_is_named(objective):
    with pytest.raises(PretrainError, match=r"accepted: a tokenizer made with (mask|sentinels)"):
        objective.prepare(rows([20]), context(vocabulary=Vocabulary(97, pad=0)))
