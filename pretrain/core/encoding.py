"""Text in tokens, as shards hold it: a special token's name in a text is plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from pretrain.core.errors import PretrainError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """A copy of the `tokenizers` object that neither cuts nor pads, and reads special tokens in a text as text."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return None
    backend: Tokenizer = Tokenizer.from_str(fast.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[NDArray[np.int64]]:
    """The texts' tokens as shards hold them, without the ends: a special token's name in a text is plain text."""
    encoded = encode_plain(plain_backend(tokenizer), tokenizer, texts)
    return [np.array(ids_of(encoding), np.int64) for encoding in encoded]


class Encoder:
    """A tokenizer's plain text encoding for those who encode many lots: without ends, cuts or padding."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.backend = tokenizer, plain_backend(tokenizer)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's tokens."""
        encoded = encode_plain(self.backend, self.tokenizer, texts)
        return [list(ids_of(encoding)) for encoding in encoded]

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """A text's tokens, and the characters `[start, end)` that each stands for."""
        if self.backend is None:
            raise PretrainError("tokens' places in a text: accepted: a fast tokenizer (one with tokenizer.json)")
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets


def encode_plain(
    backend: Tokenizer | None, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[Encoding | list[int]]:
    """Lists of ids or objects with `ids`; for those who encode many lots with the copy that `plain_backend` made."""
    if backend is None:
        ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*ids]
    return [*backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def ids_of(encoding: Encoding | list[int]) -> list[int]:
    """The tokens of what `encode_plain` gives."""
    return encoding if isinstance(encoding, list) else encoding.ids


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of one sequence of tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))
