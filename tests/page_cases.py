"""What the tests of the pages share: a run's files, a claim's result, and a browser that opens a page."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NASTY = "</script><script>window.broken = 1</script><b>& bold"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@contextmanager
def browser_page(width=1280, height=900, scheme="light"):
    """A page of Chromium; skips where there is none, unless in CI."""
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("Chromium is missing; `make test` installs it")
        pytest.skip("Chromium is missing: install Debian's `chromium`")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
        browser.close()


def rows(count, *, bits=True, every=20):
    for i in range(1, count + 1):
        base = {"step": i, "tokens": 100 * i, "flops": 1e9 * i, "seconds": 0.5 * i}
        own = {"loss": 5 / i**0.3, "bits_per_byte": 3 / i**0.3 if bits else None}
        more = {"parts": {}, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 200.0, "mfu": 0.4, "memory_bytes": 1}
        yield {"event": "step"} | base | own | more
        if i % every == 0:
            found = {"loss": 5 / i**0.3} | ({"bits_per_byte": 3.1 / i**0.3} if bits else {})
            yield {"event": "evaluation", "metrics": found} | base


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTGj1gAAAABJRU5ErkJggg=="
)
LOOKS = [
    {"kind": "image", "title": NASTY, "label": NASTY, "text": NASTY, "input": PIXEL, "masked": PIXEL, "output": PIXEL},
    {"kind": "image", "input": PIXEL},
    {"kind": "series", "input": [[1.0, 2.0, None, 4.0], [5.0] * 4], "output": [[None, 2.5, 3.0, None]], "masked": [[[1, 3]]]},
    {"kind": "waveform", "input": [[-0.5, 0.5]] * 40, "output": [0.5, None, -0.5, 0.1], "masked": [[10, 20]], "seconds": 1.5,
     "spectrogram": PIXEL, "measure": NASTY},
    {"kind": "text", "input": NASTY, "masked": NASTY, "output": NASTY},
]  # fmt: skip


def looked_at(kept=3, reasons=("short", NASTY), letters=300):
    """What `corpus.json` says of the lengths of documents, and some of them to look at, kept and dropped."""
    text = f"{NASTY} " + "words " * (letters // 6)
    sizes = {"documents": 1200, "bytes": 5_000_000}
    dropped = {"reason": "", "measured": 0.5, "domain": NASTY, "id": NASTY, "text": text}
    passage = {
        "operation": "gopher_quality", "before": sizes, "after": sizes, "domains": {}, "lengths": {"64": 40, "128": 3},
        "reasons": {reason: {"documents": 9, "bytes": 900} for reason in reasons},
        "examples": [dropped | {"reason": reason, "id": f"{reason}-{n}"} for reason in reasons for n in range(2)],
    }  # fmt: skip
    rows = [{"domain": NASTY, "id": f"kept-{n}", "bytes": 12, "text": text} for n in range(kept)]
    lengths = {"train": {"128": 30, "4096": 900, "1073741824": 1}, "test": {}}
    return {"lengths": lengths, "kept": rows, "funnel": [passage]}


def example(folder, *, evaluated=True, trained=True):
    kinds = {
        "data": "data",
        "model": "train",
        "encoder": "train",
        "test": "evaluate",
        "more": "evaluate",
        "say": "decode",
    }
    stages = [
        {"name": n, "stage": s, "folder": n, "address": "0123456789", "status": "finished"} for n, s in kinds.items()
    ]
    put(folder / "run.json", {"name": NASTY, "recipe": "r.yaml", "seed": 0, "stages": stages})
    put(folder / "recipe.yaml", f"name: {NASTY}\nstages:\n- {{name: encoder, stage: train, objective: masked_lm}}\n")
    domains = {
        "train": {NASTY: {"documents": 1200, "bytes": 5_000_000}},
        "test": {NASTY: {"documents": 3, "bytes": 12}},
    }
    removed = {"exact": 4, "near": 5}
    facts = {"domains": domains, "removed": removed, "fingerprint": "f" * 64}
    put(folder / "data" / "corpus" / "corpus.json", facts | looked_at())
    record = {
        "seconds": 75.0,
        "flops": 3e12,
        "peak_memory_bytes": 2**30,
        "metrics": {"loss": 2.0},
        "environment": {"cpu": "x"},
        "methods": {"adamw": "1"},
        "inputs": {"corpus": "data"},
        "config": {"objective": {"method": "causal_lm"}, "objectives": []},
    }
    put(folder / "model" / "stage.json", record)
    lineage = {"stages": [{"name": "data"}], "data": "d" * 64, "tokens": 7900, "flops": 3e12}
    put(folder / "model" / "checkpoint" / "pretrain.json", {"lineage": lineage})
    if trained:
        put(folder / "model" / "log.jsonl", "".join(json.dumps(r) + "\n" for r in rows(79)) + '{"event": "st')
        put(folder / "encoder" / "log.jsonl", "".join(json.dumps(r) + "\n" for r in rows(30, bits=False, every=10)))
    if evaluated:
        evaluation = {
            "metrics": {"loss": 2.0, "perplexity": 7.4, "bits_per_byte": 1.5},
            "domains": {"a": {"bits_per_byte": 1.4, "loss": 1}, "all": {"bits_per_byte": 1.6, "loss": 2}},
            "intervals": {"bits_per_byte": [1.4, 1.6]},
            "compressors": {"xz -9e": {"metrics": {"bits_per_byte": 1.7}, "domains": {"a": {"bits_per_byte": 1.6}}}},
            "documents": 9,
        }
        put(folder / "test" / "evaluation.json", evaluation)
        probe = {"probe_accuracy": 0.9, "probe_majority": 0.5, "ndcg@10": 0.25}
        put(folder / "more" / "evaluation.json", evaluation | {"metrics": evaluation["metrics"] | probe})
        put(folder / "say" / "samples.json", {"samples": [{"prompt": NASTY, "continuation": NASTY}]})
        put(folder / "encoder" / "samples.json", {"samples": LOOKS})
    return folder


def claim_result(name: str, word: str, title: str, finished: str = "2026-01-01T00:00:00+00:00") -> dict:
    curve = [[[1e9, 5.0 + s], [2e9, 4.0 + s], [3e9, 3.5 + s]] for s in (0.0, 0.1)]
    runs = [{"seed": i, "final": c[-1][1], "flops": 3e9, "seconds": 1.0, "curve": c} for i, c in enumerate(curve)]
    claim = {
        "title": title, "arxiv": "2509.24218", "claim": "Half the steps </script> & <b>more</b>.", "metric": "model.loss",
        "better": "lower", "equal": "flops", "scales": {"cpu": {"budget": 3e9}}, "baseline": {"name": "AdamW"}, "method": {"name": "Other"},
    }  # fmt: skip
    return {
        "name": name, "scale": "cpu", "protocol": 2, "claim": claim, "word": word, "runs": {"baseline": runs, "method": runs},
        "verdict": {"difference": -0.1, "low": -0.2, "high": 0.01, "bootstrap": [-0.15, -0.05], "word": "better"},
        "mean": {"baseline": 3.55, "method": 3.45}, "deviation": {"baseline": 0.05, "method": 0.05}, "also": {"model.steps": {"baseline": [9.0, 0.0], "method": [8.0, 0.5]}}, "chosen": {"baseline": 1e-3, "method": 1e-2},
        "compute_to_reach": {"method": 0.8, "baseline": None}, "tuned": {"baseline": [], "method": []}, "finished": finished,
        "environment": {"cpu": "a processor", "gpus": []},
    }  # fmt: skip
