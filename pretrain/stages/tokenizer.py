"""`tokenizer`: train a tokenizer on a corpus, or take one from a checkpoint; writes a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import model_validator

from pretrain.core.bounds import Count, Ge, Le, Positive
from pretrain.core.errors import PretrainError
from pretrain.core.files import atomic_folder, digest
from pretrain.core.quick.quantities import short
from pretrain.core.quick.vocabulary import special_tokens
from pretrain.corpus.store import Corpus
from pretrain.dial.choose import BYTES_AN_ENTRY, LEAST_ENTRIES
from pretrain.records import StageResult
from pretrain.stages import Estimate, Given, Job, Ref, Stage, checkpoint_of, corpus_of
from pretrain.stages._estimates import FLOOR, RECORDS, Left, Odd, tokenizer_bytes

WORDS, HEAPS = 5.0, 0.6  # of so many bytes of code or prose WORDS · bytes^HEAPS merges can be made, and no more

NEARLY = 1.3  # times the entries that a text is enough for are no odd number


class Tokenizer(Stage):
    """Train a tokenizer on a corpus, or take that of a checkpoint: one of `corpus` and `checkpoint`.

    corpus: Whose training documents it is trained on.
    checkpoint: Whose tokenizer is taken as it is.
    algorithm: Byte pairs, a unigram model, or an entry for each byte and no training.
    vocab_size: Entries, the special ones included; fewer where the text gives no more; `auto` leaves it to the dial.
    mask: Whether there is a mask token, for masked models.
    cls: Whether texts begin and end with class and separator tokens, as BERT's do.
    sentinels: How many sentinel tokens there are, for models of the T5 family.
    extra: Further special tokens.
    max_bytes: Bytes of text that it is trained on at most.
    """

    seeded: ClassVar[bool] = False
    writes: ClassVar[str] = "tokenizer"
    stage: Literal["tokenizer"] = "tokenizer"
    corpus: Ref | None = None
    checkpoint: Ref | None = None
    algorithm: Literal["bpe", "unigram", "bytes"] = "bpe"
    vocab_size: Count = 8192
    mask: bool = False
    cls: bool = False
    sentinels: Annotated[int, Ge(0), Le(1000)] = 0
    extra: list[str] = []
    max_bytes: Positive = 200e6  # of text to train on

    @model_validator(mode="after")
    def _one_origin(self) -> Tokenizer:
        if (self.corpus is None) == (self.checkpoint is None):
            raise ValueError("accepted: exactly one of corpus, checkpoint")
        return self

    @model_validator(mode="after")
    def _holds_the_bytes(self) -> Tokenizer:
        special = special_tokens(
            self.algorithm, mask=self.mask, cls=self.cls, sentinels=self.sentinels, extra=self.extra
        )
        least = 256 + len(special)
        if self.checkpoint is None and self.algorithm != "bytes" and self.vocab_size < least:
            raise ValueError(f"vocab_size {self.vocab_size}: accepted: {least} or more (256 bytes, special tokens)")
        return self

    def run(self, job: Job) -> StageResult:
        """Write the tokenizer."""
        from pretrain.corpus.tokenizers import load_tokenizer, train_tokenizer

        if self.checkpoint is not None:
            tokenizer = load_tokenizer(checkpoint_of(job.inputs["checkpoint"]))
        else:
            tokenizer = train_tokenizer(
                self._texts(Corpus(corpus_of(job.inputs["corpus"]))), algorithm=self.algorithm, mask=self.mask,
                vocab_size=self.vocab_size, cls=self.cls, sentinels=self.sentinels, extra=self.extra,
            )  # fmt: skip
        with atomic_folder(job.folder / "tokenizer") as work:
            tokenizer.save_pretrained(work)
        job.say(f"{len(tokenizer):,} entries")
        return {"metrics": {"vocabulary": len(tokenizer)}}

    def estimate(self, given: Given) -> Estimate:
        """The time of reading the text that it learns from; a vocabulary that this text cannot fill is told."""
        if self.checkpoint is not None:
            known = given["checkpoint"].vocabulary
            return Estimate(0.0, FLOOR, 1.0, RECORDS + tokenizer_bytes(known or 32_000), left=Left(vocabulary=known))
        entries = self.vocab_size if self.algorithm != "bytes" else 256 + 5
        text = given["corpus"].bytes.get("train") if "corpus" in given else None
        read = min(text or 0.0, self.max_bytes)
        most = (
            256
            + len(special_tokens("bpe", mask=True, cls=True, sentinels=self.sentinels, extra=self.extra))
            + round(WORDS * read**HEAPS)
        )
        made = min(entries, most) if text else entries
        few = (
            f"vocab_size {entries:,}: {short(read, 'B')} of text are less than {BYTES_AN_ENTRY} bytes an entry, and "
            f"enough for about {read / BYTES_AN_ENTRY:,.0f}"
        )
        few += (
            f"; with the words of so much text about {most:,} come out, which estimates go by" if made < entries else ""
        )
        scarce = text and entries > LEAST_ENTRIES and entries * BYTES_AN_ENTRY > NEARLY * read
        return Estimate(
            0.0, FLOOR + 12 * read if text else None, 1 + read / 4e6 if text else None,
            RECORDS + tokenizer_bytes(made),
            min(1.0, read / text) if text else None, Left(vocabulary=made),
            (Odd("vocab_size", few),) if scarce else (),
        )  # fmt: skip

    def _texts(self, corpus: Corpus) -> Iterator[str]:
        """Training documents; of more than `max_bytes` a sample by the hash of their id, so from all sources alike."""
        if "text" not in corpus.columns:
            columns = ", ".join(corpus.columns)
            raise PretrainError(f"{corpus.folder} has no column 'text'; accepted: a corpus of text, not of {columns}")
        share = self.max_bytes / max(1, corpus.info["bytes"]["train"])
        for document in corpus.documents("train", ("text", "id")):
            chosen = share >= 1 or int(digest(document["id"])[:12], 16) / 16**12 < share
            if chosen and document["text"] is not None:
                yield document["text"]
