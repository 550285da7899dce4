"""Seeded mutators of what others may write: values in trees of JSON or YAML, bytes of files, paths."""

from __future__ import annotations

import copy
import random
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from pretrain.core.errors import PretrainError
from pretrain.core.foreign import texts

SECONDS = 5.0  # within which there is an answer
DEEP: Any = 1
for _ in range(80):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**18, 10**30, 10**400, -(10**5000), 1e9, 1e308, -0.0, 1e-320,
    float("inf"), float("nan"), "", " ", "x", "0", "1e999", "null", "~", "~nosuch", "~nosuch/x", "..", "../..", "/", "/dev/zero",
    "/dev/null", "/proc/self/mem", "x" * 300, "x" * 5000, "/".join("d" * 50 for _ in range(120)), "a\0b", "\ud800", "a\udfffb",
    "\u2028", "\n", "a\nb", "é", "🙂", "<b>", "{x}", "{0.__class__}", "%s", "*", "**/*", "[", "1:2", "2026-01-01", [], {}, [None], [[]],
    [{}], {1: 2}, {"": ""}, {"method": 1}, {"method": "x"}, {"a": {"b": []}}, [1, "x", None], [1] * 500, DEEP, {"x": DEEP},
)  # fmt: skip
PIECES = (
    b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\n", b"\r", b"\r\n", b"\x1a",
    b'"', b"'", b",", b";", b"\t", b"[", b"]", b"{", b"}", b":", b"#", b"&a ", b"*a ", b"!!python/none ", b"!!binary ", b"<<: ",
    b"[" * 3000, b"{" * 300, b"9" * 6000, b"1e999", b"-", b"NaN", b"Infinity", b"null", b"true", b"\xe2\x80\xa8", b"%", b"@", b">",
    b"x" * 70_000, b" " * 5000,
)  # fmt: skip


def places(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where all values of a tree stand, itself included."""
    yield place
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield from places(value, (*place, key))


def changed(rng: random.Random, tree: Any) -> Any:
    """A copy of a tree with one value replaced, removed, repeated, wrapped, added or put elsewhere."""
    tree = copy.deepcopy(tree)
    spots = list(places(tree))[1:]
    if not spots:
        return rng.choice(VALUES)
    place = rng.choice(spots)
    holder = tree
    for step in place[:-1]:
        holder = holder[step]
    key, value = place[-1], copy.deepcopy(rng.choice(VALUES))
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1:
            holder[key] = [holder[key]]
        case 2:
            holder[key] = {"x": holder[key]}
        case 3 if isinstance(holder, dict):
            holder[rng.choice([key, "x", "method", 1, "\ud800", "y" * 300])] = value
        case 4 if isinstance(holder, list):
            holder.append(copy.deepcopy(rng.choice(holder)))
        case 5:
            try:
                holder[key] = repr(holder[key])
            except ValueError:  # a number of too many digits
                holder[key] = "9" * 6000
        case _:
            holder[key] = value
    return tree


def broken(rng: random.Random, data: bytes) -> bytes:
    """Bytes with a bit flipped, an end cut off, a piece put in, taken out, repeated, or another encoding."""
    if not data:
        return rng.choice(PIECES)
    at, end = rng.randrange(len(data)), rng.randrange(len(data))
    match rng.randrange(8):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[: min(at, end)] + data[max(at, end) :]
        case 3:
            return data[:at] + data[min(at, end) : max(at, end)] + data[at:]
        case 4:
            return data[:at] + rng.randbytes(rng.randrange(1, 64)) + data[at:]
        case 5 if rng.random() < 0.3:
            return data.decode("utf-8", "replace").encode(
                rng.choice(["utf-16", "utf-32", "utf-16-le", "utf-8-sig", "latin-1"]), "replace"
            )
        case _:
            return data[:at] + rng.choice(PIECES) + data[at:]


class Tally:
    """What came of many tries: how many were refused by an error of ours, and all that ended in any other way."""

    def __init__(self) -> None:
        self.tried, self.refused, self.failures = 0, 0, []

    def do(self, work: Callable[[], object], what: str) -> None:
        """One try: it succeeds, or ends in an error of ours, of one line, at once."""
        self.tried += 1
        start, wrong = time.process_time(), ""
        try:
            work()
        except PretrainError as error:
            text = str(error)
            self.refused += 1
            if not text.strip() or "\n" in text or len(text) > 5000 or texts.is_broken(text):
                wrong = f"no plain line: {text[:300]!r}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            last = traceback.extract_tb(error.__traceback__)[-6:]
            wrong = f"{type(error).__name__}: {str(error)[:300]!r} at {' '.join(f'{f.filename[-40:]}:{f.lineno}' for f in last)}"
        if (seconds := time.process_time() - start) > SECONDS:
            wrong = wrong or f"{seconds:.1f} seconds"
        if wrong:
            self.failures.append(f"{what}: {wrong}")
            print(self.failures[-1], flush=True)

    def settle(self, kind: str) -> None:
        """Say how it went; fail if any try did."""
        print(f"{kind}: {self.tried} tried, {self.refused} refused, {len(self.failures)} failed", flush=True)
        assert not self.failures, self.failures[:5]
