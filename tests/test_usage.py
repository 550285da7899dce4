"""Words that do not fit a command: one line that names the option, the value and what is accepted, and status 1."""

from __future__ import annotations

import inspect
from typing import get_type_hints

import pytest
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.core.bounds import Ge, Gt
from pretrain.core.errors import PretrainError
from pretrain.core.system.usage import _parts

MISTAKES = {
    "no number": (["generate", "x", "--temperature", "hot"], "generate: --temperature 'hot': accepted: a number, 0 or more"),
    "out of bounds": (["generate", "x", "--max-new-tokens", "0"], "generate: --max-new-tokens '0': accepted: a whole number, 1 or more"),
    "between": (["generate", "x", "--top-p", "3"], "generate: --top-p '3': accepted: a number, from 0 to 1"),
    "no whole number": (["generate", "x", "--seed", "1.5"], "generate: --seed '1.5': accepted: a whole number, from 0 to below 2**63"),
    "a seed below 0": (["generate", "x", "--seed", "-5"], "generate: --seed '-5': accepted: a whole number, from 0 to below 2**63"),
    "a seed that torch does not take": (["generate", "x", "--seed", "9" * 23], f"generate: --seed '{'9' * 23}': accepted: a whole number below 2**63"),
    "a size that nothing takes": (["predict", "x", "y", "--batch-size", str(2**63)], f"predict: --batch-size '{2**63}': accepted: a whole number below 2**63"),
    "no finite number": (["generate", "x", "--temperature", "inf"], "generate: --temperature 'inf': accepted: a finite number"),
    "of a command of a group": (["claim", "run", "x", "--hours", "inf"], "claim run: --hours 'inf': accepted: a finite number"),
    "too few": (["compare", "x", "y", "--budget", "flops=1", "--seeds", "0"], "compare: --seeds '0': accepted: a whole number, 1 or more"),
    "a choice": (
        ["export", "x", "--to", "onx", "--output", "y"],
        "export: --to 'onx' (did you mean 'onnx'?): accepted: gguf, onnx, sentence-transformers, peft, awq",
    ),
    "an option": (
        ["report", "x", "--hlep"], "report: unknown option '--hlep' (did you mean '--help'?); accepted: --help"
    ),
    "an option of another command": (
        ["report", "x", "--label", "z"], "report: unknown option '--label'; accepted: --help"
    ),
    "of a group": (
        ["--method", "x", "run"],
        "unknown option '--method' (did you mean '--methods'?); accepted: --help, --install-completion, --methods, "
        "--show-completion, --version",
    ),
    "a command": (["runs", "lst"], "runs: unknown command 'lst' (did you mean 'list'?); accepted: clean, compare, list, show"),
    "an argument": (["generate"], "generate: CHECKPOINT is missing; accepted: a checkpoint, a stage that wrote one, or a run"),
    "of two": (["convert", "x"], "convert: TO is missing; accepted: the checkpoint to write"),
    "an option that must be": (["compare", "a"], "compare: --budget is missing; accepted: flops=NUMBER, the same for each run"),
    "a choice that must be": (["export", "x"], "export: --to is missing; accepted: gguf, onnx, sentence-transformers, peft, awq"),
    "too many": (["generate", "x", "y"], "generate: 'y' is too much; accepted: CHECKPOINT"),
    "no value": (["generate", "x", "--seed"], "--seed: has no value; accepted: --seed VALUE"),
    "a switch": (["generate", "x", "--chat=yes"], "--chat: takes no value; accepted: --chat alone"),
}  # fmt: skip


@pytest.mark.promise(
    "What others have written",
    "Each number that a command takes has bounds, as each number of a recipe has, and is refused beyond them before anything is opened.",
)
@pytest.mark.parametrize("case", MISTAKES)
def test_a_word_that_does_not_fit_is_a_line_of_ours(case, capsys):
    arguments, line = MISTAKES[case]
    with pytest.raises(SystemExit, match="^1$"):
        app(arguments)
    assert capsys.readouterr().err == f"error: {line}\n"
    assert str(CliRunner().invoke(app, arguments).exception) == line  # whoever calls the command gets the error itself


def test_each_number_of_each_command_has_bounds():
    commands = [(app, each) for each in app.registered_commands]
    commands += [
        (g.typer_instance, each) for g in app.registered_groups for each in g.typer_instance.registered_commands
    ]
    numbers = 0
    for _, each in commands:
        for name, hint in get_type_hints(inspect.unwrap(each.callback), include_extras=True).items():
            kind, marks = _parts(hint)
            numbers += kind in (int, float)
            assert kind not in (int, float) or any(isinstance(mark, Ge | Gt) for mark in marks), (
                f"{each.callback}: {name}"
            )
    assert numbers >= 12


def test_help_and_the_version_leave_as_they_did(capsys):
    for arguments, status, text in ((["--version"], 0, "."), (["runs", "--help"], 0, "Usage"), (["runs"], 2, "Usage")):
        with pytest.raises(SystemExit, match=f"^{status}$"):
            app(arguments)
        printed = capsys.readouterr()
        assert text in printed.out + printed.err and "error" not in printed.err


def test_a_status_that_a_command_leaves_with_is_kept():
    import typer

    from pretrain.core.system.console import App
    from pretrain.core.system.usage import Commands

    small = App(cls=Commands)

    @small.command()
    def stop(status: int) -> None:
        raise typer.Exit(status)

    @small.command()
    def refuse() -> None:
        raise PretrainError("no")

    assert CliRunner().invoke(small, ["stop", "7"]).exit_code == 7
    assert CliRunner().invoke(small, ["stop", "0"]).exit_code == 0
    assert str(CliRunner().invoke(small, ["refuse"]).exception) == "no"
