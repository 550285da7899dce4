"""Pages of HTML: their characters, and the text that a page is about, by `trafilatura`."""

from __future__ import annotations

import codecs
import logging
import re
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from pretrain.core.foreign import texts
from pretrain.core.foreign.documents import blocks
from pretrain.core.system.extras import extras_named

if TYPE_CHECKING:
    from lxml.html import HtmlElement

NAMED = re.compile(rb"""(?i)<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]{1,40})""")
HEAD = 4096  # bytes in which a page names its encoding
SHORT = 100_000  # characters of a page that is remembered
# What browsers read under these names, by the WHATWG's Encoding Standard.
READ_AS = {"iso8859-1": "cp1252", "ascii": "cp1252", "iso8859-9": "cp1254", "gb2312": "gb18030", "gbk": "gb18030"}


def encoding_of(data: bytes, declared: str | None = None) -> str:
    """The encoding of a page: by its byte-order mark, what its sender declared, what it names itself; else UTF-8."""
    if texts.marked(data[:4]):
        return texts.encoding_of(data[:4])
    match = NAMED.search(data[:HEAD])
    for name in (declared, match[1].decode("ascii") if match else None):
        try:
            known = codecs.lookup(name.strip("\"' ")).name if name else ""
        except (LookupError, ValueError):
            continue
        if known and not known.startswith("utf-16"):  # a page that could be read so far is in no UTF-16
            return READ_AS.get(known, known)
    return "utf-8"


class Page(NamedTuple):
    """The text of a page, and the letters of all its text and of what of that was taken."""

    text: str
    letters: int
    taken: int


def parsed(page: str) -> HtmlElement | None:
    """The elements of a page; None where it has none."""
    with extras_named():
        import trafilatura
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # of each page without a text it tells another line
    return trafilatura.load_html(page)


def main_text(page: str) -> Page:
    """The text that a page is about, without menus, footers and advertisements; empty where there is none.

    `trafilatura` finds it, and what that leaves out of the article is taken as `blocks` tells. Raises whatever it and
    the parser below it raise.
    """
    return _remembered(page) if len(page) <= SHORT else _main_text(page)


@lru_cache(maxsize=128)
def _remembered(page: str) -> Page:
    """Of the pages that were last read: what is planned looks at the same ones more than once."""
    return _main_text(page)


def _main_text(page: str) -> Page:
    tree = parsed(page)
    if tree is None:
        return Page("", 0, 0)
    import trafilatura

    text = trafilatura.extract(tree, include_comments=False, with_metadata=False) or ""
    elements, parents, pieces = blocks.body_of(tree)
    taken = blocks.chosen(elements, parents, pieces, text) if pieces else None
    text = text if taken is None else blocks.written(elements, pieces, taken)
    letters, kept = sum(len(block.letters) for block in pieces), len(blocks.letters_of(text))
    return Page(text, max(letters, kept), kept)
