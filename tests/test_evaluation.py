"""Held-out likelihood: each token once, honest bits per byte, intervals; and the compressors beside it."""

from __future__ import annotations

import lzma
import math
import shutil
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core.errors import PretrainError
from pretrain.corpus.shards import Shards
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.evaluation._compressors import compressed_bits
from pretrain.evaluation._likelihood import document_nll, shard_loss, windows
from pretrain.evaluation.held_out import HeldOut


@settings(max_examples=200, deadline=None)
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
    metrics = HeldOut(length=64)(model, tokenizer, documents)
    size = {d: sum(len(x["text"].encode()) for x in documents if x["domain"] == d) for d in ("python", "docstrings")}
    total = sum(metrics[f"bits_per_byte/{d}"] * n for d, n in size.items())
    assert metrics["bits_per_byte"] == pytest.approx(total / sum(size.values()))
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert metrics["bits_per_byte/low"] < metrics["bits_per_byte"] < metrics["bits_per_byte/high"]
    assert metrics["bits_per_byte"] > 2  # random weights


def test_the_loop_measures_what_the_evaluation_measures(tiny, prepared):
    model, tokenizer = tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer")
    documents = list(Corpus(prepared / "corpus").documents("validation"))
    whole = shard_loss(model, Shards(prepared / "tokens" / "validation"), length=64, stride=32)
    metrics = HeldOut(length=64)(model, tokenizer, documents)
    assert whole["bits_per_byte"] == pytest.approx(metrics["bits_per_byte"], rel=1e-6)
    some = shard_loss(model, Shards(prepared / "tokens" / "validation"), length=64, max_tokens=300)
    assert some["loss"] == pytest.approx(whole["loss"], rel=0.05)


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
    assert (
        found["xz -9e"]["python"]
        == found["xz -9e"]["all"]
        == 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    )
    for tool, flags in (("xz", "-9e"), ("zstd", "-19")):
        if shutil.which(tool):
            packed = subprocess.run([tool, flags, "-c"], input=data, capture_output=True, check=True).stdout
            assert found[f"{tool} {flags}"]["all"] == pytest.approx(8 * len(packed) / len(data), rel=0.01)
