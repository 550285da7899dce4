"""Held-out likelihood: each token once, honest bits per byte, intervals; and the compressors beside it."""

from __future__ import annotations

import json
import lzma
import math
import shutil
import subprocess
import tracemalloc
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core import checkpoint
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.files import digest
from pretrain.core.models.likelihood import document_nll, windows
from pretrain.corpus.shards import Shards, tokenise
from pretrain.corpus.store import Corpus, write_corpus
from pretrain.corpus.tokenizers import load_tokenizer, train_tokenizer
from pretrain.decoding import Decoding
from pretrain.evaluation._intervals import bounds, resampled_sums
from pretrain.evaluation.likelihood._compressors import compressed_bits
from pretrain.evaluation.likelihood._shards import _windows, shard_loss
from pretrain.evaluation.likelihood.held_out import HeldOut, measured, tokens_of
from pretrain.stages import Job
from pretrain.stages.decode import Decode, beginnings, continue_prompt
from pretrain.stages.evaluate import Evaluate, evaluate


@settings(max_examples=200)
@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_windows_predict_each_token_after_the_first_once(count, length, data):
    stride = data.draw(st.integers(1, length))
    tokens = np.arange(count)
    predicted = []
    for window in windows(0, tokens, length, stride):
        assert len(window.tokens) - 1 <= length
        predicted += window.tokens[1 + window.context :].tolist()
        assert window.context == 0 or window.context >= min(length - stride, window.context)
    assert predicted == list(range(1, count))


def reference(model, tokens):
    with torch.no_grad():
        logits = model(torch.tensor([tokens.tolist()])).logits.double().log_softmax(-1)
    return -sum(float(logits[0, i, tokens[i + 1]]) for i in range(len(tokens) - 1))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_likelihood_is_that_of_plain_transformers(tiny, name):
    model, rng = tiny(name), np.random.default_rng(0)
    documents = [rng.integers(3, 97, n) for n in (1, 2, 30, 7, 45)]
    found = document_nll(model, documents, length=60, batch_tokens=64)
    assert found == pytest.approx([reference(model, d) for d in documents], rel=1e-5)


def test_long_documents_are_cut_into_windows_with_context(tiny):
    model, tokens = tiny(), np.random.default_rng(0).integers(3, 97, 50)
    found = document_nll(model, [tokens], length=20, stride=20)[0]
    parts = [tokens[0:21], tokens[20:41], tokens[40:50]]
    assert found == pytest.approx(sum(reference(model, p) for p in parts), rel=1e-5)
    wide = document_nll(model, [tokens], length=20, stride=5)[0]
    assert wide != found


def test_bits_per_byte_add_up_over_domains_and_lie_in_their_interval(tiny, prepared):
    model, tokenizer = tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer")
    documents = list(Corpus(prepared / "corpus").documents("test"))
    found = HeldOut(length=64)(model, tokenizer, documents)
    metrics, (low, high) = found.metrics, found.intervals["bits_per_byte"]
    size = {d: sum(len(x["text"].encode()) for x in documents if x["domain"] == d) for d in ("python", "docstrings")}
    total = sum(found.domains[d]["bits_per_byte"] * n for d, n in size.items())
    assert metrics["bits_per_byte"] == pytest.approx(total / sum(size.values()))
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert low < metrics["bits_per_byte"] < high and metrics["bits_per_byte"] > 2  # random weights


def test_each_documents_numbers_are_kept_and_give_the_metrics_again(tiny, prepared, tmp_path):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    checkpoint.save(tiny(vocab_size=512), tokenizer, tmp_path / "c", {"length": 32})
    inputs = {"checkpoint": tmp_path / "c", "corpus": prepared / "corpus"}
    written = Evaluate(checkpoint="c", corpus="d", compressors=False).run(Job(tmp_path, inputs, say=lambda text: None))
    documents = list(Corpus(prepared / "corpus").documents("test"))
    kept = json.loads((tmp_path / "documents.json").read_text())
    assert set(kept) == {"held_out"} and len(kept["held_out"]) == len(documents) > 5
    for row, document in zip(kept["held_out"], documents, strict=True):
        assert row["digest"] == digest(document["text"])[:16] and row["domain"] == document["domain"]
        assert row["bytes"] == len(document["text"].encode()) and row["nll"] > row["targets"]
    again, whole = measured(kept["held_out"]), json.loads((tmp_path / "evaluation.json").read_text())
    assert again.metrics == whole["metrics"] and again.domains == whole["domains"]
    assert {name: list(ends) for name, ends in again.intervals.items()} == whole["intervals"]
    by_domain = {f"{k}/{d}": v for d, values in again.domains.items() for k, v in values.items()}
    assert written["metrics"] == again.metrics | by_domain


def test_a_row_holds_the_whole_likelihood_and_counts_bytes_not_characters(tiny, prepared):
    model, tokenizer = tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer")
    documents = [{"text": "déjà vu, 北京"}, {"text": "plain", "domain": "d"}]
    first, second = HeldOut(length=64, resamples=9)(model, tokenizer, documents).documents
    tokens = tokens_of(tokenizer, documents)
    assert [row["nll"] for row in (first, second)] == document_nll(model, tokens, length=64, stride=32).tolist()
    assert [row["targets"] for row in (first, second)] == [len(ids) - 1 for ids in tokens]
    assert (first["bytes"], second["bytes"]) == (17, 5) and (first["domain"], second["domain"]) == ("text", "d")


def test_the_loop_measures_what_the_evaluation_measures(tiny, prepared):
    model, tokenizer = tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer")
    documents = list(Corpus(prepared / "corpus").documents("validation"))
    whole = shard_loss(model, Shards(prepared / "tokens" / "validation"), length=64, stride=32)
    found = HeldOut(length=64)(model, tokenizer, documents)
    flat = found.metrics | {f"{k}/{d}": v for d, some in found.domains.items() for k, v in some.items()}
    assert whole == pytest.approx(flat, rel=1e-6)
    some = shard_loss(model, Shards(prepared / "tokens" / "validation"), length=64, max_tokens=300)
    assert some["loss"] == pytest.approx(whole["loss"], rel=0.05)


def test_text_that_names_special_tokens_is_encoded_as_for_training(tiny, tmp_path):
    texts = [f"{i} <|endoftext|> and <|pad|> stand here as text" for i in range(40)]
    documents = [{"text": text, "domain": "d", "id": str(i)} for i, text in enumerate(texts)]
    write_corpus(documents, tmp_path / "corpus", validation=0.3, test=0.1, near_duplicates=None)
    tokenizer = train_tokenizer(texts, vocab_size=300)
    corpus = Corpus(tmp_path / "corpus")
    shards = tokenise(corpus, tokenizer, tmp_path / "tokens")["validation"]
    model, held_out = tiny(vocab_size=300), list(corpus.documents("validation"))
    found = HeldOut(length=64, stride=64)(model, tokenizer, held_out)
    assert found.metrics == pytest.approx(
        {k: v for k, v in shard_loss(model, shards, length=64).items() if "/" not in k}, rel=1e-6
    )


@pytest.mark.parametrize("name", ["all", "low", "high", "a/low", "a/high"])
def test_no_domain_is_taken_for_anything_else(tiny, prepared, name):
    model, tokenizer = tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer")
    documents = [{"text": "one two", "domain": name}, {"text": "three four five six", "domain": "b"}] * 8
    found = evaluate(model, tokenizer, documents, [HeldOut(resamples=9)], compressors=True)
    assert set(found["domains"]) == {name, "b"} and set(found["intervals"]) == {"loss", "bits_per_byte"}
    assert set(found["metrics"]) == {"loss", "perplexity", "bits_per_byte"}
    alone = evaluate(model, tokenizer, documents[:1] * 8, [HeldOut(resamples=9)], compressors=True)
    assert found["domains"][name]["loss"] == pytest.approx(alone["metrics"]["loss"])
    xz, own = (x["compressors"]["xz -9e"] for x in (found, alone))
    assert xz["domains"][name] == own["metrics"] != xz["metrics"]


def test_a_model_in_training_is_measured_without_dropout_and_given_back(tiny, prepared):
    model, tokenizer = tiny("gpt2", vocab_size=512), load_tokenizer(prepared / "tokenizer")
    documents = [{"text": "a little text of no consequence", "domain": "d"}]
    expected = HeldOut(resamples=9)(model, tokenizer, documents)
    assert HeldOut(resamples=9)(model.train(), tokenizer, documents) == expected and model.training


def test_empty_documents_are_passed_over_and_nothing_but_them_refused(tiny, prepared):
    model, tokenizer = tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer")
    documents = [{"text": "a", "domain": "d"}, {"text": "", "domain": "e"}]
    found = evaluate(model, tokenizer, documents, [HeldOut(resamples=9)], compressors=True)
    assert math.isfinite(found["metrics"]["bits_per_byte"]) and set(found["compressors"]["zstd -19"]["domains"]) == {
        "d"
    }
    with pytest.raises(PretrainError, match="held_out: no text to predict in 1 document; "):
        HeldOut()(model, tokenizer, documents[1:])
    assert compressed_bits(documents[1:])["xz -9e"] == {"metrics": {}, "domains": {}}


def test_a_token_that_nothing_predicts_takes_its_bytes_with_it(tiny):
    tokenizer = train_tokenizer(["abcd"], algorithm="bytes")
    tokenizer.bos_token = tokenizer.eos_token = None
    model = tiny(vocab_size=len(tokenizer))
    documents = [{"text": "abcd"}, {"text": "x"}, {"text": ""}]
    found = HeldOut(length=8, resamples=9)(model, tokenizer, documents).metrics
    nll = reference(model, encode(tokenizer, ["abcd"])[0])
    assert found["loss"] == pytest.approx(nll / 3, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / 3, rel=1e-5)


def test_the_bootstrap_agrees_with_the_delta_method_and_takes_little_memory():
    rng = np.random.default_rng(0)
    values = np.stack([rng.gamma(2.0, size=4000), rng.integers(1, 50, 4000)], axis=1)
    tracemalloc.start()
    sums = resampled_sums(values, 500, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    low, high = bounds(sums[:, 0] / sums[:, 1])
    ratio = values[:, 0].sum() / values[:, 1].sum()
    spread = np.std(values[:, 0] - ratio * values[:, 1]) / values[:, 1].mean() / math.sqrt(4000)  # the delta method
    assert low == pytest.approx(ratio - 1.96 * spread, abs=0.3 * spread)
    assert high == pytest.approx(ratio + 1.96 * spread, abs=0.3 * spread)
    assert peak < 500 * 4000  # not resamples times documents


@pytest.mark.bits
def test_the_window_is_the_length_that_the_checkpoint_was_trained_at(tiny, prepared, tmp_path):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    model = tiny(vocab_size=512, max_position_embeddings=256)
    stage = Evaluate(checkpoint="c", corpus="d", compressors=False)
    inputs = {"checkpoint": tmp_path / "c", "corpus": prepared / "corpus"}
    found = []
    for lineage in ({"length": 16}, {}):
        checkpoint.save(model, tokenizer, tmp_path / "c", lineage)
        found.append(stage.run(Job(tmp_path, inputs, say=lambda text: None))["metrics"]["loss"])
    documents = list(Corpus(prepared / "corpus").documents("test"))
    for loss, length in zip(found, (16, 256), strict=True):
        assert loss == HeldOut(length=length)(model, tokenizer, documents).metrics["loss"]
    assert found[0] != found[1]


def test_the_stage_gives_evaluations_the_columns_that_they_ask_for(tiny, prepared, tmp_path):
    checkpoint.save(tiny("bert", vocab_size=512), load_tokenizer(prepared / "tokenizer"), tmp_path / "c")
    rows = [{"text": f"text {i}", "domain": "d", "id": str(i), "kind": "ab"[i % 2]} for i in range(40)]
    write_corpus(rows, tmp_path / "corpus", validation=0.1, test=0.8, near_duplicates=None)
    inputs = {"checkpoint": tmp_path / "c", "corpus": tmp_path / "corpus"}
    probe = {"method": "probe", "label": "kind", "length": 8}
    stage = Evaluate(checkpoint="c", corpus="d", evaluations=[probe, {"method": "retrieval", "shortest": 1}])
    said: list[str] = []
    metrics = stage.run(Job(tmp_path, inputs, say=said.append))["metrics"]
    assert {"probe_accuracy", "probe_majority", "mrr@10", "retrieval_skipped"} <= set(metrics) and "mrr@10" in said[0]
    with pytest.raises(PretrainError, match="accepted: each method once"):
        Evaluate(checkpoint="c", corpus="d", evaluations=["held_out", "held_out"])
    wrong = Evaluate(checkpoint="c", corpus="d", evaluations=[{"method": "probe", "label": "colour"}])
    with pytest.raises(PretrainError, match="label 'colour' has 0 values"):
        wrong.run(Job(tmp_path, inputs))


def test_beginnings_of_documents_are_judged_by_model_and_compressors_alike(tiny, prepared, tmp_path):
    checkpoint.save(tiny("llama", vocab_size=512), load_tokenizer(prepared / "tokenizer"), tmp_path / "c")
    whole = Corpus(prepared / "corpus").sample("test", 5)
    cut = [document | {"text": document["text"][:40]} for document in whole]
    assert cut != whole
    stage = Evaluate(checkpoint="c", corpus="d", max_documents=5, max_characters=40)
    stage.run(Job(tmp_path, {"checkpoint": tmp_path / "c", "corpus": prepared / "corpus"}))
    rows = json.loads((tmp_path / "documents.json").read_text())["held_out"]
    assert [row["digest"] for row in rows] == [digest(document["text"])[:16] for document in cut]
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["compressors"] == compressed_bits(cut)
    assert "max_characters" not in Evaluate(checkpoint="c", corpus="d").config()
    assert stage.config()["max_characters"] == 40


def test_a_checkpoint_without_a_tokenizer_is_one_clear_error(tiny, prepared, tmp_path):
    checkpoint.save(tiny(vocab_size=512), None, tmp_path / "c")
    inputs = {"checkpoint": tmp_path / "c", "corpus": prepared / "corpus"}
    for stage in (Evaluate(checkpoint="c", corpus="d"), Decode(checkpoint="c", prompts=["a"])):
        with pytest.raises(PretrainError, match="has no tokenizer; accepted: one with tokenizer.json"):
            stage.run(Job(tmp_path, inputs))


def test_beginnings_of_held_out_documents_are_continued_beside_how_they_go_on(tiny, prepared, tmp_path):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    checkpoint.save(tiny(vocab_size=512, max_position_embeddings=1024), tokenizer, tmp_path / "c")
    inputs = {"checkpoint": tmp_path / "c", "corpus": prepared / "corpus"}
    stage = Decode(checkpoint="c", prompts=["def "], corpus="d", documents=2, max_new_tokens=6)
    assert stage.references() == {"checkpoint": "c", "corpus": "d"}
    stage.run(Job(tmp_path, inputs))
    first, *others = json.loads((tmp_path / "samples.json").read_text())["samples"]
    texts = [document["text"] for document in Corpus(prepared / "corpus").documents("test")]
    assert first["prompt"] == "def " and "truth" not in first and len(others) == 2
    for sample in others:
        assert any(text.startswith(sample["prompt"] + sample["truth"]) for text in texts) and sample["truth"]
        assert len(tokenizer(sample["truth"], add_special_tokens=False)["input_ids"]) <= 7


def test_windows_that_are_measured_are_of_all_the_text_alike_and_are_those_of_the_whole():
    """Each window once where all are asked for; of a half each document and each place in it has about its share."""
    lengths_N = np.array([1, 2, 65, 1000, 3000] * 40)
    windows = list(zip(*_windows(lengths_N, 64, 10**9), strict=True))
    for number, size in enumerate(lengths_N):
        own = [(start, count) for i, start, count in windows if i == number]
        assert [start for start, _ in own] == list(range(0, max(size - 1, 0), 64))
        assert sum(count for _, count in own) == max(0, size - 1)
    number_P, start_P, targets_P = _windows(lengths_N, 64, 80_000)
    assert 79_900 < targets_P.sum() <= 80_000
    long_P = lengths_N[number_P] == 3000
    assert targets_P[long_P].sum() == pytest.approx(80_000 * 3000 / 4068, rel=0.05)
    assert start_P[long_P].mean() == pytest.approx(1472, rel=0.05)  # and not their beginnings


def test_all_held_out_text_is_measured_where_it_is_no_more_than_is_asked_for(prepared, tiny):
    model, shards = tiny("llama", vocab_size=512), Shards(prepared / "tokens" / "validation")
    total = int(shards.lengths_N.sum())
    whole = shard_loss(model, shards, length=64)
    assert shard_loss(model, shards, length=64, max_tokens=total) == whole
    assert shard_loss(model, shards, length=64, max_tokens=total // 2) != whole


@pytest.mark.parametrize(
    ("texts", "cut"),
    [
        (["one two three four"], [("one two", " three four")]),  # half of it, to the end of a word
        (["x" * 1000], [("x" * 200, "x" * 800)]),
        (["", " ", "\n\n\n\n"], []),
        (["aa bb cc dd"] * 5, [("aa", " bb cc dd")] * 3),
    ],
)
def test_what_a_held_out_prompt_is(texts, cut):
    documents = SimpleNamespace(sample=lambda split, most, columns: [{"text": text} for text in texts])
    assert beginnings(documents, 3) == cut


def test_held_out_prompts_are_of_each_domain_in_turn():
    rows = [
        {"text": f"{name} {number} more words here", "domain": name[0]} for name in ("en", "fr") for number in range(4)
    ]
    drawn = beginnings(SimpleNamespace(sample=lambda split, most, columns: rows), 3)
    assert [prompt[:4] for prompt, _ in drawn] == ["en 0", "fr 0", "en 1"]


def test_a_decode_stage_without_anything_to_continue_is_refused():
    with pytest.raises(PretrainError, match="at least one, or a corpus"):
        Decode(checkpoint="c")


@dataclass(frozen=True)
class Echo(Decoding):
    """Continues with the token 5."""

    name = "echo"

    def decode(self, model, input_ids_BL, options):
        raise NotImplementedError

    def generate(self, model, input_ids_BL, *, max_new_tokens=64, **more):
        return torch.cat([input_ids_BL, torch.full((1, max_new_tokens), 5)], dim=1)


@dataclass(frozen=True)
class Dice(Echo):
    """Notes what it is asked to sample with."""

    name, samples = "dice", True
    asked: list[tuple[float, float]] = field(default_factory=list)

    def generate(self, model, input_ids_BL, *, temperature, top_p, **more):
        self.asked.append((temperature, top_p))
        return input_ids_BL


def test_a_method_is_given_the_temperature_or_refuses_it(tiny, prepared):
    model, tokenizer = tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer")
    ours = {"checkpoint": "c", "prompts": ["a"], "method": Echo()}
    sample = continue_prompt(model, tokenizer, "a", method=Decode(**ours).method, max_new_tokens=3)
    assert sample["tokens"] == 3 and sample["method"] == "echo"
    Decode(**ours, temperature=0.0, top_p=1.0)
    for more in ({"temperature": 0.8}, {"top_p": 0.9}):
        with pytest.raises(PretrainError, match="'echo' does not sample; accepted: temperature 0 and no top_p"):
            Decode(**ours, **more)
        with pytest.raises(PretrainError, match="'echo' does not sample"):
            continue_prompt(model, tokenizer, "a", method=Echo(), **more)
    dice = Dice()
    for more, expected in (({}, (0.8, 0.95)), ({"temperature": 0.3}, (0.3, 0.95)), ({"top_p": 0.5}, (0.8, 0.5))):
        continue_prompt(model, tokenizer, "a", method=dice, **more)
        assert dice.asked.pop() == expected


def test_greedy_decoding_is_the_likeliest_token_and_sampling_is_seeded(tiny, prepared):
    model, tokenizer = tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer")
    greedy = continue_prompt(model, tokenizer, "def ", temperature=0, max_new_tokens=4, token_healing=False)
    ids = [tokenizer.bos_token_id, *tokenizer("def ", add_special_tokens=False)["input_ids"]]
    given = len(ids)
    while len(ids) < given + greedy["tokens"]:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert greedy["continuation"] == tokenizer.decode(ids[given:], skip_special_tokens=True)
    one, two, three = (continue_prompt(model, tokenizer, "def ", seed=s)["continuation"] for s in (0, 0, 1))
    assert one == two != three


def test_an_encoder_decoder_s_own_tokens_are_the_continuation(tiny, prepared):
    model, tokenizer = tiny("t5", vocab_size=512), load_tokenizer(prepared / "tokenizer")
    sample = continue_prompt(model, tokenizer, "def run(self, a, b, c):", temperature=0, max_new_tokens=6)
    ids = [tokenizer.bos_token_id, *tokenizer("def run(self, a, b, c):", add_special_tokens=False)["input_ids"]]
    plain = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    assert sample["tokens"] == plain.shape[1] - 1
    assert sample["continuation"] == tokenizer.decode(plain[0, 1:], skip_special_tokens=True)


def test_a_stride_that_would_skip_tokens_is_refused(tiny):
    with pytest.raises(PretrainError, match="stride 30, length 20: accepted: 1 <= stride <= length"):
        document_nll(tiny(), [np.arange(3, 90)], length=20, stride=30)


def test_an_encoder_is_refused_with_what_is_accepted(tiny):
    with pytest.raises(PretrainError, match="accepted: a causal language model"):
        document_nll(tiny("bert"), [np.arange(3, 9)], length=8)


def test_compressors_give_what_the_programs_give(tmp_path, stories):
    documents = [d for d in stories if d["domain"] == "python"][:20]
    data = "".join(d["text"] for d in documents).encode()
    found = compressed_bits(documents)
    expected = {"bits_per_byte": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)}
    assert found["xz -9e"] == {"metrics": expected, "domains": {"python": expected}}
    for tool, flags in (("xz", "-9e"), ("zstd", "-19")):
        if shutil.which(tool):
            packed = subprocess.run([tool, flags, "-c"], input=data, capture_output=True, check=True).stdout
            bits = found[f"{tool} {flags}"]["metrics"]["bits_per_byte"]
            assert bits == pytest.approx(8 * len(packed) / len(data), rel=0.01)
