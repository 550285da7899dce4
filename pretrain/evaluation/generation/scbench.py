"""Several queries about one long context, whose keys and values are computed once.

Shape letters: K positions kept, V vocabulary, N contexts, T turns.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache

from pretrain.core.batch import Vocabulary
from pretrain.core.bounds import Count, Ge, Whole
from pretrain.core.encoding import encode, encode_plain, plain_backend, text_of
from pretrain.core.errors import PretrainError, unknown
from pretrain.core.generation.cache import cache_bytes, layers_of
from pretrain.core.generation.rows import kept
from pretrain.core.generation.settings import ends
from pretrain.core.method import nested
from pretrain.core.models.families import positions_of
from pretrain.core.models.features import evaluating
from pretrain.evaluation import Evaluation, Measured
from pretrain.evaluation._intervals import bounds, resampled_sums
from pretrain.evaluation.generation._scbench import TASKS, Maker, Shared, right

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document

MODES = ("multi_turn", "multi_request")
OWN = ("full", "window")  # caches that are no method


@runtime_checkable
class OverCache(Protocol):
    """A decoding method that is a context manager over the model's cache."""

    name: str

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """While open, the model's cache is the method's."""


@dataclass(frozen=True)
class SCBench(Evaluation):
    """SCBench: A KV Cache-Centric Analysis of Long-Context Methods (arXiv:2412.10319).

    A context is read once and its cache reused by `turns` queries. In the mode `multi_turn` the conversation goes on:
    query t sees the queries and answers before it, the true ones with `golden`, else the model's own. In
    `multi_request` each query follows the context alone. Six tasks, made from the documents and random strings of
    `width` letters: `kv`, a key's value; `prefix_suffix`, the string of that beginning and end; `variable`, a number
    `hops` assignments away; `frequent`, the most frequent word and others' counts; `many_shot`, a document's domain;
    `mix`, hidden numbers and lines to repeat. The first three and `many_shot` are kinds of the paper's tasks on local
    data, the other two are not its own; none is its published data, so that numbers do not compare with its tables.
    Without `tasks`: those that the documents allow. Context and conversation have `length` tokens together. Answers
    are greedy and right if their first line holds the true one. Metrics, for each mode: `scbench_MODE`, the accuracy,
    of a task `scbench_MODE_TASK`, of a turn `scbench_MODE@2`, and with `_logp` the mean log-likelihood of a true
    answer's token; `scbench_kv_bytes`, the cache after the context. `cache`: `full`; `window`, which after each pass
    keeps the first `sink` and the last `window` tokens; or a decoding method over the cache, as `pyramid_infer` or
    `{method: pyramid_infer, recent_ratio: 0.1}`. Intervals: bootstrap over contexts.
    """

    estimated: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ("causal",)

    tasks: tuple[str, ...] = ()
    mode: Literal["both", "multi_turn", "multi_request"] = "both"
    turns: Count = 5
    contexts: Count = 8
    length: Whole = 0
    width: Annotated[int, Ge(4)] = 8
    hops: Count = 2
    golden: bool = True
    slack: Whole = 4  # tokens that an answer may have more than the true one
    cache: Any = "full"  # full, window, or a decoding method as a recipe says it
    sink: Whole = 4
    window: Count = 1020
    resamples: Count = 1000
    seed: Whole = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        super().__post_init__()
        for name in self.tasks:
            if name not in TASKS:
                raise unknown("task of scbench", name, TASKS)
        self._method()

    def held(self) -> dict[str, OverCache]:
        """The decoding method whose cache is used."""
        method = self._method()
        return {} if method is None else {"cache": method}

    def _method(self) -> OverCache | None:
        """The decoding method that `cache` names; None where it names none."""
        if self.cache in OWN:
            return None
        try:
            method = nested(self.cache, "decoding")
        except PretrainError as error:
            raise PretrainError(f"scbench: cache {self.cache!r}: accepted: {', '.join(OWN)}; or: {error}") from error
        if not isinstance(method, OverCache):
            raise PretrainError(
                f"scbench: cache {method.name!r}: accepted: {', '.join(OWN)}, or a decoding method over the cache, "
                "such as pyramid_infer"
            )
        return method

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on contexts made of documents with `text`, and for `many_shot` `domain`."""
        length, method = self._length(model), self._method()
        scored: dict[str, dict[str, NDArray[np.float64]]] = {mode: {} for mode in MODES if self.mode in ("both", mode)}
        sizes, tokens = [], []
        names = self.tasks or tuple(n for n in TASKS if n != "many_shot" or _labelled(documents, self.turns))
        with evaluating(model), nullcontext() if method is None else method(model):
            for task in names:
                values: dict[str, list[list[tuple[float, float]]]] = {mode: [] for mode in scored}
                for number in range(self.contexts):
                    asked = _Asked(model, tokenizer, self.shared(task, number, tokenizer, documents, length))
                    reader = Reader(model, (self.sink, self.window) if self.cache == "window" else None)
                    reader.read(asked.context)
                    sizes.append(reader.nbytes)
                    tokens.append(len(asked.context))
                    for mode in scored:
                        values[mode].append(self.ask(asked, reader, going_on=mode == "multi_turn"))
                for mode in scored:
                    scored[mode][task] = np.array(values[mode])
        return self._measured(scored, sizes, tokens)

    def _length(self, model: PreTrainedModel) -> int:
        limit = positions_of(model)
        length = self.length or min(4096, limit or 4096)
        if isinstance(limit, int) and length > limit:
            raise PretrainError(f"scbench: length {length}: accepted: at most the model's {limit} positions")
        return length

    def shared(
        self,
        task: str,
        number: int,
        tokenizer: PreTrainedTokenizerBase,
        documents: Sequence[Document],
        length: int,
    ) -> Shared:
        """The context and queries number `number` of a task, so long that they fit `length` tokens together."""
        backend = plain_backend(tokenizer)

        def count(texts: Sequence[str]) -> list[int]:
            return [len(getattr(encoding, "ids", encoding)) for encoding in encode_plain(backend, tokenizer, texts)]

        room, excess = length, 0
        for _ in range(8):
            maker = Maker(
                documents, count, seed=(self.seed, list(TASKS).index(task), number), room=room, turns=self.turns,
                width=self.width, hops=self.hops,
            )  # fmt: skip
            made = TASKS[task](maker)
            excess = 1 + sum(count([made.context, *(turn.query for turn in made.turns)])) - length
            excess += sum(count([f" {turn.answer}" for turn in made.turns])) + self.slack * self.turns
            if excess <= 0:
                return made
            room -= max(excess, length // 16)
            if room <= 0:
                break
        raise PretrainError(
            f"scbench: length {length}: {task} with {self.turns} turns needs {excess} tokens more; "
            "accepted: a greater length, or fewer turns"
        )

    def ask(self, asked: _Asked, reader: Reader, *, going_on: bool) -> list[tuple[float, float]]:
        """Whether each answer is right and the mean log-likelihood of its tokens; the reader stays as it is."""
        scores = []
        conversation = reader.fork() if going_on else reader
        for query, answer, text in zip(asked.queries, asked.answers, asked.texts, strict=True):
            current = conversation if going_on else conversation.fork()
            before_1V = current.read(query)
            continuation, words = asked.continued(current.fork(), before_1V, len(answer) + self.slack)
            follower = current if not going_on or self.golden else current.fork()
            logits_KV = torch.cat([before_1V, follower.read(answer, len(answer))[:-1]])
            logp_K = logits_KV.double().log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
            if going_on and not self.golden and continuation:
                current.read(continuation)
            scores.append((float(right(words, text)), float(logp_K.mean())))
        return scores

    def _measured(
        self, scored: dict[str, dict[str, NDArray[np.float64]]], sizes: list[int], tokens: list[int]
    ) -> Measured:
        metrics = {
            "scbench_kv_bytes": float(np.mean(sizes)),
            "scbench_context_tokens": float(np.mean(tokens)),
            "scbench_contexts": float(len(sizes)),
        }
        intervals = {}
        for mode, by_task in scored.items():
            for k, end in enumerate(("", "_logp")):
                name = f"scbench_{mode}"
                every_NT = np.concatenate([values_NT2[..., k] for values_NT2 in by_task.values()])
                metrics[name + end] = float(every_NT.mean())
                metrics |= {f"{name}_{task}{end}": float(v_NT2[..., k].mean()) for task, v_NT2 in by_task.items()}
                metrics |= {f"{name}{end}@{t + 1}": float(v_N.mean()) for t, v_N in enumerate(every_NT.T)}
                means_R = resampled_sums(every_NT.mean(1)[:, None], self.resamples, self.seed)[:, 0] / len(every_NT)
                intervals[name + end] = bounds(means_R)
        return Measured(metrics, intervals=intervals)


def _labelled(documents: Sequence[Document], turns: int) -> bool:
    """Whether there are domains to tell apart, with documents enough."""
    names = [d["domain"] for d in documents if d.get("domain")]
    return len(set(names)) > 1 and len(names) >= 2 * (turns + len(set(names)))


class _Asked:
    """The tokens of a context, its queries and answers: each encoded by itself, so that a cache can end anywhere."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shared: Shared) -> None:
        vocabulary = Vocabulary.of(tokenizer)
        self.tokenizer, self.ends = tokenizer, ends(model, vocabulary)
        begin = [] if vocabulary.begin is None else [vocabulary.begin]
        self.context = begin + encode(tokenizer, [shared.context])[0].tolist()
        self.queries = [ids.tolist() for ids in encode(tokenizer, [turn.query for turn in shared.turns])]
        self.answers = [ids.tolist() for ids in encode(tokenizer, [f" {turn.answer}" for turn in shared.turns])]
        self.texts = [turn.answer for turn in shared.turns]

    def continued(self, reader: Reader, before_1V: Tensor, most: int) -> tuple[list[int], str]:
        """What the model says, greedily, up to its first line's end: the tokens that it went on with, and the text."""
        continuation: list[int] = []
        while len(continuation) < most:
            token = int(before_1V[-1].argmax())
            text = text_of(self.tokenizer, [*continuation, token])
            if token in self.ends or "\n" in text.lstrip():
                return continuation, text if token not in self.ends else text_of(self.tokenizer, continuation)
            continuation.append(token)
            if len(continuation) < most:
                before_1V = reader.read([token])
        return continuation, text_of(self.tokenizer, continuation)


class Reader:
    """A model and its cache of what was read so far."""

    def __init__(self, model: PreTrainedModel, window: tuple[int, int] | None = None) -> None:
        self.model, self.window = model, window
        self.cache: Cache | None = None
        self.seen = 0

    def read(self, tokens: Sequence[int], keep: int = 1) -> Tensor:
        """Read tokens after those before; returns the last `keep` of their `logits_KV`, on the CPU."""
        device = self.model.device
        output = self.model(
            input_ids=torch.tensor([list(tokens)], device=device), past_key_values=self.cache, use_cache=True,
            position_ids=torch.arange(self.seen, self.seen + len(tokens), device=device)[None], logits_to_keep=keep,
        )  # fmt: skip
        self.cache, self.seen = kept(self.model, output), self.seen + len(tokens)
        if self.window is not None:
            self._evict(*self.window)
        return output.logits[0].float().cpu()

    def fork(self) -> Reader:
        """Another reader that has read the same."""
        other = Reader(self.model, self.window)
        other.cache, other.seen = copy.deepcopy(self.cache), self.seen
        return other

    def _read(self) -> Cache:
        assert self.cache is not None, "nothing has been read"
        return self.cache

    def _evict(self, sink: int, window: int) -> None:
        """Keep the first and the last tokens of each layer; they stay at the positions at which they were read."""
        for layer in layers_of(self._read()):
            if getattr(layer, "is_sliding", False):
                raise PretrainError(
                    "scbench: cache 'window': the model has layers of sliding attention; accepted: full"
                )
            kept = layer.keys.shape[2]
            if kept > sink + window:
                layer.keys, layer.values = (
                    torch.cat([both[:, :, :sink], both[:, :, kept - window :]], 2)
                    for both in (layer.keys, layer.values)
                )

    @property
    def nbytes(self) -> int:
        """The bytes of keys and values."""
        return cache_bytes(self._read())
