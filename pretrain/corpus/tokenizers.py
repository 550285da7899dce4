"""Tokenizers, trained with the `tokenizers` library and saved as plain `transformers` tokenizers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pretrain.core.bounds import Whole, check_value
from pretrain.core.encoding.stored import check_opened, check_stored
from pretrain.core.errors import PretrainError, unknown
from pretrain.core.folders import verify
from pretrain.core.foreign.code import needs_consent
from pretrain.core.foreign.configs import unmarked
from pretrain.core.foreign.parsing import gave_up
from pretrain.core.processors import brought_opener
from pretrain.core.quick.trust import check_trust, offline
from pretrain.core.quick.vocabulary import CLS, END, MASK, PAD, SEP, SPLIT, UNKNOWN, special_tokens

ALGORITHMS = ("bpe", "unigram", "bytes")


def train_tokenizer(
    texts: Iterable[str],
    *,
    algorithm: str = "bpe",
    vocab_size: int = 8192,
    mask: bool = False,
    cls: bool = False,
    sentinels: int = 0,
    extra: Iterable[str] = (),
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of exactly `vocab_size` entries (special tokens included; fewer when the text gives no more).

    `algorithm`: `bpe` (byte-level, lossless), `unigram` (over bytes, after NFC), `bytes` (the 256 bytes, whatever
    `vocab_size`). A document ends with `<|endoftext|>`, which begins it too, unless `cls` asks for `<|cls|>` …
    `<|sep|>`. `mask` adds `<|mask|>`, `sentinels` so many `<extra_id_N>`, `extra` more.
    """
    check_value("vocab_size", vocab_size, int)
    check_value("sentinels", sentinels, Whole)
    if algorithm not in ALGORITHMS:
        raise unknown("tokenizer algorithm", algorithm, ALGORITHMS)
    special = special_tokens(algorithm, mask=mask, cls=cls, sentinels=sentinels, extra=extra)
    if algorithm != "bytes" and vocab_size < len(special) + 256:
        raise PretrainError(
            f"vocab_size {vocab_size}: accepted: {len(special) + 256} or more (256 bytes, special tokens)"
        )
    tokenizer = (
        _unigram(texts, vocab_size, special) if algorithm == "unigram" else _bpe(texts, algorithm, vocab_size, special)
    )
    if cls:
        ids = [(t, tokenizer.token_to_id(t)) for t in (CLS, SEP)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{CLS} $A {SEP}", pair=f"{CLS} $A {SEP} $B {SEP}", special_tokens=ids
        )
    names = {"pad_token": PAD, "eos_token": SEP if cls else END, "bos_token": CLS if cls else END}
    names |= {"unk_token": UNKNOWN} if algorithm == "unigram" else {}
    names |= {"mask_token": MASK} if mask else {}
    names |= {"cls_token": CLS, "sep_token": SEP} if cls else {}
    more = [t for t in special if t not in names.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=more, clean_up_tokenization_spaces=False, **names
    )


def _bpe(texts: Iterable[str], algorithm: str, vocab_size: int, special: list[str]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if algorithm == "bytes":
        tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.add_special_tokens(special)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _unigram(texts: Iterable[str], vocab_size: int, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token=UNKNOWN, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or of a checkpoint; nothing is fetched, and its code is run with consent alone."""
    if Path(folder).is_dir():
        verify(Path(folder), lambda name: not name.endswith(".safetensors"))
    check_trust(folder)
    check_stored(Path(folder))
    try:
        with offline(), unmarked(Path(folder)) as place:
            brought = brought_opener(Path(folder), "AutoTokenizer")
            if brought is not None:
                made = cast("PreTrainedTokenizerBase", brought(place))
            else:
                made = AutoTokenizer.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
            check_opened(Path(folder), made)
            return made
    except PretrainError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not gave_up(error):
            raise
        reason = needs_consent(Path(folder), "config.json").removeprefix("; ") or " ".join(str(error).split())[:200]
        raise PretrainError(f"no tokenizer can be loaded from {folder}: {reason}") from error
