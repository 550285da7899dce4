"""What values a field accepts, said once, on the field: `rank: Count`, `beta: Annotated[float, Ge(0), Lt(1)]`.

From it follow the check when the object is made, the words of the error, and the column of the documentation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pretrain.core.errors import PretrainError, brief, nearest
from pretrain.core.quick.quantities import Duration, Misplaced, takes

if TYPE_CHECKING:
    from annotated_types import Ge, Gt, Le, Lt
else:
    try:
        from annotated_types import Ge, Gt, Le, Lt  # what pydantic knows
    except ImportError:  # training from token shards needs no pydantic
        from collections import namedtuple

        Gt, Ge, Lt, Le = (namedtuple(name.title(), name) for name in ("gt", "ge", "lt", "le"))


@dataclass(frozen=True)
class Free:
    """Marks a number that has no bounds on purpose: each value has its meaning."""


AnyNumber = Annotated[float, Free()]  # a factor of either sign, a logit
AnyInteger = Annotated[int, Free()]  # a layer, counted from the end where it is negative
Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
MOST = 1 << 63  # from here on no library takes a whole number
Seed = Annotated[int, Ge(0), Lt(MOST)]
Seconds = Annotated[float, Gt(0), Duration()]  # `30min` in a recipe
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
PositiveShare = Annotated[float, Gt(0), Le(1)]
ProperShare = Annotated[float, Ge(0), Lt(1)]  # a whole is too much: dropout, betas
OpenShare = Annotated[float, Gt(0), Lt(1)]  # neither nothing nor all
_NAMES: dict[object, str] = {
    int: "a whole number", float: "a finite number", str: "a text", bool: "true or false", NoneType: "null"
}  # fmt: skip


def hints(cls: type) -> dict[str, object]:
    """The types of a dataclass's fields, their bounds included."""
    return _hints(cls)


@cache
def _hints(cls: type) -> dict[str, object]:
    return get_type_hints(cls, include_extras=True)


def accepted(hint: object, value: object = ...) -> str:
    """The values of a type in words: `above 0`, `from 0 to 1`, `1 or more`, `mean, sum`; empty where nothing is known.

    For a `value` that is not even of the type that is bounded, the name of that type.
    """
    return _accepted(hint, value) + ("" if _alone(hint) is None else ", or one alone")


def _accepted(hint: object, value: object = ...) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if isinstance(value, str | Misplaced) and any(isinstance(mark, Duration) for mark in parts[1:]):
            return "seconds, or 30min, 2h"
        if value is not ... and not fits(value, parts[0]):
            return _accepted(parts[0], value)
        if (words := next((mark.words for mark in parts[1:] if hasattr(mark, "words")), None)) is not None:
            return str(words)
        bounds = {n: getattr(mark, n) for mark in parts[1:] for n in ("gt", "ge", "lt", "le") if hasattr(mark, n)}
        return _range(bounds) or _accepted(parts[0])
    if origin is Literal:
        return ", ".join(map(str, parts))
    if origin in (Union, UnionType):
        return ", or ".join(dict.fromkeys(filter(None, (_accepted(part, value) for part in parts))))
    if origin in (tuple, list):
        inner = _accepted(parts[0]) if parts else ""
        return f"a list, each {inner}" if inner else "a list"
    if origin is dict:
        values = _accepted(parts[1]) if parts and _bounded(parts[1]) else ""
        return f"a mapping, each value {values}" if values else "a mapping"
    if hint is int and isinstance(value, Integral) and not isinstance(value, bool):
        return "a whole number below 2**63"
    return _NAMES.get(hint, "")


def _alone(hint: object) -> object | None:
    """The type of what a list of any length holds, if a number may stand for a list of it alone; else None."""
    parts = get_args(hint)
    if get_origin(hint) is not tuple or parts[1:] != (...,):
        return None
    inner: object = parts[0]
    return inner if takes(inner, int) or takes(inner, float) else None


def gathered(value: object, hint: object) -> object:
    """The value, in a list where it is one of what the type holds a list of: `density: 0.4` is `density: [0.4]`."""
    alone = _alone(hint)
    given = isinstance(value, Real | dict) and not isinstance(value, bool)
    return (value,) if alone is not None and given and fits(value, alone) else value


def gather_fields(made: object) -> None:
    """Put what stands alone for a list into one, in the fields of a dataclass that is being made."""
    assert is_dataclass(made) and not isinstance(made, type)
    known = hints(made.__class__)
    for item in fields(made):
        value = getattr(made, item.name)
        listed = gathered(value, known[item.name])
        if listed is not value:
            object.__setattr__(made, item.name, listed)


def _range(bounds: dict[str, float]) -> str:
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if low is None and high is None:
        return ""
    if high is None:
        return f"{low:g} or more" if "ge" in bounds else f"above {low:g}"
    if low is None:
        return f"at most {high:g}" if "le" in bounds else f"below {high:g}"
    if "ge" in bounds:
        end = "2**63" if high == MOST else f"{high:g}"
        return f"from {low:g} to {end}" if "le" in bounds else f"from {low:g} to below {end}"
    return f"above {low:g}, at most {high:g}" if "le" in bounds else f"above {low:g}, below {high:g}"


def fits(value: object, hint: object) -> bool:
    """Whether a value is of a type and within its bounds; of types that say nothing of values everything is."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, parts[0]) and all(_within(value, mark) for mark in parts[1:])
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin in (tuple, list):
        if not isinstance(value, tuple | list):
            return False
        inner = [parts[0]] * len(value) if parts[1:] == (...,) or origin is list else list(parts)
        return len(value) == len(inner) and all(map(fits, value, inner))
    if origin is dict:
        key, inner = parts
        return isinstance(value, dict) and all(fits(k, key) and fits(v, inner) for k, v in value.items())
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool) and -MOST <= int(value) < MOST
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) if isinstance(hint, type) and hint in (str, bool, NoneType) else True


def _within(value: Any, mark: object) -> bool:
    """Whether a bound holds; each element's of a list. A mark of another sort bounds nothing."""
    if value is None:
        return True
    match mark:
        case Gt(gt=bound):
            return value > bound
        case Ge(ge=bound):
            return value >= bound
        case Lt(lt=bound):
            return value < bound
        case Le(le=bound):
            return value <= bound
    return True


class Fielded(type):
    """The type of dataclasses that users make by hand: an argument that is no field is told as a recipe's is."""

    def __call__(cls, *args: object, **given: object) -> object:
        """Make one, once the arguments fit."""
        if is_dataclass(cls):
            check_names(cls, args, given, cls.__name__)
        return super().__call__(*args, **given)


def check_names(cls: type, args: tuple[object, ...], given: Mapping[str, object], name: str) -> None:
    """Refuse arguments of a dataclass that are no fields, are given twice or are missing: `LoRA(rnk=4)`."""
    assert is_dataclass(cls)
    made = [item for item in fields(cls) if item.init]
    names = [item.name for item in made]
    words = ", ".join(names) or "none"
    for word in given:
        if word not in names:
            hint = nearest(word, names)
            raise PretrainError(f"{name}: unknown field {word!r}{hint}; accepted fields: {words}", place=(word,))
    if len(args) > len(names):
        raise PretrainError(f"{name}: {len(args)} arguments; accepted fields: {words}")
    for item in made[: len(args)]:
        if item.name in given:
            raise PretrainError(f"{name}: {item.name} is given twice; accepted: one value", place=(item.name,))
    for item in made[len(args) :]:
        if item.name not in given and item.default is MISSING and item.default_factory is MISSING:
            what = accepted(hints(cls)[item.name]) or "a value"
            raise PretrainError(f"{name}: {item.name} is missing; accepted: {what}", place=(item.name,))


def check_value(name: str, value: object, hint: object) -> None:
    """Refuse an argument outside its bounds, as a field is: `NAME VALUE: accepted: WORDS`."""
    if not fits(value, hint):
        raise PretrainError(f"{name} {brief(value)}: accepted: {accepted(hint, value)}", place=(name,))


def check_fields(made: object, name: str) -> None:
    """Refuse a dataclass with a field outside its bounds: `NAME: FIELD VALUE: accepted: WORDS`."""
    assert is_dataclass(made) and not isinstance(made, type)
    known = hints(made.__class__)
    for item in fields(made):
        value, hint = getattr(made, item.name), known[item.name]
        if not fits(value, hint):
            prefix = f"{name}: " if name else ""
            raise PretrainError(f"{prefix}{item.name} {value!r}: accepted: {accepted(hint, value)}", place=(item.name,))


def words(cls: type, item: Field[object]) -> tuple[str, str]:
    """A field's type without its bounds, and what it accepts, for the documentation."""
    hint = hints(cls)[item.name]
    return _plain(hint), accepted(hint) if _bounded(hint) else ""


def _bounded(hint: object) -> bool:
    """Whether a type says more of its values than its name does."""
    if get_origin(hint) is Literal:
        return True
    if get_origin(hint) is Annotated and accepted(hint) != accepted(get_args(hint)[0]):
        return True
    return any(map(_bounded, get_args(hint)))


def _plain(hint: object) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        names = [type(mark).__name__ for mark in parts[1:]]
        return "Ref" if "_RefMark" in names else _plain(parts[0])
    if origin in (Union, UnionType):
        return " | ".join(map(_plain, parts))
    if origin is Literal:
        return " | ".join(dict.fromkeys(type(part).__name__ for part in parts))
    if origin is not None:
        inner = ", ".join("..." if part is ... else _plain(part) for part in parts)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return "None" if hint is NoneType else getattr(hint, "__name__", str(hint))
