"""What labelled stages are expected to take, against what they take: batches are filled up, measuring costs too."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import types
from typing import ClassVar

import pytest

from pretrain.core.quick.machine import Beside
from pretrain.forecast import forecast, shortfall, warnings
from pretrain.identity import plan
from pretrain.objectives.labelled.classification import Classification
from pretrain.objectives.labelled.seq2seq import Seq2Seq
from pretrain.objectives.labelled.tagging import Tagging
from pretrain.recipe import check
from pretrain.stages import Estimate, _expected
from pretrain.stages._estimates import Left, judging
from pretrain.stages._examples import Lengths, lengths, sampled

BERT = {"family": "bert", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 256}  # fmt: skip
LLAMA = BERT | {"family": "llama"}
SEQ2SEQ = {"method": "seq2seq", "prompt": "{text}\n# In short: ", "target": "target"}


@pytest.fixture(scope="module")
def table(tmp_path_factory, stories):
    """Texts of very unequal lengths, with what each is."""
    path = tmp_path_factory.mktemp("table") / "t.jsonl"
    rows = []
    for number in range(300):
        story = stories[number % len(stories)]
        text = (3 * story["text"])[number : number + 20 + (number * 97) % 700]
        rows.append({"text": text, "label": story["domain"], "number": number % 7, "target": text[:40], "chosen": text[:90],
                     "rejected": text[:40][::-1]})  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stages(table, objective, model, **more):
    name = objective if isinstance(objective, str) else objective["method"]
    chatting = {"surgeries": [{"method": "chat_template", "template": "headings"}]} if name in ("chat", "dpo") else {}
    judged = "held_out" if name == "dpo" else {"method": "task", "objective": objective, "length": 256, "resamples": 2}
    return [
        {"stage": "data", "name": "corpus", "sources": [{"files": str(table)}], "validation": 0.1, "test": 0.1,
         "near_duplicates": None},
        {"stage": "tokenizer", "name": "tokenizer", "corpus": "corpus", "vocab_size": 500, "cls": True, "mask": True},
        {"stage": "train", "name": "base", "corpus": "corpus", "tokenizer": "tokenizer", "model": model, "length": 64,
         "objective": "masked_lm" if model is BERT else "causal_lm", "budget": {"steps": 2}, "save_every": 0},
        {"stage": "train", "name": "tuned", "corpus": "corpus", "init": "base", "objective": objective, "length": 256,
         "batch_rows": 16, "budget": {"epochs": 2}, "save_every": 0} | chatting | more,
        {"stage": "evaluate", "name": "judged", "checkpoint": "tuned", "corpus": "corpus", "compressors": False,
         "evaluations": [judged]},
    ]  # fmt: skip


KINDS = {
    "classification": ("classification", BERT),
    "regression": ({"method": "regression", "label": "number"}, BERT),
    "seq2seq": (SEQ2SEQ, LLAMA),
    "chat": ({"method": "chat", "messages": None}, LLAMA),
    "dpo": ("dpo", LLAMA),
}


@pytest.mark.processes
def test_labelled_stages_take_the_flops_and_the_memory_that_they_were_expected_to(table, tmp_path):
    """FLOPs within 15%, memory within 30%, before the tokenizer or the corpus is there, and when they are."""
    given = {name: stages(table, *kind) for name, kind in KINDS.items()}
    probe = f"""
        import json, os
        from pathlib import Path
        from pretrain import engine
        from pretrain.forecast import forecast
        from pretrain.identity import plan
        from pretrain.recipe import check
        for name, stages in {given!r}.items():
            if os.fork():
                assert os.wait()[1] == 0, name
                continue
            folder = Path({str(tmp_path)!r})
            def expected(stages):
                recipe = check({{"name": name, "stages": stages}}, None, output=folder / name)
                return recipe, {{e.item.stage.name: e.estimate for e in forecast(plan(recipe))}}
            recipe, before = expected(stages)
            engine.run(expected(stages[:3])[0], say=engine.silent, report=False)
            later = expected(stages)[1]
            result = engine.run(recipe, say=engine.silent, report=False)
            rows = [[stage, before[stage].flops, later[stage].flops, result.stages[stage]["flops"],
                     before[stage].memory_bytes, result.stages[stage]["peak_memory_bytes"]] for stage in ("tuned", "judged")]
            (folder / f"{{name}}.json").write_text(json.dumps(rows))
            os._exit(0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(probe)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in KINDS:
        print(name, (tmp_path / f"{name}.json").read_text())
        most = 0
        for stage, before, later, spent, memory, peak in json.loads((tmp_path / f"{name}.json").read_text()):
            most = max(most, memory)
            if stage == "tuned" or name not in ("seq2seq", "chat", "dpo"):  # what is generated is not metered
                assert before == pytest.approx(spent, rel=0.15), (name, stage)
                assert later == pytest.approx(spent, rel=0.15), (name, stage)
            assert most == pytest.approx(peak, rel=0.3), (name, stage)


def test_the_counts_beside_labels_are_planned_for_and_are_bounded(table, tmp_path):
    def seconds(documents, method=None):
        corpus = Left(bytes={"train": 300.0 * documents}, documents={"train": float(documents)})
        return judging(method or Classification(), corpus, 100.0, 0)

    few, more, many, most = map(seconds, (100, 1000, 5_000, 10_000_000))
    assert few < more < many <= most < 3 * many  # of more than enough documents a part is counted
    assert seconds(1000, Classification(pair="other")) < more  # whose characters are not counted
    assert seconds(1000, Seq2Seq()) == 0 == seconds(1000, Tagging())  # which have no such counts beside them
    planned = {}
    for name in ("classification", "seq2seq"):
        stage = stages(table, *KINDS[name])
        made = forecast(plan(check({"stages": stage}, None, output=tmp_path)))[-1].estimate
        stage[-1]["evaluations"][0]["resamples"] = 2000
        drawn = forecast(plan(check({"stages": stage}, None, output=tmp_path)))[-1].estimate
        planned[name] = drawn.seconds - made.seconds
    assert planned["classification"] > 0 == planned["seq2seq"]


def expected(table, tmp_path, **more):
    return forecast(plan(check({"stages": stages(table, *KINDS["classification"], **more)}, None, output=tmp_path)))


def test_measuring_often_costs_time_and_is_told_where_it_costs_much(table, tmp_path, monkeypatch):
    for module in ("_estimates", "_expected"):
        monkeypatch.setattr(f"pretrain.stages.{module}.likely_rate", lambda: 1e8)
    once, often = expected(table, tmp_path), expected(table, tmp_path, evaluate_every=0.05)
    assert often[3].estimate.seconds > 1.2 * once[3].estimate.seconds
    assert any("evaluate_every 0.05: 21 measurements take about" in line for line in warnings(often))
    assert not any("measurements" in line for line in warnings(once))


@pytest.mark.parametrize("made, told", [(21, True), (17, False), (14, True)])
def test_a_few_measurements_that_are_left_out_of_a_budget_of_seconds_are_not_told(made, told):
    stage = types.SimpleNamespace(evaluate_every=0.05)
    assert len([*_expected._measured_long(stage, training=300.0, once=4.5, evaluations=21, made=made)]) == told


def test_a_budget_of_seconds_counts_what_a_step_takes_beside_its_products(table, tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.stages._expected.likely_rate", lambda: 1e15)
    monkeypatch.setattr("pretrain.stages._expected.likely_beside", lambda: Beside(block=4e-3, logit=0.0))
    quick = expected(table, tmp_path, budget={"seconds": 8})[3].estimate
    steps = quick.flops / expected(table, tmp_path, budget={"steps": 1})[3].estimate.flops
    assert 500 < steps < 1100  # at 8 ms each, of two blocks


class Batch:
    fill = "longest"
    inputs: ClassVar[tuple[tuple[str, ...], ...]] = (("text",),)


def test_a_batch_is_as_long_as_its_longest():
    rows = [{"text": "a" * n} for n in (10, 10, 10, 100)]
    count = lambda texts: [float(len(text)) for text in texts]  # noqa: E731
    one, many = (lengths(Batch(), rows, count, 256, batch) for batch in (1, 64))
    assert one.real == many.real == pytest.approx(32.5 + 2)
    assert one.filled == (3 * 16 + 112) / 4 and many.filled == pytest.approx(112, rel=0.01)
    assert lengths(Batch(), rows, count, 64, 64).filled == pytest.approx(64, rel=0.01)
    assert lengths(Batch(), rows, count, 256, 2, ordered=4).filled == (16 + 16 + 112 + 112) / 4
    assert lengths(Batch(), [{"other": "a"}], count, 64, 1) is None


class Rows(Batch):
    fill = "rows"


class Pair(Batch):
    fill = "apart"
    inputs: ClassVar[tuple[tuple[str, ...], ...]] = (("text", "a"), ("text", "b"))


def test_a_batch_of_examples_that_share_rows_or_are_pairs_is_as_wide_as_those_rows():
    count = lambda texts: [float(len(text)) for text in texts]  # noqa: E731
    rows = [{"text": "a" * 28, "a": "", "b": "b" * 30}] * 3
    assert lengths(Rows(), rows, count, 64, 4) == Lengths(60, 64, 0, 2 / 4)  # 120 tokens
    assert lengths(Rows(), rows, count, 256, 4) == Lengths(120, 128, 0, 1 / 4)
    assert lengths(Pair(), rows, count, 256, 4) == Lengths(45, 64, 16, 2)


def test_the_columns_of_an_input_are_known_without_the_label():
    assert Classification(pair="second").inputs == (("text", "second"),)
    assert Seq2Seq(prompt="{text} {title}", target="answer").inputs == (("text", "title"), ("answer",))


def test_the_rows_of_a_table_are_counted(table):
    from pretrain.corpus.sources import Files

    few = sampled(Files(str(table)), table.stat().st_size, rows_alone=True)
    assert few.documents == 300 and set(few.rows[0]) >= {"text", "label", "target"}
    assert not sampled(Files(str(table), tables="text"), 1.0, rows_alone=False).rows


@pytest.mark.parametrize(("spent", "told"), [(25e9, "25% of the FLOPs"), (90e9, ""), (400e9, "quicker")])
def test_a_budget_of_seconds_that_made_far_fewer_flops_is_told(table, tmp_path, spent, told):
    stage = expected(table, tmp_path)[3].item.stage
    record = {"config": {"budget": {"seconds": 60.0}}, "flops": spent}
    line = shortfall(stage, record, {"tuned": Estimate(100e9)})
    assert told in line and bool(line) == bool(told)
    assert not shortfall(stage, record | {"config": {"budget": {"steps": 5}}}, {"tuned": Estimate(100e9)})
