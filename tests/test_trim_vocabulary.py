"""Trimmed vocabularies: text of the domain is split as before, rows and logits of kept tokens are the old ones."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from closeness import assert_same_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pretrain.core import checkpoint
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import hidden
from pretrain.core.quick.vocabulary import CLS, SEP
from pretrain.corpus.tokenizers import load_tokenizer, train_tokenizer
from pretrain.surgery import Inputs, operate
from pretrain.surgery.compression.gptq import GPTQ
from pretrain.surgery.vocabulary import _trim
from pretrain.surgery.vocabulary.trim_vocabulary import TrimVocabulary
from pretrain.surgery.vocabulary.vocabulary_expansion import tables

trimmed = partial(_trim.trimmed, "trim_vocabulary")
OTHER = "Les naïfs ægithales hâtifs pondant à Noël où il gèle, 東京 — jumps over!"
KINDS = ["bpe", "unigram", "wordpiece", "sentencepiece"]


@pytest.fixture(scope="module")
def texts(stories):
    """A general corpus to train on, and the domain: a few of its documents."""
    every = [d["text"][:1500] for d in stories[:24]]
    return every, every[3:7]


@pytest.fixture(scope="module")
def tokenizers(texts):
    every, _ = texts
    return {
        "bpe": train_tokenizer(every, vocab_size=900, mask=True, sentinels=3),
        "unigram": train_tokenizer(every, algorithm="unigram", vocab_size=700),
        "wordpiece": wordpiece(every), "sentencepiece": sentencepiece(every),
    }  # fmt: skip


def wordpiece(texts):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    trainer = trainers.WordPieceTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def sentencepiece(texts):
    """Unigram without bytes: characters it has not seen are unknown."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def batches_of(tokenizer, texts, length=64):
    """Rows of the texts' tokens, with padding at the end of the last."""
    ids = np.concatenate(encode(tokenizer, texts))
    rows = -(-len(ids) // length)
    padded = np.zeros(rows * length, np.int64)
    padded[: len(ids)] = ids
    mask = (np.arange(rows * length) < len(ids)).astype(np.int64)
    whole = {"input_ids": torch.tensor(padded).view(rows, length), "attention_mask": torch.tensor(mask).view(rows, -1)}
    whole["position_ids"] = torch.arange(length).expand(rows, length)
    return [{k: v[b : b + 4] for k, v in whole.items()} for b in range(0, rows, 4)]


def model_for(tiny, tokenizer, family="llama", **fields):
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return tiny(family, vocab_size=len(tokenizer), **ids | fields)


def numbers(old, new):
    """Each old token's new number, for those that stay."""
    found = new.get_vocab()
    return {index: found[token] for token, index in old.get_vocab().items() if token in found}


@pytest.mark.parametrize("kind", KINDS)
def test_the_domains_text_is_split_into_the_same_tokens(tokenizers, texts, kind, tmp_path):
    old, (_, domain) = tokenizers[kind], texts
    before = encode(old, domain)
    used = {old.convert_ids_to_tokens(int(index)) for ids in before for index in np.unique(ids)}
    new, kept = trimmed(old, sorted(used))
    to = numbers(old, new)
    assert len(new) == len(kept) < len(old) and [to[index] for index in kept] == list(range(len(kept)))
    for one, other in zip(before, encode(new, domain), strict=True):
        assert [to[int(index)] for index in one] == other.tolist()
    words = sorted({word for text in domain for word in text.split()})  # and in pieces of it, in any order
    words = [word for word, ids in zip(words, encode(old, words), strict=True) if set(ids.tolist()) <= to.keys()]
    assert len(words) > 100
    for one, other in zip(encode(old, words), encode(new, words), strict=True):
        assert [to[int(index)] for index in one] == other.tolist()
    new.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == new.get_vocab() and again.all_special_tokens == old.all_special_tokens
    assert all(np.array_equal(a, b) for a, b in zip(encode(again, domain), encode(new, domain), strict=True))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_any_text_can_still_be_written(tokenizers, kind):
    old = tokenizers[kind]
    new, kept = trimmed(old, [])
    assert new.decode(encode(new, [OTHER])[0]) == old.decode(encode(old, [OTHER])[0])
    special = {entry.content for entry in old.added_tokens_decoder.values()}
    assert set(new.get_vocab()) - special - set(pre_tokenizers.ByteLevel.alphabet()) == set() or kind == "unigram"
    assert special | set(pre_tokenizers.ByteLevel.alphabet()) <= set(new.get_vocab())
    assert len(kept) <= 256 + len(special) + (kind == "unigram")


def test_characters_stay_where_there_are_no_bytes_and_unknown_ones_cost_the_same(tokenizers, texts):
    old, (every, _) = tokenizers["sentencepiece"], texts
    new, _ = trimmed(old, [])
    assert {token for token in old.get_vocab() if len(token) == 1} <= set(new.get_vocab())
    least = min(score for _, score in json.loads(old.backend_tokenizer.to_str())["model"]["vocab"])
    assert min(score for _, score in json.loads(new.backend_tokenizer.to_str())["model"]["vocab"]) == least
    assert new.convert_tokens_to_ids("<unk>") in encode(new, ["☃"])[0]
    assert new.convert_tokens_to_ids("<unk>") not in np.concatenate(encode(new, every[:3]))


def test_the_piece_of_least_score_stays_for_what_unknown_characters_cost():
    pieces = [("<unk>", 0.0), ("b", -1.0), ("c", -20.0), ("xb", -20.0), ("bc", -1.0), ("zz", -40.0), ("yy", -30.0)]
    old = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, 0, False)), unk_token="<unk>")
    new, _ = trimmed(old, ["xb", "bc"])
    assert set(new.get_vocab()) == {"<unk>", "b", "c", "xb", "bc", "zz"}
    assert old.tokenize("xbc") == new.tokenize("xbc") == ["xb", "c"]


def test_all_parts_of_a_kept_token_stay_by_every_merge():
    vocab = {token: i for i, token in enumerate(["a", "b", "c", "d", "ab", "bc", "cd", "abc", "abcd", "<e>"])}
    merges = [("a", "b"), ("b", "c"), ("c", "d"), ("ab", "c"), ("a", "bc"), ("abc", "d"), ("ab", "cd")]
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.add_special_tokens(["<e>"])
    old = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    new, _ = trimmed(old, ["abc"])
    assert new.get_vocab() == {t: i for i, t in enumerate(["a", "b", "c", "d", "ab", "bc", "abc", "<e>"])}
    kept = json.loads(new.backend_tokenizer.to_str())["model"]["merges"]
    assert [tuple(pair) for pair in kept] == [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    assert new.convert_ids_to_tokens(encode(new, ["abc"])[0]) == ["abc"]
    assert new.convert_ids_to_tokens(encode(new, ["cd"])[0]) == ["c", "d"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "modernbert", "t5"])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_and_logits_of_kept_tokens_are_the_old_ones(tiny, tokenizers, texts, family, tied, tmp_path):
    old, (_, domain) = tokenizers["bpe"], texts
    model = model_for(tiny, old, family, tie_word_embeddings=tied)
    given = batches_of(old, domain)
    with torch.no_grad():
        for table in tables(model):
            if table.ndim == 1:
                table.copy_(torch.linspace(-1, 1, len(table)))
    if family == "t5" and not tied:  # as it is opened from a checkpoint: the configuration says tied whatever it holds
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.all_tied_weights_keys.pop("lm_head.weight")
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    row = sum(p[0].numel() for p in model.parameters() if len(p) == len(old))
    rows, parameters = [table.clone() for table in tables(model)], model.num_parameters()

    def logits(ids):
        with torch.no_grad():
            if family == "t5":
                return model.double()(input_ids=ids, decoder_input_ids=ids).logits
            return model.double()(ids).logits

    ids = given[0]["input_ids"]
    before = logits(ids)
    model.float()
    inputs = Inputs(tokenizer=old, batches=given)
    model = TrimVocabulary()(model, inputs)
    new = inputs.extra["tokenizer"]
    to = numbers(old, new)
    kept = sorted(to)
    assert model.config.vocab_size == len(kept) == len(new)
    for mine, its in zip(tables(model), rows, strict=True):
        assert torch.equal(mine, its[kept])
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    after = logits(torch.tensor([[to[int(i)] for i in row] for row in ids]))
    torch.testing.assert_close(after, before[..., kept], atol=1e-13, rtol=1e-13)
    model.float()
    told = inputs.extra["metrics"]
    assert told["trim_vocabulary/tokens"] == len(new) < told["trim_vocabulary/tokens_before"] == len(old)
    assert told["trim_vocabulary/parameters"] == model.num_parameters()
    assert told["trim_vocabulary/parameters_before"] == parameters
    gone = row * (len(old) - len(new))
    assert parameters - model.num_parameters() == gone and told["trim_vocabulary/text_kept"] == 1
    checkpoint.save(model, new, tmp_path / "c")
    loaded, tokenizer = checkpoint.load(tmp_path / "c")
    assert tokenizer.get_vocab() == new.get_vocab() and type(loaded) is type(model)
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in model.named_parameters())


@pytest.mark.bits
def test_hidden_states_and_logits_are_bitwise_the_same_and_it_opens_in_transformers(tiny, tokenizers, texts, tmp_path):
    old, (_, domain) = tokenizers["bpe"], texts
    model, inputs = model_for(tiny, old), Inputs(tokenizer=old, batches=batches_of(old, domain))
    ids = inputs.batches[0]["input_ids"]
    states, weight = hidden(model, input_ids=ids), model.lm_head.weight.detach().clone()
    model = TrimVocabulary()(model, inputs)
    to = numbers(old, inputs.extra["tokenizer"])
    mapped = inputs.extra["batches"][0]["input_ids"]
    assert mapped.tolist() == [[to[int(i)] for i in row] for row in ids]
    assert torch.equal(hidden(model, input_ids=mapped), states)
    assert torch.equal(model(mapped).logits, torch.nn.functional.linear(states, weight[sorted(to)]))
    checkpoint.save(model, inputs.extra["tokenizer"], tmp_path / "c")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()
    assert_same_model(plain(mapped).logits, model(mapped).logits, model)


def test_special_ids_follow_their_tokens(tiny, texts):
    every, domain = texts
    old = train_tokenizer(every, vocab_size=700, cls=True, mask=True, extra=["<|tool|>"])
    model = model_for(tiny, old, pad_token_id=old.pad_token_id)
    model.config.eos_token_id = [old.sep_token_id, 650]  # an ordinary token too
    model.generation_config.suppress_tokens = [651, old.pad_token_id]
    model.generation_config.bad_words_ids = [[652, 653]]
    named = {index: old.convert_ids_to_tokens(index) for index in (650, 651, 652)}
    inputs = Inputs(tokenizer=old, batches=batches_of(old, domain))
    model = TrimVocabulary(keep=20)(model, inputs)
    new = inputs.extra["tokenizer"]
    at = new.get_vocab()
    assert model.config.eos_token_id == [at[SEP], at[named[650]]] and model.config.pad_token_id == at["<|pad|>"]
    assert model.model.embed_tokens.padding_idx == at["<|pad|>"]
    assert model.generation_config.suppress_tokens == [at[named[651]], at["<|pad|>"]]
    assert model.generation_config.bad_words_ids[0][0] == at[named[652]]
    assert new.cls_token_id == at[CLS] and "<|tool|>" in at
    assert new("a").input_ids[0] == at[CLS] and new("a").input_ids[-1] == at[SEP]


def test_special_tokens_that_move_are_found_again(tokenizers, texts):
    old = tokenizers["wordpiece"]
    backend = Tokenizer.from_str(old.backend_tokenizer.to_str())
    backend.add_special_tokens(["[LAST]"])
    backend.post_processor = processors.BertProcessing(("[LAST]", len(old)), ("[CLS]", 1))
    late = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[LAST]")
    late.backend_tokenizer.enable_padding(pad_id=len(old), pad_token="[LAST]")
    new, kept = trimmed(late, [])
    assert json.loads(new.backend_tokenizer.to_str())["padding"]["pad_id"] == len(kept) - 1
    assert new("a").input_ids[-1] == new.pad_token_id == len(kept) - 1 == new.get_vocab()["[LAST]"]


def test_the_most_frequent_and_those_that_occur_often_enough(tiny, tokenizers):
    count_V = torch.tensor([0, 5, 2, 2, 9, 1])
    assert TrimVocabulary().chosen(count_V) == [4, 1, 2, 3, 5]
    assert TrimVocabulary(keep=3).chosen(count_V) == [4, 1, 2]
    assert TrimVocabulary(minimum=2).chosen(count_V) == [4, 1, 2, 3]
    assert TrimVocabulary(keep=9, minimum=5).chosen(count_V) == [4, 1]


def test_of_the_text_only_what_is_kept_goes_to_the_next_surgery(tiny, tokenizers, texts):
    old, (_, domain) = tokenizers["bpe"], texts
    given = batches_of(old, domain)
    inputs = Inputs(tokenizer=old, batches=given)
    TrimVocabulary(keep=100)(model_for(tiny, old), inputs)
    to, before = numbers(old, inputs.extra["tokenizer"]), [b["input_ids"].clone() for b in given]
    share = []
    for batch, whole in zip(inputs.extra["batches"], given, strict=True):
        there = torch.tensor([[int(i) in to for i in row] for row in whole["input_ids"]])
        assert torch.equal(batch["attention_mask"] > 0, there & (whole["attention_mask"] > 0))
        assert batch["input_ids"][there].tolist() == [to[int(i)] for i in whole["input_ids"][there]]
        share += [batch["attention_mask"].sum() / 1.0, whole["attention_mask"].sum() / 1.0]
    assert 0.5 < sum(share[::2]) / sum(share[1::2]) < 1
    told = inputs.extra["metrics"]["trim_vocabulary/text_kept"]
    assert told == pytest.approx(float(sum(share[::2]) / sum(share[1::2])))
    assert all(torch.equal(b["input_ids"], one) for b, one in zip(given, before, strict=True))


@pytest.mark.bits
def test_it_is_followed_by_surgeries_that_calibrate(tiny, tokenizers, texts):
    old, (_, domain) = tokenizers["bpe"], texts
    given = batches_of(old, domain[:1])
    both, inputs, _ = operate([TrimVocabulary(), GPTQ(pack=False)], model_for(tiny, old), Inputs(old, given))
    alone = GPTQ(pack=False)(model_for(tiny, old), Inputs(old, given))
    assert len(inputs.tokenizer) == both.config.vocab_size < len(old)
    for name, parameter in both.model.layers.named_parameters():
        assert torch.equal(parameter, alone.model.layers.get_parameter(name))


def test_what_does_not_fit_is_refused(tiny, tokenizers, texts):
    old, (_, domain) = tokenizers["bpe"], texts
    given = batches_of(old, domain[:1])
    with pytest.raises(PretrainError, match="trim_vocabulary: keep -1: accepted: 0 or more"):
        TrimVocabulary(keep=-1)
    with pytest.raises(PretrainError, match="trim_vocabulary: minimum 0: accepted: 1 or more"):
        TrimVocabulary(minimum=0)
    with pytest.raises(PretrainError, match="trim_vocabulary: it needs text to calibrate on"):
        TrimVocabulary()(model_for(tiny, old), Inputs(tokenizer=old))
    with pytest.raises(PretrainError, match="the checkpoint has no tokenizer; accepted: one that has"):
        TrimVocabulary()(model_for(tiny, old), Inputs(batches=given))
    with pytest.raises(PretrainError, match="the text holds token .*: tokens that the tokenizer and the model know"):
        TrimVocabulary()(tiny(), Inputs(tokenizer=old, batches=given))
    few = [{"input_ids": torch.tensor([[5, 6]])}]
    with pytest.raises(PretrainError, match="has 97 rows and its tokenizer token .*; accepted: as many rows or more"):
        TrimVocabulary()(tiny(), Inputs(tokenizer=old, batches=few))
    word = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(PretrainError, match="is a WordLevel; accepted: BPE, Unigram, WordPiece"):
        trimmed(PreTrainedTokenizerFast(tokenizer_object=word), ["a"])
    model = model_for(tiny, old)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(PretrainError, match="head: a Sequential; accepted: a plain table"):
        TrimVocabulary()(model, Inputs(tokenizer=old, batches=given))
