"""What flows from the loader to the model: rows of packed documents, the vocabulary's special tokens, batches.

Shape letters: B rows of a batch, L tokens of a row, D pieces of documents in a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.core.encoding import frame, sequence_ends
from pretrain.core.errors import PretrainError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pretrain.core.encoding import Encoder

Document: TypeAlias = dict[str, Any]  # its columns, of the types that the corpus declares
Batch = dict[str, torch.Tensor]
"""Named tensors. What the loop itself reads: `tokens` () and `weight` (), the numbers of tokens and of targets, which
stay on the host; `domain_B` and `row_B`, where each row comes from; all other names are between an objective's
`prepare` and its `loss`."""


@dataclass(frozen=True)
class Row:
    """Pieces of documents packed to at most one row length; the pieces never see one another."""

    tokens_L: NDArray[np.int32]
    starts_D: NDArray[np.int32]  # where each piece begins in `tokens_L`; the first is 0
    documents_D: NDArray[np.int64]  # which document of the corpus each piece is from
    domain: int  # all pieces of a row are of one domain
    index: int  # the row's number in the packing plan

    @property
    def tokens(self) -> int:
        """How many tokens of text it holds."""
        return len(self.tokens_L)

    def pieces(self) -> list[NDArray[np.int32]]:
        """The pieces one by one, in order."""
        return np.split(self.tokens_L, self.starts_D[1:])

    def cut(self, length: int) -> list[Row]:
        """As rows of at most `length` tokens, in order; a piece that goes over a cut becomes two."""
        rows = []
        for start in range(0, len(self.tokens_L), length):
            ends_D = np.append(self.starts_D[1:], len(self.tokens_L))
            inside_D = (ends_D > start) & (self.starts_D < start + length)
            starts_D = np.maximum(self.starts_D[inside_D] - start, 0).astype(np.int32)
            part_L, documents_D = self.tokens_L[start : start + length], self.documents_D[inside_D]
            rows.append(Row(part_L, starts_D, documents_D, self.domain, self.index))
        return rows


@dataclass(frozen=True)
class Example:
    """A whole document with all its columns: what an objective that reads examples is given in place of a row."""

    columns: Document
    domain: int
    index: int  # its number in the split

    @property
    def tokens(self) -> int:
        """Not known before an objective has made them; it says so in its batch."""
        return 0


@dataclass(frozen=True)
class Vocabulary:
    """The token ids that objectives need by name; `None` where the tokenizer lacks one."""

    size: int
    pad: int
    bos: int | None = None
    eos: int | None = None  # ends an answer, of a chat model its turn
    frame: tuple[int | None, int | None] | None = None  # before and after a document, where these are not bos and eos
    mask: int | None = None
    sentinels: tuple[int, ...] = ()  # <extra_id_0>, <extra_id_1>, … of span corruption
    special: frozenset[int] = frozenset()
    tokens: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """Read from any `transformers` tokenizer, or the one that a processor holds."""
        if not hasattr(tokenizer, "get_vocab"):
            held = getattr(tokenizer, "tokenizer", None)
            if held is None:
                raise PretrainError(f"{type(tokenizer).__name__} has no tokenizer; accepted: a tokenizer, for text")
            tokenizer = held
        known = tokenizer.get_vocab()
        tokens: list[str] = [""] * len(tokenizer)
        for token, index in known.items():
            if index < len(tokens):
                tokens[index] = token
        sentinels: list[int] = []
        while (sentinel := known.get(f"<extra_id_{len(sentinels)}>")) is not None:
            sentinels.append(sentinel)
        pad: int | None = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ends, around = sequence_ends(tokenizer), frame(tokenizer)
        return cls(
            size=len(tokenizer),
            pad=0 if pad is None else pad,
            bos=ends[0],
            eos=ends[1],
            frame=None if around == ends else around,
            mask=tokenizer.mask_token_id,
            sentinels=tuple(sentinels),
            special=frozenset(tokenizer.all_special_ids) | frozenset(sentinels),
            tokens=tuple(tokens),
        )

    @property
    def before(self) -> int | None:
        """What stands before a document, as `core.encoding.frame` has it."""
        return self.frame[0] if self.frame else self.bos

    @property
    def after(self) -> int | None:
        """What stands after a document."""
        return self.frame[1] if self.frame else self.eos

    @property
    def begin(self) -> int | None:
        """What a document begins with; its end stands for that where the tokenizer has no token of its own."""
        return self.before if self.before is not None else self.after

    @cached_property
    def special_V(self) -> NDArray[np.bool_]:
        """Which ids are special tokens: never masked, never sampled as a replacement."""
        special_V = np.zeros(self.size, dtype=bool)
        special_V[[i for i in self.special if i < self.size]] = True
        return special_V

    @cached_property
    def ordinary(self) -> NDArray[np.int64]:
        """The ids of all other tokens."""
        return np.flatnonzero(~self.special_V)

    @cached_property
    def starts_word_V(self) -> NDArray[np.bool_]:
        """Which tokens begin a word: with the space mark of byte-level BPE or Unigram, or without WordPiece's ##."""
        marks = ("Ġ", "▁", "Ċ", "ĉ")
        if any(t.startswith(marks) for t in self.tokens):
            return np.array([t.startswith(marks) for t in self.tokens], dtype=bool)
        return np.array([not t.startswith("##") for t in self.tokens], dtype=bool)


NO_VOCABULARY = Vocabulary(size=0, pad=0)  # of a model that reads no text


class Pool(Protocol):
    """The training examples (`corpus.examples.Examples`)."""

    def __len__(self) -> int: ...

    def row(self, plan: object, index: int) -> Example:
        """One document."""

    def members(self, column: str) -> dict[str, list[int]]:
        """The numbers of the documents by what a column says, in order."""


@dataclass(frozen=True)
class Context:
    """What an objective may know when it prepares a batch, besides the rows."""

    vocabulary: Vocabulary
    length: int  # L: the row length the model is trained at
    rng: np.random.Generator  # a function of (seed, step, rank, micro-batch): the same batch again on resume
    progress: float = 0.0  # how much of the budget is spent, 0 to 1
    encoder: Encoder | None = None  # where the rows are examples: what makes tokens of their text, if they have any
    processor: Any = None  # and what makes a model's inputs of their columns (`core.processors`)
    config: Any = None  # and the configuration of the model that they are for
    labels: tuple[str, ...] = ()  # and the names of the classes, in the order of their numbers
    pool: Pool | None = None  # and the training examples, for an objective that shows some beside each
    predicting: bool = False  # whether the batch is for `predict`
    domains: tuple[str, ...] = ()  # the corpus's, by the numbers that rows and examples have
    cut: set[int] = field(default_factory=set, compare=False)  # places in the batch of examples that lose tokens


def rows_to_tensors(rows: Sequence[Row], length: int, pad: int) -> Batch:
    """`tokens_BL`, `document_BL` (piece number from 1, 0 on padding) and `position_BL` (restarts at each piece), int64.

    Positions count on in the padding, which is a piece of its own. `packed` and `padded` say whether any row holds
    several pieces, and any padding; `sizes_2` are what `spread` says.
    """
    tokens_BL = np.full((len(rows), length), pad, dtype=np.int64)
    document_BL = np.zeros((len(rows), length), dtype=np.int64)
    position_BL = np.zeros((len(rows), length), dtype=np.int64)
    for b, row in enumerate(rows):
        n = len(row.tokens_L)
        tokens_BL[b, :n] = row.tokens_L
        starts = np.append(row.starts_D, n).astype(np.int64)
        document_BL[b, :n] = np.repeat(np.arange(1, len(starts)), np.diff(starts))
        position_BL[b] = np.arange(length) - np.repeat(starts, np.diff(np.append(starts, length)))
    return {
        "tokens_BL": torch.from_numpy(tokens_BL),
        "document_BL": torch.from_numpy(document_BL),
        "position_BL": torch.from_numpy(position_BL),
        "packed": torch.tensor(any(len(row.starts_D) > 1 for row in rows)),
        "padded": torch.tensor(any(len(row.tokens_L) < length for row in rows)),
        "sizes_2": torch.tensor(spread(document_BL)),
    }


def spread(document_BL: NDArray[np.int64]) -> tuple[int, int]:
    """How many rows the pieces fill that have each one of their own, and how long they are: both rounded up.

    Up to a multiple of four, and by `padded_length`, so that there are few shapes.
    """
    number, longest = exact(document_BL)
    return -(-number // 4) * 4, padded_length(longest, document_BL.shape[1])


def exact(document_BL: NDArray[np.int64]) -> tuple[int, int]:
    """How many pieces there are, and the length of the longest."""
    starts_BL = (document_BL != 0) & (document_BL != np.pad(document_BL[:, :-1], ((0, 0), (1, 0))))
    counts = np.bincount((starts_BL.cumsum() - 1)[document_BL.ravel() != 0], minlength=1)
    return len(counts), int(counts.max())


def padded_length(longest: int, length: int) -> int:
    """`longest` rounded up to a multiple of an eighth of a row's `length`, or of 64 tokens if that is less.

    Batches as long as their longest row have a new shape nearly each time, and each shape is compiled, and its work
    counted, anew.
    """
    step = max(1, min(64, length // 8))
    return -(-longest // step) * step


def document_mask(document_BL: torch.Tensor, *, causal: bool, prefix_BL: torch.Tensor | None = None) -> torch.Tensor:
    """Who may attend to whom: a boolean `mask_B1LL`, True where attention is allowed, as `transformers` takes it.

    Attention stays inside each document; `causal` forbids the future, except inside `prefix_BL` (True on the tokens
    that everyone in the document may see). Padding attends to padding, so that no row of the mask is empty.
    """
    mask_BLL = document_BL[:, :, None] == document_BL[:, None, :]
    if causal:
        length = document_BL.shape[1]
        allowed_LL = torch.ones(length, length, dtype=torch.bool, device=document_BL.device).tril()
        allowed = allowed_LL[None] if prefix_BL is None else allowed_LL[None] | prefix_BL[:, None, :]
        mask_BLL = mask_BLL & allowed
    return mask_BLL[:, None]


def additive(mask_B1LL: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as the numbers that attention adds to its scores: 0 where allowed, else the lowest there is.

    The lowest of float32 would be minus infinity once autocast narrows it to bfloat16, and a row without a single
    finite score has no softmax.
    """
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)
    return torch.zeros(mask_B1LL.shape, dtype=dtype, device=mask_B1LL.device).masked_fill_(~mask_B1LL, lowest)


def is_count(name: str) -> bool:
    """Whether a tensor of a batch is a number that the host reads: `tokens`, `weight`, `weight_<term>`."""
    return name in ("tokens", "weight") or name.startswith("weight_")


def counts(batch: Batch) -> dict[str, float]:
    """`weight` and `weight_<term>`: what each term of a loss is the mean over."""
    return {name: float(value) for name, value in batch.items() if is_count(name) and name != "tokens"}


LAYOUT = ("packed", "padded", "sizes_2", "sizes_3")  # by which the host chooses a kernel, or lays them out anew


def _stays(name: str) -> bool:
    """Whether the host reads it, and must not wait for the device to."""
    return is_count(name) or name in LAYOUT or name == "cut"


def pinned(batch: Batch) -> Batch:
    """The same batch in pinned memory, but for what the host reads."""
    return {k: v if _stays(k) else v.pin_memory() for k, v in batch.items()}


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The same batch on `device`, but for what the host reads: counts, and how its rows are laid out."""
    return {k: v if _stays(k) else v.to(device, non_blocking=True) for k, v in batch.items()}
