"""The vocabulary curriculum: which runs become tokens, any text is still spelt, and new rows are the last token's."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import new_model
from pretrain.corpus.tokenizers import load_tokenizer, train_tokenizer
from pretrain.surgery import Inputs
from pretrain.surgery.vocabulary.vocabulary_curriculum import Pieces, VocabularyCurriculum, merged, runs, surprises

TEXT = "the quick brown fox jumps over the lazy dog while the cat sleeps; über den Fluß, 東京. "
EASY = {"threshold": 50.0, "quantile": 1.0}  # an untrained model foresees nothing


def rows(tokenizer, text=TEXT * 3, length=60):
    """Text as a calibration batch: two documents a row."""
    ids = encode(tokenizer, [text])[0]
    ids_BL = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
    document_L = torch.tensor([1] * (length // 2) + [2] * (length - length // 2))
    position_L = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)])
    return [
        {
            "input_ids": ids_BL,
            "attention_mask": document_L.expand_as(ids_BL),
            "position_ids": position_L.expand_as(ids_BL),
        }
    ]


def small(tokenizer, tied=True, seed=0):
    fields = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    }
    return new_model(
        "llama", fields | {"tie_word_embeddings": tied}, task="causal", vocabulary=Vocabulary.of(tokenizer), seed=seed
    ).eval()


def expanded(tokenizer, model=None, **fields):
    inputs = Inputs(tokenizer=tokenizer, batches=rows(tokenizer))
    model = VocabularyCurriculum(**EASY | {"new_tokens": 12} | fields)(model or small(tokenizer), inputs)
    return model, inputs.extra["tokenizer"]


@pytest.fixture(scope="module")
def characters():
    return train_tokenizer([], algorithm="bytes")


@pytest.fixture(scope="module")
def grown(characters):
    """A model before and after, and the tokenizer after."""
    before = small(characters)
    return before, *expanded(characters, copy.deepcopy(before), new_tokens=20)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1, 1, 1, 2]), st.integers(0, 8)), min_size=1, max_size=30)
)
def test_runs_are_the_longest_in_which_each_token_is_foreseen_better_than_the_one_before(row):
    ids, document, surprise = map(list, zip(*row, strict=True))
    limit, special = 5, {0}
    joined = [
        ids[i] not in special and ids[i - 1] not in special and document[i] == document[i - 1]
        and surprise[i] < limit and surprise[i] <= surprise[i - 1]
        for i in range(1, len(row))
    ]  # fmt: skip
    cuts = [0, *(i for i in range(1, len(row)) if not joined[i - 1]), len(row)]
    pieces = [tuple(ids[a:b]) for a, b in itertools.pairwise(cuts)]
    assert list(runs(ids, document, surprise, limit, special)) == [piece for piece in pieces if len(piece) > 1]


def test_what_is_no_text_is_in_no_run():
    assert list(runs([7, 8, 9, 9], [1, 1, 0, 0], [3, 2, 1, 0], 5, set())) == [(7, 8)]


def test_a_run_is_merged_from_its_left_and_goes_on_from_what_is_a_token_already(characters):
    a, b, c, d = encode(characters, ["abcd"])[0]
    numbers, pieces = characters.get_vocab(), Pieces(characters)
    first = max(numbers.values()) + 1
    made = merged([(a, b, c), (a, b, d), (b, c)], numbers, 9, pieces)
    assert made == [
        ("a", "b", first, b),
        ("ab", "c", first + 1, c),
        ("ab", "d", first + 2, d),
        ("b", "c", first + 3, c),
    ]
    assert merged([(a, b, c), (a, b, d)], numbers, 2, pieces) == made[:2]


@settings(deadline=None)
@given(text=st.one_of(st.text(max_size=80), st.lists(st.sampled_from(TEXT.split(" ")), max_size=20).map(" ".join)))
def test_any_text_is_spelt_exactly_and_split_as_before_and_then_merged(text, grown, characters):
    _, _, tokenizer = grown
    before, after = encode(characters, [text])[0], encode(tokenizer, [text])[0]
    assert tokenizer.decode(after) == text
    names = tokenizer.convert_ids_to_tokens(after.tolist())
    assert "".join(names) == "".join(characters.convert_ids_to_tokens(before.tolist()))
    assert len(after) <= len(before)


def test_old_tokens_keep_their_numbers_and_the_text_has_fewer_of_the_new(grown, characters, tmp_path):
    _, model, tokenizer = grown
    old, new = characters.get_vocab(), tokenizer.get_vocab()
    assert {token: new[token] for token in old} == old and len(new) == len(old) + 20
    assert len(encode(tokenizer, [TEXT])[0]) < 0.95 * len(encode(characters, [TEXT])[0])
    checkpoint.save(model, tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == new


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_token_is_read_and_foreseen_as_its_last_one(characters, tied):
    before = small(characters, tied)
    model, tokenizer = expanded(characters, copy.deepcopy(before))
    old = len(characters)
    new = {token: number for token, number in tokenizer.get_vocab().items() if number >= old}
    state = {first + second: second for first, second in merges_of(tokenizer)}
    ids = torch.tensor(encode(characters, [TEXT])[0][:30])[None]
    with torch.no_grad():
        expected, logits = before(ids).logits, model(ids).logits
        assert torch.equal(logits[..., :old], expected)
        for token, number in new.items():
            last = tokenizer.get_vocab()[state[token]]
            assert torch.equal(logits[..., number], logits[..., last])
            ids[0, -1] = last
            as_last = model(ids).logits
            ids[0, -1] = number
            assert torch.equal(model(ids).logits, as_last)


def merges_of(tokenizer):
    return [tuple(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


def test_steps_follow_one_another_and_build_on_the_tokens_of_the_one_before(characters):
    model, tokenizer = expanded(characters, choose="frequent")
    again, more = expanded(tokenizer, model, choose="frequent")
    assert len(more) == len(tokenizer) + 12 == len(characters) + 24 == len(again.get_input_embeddings().weight)
    assert more.decode(encode(more, [TEXT])[0]) == TEXT
    longest = max(len(token) for token in more.get_vocab() if token not in characters.get_vocab())
    assert longest > 2


def test_the_most_frequent_runs_come_first_or_any_by_the_seed(characters):
    made = {
        choose: set(expanded(characters, new_tokens=4, choose=choose)[1].get_vocab())
        for choose in ("frequent", "random")
    }
    assert made["frequent"] != made["random"]
    assert set(expanded(characters, new_tokens=4)[1].get_vocab()) == made["random"]


def test_of_a_tokenizer_that_parts_words_no_token_grows_across_them():
    tokenizer = train_tokenizer([TEXT], vocab_size=270)
    _, wider = expanded(tokenizer, new_tokens=30)
    new = wider.get_vocab().keys() - tokenizer.get_vocab().keys()
    assert new and all("Ġ" not in token[1:] for token in new)
    assert wider.decode(encode(wider, [TEXT])[0]) == TEXT


def test_only_what_the_model_foresees_is_merged(characters):
    """A model that is sure of all that follows an `a`, and of nothing else."""
    model = small(characters)
    a, b = encode(characters, ["ab"])[0]
    ids_BL = torch.tensor(encode(characters, ["xabyabzab"])[0])[None]
    logits = torch.zeros(1, ids_BL.shape[1], len(characters))
    logits[0, ids_BL[0] == a, b] = 50.0
    for measure in ("entropy", "loss"):
        found = surprises(logits, ids_BL, measure)
        assert found[0, 0] == 0 and (found[0, ids_BL[0] == b] < 1e-6).all()
        others = (ids_BL[0] != b).numpy() & (np.arange(ids_BL.shape[1]) > 0)
        assert np.allclose(found[0].numpy()[others], np.log(len(characters)), atol=1e-4)

    class Sure:
        def __call__(self, *args, **kwargs):
            return type("Out", (), {"logits": logits})()

    method = VocabularyCurriculum()
    model.forward = Sure()
    groups = set(method._groups(model, {"input_ids": ids_BL}, set()))
    assert groups == {(a, b)}


def test_a_tokenizer_of_another_kind_and_a_model_that_foresees_nothing_are_refused(characters):
    tokenizer = train_tokenizer([TEXT] * 3, algorithm="unigram", vocab_size=270)
    with pytest.raises(PretrainError, match="tokenizer is a Unigram; accepted: BPE"):
        expanded(tokenizer)
    with pytest.raises(PretrainError, match="threshold 0.3: no token of the text is foreseen by less; accepted: more"):
        expanded(characters, threshold=0.3)  # by a model at random
    with pytest.raises(PretrainError, match="needs text to calibrate on"):
        VocabularyCurriculum()(small(characters), Inputs(tokenizer=characters))
