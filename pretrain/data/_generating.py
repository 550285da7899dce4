"""Operations that have texts written: what they ask of whom, what of the answers they use, and what becomes of it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from pretrain.core.bounds import Count, NonNegative, PositiveShare, Seconds, Whole
from pretrain.core.errors import PretrainError, listed, nearest
from pretrain.core.files import digest
from pretrain.core.folders import checkpoint_of
from pretrain.core.foreign import yaml
from pretrain.core.foreign.paths import expanded
from pretrain.core.generation.server import check_url
from pretrain.core.method import Ref
from pretrain.data import DataOperation
from pretrain.data._answers import Answer, Answers, folder_of
from pretrain.data._generator import Generator, LocalGenerator, Prompt, ServerGenerator, Settings, answers
from pretrain.data._work import Desk

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

T = TypeVar("T")
Document = dict[str, object]  # its columns
Written = Sequence[tuple[str, str]]  # of one document: what tells a text apart from its others, and the text
BLOCK = 256  # documents whose texts are written at a time
SHOWN, CHARACTERS = 10, 300  # texts that are reported, and of each so many characters
BEGINNING = 200  # characters in which an answer refuses, if it does
REFUSAL = (
    r"(?i)^\W*(i(['’]m| am) (sorry|unable)|i apologi[sz]e|(sorry,? )?(but )?i can(not|['’]t) (help|assist|do that)|"
    r"as an ai\b|as a language model)"
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Generating(DataOperation):
    """Operations that have texts written: by the checkpoint `generator`, or by `served`, a model of `server`.

    `key` names the environment variable that holds the server's key. `prompts` is a file that stands in place of the
    method's own. Left out, and counted by reason, are answers that came to no end in `max_new_tokens` (unless
    `unfinished: keep`), empty ones, those that begin with what `refusal` matches, copies of what was asked, and those
    of fewer than `shortest` words. `domain` is what the new documents are of; by default what theirs is. `only` are the
    domains that texts are written of; documents of others stay as they are.
    """

    generator: Ref = ""
    server: str = ""
    served: str = ""
    key: str = ""
    parallel: Count = 8
    timeout: Seconds = 600.0
    retries: Whole = 5
    prompts: Ref = ""
    max_new_tokens: Count = 512
    temperature: NonNegative = 0.7
    top_p: PositiveShare = 1.0
    seed: Whole = 0
    unfinished: Literal["drop", "keep"] = "drop"
    refusal: str = REFUSAL
    shortest: Whole = 5
    domain: str = ""
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_writer()
        if self.server:
            try:
                check_url(self.server)
            except PretrainError as error:
                raise PretrainError(f"{self.name}: {error}", place=("server",)) from error
            if not self.served:
                raise PretrainError(
                    f"{self.name}: served '': accepted: the name of a model of the server", place=("served",)
                )
        if self.key and not _VARIABLE.fullmatch(self.key):  # which may be a key: it is not shown
            raise PretrainError(
                f"{self.name}: key: accepted: the name of an environment variable that holds it, such as API_KEY",
                place=("key",),
            )
        try:
            re.compile(self.refusal)
        except re.error as error:
            raise PretrainError(
                f"{self.name}: refusal {self.refusal!r}: {error}; accepted: a regular expression", place=("refusal",)
            ) from error

    def _check_writer(self) -> None:
        """Refuse nobody and two who would write."""
        if bool(self.generator) == bool(self.server):
            both = "both" if self.server else "neither"
            raise PretrainError(f"{self.name}: {both}: accepted: a generator (a checkpoint), or a server (its address)")

    @property
    def brings(self) -> tuple[str, ...]:
        """That of what is written, where it has one of its own."""
        return (self.domain,) if self.domain else ()

    def settings(self) -> Settings:
        """How answers are written."""
        return Settings(self.max_new_tokens, self.temperature, self.top_p, self.seed)

    def opened(self) -> Generator:
        """Who answers."""
        if self.generator:
            return LocalGenerator(checkpoint_of(Path(self.generator)), self.settings())
        key = os.environ.get(self.key, "") if self.key else ""
        if self.key and not key:
            raise PretrainError(
                f"{self.name}: the environment variable {self.key} (key) is not set; accepted: one that holds the "
                "server's key"
            )
        return ServerGenerator(
            self.server, self.served, self.settings(), key=key, parallel=self.parallel, timeout=self.timeout,
            retries=self.retries,
        )  # fmt: skip

    def asking(self, here: Desk) -> Asking:
        """What answers for as long as an operation works."""
        generator = self.opened()
        return Asking(self, generator, Answers(folder_of(here) / digest(list(generator.identity))[:32]), here)

    def fault(self, answer: Answer, prompt: Prompt, text: str | None, final: bool = True) -> str:
        """Why an answer, of which `text` is left (None: nothing, by the method's rule), is not used; empty if it is.

        One that is not `final`, since no document is made of it, may be short, and may say what was asked.
        """
        if not answer.fits:
            return "prompt too long"
        if not answer.finished and self.unfinished == "drop":
            return "cut"
        if not answer.text:
            return "empty"
        if self.refusal and re.search(self.refusal, answer.text[:BEGINNING]):
            return "refusal"
        if text is None:
            return "unfit"
        if final and _plain(text) in _plain(prompt.user):
            return "copy"
        return "short" if final and len(text.split()) < self.shortest else ""

    def meant(self, corpus: Dataset) -> list[bool]:
        """Which documents texts are written of: those of the domains of `only`; an error where one has none."""
        if not self.only or "domain" not in corpus.column_names:
            return [True] * len(corpus)
        column = corpus["domain"][:]
        domains = sorted({*column}, key=str)
        if missing := next((name for name in self.only if name not in domains), None):
            raise PretrainError(
                f"{self.name}: only: no document of the domain {missing!r}{nearest(missing, map(str, domains))}; "
                f"accepted: {listed([*map(str, domains)], missing)}",
                place=("only",),
            )
        return [name in self.only for name in column]

    def grown(
        self, corpus: Dataset, columns: Sequence[str], write: Callable[[list[Document]], Sequence[Written]], *,
        real: bool, block: int | None = None,
    ) -> Dataset:  # fmt: skip
        """The corpus with what is written of its documents, as `grown` has it, of the domains of `only`."""
        if "text" not in corpus.column_names:
            known = ", ".join(corpus.column_names) or "none"
            raise PretrainError(f"{self.name}: no column 'text' (of {known}); accepted: a corpus of texts")
        self.meant(corpus)
        return grown(corpus, columns, write, domain=self.domain, only=self.only, real=real, block=block or BLOCK)


@dataclass
class Asking:
    """What a method asks, and what came of it so far."""

    method: Generating
    generator: Generator
    kept: Answers
    here: Desk
    asked: int = 0
    used: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def texts(
        self, asked: Iterable[tuple[T, Prompt]], clean: Callable[[str], str | None] = str, final: bool = True
    ) -> Iterator[tuple[T, str]]:
        """What is used of the answers to prompts, each with what came along with its prompt, in their order.

        `clean` gives what is left of one; `final` as `fault` has it.
        """
        pairs, again = tee(asked)
        replies = answers(self.generator, (prompt for _, prompt in again), self.kept, self.here)
        for (along, prompt), answer in zip(pairs, replies, strict=True):
            text = clean(answer.text)
            reason = self.method.fault(answer, prompt, text, final)
            self.asked += 1
            self.prompt_tokens += answer.prompt_tokens
            self.new_tokens += answer.new_tokens
            if reason:
                self.dropped[reason] += 1
                if len(self.left_out) < SHOWN:
                    shown = {"prompt": prompt.user[-CHARACTERS:], "answer": answer.text[:CHARACTERS]}
                    self.left_out.append({"reason": reason, **shown})
                continue
            assert text is not None
            self.used += final
            if final and len(self.examples) < SHOWN:
                self.examples.append({"prompt": prompt.user[-CHARACTERS:], "text": text[:CHARACTERS]})
            yield along, text

    def report(self, before: Dataset, after: Dataset, **more: object) -> None:
        """Tell the desk, and `more` of the method's own."""
        self.here.reports.append({
            "method": self.method.name, "asked": self.asked, "used": self.used,
            "dropped": dict(sorted(self.dropped.items())), "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens, "documents": _by_domain(before, after), "examples": self.examples,
            "left_out": self.left_out, **more,
        })  # fmt: skip


def grown(
    corpus: Dataset, columns: Sequence[str], write: Callable[[list[Document]], Sequence[Written]], *, domain: str,
    only: Sequence[str], real: bool, block: int,
) -> Dataset:  # fmt: skip
    """Each document, unless it is not wanted (`real`), and after it those that `write` makes of its `columns`.

    A new document has the columns of the one it is made of, but for the text, the end of its `id`, and its `domain`
    where one is given. Of other domains than `only` (none: all are meant) nothing is made, and they are kept. Documents
    pass by `block` by `block`: neither these nor the new ones need fit into memory.
    """
    import numpy as np
    import pyarrow

    def made_of(table: pyarrow.Table) -> pyarrow.Table:
        domains = table.column("domain").to_pylist() if "domain" in table.column_names else [""] * len(table)
        meant = [not only or name in only for name in domains]
        chosen = table.select(list(dict.fromkeys(columns))).filter(pyarrow.array(meant)).to_pylist()
        texts = iter(write(chosen) if chosen else ())
        written = [[None] * (real or not each) + list(next(texts) if each else ()) for each in meant]
        new: list[tuple[str, str] | None] = [each for row in written for each in row]
        grown_table = table.take(pyarrow.array(np.repeat(np.arange(len(table)), [len(row) for row in written])))
        values = {"text": lambda _, each: each[1], "id": lambda old, each: f"{old}#{each[0]}"}
        values |= {"domain": lambda old, each: domain} if domain else {}
        for name in values.keys() & set(table.column_names):
            old = grown_table.column(name).to_pylist()
            cells = [cell if each is None else values[name](cell, each) for cell, each in zip(old, new, strict=True)]
            kind = table.schema.field(name)
            column = pyarrow.array(cells, kind.type)
            grown_table = grown_table.set_column(table.column_names.index(name), kind, column)
        return grown_table

    made = corpus.with_format("arrow").map(
        made_of, batched=True, batch_size=block, features=corpus.features, load_from_cache_file=False,
        new_fingerprint=os.urandom(16).hex(),
    )  # fmt: skip
    return made.with_format(None)


def read_prompts(
    method: str, given: str, shipped: Path, names: Sequence[str], places: Sequence[str]
) -> dict[str, Prompt]:
    """The prompts of a YAML file, the `given` one or the one `shipped` with the method: `NAME: {system: …, user: …}`.

    Each of `names` must be there, with each `{place}` in it and no other.
    """
    path = expanded(given) if given else shipped
    value, _ = yaml.loads(yaml.read_text(path), str(path))
    if not isinstance(value, dict):
        raise PretrainError(
            f"{method}: {path}: accepted: a mapping of prompts ({', '.join(names)})", place=("prompts",)
        )
    read: dict[str, Prompt] = {}
    for name in names:
        parts = value.get(name)
        if not isinstance(parts, dict) or not {*parts} <= {"system", "user"} or not isinstance(parts.get("user"), str):
            hint = nearest(name, map(str, value)) if parts is None else ""
            raise PretrainError(
                f"{method}: {path}: prompt {name!r}{hint}: accepted: {{system: TEXT, user: TEXT}}, user at least",
                place=("prompts",),
            )
        prompt = Prompt(str(parts["user"]), str(parts.get("system") or ""))
        there = {place for text in (prompt.user, prompt.system) for place in _PLACE.findall(text)}
        if missing := next((place for place in places if place not in there), None):
            raise PretrainError(
                f"{method}: {path}: prompt {name!r}: no {{{missing}}} in it; accepted: one with "
                f"{listed([f'{{{place}}}' for place in places], missing)}",
                place=("prompts",),
            )
        read[name] = prompt
    return read


def filled(prompt: Prompt, values: Mapping[str, str], number: int = 0) -> Prompt:
    """A prompt with texts in its places; braces in those texts, and of other words, stay as they are."""

    def place(match: re.Match[str]) -> str:
        return values.get(match[1], match[0])

    return Prompt(_PLACE.sub(place, prompt.user), _PLACE.sub(place, prompt.system), number)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _by_domain(before: Dataset, after: Dataset) -> dict[str, dict[str, int]]:
    earlier, later = (
        Counter(corpus["domain"][:] if "domain" in corpus.column_names else ["all"] * len(corpus))
        for corpus in (before, after)
    )
    names = sorted({*earlier, *later}, key=str)
    return {str(name): {"before": earlier[name], "after": later[name]} for name in names}
