"""Who completes a prompt here: a model that keeps the keys and values of what it has read.

A prompt is in two parts, the `shared` one that several prompts begin with and the `rest`; kept are the newest shared
parts. The other client is a server (`core.generation.server`).

Shape letters: L tokens, N of the whole, V vocabulary.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import encode, prompted, text_of
from pretrain.core.errors import PretrainError
from pretrain.core.generation.options import Options
from pretrain.core.generation.rows import continue_rows, stepper
from pretrain.core.generation.server import Reply
from pretrain.core.generation.settings import options_of
from pretrain.core.models.families import positions_of


class Prefixes:
    """The caches of the newest beginnings of prompts that a model has read."""

    def __init__(self, most: int = 4) -> None:
        self.most = most
        self.kept: OrderedDict[tuple[int, ...], Cache] = OrderedDict()

    def read(self, model: PreTrainedModel, prefix: Sequence[int], rest: Sequence[int]) -> tuple[Tensor, Cache, int]:
        """`logits_1V` after a prompt, the cache of it, and how many of its tokens were not read again."""
        key, shared = tuple(prefix), 0
        if not key or not rest:
            logits_1V, cache = _read(model, [*prefix, *rest], None)
            return logits_1V, cache, 0
        if key in self.kept:
            shared = len(key)
            self.kept.move_to_end(key)
        else:
            self.kept[key] = _read(model, prefix, None)[1]
            while len(self.kept) > self.most:
                self.kept.popitem(last=False)
        logits_1V, cache = _read(model, rest, copy.deepcopy(self.kept[key]))
        return logits_1V, cache, shared


def _read(model: PreTrainedModel, tokens: Sequence[int], cache: Cache | None) -> tuple[Tensor, Cache]:
    ids_1L = torch.tensor([list(tokens)], device=model.device)
    output = model(input_ids=ids_1L, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1], output.past_key_values


def continued(
    model: PreTrainedModel, prefixes: Prefixes | None, prefix: Sequence[int], rest: Sequence[int], options: Options
) -> tuple[list[int], int]:
    """The new tokens after a prompt in two parts, and how many of the prompt's were kept from before.

    Without `prefixes` all is read in one pass.
    """
    ids = [*prefix, *rest]
    limit = positions_of(model)
    if isinstance(limit, int) and len(ids) + options.max_new_tokens > limit:
        raise PretrainError(
            f"a prompt of {len(ids)} tokens and {options.max_new_tokens} new ones: accepted: at most the model's "
            f"{limit} positions together"
        )
    with torch.no_grad():
        logits_1V, cache, kept = (prefixes or Prefixes(0)).read(model, *((prefix, rest) if prefixes else ((), ids)))
        ids_1L = torch.tensor([ids], device=model.device)
        tokens_1N = continue_rows(ids_1L, logits_1V, stepper(model, cache, torch.ones_like(ids_1L)), options)
    return tokens_1N[0, len(ids) :].tolist(), kept


class LocalClient:
    """A causal model and its tokenizer.

    With a chat template the shared part is the system's message and the rest the user's; without one the text is both
    parts one after the other, each encoded by itself. `reuse` keeps the keys and values of the shared part.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, temperature: float = 0.0,
        top_p: float = 1.0, seed: int = 0,
        reuse: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.vocabulary = model, tokenizer, Vocabulary.of(tokenizer)
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator().manual_seed(seed)
        self.prefixes = Prefixes() if reuse else None

    def ids(self, shared: str, rest: str) -> tuple[list[int], list[int]]:
        """The tokens of both parts."""
        return prompted(self.tokenizer, self.vocabulary.begin, rest, shared)

    def _plain(self, text: str) -> list[int]:
        """The tokens of a text in which the names of special tokens are text."""
        return encode(self.tokenizer, [text])[0].tolist() if text else []

    def complete(self, shared: str, rest: str, *, max_tokens: int) -> Reply:
        """What the model says, up to its end."""
        prefix, tokens = self.ids(shared, rest)
        options = options_of(
            self.model, self.tokenizer, len(prefix) + len(tokens), max_new_tokens=max_tokens,
            temperature=self.temperature, top_p=self.top_p,
        )  # fmt: skip
        given = Options(**options, generator=self.generator)
        new, kept = continued(self.model, self.prefixes, prefix, tokens, given)
        text = text_of(self.tokenizer, new, skip_special_tokens=True)
        return Reply(text, len(prefix) + len(tokens), len(new), kept)

    def predictability(self, shared: str, rest: str) -> float:
        """The mean log-likelihood of the rest's tokens after the shared part: how far a query could be expected."""
        prefix, tokens = ([self.vocabulary.begin or 0, *self._plain(shared)], self._plain(rest))
        if not tokens:
            raise PretrainError("predictability: a query without tokens; accepted: some text")
        with torch.no_grad():
            ids_1N = torch.tensor([prefix + tokens], device=self.model.device)
            logits_NV = self.model(input_ids=ids_1N, use_cache=False).logits[0, len(prefix) - 1 : -1].float()
        logp_NV = logits_NV.log_softmax(-1)
        return float(logp_NV[torch.arange(len(tokens)), torch.tensor(tokens)].mean())
