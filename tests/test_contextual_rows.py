"""Contextual rows: a new token's row is the mean, over its places, of what the model makes of its pieces there."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import embeddings, new_model
from pretrain.corpus.store import write_corpus
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.surgery import Inputs
from pretrain.surgery._tokens import joined
from pretrain.surgery.vocabulary import contextual_rows
from pretrain.surgery.vocabulary.contextual_rows import ContextualRows, aligned, spelt_by

OLD = ["the quick brown fox jumps over the lazy dog"] * 3
WORDS = ["phosphorylation", "kinase", "über", "membrane", "the", "dog"]
TEXTS = ["the kinase and the membrane; phosphorylation of the kinase, über all", "a dog has a membrane"]
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def old():
    return train_tokenizer(OLD, vocab_size=270, mask=True, cls=True)


@pytest.fixture(scope="module")
def domain(tmp_path_factory):
    """A folder with a corpus and a tokenizer of the domain."""
    folder = tmp_path_factory.mktemp("domain")
    documents = [{"text": text, "domain": "text", "id": str(number)} for number, text in enumerate(TEXTS)]
    write_corpus(documents, folder / "corpus", validation=0, test=0)
    train_tokenizer([*TEXTS * 3, "elsewhere " * 9], vocab_size=330).save_pretrained(folder / "tokenizer")
    return folder


def small(tokenizer, family="bert", **fields):
    vocabulary = Vocabulary.of(tokenizer)
    task = "masked" if family == "bert" else "causal"
    return new_model(family, SHAPE | fields, task=task, vocabulary=vocabulary, seed=0).eval()


def operated(model, old, domain, **fields):
    inputs = Inputs(tokenizer=old)
    model = ContextualRows(str(domain / "tokenizer"), str(domain / "corpus"), **fields)(copy.deepcopy(model), inputs)
    after = inputs.extra["tokenizer"]
    return model, after, sorted(set(after.get_vocab().values()) - set(old.get_vocab().values())), inputs


@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS) | st.text(min_size=1, max_size=6), max_size=12))
def test_a_new_token_is_found_where_its_pieces_spell_it(words, old, domain):
    from pretrain.corpus.tokenizers import load_tokenizer

    after = joined("test", old, load_tokenizer(domain / "tokenizer"))
    new = set(after.get_vocab().values()) - set(old.get_vocab().values())
    ids, wider = (encode(tokenizer, [" ".join(words)])[0] for tokenizer in (old, after))
    found = aligned(old, after, ids, wider, new)
    assert [place.token for place in found] == [token for token in wider.tolist() if token in new]
    for place in found:
        pieces = old.convert_ids_to_tokens(ids[place.first : place.after].tolist())
        assert "".join(pieces) == after.convert_ids_to_tokens(place.token)


def test_of_the_embeddings_own_states_it_is_the_mean_of_the_pieces(old, domain):
    model = small(old, "llama")
    made, after, new, inputs = operated(model, old, domain, layer=0, scaled=False)
    pieces = spelt_by(old, after, new)
    expected = torch.stack([embeddings(model).weight[pieces[token]].mean(0) for token in new])
    torch.testing.assert_close(embeddings(made).weight[new], expected)
    counts = inputs.extra["metrics"]
    assert 0 < counts["contextual_rows/in_context"] < len(new)  # `elsewhere` stands nowhere


@pytest.mark.parametrize("layer", [-1, 1])
def test_it_is_the_mean_over_places_of_the_mean_state_of_the_pieces(old, domain, layer):
    model = small(old)
    made, after, new, _ = operated(model, old, domain, layer=layer, scaled=False)
    sums, times = {}, {}
    for text in TEXTS:
        ids, wider = (encode(tokenizer, [text])[0] for tokenizer in (old, after))
        row = torch.tensor([[old.cls_token_id, *ids.tolist(), old.sep_token_id]])
        with torch.no_grad():
            states_LE = model.base_model(row, output_hidden_states=True).hidden_states[layer][0]
        at = 0
        for token in wider.tolist():
            length = len(after.convert_ids_to_tokens(token))
            first, covered = at, 0
            while covered < length:
                covered += len(old.convert_ids_to_tokens(int(ids[at])))
                at += 1
            if token in new:
                sums[token] = sums.get(token, 0) + states_LE[1 + first : 1 + at].mean(0)
                times[token] = times.get(token, 0) + 1
    assert max(times.values()) > 1
    for token, total in sums.items():
        torch.testing.assert_close(embeddings(made).weight[token], total / times[token], rtol=1e-4, atol=1e-5)
    old_rows = sorted(old.get_vocab().values())
    assert torch.equal(embeddings(made).weight[old_rows], embeddings(model).weight[old_rows])


def test_scaled_rows_are_as_long_as_the_old_ones_on_average(old, domain):
    plain, _, new, _ = operated(small(old), old, domain, scaled=False)
    made, after, _, _ = operated(small(old), old, domain)
    seen = [token for token in new if "elsew" not in after.convert_ids_to_tokens(token)]
    rows = embeddings(made).weight
    ratio = rows[seen].norm(dim=-1) / embeddings(plain).weight[seen].norm(dim=-1)
    changed = ratio[(ratio - 1).abs() > 1e-4]
    torch.testing.assert_close(changed, changed[:1].expand_as(changed))
    lengths = rows[sorted(old.get_vocab().values())].norm(dim=-1)
    assert len(changed) and rows[seen].norm(dim=-1).mean() < 2 * lengths.mean()


def test_how_many_windows_are_read_at_once_changes_nothing(old, domain, monkeypatch):
    model = small(old)
    made = [operated(model, old, domain, length=20)[0]]
    monkeypatch.setattr(contextual_rows, "WINDOWS", 1)
    made.append(operated(model, old, domain, length=20)[0])
    torch.testing.assert_close(*(embeddings(each).weight for each in made), rtol=1e-4, atol=1e-5)


def test_an_untied_head_and_its_bias_have_the_mean_of_the_pieces(old, domain):
    model = small(old, "llama", tie_word_embeddings=False)
    made, after, new, _ = operated(model, old, domain)
    pieces = spelt_by(old, after, new)
    head = model.get_output_embeddings().weight
    expected = torch.stack([head[pieces[token]].mean(0) for token in new])
    torch.testing.assert_close(made.get_output_embeddings().weight[new], expected)


def test_a_layer_that_is_not_there_is_refused(old, domain):
    with pytest.raises(PretrainError, match="layer 7: accepted: from -3 to 2"):
        operated(small(old), old, domain, layer=7)


def test_text_that_is_spelt_otherwise_gives_nothing(old):
    after = copy.deepcopy(old)
    assert aligned(old, after, np.array([60, 61]), np.array([60]), {60}) == []
