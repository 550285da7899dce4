"""The blocks of text that a page is made of, and which of them belong to what it is about.

`trafilatura` finds where a page's text is, and leaves out parts of it: what stands in a `div` before the first `code`,
notes whose class is `sidebar`, sections whose name has a word that menus have too, all sections but one. So where its
text comes from is looked up by the letters in a row that blocks share with it: the element that holds nine tenths of it
is the article, or one around it that adds sentences and hardly anything else. If less than four fifths of the article
were found whole, all of that is taken, else what it left out of items, definitions, cells and code beside its own text,
and whole sentences; never menus and the like, told by their tags, roles and classes or by links that are a third of
their letters.

Shape letters: N elements in the page's order, the body first.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lxml.html import HtmlElement

Letters = NDArray[np.int64]
BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "br", "caption", "center", "dd", "details", "dialog", "dir",
    "div", "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6",
    "header", "hr", "html", "legend", "li", "main", "menu", "nav", "ol", "p", "pre", "section", "summary", "table",
    "tbody", "td", "tfoot", "th", "thead", "tr", "ul",
}  # fmt: skip
NO_TEXT = {
    "audio", "button", "canvas", "head", "iframe", "math", "noscript", "object", "option", "script", "select",
    "style", "svg", "template", "textarea", "video",
}  # fmt: skip
AROUND = {"aside", "dialog", "footer", "form", "header", "label", "menu", "nav"}  # what stands around an article
ROLES = {
    "alert", "alertdialog", "banner", "complementary", "contentinfo", "dialog", "menu", "menubar", "navigation",
    "search", "tablist", "toolbar",
}  # fmt: skip
_WORDS = (
    r"nav|nav-?bar|\w*navigation|navheader|navfooter|docnav|menu\w*|\w+menu|bread-?crumbs?|pagination|pager|footer"
    r"|cookies?\w*|consent\w*|gdpr|newsletter\w*|subscribe\w*|subscription|social\w*|share\w*|sharing|related\w*"
    r"|recommend\w*|advert\w*|ads?|promo\w*|sponsor\w*|popup|modal|toolbar|skip-?links?|comments?|comment-?list|tags?"
    r"|tag-?list|tagcloud|byline|author|author-?(?:box|info|bio)|meta|toc|headerlink|editsection"
)
_CLASS = re.compile(rf"(?i)(?:^|[\s_-])(?:{_WORDS})(?:$|[\s_-])")
_NAME = re.compile(rf"(?i)(?:{_WORDS})")  # an `id` is often a title's words, so it has to be one of these alone
_SENTENCE = re.compile(r"[.!?:;。！？：…][\"'»”’)\]]*\s*$")
_SIGNS, _BLANKS = re.compile(r"[\W_]+"), re.compile(r"\s+")
# Shares, as above; of a menu whose text is kept nonetheless; of sentences in what is added; of what was found, by which
# it is written from the blocks.
ARTICLE, WHOLE, LINKED, HALF, PROSE, KNOWN = 0.9, 0.8, 0.3, 0.5, 0.8, 0.95
RUN = 8  # letters in a row by which a piece of a paragraph is known
LONG = 80  # letters of a sentence that is taken wherever it stands in the article
ITEMS = ("dd", "dt", "li", "pre", "td", "th")


class Block(NamedTuple):
    """A run of text between two ends of blocks."""

    owner: int  # the element that it stands in
    text: str
    letters: str  # without blanks and signs, as blocks are compared
    linked: int  # letters in links


def letters_of(text: str) -> str:
    """A text without blanks and signs."""
    return _SIGNS.sub("", text)


def body_of(tree: HtmlElement) -> tuple[list[HtmlElement], list[int], list[Block]]:
    """The elements of a page's body with the numbers of their parents, and its blocks of text in order."""
    from lxml.etree import iterwalk

    elements: list[HtmlElement] = []
    parents: list[int] = []
    blocks: list[Block] = []
    within: list[int] = []  # the open elements
    owners: list[int] = []  # of them those that are blocks
    pieces: list[tuple[str, bool]] = []
    links = verbatim = silent = 0

    def put(text: str | None) -> None:
        if text and not silent:
            pieces.append((text if verbatim else _BLANKS.sub(" ", text), links > 0))

    def end_block() -> None:
        text = "".join(piece for piece, _ in pieces)
        if letters := letters_of(text):
            linked = sum(len(letters_of(piece)) for piece, inside in pieces if inside)
            blocks.append(Block(owners[-1] if owners else 0, text.strip("\n" if verbatim else None), letters, linked))
        pieces.clear()

    body = tree.find(".//body")
    for event, element in iterwalk(tree if body is None else body, events=("start", "end")):
        if not isinstance(element.tag, str):
            if event == "end":
                put(element.tail)
            continue
        tag = element.tag
        if event == "start":
            if tag in BLOCKS:
                end_block()
            parents.append(within[-1] if within else -1)
            within.append(len(elements))
            elements.append(element)
            if tag in BLOCKS:
                owners.append(within[-1])
            links += tag == "a" and element.get("href") is not None
            verbatim, silent = verbatim + (tag == "pre"), silent + (tag in NO_TEXT)
            put(element.text)
            continue
        if tag in BLOCKS:
            end_block()
            owners.pop()
        within.pop()
        links -= tag == "a" and element.get("href") is not None
        verbatim, silent = verbatim - (tag == "pre"), silent - (tag in NO_TEXT)
        put(element.tail if within else None)
    end_block()
    return elements, parents, blocks


def around(element: HtmlElement) -> bool:
    """Whether an element says of itself that it stands around an article: a menu, a banner, what is hidden."""
    hidden = element.get("hidden") is not None or element.get("aria-hidden") == "true"
    if element.tag in AROUND or element.get("role") in ROLES or hidden:
        return True
    if "display:none" in (element.get("style") or "").replace(" ", ""):
        return True
    return bool(_CLASS.search(element.get("class") or "") or _NAME.fullmatch(element.get("id") or ""))


def chosen(elements: list[HtmlElement], parents: list[int], blocks: list[Block], text: str) -> list[bool] | None:
    """Which blocks belong to what a page is about, of which `text` was found; None where that text should stay."""
    sought = letters_of(text)
    counts = _kept(blocks, sought)
    kept = [count == len(block.letters) for block, count in zip(blocks, counts, strict=True)]
    size_N, linked_N, kept_N = (np.zeros(len(elements), np.int64) for _ in range(3))
    for block, count in zip(blocks, counts, strict=True):
        size_N[block.owner] += len(block.letters)
        linked_N[block.owner] += block.linked
        kept_N[block.owner] += count
    for number in range(len(elements) - 1, 0, -1):  # what is within counts for what is around
        for sum_N in (size_N, linked_N, kept_N):
            sum_N[parents[number]] += sum_N[number]
    article = int(np.flatnonzero(kept_N >= ARTICLE * kept_N[0])[-1]) if kept_N[0] else 0  # they lie one in another
    menu = [False]
    for number in range(1, len(elements)):
        alien = kept_N[number] < HALF * size_N[number]
        linked = linked_N[number] > LINKED * size_N[number]
        menu.append(menu[parents[number]] or bool(alien and (linked or around(elements[number]))))
    items = {number for number, element in enumerate(elements) if element.tag in ITEMS}
    running = [b for b in blocks if not menu[b.owner] and not items.intersection((b.owner, parents[b.owner]))]
    article = _widened(article, parents, running)
    inside = [article == 0]
    for number in range(1, len(elements)):
        inside.append(inside[parents[number]] or number == article)
    fit = [inside[block.owner] and not menu[block.owner] for block in blocks]
    whole = sum(len(block.letters) for block, there, fits in zip(blocks, kept, fit, strict=True) if there or fits)
    if 2 * whole < len(sought):  # it is from elsewhere, as from the page's JSON
        return None
    if not sought and not any(fits and _is_sentence(block) for block, fits in zip(blocks, fit, strict=True)):
        return None
    known = sum(len(block.letters) for block, there in zip(blocks, kept, strict=True) if there)
    if known >= WHOLE * whole:
        fit = [
            fits and (_is_sentence(block) or _beside(block, elements, parents, kept_N))
            for block, fits in zip(blocks, fit, strict=True)
        ]
    taken = [there or fits for there, fits in zip(kept, fit, strict=True)]
    return None if taken == kept and known < KNOWN * len(sought) else taken


def _widened(article: int, parents: list[int], blocks: list[Block]) -> int:
    """The element around the article of which most of what it has besides is sentences, but for items.

    Of a page in sections the text of one alone may have been found.
    """
    text_N, prose_N = (np.zeros(len(parents), np.int64) for _ in range(2))
    for block in blocks:
        text_N[block.owner] += len(block.letters)
        prose_N[block.owner] += len(block.letters) * _is_sentence(block)
    for number in range(len(parents) - 1, 0, -1):
        for sum_N in (text_N, prose_N):
            sum_N[parents[number]] += sum_N[number]
    widest, around = article, article
    while around:
        around = parents[around]
        text, prose = (int(sum_N[around] - sum_N[article]) for sum_N in (text_N, prose_N))
        if prose > PROSE * text:
            widest = around
    return widest


def _kept(blocks: list[Block], sought: str) -> list[int]:
    """How many letters of each block were found: all of them, or those of the runs of letters that are in `sought`.

    Of a paragraph with `code` in it pieces may be left, joined to one another.
    """
    runs = {sought[start : start + RUN] for start in range(len(sought) - RUN + 1)}
    counts = []
    for block in blocks:
        letters = block.letters
        many = max(0, len(letters) - RUN + 1)
        there = sum(letters[start : start + RUN] in runs for start in range(many))
        counts.append(len(letters) if letters in sought else there)
    return counts


def _is_sentence(block: Block) -> bool:
    return len(block.letters) >= LONG and _SENTENCE.search(block.text) is not None


def _beside(block: Block, elements: list[HtmlElement], parents: list[int], kept_N: Letters) -> bool:
    """Whether a block is an item, or code, near to what is kept."""
    near = parents[parents[block.owner]] if block.owner and parents[block.owner] >= 0 else 0
    return elements[block.owner].tag in ITEMS and kept_N[max(near, 0)] > 0


def written(elements: list[HtmlElement], blocks: list[Block], taken: list[bool]) -> str:
    """The blocks that are taken, a line each; cells of a row in one line."""
    lines: list[str] = []
    row: HtmlElement | None = None
    for block, there in zip(blocks, taken, strict=True):
        if not there:
            continue
        element = elements[block.owner]
        cell = element.getparent() if element.tag in ("td", "th") else None
        if cell is not None and cell is row:
            lines[-1] += f" | {block.text}"
        else:
            lines.append(f"- {block.text}" if element.tag == "li" else block.text)
        row = cell
    return "\n".join(lines)
