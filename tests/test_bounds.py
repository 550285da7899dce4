"""Bounds stand on the fields: one check, one wording, for every method, from a recipe and from Python."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pretrain.core.bounds import (
    Count,
    Free,
    Ge,
    Gt,
    Le,
    Lt,
    Positive,
    ProperShare,
    Seed,
    Share,
    accepted,
    check_fields,
    fits,
    hints,
)
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.core.registry import methods
from pretrain.corpus.sources import SOURCES
from pretrain.stages import build_method, stage_classes
from pretrain.stages.data import build_source


@pytest.mark.parametrize(
    ("hint", "good", "bad", "words"),
    [
        (Count, [1, 7], [0, -1, 1.5, True, "2", None], "1 or more"),
        (Count, [2**63 - 1], [2**63, 10**30], "1 or more"),
        (Seed, [0, 2**63 - 1], [-1, 2**63], "from 0 to below 2**63"),
        (Positive, [1e-9, 3], [0, -1.0, float("nan"), float("inf"), "x"], "above 0"),
        (Share, [0, 0.5, 1], [-0.1, 1.1], "from 0 to 1"),
        (ProperShare, [0, 0.99], [1, 1.0, -1e-9], "from 0 to below 1"),
        (Annotated[float, Gt(0), Lt(2)], [1], [0, 2], "above 0, below 2"),
        (Annotated[int, Le(3)], [3, -9], [4], "at most 3"),
        (Literal["mean", "sum"], ["mean"], ["max", 3, None], "mean, sum"),
        (Count | None, [None, 2], [0, "a"], "1 or more, or null"),
        (tuple[Share, ...], [(), (0, 1), [0.5]], [(2,), 0.5], "a list, each from 0 to 1, or one alone"),
        (dict[str, Share], [{}, {"a": 0.5}], [{"a": 2}, {"a": "x"}, 0.5], "a mapping, each value from 0 to 1"),
        (tuple[Count, Share], [(1, 0.5)], [(1,), (0, 0.5), (1, 2)], "a list, each 1 or more"),
    ],
)
def test_what_fits_and_its_words(hint, good, bad, words):
    assert all(fits(value, hint) for value in good)
    assert not any(fits(value, hint) for value in bad)
    assert accepted(hint) == words


@given(st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False), st.integers(-5, 5), st.integers(1, 5))
def test_a_range_holds_exactly_its_numbers(value, low, width):
    hint = Annotated[float, Ge(low), Lt(low + width)]
    assert fits(value, hint) == (low <= value < low + width)


def test_a_value_of_another_type_is_told_the_type_and_not_the_range():
    assert accepted(Positive, "fast") == "a finite number"
    assert accepted(Positive, float("nan")) == "a finite number"
    assert accepted(Positive, -1) == "above 0"
    assert accepted(Count, 2**63) == "a whole number below 2**63"


def test_the_error_names_the_field_the_value_and_what_is_accepted():
    @dataclass(frozen=True)
    class Made:
        rank: int

    Made.__annotations__["rank"] = Count
    with pytest.raises(PretrainError, match=r"made: rank 0: accepted: 1 or more"):
        check_fields(Made(0), "made")


def outside(hint: Any) -> Any:
    """A value of the type beyond its bounds; `...` where it has none."""
    if get_origin(hint) is Literal:
        return "no such word"
    if get_origin(hint) is Annotated:
        for mark in get_args(hint)[1:]:
            for name, step in (("gt", 0), ("ge", -1), ("lt", 0), ("le", 1)):
                if hasattr(mark, name):
                    return getattr(mark, name) + step
    for part in get_args(hint):
        if part is not ... and (value := outside(part)) is not ...:
            if get_origin(hint) is dict:
                return {"a" if get_args(hint)[0] is str else 1: value}
            return (value,) if get_origin(hint) is tuple else value
    return ...


def given_for(field: str, hint: Any) -> Any:
    """A value of a required field's type."""
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    words = get_args(kind)[1:] == (str,)
    if get_origin(kind) is dict and get_origin(get_args(kind)[1]) is tuple:
        return {"a": ("x",), "b": ("y",)}
    if get_origin(kind) is tuple and get_args(kind)[0] is not str:
        return (given_for(field, get_args(kind)[0]),)
    values = {dict: {"a": "x", "b": "y"} if words else {"a": 1.0, "b": 2.0}, tuple: ("x", "y"), int: 2, float: 0.5}
    return values.get(get_origin(kind) or kind, "causal_lm" if "objective" in field else "x")


def neither_bounded_nor_free(hint: Any) -> bool:
    """Whether a type holds a number of which nothing is said; the keys of a mapping are names."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        declared = any(isinstance(mark, (Free, Ge, Gt, Le, Lt)) for mark in parts[1:])
        return not declared and neither_bounded_nor_free(parts[0])
    return hint in (int, float) or any(map(neither_bounded_nor_free, parts[1:] if origin is dict else parts))


def test_each_number_of_each_method_stage_and_source_has_bounds_or_is_free_on_purpose():
    classes: dict[str, type] = {name: method_class(name) for name in methods()}
    classes |= dict(stage_classes()) | {f"source {word}": cls for word, cls in SOURCES.items()}
    found = [
        f"{name}.{field}: {hint}"
        for name, cls in classes.items()
        for field, hint in hints(cls).items()
        if get_origin(hint) is not ClassVar and neither_bounded_nor_free(hint)
    ]
    assert not found, "bounds of core/bounds.py, or AnyNumber, AnyInteger where each value has its meaning"


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("masked_lm", {"masked": 0.9, "random": 0.9}, "masked 0.9, random 0.9: accepted: shares that come to 1"),
        ("drbert", {"random": 0.3}, "masked 0.8, random 0.3: accepted: shares that come to 1"),
        ("mask_later", {"masked": 0.95}, "masked 0.95, random 0.1: accepted: shares that come to 1"),
        ("held_out", {"length": 8, "stride": 9}, "stride 9, length 8: accepted: stride at most length"),
        ("calibration", {"length": 8, "stride": 9}, "stride 9, length 8: accepted: stride at most length"),
    ],
)
def test_fields_that_do_not_go_together_are_refused_when_the_method_is_made(name, values, words):
    with pytest.raises(PretrainError, match=f"{name}: {words}"):
        method_class(name)(**values)


def test_shares_whose_sum_is_rounded_to_a_little_more_than_all_are_accepted():
    for masked in (0.1, 0.3, 0.6, 0.7, 0.8, 0.9):
        method_class("masked_lm")(masked=masked, random=1 - masked)
        method_class("masked_lm")(masked=masked, random=round(1 - masked, 1))


LISTS = [
    (name, field)
    for name in methods()
    for field, hint in hints(method_class(name)).items()
    if get_args(hint)[1:] == (...,) and fits((1,), hint) and not fits(("x",), hint)
]


@pytest.mark.parametrize(("name", "field"), LISTS)
def test_a_number_alone_stands_for_a_list_of_it_from_a_recipe_and_from_python(name, field):
    """As `density: 0.4`, one for all models; what is refused in a list is refused alone, and alike."""
    cls = method_class(name)
    required = {
        item.name: given_for(item.name, hints(cls)[item.name])
        for item in fields(cls)
        if item.default is MISSING and item.default_factory is MISSING
    }

    def made(make: Any, value: object) -> object:
        try:
            return make(required | {field: value})
        except (PretrainError, ValueError) as error:
            return str(error)

    for make in (
        lambda given: cls(**given),
        lambda given: build_method({"method": name} | given, methods()[name].kind),
    ):
        for value in (1, 0.5):
            alone, listed = made(make, value), made(make, [value])
            same = alone == listed if isinstance(alone, str) else alone == made(make, (value,))
            assert same or not fits((value,), hints(cls)[field]), (alone, listed)


RESULTS = Path(__file__).parent.parent / "claims" / "results"

CASES = [
    (name, item.name)
    for name in methods()
    for item in fields(method_class(name))
    if outside(hints(method_class(name))[item.name]) is not ...
]


@pytest.mark.parametrize(("name", "field"), CASES)
def test_each_bounded_field_of_each_method_is_refused_beyond_its_bounds(name, field):
    cls = method_class(name)
    hint = hints(cls)[field]
    value = outside(hint)
    required = {
        item.name: given_for(item.name, hints(cls)[item.name])
        for item in fields(cls)
        if item.default is MISSING and item.default_factory is MISSING
    }
    with pytest.raises(PretrainError, match=rf"(?s){name}: {field} .*accepted: "):
        cls(**(required | {field: value}))
    given = list(value) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=rf"(?s){field}.*accepted: "):
        build_method({"method": name} | required | {field: given}, methods()[name].kind)


STAGE_CASES = [
    (name, field)
    for name, cls in stage_classes().items()
    for field in cls.model_fields
    if field != "stage" and outside(hints(cls)[field]) is not ...
]


@pytest.mark.parametrize(("name", "field"), STAGE_CASES)
def test_each_bounded_field_of_each_stage_is_refused_beyond_its_bounds(name, field):
    cls = stage_classes()[name]
    with pytest.raises(ValidationError) as refusal:
        cls.model_validate({"stage": name, field: outside(hints(cls)[field])})
    assert field in [error["loc"][0] for error in refusal.value.errors()]


SOURCE_CASES = [
    (word, item.name)
    for word, cls in SOURCES.items()
    for item in fields(cls)
    if outside(hints(cls)[item.name]) is not ...
]


@pytest.mark.parametrize(("word", "field"), SOURCE_CASES)
def test_each_bounded_field_of_each_source_is_refused_beyond_its_bounds(word, field):
    hint = hints(SOURCES[word])[field]
    kind = hints(SOURCES[word])[word]
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    given = {word: {tuple: ["x"], bool: True, int: 1}.get(get_origin(kind) or kind, "x"), field: outside(hint)}
    with pytest.raises(ValueError, match=rf"{field}(\.0)?: .*accepted: "):
        build_source(given)


def recorded_methods(value: Any) -> Iterator[dict[str, Any]]:
    """The methods that a recorded claim names, with their fields, at any depth."""
    if isinstance(value, dict):
        if isinstance(value.get("method"), str):
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from recorded_methods(item)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_no_bound_is_narrower_than_what_recorded_results_were_made_with(path):
    claim = json.loads(path.read_text(encoding="utf-8"))["claim"]
    for method in recorded_methods(claim):
        check_within(method)
    tune = claim["tune"] or {"field": ""}
    field = tune["field"].rpartition(".")[2]
    for side in ("baseline", "method"):
        optimizer = (claim[side]["set"].get("model.optimizer") or {}).get("method", "adamw")
        if hint := hints(method_class(optimizer)).get(field):
            assert all(fits(value, hint) for value in tune[side]), (side, field)


def check_within(method: dict[str, Any]) -> None:
    """Refuse the fields of a method that lie outside its bounds; those that a method no longer has are passed over."""
    known = hints(method_class(method["method"]))
    for field, value in method.items():
        if field != "method" and field in known:
            held = tuple(value) if isinstance(value, list) else value
            assert fits(held, known[field]), (method["method"], field, value)
