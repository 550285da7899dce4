"""lm-eval on local tasks: accuracy by hand, each kind of request, the cloze task, nothing fetched or run, errors."""

from __future__ import annotations

import builtins
import json
import os
import random
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from decoding_cases import passes

from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.evaluation.tasks.harness import Harness, write_cloze

STORIES = 40


@pytest.fixture(scope="module")
def model(tiny):
    return tiny(vocab_size=512, initializer_range=0.4, max_position_embeddings=512)


@pytest.fixture
def cloze(tmp_path, stories):
    return write_cloze(stories[:STORIES], tmp_path, items=12)


def rows_of(path):
    return [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]


def logp(model, prompt, after):
    with torch.no_grad():
        logp_TV = model(torch.tensor([[*prompt, *after]])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return float(logp_TV[torch.arange(len(after)), torch.tensor(after)].sum())


def test_a_cloze_task_asks_for_what_the_document_says_next(cloze, stories, tmp_path):
    rows = rows_of(cloze)
    assert len(rows) == 12 and {row["gold"] for row in rows} == {0, 1, 2, 3}
    for row in rows:
        true = row["choices"][row["gold"]]
        home = [d for d in stories[:STORIES] if row["query"] + true in d["text"] and d["domain"] == row["domain"]]
        assert home
        others = [one.strip() for i, one in enumerate(row["choices"]) if i != row["gold"]]
        assert len({*others, true.strip()}) == 4 and not any(one in home[-1]["text"] for one in others)
        assert all(any(one in d["text"] for d in stories[:STORIES]) for one in others)
    again = write_cloze(stories[:STORIES], tmp_path / "again", items=12)
    assert rows_of(again) == rows
    assert rows_of(write_cloze(stories[:STORIES], tmp_path / "other", items=12, seed=1)) != rows
    with pytest.raises(PretrainError, match="1 documents give no item; accepted: 4 documents or more"):
        write_cloze(stories[:1], tmp_path)
    with pytest.raises(PretrainError, match="choices 1, items 500: accepted"):
        write_cloze(stories, tmp_path, choices=1)


def test_accuracy_is_that_of_summed_log_likelihoods(model, tokenizer, cloze):
    pytest.importorskip("lm_eval")
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    found = Harness(folder=str(cloze.parent))(model, tokenizer, [])
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    begin, right, normed = Vocabulary.of(tokenizer).begin, [], []
    for row in rows_of(cloze):
        sums = []
        for choice in row["choices"]:
            head = [begin, *encode(tokenizer, [row["query"]])[0].tolist()]
            whole = [begin, *encode(tokenizer, [row["query"] + choice])[0].tolist()]
            sums.append(logp(model, head, whole[len(head) :]))
        right.append(int(np.argmax(sums)) == row["gold"])
        normed.append(int(np.argmax([s / len(c) for s, c in zip(sums, row["choices"], strict=True)])) == row["gold"])
    assert found.metrics == {
        "cloze_acc": pytest.approx(np.mean(right)), "cloze_acc_norm": pytest.approx(np.mean(normed)),
        "cloze_samples": 12.0,
    }  # fmt: skip
    spread = 1.96 * np.std(right, ddof=1) / 12**0.5
    assert found.intervals["cloze_acc"] == pytest.approx((np.mean(right) - spread, np.mean(right) + spread))


def test_without_a_folder_the_documents_make_the_task(model, tokenizer, stories):
    pytest.importorskip("lm_eval")
    found = Harness(limit=8)(model, tokenizer, stories[:STORIES])
    assert found.metrics["cloze_samples"] == 8 and 0 <= found.metrics["cloze_acc"] <= 1


def test_a_model_that_knows_the_text_is_always_right(tokenizer, cloze, monkeypatch):
    pytest.importorskip("lm_eval")
    from pretrain.evaluation.tasks import _harness

    true = {row["query"]: row["choices"][row["gold"]] for row in rows_of(cloze)}

    def knows(self, requests, disable_tqdm=True):
        return [(0.0 if true[r.args[0]] == r.args[1] else -99.0, True) for r in requests]

    monkeypatch.setattr(_harness.OurModel, "loglikelihood", knows)
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64))
    assert Harness(folder=str(cloze.parent))(model, tokenizer, []).metrics["cloze_acc"] == 1.0


def test_requests_of_each_kind(model, tokenizer):
    pytest.importorskip("lm_eval")
    from pretrain.evaluation.tasks._harness import OurModel

    ours, vocabulary = OurModel(model, tokenizer, 40, 0), Vocabulary.of(tokenizer)

    def ask(*args):
        return SimpleNamespace(args=args)

    def ids(text):
        return encode(tokenizer, [text])[0].tolist()

    begin, long = vocabulary.begin, "import os\n" * 30 + "x"
    found = ours.loglikelihood([ask("", " def"), ask("import", " os"), ask(long, " def"), ask("a ", "b")])
    assert found[0][0] == pytest.approx(logp(model, [begin], ids(" def")), rel=1e-4)
    assert found[1][0] == pytest.approx(logp(model, [begin, *ids("import")], ids(" os")), rel=1e-4)
    cut = ids(long)[-(41 - len(ids(" def"))) :]
    assert found[2][0] == pytest.approx(logp(model, cut, ids(" def")), rel=1e-4)  # the context's end is kept
    assert found[3][0] == pytest.approx(logp(model, [begin, *ids("a")], ids("a b")[len(ids("a")) :]), rel=1e-4)
    text = "def f(x): return x"
    rolling = ours.loglikelihood_rolling([ask(text), ask("")])
    assert rolling == pytest.approx([logp(model, [begin], ids(text)), 0.0], rel=1e-4)
    (greedy,) = ours.generate_until([ask("import", {"until": [], "max_gen_toks": 12})])
    made = model.generate(
        torch.tensor([[begin, *ids("import")]]), max_new_tokens=12, do_sample=False, eos_token_id=vocabulary.eos
    )
    assert greedy == tokenizer.decode(made[0, 1 + len(ids("import")) :], skip_special_tokens=True)
    stop = greedy[len(greedy) // 2 :][:2]
    (cut_off,) = ours.generate_until([ask("import", {"until": [stop], "max_gen_toks": 12})])
    assert cut_off == greedy.split(stop)[0]
    together = ["import", "def f(x):", "a"]
    alone = [ours.generate_until([ask(t, {"until": [stop], "max_gen_toks": 12})])[0] for t in together]
    assert ours.generate_until([ask(t, {"until": [stop], "max_gen_toks": 12}) for t in together]) == alone
    first = tokenizer.decode(made[0, 1 + len(ids("import")) :][:1])
    count = passes(model, lambda: ours.generate_until([ask("import", {"until": [first], "max_gen_toks": 12})]))
    assert count == 1  # the prompt's alone: the first token ends the answer
    with pytest.raises(PretrainError, match="generation_kwargs: 'top_kk' .did you mean 'top_k'"):
        ours.generate_until([ask("x", {"max_gen_toks": 4, "top_kk": 3})])
    assert ours.tok_encode("<|endoftext|>")[1:] != [vocabulary.eos] and ours.prefix_token_id == begin
    with pytest.raises(PretrainError, match="continuation of .* accepted: at most 40"):
        ours.loglikelihood([ask("x", long)])
    with pytest.raises(PretrainError, match="max_gen_toks 40: accepted: below the length 40"):
        ours.generate_until([ask("x", {"max_gen_toks": 40})])


def test_generated_answers_are_scored(model, tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    from pretrain.evaluation.tasks._harness import OurModel

    (said,) = OurModel(model, tokenizer, 64, 0).generate_until(
        [SimpleNamespace(args=("import", {"until": ["\n"], "max_gen_toks": 3}))]
    )
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"q": "import", "a": a}) + "\n" for a in (said, "no")))
    (tmp_path / "say.yaml").write_text(
        "task: say\ndataset_path: json\ndataset_kwargs: {data_files: {test: d.jsonl}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 3}\nmetric_list: [{metric: exact_match}]\n"
    )
    assert Harness(folder=str(tmp_path), tasks=("say",))(model, tokenizer, []).metrics["say_exact_match"] == 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("dataset_path: json", "dataset_path: org/set"), "dataset_path 'org/set': accepted: json, csv, parquet, text"),
        (("test: cloze.jsonl", "test: gone.jsonl"), "data_files 'gone.jsonl': accepted: a file in"),
        (("test: cloze.jsonl", "test: https://x.org/cloze.jsonl"), "data_files 'https:.*accepted: a file in"),
        (("doc_to_text: query", "doc_to_text: !function run.me"), "accepted: YAML without tags such as !function"),
        (("task: cloze", "group: cloze"), "accepted: one task with its name"),
        (("task: cloze", "task: cloze\ninclude: other.yaml"), "no include or group"),
        (("  data_files:\n    test: cloze.jsonl", "  x: 1"), "dataset_kwargs has no data_files"),
        (("test_split: test", "test_split: gone"), "harness: cloze: .*accepted: tasks that lm-eval can run"),
    ],
)
def test_a_task_that_is_not_local_or_whole_is_refused(model, tokenizer, cloze, change, said):
    pytest.importorskip("lm_eval")
    assert change[0] in cloze.read_text()
    cloze.write_text(cloze.read_text().replace(*change))
    with pytest.raises(PretrainError, match=said):
        Harness(folder=str(cloze.parent))(model, tokenizer, [])
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # as conftest set it


def test_other_mistakes_are_one_error_each(model, tokenizer, cloze, tmp_path, monkeypatch):
    with pytest.raises(PretrainError, match="tasks cloze: accepted: with a folder"):
        Harness(tasks=("cloze",))
    with pytest.raises(PretrainError, match="limit -1: accepted: 0 or more"):
        Harness(limit=-1)
    with monkeypatch.context() as without:
        real = builtins.__import__
        without.setattr(
            builtins, "__import__",
            lambda name, *more: real("no_such_" + name, *more) if name.startswith("lm_eval") else real(name, *more),
        )  # fmt: skip
        with pytest.raises(
            PretrainError, match=r"accepted: lm-eval, of the extra eval: pip install 'pretrain\[eval\]'"
        ):
            Harness(folder=str(cloze.parent))(model, tokenizer, [])
    pytest.importorskip("lm_eval")
    with pytest.raises(PretrainError, match="unknown task in .* 'clozes' .did you mean 'cloze'"):
        Harness(folder=str(cloze.parent), tasks=("clozes",))(model, tokenizer, [])
    (tmp_path / "none").mkdir()
    with pytest.raises(PretrainError, match="accepted: one with lm-eval tasks"):
        Harness(folder=str(tmp_path / "none"))(model, tokenizer, [])
    with pytest.raises(PretrainError, match="length 1000: accepted: at most the model's 512 positions"):
        Harness(folder=str(cloze.parent), length=1000)(model, tokenizer, [])


def test_nothing_is_run_beside_the_tasks(model, tokenizer, cloze, monkeypatch):
    """By itself lm-eval asks pip, git and others what machine this is: as many seconds as a small task takes."""
    pytest.importorskip("lm_eval")
    started = []
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda self, program, *_, **__: started.append(program))
    assert "cloze_acc" in Harness(folder=str(cloze.parent))(model, tokenizer, []).metrics and started == []
