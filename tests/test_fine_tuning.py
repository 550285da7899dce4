"""Fine-tuning on labelled documents: heads, batches, metrics, and whole stages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import pytest
import torch
from closeness import assert_same_model
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

import pretrain
from pretrain.core import checkpoint
from pretrain.core.batch import Context, Example, Vocabulary
from pretrain.core.encoding import Encoder
from pretrain.core.errors import PretrainError, PretrainWarning, listed
from pretrain.core.method import method_class
from pretrain.core.models import heads
from pretrain.core.models.cross_entropy import linear_cross_entropy
from pretrain.core.models.families import base, new_model
from pretrain.core.models.heads import labels_of, with_head, with_language_head
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.engine import run, silent
from pretrain.objectives import _metrics
from pretrain.objectives._fine_tuning import framed
from pretrain.objectives._words import words_of_characters, words_of_tokens
from pretrain.stages import build_method

HEADLESS = {"llama": "causal", "gpt2": "causal", "bert": "masked", "modernbert": "masked", "t5": "seq2seq"}
VOCABULARY = Vocabulary(97, pad=0, bos=1, eos=2)
FAMILIES = ("llama", "qwen3", "gpt2", "bert", "modernbert", "t5")


@pytest.fixture(scope="module")
def context(prepared: Path) -> Context:
    tokenizer = load_tokenizer(prepared / "tokenizer")
    return Context(
        Vocabulary.of(tokenizer), 32, np.random.default_rng(0), encoder=Encoder(tokenizer), labels=("no", "yes")
    )


def examples(*columns: dict[str, Any]) -> list[Example]:
    return [Example(c, 0, number) for number, c in enumerate(columns)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("head", "auto"), [("sequence", AutoModelForSequenceClassification), ("token", AutoModelForTokenClassification)]
)
def test_a_new_head_keeps_the_pretrained_weights_and_opens_in_plain_transformers(
    tiny, family, head, auto, tmp_path
) -> None:
    model = tiny(family)
    before = {n: t.clone() for n, t in base(model).state_dict().items() if "lm_head" not in n}
    made = with_head(model, head, ("a", "b", "c"), VOCABULARY)
    after = base(made).state_dict()
    kept = [n for n in before if n in after]
    if family == "t5" and head == "token":  # a tagger of T5 is its encoder alone
        before = {n: t for n, t in before.items() if not n.startswith("decoder.")}
    assert kept == list(before)
    assert all(torch.equal(after[n], before[n]) for n in kept)
    checkpoint.save(made, None, tmp_path / "c")
    plain = auto.from_pretrained(tmp_path / "c").eval()
    ids = torch.tensor([[1, 5, 7, 9, 2]])
    assert_same_model(plain(ids).logits, made.eval()(ids).logits, made)
    assert plain.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert labels_of(checkpoint.load(tmp_path / "c")[0]) == ("a", "b", "c")


def test_a_head_that_knows_the_labels_stays_and_another_is_drawn_by_the_seed(tiny) -> None:
    made = with_head(tiny(), "sequence", ("a", "b"), VOCABULARY, seed=3)
    assert with_head(made, "sequence", ("b",), VOCABULARY) is made
    others = [with_head(tiny(), "sequence", ("a", "b"), VOCABULARY, seed=seed).score.weight for seed in (3, 4)]
    assert torch.equal(others[0], made.score.weight) and not torch.equal(others[1], made.score.weight)
    assert with_head(made, "sequence", ("a", "c"), VOCABULARY) is not made


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_example_of_a_batch(tiny, context, family) -> None:
    objective = method_class("classification")(pair="other")
    model = with_head(tiny(family, vocab_size=512), "sequence", context.labels, context.vocabulary).eval()
    some = examples(
        {"text": "import os", "other": "def f(): return 1", "label": "yes"},
        {"text": "a much longer text of many words, so that the other is padded", "other": "x", "label": "no"},
    )
    together = objective.prepare(some, context)
    with torch.no_grad():
        whole = objective.loss(model, together).value
        alone = [objective.loss(model, objective.prepare([one], context)).value for one in some]
    assert whole.item() == pytest.approx(sum(a.item() for a in alone) / 2, abs=1e-5)


def test_classification_is_cross_entropy_of_the_labels_with_the_unlabelled_left_out(tiny, context) -> None:
    objective = method_class("classification")()
    model = with_head(tiny("bert", vocab_size=512), "sequence", context.labels, context.vocabulary).eval()
    some = examples(
        {"text": "import os", "label": "yes"}, {"text": "import sys", "label": None}, {"text": "x", "label": "no"}
    )
    batch = objective.prepare(some, context)
    assert batch["label_B"].tolist() == [1, -100, 0] and batch["weight"] == 2
    logits = model(batch["tokens_BL"], attention_mask=batch["mask_BL"]).logits
    expected = -(logits[0].log_softmax(-1)[1] + logits[2].log_softmax(-1)[0]) / 2
    found = objective.loss(model, batch)
    assert found.value.item() == pytest.approx(expected.item(), rel=1e-6)
    said = objective.predict(model, batch, context)
    assert found.parts["accuracy"].item() == ((said[0] == "yes") + (said[2] == "no")) / 2
    answers, nll, probabilities = objective.answered(model, [some[0], some[2]], context)  # the shorter is read first
    assert answers == [said[0], said[2]]
    assert nll == pytest.approx([-logits[0].log_softmax(-1)[1].item(), -logits[2].log_softmax(-1)[0].item()], abs=1e-5)
    assert probabilities == pytest.approx([logits[n].softmax(-1).max().item() for n in (0, 2)], abs=1e-5)


def test_a_pair_is_framed_with_its_segments_and_the_longer_text_is_cut(context) -> None:
    vocabulary = context.vocabulary
    short, long = (
        "os",
        "import os, sys, re, json, abc, ast, io, math, time, enum, types, typing, string, random, pickle",
    )
    ((ids, first),) = framed(context, [short], [long])
    assert len(ids) == context.length and ids[0] == vocabulary.bos and ids[-1] == ids[first - 1] == vocabulary.eos
    assert context.encoder.tokenizer.decode(ids[1 : first - 1]) == short
    ((ids, first),) = framed(context, [long], [long])
    assert len(ids) == context.length and abs(first - 1 - (len(ids) - first)) <= 2
    ((ids, first),) = framed(context, [long])
    assert len(ids) == first == context.length


def test_regression_is_the_squared_error_and_refuses_what_is_no_number(tiny, context) -> None:
    objective = method_class("regression")()
    model = with_head(tiny("llama", vocab_size=512), "sequence", ("number",), context.vocabulary).eval()
    batch = objective.prepare(examples({"text": "a", "label": 2}, {"text": "b c", "label": -1.5}), context)
    said = objective.predict(model, batch, context)
    expected = np.mean([(said[0] - 2) ** 2, (said[1] + 1.5) ** 2])
    assert objective.loss(model, batch).value.item() == pytest.approx(expected, rel=1e-5)
    assert model.config.problem_type == "regression" and objective.labels([1, 2.5]) == ("number",)
    with pytest.raises(PretrainError, match="'many': accepted: numbers"):
        objective.labels(["many"])


def regressor(tiny, context, family):
    return with_head(tiny(family, vocab_size=512), "sequence", ("number",), context.vocabulary, seed=1).eval()


@pytest.mark.parametrize("family", ["bert", "llama"])  # with and without a bias in the last layer
def test_standardised_numbers_are_learnt_by_their_deviation_and_written_as_they_are(tiny, context, family) -> None:
    objective, model = method_class("regression")(standardise=True), regressor(tiny, context, family)
    assert (heads.last_linear(model).bias is None) == (family == "llama")
    some = examples({"text": "a", "label": 21000}, {"text": "b c", "label": 18000})
    batch = objective.prepare(some, context)
    with torch.no_grad():
        raw_B = model(batch["tokens_BL"], attention_mask=batch["mask_BL"]).logits[:, 0]
    values = [18000.0, 21000.0, 24000.0]
    mean, deviation = (
        (0.0, np.sqrt(np.mean(np.square(values)))) if family == "llama" else (np.mean(values), np.std(values))
    )
    objective.begin(model, values, fresh=True)
    predicted = objective.predict(model, batch, context)
    assert predicted == pytest.approx((raw_B.double() * deviation + mean).tolist(), rel=1e-6)
    errors = (np.array(predicted) - batch["number_B"].numpy()) / deviation
    assert objective.loss(model, batch).value.item() == pytest.approx(np.mean(errors**2), rel=1e-4)
    assert objective.end(model, None) is None
    with torch.no_grad():
        written_B = model(batch["tokens_BL"], attention_mask=batch["mask_BL"]).logits[:, 0]
    assert written_B.tolist() == pytest.approx(predicted, rel=1e-5)
    assert objective.predict(model, batch, context) == written_B.tolist()  # nothing is scaled twice
    assert objective.end(model, torch.bfloat16) is torch.bfloat16  # and an end without a beginning changes nothing


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_regressor_that_is_tuned_again_begins_with_the_numbers_that_it_gives(tiny, context, family) -> None:
    objective, model = method_class("regression")(standardise=True), regressor(tiny, context, family)
    batch = objective.prepare(examples({"text": "a", "label": 5}, {"text": "b c", "label": 900}), context)
    before = objective.predict(model, batch, context)
    objective.begin(model, [100.0, 300.0], fresh=False)
    assert objective.predict(model, batch, context) == pytest.approx(before, abs=300 * 2**-22)


def test_numbers_far_from_zero_are_reached_when_they_are_standardised(tiny, context) -> None:
    some = examples(*({"text": text, "label": label} for text, label in (("import os", 21000), ("class A", 18000))))

    def error(standardise):
        objective, model = method_class("regression")(standardise=standardise), regressor(tiny, context, "bert")
        batch = objective.prepare(some, context)
        with catch_warnings(record=True):
            objective.begin(model, batch["number_B"].tolist(), fresh=True)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(60):
            optimizer.zero_grad()
            objective.loss(model, batch).value.backward()
            optimizer.step()
        return np.abs(np.array(objective.predict(model, batch, context)) - batch["number_B"].numpy()).max()

    assert error(True) < 300 and error(False) > 10000


def test_numbers_far_from_zero_that_are_not_standardised_are_said(tiny, context) -> None:
    objective, model = method_class("regression")(label="price"), regressor(tiny, context, "bert")
    with pytest.warns(PretrainWarning, match="'price' lie around 200 ± 1e\\+02, .* standardise: true"):
        objective.begin(model, [100, 300], fresh=True)
    with catch_warnings():
        simplefilter("error")
        objective.begin(model, [0, 5, 2.5], fresh=True)


def test_logarithms_are_learnt_and_numbers_predicted_and_measured(tiny, context) -> None:
    objective, model = method_class("regression")(log=True, standardise=True), regressor(tiny, context, "bert")
    some, values = examples({"text": "a", "label": 3}, {"text": "b c", "label": 300_000}), [3.0, 900.0, 300_000.0]
    batch = objective.prepare(some, context)
    assert batch["number_B"].tolist() == pytest.approx(np.log([3, 300_000]))
    objective.begin(model, values, fresh=True)
    predicted = objective.predict(model, batch, context)
    objective.end(model, None)
    with torch.no_grad():
        written_B = model(batch["tokens_BL"], attention_mask=batch["mask_BL"]).logits[:, 0]
    assert predicted == pytest.approx(written_B.exp().tolist(), rel=1e-4)
    metrics = objective.metrics([30.0, 3e4], objective.expected(some, context))
    assert metrics["mse_of_log"] == pytest.approx(np.log(10) ** 2)
    assert metrics["mse"] == pytest.approx((27**2 + 270_000**2) / 2) and set(metrics) == set(objective.metric_names)
    with pytest.raises(PretrainError, match="log: false: the model has learnt logarithms; accepted: true"):
        method_class("regression")().predict(model, batch, context)
    with pytest.raises(PretrainError, match="holds 0; accepted: numbers above 0, or log: false"):
        objective.labels([1, 0])


def test_numbers_over_decades_whose_logarithms_are_not_learnt_are_said(tiny, context) -> None:
    prices = [float(10 ** (n % 5)) for n in range(200)]
    with pytest.warns(PretrainWarning, match="'price' span 4.0 decades, .*; log: true learns their logarithms"):
        method_class("regression")("price", standardise=True).begin(
            regressor(tiny, context, "bert"), prices, fresh=True
        )
    with catch_warnings():
        simplefilter("error")
        for fields, numbers in (
            ({"log": True}, prices),
            ({}, [*prices, -1.0]),
            ({}, [float(n) for n in range(50, 99)]),
        ):
            objective = method_class("regression")("price", standardise=True, **fields)
            objective.begin(regressor(tiny, context, "bert"), numbers, fresh=True)


def test_a_mean_that_bfloat16_cannot_hold_is_written_wider(tiny, context) -> None:
    objective, years = method_class("regression")(standardise=True), [2019.0, 2021.0, 2025.0]
    model = regressor(tiny, context, "bert")
    objective.begin(model, years, fresh=True)
    with pytest.warns(PretrainWarning, match="written in torch.float32"):
        assert objective.end(model, torch.bfloat16) is None
    model = regressor(tiny, context, "bert")
    objective.begin(model, [0.0, 1.0], fresh=True)
    assert objective.end(model, torch.bfloat16) is torch.bfloat16


def test_words_are_read_at_their_first_or_last_token(context) -> None:
    text = "  extraordinary  (os) x"
    ids, spans = context.encoder.spans(text)
    words = words_of_tokens(words_of_characters(text), spans)
    assert sorted(filter(None, words)) == [1, 2, 3]
    last = words_of_tokens(words_of_characters(text), spans, "last")
    assert sorted(filter(None, last)) == [1, 2, 3] and last.index(1) > words.index(1)
    assert words.index(2) > last.index(1) and last.index(3) == len(ids) - 1


def test_tagging_learns_each_word_once_and_predicts_outside_beyond_the_length(tiny, context) -> None:
    from dataclasses import replace

    objective = method_class("tagging")()
    context = replace(context, labels=("B-x", "I-x", "O"))
    text = "import " * 40
    some = examples({"text": text, "tags": ["B-x"] * 40}, {"text": "one extraordinary day", "tags": "O B-x I-x"})
    batch = objective.prepare(some, context)
    learnt = [(row != -100).sum().item() for row in batch["label_BL"]]
    assert learnt[1] == 3 and 0 < learnt[0] < 40 and batch["weight"] == sum(learnt)
    model = with_head(tiny("bert", vocab_size=512), "token", context.labels, context.vocabulary).eval()
    logits = model(batch["tokens_BL"], attention_mask=batch["mask_BL"]).logits.log_softmax(-1)
    known = batch["label_BL"] != -100
    expected = -logits[known].gather(1, batch["label_BL"][known][:, None]).mean()
    assert objective.loss(model, batch).value.item() == pytest.approx(expected.item(), rel=1e-5)
    said = objective.predictions(model, some, context)
    assert [len(tags) for tags in said] == [40, 3] and set(said[0][learnt[0] :]) == {"O"}
    with pytest.raises(PretrainError, match="document 0 has 2 words and 1 tags"):
        objective.prepare(examples({"text": "a b", "tags": "O"}), context)


@pytest.mark.parametrize("family", ("llama", "gpt2", "t5"))
def test_seq2seq_is_the_likelihood_of_the_targets_tokens_alone(tiny, context, family) -> None:
    objective = method_class("seq2seq")(prompt="{text} =", answer=5)
    model = tiny(family, vocab_size=512)
    model.config.eos_token_id = context.vocabulary.eos
    some = examples({"text": "import os", "target": "yes"}, {"text": "a longer prompt of words", "target": "no, never"})
    batch = objective.prepare(some, context)
    nll, count = 0.0, 0
    encode = lambda text: context.encoder.ids([text])[0]  # noqa: E731
    for e in some:
        prompt = [context.vocabulary.bos, *encode(e.columns["text"] + " =")]
        target = [*encode(e.columns["target"]), context.vocabulary.eos]
        if family == "t5":
            out = model(input_ids=torch.tensor([[*prompt, context.vocabulary.eos]]), labels=torch.tensor([target]))
            logits = out.logits[0]
        else:
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        nll -= logits.log_softmax(-1)[torch.arange(len(target)), target].sum().item()
        count += len(target)
    assert batch["weight"] == count
    assert objective.loss(model, batch).value.item() == pytest.approx(nll / count, rel=1e-4)
    together = objective.predictions(model, some, context)
    assert together == [objective.predictions(model, [e], context)[0] for e in some]


def test_metrics_equal_hand_counted_values() -> None:
    found = _metrics.classification(["a", "a", "b", "b"], ["a", "b", "b", "b"])
    assert found["accuracy"] == 0.75 and found["macro_f1"] == pytest.approx((2 / 3 + 0.8) / 2)
    assert found["matthews"] == pytest.approx(1 / 3**0.5, rel=1e-6)
    assert _metrics.regression([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])["pearson"] == pytest.approx(1)
    assert _metrics.regression([1.0, 1.0], [2.0, 4.0]) == {
        "mse": 5.0,
        "mse_of_mean": 1.0,
        "pearson": 0.0,
        "spearman": 0.0,
    }
    assert _metrics.entities(["B-a", "I-a", "O", "I-b", "B-b", "I-a"]) == {
        ("a", 0, 2),
        ("b", 3, 4),
        ("b", 4, 5),
        ("a", 5, 6),
    }
    tags = _metrics.tagging([["B-a", "O", "B-b"]], [["B-a", "I-a", "B-b"]])
    assert tags["accuracy"] == pytest.approx(2 / 3) and tags["f1"] == 0.5
    assert set(_metrics.tagging([["noun"]], [["verb"]])) == {"accuracy", "majority"}
    words = _metrics.generation(["the cat sat", ""], ["the sat cat", ""])
    assert (
        words["exact_match"] == 0.5 and words["token_f1"] == 1.0 and words["rouge_l"] == pytest.approx((2 / 3 + 1) / 2)
    )


def test_a_frozen_head_gets_no_gradient_and_a_bias_alone_may_learn() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(5, 4), torch.randn(7, 4), torch.randn(7)
    target = torch.tensor([1, 2, -100, 3, 6])
    for learns in [(True, False, False), (False, False, True), (False, True, False), (True, True, True)]:
        ours, theirs = ([t.clone().requires_grad_(r) for t, r in zip((hidden, weight, bias), learns)] for _ in "ab")
        linear_cross_entropy(ours[0], ours[1], target, bias_V=ours[2])[0].backward()
        torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(theirs[0], theirs[1], theirs[2]), target
        ).backward()
        for a, b in zip(ours, theirs):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-6)


def _data(folder: Path) -> Path:
    """Documents whose label can be learnt from the word that they begin with."""
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "x", "y", "z"]
    lines = []
    for number in range(240):
        kind = ("import", "class")[number % 2]
        rest = " ".join(rng.choice(words, 6))
        tags = " ".join("B-w" if w in ("alpha", "beta") else "O" for w in [kind, *rest.split(), str(number)])
        row = {
            "text": f"{kind} {rest} {number}",
            "label": kind,
            "size": float(number % 2),
            "tags": tags,
            "target": kind,
        }
        lines.append(json.dumps(row))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


RECIPE = """
name: tune
stages:
  - {{stage: data, name: corpus, sources: [{{files: {data}}}], validation: 0.15, test: 0.15, near_duplicates: null}}
  - {{stage: tokenizer, name: tokenizer, corpus: corpus, vocab_size: 300, mask: true}}
  - stage: train
    name: tuned
    corpus: corpus
    tokenizer: tokenizer
    model: {model}
    objective: {objective}
    length: 64
    batch_rows: 16
    micro_rows: 8
    optimizer: {{method: adamw, lr: 3e-3}}
    budget: {{steps: {steps}}}
  - {{stage: evaluate, name: evaluation, checkpoint: tuned, corpus: corpus, compressors: false,
      evaluations: [{{method: task, objective: {objective}}}]}}
"""
LLAMA = "{family: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2}"
BERT = "{family: bert, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2}"


def _run(tmp_path: Path, model: str, objective: str, steps: int) -> tuple[dict[str, Path], dict[str, Any]]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(data=_data(tmp_path), model=model, objective=objective, steps=steps), encoding="utf-8"
    )
    run(recipe, output=tmp_path / "run", report=False, say=silent)
    folders = {path.name: path for path in (tmp_path / "run").iterdir() if path.is_symlink()}
    return folders, json.loads((folders["evaluation"] / "evaluation.json").read_text())


def test_a_recipe_fine_tunes_a_classifier_that_learns(tmp_path) -> None:
    folders, found = _run(tmp_path, LLAMA, "classification", 40)
    assert found["metrics"]["accuracy"] > 0.9 and "accuracy" in found["intervals"]
    log = [json.loads(line) for line in (folders["tuned"] / "log.jsonl").read_text().splitlines()]
    measured = [row for row in log if "metrics" in row][-1]["metrics"]
    assert {"loss", "accuracy", "macro_f1", "matthews"} <= set(measured)
    assert 0.5 < found["metrics"]["confidence"] <= 1 and 0 <= found["metrics"]["ece"] < 0.5
    rows = json.loads((folders["evaluation"] / "documents.json").read_text())["task"]
    assert 0 < found["metrics"]["label_loss"] < 0.5 and len(rows) == found["metrics"]["documents"]
    assert np.mean([row["nll"] for row in rows]) == pytest.approx(found["metrics"]["label_loss"])
    low, high = found["intervals"]["label_loss"]
    assert low < found["metrics"]["label_loss"] < high
    plain = AutoModelForSequenceClassification.from_pretrained(folders["tuned"] / "checkpoint")
    assert plain.config.label2id == {"class": 0, "import": 1}


@pytest.mark.parametrize(("model", "objective", "metric"), [
    (BERT, "tagging", "f1"),
    (BERT, "{method: regression, label: size}", "pearson"),
    (BERT, "{method: regression, label: size, standardise: true}", "pearson"),
])  # fmt: skip
def test_a_recipe_fine_tunes_taggers_and_regressions(tmp_path, model, objective, metric) -> None:
    assert metric in _run(tmp_path, model, objective, 4)[1]["metrics"]


def test_the_calibration_error_is_the_distance_of_scores_from_the_share_that_is_right():
    """By hand: in the bin of 0.9 half are right, which is 0.4 off; in that of 0.6 all are, 0.4 off the other way."""
    from pretrain.evaluation.tasks.task import sureness

    right_N, sure_N = np.array([True, False, True, True]), np.array([0.9, 0.9, 0.6, 0.6])
    assert sureness(right_N, sure_N) == pytest.approx({"confidence": 0.75, "ece": 0.4})
    assert sureness(np.array([True]), np.array([1.0])) == {"confidence": 1.0, "ece": 0.0}


def test_labels_are_listed_in_an_error_by_a_few_and_by_their_beginnings():
    labels = [f"a label that is a whole text, the {n}th, and goes on {'and on ' * 30}" for n in range(300)]
    for words in (labels, labels[:20]):
        told = listed(words, labels[7])
        assert len(told) < 400 and told.endswith(f"({len(words)} in all)") and told.startswith("a label that is")
    assert listed(["red", "blue"], "x") == "red, blue"


@pytest.mark.parametrize("method", ["classification", "tagging", "prompt_classification"])
def test_a_label_that_was_never_learnt_is_told_in_a_short_line(context, method) -> None:
    labels = [f"{n} {'a whole text as a label ' * 10}" for n in range(100)]
    value = "never learnt " * 50
    fields = (
        {"words": {label: f"word{n}" for n, label in enumerate(labels)}} if method == "prompt_classification" else {}
    )
    objective = method_class(method)(**fields)
    row = {"text": value, objective.columns[-1]: [value] * 100 if method == "tagging" else value}
    with pytest.raises(PretrainError, match=r", … \(100 in all\)") as error:
        objective.prepare(examples(row), replace(context, labels=tuple(labels)))
    assert len(str(error.value)) < 800


def test_labels_of_another_column_than_the_one_learnt_are_called_that(tmp_path, tiny, prepared) -> None:
    tokenizer = load_tokenizer(prepared / "tokenizer")
    for number, objective in enumerate(({"label": "topic"}, {"method": "smart", "objective": {"label": "topic"}})):
        model = tiny("bert")
        model.resize_token_embeddings(len(tokenizer))
        model = with_head(model, "sequence", ("a", "b"), Vocabulary.of(tokenizer), seed=0)
        folder = tmp_path / str(number)
        checkpoint.save(model, tokenizer, folder, lineage={"objective": {"method": "classification"} | objective})
        rows = [("one text", "yes", "a"), ("another", "no", "b")]
        documents = [dict(zip(("text", "label", "topic"), row, strict=True)) for row in rows]
        assert "accuracy" in pretrain.evaluate(folder, documents)["metrics"]
        task = {"method": "task", "objective": "classification"}
        with pytest.raises(PretrainError, match="trained on the labels of 'topic', not of 'label'.*labels .a, b."):
            pretrain.evaluate(folder, documents, evaluations=[task])


def test_what_does_not_fit_is_one_clear_error(tmp_path, tiny, context, prepared) -> None:
    with pytest.raises(PretrainError, match=r"no document has a column 'lable' \(did you mean 'label'"):
        _run(tmp_path, LLAMA, "{method: classification, label: lable}", 1)
    with pytest.raises(PretrainError, match="label 'nes'.*accepted: a label of the training documents"):
        method_class("classification")().prepare(examples({"text": "a", "label": "nes"}), context)
    with pytest.raises(PretrainError, match="holds 1 label: accepted: 2 or more"):
        method_class("classification")().labels(["a", "a"])
    with pytest.raises(PretrainError, match="generates no text"):
        method_class("seq2seq")().ready(tiny("bert"), (), VOCABULARY, 0)
    with pytest.raises(PretrainError, match=r"accepted: text with at least one \{column\}"):
        method_class("seq2seq")(prompt="nothing")
    with pytest.raises(PretrainError, match="accepted: one that learns from labels"):
        method_class("task")(objective="causal_lm")
    with pytest.raises(PretrainError, match="reads examples, not packed rows"):
        method_class("classification")().prepare([object()], context)


@pytest.mark.parametrize(("family", "task"), HEADLESS.items())
def test_a_model_saved_without_a_head_gets_that_of_the_task_and_no_other_model_does(tiny, family, task, tmp_path):
    whole = tiny(family)
    assert with_language_head(whole, task) is whole
    plain = AutoModel.from_config(whole.config)
    wanted = {name: each.clone() for name, each in plain.state_dict().items() if "pooler" not in name}
    made = with_language_head(plain, task, seed=3)
    assert type(made) is type(whole)
    kept = base(made).state_dict()
    assert all(torch.equal(kept[name], each) for name, each in wanted.items())
    tied = made.get_output_embeddings().weight is made.get_input_embeddings().weight
    assert tied is (whole.get_output_embeddings().weight is whole.get_input_embeddings().weight)
    checkpoint.save(made, None, tmp_path / "c")
    again = checkpoint.load(tmp_path / "c")[0].state_dict()
    assert all(torch.equal(again[name], each) for name, each in made.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_model_made_anew_for_answers_can_write_them(name):
    task = method_class("seq2seq")().task
    fields = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    t5 = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    made = new_model(name, t5 if name == "t5" else fields, task=task, vocabulary=VOCABULARY)
    assert made.can_generate() or name == "bert"
    assert type(made).__name__ == {"llama": "LlamaForCausalLM", "t5": "T5ForConditionalGeneration"}.get(
        name, "BertLMHeadModel"
    )


@pytest.mark.parametrize(
    "objective, field",
    [
        ({"method": "tagging", "tags": "text"}, "tags"),
        ({"method": "classification", "label": "text"}, "label"),
        ({"method": "classification", "pair": "text"}, "pair"),
        ({"method": "regression", "label": "body", "text": "body"}, "label"),
        ({"method": "seq2seq", "prompt": "say {text}", "target": "text"}, "target"),
        ({"method": "prompt_classification", "template": "{label}: {mask}", "words": {"a": "b"}}, "column"),
    ],
)
def test_no_column_is_both_read_and_what_is_true(objective, field):
    with pytest.raises(ValueError, match=rf"{field} '\w+' is read in another place too; accepted: a column for each"):
        build_method(objective, "objective")
