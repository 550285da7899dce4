"""Classification by a prompt: what the model reads, the probabilities of the words, demonstrations, a recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_fine_tuning import _data

from pretrain.core.batch import Context, Example, Vocabulary
from pretrain.core.encoding import Encoder
from pretrain.core.errors import PretrainError
from pretrain.corpus.examples import Examples
from pretrain.corpus.store import Corpus, write_corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.engine import run, silent
from pretrain.objectives.labelled._prompt_words import choose_words
from pretrain.objectives.labelled.prompt_classification import PromptClassification

CAUSAL = "{text} It was {mask}"


@pytest.fixture(scope="module")
def context(prepared: Path) -> Context:
    tokenizer = load_tokenizer(prepared / "tokenizer")
    return Context(Vocabulary.of(tokenizer), 64, np.random.default_rng(0), encoder=Encoder(tokenizer))


@pytest.fixture(scope="module")
def words(context: Context) -> dict[str, str]:
    """Two words that are one token after a space."""
    tokens = [
        t[1:]
        for t in context.vocabulary.tokens
        if t.startswith("Ġ") and t[1:].isascii() and t[1:].isalpha() and len(t) > 3
    ]
    return {"bad": tokens[0], "good": tokens[1]}


@pytest.fixture(scope="module")
def pool(prepared: Path, tmp_path_factory: Any) -> Examples:
    folder = tmp_path_factory.mktemp("pool") / "corpus"
    documents = [
        {"text": f"{'import' if i % 2 else 'class'} number {i}", "domain": "a", "label": ("bad", "good")[i % 2]}
        for i in range(30)
    ]
    write_corpus(documents, folder, near_duplicates=None)
    return Examples(Corpus(folder), "train", load_tokenizer(prepared / "tokenizer"), ("text", "label"))


def examples(*columns: dict[str, Any]) -> list[Example]:
    return [Example(c, 0, number) for number, c in enumerate(columns)]


SOME = ({"text": "import os", "label": "good"}, {"text": "a much longer text of words", "label": "bad"},
        {"text": "unknown", "label": None})  # fmt: skip


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_masked_models_probabilities_are_transformers_own_at_the_mask(tiny, context, words, family) -> None:
    objective, model = PromptClassification(words), tiny(family, vocab_size=512)
    assert objective.ready(model, (), context.vocabulary, 0) is model
    encode, vocabulary = lambda text: context.encoder.ids([text])[0], context.vocabulary
    batch = objective.prepare(examples(*SOME), context)
    assert batch["label_B"].tolist() == [1, 0, -100] and batch["weight"] == 2
    own = objective.logits(model, batch).softmax(-1)
    ids = [encode(" " + words[name])[0] for name in ("bad", "good")]
    nll = []
    for one, said in zip(SOME, own, strict=True):
        row = [vocabulary.bos, *encode(f"{one['text']} It was"), vocabulary.mask, *encode("."), vocabulary.eos]
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0, row.index(vocabulary.mask), ids]
        assert torch.allclose(said, logits.softmax(-1), atol=1e-5)
        nll.append(-logits.log_softmax(-1))
    found = objective.loss(model, batch)
    assert found.value.item() == pytest.approx((nll[0][1] + nll[1][0]).item() / 2, abs=1e-5)
    right = [own[0, 1] > own[0, 0], own[1, 0] > own[1, 1]]
    assert found.parts["accuracy"].item() == pytest.approx(sum(map(float, right)) / 2)
    assert objective.predict(model, batch, context)[0] == ("good" if right[0] else "bad")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_causal_models_probabilities_are_those_of_the_next_token(tiny, context, words, family) -> None:
    objective, model = PromptClassification(words, CAUSAL, lm="causal"), tiny(family, vocab_size=512)
    assert objective.ready(model, (), context.vocabulary, 0) is model
    own = objective.logits(model, objective.prepare(examples(*SOME), context)).softmax(-1)
    ids = [context.encoder.ids([" " + words[name]])[0][0] for name in ("bad", "good")]
    for one, said in zip(SOME, own, strict=True):
        row = [context.vocabulary.bos, *context.encoder.ids([f"{one['text']} It was"])[0]]
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0, -1, ids]
        assert torch.allclose(said, logits.softmax(-1), atol=1e-5)


def test_the_word_stands_as_it_does_in_the_text(context, words) -> None:
    objective = PromptClassification(words, "{mask}: {text} {{x}} {pair}?")
    columns = {"text": "a b", "pair": 5, "label": "good"}
    assert objective.columns == ("text", "pair", "label")
    assert objective.filled(columns, "good") == f"{words['good']}: a b {{x}} 5?"
    assert PromptClassification(words).filled(columns, "bad") == f"a b It was {words['bad']}."
    tokens = context.encoder.tokenizer.convert_ids_to_tokens
    batch = PromptClassification(words).prepare(examples(columns), context)
    assert tokens(batch["word_C"].tolist()) == ["Ġ" + words["bad"], "Ġ" + words["good"]]
    numbers = PromptClassification({0: words["bad"], 1: words["good"]})
    assert numbers.labels([1, 0]) == ("0", "1") and numbers.filled(columns, 1).endswith(f"{words['good']}.")


@pytest.mark.parametrize("lm", ["masked", "causal"])
def test_demonstrations_are_one_example_of_each_class_with_its_word(context, words, pool, lm) -> None:
    template = "{text} It was {mask}." if lm == "masked" else CAUSAL
    objective = PromptClassification(words, template, lm=lm, demonstrations=True)
    here, text = replace(context, pool=pool, rng=np.random.default_rng(1)), pool.row(pool, 0).columns
    drawn = set()
    for _ in range(40):
        batch = objective.prepare(examples({"text": text["text"], "label": text["label"]}), here)
        length = int(batch["mask_NL"].sum())
        parts = context.encoder.tokenizer.decode(batch["tokens_NL"][0, 1:length]).split("<|endoftext|>")
        first = f"{text['text']} It was" + ("<|mask|>." if lm == "masked" else "")
        own, *rest = parts if lm == "masked" else [parts[-1], *parts[:-1]]
        assert own == first and [part for part in rest if part] == rest[: len(words)]
        for label, shown in zip(words, rest, strict=False):
            dot = "." if lm == "masked" else ""
            accepted = {
                f"{pool.row(pool, i).columns['text']} It was {words[label]}{dot}" for i in pool.members("label")[label]
            }
            assert shown in accepted and not shown.startswith(text["text"] + " It")
            drawn.add(shown)
        place = int(batch["place_N"][0])
        assert (batch["tokens_NL"][0, place] == context.vocabulary.mask) if lm == "masked" else (place == length - 1)
    assert len(drawn) > 10
    assert len(objective.prepare(examples(text), here)["tokens_NL"]) == 1


def test_a_prediction_is_of_the_mean_logits_over_the_draws(tiny, context, words, pool) -> None:
    objective = PromptClassification(words, demonstrations=True, samples=3)
    model, some = tiny("bert", vocab_size=512), examples(*SOME[:2])
    here = replace(context, pool=pool, predicting=True)
    batch = objective.prepare(some, replace(here, rng=np.random.default_rng(5)))
    assert batch["tokens_NL"].shape[0] == 6 and batch["label_B"].tolist() == [1, 0]
    with torch.no_grad():
        every = objective.logits(model, batch)
        expected = torch.stack([every[:3].mean(0), every[3:].mean(0)])
        assert torch.allclose(objective.scores(model, batch), expected, atol=1e-6)
    said = objective.predictions(model, some, replace(here, predicting=False, rng=np.random.default_rng(5)))
    assert said == [("bad", "good")[i] for i in expected.argmax(-1).tolist()]


def test_what_is_too_long_loses_the_end_of_its_longest_column_and_keeps_the_template(context, words, pool) -> None:
    long = {"text": "import os, sys, re, json, abc, ast, io " * 20, "pair": "short one", "label": "good"}
    objective = PromptClassification(words, "{text} and {pair} was {mask}.", demonstrations=False)
    batch = objective.prepare(examples(long), context)
    text = context.encoder.tokenizer.decode(batch["tokens_NL"][0])
    assert batch["tokens_NL"].shape[1] == context.length and batch["mask_NL"].all()
    assert text.endswith(" and short one was<|mask|>.<|endoftext|>") and "import os, sys" in text
    with_others = PromptClassification(words, demonstrations=True)
    batch = with_others.prepare(examples(long), replace(context, pool=pool))
    assert batch["mask_NL"].sum() <= context.length
    assert context.encoder.tokenizer.decode(batch["tokens_NL"][0]).count(" It was") == 3
    with pytest.raises(PretrainError, match="length 4: accepted: room for the template"):
        objective.prepare(examples(long), replace(context, length=4))


@pytest.mark.parametrize(("given", "message"), [
    ({"template": "{text} It was"}, r"accepted: text with one \{mask\} and at least one"),
    ({"template": "{mask}"}, "at least one"),
    ({"template": "{text} {mask} {mask}"}, "one"),
    ({"template": "{text} {mask"}, "template"),
    ({"template": "{mask}: {text}", "lm": "causal"}, "the model does not see what comes after"),
    ({"lm": "both"}, "accepted: masked, causal"),
    ({"words": {"a": "x", "b": "x"}}, "a word of its own"),
    ({"samples": 0}, "samples 0: accepted: 1 or more"),
])  # fmt: skip
def test_a_prompt_that_cannot_be_asked_is_refused(given, message) -> None:
    with pytest.raises(PretrainError, match=message):
        PromptClassification(**({"words": {"a": "x", "b": "y"}} | given))


def test_what_does_not_fit_the_model_or_the_labels_is_one_clear_error(tiny, context, words) -> None:
    objective = PromptClassification(words)
    with pytest.raises(PretrainError, match="lm 'masked': accepted: that of the model, llama"):
        objective.ready(tiny("llama"), (), context.vocabulary, 0)
    with pytest.raises(PretrainError, match="t5"):
        objective.ready(tiny("t5"), (), context.vocabulary, 0)
    with pytest.raises(PretrainError, match="'god', did you mean 'good'.*has a word|label 'god'"):
        objective.labels(["god"])
    with pytest.raises(
        PretrainError, match="words 'b': ' extraordinarily' is .* tokens: accepted: a word of one token"
    ):
        PromptClassification({"a": words["good"], "b": "extraordinarily"}).prepare(examples({"text": "x"}), context)
    with pytest.raises(PretrainError, match="no mask token"):
        objective.prepare(examples(*SOME), replace(context, vocabulary=replace(context.vocabulary, mask=None)))
    with pytest.raises(PretrainError, match="no training examples here; accepted: .*pool: CORPUS"):
        PromptClassification(words, demonstrations=True).prepare(examples(*SOME), context)


@pytest.mark.parametrize("lm", ["masked", "causal"])
def test_the_search_ranks_all_assignments_of_likely_words_by_accuracy(tiny, context, words, lm) -> None:
    template = "{text} It was {mask}." if lm == "masked" else CAUSAL
    objective, model = (
        PromptClassification(words, template, lm=lm),
        tiny("bert" if lm == "masked" else "llama", vocab_size=512),
    )
    some = examples(
        *({"text": f"{('import', 'class')[i % 3 > 0]} {i}", "label": ("bad", "good")[i % 3 > 0]} for i in range(6))
    )
    found = choose_words(model, objective, some, context, likely=4, best=50)
    accuracies = [accuracy for accuracy, _ in found]
    assert accuracies == sorted(accuracies, reverse=True) and 12 <= len(found) <= 16
    for accuracy, chosen in found:  # each as the objective itself classifies with these words
        said = replace(objective, words=chosen).predictions(model, some, context)
        assert accuracy == pytest.approx(np.mean([s == e.columns["label"] for s, e in zip(said, some, strict=True)]))
    tokens = [t for t in context.vocabulary.tokens if t.startswith("Ġ") and t[1:].isascii() and t[1:].isalpha()]
    every = {"bad": tokens[0][1:], "good": tokens[1][1:]} | {str(i): t[1:] for i, t in enumerate(tokens[2:])}
    likely = replace(objective, words=every)
    with torch.no_grad():
        log_NC = likely.logits(model, likely.prepare(some, context)).log_softmax(-1)
    for label, at in (("bad", [0, 3]), ("good", [1, 2, 4, 5])):
        best = log_NC[at].sum(0).topk(4).indices.tolist()
        assert {chosen[label] for _, chosen in found} == {list(every.values())[i] for i in best}
    with pytest.raises(PretrainError, match="at most 1,000,000"):
        choose_words(model, objective, some, context, likely=1001)
    with pytest.raises(PretrainError, match=r"no examples of \['good'\]"):
        choose_words(model, objective, some[:1], context)


RECIPE = """
name: prompt
stages:
  - {{stage: data, name: corpus, sources: [{{files: {data}}}], validation: 0.15, test: 0.15, near_duplicates: null}}
  - {{stage: tokenizer, name: tokenizer, corpus: corpus, vocab_size: 300, mask: true}}
  - stage: train
    name: tuned
    corpus: corpus
    tokenizer: tokenizer
    model: {{family: {family}, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2}}
    objective: {objective}
    length: 96
    batch_rows: 16
    micro_rows: 8
    optimizer: {{method: adamw, lr: 1e-2}}
    budget: {{steps: {steps}}}
    evaluate_tokens: 960
  - {{stage: evaluate, name: evaluation, checkpoint: tuned, corpus: corpus, compressors: false, max_documents: 16,
      evaluations: [{{method: task, objective: {objective}, pool: corpus}}]}}
"""


@pytest.mark.parametrize(("family", "steps", "accuracy", "objective"), [
    ("bert", 3, 0.0, "{method: prompt_classification, words: {import: x, class: z}, demonstrations: true, samples: 2}"),
    ("llama", 40, 0.9,
     '{method: prompt_classification, words: {import: x, class: z}, lm: causal, template: "{text} {mask}"}'),
])  # fmt: skip
def test_a_recipe_tunes_a_prompt(tmp_path, family, steps, accuracy, objective) -> None:
    recipe = tmp_path / "recipe.yaml"
    said = RECIPE.format(data=_data(tmp_path), family=family, objective=objective, steps=steps)
    recipe.write_text(said, encoding="utf-8")
    run(recipe, output=tmp_path / "run", report=False, say=silent)
    folders = {path.name: path for path in (tmp_path / "run").iterdir() if path.is_symlink()}
    found = json.loads((folders["evaluation"] / "evaluation.json").read_text())
    assert found["metrics"]["accuracy"] >= accuracy and found["metrics"]["documents"] == 16
    assert len(json.loads((folders["evaluation"] / "documents.json").read_text())["task"]) == 16
    assert found["metrics"]["label_loss"] < (np.log(2) if accuracy else 10)
    log = [json.loads(line) for line in (folders["tuned"] / "log.jsonl").read_text().splitlines()]
    assert {"loss", "accuracy", "macro_f1"} <= set([row for row in log if "metrics" in row][-1]["metrics"])
