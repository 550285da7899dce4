"""The page of the command line, from typer's own help."""

from __future__ import annotations

import re

import typer
from typer.cli import get_docs_for_click

from pretrain.cli import app
from pretrain.docs.tables import HEAD

_SECTION = re.compile(r"^#+ `(?P<command>[\w ]+)`\n\n(?P<help>.+)$", re.MULTILINE)
_ROW = re.compile(r"^\* `(?P<name>\w+)`: .+$", re.MULTILINE)  # of a table of commands, whose help is cut short


def command_page() -> str:
    """Each command with its arguments and options."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="pretrain"), name="pretrain")
    text = re.sub(r"^\* `--(help|install-completion|show-completion)`.*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n\*\*Options\*\*:\n\n(?!\*)", "\n", text)  # of a command that has none but those
    text = re.sub(r"<(\w+)>", r"\1", text.replace("<list[str]>", "<str>"))
    helps = {section["command"]: section["help"] for section in _SECTION.finditer(text)}
    sections = [_linked(section, helps) for section in re.split(r"(?=^#+ `)", text, flags=re.MULTILINE)]
    page = "".join(sections).replace("# `pretrain`", "# The command line", 1)
    return f"{HEAD}\n{page.rstrip()}\n"


def _linked(section: str, helps: dict[str, str]) -> str:
    """The section with its table of commands leading to theirs."""
    group = next((match["command"] for match in _SECTION.finditer(section)), "")

    def row(match: re.Match[str]) -> str:
        command = f"{group} {match['name']}"
        return f"* [`{command}`](#{command.replace(' ', '-')}): {helps[command]}"

    before, commands, after = section.partition("**Commands**:\n")
    return before + commands + _ROW.sub(row, after)
