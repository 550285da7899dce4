r"""Words as the filters count them: letters and digits with what joins them, `don't`, `3.14`, and signs on their own.

Where a script has no spaces between words each character counts as one. Vowels and accents that are written as marks
after a letter, as in Devanagari, belong to its word.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from pretrain.corpus.copies.minhash import UNSPACED

_JOINED, _SIGNS = "[.'’@:/]", r"--+|==+|\.\.+|[^\w\s]"
_PLAIN = re.compile(rf"\w+(?:{_JOINED}+\w+)*|{_SIGNS}")
_LETTER, _UNSPACED = re.compile(r"[^\W\d_]"), re.compile(f"[{UNSPACED}]")


def words(text: str) -> list[str]:
    """The words of a text, in order, signs among them."""
    if text.isascii():
        return _PLAIN.findall(text)
    if _UNSPACED.search(text):
        text = _UNSPACED.sub(r" \g<0> ", text)
    mark, marked = _marks()
    return (marked if mark.search(text) else _PLAIN).findall(text)


def is_unspaced(text: str) -> bool:
    """Whether most letters are of scripts without spaces between words, of which rules about words say nothing."""
    if text.isascii():
        return False
    characters = len(_UNSPACED.findall(text))
    return bool(characters) and 2 * characters > len(_LETTER.findall(text))


@cache
def _marks() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What finds Unicode's marks, and words with them; what joins or parts letters without being seen is among them."""
    every = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c)[0] == "M") + "\u200c\u200d"
    part = rf"[\w{every}]+"
    return re.compile(f"[{every}]"), re.compile(rf"{part}(?:{_JOINED}+{part})*|{_SIGNS}")
