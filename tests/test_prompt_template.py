"""Documents in a prompt's template: the texts, predicted labels, and the three stages in one recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoModelForMaskedLM

from pretrain.core import checkpoint
from pretrain.core.batch import Context, Example, Vocabulary
from pretrain.core.encoding import Encoder
from pretrain.core.errors import PretrainError
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.data._work import working
from pretrain.data.rewriting import prompt_template
from pretrain.data.rewriting.prompt_template import PromptTemplate
from pretrain.engine import run, silent

PROMPT = {"method": "prompt_classification", "words": {"no": "to", "yes": "the"}, "template": "{text}? {mask}, {pair}"}
ROWS = [
    {"text": "import os", "pair": "import sys", "label": "yes", "domain": "a", "id": "1"},
    {"text": "class A", "pair": "def b", "label": "no", "domain": "b", "id": "2"},
    {"text": "third {text}", "pair": "is {mask}", "label": None, "domain": "b", "id": "3"},
]


@pytest.fixture(scope="module")
def tuned(tiny: Any, prepared: Path, tmp_path_factory: Any) -> str:
    folder = tmp_path_factory.mktemp("tuned")
    tokenizer = load_tokenizer(prepared / "tokenizer")
    checkpoint.save(tiny("bert", vocab_size=512), tokenizer, folder / "masked", {"length": 24})
    checkpoint.save(tiny("llama", vocab_size=512), tokenizer, folder / "causal")
    return str(folder)


def said(folder: str, rows: list[dict[str, Any]], length: int = 24) -> list[str]:
    """What the objective's own predictions say."""
    model, tokenizer = checkpoint.load(folder)
    context = Context(Vocabulary.of(tokenizer), length, np.random.default_rng(0), encoder=Encoder(tokenizer))
    objective = PromptTemplate(PROMPT).objective
    return objective.predictions(model, [Example(row, 0, i) for i, row in enumerate(rows)], context)


def test_known_labels_make_exactly_the_template_with_their_words() -> None:
    made = PromptTemplate(PROMPT)(Dataset.from_list(ROWS[:2]))
    assert made["text"][:] == ["import os? the, import sys", "class A? to, def b"]
    for name in ("pair", "label", "domain", "id"):
        assert made[name][:] == [row[name] for row in ROWS[:2]]


def test_a_label_that_is_missing_is_predicted_and_with_relabel_all_are(tuned, tmp_path) -> None:
    folder, word = f"{tuned}/masked", {"no": "to", "yes": "the"}
    every, other = said(folder, ROWS), {"no": "yes", "yes": "no"}
    rows = [row | {"label": row["label"] and other[label]} for row, label in zip(ROWS, every, strict=True)]
    with working(tmp_path) as desk:
        made = PromptTemplate(PROMPT, folder)(Dataset.from_list(rows))
    for row, label, text in zip(rows[:2], every, made["text"][:], strict=False):
        assert text == f"{row['text']}? {word[other[label]]}, {row['pair']}"
    assert made["text"][2] == f"third {{text}}? {word[every[2]]}, is {{mask}}"
    assert sum(desk.reports[0]["labels"].values()) == 3
    labels = PromptTemplate(PROMPT, folder, relabel=True)(Dataset.from_list(rows))["text"][:]
    assert labels == [f"{row['text']}? {word[label]}, {row['pair']}" for row, label in zip(ROWS, every, strict=True)]
    bare = Dataset.from_list([{k: row[k] for k in ("text", "pair")} for row in ROWS])
    assert PromptTemplate(PROMPT, folder)(bare)["text"][:] == labels


def test_a_killed_run_predicts_only_what_it_has_not_predicted(tuned, tmp_path, monkeypatch) -> None:
    rows = [{"text": f"number {i}", "pair": "p"} for i in range(7)]
    monkeypatch.setattr(prompt_template, "SHARD", 3)
    operation = PromptTemplate(PROMPT, f"{tuned}/masked")
    with working(tmp_path):
        first = operation(Dataset.from_list(rows[:6]))["text"][:]
    monkeypatch.setattr(prompt_template._Predictor, "_predict", lambda self, documents: ["yes"] * (len(documents) == 1))
    with working(tmp_path) as desk:
        assert operation(Dataset.from_list(rows))["text"][:] == [*first, "number 6? the, p"]
    assert desk.flops > 0


@pytest.mark.parametrize(("given", "message"), [
    ({"prompt": "classification"}, "prompt 'classification': accepted: {method: prompt_classification"),
    ({"prompt": PROMPT | {"demonstrations": True}}, "demonstrations: accepted: false"),
    ({"prompt": PROMPT, "relabel": True}, "relabel: accepted: with a model"),
    ({"prompt": PROMPT, "length": -1}, "length -1: accepted: 0 or more"),
])  # fmt: skip
def test_what_cannot_be_written_is_refused(given, message) -> None:
    with pytest.raises(PretrainError, match=message):
        PromptTemplate(**given)


def test_documents_that_do_not_fit_are_one_clear_error(tuned) -> None:
    rows = Dataset.from_list(ROWS)
    with pytest.raises(PretrainError, match="document 2 has no 'label'; accepted: one in each, or a model"):
        PromptTemplate(PROMPT)(rows)
    with pytest.raises(PretrainError, match="no column 'pair'"):
        PromptTemplate(PROMPT)(rows.remove_columns("pair"))
    with pytest.raises(PretrainError, match="label 'maybe'.*accepted: a label that has a word"):
        PromptTemplate(PROMPT)(Dataset.from_list([ROWS[0] | {"label": "maybe"}]))
    with pytest.raises(PretrainError, match="document 1 has no 'pair'"):
        PromptTemplate(PROMPT)(Dataset.from_list([ROWS[0], ROWS[1] | {"pair": None}]))
    with pytest.raises(PretrainError, match="lm 'masked': accepted: that of the model, llama"):
        PromptTemplate(PROMPT, f"{tuned}/causal")(rows)


RECIPE = """
name: pcp
stages:
  - {{stage: data, name: few, sources: [{{files: {few}}}], validation: 0.2, test: 0.2, near_duplicates: null}}
  - {{stage: tokenizer, name: tokenizer, corpus: few, vocab_size: 300, mask: true}}
  - &prompting
    stage: train
    name: tuned
    corpus: few
    tokenizer: tokenizer
    model: {{family: bert, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2}}
    objective: &prompt {{method: prompt_classification, words: {{import: x, class: z}},
      template: "{{text}} is:{{mask}}."}}
    length: 48
    batch_rows: 8
    optimizer: {{method: adamw, lr: 5e-3}}
    budget: {{steps: 2}}
  - stage: data
    name: prompts
    sources: [{{files: {many}}}]
    validation: 0.0
    test: 0.0
    near_duplicates: null
    operations: [{{method: prompt_template, prompt: *prompt, model: tuned}}]
  - {{stage: train, name: adapted, corpus: prompts, init: tuned, objective: masked_lm, length: 48, batch_rows: 8,
      budget: {{steps: 2}}}}
  - {{stage: train, name: again, corpus: few, init: adapted, objective: *prompt, length: 48, batch_rows: 8,
      budget: {{steps: 2}}}}
  - {{stage: evaluate, name: evaluation, checkpoint: again, corpus: few, compressors: false,
      evaluations: [{{method: task, objective: *prompt, resamples: 2}}]}}
"""


def test_a_recipe_tunes_writes_prompts_continues_and_tunes_again(tmp_path) -> None:
    kinds = ("import", "class")
    few = [{"text": f"{kinds[i % 2]} small {i}", "label": kinds[i % 2]} for i in range(80)]
    many = [{"text": f"{kinds[i % 2]} thing number {i}"} for i in range(40)]
    for name, rows in (("few", few), ("many", many)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(few=tmp_path / "few.jsonl", many=tmp_path / "many.jsonl"), encoding="utf-8")
    run(recipe, output=tmp_path / "run", report=False, say=silent)
    folders = {path.name: path for path in (tmp_path / "run").iterdir() if path.is_symlink()}
    corpus = Corpus(folders["prompts"] / "corpus")
    texts = [document["text"] for document in corpus.documents("train")]
    assert {text.rpartition(":")[0] for text in texts} == {f"{row['text']} is" for row in many}
    assert {text.rpartition(":")[2] for text in texts} <= {"x.", "z."}
    assert sum(corpus.info["operations"][0]["labels"].values()) == len(many)
    assert json.loads((folders["prompts"] / "stage.json").read_text())["flops"] > 0
    AutoModelForMaskedLM.from_pretrained(folders["again"] / "checkpoint")
    assert "accuracy" in json.loads((folders["evaluation"] / "evaluation.json").read_text())["metrics"]
