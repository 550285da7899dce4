"""Any model of transformers on its own loss: inputs, weights, chance from the seed, features, pictures."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_processors import MADE, documents

from pretrain.core.batch import NO_VOCABULARY, Context, Example, Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import check_task, model_for, new_config, new_model, repeated_blocks
from pretrain.core.models.features import document_features, evaluating, features, labelled, states
from pretrain.core.processors import inputs_of, new_processor
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.objectives.generic.native import Native

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "vit_mae": TINY | {"image_size": 16, "patch_size": 4, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16},
    "patchtst": {"d_model": 16, "ffn_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "context_length": 8, "patch_length": 2, "patch_stride": 2, "num_input_channels": 2},
    "wav2vec2": TINY | {"feat_extract_norm": "layer", "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.5, "mask_time_length": 4, "num_negatives": 5, "num_codevectors_per_group": 4, "codevector_dim": 8, "proj_codevector_dim": 8, "diversity_loss_weight": 0.0, "layerdrop": 0.0},
    "esm": TINY | {"position_embedding_type": "rotary"},
    "opt": {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16},
}  # fmt: skip
TASKS = {"esm": "masked", "opt": "causal"}
LENGTH = 640
PROTEINS = ["MPTIKQLIRNTRQPIRNVTKSPALRGCPQRRGTCTRV", "MTAILERRESESLWGRFCN", "MSPQTETKASVGFKAGVKEYKLTYYTPEYETK"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(PROTEINS, algorithm="bytes", mask=True, cls=True)


@pytest.fixture
def kind(request, tokenizer):
    """A model without dropout, its context, and examples, by the name of its family."""
    name = request.param
    by_family = {"vit_mae": "ViTImageProcessor", "patchtst": "SeriesProcessor", "wav2vec2": "Wav2Vec2FeatureExtractor"}
    used = by_family.get(name)
    processor = new_processor(used, MADE[used]) if used else tokenizer
    vocabulary = NO_VOCABULARY if used else Vocabulary.of(tokenizer)
    model = new_model(name, MODELS[name], task=TASKS.get(name, "pretraining"), vocabulary=None if used else vocabulary)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.architectures = [type(model).__name__]

    def context(seed=0):
        return Context(vocabulary, LENGTH, np.random.default_rng(seed), processor=processor, config=model.config)

    given = [document | {"text": text} for document, text in zip(documents(), PROTEINS, strict=True)]
    return model, context, [Example(document, 0, number) for number, document in enumerate(given)]


EVERY = pytest.mark.parametrize("kind", MODELS, indirect=True)


@EVERY
def test_the_loss_falls_and_is_the_models_own(kind):
    model, context, examples = kind
    objective, batch = Native(), Native().prepare(examples, context())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model.train()
    losses = []
    for _ in range(12):
        value = objective.loss(model, batch).value
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value))
    assert all(map(np.isfinite, losses)) and losses[-1] < losses[0]
    assert batch["weight"] > 0 and batch["tokens"] > 0


@pytest.mark.parametrize("kind", ["vit_mae", "patchtst", "wav2vec2", "esm"], indirect=True)
def test_a_batch_is_a_function_of_the_seed(kind):
    model, context, examples = kind
    first, again, other = (Native().prepare(examples, context(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    model.eval()
    torch.manual_seed(5)
    one = Native().loss(model, first).value
    after = torch.rand(3)
    torch.manual_seed(6)
    assert torch.equal(Native().loss(model, again).value, one), "what the model draws within follows from the batch"
    assert not torch.equal(Native().loss(model, other).value, one)
    torch.manual_seed(5)
    Native().loss(model, other)
    assert torch.equal(torch.rand(3), after), "the seed within changes nothing after it"


@pytest.mark.parametrize("kind", ["vit_mae", "wav2vec2", "esm", "opt"], indirect=True)
def test_micro_batches_add_up_to_the_whole(kind):
    model, context, examples = kind
    model.eval()  # Wav2Vec2's quantiser draws while it trains
    whole = Native().prepare(examples, context())
    parts = [{k: v[b : b + 1] if v.ndim else v for k, v in whole.items()} for b in range(3)]
    for b, part in enumerate(parts):
        if "sampled_negative_indices" in part:  # they count through the batch's frames
            frames = part["mask_time_indices"].shape[1]
            hidden = part["mask_time_indices"][..., None]
            part["sampled_negative_indices"] = torch.where(hidden, part["sampled_negative_indices"] - b * frames, 0)
            part["weight"] = part["divisor"] = part["mask_time_indices"].sum()
        elif "labels" in part:
            labels = part["labels"] if type(model).__name__.endswith("ForMaskedLM") else part["labels"][:, 1:]
            part["weight"] = (labels != -100).sum()
        else:
            part["weight"] = torch.tensor(1)
    assert sum(part["weight"] for part in parts) == whole["weight"]
    gradients = []
    for batches in ([whole], parts):
        model.zero_grad()
        for batch in batches:
            (Native().loss(model, batch).value * batch["weight"] / whole["weight"]).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    largest = max(float(g.abs().max()) for g in gradients[0].values())
    assert largest > 1e-4
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5 * largest, rtol=1e-4), name


@pytest.mark.parametrize("kind", ["wav2vec2"], indirect=True)
def test_hidden_frames_lie_inside_the_recording_and_negatives_are_other_hidden_frames(kind):
    model, context, examples = kind
    config = model.config
    shares = []
    for seed in range(60):
        batch = Native().prepare(examples, context(seed))
        hidden_BF, frames = batch["mask_time_indices"], batch["mask_time_indices"].shape[1]
        lengths_B = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(1))
        for b, length in enumerate(lengths_B.tolist()):
            places = set(torch.nonzero(hidden_BF[b])[:, 0].tolist())
            assert len(places) >= config.mask_time_length and max(places) < length
            for place in places:
                others = set((batch["sampled_negative_indices"][b, place] - b * frames).tolist())
                assert others <= places - {place}
            shares.append(len(places) / length)
        assert batch["weight"] == batch["divisor"] == hidden_BF.sum()
    assert 0.3 < np.mean(shares) < 0.45, "1 - exp(-0.5) of the frames, where spans overlap"


@pytest.mark.parametrize("kind", ["esm"], indirect=True)
def test_the_share_of_tokens_asked_for_is_hidden_and_no_special_one(kind):
    _, context, examples = kind
    mask, special_V = context().vocabulary.mask, context().vocabulary.special_V
    plain = inputs_of(context().processor, [one.columns for one in examples], LENGTH)["input_ids"]
    hidden = swapped = chosen = 0
    for seed in range(80):
        batch = Native(rate=0.3).prepare(examples, context(seed))
        asked = batch["labels"] != -100
        assert torch.equal(batch["labels"][asked], plain[asked]) and torch.equal(
            batch["input_ids"][~asked], plain[~asked]
        )
        assert not special_V[plain[asked].numpy()].any()
        assert asked.sum(1).tolist() == [round(0.3 * len(text)) for text in PROTEINS]
        chosen += int(asked.sum())
        hidden += int((batch["input_ids"] == mask).sum())
        swapped += int(((batch["input_ids"] != plain) & (batch["input_ids"] != mask)).sum())
    assert hidden / chosen == pytest.approx(0.8, abs=0.03) and swapped / chosen == pytest.approx(0.1, abs=0.03)


@EVERY
def test_features_do_not_depend_on_the_others_of_a_batch_nor_on_chance(kind):
    model, context, examples = kind
    rows = [one.columns for one in examples]
    together = document_features(model, context().processor, rows, LENGTH)
    alone = np.concatenate([document_features(model, context().processor, [row], LENGTH) for row in rows])
    assert together.shape == (3, 16) and np.allclose(together, alone, atol=2e-5)
    assert np.array_equal(together, document_features(model, context().processor, rows, LENGTH))
    assert not np.allclose(together[0], together[1])
    first = document_features(model, context().processor, rows, LENGTH, layer=0)
    assert first.shape == (3, 16) and not np.allclose(first, together)


@EVERY
def test_features_are_the_mean_of_the_states_that_hold_something(kind):
    model, context, examples = kind
    batch = inputs_of(context().processor, [one.columns for one in examples], LENGTH)
    with evaluating(model):
        found = features(model, batch)
        every = states(model, batch)
    name = model.config.model_type
    if name == "vit_mae":
        assert every.shape == (3, 17, 16) and torch.allclose(found, every[:, 1:].mean(1), atol=1e-6)
    elif name == "patchtst":
        seen = batch["past_observed_mask"].view(3, 4, 2, 2).any(2).transpose(1, 2)
        expected = [every[b][seen[b]].mean(0) for b in range(3)]
        assert every.shape == (3, 2, 4, 16) and torch.allclose(found, torch.stack(expected), atol=1e-6)
        assert not bool(seen[0].all()) and seen[2].all(), "the short series has patches that were filled"
    elif name == "wav2vec2":
        lengths = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(1)).tolist()
        assert len(set(lengths)) > 1
        expected = torch.stack([every[b, :n].mean(0) for b, n in enumerate(lengths)])
        assert torch.allclose(found, expected, atol=1e-6)
    else:
        lengths = batch["attention_mask"].sum(1).tolist()
        expected = torch.stack([every[b, :n].mean(0) for b, n in enumerate(lengths)])
        assert torch.allclose(found, expected, atol=1e-6)
        assert torch.allclose(
            features_last(model, batch), torch.stack([every[b, n - 1] for b, n in enumerate(lengths)])
        )


def features_last(model, batch):
    with evaluating(model):
        return features(model, batch, pooling="last")


@pytest.mark.parametrize("kind", ["vit_mae", "patchtst"], indirect=True)
def test_features_see_all_of_the_input_and_training_is_as_it_was(kind):
    model, context, examples = kind
    before = copy.deepcopy(model.config.to_dict())
    batch = inputs_of(context().processor, [one.columns for one in examples], LENGTH)
    name = next(iter(batch))
    with evaluating(model):
        base = features(model, batch)
        patches = 16 if name == "pixel_values" else 4
        for number in range(patches):
            changed = dict(batch) | {name: batch[name].clone()}
            if name == "pixel_values":
                row, column = divmod(number, 4)
                changed[name][2, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 1.0
            else:
                changed[name][2, number * 2 : number * 2 + 2] += 3.0
            assert not torch.allclose(features(model, changed)[2], base[2], atol=1e-6), f"patch {number} is hidden"
    assert model.config.to_dict() == before
    output = Native().prepare(examples, context())
    hidden = (
        model(**{k: v for k, v in output.items() if k in ("pixel_values", "noise")}).mask
        if name == "pixel_values"
        else None
    )
    assert hidden is None or hidden.mean() == 0.75
    if name == "past_values":
        assert model.model.do_mask_input and type(model.model.masking).__name__ == "PatchTSTMasking"


@EVERY
def test_what_is_shown_has_the_input_what_was_hidden_and_the_guess(kind):
    model, context, examples = kind
    modes = [m.training for m in model.modules()]
    shown = Native().show(model, examples, context())
    kinds = {"vit_mae": "image", "patchtst": "series", "wav2vec2": "waveform", "esm": "text"}
    wanted = kinds.get(model.config.model_type)
    assert [one["kind"] for one in shown] == ([wanted] * 3 if wanted else [])
    for one in shown:
        assert one["input"] and one["output"] and one["masked"] and one["input"] != one["output"] != one["masked"]
    assert [m.training for m in model.modules()] == modes


def test_text_of_a_family_that_no_table_knows_is_probed_by_pieces(tokenizer):
    model = new_model("esm", MODELS["esm"], task="masked", vocabulary=Vocabulary.of(tokenizer))
    rows = [{"text": text, "label": "x"} for text in PROTEINS] + [{"text": None, "label": "x"}, {"text": "M"}]
    pieces = labelled(model, tokenizer, rows, "label", 10)
    assert [len(piece) for _, piece in pieces] == [10, 10, 10]


def test_a_loss_that_is_not_there_is_named(tokenizer):
    model = new_model("vit", TINY | {"image_size": 16, "patch_size": 8}, task="AutoModelForImageClassification")
    context = Context(
        NO_VOCABULARY,
        8,
        np.random.default_rng(0),
        processor=new_processor("ViTImageProcessor", MADE["ViTImageProcessor"]),
        config=model.config,
    )
    batch = Native().prepare([Example(documents()[0], 0, 0)], context)
    with pytest.raises(
        PretrainError, match="ViTForImageClassification gives no loss on pixel_values; accepted: a task"
    ):
        Native().loss(model, batch)


@pytest.mark.parametrize(
    ("family", "task", "expected"),
    [
        ("vit_mae", "pretraining", "ViTMAEForPreTraining"), ("patchtst", "pretraining", "PatchTSTForPretraining"),
        ("vit", "AutoModelForImageClassification", "ViTForImageClassification"), ("bert", "pretraining", "BertForPreTraining"),
        ("wav2vec2", "AutoModelForCTC", "Wav2Vec2ForCTC"), ("llama", "causal", "LlamaForCausalLM"), ("llama", "pretraining", None),
    ],
)  # fmt: skip
def test_a_task_names_the_models_class(family, task, expected):
    found = model_for(new_config(family, {}), task)
    assert (found and found.__name__) == expected


def test_a_task_that_there_is_not_is_refused():
    with pytest.raises(PretrainError, match=r"unknown task 'pretrainin' \(did you mean 'pretraining'\?\)"):
        check_task("pretrainin")
    with pytest.raises(PretrainError, match="has no model for task 'masked'; accepted: base, pretraining"):
        new_model("vit_mae", MODELS["vit_mae"], task="masked")


def test_models_without_a_vocabulary_get_none(tokenizer):
    model = new_model("vit_mae", MODELS["vit_mae"], task="pretraining", vocabulary=Vocabulary.of(tokenizer))
    assert not hasattr(model.config, "vocab_size")


@EVERY
def test_blocks_of_a_family_that_no_table_knows_are_apart_and_hold_its_layers(kind):
    model, _, _ = kind
    found = repeated_blocks(model)
    inside = [id(part) for block in found for part in block.modules()]
    assert len(inside) == len(set(inside))
    layers = [
        m
        for m in model.modules()
        if type(m).__name__.endswith(("EncoderLayer", "DecoderLayer", "MAELayer", "EsmLayer"))
    ]
    if model.config.model_type != "patchtst":  # whose class says nothing
        assert len(layers) >= 2 and {id(layer) for layer in layers} <= set(inside)


@EVERY
def test_a_model_made_anew_has_no_weights_left_at_nought(kind):
    model, _, _ = kind
    assert [n for n, p in model.named_parameters() if not n.endswith("bias") and not p.abs().max() > 0] == []


def test_a_new_vitmae_tells_its_patches_apart():
    model = new_model("vit_mae", MODELS["vit_mae"], task="pretraining")
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        rows = table[0, 1:]
        assert len(torch.unique(rows, dim=0)) == len(rows) == 16
    again = new_model("vit_mae", MODELS["vit_mae"], task="pretraining")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
