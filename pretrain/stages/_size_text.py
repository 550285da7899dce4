"""What is known of the text that a size is chosen for, before its corpus is made."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.quick.quantities import short
from pretrain.stages._estimates import left_in

Raw = dict[str, object]  # a recipe as it is read, or a stage of it
LIKE_PYTHON = "text like Python's library"  # what a law of it is of, where another corpus is learnt
LEAST_TEXT = 500  # bytes: of less nothing can be learnt and held out


def text_of(entry: Raw, before: list[Raw]) -> str:
    """The text that the expectation of a training's loss is of: what its law was measured on."""
    size = entry["size"]
    if isinstance(size, dict):
        return f"the text that {size['law']} was measured on"
    name = entry.get("corpus")
    while corpus := next((e for e in before if e.get("name", e.get("stage")) == name), None):
        sources, name = corpus.get("sources"), corpus.get("corpus")
        if sources or name is None:
            alike = isinstance(sources, list) and all(isinstance(s, dict) and s.get("stdlib") for s in sources)
            return "Python's library" if alike and sources and name is None else LIKE_PYTHON
        before = before[: before.index(corpus)]
    return LIKE_PYTHON


def basis_of(entry: Raw, before: list[Raw], unique: float | None) -> str:
    """What the size goes by, where its budget is passes over text of which operations are still to leave some out."""
    budget = entry.get("budget")
    lists = [found for corpus in behind(entry, before) if isinstance(found := corpus.get("operations"), list)]
    named = [str(each.get("method") if isinstance(each, dict) else each) for found in lists for each in found]
    if unique is None or not named or not isinstance(budget, dict) or "epochs" not in budget:
        return ""
    return (
        f"the size is chosen for {short(unique, 'B')} of training text a pass, all that the sources hold; how much "
        f"of it {', '.join(dict.fromkeys(named))} will leave is not known before the corpus is made"
    )


def behind(entry: Raw, before: list[Raw]) -> Iterator[Raw]:
    """The data stage that a stage reads, and those that it goes on from."""
    corpus = next((e for e in before if e.get("name", e.get("stage")) == entry.get("corpus")), None)
    if corpus is not None:
        yield corpus
        yield from behind(corpus, before[: before.index(corpus)])


def unique_text(entry: Raw, before: list[Raw]) -> float | None:
    """Bytes of training text, as the sources' sizes tell; None where they do not."""
    from pretrain.stages.data import Data, build_source

    corpus = next((e for e in before if e.get("name", e.get("stage")) == entry.get("corpus")), None)
    if corpus is None or corpus.get("stage") != "data":
        return left_in(Path(str(entry.get("corpus")))).bytes.get("train")
    again = (
        unique_text(corpus, before[: before.index(corpus)]) if corpus.get("corpus") else 0.0
    )  # of what it goes on from
    if again is None or not corpus.get("sources"):
        return again or None
    sizes = []
    try:
        sources = corpus.get("sources")
        for number, source in enumerate(sources if isinstance(sources, list) else []):
            try:
                sizes.append(build_source(copy.deepcopy(source)).size())
            except PretrainError as error:
                place = ("stages", before.index(corpus), "sources", number, *error.place)
                raise PretrainError(str(error), place=place) from error
        shares = [corpus.get(split, Data.model_fields[split].default) for split in ("validation", "test")]
        held_out = math.fsum(float(str(share)) for share in shares)
    except (ValueError, TypeError):  # told when the stage itself is checked
        return None
    known = [size.bytes for size in sizes if size is not None]
    whole = sizes and len(known) == len(sizes) and held_out < 1
    return again + math.fsum(known) * (1 - held_out) if whole else None


def not_there(entry: Mapping[str, object], before: Sequence[Raw]) -> float:
    """Refuse passes over text of an unknown size; a corpus that is not there at all is told of as a reference is."""
    corpus = str(entry.get("corpus"))
    if all(e.get("name", e.get("stage")) != corpus for e in before) and not Path(corpus).exists():
        return LEAST_TEXT
    raise PretrainError(
        f"budget of epochs: how much text {corpus!r} holds is not known before it is made, and so not which size fits; "
        "accepted: a budget of tokens, FLOPs or seconds, or the path of a corpus that is made",
        place=("budget",),
    )
