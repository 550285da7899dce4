"""A text's sentences, by the marks that end them in any language."""

from __future__ import annotations

import regex

_SENTENCE = regex.compile(r"""[.!?…]+["'”’»)\]]*\s+|[。！？]+["'”’»)\]]*\s*|\n\s*""")


def sentences(text: str) -> list[str]:
    """A text's sentences with the blanks after them; a line ends one too. Together they are the text."""
    ends = [match.end() for match in _SENTENCE.finditer(text)]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True) if end > start]
