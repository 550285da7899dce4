"""Processors: made from a class and its fields, saved with a checkpoint, the one way from documents to tensors."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import pretrain
from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import new_model
from pretrain.core.processors import (
    SeriesProcessor,
    columns_of,
    image_of,
    inputs_of,
    load_processor,
    new_processor,
    samples_of,
    tokenizer_in,
    unit_of,
)
from pretrain.corpus.tokenizers import load_tokenizer

MADE = {
    "ViTImageProcessor": {"size": {"height": 16, "width": 16}},
    "Wav2Vec2FeatureExtractor": {"sampling_rate": 8000, "return_attention_mask": True},
    "SeriesProcessor": {"length": 8, "channels": 2, "standardise": True},
}


def png(size=(8, 8), seed=0):
    held = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, size, np.uint8)).save(held, "PNG")
    return {"bytes": held.getvalue(), "path": None}


def wav(samples, rate=8000):
    held = io.BytesIO()
    soundfile.write(held, samples, rate, format="WAV", subtype="FLOAT")
    return {"bytes": held.getvalue(), "path": None}


def documents():
    tone = np.sin(np.arange(900) / 9).astype(np.float32)
    return [
        {"image": png(seed=n), "audio": wav(tone[: 300 * n + 300]), "series": np.arange(2.0 * (n + 5)).reshape(-1, 2)}
        for n in range(3)
    ]


@pytest.mark.parametrize("name", MADE)
def test_it_comes_back_from_a_checkpoint_and_gives_the_same_inputs(tmp_path, name):
    made = new_processor(name, MADE[name])
    model = new_model(
        "vit",
        {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": 16,
            "patch_size": 8,
        },
        task="base",
    )
    checkpoint.save(model, made, tmp_path / "c")
    again, found = pretrain.load(tmp_path / "c")
    assert type(found) is type(made) and columns_of(found) == columns_of(made) and type(again) is type(model)
    first, second = (inputs_of(one, documents(), 600) for one in (made, found))
    assert set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in first)


def test_a_checkpoint_of_text_still_gives_its_tokenizer(tiny, prepared, tmp_path):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    checkpoint.save(tiny(vocab_size=512), tokenizer, tmp_path / "c")
    found = load_processor(tmp_path / "c")
    assert tokenizer_in(found) is found and found.get_vocab() == tokenizer.get_vocab()
    checkpoint.save(tiny(), None, tmp_path / "n")
    assert load_processor(tmp_path / "n") is None


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("ViTImagProcessor", {}, r"did you mean 'ViTImageProcessor'\?"),
        ("ViTModel", {}, "processor class 'ViTModel'; accepted: a processor, image processor"),
        (
            "ViTImageProcessor",
            {"sizes": 3},
            r"unknown field 'sizes' of processor ViTImageProcessor \(did you mean 'size'\?\)",
        ),
        ("SeriesProcessor", {"length": 0}, "SeriesProcessor: length 0: accepted: 1 or more"),
    ],
    ids=["misspelt", "a model", "a field", "a bound"],
)
def test_what_is_no_processor_is_refused(name, fields, message):
    with pytest.raises(PretrainError, match=message):
        new_processor(name, fields)


def test_a_checkpoint_s_own_code_is_not_run(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('run')\nclass Evil: ...\n")
    facts = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    with pytest.raises(PretrainError, match="the processor cannot be loaded"):
        load_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(PretrainError, match=r"preprocessor_config\.json"):
        load_processor(tmp_path)


def test_text_is_padded_and_cut_and_special_names_in_it_are_text(prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    batch = inputs_of(tokenizer, [{"text": "def f(x): return x"}, {"text": "<|mask|>" * 40}], 32)
    assert batch["input_ids"].shape == (2, 32) and batch["tokens"] == batch["attention_mask"].sum()
    assert batch["attention_mask"].sum(1).max() == 32 and Vocabulary.of(tokenizer).mask not in batch["input_ids"]
    assert inputs_of(tokenizer, [{"text": "x " * 90}], 24)["input_ids"].shape == (1, 24)
    assert inputs_of(tokenizer, [{"text": "x"}], 32)["input_ids"].shape == (1, 16)


def test_recordings_are_cut_averaged_and_resampled():
    rate = 16_000
    tone_L = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)
    found_L = samples_of(wav(np.stack([tone_L, np.zeros_like(tone_L)], 1), rate), 8000)
    assert len(found_L) == 8000
    loudest = np.abs(np.fft.rfft(found_L)).argmax()
    assert loudest == 440 and np.abs(found_L[1000:7000]).max() == pytest.approx(0.5, abs=0.02)
    extractor = new_processor("Wav2Vec2FeatureExtractor", MADE["Wav2Vec2FeatureExtractor"])
    batch = inputs_of(extractor, documents(), 600)
    assert batch["attention_mask"].sum(1).tolist() == [300, 600, 600] and batch["tokens"] == 1500


def test_series_are_filled_before_their_beginning_and_standardised():
    processor = SeriesProcessor(length=6, channels=1, standardise=True)
    batch = processor([[[1.0], [np.nan], [3.0]], np.arange(10.0)[:, None]])
    assert batch["past_observed_mask"][0, :, 0].tolist() == [False] * 3 + [True, False, True]
    assert batch["past_values"][0, :, 0].tolist() == [0, 0, 0, -1, 0, 1]
    middle = torch.arange(2.0, 8)
    assert torch.allclose(batch["past_values"][1, :, 0], (middle - middle.mean()) / middle.std(unbiased=False))
    with pytest.raises(PretrainError, match=r"a series of shape \(4, 2\); accepted: time x 1 channels"):
        processor([np.zeros((4, 2))])


def test_what_a_processor_counts_has_a_name(prepared):
    units = {"ViTImageProcessor": "images", "Wav2Vec2FeatureExtractor": "samples", "SeriesProcessor": "steps"}
    assert {name: unit_of(new_processor(name, MADE[name])) for name in units} == units
    assert unit_of(load_tokenizer(prepared / "tokenizer")) == unit_of(None) == "tokens"


def test_a_document_without_the_column_is_named():
    processor = new_processor("ViTImageProcessor", MADE["ViTImageProcessor"])
    with pytest.raises(PretrainError, match="document 'b' has no 'image'"):
        inputs_of(processor, [{"id": "a", "image": png()}, {"id": "b", "text": "x"}], 8)
    with pytest.raises(PretrainError, match="an image cannot be read"):
        inputs_of(processor, [{"image": {"bytes": b"GIF", "path": None}}], 8)


def test_a_processor_without_a_tokenizer_is_no_tokenizer():
    with pytest.raises(PretrainError, match="SeriesProcessor has no tokenizer; accepted: a tokenizer, for text"):
        Vocabulary.of(SeriesProcessor())


def test_grey_of_16_bits_keeps_its_shades_and_numbers_without_a_range_are_refused():
    shades = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    file = io.BytesIO()
    Image.fromarray(shades).save(file, "PNG")
    for value in (Image.fromarray(shades), {"bytes": file.getvalue()}):
        assert np.array_equal(np.asarray(image_of(value))[..., 0], shades // 257)
    with pytest.raises(PretrainError, match="mode F .*accepted: 8 or 16 bits"):
        image_of(Image.fromarray(np.zeros((2, 2), np.float32)))
