"""The report: complete, safe, of partial runs too, and drawn by a real browser."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from page_cases import NASTY, PIXEL, browser_page, example, looked_at, put, rows
from safetensors.torch import save_file

from pretrain import report
from pretrain.core.errors import PretrainError
from pretrain.report.charts import changes
from pretrain.report.data import plots, thin
from pretrain.report.held_out import bars
from pretrain.report.page import _cards, collect, write
from pretrain.report.samples import _continuation, panel
from pretrain.report.summary import headline, summarise


def test_corpus_and_model_text_cannot_break_out(tmp_path):
    page = write(example(tmp_path / "r")).read_text()
    assert NASTY not in page and page.count("&lt;/script&gt;") >= 4
    assert "http" not in page[: page.index('<script type="application/json"')] and len(page) < 1_000_000


def test_all_that_a_run_left_is_collected(tmp_path):
    data = collect(example(tmp_path / "r"))
    training = data["trainings"][0]
    assert len(training["step"]["loss"]) == 79 and training["evaluation"]["tokens"] == [2000, 4000, 6000]
    assert [t["objective"] for t in data["trainings"]] == [["causal_lm"], ["masked_lm"]]
    (chart,) = data["bars"]
    assert chart["domains"] == ["a", "all"] and [m["name"] for m in chart["models"]] == ["test", "more"]
    assert chart["models"][0] | {"all": 1.5, "values": [1.4, 1.6], "interval": [1.4, 1.6]} == chart["models"][0]
    assert chart["tools"] == [{"name": "xz -9e", "all": 1.7, "values": [1.6, None]}]


@pytest.mark.parametrize(
    ("units", "axis"), [(("images", "images"), "images"), (("images", "steps"), "tokens"), ((None, None), "tokens")]
)
def test_what_a_training_counts_is_called_what_it_is(tmp_path, units, axis):
    folder = example(tmp_path / "r")
    for name, unit in zip(("model", "encoder"), units, strict=True):
        lineage = {"tokens": 7900, "flops": 3e12} | ({"unit": unit} if unit else {})
        put(folder / name / "checkpoint" / "pretrain.json", {"lineage": lineage})
    page = write(folder).read_text().replace(' class="number"', "")
    assert f'<button data-axis="tokens" class="on">{axis}</button>' in page
    total = "10.9 k" if units[0] == units[1] else "3 k"  # what is not alike is not added up
    assert f'<div class="card"><span>{units[1] or "tokens"}</span><b>{total}</b>' in page
    assert f'<td data-label="trained">7.9 k {units[0] or "tokens"}, 3 T FLOPs</td>' in page


def timed(folder, **times):
    """The page of a run whose last training has such times at each of its steps, and measurements with its own."""
    log = folder / "encoder" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for number, row in enumerate((row for row in lines if row["event"] == "step"), 1):
        row |= {"tokens": 100 * number, "tokens_per_second": 200.0, "mfu": 0.4}
        row |= {name: value * number for name, value in times.items()}
    log.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return write(folder).read_text()


def test_speeds_are_of_the_steps_and_what_was_measured_beside_them_is_told(tmp_path):
    page = timed(example(tmp_path / "r"), seconds=0.9, preparing=0.1, measuring=1.0, elapsed=4.0)
    assert "<small>in all trainings, 100 a second in “encoder”, measuring took 25% of its time</small>" in page
    assert "<small>in all stages, 20% of the machine&#x27;s matrix rate in “encoder”</small>" in page


def test_a_log_that_does_not_tell_measuring_has_its_speed_alone(tmp_path):
    page = timed(example(tmp_path / "r"), seconds=0.5, elapsed=4.0)
    assert "<small>in all trainings, 200 a second in “encoder”</small>" in page
    assert "measuring took" not in page


def test_a_card_says_of_which_stage_its_number_is(tmp_path):
    page = collect(example(tmp_path / "r"))
    assert "in all trainings" in str(_cards(page, headline(page)))
    other = page | {"trainings": [page["trainings"][0] | {"unit": "images"}, *page["trainings"][1:]]}
    assert "in “encoder” alone, " in str(_cards(other, headline(other)))
    alone = page | {"trainings": page["trainings"][-1:]}
    assert "in all" not in str(_cards(alone, headline(alone))) and "“encoder”" not in str(
        _cards(alone, headline(alone))
    )


def test_losses_of_different_units_have_plots_of_their_own(tmp_path):
    found = collect(example(tmp_path / "r"))["plots"]
    assert [plot["unit"] for plot in found] == ["bits per byte", "loss of masked_lm (nats)"]
    assert found[0]["curves"] == [
        {"training": 0, "part": "step", "column": "bits_per_byte"},
        {"training": 0, "part": "evaluation", "column": "bits_per_byte"},
    ]
    assert {curve["training"] for curve in found[1]["curves"]} == {1}
    empty = {"loss": [], "bits_per_byte": []}
    mixed = {"step": {"loss": [4.0], "bits_per_byte": [None]}, "evaluation": {"loss": [3.0], "bits_per_byte": [2.0]}}
    found = plots([mixed | {"objective": ["ul2", "electra"]}, {"step": empty, "evaluation": empty, "objective": ["x"]}])
    assert [plot["unit"] for plot in found] == ["loss of ul2 + electra (nats)", "bits per byte"]


@pytest.mark.parametrize("count", [0, 1, 1499, 1500, 1501, 2999, 3001, 10_007])
def test_thinning_keeps_the_last_row_and_even_steps(count):
    kept = thin(list(range(count)))
    assert len(kept) <= 1500 and kept[-1:] == list(range(count))[-1:]
    assert len({b - a for a, b in pairwise(kept)}) <= 1 and len(kept) > min(count, 1500) / 2 - 1


def test_the_page_tells_of_the_corpus_the_lineage_and_each_metric(tmp_path):
    page = write(example(tmp_path / "r")).read_text().replace(' class="number"', "")
    for cell in ("1,200 · 5 MB", "3 · 12 B", "model/checkpoint", "7.9 k tokens, 3 T FLOPs", "d" * 12, "data → model"):
        assert f">{cell}</td>" in page
    cell = '<td data-label="{}">{}</td>'.format
    assert cell("metric", "probe_accuracy") + cell("value", "0.9") in page
    assert cell("value", "1.5") + cell("95% interval", "1.4 to 1.6") in page
    assert "4 removed as exact copies, 5 removed as near to held-out ones" in page


def test_odd_files_of_a_run_are_shown_as_far_as_they_go(tmp_path):
    folder = example(tmp_path / "r")
    old = {
        "metrics": {"bits_per_byte": 1.5, "bits_per_byte/a": 1.4},
        "compressors": {"xz -9e": {"all": 1.7}, "zstd": {}},
    }
    put(folder / "test" / "evaluation.json", old)
    put(folder / "say" / "samples.json", {"samples": [{"prompt": "half \ud83d", "continuation": "\udc00"}]})
    put(folder / "data" / "corpus" / "corpus.json", {"documents": {}})
    page = write(folder).read_text(encoding="utf-8")
    assert "half \ufffd</mark>\ufffd" in page


def test_samples_are_drawn_and_what_is_hidden_is_shaded(tmp_path):
    page = write(example(tmp_path / "r")).read_text()
    body = page[page.index("Samples: encoder") : page.index("Samples: say")]
    assert body.count("<figure>") == 5 and body.count(f'src="{PIXEL}"') == 3 + 1 + 1
    assert body.count("<svg") == 2 + 2 and body.count('<rect class="hidden"') == 2
    # Of four points one unit apart the second and third are hidden; a gap breaks the line.
    assert '<rect class="hidden" x="150" width="300" height="110"/>' in body
    assert '<path class="input" d="M0 107L200 72.3M600 3h2"/>' in body
    assert '<path class="output" d="M200 55L400 37.7"/>' in body


@pytest.mark.parametrize(
    "sample",
    [
        {"kind": "image", "input": "data:text/html;base64,PHNjcmlwdD4="},
        {"kind": "image", "input": PIXEL + '" onload="x'},
        {"kind": "image", "input": "http://example.org/a.png"},
        {"kind": "image", "input": None},
        {"kind": "series", "input": "123"},
        {"kind": "series", "input": [[]]},
        {"kind": "series", "input": [["<script>", float("nan")]]},
        {"kind": "series", "input": 3},
        {"kind": "series", "input": [[1, 2]], "masked": [[["<b>", 2]]]},
        {"kind": "waveform", "input": [[1]]},
        {"kind": "waveform", "input": [[0, 1]], "seconds": "<b>"},
        {"kind": "film", "input": "x"},
        {"kind": ["image"]},
        "text",
        None,
    ],
)
def test_samples_that_are_not_as_they_should_be_are_left_out(sample):
    assert panel([sample], 10_000) == ("", 10_000)


def test_samples_stay_within_their_bound_and_it_is_said_what_is_left_out():
    text, left = panel([{"kind": "text", "input": "x" * 900}] * 5, 2000)
    assert text.count("<figure>") == 2 and "3 more are in samples.json" in text and 0 <= left < 900


@pytest.mark.parametrize(("evaluated", "trained"), [(False, True), (False, False)])
def test_an_unfinished_run_gives_a_report_of_what_there_is(tmp_path, evaluated, trained):
    page = write(example(tmp_path / "r", evaluated=evaluated, trained=trained)).read_text()
    assert ('id="loss-0"' in page) == trained and 'id="bars-0"' not in page


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(PretrainError, match="is not a run"):
        write(tmp_path)


def test_the_headline_is_the_last_model_and_the_totals_are_of_all_stages(tmp_path):
    folder = example(tmp_path / "r")
    record = json.loads((folder / "model" / "stage.json").read_text())
    put(folder / "encoder" / "stage.json", record | {"flops": 1e12, "seconds": 45.0})
    for name, judged in (("test", "encoder"), ("more", "model")):
        put(folder / name / "stage.json", record | {"flops": 0, "seconds": 1.0, "inputs": {"checkpoint": judged}})
    evaluation = json.loads((folder / "test" / "evaluation.json").read_text())
    put(folder / "test" / "evaluation.json", evaluation | {"metrics": {"bits_per_byte": 1.2}})
    page = write(folder).read_text()
    assert "<span>bits per byte, test</span><b>1.200</b>" in page
    assert "<span>FLOPs</span><b>4 T</b>" in page and "<span>time</span><b>2 min 2 s</b>" in page


def test_a_packed_model_has_the_weights_that_it_stands_for(tmp_path):
    folder = example(tmp_path / "r")
    save_file({"codes": torch.zeros(2, 3, dtype=torch.int32)}, folder / "model" / "checkpoint" / "model.safetensors")
    assert collect(folder)["stages"][1]["weights"] == 6
    record = json.loads((folder / "model" / "stage.json").read_text())
    put(folder / "model" / "stage.json", record | {"metrics": {"parameters": 48}})
    assert collect(folder)["stages"][1]["weights"] == 48


def test_no_share_of_the_machine_is_above_the_whole(tmp_path):
    folder = example(tmp_path / "r")
    put(folder / "model" / "log.jsonl", "".join(json.dumps(r | {"mfu": 1.7}) + "\n" for r in rows(9)))
    (training, _) = collect(folder)["trainings"]
    assert training["step"]["mfu"] == [1.0] * 9


def test_a_prompt_from_held_out_text_stands_beside_how_the_text_goes_on(tmp_path):
    text, _ = panel([{"prompt": "once", "continuation": " twice", "truth": " upon <a> time"}], 10_000)
    assert text.count("<mark>once</mark>") == 2
    assert "<mark>once</mark> twice</pre>" in text and "<mark>once</mark> upon &lt;a&gt; time</pre>" in text


def measured(bits, line=None, xz=None, of="model", **more):
    tools = {} if xz is None else {"xz -9e": {"metrics": {"bits_per_byte": xz}}}
    return {
        "name": f"of-{of}",
        "of": of,
        "metrics": {"bits_per_byte": bits},
        "compressors": tools,
        "bigram": line,
    } | more


def page_of(*evaluations, held_out=(), tokens=1e6, weights=1000, statuses=("finished",), budget=None):
    """What a run with one trained model shows."""
    lineage = {"tokens": tokens, "unit": "tokens"}
    stages = [
        {
            "name": "model" if i == 0 else f"stage-{i}", "stage": "train", "status": status, "writes": "checkpoint" if i == 0 else "",
            "lineage": lineage, "metrics": None, "weights": weights, "bytes": 4 * weights, "family": "llama", "config": {"budget": budget or {"seconds": 60}},
        }
        for i, status in enumerate(statuses)
    ]  # fmt: skip
    step = {"tokens": [tokens], "seconds": [15.0]}
    evaluation = {"loss": list(held_out), "bits_per_byte": [None] * len(held_out)}
    training = {"name": "model", "unit": "tokens", "objective": ["causal_lm"], "step": step, "evaluation": evaluation}
    run = {"name": "r", "recipe": "my recipe.yaml", "seed": 0, "stages": stages}
    return {"run": run, "stages": stages, "trainings": [training], "evaluations": list(evaluations)}


def test_a_probe_is_said_to_be_of_the_documents_that_it_tested():
    metrics = {"probe_accuracy": 0.25, "probe_documents": 40, "documents": 69}
    evaluation = {"name": "of-model", "of": "model", "metrics": metrics, "compressors": {}, "documents": 69}
    assert "a probe accuracy of 0.25 on 40 documents that it has never seen" in summarise(page_of(evaluation)).result


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        (measured(2.0, line=1.9, xz=1.5), ("not good yet", "comes to 1.90", "xz -9e", "still does better (1.50)")),
        (measured(1.8, line=2.4, xz=1.5), ("learnt something", "25% fewer", "still does better")),
        (
            measured(1.8, line=2.4, bigram_whole=1.7),
            ("learnt something", "25% fewer", "But the same counts of all training text", "come to 1.70"),
        ),
        (measured(1.2, line=2.4, xz=1.5), ("Good", "50% fewer", "fewer than xz -9e (1.50)")),
        (measured(1.2, xz=1.5), ("That is fewer than xz -9e (1.50), which knows no other text",)),
    ],
)
def test_the_first_sentence_says_whether_it_is_good(evaluation, words):
    summary = summarise(page_of(evaluation))
    assert "“model”, a llama model of 1 k weights, has seen 1 M tokens" in summary.result
    assert f"{evaluation['metrics']['bits_per_byte']:.2f} bits for each byte" in summary.result
    assert all(word in summary.judgement for word in words)


def test_the_line_of_counts_says_how_much_was_counted():
    judged = summarise(page_of(measured(1.8, line=2.4, xz=1.5), tokens=3e5)).judgement
    assert "which token follows which in the 300 k tokens that it has read (2.40)" in judged


def test_the_counts_beside_a_model_that_goes_on_are_of_its_own_training():
    page = page_of(measured(1.8, line=2.4), tokens=651e3)  # of which the model before had read 250 thousand
    page["stages"][0] |= {"metrics": {"tokens": 401e3}, "config": {"init": "before", "budget": {"tokens": 4e5}}}
    assert "in the 401 k tokens that it went on with (2.40)" in summarise(page).judgement


def test_of_a_run_that_ends_in_an_export_the_size_of_that_is_told():
    page = page_of(statuses=())
    record = {
        "status": "finished",
        "seconds": 2.0,
        "writes": "",
        "bytes": 0,
        "lineage": None,
        "weights": 0,
        "inputs": None,
    }
    page["stages"] = [
        record | {"name": "corpus", "stage": "data", "writes": "corpus", "config": {}, "metrics": {"bytes/train": 9}},
        record | {"name": "smaller", "stage": "export", "config": {"to": "gguf"}, "metrics": {"bytes": 957e3}},
    ]
    page["run"]["stages"], page["trainings"] = page["stages"], []
    assert "“smaller” is the model for other programs, as gguf, of 957 kB." in summarise(page).result
    assert "957 kB" in str(changes(page))


def test_what_a_ladder_expected_is_compared_with_the_validation_text_that_it_measured():
    page = page_of(measured(1.52), held_out=[2.0, 1.9])
    page["trainings"][0]["evaluation"]["bits_per_byte"] = [1.8, 1.75]
    of = "the text that law.json was measured on"
    page["expected"] = {"model": {"bits_per_byte": 1.7, "of": of, "interval": [1.6, 1.8]}}
    assert "on its validation text 1.75, as expected" in summarise(page).judgement
    page["expected"]["model"]["of"] = "Python's library"
    assert "on Python's library: it is less than that" in summarise(page).judgement


def test_counts_of_all_training_text_stand_beside_those_of_what_was_read():
    both = measured(1.8, line=2.4, xz=1.5, bigram_whole=1.7) | {"domains": {}, "documents": 9}
    (chart,) = bars([both])
    assert [(bar["name"], bar["all"]) for bar in chart["tools"]] == [
        ("pairs of tokens", 2.4), ("pairs of tokens in all training text", 1.7), ("xz -9e", 1.5)
    ]  # fmt: skip


def on_corpora(folder, *corpora):
    """The titles over the charts of two evaluations of one model on these corpora, and the names of their bars."""
    example(folder)
    for name, corpus in zip(("test", "more"), corpora, strict=True):
        record = {"seconds": 1.0, "inputs": {"checkpoint": "model", "corpus": corpus}, "config": {"split": "test"}}
        put(folder / name / "stage.json", record)
    page = write(folder).read_text()
    part = page[page.index("<h2>Test text</h2>") :]
    part = part[: part.index("</section>")]
    models = [[bar["name"] for bar in chart["models"]] for chart in collect(folder)["bars"]]
    return [title for title in re.findall("<h3>(.*?)</h3>", part) if "“" in title], models


def test_of_several_texts_each_chart_says_which_stages_and_which_text_it_is_of(tmp_path):
    titles, models = on_corpora(tmp_path / "two", "data", "runs/before/corpus")
    assert titles == [
        "“test”: 9 test documents of “data” (a, all)",
        "“more”: 9 test documents of “runs/before/corpus” (a, all)",
    ]
    assert models == [["model"], ["model"]]
    assert on_corpora(tmp_path / "one", "data", "data") == ([], [["model", "more"]])


def test_a_model_is_not_held_against_another_that_was_measured_on_other_text_of_as_many_documents():
    other = measured(2.0, of="base", corpus="old")
    assert "than “base”" in summarise(page_of(other, measured(1.5, corpus="old"))).judgement
    assert "than “base”" not in summarise(page_of(other, measured(1.5, corpus="new"))).judgement


def test_a_change_of_less_than_a_hundredth_is_no_0_per_cent():
    near = summarise(page_of(measured(2.0, of="base"), measured(1.999), measured(1.0, of="elsewhere", documents=7)))
    assert "It is less than 1% fewer than “base” (2.00)" in near.judgement


def test_a_quantised_model_says_how_much_of_it_is_and_what_its_files_take():
    page = page_of(measured(1.8, line=2.4))
    assert "Quantised" not in summarise(page).judgement
    page["stages"][0]["metrics"] = {"quantised_share": 0.4, "disk_bytes": 9.3e6, "disk_bytes_before": 1e7}
    assert summarise(page).judgement.endswith(
        "Quantised are 40% of its weights; its files take 9.3 MB, 7% less than before."
    )


def test_the_run_is_compared_with_its_baseline():
    summary = summarise(page_of(measured(2.0, of="base"), measured(1.5), measured(1.0, of="elsewhere", documents=7)))
    assert "25% fewer than “base” (2.00)" in summary.judgement
    assert "than “base”" not in summarise(page_of(measured(2.0, of="base", documents=3), measured(1.5))).judgement


FALLING, FLAT, RISING = [5, 4, 3.5, 3.2, 3.0, 2.9], [5, 4, 3, 3, 3, 3], [5, 4, 3, 3.2, 3.4, 3.6]


@pytest.mark.parametrize(
    ("given", "advice", "command"),
    [
        ({"held_out": FALLING}, "still fell by 3.3%", "pretrain run 'my recipe.yaml' --set model.budget.seconds=240"),
        ({"held_out": FLAT}, "has levelled off", ""),
        ({"held_out": RISING}, "17% lower before it rose", ""),
        ({"held_out": FLAT, "weights": 10**6}, "1 tokens for each weight", "pretrain run 'my recipe.yaml' --set model.budget.seconds=240"),
        ({"statuses": ("finished", "to run")}, "Interrupted at “stage-1”", "pretrain run 'my recipe.yaml'"),
    ],
)  # fmt: skip
def test_what_to_do_next_follows_from_the_curve(given, advice, command):
    summary = summarise(page_of(**given))
    assert advice in summary.advice and summary.command == command


def test_a_flat_curve_with_text_unread_is_no_reason_for_a_larger_model():
    page = page_of(held_out=FLAT)
    page["stages"][0]["config"] |= {"corpus": "corpus"}
    page["corpora"] = [{"name": "corpus", "domains": {"train": {"a": {"bytes": 14e6, "documents": 9}}}}]
    assert "train longer; about 75% of the text has not been read" in summarise(page).advice
    page["corpora"][0]["domains"]["train"]["a"]["bytes"] = 2e6
    assert "a larger model or other text; the validation loss has levelled off" in summarise(page).advice
    page["stages"][0]["config"] |= {"init": "base"}
    assert "a higher rate (optimizer.lr) or other text; the validation loss has levelled off" in summarise(page).advice


@pytest.mark.parametrize(("bits", "advice", "field"), [(1.8, "train longer; it has gained 10.0%", "budget.seconds=240"), (2.1, "a lower rate", "optimizer.lr=0.0001")])  # fmt: skip
def test_a_short_training_that_goes_on_from_a_model_is_advised_by_what_it_has_gained(bits, advice, field):
    page = page_of(measured(2.0, of="base"), measured(bits), held_out=[3.0, 2.9])
    assert "measure more often" in summarise(page).advice
    page["stages"][0] |= {"inputs": {"init": "base"}}
    page["stages"][0]["config"] |= {"init": "base", "optimizer": {"method": "adamw", "lr": 3e-4}}
    summary = summarise(page)
    assert advice in summary.advice and summary.command.endswith(f"--set model.{field}")


def test_a_model_that_goes_on_is_headed_by_what_it_went_on_with_and_says_what_it_has_kept():
    names = [
        ("before", "base", 2.0, 9),
        ("after", "model", 1.5, 9),
        ("kept-before", "base", 1.4, 30),
        ("kept", "model", 1.47, 30),
    ]
    page = page_of(*(measured(bits, of=of, documents=count) | {"name": name} for name, of, bits, count in names))
    stage = page["stages"][0]
    stage["config"] |= {"init": "base", "corpus": "new"}
    page["stages"] += [
        stage
        | {"name": name, "stage": "evaluate", "writes": "", "config": {"corpus": "old" if "kept" in name else "new"}}
        for name, *_ in names
    ]
    told = summarise(page)
    assert "needs 1.50 bits" in told.result and "25% fewer than “base” (2.00)" in told.judgement
    assert "On the documents of “kept” it needs 1.470, and “base” 1.400 (+5.0%)." in told.judgement
    stage["config"].pop("init")
    assert "On the documents of" not in summarise(page).judgement


def test_a_model_whose_size_was_chosen_for_its_budget_is_not_held_against_a_rule_of_thumb():
    page = page_of(held_out=FALLING, weights=10**6)
    assert "1 tokens for each weight" in summarise(page).advice
    page["expected"] = {"model": {"bits_per_byte": 1.5, "of": "code"}}
    summary = summarise(page)
    assert "a larger budget, of which the size is chosen anew" in summary.advice and "=240" in summary.command


def test_a_run_that_goes_on_says_how_far_it_is():
    assert "25% of its budget" in summarise(page_of(statuses=("to run",)), "model").advice


def test_what_each_stage_changed_is_told_against_what_it_began_with(tmp_path):
    page = page_of(measured(2.0), measured(2.5, of="small"))
    base = page["stages"][0] | {"seconds": 60.0, "inputs": {}}
    small = base | {
        "name": "small",
        "stage": "surgery",
        "bytes": 1000,
        "seconds": 2.0,
        "inputs": {"checkpoint": "model"},
    }
    judge = base | {"name": "judge", "stage": "evaluate", "writes": "", "bytes": 0, "seconds": 3.0, "inputs": {"checkpoint": "small"}}  # fmt: skip
    text = changes(page | {"stages": [base, small, judge]})
    assert "<b>4 kB</b>" in text and "<b>1 kB</b><small> -75%</small>" in text
    assert "<b>2.5</b><small> +25%</small>" in text and text.count("width:100.00%") == 3 and "width:25.00%" in text
    assert text.count("<span></span>") == 2  # what measures has neither size nor loss


def test_numbers_of_validation_and_of_test_text_say_which_they_are_and_are_not_compared():
    page = page_of(measured(2.0), held_out=[3.0])
    base = page["stages"][0] | {"seconds": 60.0, "inputs": {}}
    more = base | {"name": "more", "inputs": {"init": "model"}}
    training = page["trainings"][0] | {"name": "more", "evaluation": {"loss": [1.6], "bits_per_byte": [1.5]}}
    page |= {"stages": [base, more], "trainings": [*page["trainings"], training]}
    text = changes(page)
    assert "<b>2</b><small> test</small>" in text and "<b>1.5</b><small> validation</small>" in text
    page["evaluations"].append(measured(1.5, of="more"))
    text = changes(page)
    assert "<b>1.5</b><small> -25%</small>" in text and 'title="test bits per byte"' in text
    page["evaluations"] = []
    text = changes(page | {"stages": [more], "trainings": [training]})
    assert 'title="validation bits per byte"' in text


def test_charts_of_evaluations_say_of_which_split_they_are(tmp_path):
    def said(split):
        folder = example(tmp_path / split)
        put(
            folder / "test" / "stage.json",
            {"seconds": 1.0, "inputs": {"checkpoint": "model"}, "config": {"split": split}},
        )
        return write(folder).read_text()

    test = said("test")
    assert "<h2>Test text</h2>" in test and "Bits for each byte of test text" in test
    assert "<span>bits per byte, test</span>" in test and "byte of validation text" not in test
    both = said("validation")  # beside another stage's test text
    assert "<h2>Text of evaluations</h2>" in both and "Bits for each byte of test text" in both
    assert "Bits for each byte of validation text" in both


def test_a_run_without_a_loss_as_yet_shows_none():
    page = page_of()
    corpus = page["stages"][0] | {"name": "corpus", "stage": "data", "writes": "corpus", "seconds": 3.0, "inputs": {}}
    text = changes(page | {"stages": [corpus], "trainings": []})
    assert text.count('title="size"') == text.count('title="time"') == 1 and 'loss"' not in text


def test_no_page_reads_text_as_markup_in_the_browser():
    for path in ("report/template/draw.js", "report/template/elements.js", "experiments/page.html"):
        text = (Path(report.__file__).parent.parent / path).read_text()
        assert not re.search(
            "innerHTML|outerHTML|insertAdjacentHTML|document.write|eval", text.replace("evaluation", "")
        )


@pytest.mark.promise("Pages", "The report fetches nothing.")
@pytest.mark.browser
@pytest.mark.parametrize(("width", "height", "scheme"), [(1280, 900, "light"), (390, 844, "dark")])
def test_a_browser_draws_it_without_errors_or_a_network(tmp_path, width, height, scheme):
    path = write(example(tmp_path / "r"))
    problems, requests = [], []
    with browser_page(width, height, scheme) as page:
        page.on(
            "console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        for button in ("flops", "seconds", "tokens"):
            page.click(f"button[data-axis={button}]")
            assert page.locator("#loss-0 .across").text_content().lower().startswith(button[:5])
        page.reload()  # as a page does by itself while its run goes on
        assert page.locator("button.on").get_attribute("data-axis") == "tokens"
        page.hover("#loss-0 svg")
        assert "validation" in page.locator("#loss-0 .tip").inner_text()
        sizes = page.eval_on_selector_all(
            ".chart", "all => all.map(e => [e.id, e.clientWidth, e.clientHeight, e.querySelectorAll('path').length])"
        )
        inside = page.eval_on_selector_all(".chart", "all => all.every(e => e.scrollHeight <= e.clientHeight + 1)")
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        wide = page.eval_on_selector_all(".scroll", "all => all.some(e => e.scrollWidth > e.clientWidth)")
        broken = page.evaluate("window.broken")
        lines = page.eval_on_selector_all("#loss-0 path.curve", "all => all.map(e => getComputedStyle(e).stroke)")
        drawings = page.eval_on_selector_all(
            "figure svg",
            "all => all.map(e => [e.clientWidth, e.clientHeight, getComputedStyle(e.querySelector('path')).stroke])",
        )
        pictures = page.eval_on_selector_all(
            "figure img", "all => all.map(e => [e.naturalWidth, e.clientWidth, e.clientHeight])"
        )
        labels = page.eval_on_selector_all("#bars-0 .bar b", "all => all.map(e => e.getBoundingClientRect().height)")
    assert len(lines) == 3 and len(set(lines)) == 1  # the held-out curve has its training's colour
    assert len(labels) == 8 and min(labels) >= 10
    assert len(drawings) == 4 and all(wide > 250 and tall >= 50 and stroke != "none" for wide, tall, stroke in drawings)
    assert len(pictures) == 5 and all(own == 1 and wide > 50 and tall > 50 for own, wide, tall in pictures)
    assert {s[0] for s in sizes} == {"loss-0", "loss-1", "rate", "norm", "speed", "mfu"} and all(
        min(s[1:]) > 3 for s in sizes
    )
    assert problems == [] and [u for u in requests if not u.startswith(("file:", "data:"))] == []
    assert overflow == 0 and not wide and inside and broken is None


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_kept_and_dropped_documents_are_gone_through_one_by_one(tmp_path, width, scheme):
    path = write(example(tmp_path / "r"))
    with browser_page(width, 900, scheme) as page:
        page.goto(path.as_uri())
        shown = lambda: page.locator(".browse article:visible").all_inner_texts()  # noqa: E731
        (first,) = shown()
        assert "kept-0" in first and NASTY in first and page.locator(".browse output").inner_text() == "1 of 3"
        page.click(".browse button[value='-1']")  # round to the last
        assert "kept-2" in shown()[0] and page.locator(".browse output").inner_text() == "3 of 3"
        page.select_option(".browse select", index=1)
        page.click(".browse button[value='1']")
        (dropped,) = shown()
        assert "short-1" in dropped and "short: 0.5" in dropped
        bars = page.eval_on_selector_all(
            ".lengths .track i", "all => all.map(e => [e.clientWidth, getComputedStyle(e).backgroundColor])"
        )
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert page.evaluate("window.broken") is None and overflow == 0
    wide = [size for size, _ in bars]
    assert len(bars) == 2 * 25 and max(wide) == wide[2 * 6] > 30  # 2 to 4 kB has the most, of all from 32 B to 1 GB
    assert len({colour for _, colour in bars}) == 2


def test_the_documents_of_a_corpus_stay_small_and_each_reason_has_one(tmp_path):
    reasons = [f"language {n:03}" for n in range(150)]
    folder = example(tmp_path / "r")
    facts = json.loads((folder / "data" / "corpus" / "corpus.json").read_text())
    put(folder / "data" / "corpus" / "corpus.json", facts | looked_at(20, reasons, 600))
    text = write(folder).read_text()
    assert len(text.encode()) < 500_000 and all(f"{reason}-0" in text for reason in reasons)
    assert "kept-0" in text and "language 149-1" not in text


CUT = """
all => all.flatMap(e => { const box = e.closest('svg').getBoundingClientRect(), own = e.getBoundingClientRect();
  return own.left < box.left - .5 || own.right > box.right + .5 ? [e.textContent] : []; })
"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_no_label_of_an_axis_is_cut_off_at_its_end(tmp_path, width):
    paths = {}
    for tokens in (251_000, 401_000, 2_500_000, 1_000_000_000):  # so that the last round number is at the very end
        folder = example(tmp_path / str(tokens), evaluated=False)
        for name in ("model", "encoder"):
            lines = [row | {"tokens": row["step"] * tokens / 79} for row in rows(79)]
            put(folder / name / "log.jsonl", "".join(json.dumps(row) + "\n" for row in lines))
        paths[tokens] = write(folder)
    with browser_page(width) as page:
        for path in paths.values():
            page.goto(path.as_uri())
            assert page.eval_on_selector_all(".chart svg text", CUT) == []


BROKEN = """
() => [...document.querySelectorAll('td')].filter(e => /^[-+]?[0-9][0-9,.]*%?$/.test(e.innerText.trim()) || e.closest('.matrix')).filter(e => {
  const range = document.createRange();
  range.selectNodeContents(e);
  return new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1;
}).map(e => e.innerText)
"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_no_number_is_broken_into_two_lines_and_a_table_of_many_fits_the_page(tmp_path, width):
    folder = example(tmp_path / "r")
    names = [f"class-{'long-' * 6}{n}" for n in range(12)]
    confusion = {true: {name: 1234 if true == name else 22 for name in names} for true in names}
    wrong = [{"text": "no word " * 60, "true": names[0], "answered": names[1], "probability": 0.98}]
    given = json.loads((folder / "test" / "evaluation.json").read_text())
    put(folder / "test" / "evaluation.json", given | {"confusion": confusion, "mistakes": wrong})
    record = {"seconds": 1.0, "inputs": {"checkpoint": "model", "corpus": "x" * 90}, "config": {"split": "test"}}
    put(folder / "more" / "stage.json", record)  # a title of a chart without a place to break it
    path = write(folder)
    with browser_page(width) as page:
        page.goto(path.as_uri())
        page.eval_on_selector_all("details", "all => all.forEach(e => { e.open = true; })")
        assert page.evaluate(BROKEN) == []
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_boxes_beside_one_another_have_the_end_of_a_prompt_and_room_for_what_follows():
    prompt = "\n\n".join(f"line {number} of a long beginning" for number in range(30))
    text = str(_continuation({"prompt": prompt, "continuation": " ours", "truth": " theirs"}))
    shown = re.findall("<mark[^>]*>(.*?)</mark>", text, re.DOTALL)
    assert len(shown) == 2 and all(s.startswith("…") and s.endswith("line 29 of a long beginning") for s in shown)
    assert all(s.count("\n") < 4 and len(s) <= 161 for s in shown) and text.count('title="line 0') == 2
    assert ">def f(</mark> ours" in str(
        _continuation({"prompt": "def f(", "continuation": " ours", "truth": " theirs"})
    )


def test_a_run_that_only_decodes_says_how_fast():
    page = page_of() | {"trainings": []}
    stage = page["stages"][0] | {"stage": "decode", "writes": "", "config": {}}
    page["stages"] = [
        stage | {"name": name, "metrics": {"tokens_per_second": speed}}
        for name, speed in (("plain", 31.24), ("lookup", 55.0))
    ]
    told = summarise(page)
    assert told.result == "Of samples that were written, tokens a second: plain 31.2, lookup 55." and told.advice == ""


def test_the_name_of_a_bar_is_readable_whole():
    (rule,) = re.findall(
        r"^\.bar em \{(.*)\}$", (Path(report.__file__).parent / "template/style.css").read_text(), re.M
    )
    assert "overflow-wrap: anywhere" in rule and "nowrap" not in rule and "ellipsis" not in rule
