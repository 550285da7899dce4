"""The page of what is promised, from the marks of the tests that hold it.

`@pytest.mark.promise("Trust", "No pickle is read.")` on a test puts the sentence into a section of the page, with the
test's name. Further tests of the same sentence repeat it, or its beginning. The sections and what they say besides
stand here: where a promise ends is no test's to say. The tests are parsed, not imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from pretrain.core.errors import PretrainError, unknown

MARK = "pytest.mark.promise"
WIDTH = 120


@dataclass(frozen=True)
class Section:
    """A part of the page: what it says before its promises, and after them."""

    name: str
    before: str = ""
    after: str = ""
    level: int = 2


@dataclass(frozen=True)
class Promise:
    """A sentence of a section, and the test that holds it."""

    section: str
    sentence: str
    test: str


SECTIONS = (
    Section(
        "Determinism",
        before="The same recipe and seed on the same machine with the same versions give the same bits.",
        after="It ends where sums are made in another order. Another processor has other kernels (AVX2 or "
        "AVX-512), and so have another version of torch, another GPU and `compile: true`; more threads "
        "(`OMP_NUM_THREADS`) may cut sums otherwise; another number of processes adds gradients in another "
        "order. There the same rows are trained on and losses agree to rounding, not to the bit. A budget "
        "of `seconds` ends where the clock says, so that two runs of it are not the same. GPUs are promised"
        " no bits.",
    ),
    Section(
        "Faults",
        before="What is done is kept, and what is damaged is never used in silence. `tests/faults.py` kills runs "
        "of a recipe of all kinds of stages and damages their files: 20 kills and 60 damages in every run "
        "of the tests, 200 and 500 with `-m long`.",
        after="What nothing reads is not looked at: a damaged checkpoint of a finished stage is found when it is "
        "opened, not by a run that has no need of it. The log of a training that stands still is checked "
        "when the training goes on, and not by a report before. A folder whose `checksums.json` is gone is "
        "taken as one from elsewhere, of which nothing is known. Records of stages and training states of before "
        "hold no seals of folders and no address: whether a whole folder in them is their own is not known. Who "
        "writes a folder, its checksums and the record of its stage anew, all three, is believed.",
    ),
    Section("Trust"),
    Section(
        "The sandbox",
        before="`pretrain.core.sandbox.run` is the one way to run code of a corpus or a model. It needs Linux on "
        "x86-64 or ARM64, and bubblewrap, root or user namespaces.",
        after="It is no virtual machine: a program that breaks the kernel is not kept in.",
        level=3,
    ),
    Section("The lock", level=3),
    Section(
        "What others have written",
        before="Files come in through one room, `pretrain/core/foreign/`, and what is wrong with one is an error "
        "of one line that names it, within 5 seconds.",
    ),
    Section(
        "Memory",
        before="At most, beside the 0.4 GB of Python and the libraries:",
        after="Of the address space and the data (`ulimit -v`, `ulimit -d`) the libraries take 1 GiB and 0.5 GiB. Not "
        "bounded are Arrow, Feather and ORC files, whose record batches are unpacked whole; no text is made of a cell "
        "far beyond `longest`.",
        level=3,
    ),
    Section(
        "Privacy",
        before="Of `dp_sgd`, about one row, as long as nobody knows the recipe's seed:",
        after="The accountants suppose Poisson sampling: each row in each step by a draw of its own. The loader takes "
        "shuffled epochs in batches of one size, as most trainings that call themselves private do, for which "
        "epsilon is what is customary and not a proof. `accountant: edgeworth` (`ew_tune`) is an estimate even "
        "under Poisson sampling; `epsilon_renyi` stands beside it. Rates and whatever else is tuned on the same "
        "rows, the tokenizer and earlier stages are not counted.",
    ),
    Section("Pages"),
    Section("Vocabularies"),
    Section(
        "Serving",
        before="Of `pretrain serve`:",
        after="Each client is not bounded for itself, and there is no TLS: on the internet that is a proxy's work.",
    ),
)


def guarantees_page(tests: Path) -> str:
    """The page, from the marks of the tests in a folder."""
    by_section: dict[str, list[Promise]] = {section.name: [] for section in SECTIONS}
    for promise in promises(tests):
        if promise.section not in by_section:
            raise unknown("section of promises", promise.section, by_section)
        by_section[promise.section].append(promise)
    lines = ["<!-- Made by `make docs` from the tests; edit those, or pretrain/docs/guarantees.py. -->\n"]
    lines += ["# What is promised\n", "Each sentence names the tests that hold it.\n"]
    for section in SECTIONS:
        lines.append(f"{'#' * section.level} {section.name}\n")
        lines += [fill(section.before, WIDTH, break_on_hyphens=False) + "\n"] if section.before else []
        lines += ["\n".join(_item(*row) for row in held(by_section[section.name]).items()) + "\n"]
        lines += [fill(section.after, WIDTH, break_on_hyphens=False) + "\n"] if section.after else []
    return "\n".join(lines).rstrip() + "\n"


def _item(sentence: str, tests: list[str]) -> str:
    names = ", ".join(f"`{test}`" for test in tests)
    text = f"- {sentence.rstrip('.')} ({names})."
    return fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def held(promised: list[Promise]) -> dict[str, list[str]]:
    """Sentence -> the tests that hold it: those that say it, or its beginning."""
    sentences = list(dict.fromkeys(promise.sentence for promise in promised))
    whole = [text for text in sentences if not any(t != text and t.startswith(text) for t in sentences)]
    return {text: [p.test for p in promised if text.startswith(p.sentence)] for text in whole}


def promises(tests: Path) -> list[Promise]:
    """What the tests of a folder promise, by file and line."""
    return [promise for path in sorted(tests.glob("test_*.py")) for promise in _of_file(path)]


def _of_file(path: Path) -> Iterator[Promise]:
    text = path.read_text(encoding="utf-8")
    if MARK not in text:
        return
    functions = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
    for node in functions:
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == MARK:
                words = [str(ast.literal_eval(argument)) for argument in mark.args]
                if len(words) != 2 or not all(words) or not node.name.startswith("test_"):
                    raise PretrainError(f"{path.name}:{mark.lineno}: accepted: a section and a sentence, on a test")
                yield Promise(words[0], words[1], f"{path.name}::{node.name}")
