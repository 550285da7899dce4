"""What nobody wants a model to learn of a folder of files: keys and passwords, and what a program has written.

Both are told by what is likely, not by proof: what is left out for it is named, and a source's fields take it in.
"""

from __future__ import annotations

import re
import string
from fnmatch import fnmatchcase

# By a word that such a key always has, which is looked for first, since that is quick.
KEYS = {
    "PRIVATE KEY": r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----",
    "AKIA": r"\bAKIA[0-9A-Z]{16}\b",
    "ASIA": r"\bASIA[0-9A-Z]{16}\b",
    "ghp_": r"\bghp_[A-Za-z0-9]{30,}", "gho_": r"\bgho_[A-Za-z0-9]{30,}", "ghs_": r"\bghs_[A-Za-z0-9]{30,}",
    "github_pat_": r"\bgithub_pat_[A-Za-z0-9_]{30,}",
    "glpat-": r"\bglpat-[\w-]{20,}",
    "xox": r"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "AIza": r"\bAIza[\w-]{35}\b",
    "sk_live_": r"\bsk_live_[A-Za-z0-9]{20,}", "sk-": r"\bsk-[A-Za-z0-9_-]{32,}",
    "hf_": r"\bhf_[A-Za-z0-9]{30,}",
    "npm_": r"\bnpm_[A-Za-z0-9]{36}\b",
    "pypi-": r"\bpypi-AgEIcHlwaS5vcmc[\w-]{20,}",
}  # fmt: skip
NAMES = ("password", "passwd", "secret", "token", "api_key", "apikey", "api-key", "access_key", "pwd")
# In pieces without backtracking, so that no text takes longer than its length: a word, a sign, and what follows.
ASSIGNED = re.compile(r"""(?<![\w-])(?P<word>[\w-]++)["']?(?P<sign>[ \t]*+[=:][ \t]*+)""")
WORD = string.ascii_letters + string.digits + "_-"
SECRET = re.compile(r"(?i)password|passwd|pwd|secret|token|api[_-]?key|access[_-]?key")
QUOTED = re.compile(r"""(["'])(?P<value>[^"'\s]{7,}+)\1""")
BARE = re.compile(r"""(?P<value>[^\s"'`(){}\[\]<>,;\#]++)(?P<last>[ \t\r]*+$)?""", re.MULTILINE)
# Of values that stand for a password, or are made by a program.
PLACEHOLDERS = re.compile(
    r"(?i)example|sample|dummy|fake|test|secret|passw|changeme|change_me|placeholder|your|foo|bar|1234|xxx|\*\*|[<>${}%()]"
    r"|\w\.\w|^https?:|/|^\d*\*[a-z]"  # the last: a rule of a grammar, 1*ALPHA
)

GENERATED = (
    "*.min.js", "*.min.css", "*.min.mjs", "*.bundle.js", "*.chunk.js", "*.js.map", "*.css.map", "*.lock", "*-lock.json",
    "*-lock.yaml", "*.lockb", "npm-shrinkwrap.json", "go.sum", "requirements.lock", "*_pb2.py", "*_pb2_grpc.py",
    "*_pb2.pyi", "*.pb.go", "*.pb.cc", "*.pb.h", "*.designer.cs", "*.g.cs", "*.g.dart", "*.freezed.dart",
    "*.generated.*", "*.snap",
)  # fmt: skip
PACKED_CODE = (".js", ".mjs", ".cjs", ".jsx", ".ts", ".tsx", ".css", ".json", ".svg", ".py", ".c", ".h", ".php")
MEAN_LINE, LONGEST_LINE = 400, 20_000  # letters: more are a program's work
MARKS = re.compile(
    r"(?i)@generated\b|code generated .{0,80}do not edit"
    r"|(?:auto-?|automatically )generated .{0,60}(?:do not|don't) (?:edit|modify|change)"
)
HEAD = 1000  # letters in which a file says that a program has written it


def key_in(text: str) -> str | None:
    """What looks like a key or a password in a text, as `line 3: AKIA…`; None where nothing does."""
    for word, pattern in KEYS.items():
        if word in text and (match := re.search(pattern, text)):
            shown = "a private key" if word == "PRIVATE KEY" else f"{match[0][:6]}…"
            return f"line {_line(text, match.start())}: {shown}"
    small = text.lower()
    if any(name in small for name in NAMES):
        place = 0
        while match := ASSIGNED.search(text, place):
            place = match.end()
            if not (at := SECRET.search(match["word"])):
                continue
            quoted, bare = QUOTED.match(text, place), BARE.match(text, place)
            ended = quoted or (bare if bare and bare["last"] is not None else None)
            if ended is None:
                rest = bare["value"] if bare else ""  # whose last word may have a value of its own
                place += len(rest[: len(rest) - rest.endswith(("=", ":"))].rstrip(WORD))
                continue
            place, value = ended.end(), ended["value"]
            named = not quoted and len(match["sign"]) > 1  # `password = variable`
            if len(value) >= 7 and _is_password(value, named):
                shown = match["word"][at.start() :][:20]
                return f"line {_line(text, match.start())}: {shown}=…"
    return None


def _is_password(value: str, named: bool) -> bool:
    """Letters and digits, and nothing that says it is none; `named` may be the name of a variable."""
    mixed = re.search(r"[A-Za-z]", value) and re.search(r"\d", value)
    other = r"[A-Za-z_]\w*|0x[0-9a-f]+" if named else "0x[0-9a-f]+"
    return bool(mixed) and not PLACEHOLDERS.search(value) and not re.fullmatch(other, value)


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def is_generated(name: str) -> bool:
    """Whether a file's name is one of what programs write: minified, lock files, of protocol compilers."""
    small = name.lower()
    return any(fnmatchcase(small, pattern) for pattern in GENERATED)


def looks_generated(text: str, ending: str) -> str | None:
    """Why a text looks written by a program; `ending` is its file's."""
    if ending in PACKED_CODE:
        lines = text.count("\n") + 1
        if len(text) / lines > MEAN_LINE or max(map(len, text.split("\n"))) > LONGEST_LINE:
            return "very long lines"
    return "generated" if MARKS.search(text[:HEAD]) else None
