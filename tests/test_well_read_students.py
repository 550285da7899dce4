"""A compact student of a fine-tuned teacher: the loss, its gradient, labels, tokenizers, and the three stages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.core import checkpoint
from pretrain.core.batch import Context, Example, Vocabulary
from pretrain.core.encoding import Encoder
from pretrain.core.errors import PretrainError
from pretrain.core.models.heads import labels_of, with_head
from pretrain.corpus.tokenizers import load_tokenizer, train_tokenizer
from pretrain.engine import run, silent
from pretrain.objectives.distillation.well_read_students import WellReadStudents
from pretrain.objectives.labelled.classification import Classification

LABELS = ("maybe", "no", "yes")
SOME = (
    {"text": "import os", "label": "yes"},
    {"text": "class A: pass", "label": "no"},
    {"text": "def f(): return 1", "label": "maybe"},
    {"text": "import os, sys, re, json, abc", "label": "no"},
)
UNLABELLED = tuple({"text": e["text"], "label": e["label"] if n % 2 else None} for n, e in enumerate(SOME))


def examples(*columns: dict[str, Any]) -> list[Example]:
    return [Example(c, 0, number) for number, c in enumerate(columns)]


@pytest.fixture(scope="module")
def context(prepared: Path) -> Context:
    tokenizer = load_tokenizer(prepared / "tokenizer")
    return Context(Vocabulary.of(tokenizer), 32, np.random.default_rng(0), encoder=Encoder(tokenizer), labels=LABELS)


@pytest.fixture(scope="module")
def teacher(tiny, context, tmp_path_factory) -> Path:
    """A BERT classifier with its tokenizer; its head is scaled so that its predictions are no longer even."""
    folder = tmp_path_factory.mktemp("teacher")
    model = with_head(tiny("bert", vocab_size=512, seed=5), "sequence", LABELS, context.vocabulary, seed=5)
    with torch.no_grad():
        model.classifier.weight.mul_(40)
    checkpoint.save(model, context.encoder.tokenizer, folder / "checkpoint")
    return folder


def opened(teacher: Path) -> Any:
    return checkpoint.load(teacher / "checkpoint")[0]


def student(tiny, context, family: str = "llama", **fields: Any) -> Any:
    return with_head(tiny(family, vocab_size=512, **fields), "sequence", LABELS, context.vocabulary).eval()


def test_the_loss_is_the_cross_entropy_of_softened_predictions_and_of_labels(tiny, teacher, context) -> None:
    objective = WellReadStudents(str(teacher), soft=0.7, hard=0.3, temperature=4.0)
    model = student(tiny, context)
    batch = objective.prepare(examples(*UNLABELLED), context)
    assert batch["label_B"].tolist() == [-100, 1, -100, 1] and batch["weight"] == 4
    found = objective.loss(model, batch, objective.modules(model))
    x, y = (m(batch["tokens_BL"], attention_mask=batch["mask_BL"]).logits for m in (model, opened(teacher)))
    soft = F.cross_entropy(x / 4, (y / 4).softmax(-1))
    hard = F.cross_entropy(x[[1, 3]], torch.tensor([1, 1]), reduction="sum") / 4
    assert found.value.item() == pytest.approx((0.7 * 16 * soft + 0.3 * hard).item(), rel=1e-5)
    assert found.parts["soft"].item() == pytest.approx(soft.item(), rel=1e-5)
    assert found.parts["hard"].item() == pytest.approx(hard.item(), rel=1e-5)
    assert found.parts["agreement"].item() == (x.argmax(-1) == y.argmax(-1)).float().mean()
    # The same gradient as Hinton's T² KL, which the paper on code models distils by.
    y, (ours, theirs) = y.detach(), (x.detach().clone().requires_grad_() for _ in "ab")
    (16 * F.cross_entropy(ours / 4, (y / 4).softmax(-1))).backward()
    (16 * F.kl_div((theirs / 4).log_softmax(-1), (y / 4).softmax(-1), reduction="batchmean")).backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_labels_alone_are_classification(tiny, teacher, context) -> None:
    objective = WellReadStudents(str(teacher), soft=0.0, hard=1.0)
    model = student(tiny, context)
    batch = objective.prepare(examples(*SOME), context)
    plain = Classification()
    expected = plain.loss(model, plain.prepare(examples(*SOME), context)).value
    assert objective.loss(model, batch, objective.modules(model)).value.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(teacher, context, temperature) -> None:
    objective = WellReadStudents(str(teacher), temperature=temperature)
    model = opened(teacher)
    batch = objective.prepare(examples(*SOME), context)
    found = objective.loss(model, batch, objective.modules(model))
    q = (model(batch["tokens_BL"], attention_mask=batch["mask_BL"]).logits / temperature).softmax(-1)
    assert found.parts["soft"].item() == pytest.approx(-(q * q.log()).sum(-1).mean().item(), rel=1e-5)
    assert found.parts["agreement"] == 1
    found.value.backward()
    assert max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None) < 1e-4


def test_micro_batches_add_up_to_the_whole_whatever_is_labelled(tiny, teacher, context) -> None:
    objective = WellReadStudents(str(teacher), hard=0.5, temperature=2.0)
    model = student(tiny, context)
    beside = objective.modules(model)
    whole, *parts = [
        objective.prepare(examples(*some), context) for some in (UNLABELLED, UNLABELLED[:1], UNLABELLED[1:])
    ]
    sums = sum(objective.loss(model, b, beside).value.item() * int(b["weight"]) for b in parts)
    assert objective.loss(model, whole, beside).value.item() == pytest.approx(sums / 4, rel=1e-5)


def test_labels_and_their_names_come_from_the_teacher(tiny, teacher, context) -> None:
    objective = WellReadStudents(str(teacher))
    assert objective.labels(["any", "text"]) == LABELS and objective.columns == ("text",)
    model = objective.ready(tiny("gpt2", vocab_size=512), LABELS, context.vocabulary, 0)
    assert labels_of(model) == LABELS
    said = objective.predict(model, objective.prepare(examples(*UNLABELLED), context), context)
    true = objective.expected(examples(*UNLABELLED), context)
    assert true == [None, "no", None, "no"] and set(said) <= set(LABELS)
    assert objective.metrics(["no", "no", "yes", "yes"], true)["accuracy"] == 0.5
    assert objective.metrics(said, [None] * 4) == {}
    blind = WellReadStudents(str(teacher), label=None)
    assert blind.prepare(examples({"text": "a", "label": "strange"}), context)["label_B"].tolist() == [-100]


def test_a_student_that_numbers_the_labels_otherwise_learns_the_same(tiny, teacher, context) -> None:
    objective = WellReadStudents(str(teacher))
    model = student(tiny, context)
    batch = objective.prepare(examples(*SOME), context)
    expected = objective.loss(model, batch, objective.modules(model)).value
    order = [2, 0, 1]
    model.config.id2label = {n: LABELS[o] for n, o in enumerate(order)}
    model.score.weight.data = model.score.weight.data[order]
    found = objective.loss(model, batch, objective.modules(model)).value
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_teacher_with_another_tokenizer_reads_the_text_in_its_own_tokens(tiny, teacher, context, stories) -> None:
    other = train_tokenizer([d["text"] for d in stories[:20]], vocab_size=300, cls=True)
    theirs = replace(context, vocabulary=Vocabulary.of(other), encoder=Encoder(other))
    objective = WellReadStudents(str(teacher), pair="label")
    alike = objective.prepare(examples(*SOME), replace(context, labels=LABELS))
    assert not any(name.startswith("teacher_") for name in alike)
    batch = objective.prepare(examples(*SOME), theirs)
    assert torch.equal(batch["teacher_tokens_BL"], alike["tokens_BL"])
    assert torch.equal(batch["teacher_segment_BL"], alike["segment_BL"])
    model = with_head(tiny("bert", vocab_size=300), "sequence", LABELS, theirs.vocabulary).eval()
    x = model(batch["tokens_BL"], attention_mask=batch["mask_BL"], token_type_ids=batch["segment_BL"]).logits
    y = opened(teacher)(alike["tokens_BL"], attention_mask=alike["mask_BL"], token_type_ids=alike["segment_BL"]).logits
    found = objective.loss(model, batch, objective.modules(model)).value
    assert found.item() == pytest.approx(F.cross_entropy(x, y.softmax(-1)).item(), rel=1e-5)


def test_a_teacher_of_fewer_positions_reads_less(tiny, context, tmp_path) -> None:
    model = with_head(tiny("bert", vocab_size=512, max_position_embeddings=8), "sequence", LABELS, context.vocabulary)
    checkpoint.save(model, context.encoder.tokenizer, tmp_path / "checkpoint")
    objective = WellReadStudents(str(tmp_path))
    batch = objective.prepare(examples(*SOME), context)
    assert batch["teacher_tokens_BL"].shape == (4, 8) and batch["tokens_BL"].shape[1] > 8
    objective.loss(student(tiny, context), batch, objective.modules(student(tiny, context)))


def test_the_teacher_is_no_part_of_what_is_trained(tiny, teacher, context) -> None:
    objective = WellReadStudents(str(teacher))
    model = student(tiny, context)
    beside = objective.modules(model).train()
    assert not list(beside.parameters()) and not beside.state_dict() and not beside.model.training
    batch = objective.prepare(examples(*SOME), context)
    objective.loss(model, batch, beside).value.backward()
    assert all(p.grad is None for p in beside.model.parameters())


def test_what_does_not_fit_is_one_clear_error(tiny, teacher, context, tmp_path) -> None:
    for fields, said in (
        ({"temperature": 0.0}, "temperature 0.0: accepted: above 0"),
        ({"soft": -1.0}, "soft -1.0: accepted: 0 or more"),
        ({"hard": 1.0, "label": None}, "hard 1.0: accepted: 0 without a label"),
    ):
        with pytest.raises(PretrainError, match=said):
            WellReadStudents(str(teacher), **fields)
    objective = WellReadStudents(str(teacher))
    with pytest.raises(
        PretrainError, match="label 'yess'.*: accepted: a label of the teacher .maybe, no, yes., or label: null"
    ):
        objective.prepare(examples({"text": "a", "label": "yess"}), context)
    other = with_head(tiny(vocab_size=512), "sequence", ("a", "b"), context.vocabulary)
    with pytest.raises(PretrainError, match="student classifies a, b: accepted: maybe, no, yes"):
        objective.modules(other)
    checkpoint.save(tiny("bert"), None, tmp_path / "lm" / "checkpoint")
    with pytest.raises(PretrainError, match="is a BertForMaskedLM: accepted: a classifier of documents"):
        WellReadStudents(str(tmp_path / "lm")).labels(())
    number = with_head(tiny("bert"), "sequence", ("number",), context.vocabulary)
    checkpoint.save(number, None, tmp_path / "number" / "checkpoint")
    with pytest.raises(PretrainError, match="is a regression: accepted: a classifier of documents"):
        WellReadStudents(str(tmp_path / "number")).labels(())


RECIPE = """
name: well-read
stages:
  - {{stage: data, name: corpus, sources: [{{files: {data}}}], validation: 0.15, test: 0.15, near_duplicates: null}}
  - {{stage: data, name: transfer, sources: [{{files: {more}}}], validation: 0.15, test: 0.15, near_duplicates: null}}
  - {{stage: tokenizer, name: tokenizer, corpus: corpus, vocab_size: 300, mask: true}}
  - {{stage: tokenizer, name: small, corpus: corpus, vocab_size: 280, mask: true}}
  - {{stage: train, name: teacher, corpus: corpus, tokenizer: tokenizer, length: 64, objective: classification,
      model: {{family: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2}},
      optimizer: {{method: adamw, lr: 1e-2}}, budget: {{steps: 40}}}}
  - {{stage: train, name: pretrained, corpus: corpus, tokenizer: small, length: 64, objective: masked_lm,
      model: {{family: bert, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}},
      optimizer: {{method: adamw, lr: 3e-3}}, budget: {{steps: 2}}}}
  - {{stage: train, name: distilled, corpus: transfer, init: pretrained, length: 64,
      objective: {{method: well_read_students, teacher: teacher, temperature: 2.0}},
      optimizer: {{method: adamw, lr: 1e-2}}, budget: {{steps: 40}}}}
  - {{stage: train, name: tuned, corpus: corpus, init: distilled, length: 64, objective: classification,
      optimizer: {{method: adamw, lr: 3e-3}}, budget: {{steps: 2}}}}
  - {{stage: evaluate, name: tested, checkpoint: distilled, corpus: corpus, compressors: false,
      evaluations: [{{method: task, objective: classification}}]}}
"""


@pytest.mark.processes
def test_a_recipe_pretrains_distils_on_unlabelled_text_and_fine_tunes(tmp_path) -> None:
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "x", "y", "z"]
    rows = [
        {
            "text": f"{('import', 'class')[n % 2]} {' '.join(rng.choice(words, 6))} {n}",
            "label": ("import", "class")[n % 2],
        }
        for n in range(400)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:200]), encoding="utf-8")
    bare = [json.dumps({"text": row["text"]}) for row in rows[200:]]
    (tmp_path / "more.jsonl").write_text("\n".join(bare), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(data=tmp_path / "data.jsonl", more=tmp_path / "more.jsonl"), encoding="utf-8")
    run(recipe, output=tmp_path / "run", report=False, say=silent)
    folders = {path.name: path for path in (tmp_path / "run").iterdir() if path.is_symlink()}
    model, tokenizer = checkpoint.load(folders["distilled"] / "checkpoint")
    assert labels_of(model) == ("class", "import") and len(tokenizer) == 280
    found = json.loads((folders["tested"] / "evaluation.json").read_text())
    assert found["metrics"]["accuracy"] > 0.9, "learnt from unlabelled text alone"
    log = [json.loads(line) for line in (folders["distilled"] / "log.jsonl").read_text().splitlines()]
    measured = [row for row in log if "metrics" in row][-1]["metrics"]
    assert {"loss", "soft", "agreement"} <= set(measured) and "accuracy" not in measured
    assert labels_of(checkpoint.load(folders["tuned"] / "checkpoint")[0]) == ("class", "import")
