"""Pages of HTML: their characters, and the text that a page is about, by `trafilatura`."""

from __future__ import annotations

import codecs
import logging
import re

from pretrain.core.foreign import texts
from pretrain.core.system.extras import extras_named

NAMED = re.compile(rb"""(?i)<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]{1,40})""")
HEAD = 4096  # bytes in which a page names its encoding
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


def main_text(page: str) -> str:
    """The text that a page is about, without menus, footers and advertisements; empty where there is none.

    Raises whatever `trafilatura` and the parser below it raise.
    """
    with extras_named():
        import trafilatura
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # of each page without a text it tells another line
    return trafilatura.extract(page, include_comments=False, with_metadata=False) or ""
