"""Outlines: what a method's class says before torch is there is what it says after."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import MISSING, asdict, fields
from inspect import getattr_static

import pytest
from conftest import TINY

from pretrain.core import method, registry
from pretrain.core.bounds import hints, words
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.core.models import initial
from pretrain.core.quick import declared
from pretrain.core.quick.outline import outline, source_of
from pretrain.core.quick.table import FAMILIES
from pretrain.core.registry import info, methods
from pretrain.stages import Misfit, build_dataclass

WRONG = ("x", -1, 0, 1, 2.5, 1e9, None, True, [], ["x"], (0.5,), {"a": 1})
TRAITS = (
    "kind", "version", "families", "task", "reads", "own_evaluation", "divisible", "token_weights", "columns", "schedules",
    "averages_weights", "weighs_tokens", "adapts", "samples", "lossless",
)  # fmt: skip


def outlined(name):
    row = info(name)
    return outline(row.module, row.path)[row.cls]


def answer(cls, given):
    """What comes of making a method: its fields and traits, or the error."""
    try:
        made = build_dataclass(cls, given, "it")
    except (Misfit, PretrainError, ValueError, TypeError) as error:
        return type(error).__name__, str(error), getattr(error, "place", ())
    return asdict(made), made.name, made.references(), made.parts(), [traits(made, name) for name in TRAITS]


def traits(made, name):
    try:
        return getattr(made, name, None)
    except PretrainError as error:
        return str(error)


def required(cls):
    return [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]


@pytest.mark.parametrize("name", methods())
def test_an_outline_says_what_the_class_says(name):
    ours, theirs = outlined(name), method_class(name)
    assert ours is not theirs and ours.__doc__ == theirs.__doc__ and source_of(ours) == source_of(theirs)
    types = [{f.name: str(hints(cls)[f.name]) for f in fields(cls)} for cls in (ours, theirs)]
    assert types[0] == types[1]
    shown = [[(f.name, f.default, words(cls, f)) for f in fields(cls)] for cls in (ours, theirs)]
    assert shown[0] == shown[1]
    given = {field: "x" for field in required(theirs)}
    for field in [f.name for f in fields(theirs)]:
        for value in WRONG:
            assert answer(ours, given | {field: value}) == answer(theirs, given | {field: value}), (field, value)
    assert answer(ours, {"unknown": 1}) == answer(theirs, {"unknown": 1})


def test_a_function_of_an_outline_imports_what_it_needs_when_it_is_called():
    """A decorator of a library's waits as well, and what it does is done."""
    gptq, cosine = outlined("gptq"), outlined("cosine")
    assert callable(getattr_static(gptq, "__call__")) and cosine().factor(0, 10) == method_class("cosine")().factor(
        0, 10
    )


@pytest.mark.parametrize("model_type", [name for entry in FAMILIES for name in entry.types])
def test_the_source_of_transformers_tells_the_fields_of_a_configuration(model_type):
    known = declared.declared(model_type).names
    assert known == initial.config_fields(model_type) and "model_type" not in known
    assert ("rope_theta" in known) == ("rope_parameters" in known)  # the name in older files


@pytest.mark.parametrize("family", TINY)
def test_a_sound_configuration_is_sound_by_its_source(family):
    facts = declared.declared(family)
    assert facts.plausible(TINY[family] | {"vocab_size": 300}) and facts.plausible({})


def test_a_value_of_those_that_a_type_lists_is_known_without_the_configuration():
    facts = declared.declared("modernbert")
    assert facts.plausible({"classifier_pooling": "mean"}) and not facts.plausible({"classifier_pooling": "most"})


@pytest.mark.parametrize(
    "model_type, fields",
    [
        ("llama", {"hidden_sise": 3}), ("lama", {}), ("llama", {"hidden_size": "x"}), ("llama", {"hidden_size": 30.0}),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 3}), ("llama", {"initializer_range": 2.0}),
        ("llama", {"hidden_size": 30, "num_attention_heads": 4}), ("bert", {"rope_theta": 1e4}), ("gpt2", {"n_embd": None}),
        ("vit_mae", {"patch_sise": 4}),
    ],
)  # fmt: skip
def test_a_wrong_model_is_refused_in_the_same_words_before_and_after_torch(monkeypatch, model_type, fields):
    with pytest.raises(PretrainError) as after:
        declared.check_config(model_type, fields)
    monkeypatch.setattr(declared, "torch_imported", lambda: False)
    with pytest.raises(PretrainError) as before:
        declared.check_config(model_type, fields)
    assert str(before.value) == str(after.value)


@pytest.mark.parametrize("task", ["causel", "AutoModelForImageClasification"])
def test_a_wrong_task_is_refused_in_the_same_words_before_and_after_torch(monkeypatch, task):
    with pytest.raises(PretrainError) as after:
        declared.check_task(task)
    monkeypatch.setattr(declared, "torch_imported", lambda: False)
    with pytest.raises(PretrainError) as before:
        declared.check_task(task)
    assert str(before.value) == str(after.value) and "did you mean" in str(before.value)


OUTSIDE = '''
from __future__ import annotations

from dataclasses import dataclass

import torch
{imports}
from pretrain.core.bounds import Positive
from pretrain.optim import Schedule

from ._shape import SHARP, Sharp

WEIGHT = torch.ones(1)


@dataclass(frozen=True)
class Polynomial(Schedule):
    """A made-up schedule (arXiv:0000.00000)."""

    power: Positive = SHARP

    def __post_init__(self) -> None:
        super().__post_init__()
        Sharp().check(self.power)

    def factor(self, step: int, total: int) -> float:
        """Down by a power."""
        return float(WEIGHT) * (1 - step / total) ** self.power
'''
HELPER = """
import torch

from pretrain.core.errors import PretrainError

SHARP = 2.0


class Sharp:
    def check(self, power):
        if power > 9:
            raise PretrainError(f"polynomial: power {power}: accepted: at most 9")

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.square(x)
"""


@pytest.mark.parametrize(
    "imports, fields, message, torch",
    [
        ("", "{}", "checked", False),
        ("", "{power: 10}", "'polynomial': power 10.0: accepted: at most 9", False),
        ("", "{powr: 1}", "did you mean 'power'", False),
        ("import no_such_library", "{}", "cannot be imported: No module named 'no_such_library'", True),
    ],
)
def test_a_method_of_a_folder_is_checked_without_torch(tmp_path, imports, fields, message, torch):
    """With what it takes from a file beside it; where it needs what is not installed, importing it says so."""
    (tmp_path / "polynomial.py").write_text(OUTSIDE.format(imports=imports))
    (tmp_path / "_shape.py").write_text(HELPER)
    probe = f"""
        import sys
        from pretrain.core.errors import PretrainError
        from pretrain.core.registry import use_methods
        from pretrain.recipe import parse
        from pretrain.stages import build_method
        use_methods({str(tmp_path)!r})
        try:
            build_method({{"method": "polynomial"}} | parse({fields!r}), "schedule")
            print("checked")
        except ValueError as error:
            print(error)
        print("HEAVY" if "torch" in sys.modules else "LIGHT")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(probe)], capture_output=True, text=True, check=False)
    assert message in done.stdout and done.stdout.endswith("HEAVY\n" if torch else "LIGHT\n"), done.stdout + done.stderr


def test_the_class_itself_is_given_once_torch_is_there(monkeypatch):
    assert method.declared_class("lora") is method_class("lora")
    monkeypatch.setattr(method, "torch_imported", lambda: False)
    row = info("lora")
    monkeypatch.delitem(sys.modules, row.module)
    assert method.declared_class("lora") is outlined("lora")


FILLED = [
    'KNOWN["soft"] = 1',
    "for name in ('soft',):\n    KNOWN[name] = 1",
    "KNOWN.update(soft=1)",
    "def known(f):\n    KNOWN[f.__name__] = f\n    return f\n\n\n@known\ndef soft(x):\n    return x",
]
CHECKED = '''
from dataclasses import dataclass

from pretrain.optim import Schedule
{table}


@dataclass(frozen=True)
class Shaped(Schedule):
    """A made-up schedule (arXiv:0000.00000)."""

    shape: str = "soft"

    def __post_init__(self):
        super().__post_init__()
        if self.shape not in KNOWN:
            raise ValueError(self.shape)

    def factor(self, step, total):
        return 1.0
'''


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("filling", FILLED)
def test_a_table_that_a_file_fills_is_full_when_fields_are_checked_without_torch(
    tmp_path, monkeypatch, clean, filling, beside
):
    table = f"KNOWN = {{}}\n{filling}\n"
    (tmp_path / "shaped.py").write_text(CHECKED.format(table="from ._table import KNOWN" if beside else table))
    (tmp_path / "_table.py").write_text(table)
    monkeypatch.setattr(method, "torch_imported", lambda: False)
    registry.use_methods(tmp_path)
    assert method.nested("shaped", "schedule").shape == "soft"
