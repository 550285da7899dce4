"""The pages of the stages: what each does, a minimal example, and every field it has."""

from __future__ import annotations

import re
from inspect import cleandoc
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pretrain.core.bounds import accepted, hints
from pretrain.core.method import Method, is_ref
from pretrain.corpus.sources import Source
from pretrain.docs.tables import HEAD, field_table, slug
from pretrain.stages import Stage, stage_classes
from pretrain.stages.train import Weighted
from pretrain.training.budget import Budget

EXAMPLES = Path(__file__).with_name("examples.yaml")
ORDER = (
    "data",
    "tokenizer",
    "processor",
    "train",
    "surgery",
    "evaluate",
    "decode",
    "export",
)  # in which a recipe has them
_FIELD = re.compile(r"^(\w+): (.*(?:\n +.*)*)", re.MULTILINE)
_WORDS: dict[object, tuple[str, str]] = {
    int: ("whole number", "whole numbers"), float: ("number", "numbers"), str: ("text", "texts"),
    bool: ("`true` or `false`", "`true` or `false`"),
    Weighted: ("[objective](../methods/objective.md) with a `weight`", "[objectives](../methods/objective.md)"),
    Source: ("[source](../sources.md)", "[sources](../sources.md)"),
    Budget: ("[budget](#budget)", "budgets"),
}  # fmt: skip


def stage_pages() -> dict[str, str]:
    """File name -> text."""
    rows = [HEAD, "# Stages\n", "A recipe is a list of stages. Each leaves a folder that later stages name.\n"]
    rows += ["| stage | does |", "|---|---|"]
    rows += [f"| [`{name}`]({name}.md) | {described(stage_classes()[name])[0]} |" for name in names()]
    rows += ["\nThe examples of these pages are one recipe:\n", f"```yaml\n{EXAMPLES.read_text(encoding='utf-8')}```"]
    return {"README.md": "\n".join(rows) + "\n"} | {f"{name}.md": _page(name) for name in names()}


def names() -> list[str]:
    """The stages' names, in the order in which a recipe has them; a new one comes last."""
    return sorted(stage_classes(), key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def described(cls: type[Stage]) -> tuple[str, str, dict[str, str]]:
    """What a stage's docstring says: what it does, more about it, and a sentence for each field, by name."""
    text = cleandoc(cls.__doc__ or "")
    sentences = {name: " ".join(sentence.split()) for name, sentence in _FIELD.findall(text)}
    lines = takewhile(lambda line: not _FIELD.match(line), text.splitlines())
    opening, _, more = "\n".join(lines).strip().partition("\n\n")
    return opening, more, sentences


def _page(name: str) -> str:
    cls = stage_classes()[name]
    opening, more, sentences = described(cls)
    sentences = described(Stage)[2] | sentences
    lines = [HEAD, f"# The stage `{name}`\n", opening + "\n", *([more + "\n"] if more else [])]
    lines += ["```yaml", *examples(name), "```\n", "| field | what it does | holds; default |", "|---|---|---|"]
    for field, declared in sorted(cls.model_fields.items(), key=lambda item: item[0] in Stage.model_fields):
        hint = hints(cls)[field]
        default = _default(declared)
        cells = (f"`{field}`", sentences[field], f"{_holds(hint)}{default and '; '}{default}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if "budget" in cls.model_fields:
        lines += ["\n## Budget\n", cleandoc(Budget.__doc__ or "") + "\n", *field_table(Budget)]
    return "\n".join(lines).rstrip() + "\n"


def examples(name: str) -> list[str]:
    """The lines of the stages of this kind in the recipe of examples."""
    items = EXAMPLES.read_text(encoding="utf-8").split("\n  - ")[1:]
    chosen = [f"- {item.rstrip()}" for item in items if f"stage: {name}\n" in f"{item}\n"]
    return [line.removeprefix("  ") for line in "\n".join(chosen).splitlines()]


def _holds(hint: object) -> str:
    """What a field holds: its type in words, and what of it is accepted where that is less than all of it."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    chosen = [f"`{value}`" for part in parts if get_origin(part) is Literal for value in get_args(part)]
    plain = {part: _bare(part) for part in parts if part is not NoneType and get_origin(part) is not Literal}
    if float in plain.values():  # a whole number is one too
        words = [in_words(part) for part, bare in plain.items() if bare is not int]
    else:
        words = [in_words(part) for part in plain]
    ranges = [accepted(part) for part, bare in plain.items() if accepted(part) != accepted(bare)]
    text = " or ".join(dict.fromkeys(words + chosen)), ", or ".join(dict.fromkeys(ranges))
    return ", ".join(filter(None, text))


def _bare(hint: object) -> object:
    """A type without its bounds."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def in_words(hint: object, many: bool = False) -> str:
    """A type as a reader says it: `whole number`, `list of surgeries`, `stage or path`."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return ("stages or paths" if many else "stage or path") if is_ref(hint) else in_words(parts[0], many)
    if origin in (list, tuple):
        return f"list of {in_words(parts[0], many=True)}"
    if origin is dict:
        return "mapping"
    if isinstance(hint, type) and issubclass(hint, Method):
        kind = hint.kind if not many else f"{hint.kind[:-1]}ies" if hint.kind.endswith("y") else f"{hint.kind}s"
        return f"[{kind}](../methods/{slug(hint.kind)}.md)"
    return _WORDS[hint][many]


def _default(declared: FieldInfo) -> str:
    """A default as a recipe writes it."""
    if declared.is_required():
        return "**required**"
    value = declared.get_default(call_default_factory=True)
    if value is None:
        return ""
    if isinstance(value, list):
        return f"`[{', '.join(item.name if isinstance(item, Method) else str(item) for item in value)}]`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value != "" else "its kind"
