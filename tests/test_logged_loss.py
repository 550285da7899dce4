"""A training's log and its held-out measurements call the same quantity the loss, whatever it is that is minimised."""

from __future__ import annotations

import json

import pytest
import torch
from test_fine_tuning import BERT, _run
from test_fine_tuning import silent as silently

from pretrain.engine import run
from pretrain.objectives import Loss, summed

MASKED = """
stages:
  - {{name: corpus, stage: data, sources: [{{files: "{place}"}}], validation: 0.3, test: 0, near_duplicates: null}}
  - {{name: tokenizer, stage: tokenizer, corpus: corpus, algorithm: bytes, cls: true, mask: true}}
  - name: encoder
    stage: train
    corpus: corpus
    tokenizer: tokenizer
    model: {{family: bert, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2}}
    objective: {objective}
    length: 32
    batch_rows: 4
    micro_rows: 2
    log_every: 1
    evaluate_every: 4
    evaluate_tokens: 300
    budget: {{steps: 8}}
"""


def logged(folder):
    """The losses and the parts of a training's steps, and of its held-out measurements."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [(row["loss"], row["parts"]) for row in rows if row["event"] == "step"]
    return steps, [(row["metrics"]["loss"], row["metrics"]) for row in rows if row["event"] == "evaluation"]


def trained(tmp_path, objective):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"text {number} of some words " * 3 + str(number) * 5)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MASKED.format(place=tmp_path / "*.txt", objective=objective), encoding="utf-8")
    run(recipe, output=tmp_path / "run", report=False, say=silently)
    return logged(tmp_path / "run" / "encoder")


def test_a_coefficient_that_falls_leaves_the_logged_loss_that_of_held_out_text(tmp_path):
    steps, measured = trained(tmp_path, "{method: bag_of_words, weight: 2.0, final_weight: 0.0}")
    assert len(steps) == 8 and len(measured) == 2
    for loss, parts in steps + measured:
        assert loss == pytest.approx(parts["masked_lm"] + 2.0 * parts["bag_of_words"], rel=1e-5)


def test_a_term_that_holds_training_alone_is_no_part_of_the_logged_loss(tmp_path):
    steps, measured = trained(tmp_path, "{method: deft, objective: masked_lm, weight: 50.0}")
    assert all(loss == pytest.approx(parts["objective"], rel=1e-5) for loss, parts in steps)
    assert all(parts["density"] > 0 for _, parts in steps) and "density" not in measured[0][1]
    assert steps[-1][0] == pytest.approx(measured[-1][0], rel=0.2)


def test_a_smoothed_classifier_logs_the_loss_of_its_labels(tmp_path):
    objective = "{method: smart, lambda_s: 100.0, objective: classification}"
    steps, _ = logged(_run(tmp_path, BERT, objective, 4)[0]["tuned"])
    assert all(loss == pytest.approx(parts["objective"], rel=1e-5) for loss, parts in steps)
    assert any(parts["smoothness"] > 0 for _, parts in steps)


def test_what_is_minimised_has_its_own_gradient():
    weight = torch.tensor(3.0, requires_grad=True)
    loss = summed({"a": 2 * weight, "b": weight**2}, {}, measured={"a": 2 * weight, "b": 0.5 * weight**2})
    shares = {"weight": 1.0, "weight_b": 0.5}
    loss.shared(shares, weight=2.0).backward()
    assert weight.grad == 2 * (2 + 0.5 * 6)
    assert loss.logged_share(shares, weight=2.0) == 2 * (6 + 0.5 * 4.5) and not loss.logged["a"].requires_grad
    plain = Loss(3 * weight, {})
    assert plain.logged_share(shares, 2.0) == plain.shared(shares, 2.0) and plain.logged == {"": plain.value.detach()}
