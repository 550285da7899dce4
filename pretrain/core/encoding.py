"""Text in tokens, as shards hold it: a special token's name in a text is plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from pretrain.core.errors import PretrainError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEGIN, END = "document_begin", "document_end"  # fields of tokenizer_config.json, read here alone
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "</s>")  # of documents, in pretraining
_PIECE = "\x00{}\x00"  # stands for a message while a chat template is filled in


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


def chat_tokens(tokenizer: PreTrainedTokenizerBase, user: str, system: str = "") -> tuple[list[int], list[int]]:
    """A user's message in the tokenizer's chat template, up to where the answer begins: what is before, and the rest.

    What stands before it is the system's message with what frames it. Special tokens are the template's alone: their
    names in a message are text. Raises `PretrainError` for a template that cannot be filled in.
    """
    messages = [{"role": "system", "content": _PIECE.format(0)}] if system else []
    messages += [{"role": "user", "content": _PIECE.format(1)}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # whatever a template raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise PretrainError(f"the chat template cannot be filled in ({reason}); accepted: another template") from error
    before, _, after = text.partition(_PIECE.format(1))
    start, _, between = before.partition(_PIECE.format(0))

    def template(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False)["input_ids"]) if part else []

    def plain(part: str) -> list[int]:
        return [int(token) for token in encode(tokenizer, [part])[0]] if part else []

    return [*template(start), *plain(system), *template(between)], [*plain(user), *template(after)]


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """What stands before and after a document as the model was trained: token ids, None for nothing.

    It is what `document_begin` and `document_end` of `tokenizer_config.json` say. Otherwise it is the tokenizer's
    beginning and end of a sequence (or class token and separator), unless these are marks of a chat's turns: a chat
    model's documents begin with the separator of its pretraining, where its special tokens have one, and end with
    nothing. Raises `PretrainError` for a token that the tokenizer does not have.
    """
    settings, known = getattr(tokenizer, "init_kwargs", {}), tokenizer.get_vocab()
    begin, end = sequence_ends(tokenizer)
    if (marks := _turn_marks(tokenizer)) and (begin in marks or end in marks):
        separator = next((known[name] for name in SEPARATORS if name in known and known[name] not in marks), None)
        begin = separator if begin is None or begin in marks else begin
        end = None if end in marks else end
    return _set(settings, BEGIN, begin, known), _set(settings, END, end, known)


def sequence_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """The tokenizer's beginning and end of a sequence, or its class token and separator."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return begin, end


def _turn_marks(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that the chat template puts around each turn, a user's included."""
    if not getattr(tokenizer, "chat_template", None):
        return frozenset()
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant", "user")]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception:  # whatever a template raises: it says nothing then
        return frozenset()
    return frozenset(mark for mark in sequence_ends(tokenizer) if mark is not None and ids.count(mark) >= len(turns))


def _set(settings: Mapping[str, object], field: str, usual: int | None, known: Mapping[str, int]) -> int | None:
    if field not in settings:
        return usual
    token = settings[field]
    if token is None:
        return None
    if token not in known:
        raise PretrainError(f"tokenizer_config.json: {field} {token!r}: accepted: a token of the vocabulary, or null")
    return known[str(token)]


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
