"""`docs/support.md`: which method works on which model type, by the record of `tests/support.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from pretrain.core.files import read_json
from pretrain.core.quick.table import FAMILIES
from pretrain.core.registry import methods
from pretrain.docs.tables import slug

INTRO = """\
# Model types, and the methods that work on them

The families of the table ({listed}) are what every method is built and tested on. Any other type of `transformers` is
asked itself: how several documents can share its rows, what its logits follow from, where its blocks and their linear
layers are. {types} further types, each made tiny from its own configuration, were put through all {methods} objectives,
evaluations, surgeries and decoding methods; a method that is not for a type says so in one line. `{record}`
holds each pair. A layer that a model does not call (experts whose weights are one tensor, most of a state-space mixer)
is no linear layer here, and stays as it is. Two real checkpoints with their own tokenizers, all-MiniLM-L6-v2 (bert,
22.7 million weights) and SmolLM2-135M-Instruct (llama), go through every one of these methods by `make test-real`. Data
operations, optimisers, schedules and policies ask nothing of a type.

| kind | types |
|---|---|
"""
NAMES = {"causal": "causal", "masked": "masked", "seq2seq": "encoder-decoder"}


def support_page(record: Path) -> str:
    """The page, of `docs/support.json`."""
    table: dict[str, dict[str, object]] = read_json(record)
    kinds: dict[str, list[str]] = defaultdict(list)
    works: dict[str, set[str]] = defaultdict(set)
    for name, row in sorted(table.items()):
        kinds[str(row["kind"])].append(name)
        assert isinstance(row["works"], list)
        for method in row["works"]:
            works[method].add(name)
    listed = ", ".join(name for entry in FAMILIES for name in entry.types)
    tried = {method for row in table.values() for side in ("works", "refused") for method in _names(row[side])}
    text = INTRO.format(listed=listed, types=len(table), methods=len(tried), record="docs/support.json")
    text += "".join(f"| {NAMES[kind]} ({len(kinds[kind])}) | {', '.join(kinds[kind])} |\n" for kind in NAMES)
    groups: dict[tuple[str, frozenset[str]], list[str]] = defaultdict(list)
    known = methods()
    for method in sorted(tried & known.keys()):
        groups[known[method].kind, frozenset(works[method])].append(method)
    text += "\n| methods | work on |\n|---|---|\n"
    for (kind, types), names in sorted(groups.items(), key=lambda item: (-len(item[0][1]), item[0][0], item[1])):
        cells = ", ".join(f"[{name}](methods/{slug(kind)}.md#{name})" for name in names)
        text += f"| {cells} | {_words(types, kinds)} |\n"
    return text


def _names(value: object) -> Iterable[str]:
    assert isinstance(value, list)
    return value


def _words(types: frozenset[str], kinds: Mapping[str, list[str]]) -> str:
    """`all causal; masked: esm`, or what is missing where that is shorter."""
    parts = []
    for kind, every in kinds.items():
        have = [name for name in every if name in types]
        lack = [name for name in every if name not in types]
        if have and not lack:
            parts.append(f"all {NAMES[kind]}")
        elif have and len(lack) < len(have):
            parts.append(f"all {NAMES[kind]} but {', '.join(lack)}")
        elif have:
            parts.append(f"{NAMES[kind]}: {', '.join(have)}")
    return "; ".join(parts) or "those of the table alone"
