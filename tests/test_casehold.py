"""Multiple choice, questions made of descriptions that are alike, and how much of a domain a task is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from closeness import products, rounding
from transformers import AutoModelForMultipleChoice

from pretrain.core import checkpoint
from pretrain.core.batch import Context, Example, Vocabulary
from pretrain.core.encoding import Encoder
from pretrain.core.errors import PretrainError
from pretrain.corpus.sources import Questions, Skipped, read
from pretrain.corpus.sources.made.questions import alike
from pretrain.engine import run, silent
from pretrain.evaluation.likelihood.domain_specificity import DomainSpecificity
from pretrain.evaluation.likelihood.held_out import HeldOut
from pretrain.evaluation.likelihood.masked_loss import MaskedLoss
from pretrain.objectives.labelled.multiple_choice import MultipleChoice
from pretrain.stages._examples import lengths, texts_in

COURT = ["holding that a fox is quick", "holding that the dog is lazy", "holding that it jumps over"]
QUESTIONS = [
    {"text": "the quick brown fox", "choices": COURT, "label": "1"},
    {"text": "the dog sleeps", "choices": COURT[:2], "label": 0},
    {"text": "it returns", "choices": COURT[::-1], "label": "2"},
]


def examples(documents):
    return [Example(document, 0, number) for number, document in enumerate(documents)]


@pytest.fixture(scope="module")
def context(shelf):
    vocabulary = Vocabulary.of(shelf.tokenizer)
    return Context(vocabulary, 48, np.random.default_rng(0), encoder=Encoder(shelf.tokenizer), labels=("number",))


def ready(shelf, context, family="bert"):
    model = shelf.model(family, initializer_range=0.3)
    return MultipleChoice().ready(model, context.labels, context.vocabulary, 0).eval()


def test_the_loss_is_that_of_the_multiple_choice_model_of_transformers_with_the_same_weights(shelf, context, tmp_path):
    model, documents = ready(shelf, context), examples(QUESTIONS[::2])
    batch = MultipleChoice().prepare(documents, context)
    checkpoint.save(model, shelf.tokenizer, tmp_path)
    theirs, loading = AutoModelForMultipleChoice.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and int(batch["weight"]) == 2
    shaped = [batch[name].view(2, 3, -1) for name in ("tokens_BL", "mask_BL", "segment_BL")]
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        expected = theirs.eval()(**dict(zip(names, shaped, strict=True)), labels=batch["label_B"])
        scores, loss = MultipleChoice().scores(model, batch), MultipleChoice().loss(model, batch)
    terms, steps = products(model)  # normalised states, of length √width, against the last layer's vector
    limit = rounding(terms, terms**0.5 * float(model.classifier.weight.detach().norm()), steps=steps)
    assert torch.allclose(scores, expected.logits, rtol=0, atol=limit)
    assert float(loss.value) == pytest.approx(float(expected.loss), abs=2 * limit)
    assert float(loss.parts["accuracy"]) == float((expected.logits.argmax(-1) == batch["label_B"]).float().mean())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_questions_of_different_numbers_of_choices_are_asked_together_as_apart(shelf, context, family):
    model, method = ready(shelf, context, family), MultipleChoice()
    with torch.no_grad():
        together = float(method.loss(model, method.prepare(examples(QUESTIONS), context)).value)
        apart = [float(method.loss(model, method.prepare(examples([q]), context)).value) for q in QUESTIONS]
        scores = method.scores(model, method.prepare(examples(QUESTIONS), context))
    terms, steps = products(model)
    last = model.classifier if family == "bert" else model.score
    limit = 2 * rounding(
        terms, terms**0.5 * float(last.weight.detach().norm()), steps=steps
    )  # of a loss: of two scores
    assert together == pytest.approx(np.mean(apart), abs=limit)
    assert scores.isinf().tolist() == [[False] * 3, [False, False, True], [False] * 3]
    answers = method.answered(model, examples(QUESTIONS), context)
    assert answers.values == [str(n) for n in scores.argmax(-1).tolist()]
    assert np.mean(answers.nll) == pytest.approx(together, abs=limit)


def test_choices_stand_in_a_column_of_lists_or_in_a_column_each(shelf, context):
    columns = tuple(f"holding_{n}" for n in range(3))
    apart = [q | dict(zip(columns, q["choices"], strict=True)) for q in QUESTIONS[::2]]
    batches = [
        method.prepare(examples(apart), context) for method in (MultipleChoice(), MultipleChoice(choices=columns))
    ]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


@pytest.mark.parametrize("change, said", [
    ({"label": "3"}, "label '3': accepted: the number of the right choice, 0 to 2"),
    ({"label": "b"}, "label 'b': accepted: the number of the right choice, 0 to 2"),
    ({"choices": ["one"]}, r"choices in choices: .*: accepted: a column of lists of 2 or more, or several columns"),
    ({"choices": "one"}, r"choices in choices: .*: accepted: a column of lists of 2 or more, or several columns"),
    ({"choices": ["one", None]}, r"choices in choices: .*: accepted: a column of lists"),
])  # fmt: skip
def test_what_is_no_question_is_refused_by_its_name(context, change, said):
    with pytest.raises(PretrainError, match=f"^multiple_choice: document 'q7': {said}"):
        MultipleChoice().prepare(examples([QUESTIONS[0] | {"id": "q7"} | change]), context)


def test_others_are_the_nearest_by_tf_idf_below_the_limit_and_never_of_the_same_words():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics.pairwise import cosine_similarity

    rng = np.random.default_rng(0)
    words = np.array(
        ["court", "holds", "that", "a", "claim", "for", "damages", "under", "this", "act", "is", "barred", "by"]
    )
    texts = [" ".join(rng.choice(words, 6)) for _ in range(40)]
    texts += [texts[3], "nothing shared"]
    cosine = cosine_similarity(TfidfVectorizer(token_pattern=r"\w+").fit_transform(texts))
    found = list(alike(texts, 4, 0.7))
    assert len(found) == len(texts) and found[-1] == []
    for number, others in enumerate(found[:-1]):
        close = cosine[number, others]
        assert len({texts[o] for o in others}) == 4 and (close <= 0.7).all() and (np.diff(close) <= 1e-12).all()
        left = [cosine[number, n] for n, t in enumerate(texts) if t not in {texts[o] for o in others}]
        assert max(c for c in left if c <= 0.7) <= close.min() + 1e-12
    assert list(alike(["...", "!"], 1, 1.0)) == [[], []]


def test_a_question_holds_the_functions_own_description_at_its_label(monkeypatch):
    from pretrain.corpus.sources import Functions

    source, skipped = Questions(("networkx",), choices=3, limit=12), Skipped()
    own = {d["id"]: (d["text"], d["target"]) for d in read(Functions(("networkx",), limit=12))}
    made = list(read(source, skipped))
    assert len(made) > 20 and len(made) + sum(skipped.reasons.values()) == len(own)
    for question in made:
        assert (question["text"], question["choices"][int(question["label"])]) == own[question["id"]]
        assert len({*question["choices"]}) == 3 and "target" not in question
    assert {question["label"] for question in made} == {"0", "1", "2"} and made == list(read(source))


@pytest.mark.parametrize(("family", "inner"), [
    ("bert", MaskedLoss(rate=0.4, length=40)), ("llama", HeldOut(length=40)),
])  # fmt: skip
def test_the_score_is_the_mean_difference_of_the_examples_losses(shelf, tmp_path, family, inner):
    general, domain = (shelf.model(family, seed, initializer_range=0.3) for seed in (1, 2))
    texts = ["the quick brown fox", "jumps over the lazy dog, then the dog sleeps", "a fox", "the dog " * 8] * 3
    documents = [{"text": text, "domain": "ab"[n % 2]} for n, text in enumerate(texts)]
    for name, model in (("general", general), ("domain", domain)):
        checkpoint.save(model, shelf.tokenizer, tmp_path / name)
    method = DomainSpecificity(general=str(tmp_path / "general"), rate=0.4, length=40, resamples=50)
    found = method(domain, shelf.tokenizer, documents)
    losses = [
        np.array([row["nll"] / row["targets"] for row in inner(model, shelf.tokenizer, documents).documents])
        for model in (general, domain)
    ]
    score = losses[0] - losses[1]
    assert found.metrics["domain_specificity"] == pytest.approx(score.mean(), abs=1e-6) and abs(score.mean()) > 1e-3
    assert found.metrics["general_loss"] == pytest.approx(losses[0].mean(), abs=1e-6)
    assert found.domains["b"]["domain_specificity"] == pytest.approx(score[1::2].mean(), abs=1e-6)
    low, high = found.intervals["domain_specificity"]
    assert low < found.metrics["domain_specificity"] < high and len(found.documents) == len(documents)
    assert method(general, shelf.tokenizer, documents).metrics["domain_specificity"] == 0
    turned = DomainSpecificity(general=str(tmp_path / "domain"), rate=0.4, length=40, resamples=50)
    assert turned(general, shelf.tokenizer, documents).metrics["domain_specificity"] == pytest.approx(
        -score.mean(), abs=1e-6
    )


def test_an_example_is_its_columns_one_below_the_other_and_those_without_are_left_out(shelf, tmp_path):
    checkpoint.save(shelf.model("bert", 1), shelf.tokenizer, tmp_path / "general")
    method = DomainSpecificity(general=str(tmp_path / "general"), texts=("text", "choices"), rate=0.4, resamples=5)
    assert method.text_of(QUESTIONS[1]) == "\n".join(["the dog sleeps", *COURT[:2]])
    model = shelf.model("bert", 2)
    found = method(model, shelf.tokenizer, [*QUESTIONS, {"text": "no choices", "choices": None}])
    assert len(found.documents) == 3
    with pytest.raises(PretrainError, match="domain_specificity: none of 1 documents has text, choices with a token"):
        method(model, shelf.tokenizer, [{"text": "no choices", "choices": None}])


def test_a_general_model_of_another_tokenizer_is_refused(shelf, tmp_path, prepared):
    from pretrain.corpus.tokenizers import load_tokenizer

    checkpoint.save(shelf.model("bert", 1, vocab_size=512), load_tokenizer(prepared / "tokenizer"), tmp_path / "other")
    with pytest.raises(PretrainError, match="another tokenizer than the model's; accepted: a checkpoint with the same"):
        DomainSpecificity(general=str(tmp_path / "other"))(shelf.model("bert", 2), shelf.tokenizer, QUESTIONS)


def test_a_plan_counts_an_input_for_each_choice():
    rows = tuple(map(texts_in, QUESTIONS[::2]))
    planned = lengths(MultipleChoice(), rows, lambda texts: [float(len(text)) for text in texts], 64, 2)
    sizes = [len(q["text"]) + len(choice) + 2 for q in QUESTIONS[::2] for choice in q["choices"]]
    assert planned.inputs == 3 and planned.learnt == 0 and planned.real == pytest.approx(np.mean(sizes))
    assert max(sizes) <= planned.filled <= 64


RECIPE = """
name: choose
stages:
  - {stage: data, name: general, sources: [{files: GENERAL}], validation: 0.1, test: 0.1}
  - {stage: data, name: questions, sources: [{files: DATA}], validation: 0.15, test: 0.15, near_duplicates: null}
  - {stage: tokenizer, name: words, corpus: general, vocab_size: 300, mask: true}
  - &train
    stage: train
    name: encoder
    corpus: general
    tokenizer: words
    model: {family: bert, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2}
    objective: masked_lm
    length: 64
    batch_rows: 8
    budget: {steps: 2}
  - {<<: *train, name: longer, init: encoder, model: {}, tokenizer: null}
  - {<<: *train, name: tuned, corpus: questions, init: longer, model: {}, tokenizer: null, objective: multiple_choice,
     optimizer: {method: adamw, lr: 1e-2}, budget: {steps: 40}}
  - &measured
    {stage: evaluate, name: score, checkpoint: longer, corpus: questions, compressors: false,
     evaluations: [{method: domain_specificity, general: encoder, texts: [text, choices]}]}
  - {<<: *measured, name: answers, checkpoint: tuned, evaluations: [{method: task, objective: multiple_choice}]}
"""


def test_a_recipe_scores_questions_and_learns_to_answer_them(tmp_path, stories):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(200):
        word, label = ("import", "class")[number % 2], int(rng.integers(3))
        wrong = ("class", "import")[number % 2]
        rows.append(
            {"text": f"{word} {number}", "choices": [word if n == label else wrong for n in range(3)], "label": label}
        )
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "g.jsonl").write_text("\n".join(json.dumps({"text": s["text"][:400]}) for s in stories[:40]))
    recipe = RECIPE.replace("GENERAL", str(tmp_path / "g.jsonl")).replace("DATA", str(tmp_path / "q.jsonl"))
    (tmp_path / "recipe.yaml").write_text(recipe)
    run(tmp_path / "recipe.yaml", output=tmp_path / "run", report=False, say=silent)
    score, answers = (
        json.loads((tmp_path / "run" / name / "evaluation.json").read_text())["metrics"]
        for name in ("score", "answers")
    )
    assert score["domain_specificity"] == pytest.approx(score["general_loss"] - score["domain_loss"])
    assert answers["accuracy"] > 0.8 > answers["majority"] and answers["label_loss"] < np.log(3)
