"""The report: complete, safe, of partial runs too, and drawn by a real browser."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from pretrain.core.errors import PretrainError
from pretrain.report import collect, write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NASTY = "</script><script>window.broken = 1</script><b>& bold"


def example(folder, *, evaluated=True, trained=True):
    stages = [
        {"name": n, "stage": s, "folder": n, "address": "0123456789", "status": "done"}
        for n, s in (("data", "data"), ("model", "train"), ("test", "evaluate"), ("say", "decode"))
    ]
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"name": NASTY, "recipe": "r.yaml", "seed": 0, "stages": stages}))
    (folder / "recipe.yaml").write_text(f"name: {NASTY}\n")
    for stage in stages:
        (folder / stage["name"]).mkdir(exist_ok=True)
    record = {
        "seconds": 75.0,
        "flops": 3e12,
        "peak_memory_bytes": 2**30,
        "metrics": {"loss": 2.0},
        "environment": {"cpu": "x"},
        "methods": {"adamw": "1"},
    }
    (folder / "model" / "stage.json").write_text(json.dumps(record))
    if trained:
        rows = []
        for i in range(1, 80):
            base = {"step": i, "tokens": 100 * i, "flops": 1e9 * i, "seconds": 0.5 * i}
            rows.append(
                base
                | {
                    "event": "step",
                    "loss": 5 / i**0.3,
                    "parts": {},
                    "bits_per_byte": 3 / i**0.3,
                    "grad_norm": 1.0,
                    "lr": 1e-3,
                    "tokens_per_second": 200.0,
                    "mfu": 0.4,
                    "memory_bytes": 1,
                }
            )
            if i % 20 == 0:
                rows.append(
                    base | {"event": "evaluation", "metrics": {"loss": 5 / i**0.3, "bits_per_byte": 3.1 / i**0.3}}
                )
        (folder / "model" / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"event": "st')
    if evaluated:
        evaluation = {
            "metrics": {
                "loss": 2.0,
                "perplexity": 7.4,
                "bits_per_byte": 1.5,
                "bits_per_byte/a": 1.4,
                "bits_per_byte/b": 1.6,
            },
            "intervals": {"bits_per_byte": [1.4, 1.6]},
            "compressors": {"xz -9e": {"all": 1.7, "a": 1.6, "b": 1.8}},
        }
        (folder / "test" / "evaluation.json").write_text(json.dumps(evaluation))
        (folder / "say" / "samples.json").write_text(
            json.dumps({"samples": [{"prompt": NASTY, "continuation": NASTY}]})
        )
    return folder


def test_corpus_and_model_text_cannot_break_out(tmp_path):
    page = write(example(tmp_path / "r")).read_text()
    assert NASTY not in page and page.count("&lt;/script&gt;") >= 3
    assert "http" not in page[: page.index('<script type="application/json"')]


def test_all_that_a_run_left_is_collected(tmp_path):
    data = collect(example(tmp_path / "r"))
    training = data["trainings"][0]
    assert len(training["step"]["loss"]) == 79 and training["evaluation"]["tokens"] == [2000, 4000, 6000]
    assert data["bars"][0]["series"] == {"model": [1.5, 1.4, 1.6], "xz -9e": [1.7, 1.6, 1.8]}


@pytest.mark.parametrize(("evaluated", "trained"), [(False, True), (False, False)])
def test_an_unfinished_run_gives_a_report_of_what_there_is(tmp_path, evaluated, trained):
    page = write(example(tmp_path / "r", evaluated=evaluated, trained=trained)).read_text()
    assert ('id="loss"' in page) == trained and 'id="bars"' not in page


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(PretrainError, match="is not a run"):
        write(tmp_path)


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height", "scheme"), [(1280, 900, "light"), (390, 844, "dark")])
def test_a_browser_draws_it_without_errors_or_a_network(tmp_path, width, height, scheme):
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("Chromium is missing; `make test` installs it")
        pytest.skip("Chromium is missing: install Debian's `chromium`")
    from playwright.sync_api import sync_playwright

    path = write(example(tmp_path / "r"))
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    problems, requests = [], []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=flags.split())
        page = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
        page.on(
            "console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("#bars .bars .point")
        for button in ("flops", "seconds", "tokens"):
            page.click(f"button[data-axis={button}]")
            page.wait_for_selector("#loss .scatterlayer .trace path.js-line")
            assert page.locator("#loss .xtitle").text_content().lower().startswith(button[:5])
        sizes = page.eval_on_selector_all(
            ".chart", "all => all.map(e => [e.id, e.clientWidth, e.clientHeight, e.querySelectorAll('path').length])"
        )
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        broken = page.evaluate("window.broken")
        browser.close()
    assert {s[0] for s in sizes} == {"loss", "rate", "speed", "bars"} and all(min(s[1:]) > 3 for s in sizes)
    assert problems == [] and [u for u in requests if not u.startswith(("file:", "data:"))] == []
    assert overflow == 0 and broken is None
