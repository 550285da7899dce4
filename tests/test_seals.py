"""What is written and read back later is sealed, or in a folder with checksums: a digit that changes is never silent."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.core.errors import PretrainError, PretrainWarning
from pretrain.core.files import read_sealed, sealed, write_json
from pretrain.core.folders import stage_folders
from pretrain.core.quick import machine
from pretrain.decoding.ensembles.softmax_cascade import SoftmaxCascade
from pretrain.dial import law as laws
from pretrain.experiments.results import recorded
from pretrain.runs import shelf
from pretrain.runs.comparison import COMPARISON, _experiments
from pretrain.stages import _size

PACKAGE = Path(__file__).parent.parent / "pretrain"
# What is written without a seal, and why. In a folder of `atomic_folder`, whose `checksums.json` is looked at where the
# folder is opened: `work / …` and what writes into such a folder. Beside a `stage.json`, which holds its digest.
IN_FOLDERS = {
    "core/exchange/convert.py", "core/exchange/gguf_in.py", "core/exchange/peft_out.py", "core/exchange/sentences_out.py",
    "core/checkpoint.py", "core/packages.py", "corpus/shards.py", "corpus/store.py", "adopt.py",
}  # fmt: skip
BESIDE_A_STAGE = {"stages/evaluate.py", "stages/decode.py", "core/samples.py"}
IN_SUMS = {"training/state.py"}  # the list of digests itself
NAMED = {"identity.py"}  # `code.json`: whatever is another code is said


def unsealed() -> set[str]:
    """The files of the package that write JSON without a seal, by the calls of `write_json`."""
    files = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "write_json":
                place, value = ast.unparse(node.args[0]), node.args[1]
                whole = isinstance(value, ast.Call) and getattr(value.func, "id", "") == "sealed"
                if not whole and not place.startswith("work /"):
                    files.add(path.relative_to(PACKAGE).as_posix())
    return files


def test_whatever_is_written_as_json_is_sealed_or_in_a_folder_with_checksums():
    assert unsealed() - IN_FOLDERS - BESIDE_A_STAGE - IN_SUMS - NAMED == set()


def flip(path: Path) -> None:
    """Change one digit of a number, so that the file is JSON as before."""
    text = path.read_text()
    match = re.search(r"(?<=[:\[] )[1-8](?=[.\d,\]}\n])", text) or re.search(r"[1-8]", text)
    assert match
    path.write_text(f"{text[: match.start()]}{int(match[0]) + 1}{text[match.end() :]}")


READ: dict[str, tuple[Any, Any]] = {  # a value, and what reads it
    "plan.json": ({"rate": 2.5e10}, lambda path: _size._pace(path.parent, timed=False)),
    "law.json": (
        {"floor": 1.0, "A": 2.0, "alpha": 0.5, "B": 3.0, "beta": 0.5, "gamma": 0.0, "bytes_per_token": {"300": 2.0},
         "largest": 1e12},
        laws.load,
    ),
    "calibration.json": (
        {"exits": [1], "thresholds": [0.25]}, lambda path: SoftmaxCascade(calibration=str(path))._thresholds((1,)),
    ),
    "result.json": ({"name": "x", "mean": 2.5, "finished": "2026"}, lambda path: recorded(path.parent)),
    COMPARISON: (
        {"metric": "loss", "flops": 1e9, "table": {"a": {"mean": 2.5, "deviation": 0.1}}, "runs": {"a": [{}]}},
        lambda path: _experiments([path.parent]),
    ),
    "run.json": ({"stages": [{"name": "a", "folder": "train-123456789012"}]}, lambda path: stage_folders(path.parent)),
}  # fmt: skip


@pytest.mark.promise(
    "Faults",
    "What is kept to be read again is sealed: the rate that sizes were chosen by, laws, calibrations, results of claims, "
    "comparisons, `run.json`, what uses a store, pins of the hub, the cache. A damaged one is named, and refused or made "
    "anew; one of before, which has no seal, opens.",
)
@pytest.mark.parametrize("name", READ)
def test_a_digit_changed_in_what_is_kept_is_named(tmp_path, name):
    value, read = READ[name]
    write_json(tmp_path / name, value)  # as it was written before
    before = read(tmp_path / name)
    write_json(tmp_path / name, sealed(value))
    assert read(tmp_path / name) == before
    flip(tmp_path / name)
    with pytest.raises(PretrainError, match=f"{name} is damaged"):
        read(tmp_path / name)


def test_the_machines_rate_is_measured_again_where_its_note_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path))
    machine.remember_rate("cpu", 2.5e11)
    assert machine.remembered_rate("cpu") == 2.5e11
    path = tmp_path / "rates.json"
    path.write_text(path.read_text().replace("250000000000.0", "950000000000.0"))
    with pytest.warns(PretrainWarning, match=r"rates.json is damaged.* is measured again"):
        assert machine.remembered_rate("cpu") is None
    with pytest.warns(PretrainWarning):
        machine.remember_rate("cpu", 1.5e11)
    assert machine.remembered_rate("cpu") == 1.5e11 and 2.5e11 not in read_sealed(path).values()


def test_a_run_that_uses_a_store_is_not_lost_from_its_list_in_silence(tmp_path):
    (tmp_path / shelf.USERS).write_text("../old\n")  # as it was written before
    shelf.join_store(tmp_path, tmp_path / "run1")
    shelf.join_store(tmp_path, tmp_path / "run1")
    assert shelf._users(tmp_path) == ["../old", "run1"]
    path = tmp_path / shelf.USERS
    path.write_text(path.read_text().replace("run1", "run2"))
    with pytest.raises(PretrainError, match=r"\.runs is damaged"):
        shelf._users(tmp_path)


def test_the_pace_that_sizes_were_chosen_by_is_written_with_its_seal(tmp_path):
    pace = 2.5e10, machine.Beside(block=3e-3, logit=1e-9)
    settled: Any = SimpleNamespace(task=SimpleNamespace(rate=pace[0], beside=pace[1]), expected=lambda: None)
    _size.write([settled], tmp_path)
    assert "seal" in json.loads((tmp_path / _size.PLAN).read_text()) and _size._pace(tmp_path, timed=False) == pace
    write_json(tmp_path / _size.PLAN, {"rate": 2.5e10})  # as it was written before
    assert _size._pace(tmp_path, timed=False) == (2.5e10, machine.Beside())
