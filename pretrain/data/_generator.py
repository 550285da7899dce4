"""Who writes the texts of an operation: a checkpoint here, or a server that speaks OpenAI's protocol.

Prompts are answered in lots; what one is answered follows from the prompt, the generator and its settings alone, so
neither the order of documents nor what else is in a lot changes it: each prompt draws its random numbers from a seed of
its own. (Rounding of a batch of another size may decide between two tokens that are as likely to the last bits.)

Shape letters: B rows, L prompt tokens, N new tokens and those of the whole.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import transformers

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import prompted, text_of
from pretrain.core.errors import PretrainError
from pretrain.core.files import digest
from pretrain.core.generation.options import Options
from pretrain.core.generation.rows import continue_rows, prefill, stepper
from pretrain.core.generation.server import ServerClient, Stopped, TooLong, pausing
from pretrain.core.generation.settings import options_of
from pretrain.core.hardware import pick_device
from pretrain.core.meter import count_flops
from pretrain.core.models.families import positions_of
from pretrain.core.models.features import evaluating
from pretrain.data._answers import Answer, Answers
from pretrain.data._work import Desk, stamps

SHARD = 256  # prompts that are answered, and kept, together
BATCH_TOKENS = 16_384  # of prompts and what may follow them, in one pass
VERSION = 1  # raised when the same prompts and settings come to be answered otherwise


class Prompt(NamedTuple):
    """What a generator is asked; `number` tells apart what is asked again to be answered otherwise."""

    user: str
    system: str = ""
    number: int = 0


@dataclass(frozen=True)
class Settings:
    """How answers are written: greedily at temperature 0, else sampled."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def seed_of(self, prompt: Prompt) -> int:
        """The seed of a prompt's own random numbers."""
        return int(digest([self.seed, *prompt])[:15], 16)


class Generator(Protocol):
    """What answers prompts. `identity` tells it, with its settings, from every other."""

    settings: Settings
    identity: list[object]

    def answer(self, prompts: Mapping[str, Prompt]) -> Iterator[dict[str, Answer]]:
        """The answers by the prompts' keys, a few at a time as they come, in any order."""


def answers(generator: Generator, prompts: Iterable[Prompt], kept: Answers, here: Desk) -> Iterator[Answer]:
    """The answers in the prompts' order: what is kept is not asked, and what is asked is kept as it comes.

    The FLOPs of an answer that was kept are on the desk's account, as if it were made now.
    """
    sampled, waiting = generator.settings.temperature > 0, iter(prompts)
    while lot := list(islice(waiting, SHARD)):
        keys = [digest([*prompt[:2], prompt.number if sampled else 0]) for prompt in lot]
        have = {key: answer for key in dict.fromkeys(keys) if (answer := kept.get(key)) is not None}
        here.flops += sum(answer.flops for answer in have.values())
        asked = {key: prompt for key, prompt in zip(keys, lot, strict=True) if key not in have}
        try:
            for made in generator.answer(asked) if asked else ():
                have |= made
                kept.add(made)
        finally:
            kept.flush()
        yield from (have[key] for key in keys)


class LocalGenerator:
    """A causal checkpoint with its tokenizer, opened when it is first asked.

    A chat model is asked in its template. What the `generation_config` says of ends and logits (penalties, top_k, …)
    holds; temperature and top_p are those of the settings.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        versions = [torch.__version__, transformers.__version__]
        self.identity: list[object] = ["checkpoint", VERSION, stamps(folder), versions, asdict(settings)]
        self._model: transformers.PreTrainedModel | None = None

    def _opened(self) -> transformers.PreTrainedModel:
        if self._model is None:
            model, tokenizer = checkpoint.load(self.folder, device=pick_device())
            if tokenizer is None or not model.can_generate() or model.config.is_encoder_decoder:
                raise PretrainError(f"{self.folder}: accepted: a causal language model, with its tokenizer")
            self.tokenizer, self.vocabulary, self._model = tokenizer, Vocabulary.of(tokenizer), model
        return self._model

    def answer(self, prompts: Mapping[str, Prompt]) -> Iterator[dict[str, Answer]]:
        """Batches of prompts of about a length."""
        model, new = self._opened(), self.settings.max_new_tokens
        limit = positions_of(model)
        ids = {}
        for key, prompt in prompts.items():
            system, user = prompted(self.tokenizer, self.vocabulary.begin, prompt.user, prompt.system)
            ids[key] = [*system, *user]
            if not ids[key] or (isinstance(limit, int) and len(ids[key]) + new > limit):
                del ids[key]
                yield {key: Answer("", fits=False)}
        order = sorted(ids, key=lambda key: (len(ids[key]), key))
        while order:
            rows = 1
            while rows < len(order) and (rows + 1) * (len(ids[order[rows]]) + new) <= BATCH_TOKENS:
                rows += 1
            batch, order = {key: prompts[key] for key in order[:rows]}, order[rows:]
            yield self._batch([ids[key] for key in batch], batch)

    def _batch(self, ids: Sequence[list[int]], prompts: Mapping[str, Prompt]) -> dict[str, Answer]:
        made, flops = count_flops(lambda: self._rows(ids, list(prompts.values())))
        answered = {}
        for row, (key, (new, finished)) in enumerate(zip(prompts, made, strict=True)):
            text = text_of(self.tokenizer, new, skip_special_tokens=True).strip()
            spent = flops // len(ids) + (row < flops % len(ids))
            answered[key] = Answer(text, finished, len(ids[row]), len(new), spent)
        return answered

    def _rows(self, ids: Sequence[list[int]], prompts: Sequence[Prompt]) -> list[tuple[list[int], bool]]:
        """The new tokens of each row, and whether they came to an end."""
        model, settings = self._opened(), self.settings
        width = max(map(len, ids))
        given = options_of(
            model, self.tokenizer, width, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
            top_p=settings.top_p,
        )  # fmt: skip
        options = Options(**given)
        ids_BL = torch.tensor([[options.pad] * (width - len(row)) + row for row in ids], device=model.device)
        mask_BL = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device)
        uniform_NB = None
        if settings.temperature > 0:
            generators = [torch.Generator().manual_seed(settings.seed_of(prompt)) for prompt in prompts]
            uniform_NB = torch.stack([torch.rand(settings.max_new_tokens, generator=each) for each in generators], 1)
        with evaluating(model):
            logits_BV, cache = prefill(model, ids_BL, mask_BL)
            tokens_BN = continue_rows(ids_BL, logits_BV, stepper(model, cache, mask_BL), options, uniform_NB)
        rows = [options.cut(row) for row in tokens_BN[:, width:].tolist()]
        return [(row, bool(row) and options.at_end(row)) for row in rows]


class ServerGenerator:
    """A model of a server, asked from several threads at once."""

    def __init__(
        self, url: str, model: str, settings: Settings, *, key: str, parallel: int, timeout: float, retries: int
    ) -> None:
        self.settings, self.parallel, self._stop = settings, parallel, threading.Event()
        self.client = ServerClient(
            url, model, key=key, temperature=settings.temperature, top_p=settings.top_p, timeout=timeout,
            retries=retries, pause=pausing(self._stop),
        )  # fmt: skip
        self.identity: list[object] = ["server", VERSION, self.client.address, model, asdict(settings)]

    def answer(self, prompts: Mapping[str, Prompt]) -> Iterator[dict[str, Answer]]:
        """The answers one by one; after the first error nothing more is asked, and what is under way is waited for."""
        self._stop.clear()
        errors: list[Exception] = []
        with ThreadPoolExecutor(self.parallel, thread_name_prefix="generator") as pool:
            asked = {pool.submit(self._reply, prompt): key for key, prompt in prompts.items()}
            try:
                for done in as_completed(asked):
                    try:
                        yield {asked[done]: done.result()}
                    except Stopped:
                        continue
                    except Exception as error:
                        errors.append(error)
            finally:
                self._stop.set()
        if errors:
            raise errors[0]

    def _reply(self, prompt: Prompt) -> Answer:
        if self._stop.is_set():
            raise Stopped
        seed = self.settings.seed_of(prompt) >> 29 if self.settings.temperature > 0 else None  # 31 bits
        new = self.settings.max_new_tokens
        try:
            reply = self.client.complete(prompt.system, prompt.user, max_tokens=new, seed=seed)
        except TooLong:
            return Answer("", fits=False)
        except BaseException:
            self._stop.set()
            raise
        return Answer(reply.text.strip(), reply.finished, reply.prompt_tokens, reply.new_tokens)
