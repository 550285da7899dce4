"""Continuous batching: one thread has the model, and requests join and leave its batch between two passes.

A pass reads the next token of each answer that is being written, and beside them as much of the prompts that have just
come as `PASS` has room for. Each answer has a cache, a random generator, stop texts and settings of its own. What a
batch cannot do (a decoding method, a model that `core.generation.forward` does not run) is done alone, when no other
answer is being written. Requests are taken in the order in which they came.

Shape letters: R answers, N tokens of one so far, V vocabulary.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.foreign.parsing import out_of_memory
from pretrain.core.generation.forward import why_not
from pretrain.core.generation.options import Options
from pretrain.core.generation.packed import Cached, Packed
from pretrain.core.generation.settings import options_of
from pretrain.inference.serving.alone import stops_of, write_alone
from pretrain.inference.serving.jobs import Answer, Busy, Embedding, Ending, Failed, Job, Piece
from pretrain.inference.serving.metrics import Metrics
from pretrain.inference.serving.text import Writer
from pretrain.inference.serving.vectors import embedded

PASS = 512  # tokens that a pass reads at most, so that a long prompt keeps nobody waiting
LONGEST_WAIT = 60  # seconds after which a client is told to ask again, at most


@dataclass(frozen=True)
class Limits:
    """What the engine takes on at once."""

    rows: int = 16  # answers that are written at once
    cache_tokens: int = 32768  # tokens of all their caches, prompts and answers to come
    queue: int = 128  # answers that wait
    length: int = 2048  # tokens of a prompt and its answer


@dataclass(eq=False)
class Row:
    """An answer that is being written: `unread` are the tokens that the model has not read yet."""

    answer: Answer
    options: Options
    writer: Writer
    tokens: list[int]
    cached: Cached
    uniform_N1: Tensor | None  # the numbers that decide its tokens, where these are drawn
    unread: list[int]
    done: bool = False

    @property
    def count(self) -> int:
        """New tokens so far."""
        return len(self.tokens) - len(self.answer.ids)


class Engine:
    """A model, the thread that has it, and what waits for it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
        self.model, self.tokenizer, self.limits, self.metrics = model, tokenizer, limits, Metrics()
        self.vocabulary = Vocabulary.of(tokenizer)
        self.why_not = why_not(model, limits.length)  # the batch cannot read the model
        self.packs = self.why_not is None
        self.packed = Packed(model, limits.length) if self.packs else None
        self.waiting: deque[Job] = deque()
        self.rows: list[Row] = []
        self.embedding: tuple[Embedding, Iterator[None]] | None = None
        self.changed, self.ending, self.dead = threading.Condition(), False, False
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self.thread.start()

    def stop(self, seconds: float = 10.0) -> None:
        """Take no more; what is not written yet comes to nothing."""
        with self.changed:
            self.ending = True
            for job in (*self.waiting, *(row.answer for row in self.rows)):
                job.cancelled = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join(seconds)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Have jobs done, all or none of them; raises `Busy` where too many wait, `Ending` where none is taken."""
        with self.changed:
            if self.ending or self.dead:
                raise Ending
            if len(self.waiting) + len(jobs) > self.limits.queue:
                raise Busy(self._wait())
            self.waiting.extend(jobs)
            self.changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more: their places are free before the next pass."""
        with self.changed:
            for job in jobs:
                job.cancelled = True
            self.changed.notify()

    @property
    def cached_tokens(self) -> int:
        """Tokens that the caches of running answers have room for."""
        return sum(row.cached.room for row in self.rows)

    def _wait(self) -> int:
        """Seconds until what waits has been taken, as far as the last answers tell."""
        turns = (len(self.waiting) + 1) / self.limits.rows
        return int(min(max(turns * self.metrics.answer_seconds.recent, 1), LONGEST_WAIT))

    # The thread of the model

    def _run(self) -> None:
        try:
            while self._await():
                self._turn()
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            with self.changed:
                self.dead = True
                left = [*self.waiting, *(row.answer for row in self.rows)]
                self.waiting.clear()
            self._fail(left, Ending())

    def _await(self) -> bool:
        """Wait until there is something to do; false at the end."""
        with self.changed:
            while not (self.waiting or self.rows or self.embedding or self.ending):
                self.changed.wait()
            self._let_go()
            return bool(self.waiting or self.rows or self.embedding or not self.ending)

    def _let_go(self) -> None:
        """Of what nobody waits for the places and the caches."""
        left = [job for job in (*self.waiting, *(row.answer for row in self.rows if not row.done)) if job.cancelled]
        self.metrics.cancelled += len(left)
        if left:
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
            self.rows = [row for row in self.rows if not row.answer.cancelled]

    def _turn(self) -> None:
        """Take in what there is room for, and read on."""
        while (job := self._next()) is not None:
            with self._answering([job]):
                self._begin(job)
        if self.embedding is not None:
            self._embed(*self.embedding)
        if self.rows:
            with self._answering([row.answer for row in self.rows]):
                self._pass()
            with self.changed:
                self.rows = [row for row in self.rows if not row.done]

    def _next(self) -> Job | None:
        """The first that waits, where there is room for it."""
        with self.changed:
            self._let_go()
            job = self.waiting[0] if self.waiting else None
            if isinstance(job, Answer) and self.packs and job.method is None:
                room = self.cached_tokens + job.room <= self.limits.cache_tokens
                free = room and len(self.rows) < self.limits.rows
            elif isinstance(job, Answer):
                free = not self.rows
            else:
                free = self.embedding is None
            return self.waiting.popleft() if job is not None and free else None

    @contextmanager
    def _answering(self, jobs: Sequence[Job]) -> Iterator[None]:
        """While open, an error is what these jobs come to, and the next go on."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, PretrainError) and not out_of_memory(error):
                traceback.print_exc()
            self._fail(jobs, error)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        for job in jobs:
            job.send(Failed(error))
        for row in self.rows:
            row.done = row.done or row.answer in jobs

    def _begin(self, job: Job) -> None:
        """Take in an answer to the batch, or do alone what cannot be done there."""
        if isinstance(job, Embedding):
            self.embedding = job, embedded(self.model, self.vocabulary, job)
        elif isinstance(job, Answer) and self.packs and job.method is None:
            self.rows.append(self._row(job))
        elif isinstance(job, Answer):
            self.metrics.prompt_tokens += len(job.ids)
            write_alone(self.model, (self.tokenizer, self.vocabulary), job, lambda count: self._count(job, count))
            self.metrics.answer_seconds.add(time.monotonic() - job.asked)

    def _embed(self, job: Embedding, lots: Iterator[None]) -> None:
        with self._answering([job]):
            if not job.cancelled and next(lots, lots) is not lots:
                return
        self.embedding = None

    def _row(self, answer: Answer) -> Row:
        ids = list(answer.ids)
        settings = options_of(
            self.model, self.tokenizer, len(ids), max_new_tokens=answer.max_new_tokens,
            temperature=answer.temperature, top_p=answer.top_p, vocabulary=self.vocabulary,
        )  # fmt: skip
        options = Options(**(settings | {"stop": None}), generator=torch.Generator().manual_seed(answer.seed))
        writer = Writer(self.tokenizer, ids[len(ids) - answer.shown :], stops_of(self.model, answer))
        return Row(answer, options, writer, ids, Cached(answer.room), options.draws(1), list(ids))

    def _pass(self) -> None:
        """Read the next token of each answer, and of prompts as much as there is room for; choose what follows."""
        assert self.packed is not None
        left = PASS - len(self.rows)
        read: list[tuple[Row, list[int]]] = []
        for row in self.rows:
            new = row.unread[: 1 + max(0, left)]
            left -= len(new) - 1
            read.append((row, new))
        logits_RV = self.packed.read([(row.cached, new) for row, new in read])
        self.metrics.passes += 1
        for row, new in read:
            row.unread = row.unread[len(new) :]
            self.metrics.prompt_tokens += len(new) if not row.count else 0
        ready = [place for place, row in enumerate(self.rows) if not row.unread]
        if ready:
            self._choose([self.rows[place] for place in ready], logits_RV[ready])

    def _choose(self, rows: Sequence[Row], logits_RV: Tensor) -> None:
        """The next token of each; those that choose alike are chosen for together."""
        groups: dict[object, list[int]] = {}
        for place, row in enumerate(rows):
            options = row.options
            alike = options.by_logits and options.top_p == 1  # of ties in a nucleus the order may be a batch's matter
            key = options.temperature if alike else (place,)
            groups.setdefault(key, []).append(place)
        for places in groups.values():
            chosen = [rows[place] for place in places]
            try:
                tokens = _picked(chosen, logits_RV[places])
            except PretrainError:  # of one of them
                for row, place in zip(chosen, places, strict=True):
                    with self._answering([row.answer]):
                        self._write(row, *_picked([row], logits_RV[[place]]))
                continue
            for row, token in zip(chosen, tokens, strict=True):
                with self._answering([row.answer]):
                    self._write(row, token)

    def _write(self, row: Row, token: int) -> None:
        """A token at the end of an answer."""
        row.tokens.append(token)
        row.unread = [token]
        self._count(row.answer, 1)
        ended = token in row.options.ends
        text = "" if ended else row.writer.push(token)
        ended = ended or row.writer.stopped
        row.done = ended or row.count >= row.answer.max_new_tokens
        if row.done:
            text += "" if row.writer.stopped else row.writer.end()
            self.metrics.answer_seconds.add(time.monotonic() - row.answer.asked)
        if text or row.done:
            row.answer.send(Piece(text, ("stop" if ended else "length") if row.done else None, row.count))

    def _count(self, answer: Answer, tokens: int) -> None:
        """Count new tokens of an answer."""
        self.metrics.new_tokens += tokens
        if answer.first is None:
            answer.first = time.monotonic()
            self.metrics.first_seconds.add(answer.first - answer.asked)


def _picked(rows: Sequence[Row], logits_RV: Tensor) -> list[int]:
    """The next token of rows that choose alike."""
    first = rows[0]
    uniform_R = None
    if first.uniform_N1 is not None:
        uniform_R = torch.cat([row.uniform_N1[row.count] for row in rows if row.uniform_N1 is not None])
    tokens_RN = torch.empty(len(rows), 0, dtype=torch.long)
    if not first.options.by_logits:
        tokens_RN = torch.tensor([first.tokens])
    tokens: list[int] = first.options.pick(logits_RV, uniform_R, tokens_RN).tolist()
    return tokens
