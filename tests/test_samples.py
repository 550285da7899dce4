"""Samples to look at: what is kept of a document, and what a model makes of what was hidden from it."""

from __future__ import annotations

import base64
import io
import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PatchTSTConfig,
    PatchTSTForPrediction,
    PatchTSTForPretraining,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    Wav2Vec2Config,
    Wav2Vec2ForPreTraining,
)

from pretrain.core import samples
from pretrain.core.models import reconstruction
from pretrain.core.models.reconstruction import Answer, reconstructions
from pretrain.core.samples import document_samples, series_sample, spans, waveform_sample, write_samples
from pretrain.corpus.samples import corpus_documents

DOCUMENTS = [{"id": f"d{i}", "domain": "x", "label": i} for i in range(2)]


def pixels(uri):
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def png(array):
    held = io.BytesIO()
    Image.fromarray(array).save(held, format="PNG")
    return {"bytes": held.getvalue(), "path": None}


def wave(seconds=1.0, rate=8000):
    held = io.BytesIO()
    samples_L = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(round(seconds * rate)) / rate)
    soundfile.write(held, samples_L, rate, format="WAV")
    return {"bytes": held.getvalue(), "path": None}


# Documents


def test_each_kind_of_document_is_shown_by_its_column():
    documents = [
        {"id": "a", "label": 3, "image": png(np.full((4, 8), 200, np.uint8))},
        {"id": "b", "audio": wave()},
        {"id": "c", "series": [[1.0, 5.0], [2.0, 6.0]]},
        {"id": "d", "text": "x" * 900},
        {"id": "e", "other": 1},
        {"id": "f", "image": {"bytes": b"broken", "path": None}},
    ]
    found = document_samples(documents)
    assert [(s["kind"], s["title"]) for s in found] == [
        ("image", "a"),
        ("waveform", "b"),
        ("series", "c"),
        ("text", "d"),
    ]
    (long,) = document_samples([{"id": "front " + "x" * 200 + " end", "text": "t"}])
    assert long["title"].startswith("front x") and long["title"].endswith("x end") and len(long["title"]) == 161
    assert document_samples([{"id": "front " + "x" * 150, "text": "t"}])[0]["title"] == "front " + "x" * 150
    assert found[0]["label"] == "3" and (pixels(found[0]["input"]) == 200).all()
    assert found[2]["input"] == [[1.0, 2.0], [5.0, 6.0]]
    decoded = Image.new("RGBA", (200, 100))
    assert pixels(document_samples([{"image": decoded}])[0]["input"]).shape == (48, 96, 3) and decoded.size == (
        200,
        100,
    )
    assert len(found[3]["input"]) == samples.LETTERS + 1
    json.dumps(found, allow_nan=False)


def test_a_waveform_keeps_its_range_its_length_and_its_frequency():
    (found,) = document_samples([{"id": "a", "audio": wave(seconds=2.0)}])
    assert found["seconds"] == 2.0 and len(found["input"]) == samples.BINS
    assert all(low < -0.98 and high > 0.98 for low, high in found["input"][1:-1])
    bands_K = pixels(found["spectrogram"]).astype(float).mean(axis=1)
    loudest = len(bands_K) - 1 - bands_K.argmax()  # from the lowest band up: 1,000 of at most 4,000 Hz
    assert abs(loudest / len(bands_K) - 0.25) < 0.03
    assert len(waveform_sample(np.zeros(3), 8000)["input"]) == 3


def test_a_large_picture_is_made_small_and_long_series_are_thinned():
    (image,) = document_samples([{"image": png(np.zeros((300, 600, 3), np.uint8))}])
    assert pixels(image["input"]).shape == (48, 96, 3)
    found = series_sample(np.arange(10_000.0)[:, None] * np.ones(9))
    assert len(found["input"]) == samples.CHANNELS and len(found["input"][0]) == samples.POINTS
    assert found["input"][0][0] == pytest.approx(np.arange(10_000 // samples.POINTS + 1).mean(), rel=0.05)


@settings(max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_spans_are_exactly_what_is_hidden(hidden):
    found = spans(np.array(hidden), len(hidden))
    assert [any(start <= i < end for start, end in found) for i in range(len(hidden))] == hidden
    assert all(a[1] < b[0] for a, b in pairwise(found))


def test_what_is_written_stays_within_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "MAX_BYTES", 1000)
    write_samples(tmp_path, [{"kind": "text", "input": "x" * 300}] * 10)
    written = json.loads((tmp_path / "samples.json").read_text())["samples"]
    assert len(written) == 3


def test_documents_to_look_at_are_from_the_whole_corpus(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "train").mkdir()
    for part in range(3):
        rows = [{"id": str(part * 10 + i), "label": i} for i in range(10)]
        path = tmp_path / "train" / f"part-{part:05d}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    assert [d["id"] for d in corpus_documents(tmp_path, 5)] == ["0", "6", "12", "18", "24"]
    assert len(corpus_documents(tmp_path, 50)) == 30 and corpus_documents(tmp_path, 3)[0] == {"id": "0", "label": 0}
    assert corpus_documents(tmp_path, 3, split="test") == []


def test_a_data_stage_leaves_documents_to_look_at(tmp_path):
    from pretrain.stages import Job
    from pretrain.stages.data import Data

    (tmp_path / "a.txt").write_text("a text to look at")
    stage = Data.model_validate({"sources": [str(tmp_path / "a.txt")], "validation": 0, "test": 0})
    stage.run(Job(tmp_path / "out", {}, say=lambda text: None))
    (sample,) = json.loads((tmp_path / "out" / "samples.json").read_text())["samples"]
    assert sample["kind"] == "text" and sample["input"] == "a text to look at"


# Models


def mae(**fields):
    torch.manual_seed(0)
    return ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=16, mask_ratio=0.25, **fields,
        )
    )  # fmt: skip


def images(seed=0, count=2, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_a_masked_autoencoder_shows_what_it_saw_and_what_it_made_of_the_rest():
    model, batch = mae(), {"pixel_values": images(), "tokens": torch.tensor(2)}
    found = reconstructions(model, batch, DOCUMENTS)
    assert [(s["kind"], s["title"], s["label"]) for s in found] == [("image", "d0", "0"), ("image", "d1", "1")]
    for sample in found:
        true, seen, made = (pixels(sample[name]).astype(int) for name in ("input", "masked", "output"))
        hidden = (seen == 128).all(-1)
        assert (
            hidden.reshape(4, 4, 4, 4).transpose(0, 2, 1, 3).reshape(16, 16).all(1).sum() == 4
        )  # a quarter of the patches
        assert (true[~hidden] == seen[~hidden]).all() and (true[~hidden] == made[~hidden]).all()
        assert (true[hidden] != made[hidden]).mean() > 0.9
    assert (
        reconstructions(model, batch, DOCUMENTS) == found and reconstructions(model, batch, DOCUMENTS, seed=1) != found
    )


@pytest.mark.parametrize("normalised", [False, True])
def test_a_perfect_reconstruction_is_the_image(normalised):
    model, true_BCHW = mae(norm_pix_loss=normalised), images()
    patches_BPN = model.patchify(true_BCHW)
    if normalised:
        mean, variance = patches_BPN.mean(-1, keepdim=True), patches_BPN.var(-1, keepdim=True)
        patches_BPN = (patches_BPN - mean) / (variance + 1e-6) ** 0.5
    output = SimpleNamespace(logits=patches_BPN, mask=torch.ones(2, 16))
    processor = SimpleNamespace(do_normalize=True, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    for sample in reconstruction._patched_images(Answer(model, {"pixel_values": true_BCHW}, output, None, processor)):
        assert (pixels(sample["masked"]) == 128).all()
        assert np.abs(pixels(sample["output"]).astype(int) - pixels(sample["input"])).max() <= 1  # to rounding
    painted = np.rint(255 * (true_BCHW[1].numpy().transpose(1, 2, 0) * [0.5, 0.6, 0.7] + [0.1, 0.2, 0.3]))
    assert np.abs(pixels(sample["input"]) - np.clip(painted, 0, 255)).max() <= 1


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (None, [0, 255]),
        (SimpleNamespace(do_normalize=False, do_rescale=True, rescale_factor=1 / 255), [51, 102]),
        (SimpleNamespace(do_normalize=False, do_rescale=False), [0, 0]),
        (
            SimpleNamespace(image_processor=SimpleNamespace(do_normalize=True, image_mean=[0.2], image_std=[2.0])),
            [153, 255],
        ),
    ],
)
def test_pixels_are_what_the_processor_read(processor, expected):
    show = reconstruction._painter(torch.tensor([[[0.2, 0.4]]]), processor)
    assert show(torch.tensor([[[0.2, 0.4]]])).tolist() == [expected]


def test_masked_images_of_other_models_are_shown_by_the_patches_of_the_batch():
    torch.manual_seed(0)
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForMaskedImageModeling(ViTConfig(image_size=16, patch_size=4, encoder_stride=4, **fields))
    hidden_BP = torch.zeros(2, 16, dtype=torch.bool)
    hidden_BP[:, 5] = True
    found = reconstructions(model, {"pixel_values": images(), "bool_masked_pos": hidden_BP}, DOCUMENTS)
    true, made = pixels(found[0]["input"]), pixels(found[0]["output"])
    changed = (true != made).any(-1)
    assert changed[4:8, 4:8].all() and not changed[:4].any() and not changed[8:].any()


def patchtst(stride=4, length=4, **fields):
    torch.manual_seed(0)
    return PatchTSTForPretraining(
        PatchTSTConfig(
            num_input_channels=2, context_length=18, patch_length=length, patch_stride=stride, d_model=8,
            num_hidden_layers=1, num_attention_heads=2, ffn_dim=8, random_mask_ratio=0.25, **fields,
        )
    )  # fmt: skip


@pytest.mark.parametrize(("stride", "length", "cls"), [(4, 4, False), (2, 4, False), (3, 5, False), (4, 4, True)])
def test_a_perfect_reconstruction_of_hidden_steps_is_the_series(monkeypatch, stride, length, cls):
    model = patchtst(stride, length, use_cls_token=cls)
    values_BLC = 100 + 10 * torch.randn(2, 18, 2, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(model.head, "forward", lambda states: perfect[0])
    perfect = []
    model.model.register_forward_hook(lambda module, given, output: perfect.insert(0, output.patch_input))
    found = reconstructions(model, {"past_values": values_BLC}, DOCUMENTS)
    assert [s["kind"] for s in found] == ["series", "series"]
    shares = []
    for b, sample in enumerate(found):
        for c in range(2):
            assert sample["input"][c] == pytest.approx(values_BLC[b, :, c].tolist(), rel=1e-3)
            inside = [any(start <= i < end for start, end in sample["masked"][c]) for i in range(18)]
            assert [value is not None for value in sample["output"][c]] == inside
            known = [(v, t) for v, t in zip(sample["output"][c], sample["input"][c]) if v is not None]
            assert known and all(v == pytest.approx(t, rel=1e-3) for v, t in known)
            shares.append(sum(inside) / 18)
    assert 0.2 < np.mean(shares) < 1 and not any(inside_first(sample, model) for sample in found)


def inside_first(sample, model):
    """Whether a step before the first patch is said to be hidden."""
    start = model.model.patchifier.sequence_start
    return any(first < start for channel in sample["masked"] for first, _ in channel)


def test_a_forecast_goes_on_where_the_series_ends():
    torch.manual_seed(0)
    config = PatchTSTConfig(
        num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, d_model=8, num_hidden_layers=1,
        num_attention_heads=2, ffn_dim=8, prediction_length=5, loss="mse",
    )  # fmt: skip
    past, future = torch.randn(2, 16, 2), torch.randn(2, 5, 2)
    model = PatchTSTForPrediction(config)
    for sample in reconstructions(model, {"past_values": past, "future_values": future}, DOCUMENTS):
        assert [len(line) for line in (*sample["input"], *sample["output"])] == [21] * 4
        assert sample["output"][0][:16] == [None] * 16 and None not in sample["output"][0][16:]
        assert sample["masked"] == [[[16, 21]]] * 2
    assert reconstructions(model, {"past_values": past}, DOCUMENTS)[0]["input"][0][16:] == [None] * 5


def test_hidden_frames_of_a_recording_are_shown_in_its_time():
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_kernel=(10, 8), conv_stride=(10, 8), num_feat_extract_layers=2, num_codevectors_per_group=4, codevector_dim=8,
        proj_codevector_dim=8, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = Wav2Vec2ForPreTraining(config)
    input_BL, mask_BL = torch.randn(2, 8000), torch.ones(2, 8000, dtype=torch.long)
    mask_BL[1, 4000:] = 0
    hidden_BF = torch.zeros(2, 100, dtype=torch.bool)
    hidden_BF[:, 20:30] = True
    batch = {"input_values": input_BL, "attention_mask": mask_BL, "mask_time_indices": hidden_BF}
    long, short = reconstructions(model, batch, DOCUMENTS, SimpleNamespace(sampling_rate=8000))
    assert (long["kind"], long["seconds"], short["seconds"]) == ("waveform", 1.0, 0.5)
    assert long["masked"] == [[60, 90]] and short["masked"] == [[120, 180]]  # of 300 bins
    assert [v is not None for v in long["output"]] == hidden_BF[0].tolist() and len(short["output"]) == 50
    assert all(-1 <= v <= 1 for v in long["output"] if v is not None)
    del batch["attention_mask"]  # as of a feature extractor that tells no padding: the document itself has its length
    documents = [DOCUMENTS[0] | {"audio": wave(2.0)}, DOCUMENTS[1] | {"audio": wave(0.5)}]
    long, short = reconstructions(model, batch, documents, SimpleNamespace(sampling_rate=8000))
    assert (long["seconds"], short["seconds"], len(short["output"])) == (1.0, 0.5, 50)
    assert all(low < -0.98 and high > 0.98 for low, high in short["input"][1:-1]), "the recording, not what was read"


def test_hidden_words_are_shown_as_the_model_fills_them_in(monkeypatch):
    fields = {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    model = BertForMaskedLM(BertConfig(**fields))
    true_BL, label_BL = torch.arange(5, 15).reshape(2, 5), torch.full((2, 5), -100)
    label_BL[:, 2], input_BL = true_BL[:, 2], true_BL.clone()
    input_BL[:, 2] = 4
    mask_BL = torch.ones_like(true_BL)
    mask_BL[:, 4] = 0
    monkeypatch.setattr(model.cls, "forward", lambda states: 9.0 * torch.nn.functional.one_hot(true_BL, 30))
    tokenizer = SimpleNamespace(
        decode=lambda ids, **_: " ".join(map(str, ids)), all_special_ids=[4, 5, 10], mask_token_id=4
    )  # of which the first begins each text
    batch = {"input_ids": input_BL, "labels": label_BL, "attention_mask": mask_BL}
    found = reconstructions(model, batch, [d | {"text": "t"} for d in DOCUMENTS], SimpleNamespace(tokenizer=tokenizer))
    assert [found[0][name] for name in ("kind", "input", "masked", "output")] == [
        "text",
        "6 7 8",
        "6 4 8",
        "6 7 8",
    ]
    whole = {"input_ids": true_BL, "labels": true_BL, "attention_mask": mask_BL}  # as for a causal model's loss
    assert reconstructions(model, whole, DOCUMENTS, SimpleNamespace(tokenizer=tokenizer)) == []


def test_of_a_model_that_answers_otherwise_nothing_is_shown():
    fields = {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    found = reconstructions(
        BertModel(BertConfig(**fields)), {"input_ids": torch.zeros(1, 3).long()}, [{"id": "a", "text": "words"}]
    )
    assert found == []


def test_looking_changes_neither_the_model_nor_the_draw_of_what_follows():
    model = mae().train()
    model.vit.embeddings.eval()
    modes, before = [m.training for m in model.modules()], torch.random.get_rng_state()
    reconstructions(model, {"pixel_values": images()}, DOCUMENTS)
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters()) and not model.vit._forward_hooks
