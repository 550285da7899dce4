"""Rows for new tokens from what the model makes of their pieces, where they stand in a text.

Shape letters: B windows, L positions, E width, N new tokens, P pieces of one token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core.batch import Vocabulary
from pretrain.core.bounds import AnyInteger, Count
from pretrain.core.encoding import encode, text_of
from pretrain.core.errors import PretrainError
from pretrain.core.folders import corpus_of
from pretrain.core.method import Ref
from pretrain.core.models.families import base, embeddings, family, model_inputs
from pretrain.corpus.store import Corpus
from pretrain.surgery import Inputs, Surgery, report
from pretrain.surgery._tokens import expand, state_of
from pretrain.surgery.vocabulary.vocabulary_expansion import tables

WINDOWS = 16  # at once
DOCUMENTS = 64


class Found(NamedTuple):
    """A new token where it stands in a document: its number, and the places of its pieces among the old tokens."""

    token: int
    first: int
    after: int


@dataclass(frozen=True)
class ContextualRows(Surgery):
    """BIOptimus: Pre-training an Optimal Biomedical Language Model with Curriculum Learning for Named Entity Recognition (arXiv:2308.08625).

    The tokens of `tokenizer` that the checkpoint's lacks are added to it, and the weights of each are distilled from the
    model in the contexts where it stands: the model reads the training documents of `corpus` in its old tokens (up to
    `max_tokens`, in windows of `length`), and a new token's embedding is the mean, over its places, of the mean state of
    its pieces there. `layer` says of which states (0: the embeddings' own, -1: the last block's), and with `scaled` they
    are brought to the mean length of the old rows, since states of a block may be ten times as long; of neither is
    there anything in the abstract or the released table. Of a head that is not tied the row, and the bias, are the mean
    of the pieces', and so is the embedding of a token that stands nowhere in the text. The other half of the paper, the
    curriculum: the objective `masking_curriculum`.
    """  # noqa: E501

    families: ClassVar[tuple[str, ...]] = ("causal", "masked")
    new_vocabulary: ClassVar[bool] = True

    tokenizer: Ref
    corpus: Ref
    layer: AnyInteger = -1
    scaled: bool = True
    length: Count = 128
    max_tokens: Count = 4_000_000

    @property
    def estimated(self) -> bool:
        """Not: how much the corpus holds is not known."""
        return False

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model with more rows; the joined tokenizer is handed back in `inputs.extra`."""
        if not family(model).among(self.families):
            raise PretrainError(f"{self.name}: family {family(model).name!r}: accepted: {', '.join(self.families)}")
        before = inputs.tokenizer if inputs is not None else None
        old, new = expand(self.name, model, self.tokenizer, inputs)
        if not new:
            return model
        assert inputs is not None and before is not None
        after = inputs.extra["tokenizer"]
        pieces = spelt_by(before, after, new)
        mean_NE, times_N = self._read(model, before, after, new)
        seen = times_N > 0
        for table in tables(model):
            rows = torch.stack([table[pieces[token]].double().mean(0) for token in new])
            if table is embeddings(model).weight and bool(seen.any()):
                states_NE = mean_NE[seen]
                if self.scaled:
                    states_NE *= table[old].double().norm(dim=-1).mean() / states_NE.norm(dim=-1).mean()
                rows[seen] = states_NE.to(rows)
            table[new] = rows.to(table)
        report(inputs, **{f"{self.name}/in_context": int(seen.sum()), f"{self.name}/places": int(times_N.sum())})
        return model

    def _read(
        self, model: PreTrainedModel, before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, new: list[int]
    ) -> tuple[Tensor, Tensor]:
        """For each new token the mean state of its pieces over its places, and how many places there are."""
        number = {token: index for index, token in enumerate(new)}
        vocabulary = Vocabulary.of(before)
        sum_NE = torch.zeros(len(new), embeddings(model).weight.shape[1], dtype=torch.float64)
        times_N = torch.zeros(len(new))
        windows = self._windows(before, after, set(new), vocabulary)
        while lot := list(itertools.islice(windows, WINDOWS)):
            states_BLE = self._states(model, [ids for ids, _ in lot], vocabulary)
            for states_LE, (_, places) in zip(states_BLE, lot, strict=True):
                for place in places:
                    sum_NE[number[place.token]] += states_LE[place.first : place.after].mean(0)
                    times_N[number[place.token]] += 1
        return sum_NE / times_N.clamp(min=1)[:, None], times_N

    def _states(self, model: PreTrainedModel, windows: Sequence[list[int]], vocabulary: Vocabulary) -> Tensor:
        """`states_BLE` of the layer, of windows that are padded to one length."""
        longest = max(map(len, windows))
        ids_BL = torch.tensor([ids + [vocabulary.pad] * (longest - len(ids)) for ids in windows])
        document_BL = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in windows])
        batch = {"input_ids": ids_BL, "attention_mask": document_BL}
        states = base(model)(**model_inputs(model, batch), output_hidden_states=True).hidden_states
        if not -len(states) <= self.layer < len(states):
            raise PretrainError(
                f"{self.name}: layer {self.layer}: accepted: from {-len(states)} to {len(states) - 1}", place=("layer",)
            )
        return states[self.layer].double().cpu()

    def _windows(
        self, before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, new: set[int], vocabulary: Vocabulary
    ) -> Iterator[tuple[list[int], list[Found]]]:
        """Windows of the documents in old tokens, with the new tokens that stand in each."""
        documents = Corpus(corpus_of(Path(self.corpus))).documents("train")
        begin = [] if vocabulary.before is None else [vocabulary.before]
        end = [] if vocabulary.after is None or vocabulary.after == vocabulary.before else [vocabulary.after]
        room, left = max(1, self.length - len(begin) - len(end)), self.max_tokens
        while left > 0 and (lot := list(itertools.islice(documents, DOCUMENTS))):
            texts = [document["text"] for document in lot]
            for ids, wider in zip(encode(before, texts), encode(after, texts), strict=True):
                places = aligned(before, after, ids, wider, new)
                for start in range(0, len(ids), room):
                    inside = [p for p in places if start <= p.first and p.after <= start + room]
                    if inside and left > 0:
                        piece = ids[start : start + room].tolist()
                        left -= len(piece)
                        shift = start - len(begin)
                        yield begin + piece + end, [Found(p.token, p.first - shift, p.after - shift) for p in inside]


def spelt_by(
    before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, new: Sequence[int]
) -> dict[int, list[int]]:
    """The old tokens that spell each new one."""
    texts = [text_of(after, [token]) for token in new]
    unknown = [0 if before.unk_token_id is None else before.unk_token_id]
    return {token: ids.tolist() or unknown for token, ids in zip(new, encode(before, texts), strict=True)}


def aligned(
    before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, ids: NDArray[np.int64], wider: NDArray[np.int64],
    new: set[int],
) -> list[Found]:  # fmt: skip
    """Where new tokens stand among the old, if their ends are ends of old ones; nothing where the spelling differs."""
    old_names, new_names = (_plain(tokenizer, row) for tokenizer, row in ((before, ids), (after, wider)))
    if "".join(old_names) != "".join(new_names):
        return []
    old_ends, new_ends = (np.concatenate([[0], np.cumsum([*map(len, names)])]) for names in (old_names, new_names))
    place = {int(end): index for index, end in reversed([*enumerate(old_ends)])}
    places: list[Found] = []
    for index, token in enumerate(wider.tolist()):
        first, last = place.get(int(new_ends[index])), place.get(int(new_ends[index + 1]))
        if token in new and first is not None and last is not None and first < last:
            places.append(Found(token, first, last))
    return places


def _plain(tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int64]) -> list[str]:
    """The tokens as they are spelt, without WordPiece's sign of what goes on a word."""
    sign = state_of(tokenizer)["model"].get("continuing_subword_prefix") or ""
    return [name.removeprefix(sign) for name in tokenizer.convert_ids_to_tokens(ids.tolist())]
