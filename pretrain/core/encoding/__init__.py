"""Text in tokens, as shards hold it: a special token's name in a text is plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from pretrain.core.errors import PretrainError
from pretrain.core.foreign.parsing import parsing
from pretrain.core.system.templates import filled

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

BEGIN, END = "document_begin", "document_end"  # fields of tokenizer_config.json, read here alone
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "</s>")  # of documents, in pretraining
ASSISTANT = "assistant"  # the role whose messages are answers
FRAMES = 1024  # sequences of roles whose frames are kept
_PIECE = "\x00{}\x00"  # stands for a message while a chat template is filled in


@contextmanager
def tokenizing() -> Iterator[None]:
    """While a tokenizer works: what it, or the regular expressions in it, give up at is a `PretrainError`."""
    with parsing("the tokenizer", "a text that it takes, or another tokenizer"):
        yield


def encoded(
    tokenizer: PreTrainedTokenizerBase, texts: str | list[str], pairs: list[str] | None = None, **options: object
) -> BatchEncoding:
    """What the tokenizer makes of texts with options of its own; a `PretrainError` where it gives up."""
    with tokenizing():
        work: Callable[..., BatchEncoding] = tokenizer
        return work(texts, **options) if pairs is None else work(texts, pairs, **options)


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


def framing(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], *, answering: bool = False) -> list[str]:
    """What the tokenizer's chat template writes before, between and after messages: one part more than there are roles.

    `answering`: up to where the answer begins. Raises `PretrainError` for a template that cannot be filled in, or that
    leaves out a message.
    """
    messages = [{"role": role, "content": _PIECE.format(number)} for number, role in enumerate(roles)]
    text = filled(tokenizer, messages, answering=answering)
    parts = []
    for number, role in enumerate(roles):
        before, piece, text = text.partition(_PIECE.format(number))
        if not piece:
            raise PretrainError(f"the chat template leaves out a message of {role!r}; accepted: one that writes it")
        parts.append(before)
    return [*parts, text]


def chat_tokens(tokenizer: PreTrainedTokenizerBase, user: str, system: str = "") -> tuple[list[int], list[int]]:
    """A user's message in the tokenizer's chat template, up to where the answer begins: what is before, and the rest.

    What stands before it is the system's message with what frames it. Special tokens are the template's alone: their
    names in a message are text. Raises `PretrainError` as `framing` does.
    """
    encoder = Encoder(tokenizer)
    parts = encoder.frames(("system", "user") if system else ("user",), answering=True)
    *before, content = encoder.ids([system, user] if system else [user])
    start = [*parts[0], *(before[0] if system else ()), *(parts[1] if system else ())]
    return start, [*content, *parts[-1]]


def prompted(
    tokenizer: PreTrainedTokenizerBase, begin: int | None, user: str, system: str = ""
) -> tuple[list[int], list[int]]:
    """A prompt's tokens up to where the answer begins, in two parts: the system's, and the user's.

    In the tokenizer's chat template, where it has one; otherwise the two texts one after the other, each encoded by
    itself, after the token `begin`. A template that knows no system's message has it before the user's.
    """
    if getattr(tokenizer, "chat_template", None):
        try:
            return chat_tokens(tokenizer, user, system)
        except PretrainError:
            if not system:
                raise
            return chat_tokens(tokenizer, f"{system}\n\n{user}")
    both = [[int(token) for token in encode(tokenizer, [text])[0]] if text else [] for text in (system, user)]
    return ([] if begin is None else [begin]) + both[0], both[1]


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
        text = filled(tokenizer, turns, answering=False)
        ids: list[int] = encoded(tokenizer, text, add_special_tokens=False)["input_ids"]
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
        self._frames: dict[tuple[tuple[str, ...], bool], list[list[int]]] = {}

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's tokens."""
        encoded = encode_plain(self.backend, self.tokenizer, texts)
        return [list(ids_of(encoding)) for encoding in encoded]

    def frames(self, roles: tuple[str, ...], *, answering: bool = False) -> list[list[int]]:
        """The tokens of the parts of `framing`."""
        known = self._frames.get((roles, answering))
        if known is None:
            parts = framing(self.tokenizer, roles, answering=answering)
            known = [
                encoded(self.tokenizer, part, add_special_tokens=False)["input_ids"] if part else [] for part in parts
            ]
            if len(self._frames) < FRAMES:
                self._frames[roles, answering] = known
        return known

    def conversation(self, turns: Sequence[tuple[str, str]], *, answering: bool = False) -> tuple[list[int], list[int]]:
        """A conversation's tokens in the chat template, and for each the number of the answer that it is of, or -1.

        `turns` are (role, content). An answer is what an `assistant` says with the special token that ends it. Special
        tokens are the template's alone: their names in a message are text. `answering`: up to where an answer begins.
        """
        first, *others = self.frames(tuple(role for role, _ in turns), answering=answering)
        special, answers = set(self.tokenizer.all_special_ids), 0
        ids, answer = list(first), [-1] * len(first)
        for (role, _), content, after in zip(turns, self.ids([words for _, words in turns]), others, strict=True):
            number = -1
            if role == ASSISTANT:
                number, answers = answers, answers + 1
            end = next((place for place, token in enumerate(after, 1) if token in special), 0) if number >= 0 else 0
            ids += [*content, *after]
            answer += [number] * (len(content) + end) + [-1] * (len(after) - end)
        closing = sequence_ends(self.tokenizer)[1]
        if turns and turns[-1][0] == ASSISTANT and not special.intersection(others[-1]) and closing is not None:
            ids, answer = [*ids, closing], [*answer, answers - 1]  # the template ends an answer with nothing
        return ids, answer

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """A text's tokens, and the characters `[start, end)` that each stands for."""
        if self.backend is None:
            raise PretrainError("tokens' places in a text: accepted: a fast tokenizer (one with tokenizer.json)")
        with tokenizing():
            encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets


def encode_plain(
    backend: Tokenizer | None, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[Encoding | list[int]]:
    """Lists of ids or objects with `ids`; for those who encode many lots with the copy that `plain_backend` made."""
    if backend is None:
        plain = encoded(tokenizer, list(texts), add_special_tokens=False, split_special_tokens=True)
        return [*plain["input_ids"]]
    with tokenizing():
        return [*backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def lengths(backend: Tokenizer, texts: Sequence[str]) -> list[int]:
    """How many tokens a `tokenizers` object makes of each text, without ends."""
    return [len(ids) for ids in numbers(backend, texts)]


def numbers(backend: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The numbers of the tokens that a `tokenizers` object makes of each text, without ends."""
    with tokenizing():
        return [each.ids for each in backend.encode_batch(list(texts), add_special_tokens=False)]


def spans(backend: Tokenizer, text: str) -> list[tuple[int, int]]:
    """At which characters of a text each of its tokens begins and ends."""
    with tokenizing():
        return backend.encode(text, add_special_tokens=False).offsets


def ids_of(encoding: Encoding | list[int]) -> list[int]:
    """The tokens of what `encode_plain` gives."""
    return encoding if isinstance(encoding, list) else encoding.ids


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of one sequence of tokens."""
    with tokenizing():
        return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))
