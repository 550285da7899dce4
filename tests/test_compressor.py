"""A student's architecture by a genetic algorithm: size and work by arithmetic, the search, the student itself."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TASK, TINY
from safetensors.torch import load_file
from transformers import BertConfig, RobertaConfig, RobertaForSequenceClassification

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.meter import count_flops
from pretrain.core.models.families import new_model
from pretrain.core.models.heads import labels_of, with_head
from pretrain.engine import run, silent
from pretrain.surgery import Inputs
from pretrain.surgery._architecture import GENES, configured, flops, parameters, shape_of, size
from pretrain.surgery.compression.compressor import Compressor, fits, score, search

VOCABULARY = Vocabulary(97, pad=0, bos=1, eos=2)
MODELS = [
    ("llama", {}), ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 12}), ("mistral", {}), ("qwen2", {}), ("qwen3", {}), ("gpt2", {}),
    ("gpt2", {"n_inner": 40, "tie_word_embeddings": False}), ("bert", {}), ("bert", {"tie_word_embeddings": False}),
]  # fmt: skip
SPACE = {
    "vocabulary": (300, 500, 700), "heads": (2, 4), "width": (16, 24, 32, 48, 64), "feed_forward": (32, 64, 96, 160),
    "layers": (1, 2, 3, 4),
}  # fmt: skip
PAPER = shape_of(BertConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1), 2)


def made(family: str, fields: dict[str, Any], labels: int) -> Any:
    fields = TINY.get(family, TINY["llama"]) | fields
    model = new_model(family, fields, task=TASK.get(family, "causal"), vocabulary=VOCABULARY)
    return (with_head(model, "sequence", tuple("abc")[:labels], VOCABULARY) if labels else model).eval()


@pytest.mark.parametrize("labels", [0, 3])
@pytest.mark.parametrize(("family", "fields"), MODELS)
def test_size_and_flops_are_those_of_the_real_model(family, fields, labels, tmp_path) -> None:
    model = made(family, fields, labels)
    shape = shape_of(model.config, labels)
    checkpoint.save(model, None, tmp_path)
    assert size(shape) == sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    assert size(shape_of(checkpoint.load_config(tmp_path), labels)) == size(shape)
    for length in (7, 24):
        with torch.no_grad():
            assert flops(shape, length) == count_flops(lambda n=length: model(torch.full((1, n), 5)))[1]


def test_half_precision_is_half_the_bytes(tiny) -> None:
    model = tiny("gpt2").to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    assert size(shape_of(model.config)) == sum(p.nbytes for p in model.parameters())


def test_the_authors_architecture_has_3_megabytes_and_its_file_hardly_more(tmp_path) -> None:
    published = {"heads": 8, "width": 96, "feed_forward": 64, "layers": 12, "vocabulary": 1000}
    config = RobertaConfig(
        vocab_size=1000, hidden_size=96, num_hidden_layers=12, num_attention_heads=8, intermediate_size=64,
        max_position_embeddings=514, type_vocab_size=1,
    )  # fmt: skip
    found = parameters(PAPER.changed(published))
    model = RobertaForSequenceClassification(config)
    assert found == model.num_parameters() and 2.95e6 < 4 * found < 3.05e6
    checkpoint.save(model, None, tmp_path)
    assert 1 < (tmp_path / "model.safetensors").stat().st_size / (4 * found) < 1.01


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert"])
def test_a_changed_shape_is_that_of_the_changed_configuration(family) -> None:
    model = made(family, {}, 0)
    shape = shape_of(model.config).changed({"width": 48, "heads": 6, "layers": 3, "feed_forward": 40, "vocabulary": 50})
    config = configured(model.config, shape)
    assert shape_of(config) == shape and model.config.num_hidden_layers == 2
    assert type(model)(config).num_parameters() == parameters(shape)
    assert shape.shared == (3 if family in ("llama", "qwen2") else 6), (
        "the teacher's 4 heads share 2 of keys and values"
    )
    assert not shape.changed({"heads": 5}).valid and shape.changed({"heads": 2}).valid
    assert shape.changed({"heads": 16}).valid == (family in ("gpt2", "bert")), "rotary positions turn pairs"


def all_of(shape: Any, space: Any) -> list[Any]:
    return [shape.changed(dict(zip(GENES, genome))) for genome in itertools.product(*(space[n] for n in GENES))]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(("target", "length"), [(70e3, 64), (150e3, 64), (400e3, 256)])
def test_the_search_finds_the_best_of_a_space_that_can_be_listed(family, target, length) -> None:
    shape = shape_of(made(family, {}, 3).config, 3)
    whole = [one for one in all_of(shape, SPACE) if fits(one, target)]
    found = search(shape, SPACE, target, length=length, generations=30)
    assert fits(found, target) and found.valid
    assert score(found, target, length, 1.0) == max(score(one, target, length, 1.0) for one in whole)
    assert found.heads == max(one.heads for one in whole if one.changed({"heads": found.heads}) == found)


def test_the_result_is_never_too_large_where_anything_fits() -> None:
    # Only the smallest of 480 architectures fits, and none of the population is it by chance.
    least = min(size(one) for one in all_of(PAPER, SPACE) if one.valid)
    for seed in range(5):
        assert size(search(PAPER, SPACE, least, population=4, generations=2, seed=seed)) == least
    with pytest.raises(PretrainError, match=f"target_bytes {least - 1}: accepted: {least} or more"):
        search(PAPER, SPACE, least - 1)


@pytest.mark.parametrize("target", [3e6, 25e6])
def test_the_search_beats_random_architectures_that_fit(target) -> None:
    method, rng = Compressor(), random.Random(0)
    space = {name: getattr(method, name) for name in GENES}
    drawn = (PAPER.changed({n: rng.choice(space[n]) for n in GENES}) for _ in range(20_000))
    fitting = [flops(one, 514) for one in drawn if fits(one, target)]
    found = search(PAPER, space, target, generations=30)
    assert size(found) <= target < 1.15 * size(found)
    assert flops(found, 514) > 1.5 * statistics.mean(fitting) and len(fitting) > 20


def test_the_seed_alone_tells_the_result() -> None:
    space = {name: getattr(Compressor(), name) for name in GENES}
    found = [search(PAPER, space, 3e6, generations=5, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    shuffled = {name: tuple(reversed(choices)) for name, choices in space.items()}
    assert search(PAPER, shuffled, 3e6, generations=5) == found[0]


def test_a_space_smaller_than_the_population_is_searched_whole() -> None:
    space = SPACE | {"vocabulary": (300,), "heads": (2,), "width": (16,), "layers": (1, 2)}
    assert search(PAPER, space, 1e9, generations=3).layers == 2
    single = {name: choices[:1] for name, choices in SPACE.items()}
    assert search(PAPER, single, 1e9).layers == 1


SMALL: dict[str, Any] = {
    "heads": (2, 4), "width": (8, 16, 24), "feed_forward": (16, 32), "layers": (1, 2), "length": 64, "population": 10,
    "generations": 5,
}  # fmt: skip


@pytest.mark.bits
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("labels", [0, 3])
def test_the_student_is_a_plain_new_model_that_a_checkpoint_keeps(family, labels, tmp_path) -> None:
    teacher = made(family, {}, labels)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    inputs = Inputs(seed=3)
    method = Compressor(target_bytes=50e3, vocabulary=(), **SMALL)
    student = method(teacher, inputs)
    assert type(student) is type(teacher) and student.config.vocab_size == 97
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    if labels:
        assert labels_of(student) == ("a", "b", "c")
    found = inputs.extra["metrics"]
    assert found["compressor/bytes"] == sum(p.nbytes for p in student.parameters()) <= 50e3
    assert found["compressor/bytes_before"] == sum(p.nbytes for p in teacher.parameters())
    assert found["compressor/parameters"] == student.num_parameters()
    assert found["compressor/flops"] == count_flops(lambda: student(torch.full((1, 64), 5)))[1]
    assert "tokenizer" not in inputs.extra
    again, other = (method(teacher, Inputs(seed=seed)).state_dict() for seed in (3, 4))
    assert all(torch.equal(tensor, again[name]) for name, tensor in student.state_dict().items())
    assert any(tensor.shape != other[n].shape or not torch.equal(tensor, other[n]) for n, tensor in again.items())
    checkpoint.save(student, None, tmp_path)
    back, ids = checkpoint.load(tmp_path)[0], torch.full((1, 9), 5)
    assert torch.equal(back(ids).logits, student(ids).logits)


def test_what_does_not_fit_is_one_clear_error(tiny) -> None:
    for fields, said in (
        ({"width": ()}, "width .*: accepted: one choice or more"),
        ({"layers": (0,)}, "layers .*: accepted: a list, each 1 or more"),
        ({"population": 1}, "population 1: accepted: 2 or more"),
        ({"penalty": 0.0}, "penalty 0.0: accepted: above 0"),
        ({"crossover": 1.5}, "crossover 1.5: accepted: from 0 to 1"),
    ):
        with pytest.raises(PretrainError, match=said):
            Compressor(**fields)
    with pytest.raises(PretrainError, match="it trains a tokenizer: accepted: a surgery stage with `corpus`"):
        Compressor()(tiny())
    with pytest.raises(PretrainError, match="width, heads: accepted: a width that some number of heads divides"):
        Compressor(vocabulary=(), width=(16,), heads=(5,))(tiny())
    with pytest.raises(PretrainError, match="is a BertForTokenClassification: accepted"):
        Compressor(vocabulary=())(with_head(tiny("bert"), "token", ("a", "b"), VOCABULARY))
    with pytest.raises(PretrainError, match="target_bytes 1000: accepted: .* or more, the smallest there is"):
        Compressor(vocabulary=(), target_bytes=1000)(tiny())


RECIPE = """
name: compress
stages:
  - {{stage: data, name: corpus, sources: [{{files: {data}}}], validation: 0.15, test: 0.15, near_duplicates: null}}
  - {{stage: tokenizer, name: tokenizer, corpus: corpus, vocab_size: 320, mask: true, cls: true}}
  - {{stage: train, name: teacher, corpus: corpus, tokenizer: tokenizer, length: 32, objective: classification,
      model: {{family: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2}},
      optimizer: {{method: adamw, lr: 1e-2}}, budget: {{steps: 25}}}}
  - {{stage: surgery, name: compressed, checkpoint: teacher, corpus: corpus, length: 32, calibration_rows: 100,
      surgeries: [{{method: compressor, target_bytes: 40e3, vocabulary: [280, 300], heads: [2, 4], width: [8, 16, 32],
        feed_forward: [16, 32], layers: [1, 2], length: 32, population: 10, generations: 5}}]}}
  - {{stage: train, name: student, corpus: corpus, init: compressed, length: 32,
      objective: {{method: well_read_students, teacher: teacher, temperature: 10, label: null}},
      optimizer: {{method: adamw, lr: 1e-2}}, budget: {{steps: 40}}}}
  - {{stage: evaluate, name: test, checkpoint: student, corpus: corpus, compressors: false,
      evaluations: [{{method: task, objective: classification}}]}}
"""


@pytest.mark.processes
def test_a_recipe_compresses_a_classifier_and_distils_into_the_student(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "x", "y", "z"]
    kinds = ("import", "class")
    rows = [{"text": f"{kinds[n % 2]} {' '.join(rng.choice(words, 6))} {n}", "label": kinds[n % 2]} for n in range(200)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(data=tmp_path / "data.jsonl"), encoding="utf-8")
    run(recipe, output=tmp_path / "run", report=False, say=silent)
    folders = {path.name: path for path in (tmp_path / "run").iterdir() if path.is_symlink()}
    model, tokenizer = checkpoint.load(folders["compressed"] / "checkpoint")
    assert len(tokenizer) == model.config.vocab_size in (280, 300) and labels_of(model) == ("class", "import")
    assert tokenizer.decode(tokenizer("import x")["input_ids"], skip_special_tokens=True) == "import x"
    assert model.config.pad_token_id == tokenizer.pad_token_id
    weights = load_file(folders["compressed"] / "checkpoint" / "model.safetensors")
    assert sum(t.nbytes for t in weights.values()) <= 40e3
    assert json.loads((folders["test"] / "evaluation.json").read_text())["metrics"]["accuracy"] > 0.9
