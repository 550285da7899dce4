"""Fields that are given and do not fit: what is wrong with them in our words, and where."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Annotated, TypeVar, cast

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from pretrain.core.bounds import accepted, check_fields, gathered, hints
from pretrain.core.errors import PretrainError, brief, nearest
from pretrain.core.quick.quantities import as_typed, element

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Built = TypeVar("Built", bound="DataclassInstance")

WITHIN = {  # what other trainers have as a field of the training stands in one of its parts here
    "optimizer.lr": ("lr", "learning_rate", "rate"),
    "optimizer.weight_decay": ("weight_decay", "decay"),
    "schedule.warmup": ("warmup", "warmup_steps", "warmup_ratio"),
    "budget.steps": ("steps", "max_steps", "num_steps"),
    "budget.epochs": ("epochs", "num_train_epochs", "num_epochs", "max_epochs"),
    "budget.tokens": ("tokens", "max_tokens"),
    "budget.seconds": ("seconds", "minutes", "max_time"),
    "budget.flops": ("flops",),
    "clip": ("max_grad_norm", "grad_clip", "gradient_clip_val"),
    "precision": ("fp16", "bf16", "dtype", "torch_dtype", "mixed_precision"),
    "model.hidden_size": ("hidden_size", "d_model", "n_embd", "width"),
    "model.num_hidden_layers": ("num_hidden_layers", "n_layer", "depth", "layers"),
    "model.num_attention_heads": ("num_attention_heads", "n_head", "heads"),
}


def unknown_field(name: str, cls: type[BaseModel]) -> str:
    """What to say of a name that is no field of a stage."""
    known = [field for field in cls.model_fields if field != "version"]
    within = next((place for place, names in WITHIN.items() if name in names and place.partition(".")[0] in known), "")
    hint = f" (did you mean '{within}'?)" if within else nearest(name, known)
    return f"unknown field{hint}; accepted: {', '.join(known)}"


def first_mistake(
    error: ValidationError, cls: type[BaseModel]
) -> tuple[tuple[str | int, ...], tuple[str | int, ...], str]:
    """The first mistake in a stage's fields: its place, what a validator says of the place in it, and our words."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    place = tuple(first["loc"])
    field_info = cls.model_fields.get(str(place[0])) if place else None
    if field_info is not None and element(field_info.annotation) is None:
        place = place[:1]  # without the names that pydantic has for the branches of a type: `evaluate_every`
    deeper = getattr(first.get("ctx", {}).get("error"), "place", ())
    if first["type"] == "extra_forbidden":
        return place, deeper, unknown_field(str(place[-1]), cls)
    if first["type"] == "missing":
        return place, deeper, "missing; accepted: a value for this field"
    if first["type"] == "value_error":
        return place, deeper, " ".join(first["msg"].removeprefix("Value error, ").split())
    words = accepted(_hint(field_info, place), first["input"])
    if first["type"] == "too_short":
        words = f"a list of at least {first['ctx']['min_length']}"
    return place, deeper, f"{brief(first['input'])}: {f'accepted: {words}' if words else first['msg']}"


def _hint(field_info: FieldInfo | None, place: tuple[str | int, ...]) -> object:
    """The type of a stage's field, or of what lies in it; None where it is not told."""
    if field_info is None:
        return None
    hint: object = field_info.annotation
    hint = Annotated[hint, *field_info.metadata] if field_info.metadata else hint
    for _ in place[1:]:
        hint = element(hint)
    return hint


class Misfit(ValueError):
    """What a validator says of a value; `place` leads to it from the field that is validated."""

    def __init__(self, message: str, place: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.place = place


@cache
def _adapter(cls: type) -> TypeAdapter[object]:
    """What checks the fields of a class, which takes longer to make than to use."""
    return TypeAdapter(cls)


def build_dataclass(cls: type[Built], given: object, what: str) -> Built:
    """A frozen dataclass from a mapping, its types checked; errors name the field, the value and what is accepted."""
    known = [f.name for f in fields(cls)]
    if not isinstance(given, dict):
        raise Misfit(f"{what} {given!r}: accepted: a mapping with {', '.join(known)}")
    for name in given:
        if name not in known:
            names = ", ".join(known) or "none"
            raise Misfit(f"unknown field {name!r} of {what}{nearest(name, known)}; accepted: {names}", (name,))
    given = {name: gathered(as_typed(value, hints(cls)[name]), hints(cls)[name]) for name, value in given.items()}
    try:
        made = cast("Built", _adapter(cls).validate_python(given))
        check_fields(made, "")
        return made
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        words = accepted(hints(cls).get(str(first["loc"][0])), first["input"]) if first["loc"] else ""
        if first["type"] == "missing":
            words = accepted(hints(cls).get(where)) or "a value"
            raise Misfit(f"{what}: {where} is missing; accepted: {words}") from error
        reason = f"accepted: {words}" if words else first["msg"]
        raise Misfit(f"{what}: {where}: {first['input']!r}: {reason}", first["loc"]) from error
    except PretrainError as error:
        reason = str(error).removeprefix(f"{cls.__module__.rpartition('.')[2]}: ")
        raise Misfit(reason if reason.startswith(f"{what} ") else f"{what}: {reason}", error.place) from error
