"""What generators have answered, kept in files that are only appended to, so that nothing is asked twice.

An answer goes by the digest of all that decides it: the prompt, the generator, its settings. A process writes a file of
its own and reads those of others; a line that is damaged or half-written is an answer that is not there. In memory are
16 bytes an answer, whatever it says.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pretrain.core.errors import PretrainError
from pretrain.core.files import SEAL, sealed
from pretrain.core.foreign import json as foreign
from pretrain.core.foreign.reading import open_append, open_file
from pretrain.data._work import Desk

EVERY = 1.0  # seconds in which answers that come one by one are gathered
MOST = 8 << 20  # bytes of a line
MERGED = 1 << 16  # answers of this process that the index is told of at once
FILES = 16  # bits that number the files that are read
HEX = 16  # digits of a key that the index tells apart; the whole key stands in the line
FOLDER, DESK = ".generated", "work"
_BEGIN, _MIDDLE = b'{"of": "', 8  # of a line, and where its key stands


@dataclass(frozen=True)
class Answer:
    """What a generator says to a prompt, and what it took; `flops` are 0 of a server, whose work nobody sees."""

    text: str
    finished: bool = True  # by itself, and not for want of tokens
    prompt_tokens: int = 0
    new_tokens: int = 0
    flops: int = 0
    fits: bool = True  # whether the prompt did, into what the generator can read


def folder_of(here: Desk) -> Path:
    """Where answers are kept: beside the stages of a run, which share them; at the desk itself where no stage runs."""
    in_stage = here.folder.name == DESK  # as the data stage opens it: STORE/STAGE/work
    return here.folder.parent.parent / FOLDER if in_stage else here.folder / FOLDER


class Answers:
    """The answers of one generator with one set of settings, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._new: dict[str, Answer] = {}  # those of this process that are not on disk yet
        self._written: dict[int, int] = {}  # by the beginning of the key, where those of this process stand
        self._file: Path | None = None  # of this process
        self._flushed = time.monotonic()
        self._paths = sorted(self.folder.glob("*.jsonl"))[: (1 << FILES) - 1]
        self._key_N = self._place_N = np.zeros(0, np.uint64)
        for number, path in enumerate(self._paths):
            self._index(array("Q", (each for line in _lines(path) for each in line)), number)

    def _index(self, lines: array[int], number: int) -> None:
        """Take in where lines of a file stand: the beginning of a key, its place, and so on."""
        line_N2 = np.array(lines, np.uint64).reshape(-1, 2)
        key_N = np.concatenate([self._key_N, line_N2[:, 0]])
        place_N = np.concatenate([self._place_N, line_N2[:, 1] << np.uint64(FILES) | np.uint64(number)])
        order = np.argsort(key_N, kind="stable")
        self._key_N, self._place_N = key_N[order], place_N[order]

    def get(self, key: str) -> Answer | None:
        """The answer of a key (64 hexadecimal digits); None where there is none that is whole."""
        if key in self._new:
            return self._new[key]
        short = int(key[:HEX], 16)
        if short in self._written and self._file is not None:
            return _read(self._file, self._written[short], key)
        first, last = (int(np.searchsorted(self._key_N, np.uint64(short), side)) for side in ("left", "right"))
        for place in self._place_N[first:last].tolist():
            answer = _read(self._paths[place & ((1 << FILES) - 1)], place >> FILES, key)
            if answer is not None:
                return answer
        return None

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Keep more answers, by their keys; they are on disk within a second or so, or after the next `flush`."""
        self._new |= answers
        if time.monotonic() - self._flushed > EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what is new to the disk, in one go."""
        self._flushed = time.monotonic()
        if not self._new:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self._file or self.folder / f"{os.getpid()}-{secrets.token_hex(4)}.jsonl"
            with open_append(self._file) as file:
                for key, answer in self._new.items():
                    line = json.dumps(sealed({"of": key, **asdict(answer)})).encode() + b"\n"
                    self._written[int(key[:HEX], 16)] = file.tell()
                    file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise PretrainError(f"cannot write {self.folder}: {error.strerror or error}") from error
        self._new.clear()
        if len(self._written) >= MERGED:
            if self._file not in self._paths:
                self._paths.append(self._file)
            lines = array("Q", (each for line in self._written.items() for each in line))
            self._index(lines, self._paths.index(self._file))
            self._written.clear()


def _lines(path: Path) -> Iterator[tuple[int, int]]:
    """The beginning of each key and where its line begins."""
    with open_file(path) as file:
        place = 0
        while line := file.readline(MOST):
            if line.startswith(_BEGIN) and line.endswith(b"\n"):
                with suppress(ValueError):  # of a damaged line
                    yield int(line[_MIDDLE : _MIDDLE + HEX], 16), place
            place += len(line)


def _read(path: Path, place: int, key: str) -> Answer | None:
    """The answer that a line at a place holds, if it is that of the key and as it was written."""
    try:
        with open_file(path) as file:
            file.seek(place)
            row = foreign.loads(file.readline(MOST).decode())
        seal = row.pop(SEAL)
        whole = seal == sealed(row)[SEAL] and row.pop("of") == key
        return Answer(**row) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
