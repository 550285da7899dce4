"""Manual pages as plain text."""

from __future__ import annotations

import re

_ESCAPES = (
    (r"\\f[A-Z]|\\f\(..|\\s[+-]?\d|\\[&/,|^:]", ""),
    (r"\\-|\\\(hy|\\\(mi", "-"),
    (r"\\\(bu", "*"),
    (r"\\e", r"\\"),
    (r"\\\(aq|\\\(oq|\\\(cq", "'"),
    (r"\\\(lq|\\\(rq|\\\(dq", '"'),
    (r"\\\(em", "--"),
    (r"\\ |\\~", " "),
)
_DROPPED = {"TH", "Dd", "Os", "so", "de", "ds", "nr", "if", "ie", "el", "ft", "ad", "hy", "hla", "hpf", "ne", "ta"}
_PARAGRAPHS = {"PP", "P", "LP", "TP", "IP", "Pp", "sp"}
_LAYOUT = {"TP", "RS", "RE", "nf", "fi", "in", "br", "PD", "sp"}


def unroff(text: str) -> str:
    """Manual-page markup as plain text: sections and paragraphs kept, requests and font changes dropped."""
    lines: list[str] = []
    for raw in text.splitlines():
        line = raw
        if line.startswith((".", "'")):
            request, _, rest = line[1:].strip().partition(" ")
            if request.startswith("\\") or request in _DROPPED:
                continue
            lines += ["", ""] if request in ("SH", "SS", "Sh", "Ss") else [""] if request in _PARAGRAPHS else []
            line = "" if request in _LAYOUT else rest.replace('"', "")
            if not line:
                continue
        for pattern, plain in _ESCAPES:
            line = re.sub(pattern, plain, line)
        lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
