"""OFA: mixtures by similarity of meaning, and embeddings in two factors that are the best of their rank."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.models.cross_entropy import linear_cross_entropy
from pretrain.core.models.families import head, hidden
from pretrain.corpus.tokenizers import load_tokenizer, train_tokenizer
from pretrain.surgery import Inputs
from pretrain.surgery._tokens import joined
from pretrain.surgery.vocabulary._vectors import read, subwords
from pretrain.surgery.vocabulary.ofa import Ofa

TEXTS = ["the quick brown fox jumps over the lazy dog, then the dog sleeps while the fox is quick"] * 3
MORE = ["The Dog returns a value, a vulpine fox returns it; zebras sleep over there"] * 3
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "then",
    "sleeps",
    "is",
    "returns",
    "vulpine",
    "value",
]
TOKENS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def old():
    return train_tokenizer(TEXTS, vocab_size=290, mask=True)


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new")
    train_tokenizer(MORE, vocab_size=310).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def wide(old, new):
    return joined("test", old, load_tokenizer(new))


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    numbers = np.random.default_rng(0).normal(size=(len(WORDS), 5)).astype(np.float32)
    path = tmp_path_factory.mktemp("vectors") / "words.vec"
    lines = [
        f"{len(WORDS)} 5",
        *(f"{w} {' '.join(map(repr, map(float, v)))}" for w, v in zip(WORDS, numbers, strict=True)),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path), numbers


def by_hand(tokenizer, numbers):
    """Each token's vector: the words one by one."""
    found = {}
    for word, vector in zip(WORDS, numbers.astype(np.float64), strict=True):
        for spelt in (word, " " + word, " " + word.capitalize()):
            for token in set(tokenizer(spelt, add_special_tokens=False)["input_ids"]):
                found.setdefault(token, []).append(vector)
    return {token: np.mean(given, axis=0) for token, given in found.items()}


def mixed(old, wide, numbers, rows, neighbors=10, temperature=0.1):
    """The rows that the paper's formula gives new tokens, and the tokens that it says nothing of."""
    near, far = by_hand(old, numbers), by_hand(wide, numbers)
    made, silent = {}, []
    lower = {old.decode([i]).lower(): i for i in range(len(old)) if i not in old.all_special_ids}
    for token in range(len(old), len(wide)):
        if wide.decode([token]).lower() in lower:
            made[token] = rows[lower[wide.decode([token]).lower()]]
        elif token in far:
            cosine = np.zeros(len(old))
            for other, vector in near.items():
                cosine[other] = far[token] @ vector / np.linalg.norm(far[token]) / np.linalg.norm(vector)
            best = np.argsort(-cosine, kind="stable")
            last, next_ = best[neighbors - 1], best[neighbors]
            best, share = best[:neighbors], np.exp(cosine[best[:neighbors]] / temperature)
            made[token] = (share / share.sum()) @ rows[best]
            if cosine[last] - cosine[next_] < 1e-6 and not np.allclose(rows[last], rows[next_]):
                made[token] = None  # which of equally near ones is taken is not said
        else:
            silent.append(token)
    return made, silent


def operate(model, old, new, vectors, **fields):
    inputs = Inputs(tokenizer=old)
    return Ofa(new, (vectors[0],), **fields)(model, inputs), inputs


def test_subwords_are_the_means_of_the_words_they_are_part_of(wide, vectors):
    words, numbers = read("ofa", [vectors[0]], 0)
    assert words == WORDS and np.array_equal(numbers, vectors[1])
    found, wanted = subwords(wide, words, numbers, len(wide)), by_hand(wide, numbers)
    assert {i for i, row in enumerate(found) if row.any()} == set(wanted)
    assert all(np.allclose(found[i], row) for i, row in wanted.items())


@pytest.mark.bits
@pytest.mark.parametrize(
    ("family", "fields"),
    [("llama", {}), ("gpt2", {}), ("bert", {}), ("bert", {"tie_word_embeddings": False}), ("t5", {})],
)
def test_whole_rows_are_mixed_as_the_formula_says(tiny, old, new, wide, vectors, tmp_path, family, fields):
    model = tiny(family, vocab_size=len(old), **fields)
    if family == "bert":
        with torch.no_grad():
            model.cls.predictions.decoder.bias.copy_(torch.linspace(-1, 1, len(old)))
    tables = [
        model.get_input_embeddings().weight,
        model.get_output_embeddings().weight,
        model.get_output_embeddings().bias,
    ]
    before = [None if t is None else t.detach().clone() for t in tables]
    made, inputs = operate(model, old, new, vectors, dimension=0, neighbors=3)
    head = made.get_output_embeddings()
    told = inputs.extra["metrics"]
    assert inputs.extra["tokenizer"].get_vocab() == wide.get_vocab() and made.config.vocab_size == len(wide)
    for start, table in zip(before, (made.get_input_embeddings().weight, head.weight, head.bias), strict=True):
        if start is None:
            continue
        assert torch.equal(table[: len(old)], start) and len(table) == len(wide)
        wanted, silent = mixed(old, wide, vectors[1], start.double().numpy(), neighbors=3)
        assert len(wanted) == told["ofa/copied"] + told["ofa/mixed"] and told["ofa/copied"] > 0 < told["ofa/mixed"]
        assert len(wanted) + len(silent) == told["ofa/new_tokens"] and silent
        assert sum(row is not None for row in wanted.values()) > 6
        for token, row in wanted.items():
            assert row is None or np.allclose(table[token].detach().numpy(), row, atol=1e-6), (
                wide.convert_ids_to_tokens(token)
            )
        assert torch.isfinite(table).all() and not torch.allclose(table[silent[0]], start.mean(0))
    checkpoint.save(made, inputs.extra["tokenizer"], tmp_path / "c")
    loaded, _ = checkpoint.load(tmp_path / "c")
    extra = {"decoder_input_ids": TOKENS} if family == "t5" else {}
    assert torch.equal(loaded(TOKENS, **extra).logits, made(TOKENS, **extra).logits)


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_the_factors_are_the_best_of_their_rank_and_new_coordinates_are_mixed(tiny, old, new, wide, vectors, family):
    model = tiny(family, vocab_size=len(old), tie_word_embeddings=True)
    table = model.get_input_embeddings().weight.detach().double()
    parameters = model.num_parameters()
    made, _ = operate(model, old, new, vectors, dimension=7)
    layer = made.get_input_embeddings()
    assert layer.coordinates.shape == (len(wide), 7) and layer.primitives.shape == (7, 32)
    left = (table - layer.weight[: len(old)].double()).square().sum()
    assert left.item() == pytest.approx(torch.linalg.svdvals(table)[7:].square().sum().item(), rel=1e-4)
    assert torch.allclose(layer.coordinates[: len(old)].T @ layer.coordinates[: len(old)], torch.eye(7), atol=1e-5)
    rows = layer.coordinates[: len(old)].detach().double().numpy()
    wanted, silent = mixed(old, wide, vectors[1], rows)
    sure = {token: row for token, row in wanted.items() if row is not None}
    assert len(sure) > 6
    assert all(np.allclose(layer.coordinates[t].detach().numpy(), row, atol=1e-5) for t, row in sure.items())
    drawn = layer.coordinates[silent].detach().numpy()
    assert np.abs(drawn - rows.mean(0)).max() < 6 * rows.std(0).max()
    biased = len(wide) - len(old) if family == "bert" else 0
    assert made.num_parameters() == parameters - 32 * len(old) + 7 * (len(wide) + 32) + biased


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_table_of_that_rank_gives_the_same_logits_of_old_tokens(tiny, old, new, vectors, family):
    model = tiny(family, vocab_size=len(old), tie_word_embeddings=True)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight.copy_(torch.randn(len(old), 6) @ torch.randn(6, 32) / 10)
    before = model(TOKENS).logits
    made, _ = operate(model, old, new, vectors, dimension=6)
    logits = made(TOKENS).logits
    assert torch.allclose(logits[..., : len(old)], before, atol=1e-4)
    assert torch.allclose(
        hidden(made, input_ids=TOKENS) @ head(made)[0].T + (0 if head(made)[1] is None else head(made)[1]),
        logits,
        atol=1e-5,
    )


@pytest.mark.bits
@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_factors_are_saved_and_come_back(tiny, old, new, vectors, tmp_path, family):
    import transformers

    made, inputs = operate(tiny(family, vocab_size=len(old), tie_word_embeddings=True), old, new, vectors, dimension=5)
    logits = made(TOKENS).logits
    assert torch.equal(copy.deepcopy(made)(TOKENS).logits, logits)
    checkpoint.save(made, inputs.extra["tokenizer"], tmp_path / "c")
    loaded, tokenizer = checkpoint.load(tmp_path / "c")
    assert torch.equal(loaded(TOKENS).logits, logits) and loaded.num_parameters() == made.num_parameters()
    assert len(tokenizer) == loaded.config.vocab_size
    with pytest.raises(ValueError, match="pretrain_"):
        transformers.AutoModel.from_pretrained(tmp_path / "c")


def test_both_factors_are_trained_through_embeddings_and_head(tiny, old, new, vectors):
    made, _ = operate(tiny("gpt2", vocab_size=len(old)), old, new, vectors, dimension=5)
    plain = tiny("gpt2", vocab_size=made.config.vocab_size)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(
                made.transformer.wte.weight if name == "transformer.wte.weight" else made.get_parameter(name)
            )
    for model in (made, plain):
        linear_cross_entropy(hidden(model, input_ids=TOKENS[:, :-1]), head(model)[0], TOKENS[:, 1:])[0].backward()
    layer, whole_VE = made.transformer.wte, plain.transformer.wte.weight.grad
    assert torch.allclose(layer.coordinates.grad, whole_VE @ layer.primitives.T, atol=1e-5)
    assert torch.allclose(layer.primitives.grad, layer.coordinates.T @ whole_VE, atol=1e-5)


def test_the_other_formats_hold_the_same_and_several_files_are_one_space(vectors, tmp_path):
    _, numbers = vectors
    (tmp_path / "w.json").write_text(json.dumps({w: v.tolist() for w, v in zip(WORDS, numbers, strict=True)}))
    save_file({"vectors": numbers}, tmp_path / "w.safetensors", {"words": json.dumps(WORDS)})
    (tmp_path / "c.txt").write_text("eng:dog 1 2 3 4 5\ndeu:$hund 5 4 3 2 1\n12:30 0 0 0 0 1\n")
    for name in ("w.json", "w.safetensors"):
        words, found = read("ofa", [str(tmp_path / name)], 0)
        assert words == WORDS and np.array_equal(found, numbers)
        assert (
            read("ofa", [str(tmp_path / name)], 3)[0] == WORDS[:3]
            and len(read("ofa", [str(tmp_path / name)], 3)[1]) == 3
        )
    words, found = read("ofa", [vectors[0], str(tmp_path / "c.txt")], 2)
    assert words == ["the", "quick", "dog", " hund"] and found.shape == (4, 5) and found[3].tolist() == [5, 4, 3, 2, 1]
    assert read("ofa", [str(tmp_path / "c.txt")], 0)[0][2] == "12:30"


def test_files_that_are_no_vectors_are_refused(vectors, tmp_path):
    (tmp_path / "p.pkl").write_bytes(pickle.dumps({"dog": [1.0]}))
    (tmp_path / "p.vec").write_bytes(pickle.dumps({"dog": [1.0]}))
    (tmp_path / "a.vec").write_text("dog 1 2\ncat 1\n")
    (tmp_path / "b.json").write_text("[1, 2]")
    (tmp_path / "n.json").write_text('{"dog": [1, NaN]}')
    (tmp_path / "two.json").write_text('{"dog": [1, 2]}')
    save_file({"vectors": vectors[1]}, tmp_path / "w.safetensors")
    for name in ("p.pkl", "none.vec"):
        with pytest.raises(PretrainError, match=r"ofa: vectors .*: accepted: a file \.vec or \.txt"):
            read("ofa", [str(tmp_path / name)], 0)
    for name in ("p.vec", "a.vec", "b.json", "w.safetensors"):
        with pytest.raises(PretrainError, match=r"ofa: vectors .*accepted: \.vec or \.txt"):
            read("ofa", [str(tmp_path / name)], 0)
    with pytest.raises(PretrainError, match="hold NaN or infinity"):
        read("ofa", [str(tmp_path / "n.json")], 0)
    with pytest.raises(PretrainError, match="have 2 numbers; accepted: 5, as in the first file"):
        read("ofa", [vectors[0], str(tmp_path / "two.json")], 0)


@pytest.mark.bits
def test_nothing_is_mixed_where_no_token_is_new(tiny, old, vectors, tmp_path):
    old.save_pretrained(tmp_path / "same")
    model = tiny("gpt2", vocab_size=len(old))
    before = model(TOKENS).logits
    made, _ = operate(model, old, str(tmp_path / "same"), vectors, dimension=0)
    assert torch.equal(made(TOKENS).logits, before)
    made, _ = operate(tiny("gpt2", vocab_size=len(old)), old, str(tmp_path / "same"), vectors, dimension=31)
    assert made.transformer.wte.coordinates.shape == (len(old), 31)


def test_models_that_cannot_be_factorised_are_named(tiny, old, new, vectors):
    with pytest.raises(PretrainError, match="ofa: dimension 400: accepted: 0 to 32"):
        operate(tiny("gpt2", vocab_size=len(old)), old, new, vectors)
    with pytest.raises(
        PretrainError, match="ofa: dimension 5 with a head that is not tied: accepted: 0, or one table, tied"
    ):
        operate(tiny(vocab_size=len(old)), old, new, vectors, dimension=5)
    with pytest.raises(PretrainError, match="ofa: dimension 5 with embeddings shared by several layers"):
        operate(tiny("t5", vocab_size=len(old)), old, new, vectors, dimension=5)
    made, _ = operate(tiny("gpt2", vocab_size=len(old)), old, new, vectors, dimension=5)
    with pytest.raises(PretrainError, match="ofa: the embeddings are a FactorisedEmbedding; accepted: a plain table"):
        operate(made, old, new, vectors, dimension=5)
    with pytest.raises(PretrainError, match="ofa: the checkpoint has no tokenizer"):
        Ofa(new, (vectors[0],), dimension=0)(tiny("gpt2"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vectors": ()}, r"vectors \[\]: accepted: one or more files"),
        ({"neighbors": 0}, "neighbors 0: accepted: 1 or more"),
        ({"dimension": -1}, "dimension -1: accepted: 0 or more"),
        ({"temperature": 0.0}, "temperature 0.0: accepted: above 0"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(PretrainError, match=f"^ofa: {message}"):
        Ofa(**{"tokenizer": "t", "vectors": ("v",)} | fields)
    assert Ofa("t", ("v", "w")).references() == {"tokenizer": "t", "vectors.0": "v", "vectors.1": "w"}
