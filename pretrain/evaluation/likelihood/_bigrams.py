"""What counts of adjacent tokens make of held-out text: a model must find it likelier to have learnt anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pretrain.corpus.bigrams import Bigrams
from pretrain.evaluation import Measured
from pretrain.evaluation.likelihood.held_out import measured, rows, tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pretrain.corpus.shards import Shards
    from pretrain.corpus.sources import Document


def bigram_line(
    train: Shards, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], *, seen: int | None = None
) -> Measured:
    """What `held_out` finds of the same documents, of bigram counts of the training tokens in a model's place.

    `seen`: how many tokens a model was trained on, if not on all; as many are counted.
    """
    (line,) = bigram_lines(train, tokenizer, documents, [seen])
    return line


def bigram_lines(
    train: Shards, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], seen: Sequence[int | None]
) -> list[Measured]:
    """The same for several counts of tokens, of documents that are tokenised once."""
    tokens = tokens_of(tokenizer, documents)
    return [measured(rows(tokenizer, documents, tokens, Bigrams.of(train, each).nll(tokens))) for each in seen]
