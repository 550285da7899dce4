"""Tokenizers, token shards, packing and the loader."""

from __future__ import annotations

import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pretrain.core.batch import Vocabulary, document_mask, rows_to_tensors
from pretrain.core.errors import PretrainError, PretrainWarning
from pretrain.core.files import atomic_folder
from pretrain.core.processors import load_processor
from pretrain.corpus.packing import Plan, pack, plan_for
from pretrain.corpus.shards import Shards, tokenise
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizers import load_tokenizer, train_tokenizer
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.training.loader import Loader

TEXTS = ["def main():\n    return 0\n", "It's 2026, naïve café — 漢字 🙂\n\tend"] * 20


@pytest.mark.parametrize("algorithm", ["bpe", "unigram", "bytes"])
def test_a_tokenizer_gives_the_text_back_and_opens_with_transformers(tmp_path, algorithm):
    made = train_tokenizer(TEXTS, algorithm=algorithm, vocab_size=300, mask=True, sentinels=3)
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS[:2], "unseen: ÿ \x07 ∑"):
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        assert loaded.decode(ids) == text
    vocabulary = Vocabulary.of(loaded)
    assert vocabulary.bos == vocabulary.eos is not None and vocabulary.mask is not None
    assert len(vocabulary.sentinels) == 3 and vocabulary.special_V.sum() >= 6
    assert vocabulary.size <= 300 or algorithm == "bytes"


def test_cls_and_sep_frame_a_document_and_words_are_found():
    made = train_tokenizer(TEXTS, vocab_size=300, cls=True)
    vocabulary = Vocabulary.of(made)
    assert made("x")["input_ids"][0] == vocabulary.bos != vocabulary.eos == made("x")["input_ids"][-1]
    words = [made.convert_ids_to_tokens(int(i)) for i in np.flatnonzero(vocabulary.starts_word_V)]
    assert "Ġ" in words and "a" not in words


def test_wrong_tokenizers_are_one_clear_line(tmp_path):
    with pytest.raises(PretrainError, match=r"unknown tokenizer algorithm 'bpee' \(did you mean 'bpe'\?\)"):
        train_tokenizer(TEXTS, algorithm="bpee")
    with pytest.raises(PretrainError, match="vocab_size 100: accepted: 258 or more"):
        train_tokenizer(TEXTS, vocab_size=100)
    with pytest.raises(PretrainError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path)


def test_shards_hold_each_document_between_its_ends(prepared):
    shards, tokenizer = Shards(prepared / "tokens" / "train"), load_tokenizer(prepared / "tokenizer")
    documents = list(Corpus(prepared / "corpus").documents("train"))
    end = tokenizer.eos_token_id
    assert len(shards) == len(documents)
    for index in (0, 7, len(documents) - 1):
        ids = shards.document(index)
        assert ids[0] == end == ids[-1]
        assert tokenizer.decode(ids[1:-1].tolist()) == documents[index]["text"]
        assert shards.bytes_N[index] == len(documents[index]["text"].encode())
        assert shards.domain_names[shards.domains_N[index]] == documents[index]["domain"]
    assert shards.lengths_N.sum() == shards.tokens == len(shards.flat)
    shards.verify()


def test_shards_are_not_made_twice_and_damage_is_named(prepared, tmp_path):
    corpus, tokenizer = Corpus(prepared / "corpus"), load_tokenizer(prepared / "tokenizer")
    tokenise(corpus, tokenizer, tmp_path)
    path = tmp_path / "train" / "tokens.bin"
    before = path.stat().st_mtime_ns
    tokenise(corpus, tokenizer, tmp_path)
    assert path.stat().st_mtime_ns == before
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(PretrainError, match="checksum"):
        Shards(tmp_path / "train").verify()
    path.write_bytes(data[:-7])
    with pytest.raises(PretrainError, match="truncated"):
        Shards(tmp_path / "train")


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 2)), max_size=80), st.integers(2, 40))
def test_packing_places_each_token_once_and_keeps_short_documents_whole(documents, length):
    lengths = np.array([n for n, _ in documents], np.int64)
    domains = np.array([d for _, d in documents], np.uint16)
    plan = pack(lengths, domains, length)
    seen = {(d, t) for d, n in enumerate(lengths) for t in range(n)}
    for row in range(len(plan)):
        pieces = range(plan.first_R1[row], plan.first_R1[row + 1])
        assert 0 < sum(plan.length_P[p] for p in pieces) <= length
        for p in pieces:
            document = int(plan.document_P[p])
            assert domains[document] == plan.domain_R[row]
            if lengths[document] <= length:
                assert plan.length_P[p] == lengths[document]
            for t in range(plan.start_P[p], plan.start_P[p] + plan.length_P[p]):
                seen.remove((document, t))
    assert not seen


@pytest.mark.parametrize("length", [64, 256])
def test_padding_is_under_one_percent_on_a_real_corpus(prepared, length):
    shards = Shards(prepared / "tokens" / "train")
    plan = plan_for(shards, length)
    assert 1 - shards.tokens / (len(plan) * length) < 0.01


def test_a_million_documents_are_packed_in_seconds():
    import time

    started = time.perf_counter()
    lengths = np.random.default_rng(0).integers(10, 3000, 300_000)
    plan = pack(lengths, np.zeros(len(lengths), np.uint16), 1024)
    assert time.perf_counter() - started < 8
    assert 1 - lengths.sum() / (len(plan) * 1024) < 0.01


def loader(prepared, **more):
    vocabulary = Vocabulary.of(load_tokenizer(prepared / "tokenizer"))
    settings_ = {"length": 64, "batch_rows": 8, "micro_rows": 4, "seed": 3} | more
    return Loader(Shards(prepared / "tokens" / "train"), [CausalLM()], vocabulary, **settings_)


def rows(batches):
    return torch.cat([micro[0]["row_B"] for micro in batches]).tolist()


def test_an_epoch_takes_each_row_once_and_the_next_in_another_order(prepared):
    source = loader(prepared)
    size = len(source.plan)
    taken = [row for step in range(2 * size // 8 + 1) for row in rows(source.step(step, 0.0))]
    assert sorted(taken[:size]) == list(range(size))
    assert taken[:size] != taken[size : 2 * size] and sorted(taken[size : 2 * size]) == list(range(size))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mixture", [None, {"python": 3.0, "docstrings": 1.0}])
def test_a_resumed_loader_goes_on_as_if_nothing_had_happened(prepared, workers, mixture):
    whole = loader(prepared, mixture=mixture)
    expected = [whole.step(step, step / 10) for step in range(10)]
    first = loader(prepared, mixture=mixture, workers=workers)
    for step in range(4):
        first.step(step, step / 10)
    second = loader(prepared, mixture=mixture, workers=workers)
    second.load_state(first.state())
    for step in range(4, 10):
        for mine, theirs in zip(second.step(step, step / 10), expected[step], strict=True):
            for name, value in theirs[0].items():
                assert torch.equal(mine[0][name], value), name


@pytest.mark.promise("Determinism", "Any number of processes takes the rows that one would take.")
def test_processes_together_take_what_one_alone_would(prepared):
    alone = loader(prepared, batch_rows=8, micro_rows=2)
    two = [loader(prepared, batch_rows=8, micro_rows=2, rank=r, world=2) for r in range(2)]
    for step in range(3):
        parts = [source.step(step, 0.0) for source in two]
        interleaved = [micro for pair in zip(*parts, strict=True) for micro in pair]
        assert rows(alone.step(step, 0.0)) == rows(interleaved)


def test_a_mixture_draws_domains_by_weight_and_can_change(prepared):
    source = loader(prepared, mixture={"python": 0.8, "docstrings": 0.2}, workers=2)
    names = source.shards.domain_names

    def share(steps):
        drawn = [int(d) for s in steps for micro in source.step(s, 0.0) for d in micro[0]["domain_B"]]
        return drawn.count(names.index("python")) / len(drawn)

    assert abs(share(range(100)) - 0.8) < 0.05
    source.mixture = {"docstrings": 1.0}
    assert share(range(100, 110)) == 0.0
    assert source.mixture == {"docstrings": 1.0}


@pytest.mark.parametrize(
    ("mixture", "message"),
    [({"pyton": 1}, r"unknown domain in the mixture 'pyton' \(did you mean 'python'"), ({"python": -1}, "0 or more"), ({"python": 0}, "all weights are 0")],
)  # fmt: skip
def test_a_wrong_mixture_is_refused(prepared, mixture, message):
    with pytest.raises(PretrainError, match=message):
        loader(prepared, mixture=mixture)


def test_targets_are_the_next_tokens_inside_each_document(prepared):
    batch = loader(prepared).step(0, 0.0)[0][0]
    tokens, document, target = batch["tokens_BL"], batch["document_BL"], batch["target_BL"]
    for b in range(len(tokens)):
        for i in range(tokens.shape[1]):
            inside = i + 1 < tokens.shape[1] and document[b, i] == document[b, i + 1] != 0
            assert target[b, i] == (tokens[b, i + 1] if inside else -100)
    assert batch["weight"] == (target != -100).sum()
    assert batch["tokens"] == (document != 0).sum()


def test_positions_restart_and_masks_keep_documents_apart(prepared):
    source = loader(prepared)
    row = max((source.plan.row(source.shards, i) for i in range(len(source.plan))), key=lambda r: len(r.starts_D))
    assert (
        len(row.starts_D) > 1 and [len(p) for p in row.pieces()] == np.diff([*row.starts_D, len(row.tokens_L)]).tolist()
    )
    batch = rows_to_tensors([row], 64, 0)
    assert all(batch["position_BL"][0, start] == 0 for start in row.starts_D)
    mask = document_mask(batch["document_BL"], causal=True)[0, 0]
    for i in range(64):
        for j in range(64):
            same = batch["document_BL"][0, i] == batch["document_BL"][0, j]
            assert mask[i, j] == (bool(same) and j <= i)


def corpus_of(folder, *texts):
    from pretrain.corpus.store import write_corpus

    write_corpus([{"text": t, "domain": "d", "id": str(i)} for i, t in enumerate(texts)], folder, validation=0, test=0)
    return Corpus(folder)


def test_a_saved_truncation_cuts_nothing_and_special_tokens_in_a_text_are_text(tmp_path):
    made = train_tokenizer(TEXTS, vocab_size=300)
    made.backend_tokenizer.enable_truncation(4)
    made.backend_tokenizer.enable_padding(length=9)
    text = "END = '<|endoftext|>' and <|pad|> here, and much more than four tokens"
    shards = tokenise(corpus_of(tmp_path / "c", text), made, tmp_path / "t", splits=["train"])["train"]
    ids, end = shards.document(0), made.eos_token_id
    assert (ids == end).sum() == 2 and ids[0] == ids[-1] == end and made.pad_token_id not in ids
    assert made.decode(ids[1:-1].tolist()) == text


def test_a_tokenizer_without_a_beginning_still_ends_each_document(tmp_path):
    from transformers import PreTrainedTokenizerFast

    backend = train_tokenizer(TEXTS, vocab_size=300).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>")
    shards = tokenise(corpus_of(tmp_path / "c", "some text"), tokenizer, tmp_path / "t", splits=["train"])["train"]
    assert shards.document(0)[-1] == tokenizer.eos_token_id != shards.document(0)[0]
    assert shards.info["begins"] is False


def test_an_edited_corpus_is_tokenised_anew(tmp_path):
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    for text in ("alpha one", "ALPHA ONE"):
        shards = tokenise(corpus_of(tmp_path / "c", text), tokenizer, tmp_path / "t", splits=["train"])["train"]
        assert tokenizer.decode(shards.document(0)[1:-1].tolist()) == text


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "domains.npy", "bytes.npy", "tokens.json"])
def test_a_damaged_split_is_put_into_tokens_anew_with_a_warning(prepared, tmp_path, name):
    corpus, tokenizer = Corpus(prepared / "corpus"), load_tokenizer(prepared / "tokenizer")
    whole = tokenise(corpus, tokenizer, tmp_path)["train"].flat.tobytes()
    _flip(tmp_path / "train" / name)
    with pytest.warns(PretrainWarning, match=rf"train/{name} .*the train split is put into tokens anew"):
        again = tokenise(corpus, tokenizer, tmp_path)["train"]
    assert again.flat.tobytes() == whole
    again.verify()


@pytest.mark.parametrize("name", [f"{field.name}.npy" for field in fields(Plan)])
def test_a_damaged_plan_is_made_anew_with_a_warning(prepared, tmp_path, name):
    corpus, tokenizer = Corpus(prepared / "corpus"), load_tokenizer(prepared / "tokenizer")
    shards = tokenise(corpus, tokenizer, tmp_path)["train"]
    whole = {field.name: np.array(getattr(plan_for(shards, 48), field.name)) for field in fields(Plan)}
    _flip(tmp_path / "train" / "rows-48" / name)
    with pytest.warns(PretrainWarning, match=rf"rows-48/{name} .*the rows of 48 tokens are planned anew"):
        again = plan_for(shards, 48)
    assert all(np.array_equal(getattr(again, field), kept) for field, kept in whole.items())


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_one_flipped_bit_in_a_split_of_a_corpus_is_found_when_it_is_read(prepared, tmp_path, split):
    shutil.copytree(prepared / "corpus", tmp_path / "corpus")
    part = next((tmp_path / "corpus" / split).glob("*.parquet"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    for read in (Corpus.split, Corpus.documents, lambda corpus, name: corpus.sample(name, 3)):
        with pytest.raises(PretrainError, match=rf"{split}/.*is damaged or was replaced: its checksum"):
            read(Corpus(tmp_path / "corpus"), split)


@pytest.mark.parametrize("known", [True, False])
def test_a_damaged_part_is_named_where_only_columns_are_asked_for(prepared, tmp_path, known):
    shutil.copytree(prepared / "corpus", tmp_path / "corpus")
    part = min((tmp_path / "corpus").glob("*/*.parquet"))
    part.write_bytes(part.read_bytes()[:-9])
    if not known:
        (tmp_path / "corpus" / "checksums.json").unlink()
    with pytest.raises(PretrainError, match="part-00000.parquet"):
        _ = Corpus(tmp_path / "corpus").columns


def test_one_digit_changed_beside_a_tokenizer_is_found(prepared, tmp_path):
    with atomic_folder(tmp_path / "tokenizer") as work:
        load_tokenizer(prepared / "tokenizer").save_pretrained(work)
    for path in sorted((tmp_path / "tokenizer").glob("*.json")):
        text = path.read_text()
        path.write_text(text.replace("true", "false", 1) if "true" in text else text.replace("1", "2", 1))
        with pytest.raises(PretrainError, match=rf"{path.name} is damaged"):
            load_tokenizer(tmp_path / "tokenizer")
        with pytest.raises(PretrainError, match=rf"{path.name} is damaged"):
            load_processor(tmp_path / "tokenizer")
        path.write_text(text)


def test_two_runs_that_tokenise_the_same_at_once_do_it_once(tmp_path, prepared, monkeypatch):
    import threading
    import time

    from pretrain.corpus import shards as module

    written, write = [], module._write

    def slow(work, corpus, split, *rest):
        written.append(split)
        time.sleep(0.1)
        write(work, corpus, split, *rest)

    monkeypatch.setattr(module, "_write", slow)
    found = []

    def go():
        tokenizer = load_tokenizer(prepared / "tokenizer")
        found.append(tokenise(Corpus(prepared / "corpus"), tokenizer, tmp_path / "t"))

    threads = [threading.Thread(target=go) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(written) == ["test", "train", "validation"] and len(found) == 3
    assert len({one["train"].tokens for one in found}) == 1


def test_a_negative_seed_is_refused(prepared):
    with pytest.raises(PretrainError, match="seed -1: accepted: 0 or more"):
        loader(prepared, seed=-1)
