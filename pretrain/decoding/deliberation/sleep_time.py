"""Thinking about a context before there are questions about it.

Shape letters: B rows, L prompt tokens, N of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core.bounds import Count, Whole
from pretrain.core.encoding import encode, text_of
from pretrain.core.errors import PretrainError
from pretrain.core.folders import tokenizer_of
from pretrain.core.foreign.paths import expanded
from pretrain.core.generation.options import Options
from pretrain.core.generation.rows import continue_rows, mask_of, prefill, stepper
from pretrain.core.generation.server import Client, Reply
from pretrain.core.method import Ref
from pretrain.core.models.families import family
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.decoding import Decoding
from pretrain.decoding.deliberation._clients import LocalClient, Prefixes, continued

FINISHED = "FINISHED"
TASK = (
    "You are given a context. Questions about it will be asked later, and then there will be little time to answer. "
    "Think now: which questions may be asked? Work out quantities, draw conclusions and write down the steps that lead "
    "to answers, in notes that will stand beside the context.\n\nContext:\n"
)
RETHINK = (
    "\n\nNotes so far:\n{notes}\n\nWrite the notes anew and in full: check each calculation, add what else will be of "
    f"use, and drop what is wrong or of none. If nothing is left to add, end with the word {FINISHED}.\n\nNotes:\n"
)
NOTES = "Notes on the above, made in advance:\n"


@dataclass(frozen=True)
class SleepTime(Decoding):
    """Sleep-time Compute: Beyond Inference Scaling at Test-time (arXiv:2504.13171).

    Before any query q, the model turns the context c into c' = S(c): over at most `rounds` rounds it writes notes on c
    anew, anticipating questions and working out what will help, until it says that it has finished. Then queries are
    answered by T(q, c') with a smaller budget, and the tokens spent on c' are shared by all queries about c.
    `generate`: the prompt up to and with its last `separator` is c, what follows is q. The model, at temperature 0,
    writes notes of at most `notes_tokens` tokens, once for each c; the continuation is that of c, the notes and q, and
    stands after the prompt as it was given. The keys and values of c and its notes are kept for later queries. With 0
    rounds, or a prompt without the separator, this is plain decoding. `tokenizer`: a checkpoint, or a folder with a
    tokenizer (by default the model's own folder). The functions `sleep` and `answer` do the same with any client, of
    a model here or of a server (`LocalClient`, `ServerClient`), and `Cost` adds up the tokens.
    """

    longer: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    shares_vocabulary: ClassVar[tuple[str, ...]] = ("tokenizer",)
    samples: ClassVar[bool] = True

    rounds: Whole = 10
    notes_tokens: Count = 1024
    separator: str = "\n\n"
    tokenizer: Ref | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        super().__post_init__()
        if not self.separator:
            raise PretrainError("sleep_time: separator '': accepted: a text between context and query")

    @cached_property
    def _slept(self) -> WeakKeyDictionary[PreTrainedModel, tuple[Prefixes, dict[tuple[int, ...], list[int]]]]:
        """By model: the caches of contexts with notes, and the notes by context."""
        return WeakKeyDictionary()

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts after thinking about their contexts; returns `tokens_BN`."""
        if family(model).name not in self.families:
            raise PretrainError(f"{self.name}: family {family(model).name!r}: accepted: {', '.join(self.families)}")
        mask_BL = mask_of(self.name, input_ids_BL, options.attention_mask_BL)
        if self.rounds == 0:
            with torch.no_grad():
                logits_BV, cache = prefill(model, input_ids_BL, mask_BL)
                return continue_rows(input_ids_BL, logits_BV, stepper(model, cache, mask_BL), options)
        tokenizer, rows = self._tokenizer(model), []
        prefixes, notes = self._slept.setdefault(model, (Prefixes(), {}))
        for ids_L, mask_L in zip(input_ids_BL, mask_BL, strict=True):
            ids = ids_L[mask_L.bool()].tolist()
            place = split(tokenizer, ids, self.separator)
            context, query = ids[:place], ids[place:]
            if context and tuple(context) not in notes:
                notes[tuple(context)] = self._notes(model, tokenizer, context)
            before = [*context, *notes.get(tuple(context), [])]
            given = options.after(len(before) + len(query))
            rows.append(continued(model, prefixes, before, query, given)[0])
        return options.stacked(input_ids_BL, rows)

    def _notes(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: list[int]) -> list[int]:
        """The tokens of the notes on a context, with what stands around them; none where the model wrote none."""
        text = text_of(tokenizer, context, skip_special_tokens=True)
        slept = sleep(LocalClient(model, tokenizer), text, rounds=self.rounds, max_tokens=self.notes_tokens)
        return encode(tokenizer, [f"{NOTES}{slept.notes}{self.separator}"])[0].tolist() if slept.notes else []

    def _tokenizer(self, model: PreTrainedModel) -> PreTrainedTokenizerBase:
        folder = expanded(self.tokenizer or model.config._name_or_path or "/none")
        if not folder.is_dir():
            raise PretrainError(
                f"sleep_time: tokenizer {self.tokenizer!r}: accepted: a checkpoint or a folder with a tokenizer, which "
                "a model that was not read from a folder needs"
            )
        return load_tokenizer(tokenizer_of(folder))


def split(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], separator: str) -> int:
    """Where the query begins: the first token after the last separator; 0 where there is none, or nothing after it."""
    text = text_of(tokenizer, ids)
    end = text.rfind(separator) + len(separator)
    if separator not in text or not text[end:].strip():
        return 0
    low, high = 0, len(ids)
    while low < high:  # the text of more tokens is no shorter
        middle = (low + high) // 2
        if len(text_of(tokenizer, ids[:middle])) < end:
            low = middle + 1
        else:
            high = middle
    return low


@dataclass(frozen=True)
class Slept:
    """A context, the notes on it, and what they took."""

    context: str
    notes: str = ""
    rounds: int = 0
    finished: bool = False  # whether the model said so
    prompt_tokens: int = 0
    new_tokens: int = 0

    @property
    def revised(self) -> str:
        """What queries are asked after: the context alone where there are no notes."""
        return f"{self.context}\n\n{NOTES}{self.notes}\n\n" if self.notes else self.context


def sleep(client: Client, context: str, *, rounds: int = 10, max_tokens: int = 1024) -> Slept:
    """Notes on a context, written anew up to `rounds` times: until the model says `FINISHED`, or changes nothing."""
    if rounds < 0 or max_tokens < 1:
        raise PretrainError(f"sleep: rounds {rounds}, max_tokens {max_tokens}: accepted: 0 and 1 or more")
    notes, finished, done, read, written = "", False, 0, 0, 0
    while done < rounds and not finished:
        reply = client.complete(TASK + context, RETHINK.replace("{notes}", notes or "none"), max_tokens=max_tokens)
        done, read, written = done + 1, read + reply.prompt_tokens, written + reply.new_tokens
        before, mark, _ = reply.text.partition(FINISHED)
        finished, new = bool(mark), before.strip()
        if not finished and new in ("", notes):
            break
        notes = new or notes  # notes are never emptied
    return Slept(context, notes, done, finished, read, written)


def answer(client: Client, revised: str, query: str, budget: int = 256) -> Reply:
    """The answer to a query after a revised context, of at most `budget` tokens."""
    if budget < 1 or not query:
        raise PretrainError(f"answer: budget {budget}, query {query!r}: accepted: 1 or more, and a text")
    return client.complete(revised, query, max_tokens=budget)


@dataclass(frozen=True)
class Cost:
    """The tokens that answers to queries about one context took: `sleep_` before, `test_` when they were asked.

    A new token at test time, when someone waits, costs `weight` times one before: 10 in the paper.
    """

    queries: int
    sleep_prompt: int = 0
    sleep_new: int = 0
    test_prompt: int = 0
    test_new: int = 0
    weight: float = 10.0

    @classmethod
    def of(cls, slept: Slept, replies: Sequence[Reply], weight: float = 10.0) -> Cost:
        """Of one sleep and the answers after it."""
        if not replies:
            raise PretrainError("cost: no answers; accepted: one or more, which share what was spent before")
        return cls(
            len(replies), slept.prompt_tokens, slept.new_tokens, sum(r.prompt_tokens for r in replies),
            sum(r.new_tokens for r in replies), weight,
        )  # fmt: skip

    @property
    def total(self) -> float:
        """New tokens before, and `weight` times those at test time."""
        return self.sleep_new + self.weight * self.test_new

    @property
    def per_query(self) -> float:
        """The total, shared by the queries."""
        return self.total / self.queries
