"""`make gpu` rehearsed on a CPU, and what training from tokens on disk asks for."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEED = ("tokens_per_second", "milliseconds", "of_matrix_rate", "peak_gib")


@pytest.fixture
def gpu(monkeypatch):
    """The benchmark as a module."""
    found = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, found.name, module)
    found.loader.exec_module(module)
    return module


@pytest.mark.processes
def test_sections_run_one_by_one_and_leave_one_file(tmp_path):
    only = ["lora", "decoding"]
    command = [sys.executable, "benchmarks/gpu.py", "--smoke", "--out", str(tmp_path), "--only", *only]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=280)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["smoke"] and list(found["sections"]) == only
    lora, decoding = found["sections"].values()
    for speeds in (lora["float32"], lora["bfloat16"]):
        assert all(speeds[name] > 0 for name in SPEED), speeds
    assert lora["bfloat16"]["weights_mib"] < lora["float32"]["weights_mib"]
    assert decoding["same_tokens_1"] == 1 and decoding["ours_8"] > 0 and decoding["generate_8"] > 0


@pytest.mark.parametrize("name,given", [("trainer", {}), ("bare", {}), ("ours", {}), ("ours", {"packed": True})])
def test_every_loop_is_timed(gpu, name, given):
    found = getattr(gpu, name)(gpu.SMOKE, **given)
    assert all(found[measure] > 0 for measure in SPEED)


def test_a_section_that_cannot_run_or_end_is_told_and_stops_nothing(gpu, monkeypatch):
    monkeypatch.setitem(gpu.SECTIONS, "odd", gpu.Section(gpu.lora, 9, needs=("no_such_package",)))
    assert gpu.attempt("odd", 9, True) == {"skipped": "no_such_package not installed"}
    monkeypatch.setitem(gpu.SECTIONS, "odd", gpu.Section(gpu.lora, 9))
    told = gpu.attempt("odd", 60, True)  # which the process has not heard of
    assert told["failed"] == "exit status 2" and "invalid choice: 'odd'" in told["errors"]
    assert gpu.attempt("environment", 0.2, True)["failed"] == "no end after 0 s"


def test_the_largest_batches_fill_the_flops_of_known_models(gpu):
    small = gpu.SHAPES["125M"]
    assert 120e6 < small.weights < 130e6 and 340e6 < gpu.SHAPES["350M"].weights < 370e6
    attention = 12 * small.layers * small.length * small.width
    assert small.flops() == small.rows * small.length * (6 * small.weights + attention)


def test_training_from_tokens_on_disk_asks_for_little():
    """A machine with a GPU may have torch, transformers and numpy, and no network to get more from."""
    work = """
import sys
for name in ("datasets", "pydantic", "typer", "rich", "zstandard", "rensa", "sklearn", "peft", "pyarrow",
             "tensorboard", "psutil", "scipy"):
    sys.modules[name] = None  # as if it were not installed
import pretrain.corpus.packing, pretrain.corpus.shards, pretrain.training.loader, pretrain.training.loop
import pretrain.core.checkpoint, pretrain.core.generation.loop, pretrain.evaluation.likelihood._shards
import pretrain.objectives.language.causal_lm, pretrain.objectives.language.masked_lm
import pretrain.objectives.language.electra, pretrain.objectives.language.span_corruption
import pretrain.optim.optimizers.adamw, pretrain.optim.schedules.wsd, pretrain.surgery.adapters.dylora
"""
    done = subprocess.run([sys.executable, "-c", work], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
