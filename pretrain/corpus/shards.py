"""Tokens on disk: one flat, memory-mapped array of integers for each split, with document boundaries and domains.

A split's folder holds `tokens.bin` (uint16 or uint32), `offsets.npy` (where each document begins, and the end),
`domains.npy`, `bytes.npy` (UTF-8 bytes of each document) and `tokens.json`. A document stands between what
`core.encoding.frame` says, `[bos] tokens [eos]` where the tokenizer has them. Reading needs numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pretrain.core.errors import PretrainError, warn
from pretrain.core.files import (
    SEAL,
    SUMS,
    JSONObject,
    atomic_folder,
    damage,
    digest,
    file_digest,
    locked,
    read_json,
    sweep,
    write_json,
)
from pretrain.core.folders import verify
from pretrain.core.foreign.arrays import read_array
from pretrain.corpus.packing import Plan, plan_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pretrain.core.batch import Vocabulary
    from pretrain.corpus.sources import Document
    from pretrain.corpus.store import Corpus

BATCH_CHARACTERS = 1 << 20


class Shards:
    """One split's tokens, opened for reading."""

    given: JSONObject = {}  # what objectives are told besides the rows

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.info: JSONObject = read_json(self.folder / "tokens.json")
        self.domain_names: list[str] = self.info["domains"]
        path, dtype = self.folder / "tokens.bin", np.dtype(self.info["dtype"])
        expected = self.info["tokens"] * dtype.itemsize
        if not path.exists() or path.stat().st_size != expected:
            size = path.stat().st_size if path.exists() else 0
            raise PretrainError(f"{path} has {size} bytes instead of {expected}: truncated; remove {folder} to redo it")
        self.flat = np.memmap(path, dtype=dtype, mode="r") if expected else np.zeros(0, dtype=dtype)
        try:
            self.offsets_N1: NDArray[np.int64] = read_array(self.folder / "offsets.npy")
            self.domains_N: NDArray[np.uint16] = read_array(self.folder / "domains.npy")
            self.bytes_N: NDArray[np.uint32] = read_array(self.folder / "bytes.npy")
        except (OSError, ValueError, EOFError) as error:
            raise PretrainError(f"{folder}: {error}; remove the folder to redo it") from error
        if len(self.offsets_N1) != self.info["documents"] + 1 or int(self.offsets_N1[-1]) != self.tokens:
            raise PretrainError(f"{folder}: offsets.npy does not fit tokens.bin: damaged; remove the folder to redo it")

    def __len__(self) -> int:
        return len(self.domains_N)

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return int(self.info["tokens"])

    @property
    def seal(self) -> str:
        """Of its checksums; another's tokens have another. Empty of older releases, which had none."""
        return str(read_json(self.folder / SUMS).get(SEAL, "")) if (self.folder / SUMS).exists() else ""

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.offsets_N1)

    def plan(self, length: int) -> Plan:
        """How the documents are packed to rows of `length` tokens."""
        return plan_for(self, length)

    def document(self, index: int) -> NDArray[np.integer]:
        """One document's tokens."""
        return self.flat[self.offsets_N1[index] : self.offsets_N1[index + 1]]

    def piece(self, document: int, start: int, length: int) -> NDArray[np.integer]:
        """A run of one document's tokens."""
        begin = int(self.offsets_N1[document]) + start
        return self.flat[begin : begin + length]

    def counts(self, chunk: int = 1 << 24) -> NDArray[np.int64]:
        """How often each token occurs, up to the greatest that does; so many tokens are read at a time."""
        parts = [np.bincount(self.flat[start : start + chunk]) for start in range(0, self.tokens, chunk)]
        count_V = np.zeros(max(map(len, parts), default=0), np.int64)
        for part in parts:
            count_V[: len(part)] += part
        return count_V

    def targets_per_byte(self) -> float:
        """Tokens that have a predecessor in their document, for each byte of text."""
        return (self.tokens - len(self)) / max(1, int(np.sum(self.bytes_N, dtype=np.int64)))

    def verify(self) -> None:
        """Compare the files with their checksums, which older releases kept in `tokens.json`."""
        verify(self.folder)
        for name, checksum in self.info.get("checksums", {}).items():
            if file_digest(self.folder / name) != checksum:
                raise PretrainError(f"{self.folder / name} is damaged (checksum); remove {self.folder} to redo it")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes when the tokenizer would tokenise otherwise."""
    from pretrain.core.encoding import frame, plain_backend, sequence_ends

    backend, around = plain_backend(tokenizer), frame(tokenizer)
    facts = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    framed = [] if around == sequence_ends(tokenizer) else [around]
    return digest([facts, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, *framed])


def tokens_key(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of the folder in which a store keeps a corpus in a tokenizer's tokens."""
    return f"{corpus.info['fingerprint'][:12]}-{tokenizer_fingerprint(tokenizer)[:12]}"


def tokenise(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    splits: Sequence[str] = ("train", "validation", "test"),
    verify: bool = True,
) -> dict[str, Shards]:
    """Tokenise a corpus into `folder/SPLIT`; splits that are there already, of the same corpus and tokenizer, stay.

    Those are compared with their checksums unless `verify` is off; what is damaged is made anew, with a warning.
    """
    from pretrain.core.batch import Vocabulary

    wanted = {"corpus": corpus.info["fingerprint"], "tokenizer": tokenizer_fingerprint(tokenizer)}

    def of(split: str) -> str:
        return digest([split, *wanted.values()])

    def missing(split: str) -> bool:
        info = folder / split / "tokens.json"
        finding = damage(folder / split, (lambda _: True) if verify else (lambda _: False), of(split))
        if finding:
            warn(f"{finding}: the {split} split is put into tokens anew")
        return bool(finding) or not info.exists() or {k: read_json(info).get(k) for k in wanted} != wanted

    here = [split for split in splits if not missing(split)]
    if len(here) < len(splits):
        with locked(folder / ".lock"):  # another run may be at the same: what it has made is taken
            sweep(folder)
            for split in filter(missing, splits):
                with atomic_folder(folder / split, of(split)) as work:
                    _write(work, corpus, split, tokenizer, Vocabulary.of(tokenizer), wanted)
    shards = {split: Shards(folder / split) for split in splits}
    for split in here if verify else ():
        shards[split].verify()
    return shards


def _write(
    work: Path,
    corpus: Corpus,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    facts: dict[str, str],
) -> None:
    """Write one split. One thread encodes (outside of Python's lock, on all cores) while this one reads and writes."""
    from pretrain.core.encoding import encode_plain, plain_backend

    dtype = np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.uint32)
    before, after = (np.array([] if end is None else [end], dtype) for end in (vocabulary.before, vocabulary.after))
    names = corpus.domains
    number = {name: i for i, name in enumerate(names)}
    lengths, domains, sizes = [], [], []
    backend = plain_backend(tokenizer)

    def encode(documents: list[Document]) -> list[NDArray[np.integer]]:
        encodings = encode_plain(backend, tokenizer, [document["text"] for document in documents])
        return [np.array(getattr(encoding, "ids", encoding), dtype) for encoding in encodings]

    with (work / "tokens.bin").open("wb") as out, ThreadPoolExecutor(1) as pool:
        stream = _batches(corpus.documents(split))
        documents = next(stream, [])
        pending = pool.submit(encode, documents)
        while documents:
            following = next(stream, [])
            encoded, pending = pending.result(), pool.submit(encode, following)
            parts: list[NDArray[np.integer]] = []
            for document, ids in zip(documents, encoded, strict=True):
                parts += (before, ids, after)
                lengths.append(len(before) + len(ids) + len(after))
                domains.append(number[document["domain"]])
                sizes.append(len(document["text"].encode()))
            out.write(np.concatenate(parts).tobytes())
            documents = following
    np.save(work / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))
    np.save(work / "domains.npy", np.array(domains, np.uint16))
    np.save(work / "bytes.npy", np.array(sizes, np.uint32))
    counts = {"documents": len(lengths), "tokens": int(sum(lengths)), "dtype": dtype.name, "domains": names}
    counts |= {"begins": len(before) > 0, "vocabulary": vocabulary.size}
    write_json(work / "tokens.json", facts | counts)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lots of about `BATCH_CHARACTERS`."""
    lot: list[Document] = []
    size = 0
    for document in documents:
        lot.append(document)
        size += len(document["text"])
        if size >= BATCH_CHARACTERS:
            yield lot
            lot, size = [], 0
    if lot:
        yield lot
