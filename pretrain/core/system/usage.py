"""A command whose words do not fit it: told in the line that every other mistake has, with its exit status.

`typer` would draw a box of its own. What an option accepts is read off the command's function, so that it says of an
option what a recipe's error says of a field.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from functools import reduce, wraps
from inspect import signature
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Union, cast, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup
from typer.models import OptionInfo

from pretrain.core.bounds import Ge, Gt, Le, Lt, accepted, fits
from pretrain.core.errors import PretrainError, nearest, unknown

if TYPE_CHECKING:
    from typing import Protocol

    class Parameter(Protocol):
        """What typer's own class of options and arguments has."""

        name: str
        metavar: str | None
        opts: list[str]
        secondary_opts: list[str]
        param_type_name: str
        help: str | None


# Of the copy of click that this typer works with, which it may carry inside: the second base of what it exports.
ClickException = cast("type[Exception]", typer.BadParameter.__mro__[2])
_NAMES: dict[object, str] = {int: "a whole number", float: "a number"}


class Commands(TyperGroup):
    """A group of commands whose usage errors are `PretrainError`s."""

    def main(
        self, args: Sequence[str] | None = None, prog_name: str | None = None, complete_var: str | None = None,
        standalone_mode: bool = True, windows_expand_args: bool = True, **extra: object,
    ) -> object:  # fmt: skip
        """Run the command that the words name, and leave with its status."""
        try:
            status = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.Abort:
            status = "aborted"
        except ClickException as error:
            if type(error).__name__ != "NoArgsIsHelpError":
                raise explained(error) from error
            typer.echo(getattr(error, "message", ""), err=True, nl=False)
            status = 2
        if standalone_mode:
            sys.exit(status)
        return status


def within(function: Callable[..., object], command: str) -> Callable[..., object]:
    """A command that first refuses values beyond the bounds of its options' types, as fields are held to theirs."""
    known = get_type_hints(function, include_extras=True)
    for hint in known.values():
        _, marks = _parts(hint)
        low, high = ([getattr(mark, end) for mark in marks if hasattr(mark, end)] for end in ("ge", "le"))
        for option in (mark for mark in marks if isinstance(mark, OptionInfo) and (low or high)):
            option.min, option.max = (*low, None)[0], (*high, None)[0]  # which the help shows

    @wraps(function)
    def checked(*args: object, **given: object) -> object:
        for name, value in given.items():
            if name in known and not fits(value, known[name]):
                kind, marks = _parts(known[name])
                shown = f"{value:g}" if isinstance(value, float) else str(value)
                bounds = Annotated[kind, *marks] if marks else kind
                names = (_NAMES.get(kind) if fits(value, kind) else "", accepted(bounds, value))
                words = ", ".join(filter(None, names))
                raise PretrainError(f"{command}: --{name.replace('_', '-')} {shown!r}: accepted: {words}")
        return function(*args, **given)

    shown = signature(function)
    bare = [
        each.replace(annotation=_shown(known.get(name, each.annotation))) for name, each in shown.parameters.items()
    ]
    vars(checked)["__signature__"] = shown.replace(parameters=bare)  # which typer reads
    return checked


def _shown(hint: object) -> object:
    """A type as the help shows it, without the bounds of a value that may be missing: they stand beside it."""
    inner = _plain(hint)
    if get_origin(inner) not in (Union, UnionType):
        return hint
    bare = reduce(or_, map(_plain, get_args(inner)))
    return Annotated[(bare, *get_args(hint)[1:])] if inner is not hint else bare  # type: ignore[return-value]


def explained(error: BaseException) -> PretrainError:
    """A usage error in our words: `generate: --seed 'x': accepted: a whole number`."""
    context, option = getattr(error, "ctx", None), getattr(error, "option_name", "")
    text = " ".join(str(getattr(error, "message", error)).split()).rstrip(".")
    start = f"{command}: " if (command := _command(context)) else ""
    parameter: Parameter | None = getattr(error, "param", None)
    if parameter is not None:
        return PretrainError(start + _of_parameter(error, parameter, _hint(context, parameter.name), text))
    parameters: list[Parameter] = context.command.params if context is not None else []
    if type(error).__name__ == "NoSuchOption":
        known = {name for each in parameters if each.param_type_name == "option" for name in _spellings(each)}
        return PretrainError(f"{start}{unknown('option', option, known | {'--help'})}")
    if option and "does not take" in text:
        return PretrainError(f"{start}{option}: takes no value; accepted: {option} alone")
    if option:
        return PretrainError(f"{start}{option}: has no value; accepted: {option} VALUE")
    if match := re.match(r"No such command '(.*?)'(\. Did you mean .*)?$", text):
        return PretrainError(f"{start}{unknown('command', match[1], context.command.commands if context else ())}")
    if match := re.search(r"unexpected extra arguments?(?:\(s\))? \((.*)\)", text):
        places = [_written(each) for each in parameters if each.param_type_name == "argument"]
        return PretrainError(f"{start}{match[1]!r} is too much; accepted: {' '.join(places) or 'options alone'}")
    return PretrainError(
        f"{start}{text}; accepted: what {' '.join(filter(None, ('pretrain', command, '--help')))} says"
    )


def _command(context: typer.Context | None) -> str:
    """The command as it is written after the program's name: `runs show`."""
    names: list[str] = []
    while context is not None and context.parent is not None:
        names.insert(0, context.info_name or "")
        context = cast("typer.Context", context.parent)
    return " ".join(names)


def _of_parameter(error: BaseException, parameter: Parameter, hint: object, text: str) -> str:
    """What is wrong with the value of an option or argument, or that there is none."""
    accepted_words = _in_words(hint)
    if type(error).__name__ == "MissingParameter":
        about = (parameter.help or "").rstrip(".")
        about = about if about[1:2].isupper() else about[:1].lower() + about[1:]
        words = about if _plain(hint) in (str, Path) and about else accepted_words
        return f"{_written(parameter)} is missing; accepted: {words or 'a value'}"
    value = _value(error, text)
    guess = nearest(str(value), _choices(hint))
    shown = "" if value is None else f" {value!r}"
    return f"{_written(parameter)}{shown}{guess}: accepted: {accepted_words or text}"


def _spellings(parameter: Parameter) -> tuple[str, ...]:
    return (*parameter.opts, *parameter.secondary_opts)


def _written(parameter: Parameter) -> str:
    """An option or argument as one writes it."""
    if parameter.param_type_name == "option":
        return max(_spellings(parameter), key=len)
    return (parameter.metavar or parameter.name).upper()


def _value(error: BaseException, text: str) -> object:
    """The value that does not fit, where it is known."""
    listed = getattr(error.__cause__, "errors", None)
    if listed is not None and listed():
        return listed()[0]["input"]
    match = re.match(r"'(.*?)' is not|(\S+) is not in the range", text)
    return next(filter(None, match.groups())) if match else None


def _hint(context: typer.Context | None, name: str) -> object:
    """The type that a command's function gives a parameter, without `None` and the list around it."""
    function = context.command.callback if context is not None else None
    hint: object = get_type_hints(inspect.unwrap(function), include_extras=True).get(name) if function else None
    kind, marks = _parts(hint)
    bounds = [mark for mark in marks if isinstance(mark, Ge | Gt | Le | Lt)]
    return Annotated[kind, *bounds] if bounds else kind


def _parts(hint: object) -> tuple[object, tuple[object, ...]]:
    """A type without `None` and the list around it, and what stands beside it."""
    marks: tuple[object, ...] = ()
    while get_origin(hint) in (Annotated, Union, UnionType, list):
        if get_origin(hint) is Annotated:
            marks += get_args(hint)[1:]
        hint = next(part for part in get_args(hint) if part is not NoneType)
    return hint, marks


def _plain(hint: object) -> object:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _choices(hint: object) -> list[str]:
    kind = _plain(hint)
    return [str(member.value) for member in kind] if isinstance(kind, type) and issubclass(kind, Enum) else []


def _in_words(hint: object) -> str:
    """What values of a type a command accepts: `a whole number, 1 or more`."""
    kind = _plain(hint)
    words = (", ".join(_choices(hint)), _NAMES.get(kind) or "", "" if kind is hint else accepted(hint))
    return ", ".join(filter(None, words)) or accepted(hint)
