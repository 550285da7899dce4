"""CLEAR: the confidence by its formula and by plain `transformers`, what is dropped, and what is corrected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from pretrain.core import checkpoint
from pretrain.core.batch import Context, Example, Vocabulary
from pretrain.core.encoding import Encoder, encode
from pretrain.core.errors import PretrainError
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.data._work import working
from pretrain.data.rewriting import clear
from pretrain.data.rewriting._confidence import LETTERS, Judge, consistency, preferred
from pretrain.data.rewriting.clear import Clear

TASK = {"method": "seq2seq", "prompt": "{text}:", "answer": 8}
WORDS = ["import", "class", "return", "def", "self", "None", "True", "raise", "yield", "assert", "while", "lambda"]


@pytest.fixture(scope="module")
def learnt(tiny: Any, prepared: Path, tmp_path_factory: Any) -> str:
    """A checkpoint that has learnt to answer each word with the next."""
    tokenizer, model = load_tokenizer(prepared / "tokenizer"), tiny(vocab_size=512, initializer_range=0.1)
    context = Context(Vocabulary.of(tokenizer), 32, np.random.default_rng(0), encoder=Encoder(tokenizer))
    objective = Clear("x", task=TASK).objective
    batch = objective.prepare([Example(row, 0, n) for n, row in enumerate(rows())], context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        objective.loss(model.train(), batch).value.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("learnt") / "checkpoint"
    checkpoint.save(model.eval(), tokenizer, folder, {"length": 128})
    return str(folder)


def rows() -> list[dict[str, Any]]:
    pairs = zip(WORDS, [*WORDS[1:], WORDS[0]], strict=True)
    return [{"text": word, "target": answer, "domain": "words"} for word, answer in pairs]


def corrupted(*numbers: int) -> list[dict[str, Any]]:
    """Some of the answers those of other words."""
    right = rows()
    return [
        row | {"target": right[(n + 5) % len(right)]["target"]} if n in numbers else row for n, row in enumerate(right)
    ]


def test_consistency_is_the_mean_over_the_sampled_responses() -> None:
    likeness = {"a": (1.0, 1.0), "b": (0.4, 0.0)}
    assert consistency("a", ["a", "b"], lambda other, _: likeness[other], 0.8) == pytest.approx((1 + 0.8 * 0.4) / 2)
    assert consistency("a", ["a"] * 5, lambda other, _: likeness[other], 0.3) == pytest.approx(1.0)
    assert preferred(0.6, 0.2) == pytest.approx(0.75) and preferred(0.0, 0.0) == 0.5


def test_certainty_is_the_geometric_mean_of_the_token_s_probabilities(learnt) -> None:
    judging = Judge(Path(learnt), 64, 8)
    vocabulary = judging.vocabulary
    prompt, after = (ids.tolist() for ids in encode(judging.tokenizer, ["class Node:", "a node"]))
    ids, after = [vocabulary.begin, *prompt], [*after, vocabulary.eos]
    with torch.no_grad():
        logp = judging.model(torch.tensor([ids + after])).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
    mean = logp[range(len(after)), after].mean().exp()
    assert judging.certainty("class Node:", "a node", "likelihood") == pytest.approx(float(mean), rel=1e-4)


def letters(judging: Judge, text: str) -> torch.Tensor:
    """What plain `transformers` says of the letters after a text."""
    ids = [judging.vocabulary.begin, *encode(judging.tokenizer, [text])[0].tolist()]
    choices = [int(ids) for (ids,) in encode(judging.tokenizer, LETTERS)]
    with torch.no_grad():
        return judging.model(torch.tensor([ids])).logits[0, -1, choices].double().softmax(-1)


def test_what_the_model_chooses_counts_by_the_probabilities_of_the_letters(learnt, monkeypatch) -> None:
    judging, asked = Judge(Path(learnt), 0, 8), []
    choices = Judge._choices
    monkeypatch.setattr(Judge, "_choices", lambda self, texts: asked.extend(texts) or choices(self, texts))
    certain = judging.certainty("is it", "so", "choice")
    assert len(asked) == 2 and asked[0] != asked[1] and all("so" in text for text in asked)
    wanted = np.mean([float(p[0] + p[2] / 2) for p in (letters(judging, text) for text in asked)])
    assert certain == pytest.approx(wanted, rel=1e-4)
    asked.clear()
    one, other = judging.preference("is it", "so", "no"), judging.preference("is it", "no", "so")
    first, second = (letters(judging, text) for text in asked[:2])
    assert one == pytest.approx(float(first[0] + second[1]) / 2, rel=1e-4)
    assert one + other == pytest.approx(1 - float(first[2] + second[2]) / 2, rel=1e-4)


def test_the_confidence_weighs_consistency_and_certainty(learnt) -> None:
    judging, operation = Judge(Path(learnt), 0, 8), Clear(learnt, task=TASK, reflection="likelihood", responses=3)
    sides = [replace(operation, beta=beta).confidence(judging, "class:", "return") for beta in (1.0, 0.0)]
    assert sides[1] == pytest.approx(judging.certainty("class:", "return", "likelihood"))
    assert operation.confidence(judging, "class:", "return") == pytest.approx(0.7 * sides[0] + 0.3 * sides[1])
    sampled = replace(operation, beta=1.0, temperature=0.0)
    assert sampled.confidence(judging, "class:", "return") == pytest.approx(1.0)  # always its answer
    assert sampled.confidence(judging, "class:", "nothing of it") < 0.5


def test_a_filter_drops_the_corrupted_responses(learnt, tmp_path) -> None:
    wrong = (1, 4, 7)
    with working(tmp_path) as desk:
        operation = Clear(learnt, task=TASK, reflection="likelihood", threshold=0.5)
        kept = operation(Dataset.from_list(corrupted(*wrong)))
    assert kept["text"][:] == [word for n, word in enumerate(WORDS) if n not in wrong]
    (report,) = desk.reports
    assert report["documents"] == {"words": {"before": 12, "after": 9}} and desk.flops == 0
    half = Clear(learnt, task=TASK)(Dataset.from_list(corrupted(*wrong)))
    assert 6 <= len(half) <= 12  # at the median of what may be equal


def test_the_tuned_model_corrects_what_it_finds_worse_and_nothing_else(learnt, tmp_path) -> None:
    wrong = (2, 9)
    operation = Clear(learnt, "correct", task=TASK, reflection="likelihood")
    with working(tmp_path) as desk:
        made = operation(Dataset.from_list(corrupted(*wrong)))
    assert made.to_list() == rows()
    (report,) = desk.reports
    assert report["changed"] == 2 and [change["document"] for change in report["changes"]] == [2, 9]
    assert report["changes"][0] == {"document": 2, "before": WORDS[8], "after": WORDS[3]}
    never = replace(operation, threshold=1.0)(Dataset.from_list(corrupted(*wrong)))
    assert never.to_list() == corrupted(*wrong)


def test_asked_for_letters_it_corrects_by_the_preference(learnt, monkeypatch) -> None:
    operation = Clear(learnt, "correct", task=TASK, threshold=0.6)
    preference = {WORDS[3]: 0.61, WORDS[10]: 0.6}
    monkeypatch.setattr(Judge, "preference", lambda self, prompt, candidate, response: preference[candidate])
    assert operation(Dataset.from_list(corrupted(2, 9))).to_list() == corrupted(9)


def test_a_killed_run_judges_only_what_it_has_not_judged(learnt, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(clear, "SHARD", 5)
    operation = Clear(learnt, task=TASK, reflection="likelihood", responses=1, threshold=0.3)
    with working(tmp_path):
        first = operation(Dataset.from_list(rows()[:10]))["text"][:]
    monkeypatch.setattr(Clear, "_judged", lambda *_: {"confidence": 1.0})
    with working(tmp_path) as desk:
        assert operation(Dataset.from_list(rows()))["text"][:] == [*first, *WORDS[10:]]
    assert desk.flops > 0


@pytest.mark.parametrize(("given", "message"), [
    ({"task": "classification"}, "task 'classification': accepted: {method: seq2seq"),
    ({"threshold": 1.5}, "threshold 1.5: accepted: from 0 to 1"),
    ({"step": "both"}, "step 'both': accepted: filter, correct"),
])  # fmt: skip
def test_what_cannot_be_judged_is_refused(given, message) -> None:
    with pytest.raises(PretrainError, match=message):
        Clear("x", **given)


def test_documents_that_do_not_fit_are_one_clear_error(learnt, tiny, prepared, tmp_path) -> None:
    corpus = Dataset.from_list(rows())
    with pytest.raises(
        PretrainError, match=r"clear: no column 'target' \(did you mean 'text'\?\); accepted: text, domain"
    ):
        Clear(learnt, task=TASK)(corpus.remove_columns("target"))
    with pytest.raises(PretrainError, match="clear: document 12 has no 'target'"):
        Clear(learnt, task=TASK)(Dataset.from_list([*rows(), rows()[0] | {"target": None}]))
    with pytest.raises(PretrainError, match="length 9: accepted: room for a prompt and 8 tokens of answer"):
        Clear(learnt, task=TASK, length=9)(corpus)
    numbers = Dataset.from_list([{"text": "a", "target": 3}])
    with pytest.raises(PretrainError, match="column 'target' of .*: accepted: texts"):
        Clear(learnt, "correct", task=TASK)(numbers)
    checkpoint.save(tiny("bert", vocab_size=512), load_tokenizer(prepared / "tokenizer"), tmp_path / "masked")
    with pytest.raises(PretrainError, match="accepted: a causal language model, with its tokenizer"):
        Clear(str(tmp_path / "masked"), task=TASK)(corpus)
