"""Fewer tokens for a model: only the rows and tokens that a domain's text uses.

Shape letter: V old tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.bounds import Count, Whole
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._calibration import batches_of
from pretrain.surgery.vocabulary._trim import check, counted, cut


@dataclass(frozen=True)
class TrimVocabulary(Surgery):
    """An Efficient Multilingual Language Model Compression through Vocabulary Trimming (arXiv:2305.15020).

    Tokens that the stage's text does not use are deleted, with their rows of the embeddings, of the head and of its
    bias; what stays keeps its order and its rows, so that its logits are as before: W' = W[kept]. Kept are the tokens
    of the text that occur `minimum` times or more, of these the `keep` most frequent (0: all), and besides the special
    and other added tokens, those that the configuration names, the alphabet (bytes, or, of a tokenizer without bytes,
    single characters), and for BPE all parts of the kept tokens by any merge. BPE keeps its merges' order and Unigram
    its scores: text whose tokens are all kept is split as before. The text is all that the
    stage's `corpus` has for training. Tokens of BPE, Unigram or WordPiece.
    """

    needs_text = True
    new_vocabulary: ClassVar[bool] = True

    keep: Whole = 0
    minimum: Count = 1

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model with fewer rows; the tokenizer, and the text in its numbers, go back in `inputs.extra`."""
        batches_of(inputs, self.name)
        inputs, tokenizer = check(self.name, model, inputs)
        count_V = counted(self.name, model, inputs, tokenizer)
        return cut(self.name, model, inputs, self.chosen(count_V), count_V)

    def chosen(self, count_V: Tensor) -> list[int]:
        """The tokens to keep for how often they occur; of equally frequent ones the first."""
        order = torch.argsort(count_V, descending=True, stable=True)
        order = order[count_V[order] >= self.minimum]
        return (order[: self.keep] if self.keep else order).tolist()
