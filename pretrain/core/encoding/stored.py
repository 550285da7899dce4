"""What a tokenizer that others have made may hold: the text that it works on does not grow without end.

Tokenizers work inside this process, where nothing bounds them from outside; so their steps are looked at before. A step
may put many characters where one was (`Replace`, `Prepend`, …), and the steps after it do so with each of these. From
the last step back to the first, `growth` holds how many characters each character may become from there on.

Unicode's own forms lengthen a character at most 18 times (U+FDFA), and hardly any; one after another they do it once.
So of the rows of them between other steps the longest counts for nothing, and each other for what it lengthens at most.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from math import prod
from pathlib import Path
from typing import TypeAlias

from pretrain.core.errors import PretrainError, brief
from pretrain.core.files import read_object
from pretrain.core.foreign import json

MOST = 1000  # characters that one may become
STEPS = 1000
LONGEST = 10_000  # characters of a token
FILE = "tokenizer.json"
PARTS = ("normalizer", "pre_tokenizer", "decoder", "post_processor")
LISTS = ("normalizers", "pretokenizers", "decoders", "processors")  # of those that are a sequence
FORMS = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 2, "StripAccents": 1, "Nmt": 1}
TIMES = {
    "BertNormalizer": 3,
    "ByteLevel": 5,
    "WordPiece": 3,
    "CTC": 3,
    "BPEDecoder": 3,
}  # at most, with marks around it
# A regular expression that surely matches no empty text: no alternatives, and it begins with what must be there.
_ATOM = r"(?:[^\\\[\](){}|*+?^$]|\\[^\w]|\\[sSdDwWhHnrt]|\\[pP]\{\^?\w+\}|\[\^?(?:[^\]\[\\&]|\\.)+\])"
_SOLID = re.compile(rf"{_ATOM}(?:\+|\{{[1-9]\d*,?\d*\}})?(?![*?{{+])(?:[^|\\]|\\[^K])*", re.DOTALL)

Step: TypeAlias = Mapping[str, object]


def check_stored(folder: Path) -> None:
    """Refuse a folder's `tokenizer.json` by which a text grows without end, or in which a number is of two tokens."""
    path = folder / FILE
    if path.is_file():
        facts = path.stat()
        _check_file(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=8)
def _check_file(path: Path, _: int, __: int) -> None:
    state = read_object(path)
    check_state(path, state)
    _check_vocabulary(path, state)


def check_opened(folder: Path, tokenizer: object) -> None:
    """`check_stored` of the steps of an open tokenizer, whatever files they come from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {name: getattr(backend, name, None) for name in PARTS}
    state = {name: json.loads(part.__getstate__().decode()) for name, part in parts.items() if part is not None}
    check_state(folder, state)


def check_state(path: Path, state: Step) -> None:
    """Refuse steps that make more than `MOST` characters of one, or tokens of one; and more than `STEPS` of them."""
    steps = {name: list(_flat(state.get(name))) for name in PARTS}
    for name, each in steps.items():
        if len(each) > STEPS:
            raise PretrainError(f"{path}: {name} has {len(each):,} steps; accepted: at most {STEPS:,}")
    model = _mapping(state.get("model"))
    affixes = [str(model.get(name) or "") for name in ("continuing_subword_prefix", "end_of_word_suffix")]
    for name, lengthened in (
        ("normalizer", growth(steps["normalizer"])),
        ("pre_tokenizer", growth([*steps["normalizer"], *steps["pre_tokenizer"]])),
        ("model", 1.0 + sum(map(len, affixes))),
        ("decoder", growth(steps["decoder"])),
        ("post_processor", _framing(steps["post_processor"])),
    ):
        if not lengthened <= MOST:
            unit = "tokens" if name == "post_processor" else "characters"
            raise PretrainError(f"{path}: {name} makes {lengthened:.3g} {unit} of one; accepted: at most {MOST:,}")


def growth(steps: Sequence[Step]) -> float:
    """The most characters that one character of a text becomes, from the first of the steps to the last."""
    each: dict[str, float] = {}  # what becomes of a character from here on, and of `rest`, all others
    rest = 1.0
    forms = [1]  # how much each row of them lengthens

    def weigh(text: str) -> float:
        return sum(each.get(character, rest) for character in text)

    for step in reversed(steps):
        kind, most = str(step.get("type")), max([rest, *each.values()])
        forms = [*forms[:-1], max(forms[-1], FORMS[kind])] if kind in FORMS else [*forms, 1] if forms[-1] > 1 else forms
        match kind:
            case "Replace":
                content, pattern = str(step.get("content", "")), _mapping(step.get("pattern"))
                made, text = weigh(content), pattern.get("String")
                if isinstance(text, str) and text:
                    each |= {c: max(each.get(c, rest), made / len(text)) for c in text}
                elif _SOLID.fullmatch(str(pattern.get("Regex", ""))):
                    rest, each = max(rest, made), {c: max(weight, made) for c, weight in each.items()}
                else:  # it may match nothing, before and after each character
                    rest, each = rest + 2 * made, {c: weight + 2 * made for c, weight in each.items()}
            case "Prepend" | "Metaspace":
                mark = str(step.get("prepend", step.get("replacement", "")))
                made = weigh(mark)
                rest, each = rest + made, {c: weight + made for c, weight in each.items()}
                if kind == "Metaspace":  # which stands for spaces too
                    each[" "] = max(each.get(" ", rest), 2 * made)
            case "Precompiled":
                made = max(map(weigh, _replacements(step)), default=0.0)
                rest, each = max(most, made), {}
            case _ if kind in FORMS or kind in TIMES:
                rest, each = most * TIMES.get(kind, 1), {}
    return max([rest, *each.values()]) * prod(map(float, sorted(forms)[:-1]))


def _replacements(step: Step) -> Iterator[str]:
    """What a `Precompiled` normalizer puts for characters: after the length of its index and this, between zeros."""
    try:
        data = base64.b64decode(str(step.get("precompiled_charsmap", "")))
    except (binascii.Error, ValueError):
        return
    start = 4 + int.from_bytes(data[:4], "little")
    yield from (text.decode(errors="replace") for text in data[start:].split(b"\0"))


def _framing(steps: Sequence[Step]) -> float:
    """How many tokens become of one, with those that a template puts around."""
    total = 1.0
    for step in steps:
        known = {name: _mapping(each).get("ids") for name, each in _mapping(step.get("special_tokens")).items()}
        longest = 0
        for name in ("single", "pair"):
            pieces = step.get(name)
            marks = [_mapping(_mapping(piece).get("SpecialToken")).get("id") for piece in _list(pieces)]
            longest = max(longest, sum(1 if mark is None else len(_list(known.get(str(mark)))) for mark in marks))
        total *= max(longest, 1)
    return total


def _flat(part: object) -> Iterator[Step]:
    """The steps of a part, those of sequences within it one after another."""
    waiting = [part]
    while waiting:
        step = _mapping(waiting.pop())
        inner = list(chain.from_iterable(_list(step.get(name)) for name in LISTS))
        if step and not inner:
            yield step
        waiting += reversed(inner)


def _mapping(value: object) -> Step:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _check_vocabulary(path: Path, state: Step) -> None:
    """Refuse a vocabulary without tokens, with one that is too long, or with two under a number."""
    model = _mapping(state.get("model"))
    vocabulary, added = model.get("vocab"), [_mapping(entry) for entry in _list(state.get("added_tokens"))]
    if isinstance(vocabulary, list):  # a Unigram model's, with their scores
        entries = [entry[0] for entry in vocabulary if isinstance(entry, list) and entry]
        numbers: dict[str, object] = {str(token): number for number, token in enumerate(entries)}
    else:
        numbers = dict(_mapping(vocabulary))
    if not numbers and all(entry.get("special") for entry in added):
        raise PretrainError(f"{path}: model.vocab is empty; accepted: one with a token at least")
    long = next((name for name in chain(numbers, map(_content, added)) if len(name) > LONGEST), None)
    if long is not None:
        raise PretrainError(f"{path}: a token of {len(long):,} characters; accepted: at most {LONGEST:,}")
    if len(set(map(str, numbers.values()))) < len(numbers):
        names: dict[str, str] = {}
        for name, number in numbers.items():
            if (other := names.setdefault(str(number), name)) != name:
                raise PretrainError(
                    f"{path}: model.vocab: token {number} is both {brief(other)} and {brief(name)}; "
                    "accepted: a number of its own for each token"
                )
    for entry in added:
        number = numbers.get(_content(entry), entry.get("id"))
        if entry.get("id") != number:
            raise PretrainError(
                f"{path}: added_tokens: {brief(_content(entry))} is token {brief(entry.get('id'))}, "
                f"and token {brief(number)} in model.vocab; accepted: the same in both"
            )


def _content(entry: Step) -> str:
    return str(entry.get("content", ""))
