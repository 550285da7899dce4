"""Vocabulary expansion: old rows and ids stay, new rows are as each way says, and tokenizers are joined."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from closeness import assert_same_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from pretrain.core import checkpoint
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import hidden
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizers import load_tokenizer, train_tokenizer
from pretrain.surgery import Inputs
from pretrain.surgery._tokens import joined
from pretrain.surgery.vocabulary._cw2v import Mixture, Settings, pairs, train
from pretrain.surgery.vocabulary.vocabulary_expansion import VocabularyExpansion, initial, tables

OLD_TEXTS = ["the quick brown fox jumps over the lazy dog, then the dog sleeps"] * 3
QUICK = {"rank": 8, "epochs": 2, "batch_size": 256, "max_tokens": 3000, "lr": 0.01}


@pytest.fixture(scope="module")
def old():
    return train_tokenizer(OLD_TEXTS, vocab_size=290, mask=True)


@pytest.fixture(scope="module")
def tokenizer_of_code(prepared):
    return str(prepared / "tokenizer")


@pytest.fixture(scope="module")
def wide(old, tokenizer_of_code):
    return joined("test", old, load_tokenizer(tokenizer_of_code))


def operate(model, old, tokenizer, prepared, way, seed=0, **fields):
    """The operated model and the inputs, which hold the new tokenizer."""
    given = QUICK | {"corpus": str(prepared / "corpus")} if way == "cw2v" else {}
    inputs = Inputs(tokenizer=old, seed=seed)
    return VocabularyExpansion(tokenizer, way, **given | fields)(model, inputs), inputs


def test_joined_tokenizers_keep_old_ids_and_use_the_new_tokens(old, wide, tokenizer_of_code, prepared, tmp_path):
    code = load_tokenizer(tokenizer_of_code)
    known, found = old.get_vocab(), wide.get_vocab()
    assert {token: found[token] for token in known} == known
    special = set(code.all_special_tokens)
    assert set(found) == set(known) | (set(code.get_vocab()) - special)
    assert sorted(found.values()) == list(range(len(wide)))
    texts = [d["text"] for d in Corpus(prepared / "corpus").sample("test", 5)] + OLD_TEXTS
    for text, before, after in zip(texts, encode(old, texts), encode(wide, texts), strict=True):
        assert wide.decode(after) == text and len(after) <= len(before)
    few, many = (sum(map(len, encode(one, texts[:5]))) for one in (wide, old))
    assert few < 0.7 * many
    assert wide.all_special_ids == old.all_special_ids and wide.eos_token_id == old.eos_token_id
    wide.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(encode(again, texts), encode(wide, texts), strict=True))


def test_a_tokenizer_that_has_all_old_tokens_in_place_is_taken_as_it_is(old, wide):
    assert json.loads(joined("test", old, wide).backend_tokenizer.to_str()) == json.loads(
        wide.backend_tokenizer.to_str()
    )


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_pieces_of_other_tokenizers_join_too(kind, stories):
    new_texts = [d["text"] for d in stories[:20]]
    if kind == "unigram":
        one, other = (
            train_tokenizer(t, algorithm="unigram", vocab_size=n) for t, n in ((OLD_TEXTS, 270), (new_texts, 500))
        )
    else:
        one, other = (wordpiece(t) for t in (OLD_TEXTS, new_texts))
    made, known = joined("test", one, other), one.get_vocab()
    found = made.get_vocab()
    assert set(found) == set(known) | set(other.get_vocab()) and {t: found[t] for t in known} == known
    text = "return self"
    ids, before = encode(made, [text])[0], encode(one, [text])[0]
    assert max(ids) >= len(known) and len(ids) <= len(before) and made.decode(ids) == text


def wordpiece(texts):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    letters = [c for c in "abcdefghijklmnopqrstuvwxyz(),:"]
    tokenizer.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=300, special_tokens=["[UNK]"], initial_alphabet=letters, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.bits
@pytest.mark.parametrize("way", ["cw2v", "mean", "multivariate", "univariate", "random"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_old_rows_stay_and_logits_of_old_tokens_with_them(
    tiny, old, wide, tokenizer_of_code, prepared, tmp_path, family, way
):
    model = tiny(family, vocab_size=len(old))
    names = {"input_ids": torch.arange(3, 23)[None]}
    before, rows = model(**names).logits, [table.clone() for table in tables(model)]
    made, inputs = operate(model, old, tokenizer_of_code, prepared, way)
    assert made.config.vocab_size == len(wide) == len(inputs.extra["tokenizer"])
    for old_VX, table in zip(rows, tables(made), strict=True):
        assert len(table) == len(wide) and torch.equal(table[: len(old)], old_VX)
        assert torch.isfinite(table).all()
    assert torch.allclose(made(**names).logits[..., : len(old)], before, atol=1e-6)
    assert (made.get_output_embeddings().weight is made.get_input_embeddings().weight) == (family != "llama")
    checkpoint.save(made, inputs.extra["tokenizer"], tmp_path / "c")
    loaded, tokenizer = checkpoint.load(tmp_path / "c")
    assert torch.equal(loaded(**names).logits, made(**names).logits)
    assert tokenizer.get_vocab() == wide.get_vocab()


def with_a_head_of_its_own(tiny, family, rows, folder):
    """A model opened from a checkpoint whose head and biases are no other weights."""
    if family == "roberta":
        config = RobertaConfig(
            vocab_size=rows, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
            tie_word_embeddings=False,
        )  # fmt: skip
        model = RobertaForMaskedLM(config).eval()
    else:
        model = tiny(family, vocab_size=rows, tie_word_embeddings=False)
    if family == "t5":  # whose configuration says tied whatever the weights
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.all_tied_weights_keys.pop("lm_head.weight")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    checkpoint.save(model, None, folder)
    return checkpoint.load(folder)[0]


@pytest.mark.bits
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "t5"])
def test_a_head_that_is_not_tied_stays_so(tiny, old, wide, tokenizer_of_code, prepared, tmp_path, family):
    model = with_a_head_of_its_own(tiny, family, len(old), tmp_path / "old")
    ids = torch.arange(3, 23)[None]
    given = {"input_ids": ids} | ({"decoder_input_ids": ids} if family == "t5" else {})
    before, rows = model(**given).logits, [table.clone() for table in tables(model)]
    biases = {name: p.clone() for name, p in model.named_parameters() if p.shape == (len(old),)}
    assert len(rows) == (2 if family == "t5" else 3) and len(biases) == {"bert": 2, "roberta": 2, "t5": 0}.get(
        family, 1
    )
    made, inputs = operate(model, old, tokenizer_of_code, prepared, "mean")
    for old_VX, table in zip(rows, tables(made), strict=True):
        assert torch.equal(table[: len(old)], old_VX)
        assert torch.allclose(table[len(old) :], old_VX.mean(0).expand_as(table[len(old) :]), atol=1e-6)
    assert all(torch.equal(made.get_parameter(name)[: len(old)], bias) for name, bias in biases.items())
    logits = made(**given).logits
    assert torch.allclose(logits[..., : len(old)], before, atol=1e-6)
    head = made.get_output_embeddings()
    states = torch.randn(3, 32)
    assert torch.equal(head(states), torch.nn.functional.linear(states, head.weight, head.bias))
    mean = before.double().mean(-1, keepdim=True).expand_as(logits[..., len(old) :])
    assert torch.allclose(logits[..., len(old) :].double(), mean, atol=1e-4)
    checkpoint.save(made, inputs.extra["tokenizer"], tmp_path / "c")
    ours, plain = checkpoint.load(tmp_path / "c")[0], type(made).from_pretrained(tmp_path / "c").eval()
    assert torch.equal(ours(**given).logits, logits)
    assert_same_model(plain(**given).logits, logits, made)
    for loaded in (ours, plain):
        assert len(loaded.get_output_embeddings().weight) == len(wide)


@pytest.mark.parametrize("way", ["cw2v", "mean"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_inside_the_convex_hull_no_new_token_is_ever_the_likeliest(tiny, old, tokenizer_of_code, prepared, family, way):
    model = tiny(family, vocab_size=len(old), initializer_range=0.5)
    if family == "bert":
        with torch.no_grad():
            model.cls.predictions.bias.copy_(torch.linspace(-30, 30, len(old)))
    inputs = torch.randint(0, len(old), (8, 30), generator=torch.Generator().manual_seed(0))
    before = model(inputs).logits
    made, _ = operate(model, old, tokenizer_of_code, prepared, way)
    logits = made(inputs).logits
    highest, lowest = before.amax(-1, keepdim=True), before.amin(-1, keepdim=True)
    assert (logits[..., len(old) :] <= highest + 1e-4).all() and (logits[..., len(old) :] >= lowest - 1e-4).all()
    assert torch.equal(logits.argmax(-1), before.argmax(-1))
    if way == "mean":
        mean = before.double().mean(-1, keepdim=True)
        assert torch.allclose(logits[..., len(old) :].double(), mean.expand_as(logits[..., len(old) :]), atol=1e-4)


def test_rows_beyond_the_old_tokenizer_are_used_first(tiny, old, wide, tokenizer_of_code, prepared):
    model = tiny(vocab_size=len(wide) + 7)
    unused = model.lm_head.weight[len(wide) :].clone()
    kept = model.lm_head.weight[: len(old)].clone()
    made, _ = operate(model, old, tokenizer_of_code, prepared, "mean")
    assert len(made.lm_head.weight) == len(wide) + 7 and torch.equal(made.lm_head.weight[len(wide) :], unused)
    assert torch.allclose(made.lm_head.weight[len(old)], kept.mean(0), atol=1e-7)


def test_the_simple_ways_have_the_moments_they_name():
    source = torch.Generator().manual_seed(1)
    old_VE = (
        torch.randn(40, 3, generator=source, dtype=torch.float64)
        @ torch.tensor([[1.0, 0.8, 0], [0, 1, 0], [0, 0, 3.0]]).double()
        + 2
    )
    mean, covariance = old_VE.mean(0), torch.cov(old_VE.T, correction=0)
    made = {
        way: initial(old_VE, 40_000, way, 0.25, 0.02, source)
        for way in ("multivariate", "univariate", "random", "mean")
    }
    assert torch.equal(made["mean"], mean.expand(40_000, 3))
    assert torch.allclose(torch.cov(made["multivariate"].T), 0.25 * covariance, atol=0.06)
    assert torch.allclose(torch.cov(made["univariate"].T), torch.diag(covariance.diag()), atol=0.25)
    assert torch.allclose(torch.cov(made["random"].T), 0.02**2 * torch.eye(3).double(), atol=2e-5)
    for way, centre in (("multivariate", mean), ("univariate", mean), ("random", torch.zeros(3).double())):
        assert torch.allclose(made[way].mean(0), centre, atol=0.06), way


@pytest.mark.bits
def test_the_seed_decides_and_nothing_else(tiny, old, tokenizer_of_code, prepared):
    def rows(way, seed):
        torch.manual_seed(int(torch.randint(1000, ())))
        made, _ = operate(tiny(vocab_size=len(old)), old, tokenizer_of_code, prepared, way, seed)
        return made.lm_head.weight[len(old) :]

    for way in ("cw2v", "multivariate"):
        assert torch.equal(rows(way, 3), rows(way, 3)) and not torch.equal(rows(way, 3), rows(way, 4))


def test_pairs_are_all_within_the_window_and_frequent_tokens_are_thinned():
    texts = [np.array([0, 1, 2, 3, 1]), np.array([4]), np.array([2, 2, 0])]
    settings = Settings(1, 2, 1, 1e9, 1.0, 1, 1)
    found = pairs(texts, np.bincount(np.concatenate(texts)), settings, np.random.default_rng(0))
    wanted = [(t[i], t[j]) for t in texts for i in range(len(t)) for j in range(len(t)) if 0 < abs(i - j) <= 2]
    assert sorted(map(tuple, found.tolist())) == sorted((int(a), int(b)) for a, b in wanted)
    many = [np.tile([0, 1], 2000)]
    counts = np.array([2000, 2000])
    thinned = pairs(many, counts, Settings(1, 1, 1, 20.0, 1.0, 1, 1), np.random.default_rng(0))
    assert len(thinned) == pytest.approx(2 * 3999 * (20 / 2000) ** 0.5, rel=0.1)


def test_one_step_of_training_is_that_of_the_formula_and_old_vectors_are_fixed():
    torch.manual_seed(0)
    old_VE, head_VE = torch.randn(4, 3), torch.randn(4, 3)
    kept = old_VE.clone(), head_VE.clone()
    texts, settings = [np.array([0, 4, 5, 1, 4])], Settings(2, 1, 2, 1e9, 0.1, 1000, 1)
    inner, outer, losses = train(texts, old_VE, head_VE, 2, settings, torch.Generator().manual_seed(5))
    assert torch.equal(old_VE, kept[0]) and torch.equal(head_VE, kept[1])

    source = torch.Generator().manual_seed(5)  # the same numbers drawn in the same order
    a, b, c, d = (torch.rand(*shape, generator=source).requires_grad_() for shape in ((2, 2), (2, 4), (2, 2), (2, 4)))
    w = torch.cat([old_VE, torch.softmax(a @ b, 1) @ old_VE])
    v = torch.cat([head_VE, torch.softmax(c @ d, 1) @ head_VE])
    pair = pairs(texts, np.bincount(texts[0], minlength=6), settings, np.random.default_rng(5))
    pair = pair[torch.randperm(len(pair), generator=source).numpy()]
    noise = torch.tensor([1.0, 1, 0, 0, 2, 1]).double() ** 0.75
    drawn = torch.multinomial(noise, len(pair) * 2, replacement=True, generator=source).view(-1, 2)
    loss = torch.zeros(())
    for (centre, near), negatives in zip(pair.tolist(), drawn.tolist(), strict=True):
        loss = loss - torch.log(torch.sigmoid(v[near] @ w[centre]))
        for other in negatives:
            loss = loss - torch.log(torch.sigmoid(-(v[other] @ w[centre])))
    loss = loss / len(pair)
    assert losses[0] == pytest.approx(loss.item(), rel=1e-5)
    optimiser = torch.optim.Adam([a, b, c, d], lr=0.1)
    loss.backward()
    optimiser.step()
    for mine, its in zip((inner.left_NR, inner.right_RV, outer.left_NR, outer.right_RV), (a, b, c, d), strict=True):
        assert torch.allclose(mine, its, atol=1e-5)


def test_mixtures_are_convex():
    mixture = Mixture(torch.randn(6, 3), 700, 2, torch.Generator().manual_seed(0))
    shares = mixture.shares(torch.arange(700))
    assert (shares >= 0).all() and torch.allclose(shares.sum(1), torch.ones(700))
    assert torch.allclose(mixture.applied(mixture.old_VE), shares @ mixture.old_VE, atol=1e-6)
    tokens = torch.tensor([[5, 6, 705], [0, 6, 2]])
    both = torch.cat([mixture.old_VE, mixture.applied(mixture.old_VE)])
    assert torch.allclose(mixture(tokens), both[tokens], atol=1e-6)


def test_training_lowers_the_loss(tiny, old, tokenizer_of_code, prepared):
    model = tiny(vocab_size=len(old), initializer_range=0.5)
    _, inputs = operate(model, old, tokenizer_of_code, prepared, "cw2v", epochs=4, lr=0.03)
    told = inputs.extra["metrics"]
    assert told["vocabulary_expansion/last_loss"] < 0.98 * told["vocabulary_expansion/first_loss"]
    assert told["vocabulary_expansion/new_tokens"] == len(inputs.extra["tokenizer"]) - len(old)


def test_models_with_a_head_of_their_own_and_without_one(tiny, old, tokenizer_of_code, prepared):
    made, _ = operate(tiny("t5", vocab_size=len(old)), old, tokenizer_of_code, prepared, "mean")
    ids = torch.tensor([[len(old) + 1, 4]])
    assert made(input_ids=ids, decoder_input_ids=ids).logits.shape[-1] == made.config.vocab_size
    bare = tiny(vocab_size=len(old)).model
    made, _ = operate(bare, old, tokenizer_of_code, prepared, "mean")
    assert hidden(made, input_ids=ids).shape[:2] == (1, 2)


def test_nothing_changes_where_no_token_is_new(tiny, old, prepared, tmp_path):
    old.save_pretrained(tmp_path / "same")
    model = tiny(vocab_size=len(old))
    rows = model.lm_head.weight.clone()
    made, inputs = operate(model, old, str(tmp_path / "same"), prepared, "random")
    assert torch.equal(made.lm_head.weight, rows) and inputs.extra["tokenizer"].get_vocab() == old.get_vocab()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"initialisation": "zero"}, "initialisation 'zero': accepted: cw2v, mean, multivariate, univariate, random"),
        ({}, "corpus '': accepted: a corpus with initialisation cw2v, none with the others"),
        ({"initialisation": "mean", "corpus": "c"}, "corpus 'c': accepted: a corpus with initialisation cw2v"),
        ({"corpus": "c", "rank": 0}, "rank 0: accepted: 1 or more"),
        ({"corpus": "c", "lr": 0.0}, "lr 0.0: accepted: above 0"),
        ({"corpus": "c", "threshold": -1.0}, "threshold -1.0: accepted: above 0"),
        ({"initialisation": "multivariate", "sigma_scale": -1.0}, "sigma_scale -1.0: accepted: 0 or more"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(PretrainError, match=f"^vocabulary_expansion: {message}"):
        VocabularyExpansion("t", **fields)


def test_what_does_not_fit_is_named(tiny, old, tokenizer_of_code, prepared, tmp_path):
    with pytest.raises(PretrainError, match="the checkpoint has no tokenizer; accepted: one that has"):
        VocabularyExpansion(tokenizer_of_code, "mean")(tiny())
    with pytest.raises(PretrainError, match="the checkpoint has 97 rows and its tokenizer 290 ids; accepted: as many"):
        operate(tiny(), old, tokenizer_of_code, prepared, "mean")
    train_tokenizer(OLD_TEXTS, algorithm="unigram", vocab_size=270).save_pretrained(tmp_path / "unigram")
    with pytest.raises(
        PretrainError, match="the new tokenizer's type is 'Unigram'; accepted: 'BPE', as the checkpoint's"
    ):
        operate(tiny(vocab_size=290), old, str(tmp_path / "unigram"), prepared, "mean")
    with pytest.raises(PretrainError, match="no two tokens beside each other"):
        train([np.array([1])], torch.randn(4, 3), None, 2, Settings(2, 1, 2, 2.0, 0.1, 10, 1), torch.Generator())
    assert VocabularyExpansion("t", corpus="c").references() == {"tokenizer": "t", "corpus": "c"}


def test_tokens_that_stand_beside_the_pieces_keep_their_numbers_when_pieces_join(tokenizer_of_code):
    characters = train_tokenizer([], algorithm="bytes", mask=True)  # whose special tokens are none of its model's
    wide = joined("test", characters, load_tokenizer(tokenizer_of_code))
    known, found = characters.get_vocab(), wide.get_vocab()
    assert {token: found[token] for token in known} == known and len(set(found.values())) == len(found)
    assert wide.all_special_ids == characters.all_special_ids
    text = "def f(x): return x  # ü"
    assert wide.decode(encode(wide, [text])[0]) == text
