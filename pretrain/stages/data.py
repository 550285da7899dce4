"""`data`: read sources, split, deduplicate, apply data operations; writes a corpus."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, cast

from pydantic import PlainSerializer, PlainValidator, model_validator

from pretrain.core.bounds import Ge, Le, PositiveShare, ProperShare, Whole
from pretrain.core.errors import PretrainError, nearest
from pretrain.core.quick.quantities import short
from pretrain.core.samples import document_samples, write_samples
from pretrain.corpus import sources as kinds
from pretrain.corpus.payload import Labels, Split
from pretrain.corpus.progress import reported
from pretrain.corpus.samples import corpus_documents
from pretrain.corpus.sources import SOURCES, Source
from pretrain.corpus.sources._skipped import LONGEST
from pretrain.corpus.store import Corpus, write_corpus
from pretrain.data import DataOperation
from pretrain.data._dropped import Ledger
from pretrain.data._work import working
from pretrain.data._workers import Shard, Workers
from pretrain.records import CorpusInfo, StageResult, accounted, contradicting, of_pages
from pretrain.stages import (
    DataOperationField,
    Estimate,
    Given,
    Job,
    Misfit,
    Record,
    Ref,
    Stage,
    build_dataclass,
    corpus_of,
    dump,
)
from pretrain.stages._estimates import DOCUMENT, FLOOR, Left
from pretrain.stages._examples import sampled
from pretrain.stages.corpora.estimate import corpus_estimate, uneven, work_seconds
from pretrain.stages.corpora.look import Looked, looked

if TYPE_CHECKING:
    from datasets import Dataset

    from pretrain.corpus.copies.held_out import Signatures

HELD_OUT = ("validation", "test")
REREAD = 60e6  # bytes a second of a corpus that is read again
MADE = 5e10  # FLOPs a second of sources that make their documents: small products, one after another
LOOKED: dict[tuple[object, ...], Looked | None] = {}  # what was seen of sources, by them


def build_source(value: object) -> Source:
    """A source from a path or a mapping; its first word tells its kind."""
    if isinstance(value, Source):
        return value
    if isinstance(value, str):
        value = {value: True} if value in ("stdlib", "debian") else {"files": value}
    words = [word for word in SOURCES if isinstance(value, dict) and word in value]
    if not isinstance(value, dict) or len(words) != 1:
        hints = [nearest(str(word), SOURCES) for word in value] if isinstance(value, dict) and not words else []
        hint = next(filter(None, hints), "")
        raise ValueError(
            f"{value!r} is no source{hint}; accepted: a path, or a mapping with one of {', '.join(SOURCES)}"
        )
    return build_dataclass(SOURCES[words[0]], value, f"source {words[0]!r}")


SourceField = Annotated[Source, PlainValidator(build_source), PlainSerializer(dump)]


class Data(Stage):
    """Read sources, set held-out documents aside, remove copies, apply data operations; writes a corpus.

    Which documents are held out is told by a hash of each one's content (of its group, where it has one) and of
    `split_seed`, whatever `seed` is: copies go to one side, and what is added later moves none of the others.

    sources: What to read: paths, or mappings whose first word is the kind of source.
    corpus: An earlier stage whose documents come first, with all their columns and each on its side of the split.
    operations: Methods that drop, add or order the training documents, one after another.
    validation: Share of the documents to measure on while training; one that goes on from a `corpus` has that one's.
    test: Share of the documents to measure on at the end; likewise.
    seed: Nothing here depends on it; see `split_seed`.
    split_seed: Draws other held-out documents; likewise.
    longest: Characters of a document, a line or a cell; longer lines and rows are passed over, longer files cut.
    near_duplicates: How alike training documents may be to held-out ones before they are removed; null keeps all.
    dropped_characters: Characters that `dropped.parquet` keeps of the text of a document that an operation drops.
    dropped_texts: Documents of an operation whose texts it keeps; of more that are dropped ever fewer.
    workers: Processes that operations on text share documents out to; 0: one a core, where there is enough to do.
    ray: The address of a Ray cluster whose cores do that instead, `auto` or that of a head.
    """

    version = 5
    neutral = ("dropped_characters", "dropped_texts", "workers", "ray")
    seeded: ClassVar[bool] = False
    writes: ClassVar[str] = "corpus"
    stage: Literal["data"] = "data"
    sources: list[SourceField] = []
    corpus: Ref = ""
    operations: list[DataOperationField] = []
    validation: ProperShare = 0.02
    test: ProperShare = 0.02
    split_seed: Whole = 0
    longest: Annotated[int, Ge(1), Le(1 << 28)] = LONGEST
    near_duplicates: PositiveShare | None = 0.8
    dropped_characters: Whole = 1000
    dropped_texts: Whole = 100_000
    workers: Whole = 0
    ray: str = ""

    @model_validator(mode="after")
    def _leaves_text(self) -> Self:
        if not self.sources and not self.corpus:
            raise Misfit("[]: accepted: at least one, or a corpus to go on with", ("sources",))
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation {self.validation:g} and test {self.test:g} leave nothing to train on; accepted: shares "
                "that come to less than 1"
            )
        return self

    def outside(self) -> list[str]:
        """The state of the sources."""
        fingerprints = []
        for number, source in enumerate(self.sources):
            try:
                fingerprints.append(kinds.fingerprint(source))
            except PretrainError as error:
                raise PretrainError(str(error), place=("sources", number)) from error
        return fingerprints

    def config(self) -> Record:
        """What is hashed; of fields that came later nothing where they are left as all was before there were any."""
        later = ("corpus", "split_seed")
        return {name: value for name, value in super().config().items() if name not in later or value}

    def estimate(self, given: Given) -> Estimate:
        """From the sizes of the files, of tables from what of them is text; an operation may compute what it likes."""
        works = any(operation.computes for operation in self.operations)
        sizes = [source.size() for source in self.sources]
        known = [size for size in sizes if size is not None]
        before = given.get("corpus", Left())
        if len(known) < len(sizes) or (self.corpus and not before.bytes):
            return Estimate(None if works else float(self.made))
        seen = [
            sampled(source, size.bytes, not size.documents) for source, size in zip(self.sources, known, strict=True)
        ]
        again = sum(before.bytes.values())
        total = again + sum(size.bytes for size in known)
        whole = again + sum(size.whole or size.bytes for size in known)
        documents = sum(size.documents or few.documents for size, few in zip(known, seen, strict=True))
        documents += sum(before.documents.values())
        rows = (*before.rows, *(row for few in seen for row in few.rows))
        few = None if self.corpus else self._looked([size.bytes for size in known])
        reading = sum(size.bytes / source.speed for source, size in zip(self.sources, known, strict=True))
        if few is not None and few.enough:
            total, whole, reading = few.text, whole * few.text / max(1.0, total), few.seconds
        validation, test = (
            before.bytes.get(name, 0.0) / again if self.corpus else getattr(self, name) for name in HELD_OUT
        )
        workers, near = 1 if self.ray else self.workers, self.near_duplicates is not None
        loaded = bool(self.corpus) and not before.exact
        work = work_seconds(total, documents or total / DOCUMENT, near, self.operations, workers, loaded)
        seconds = None if work is None else reading + again / REREAD + work + self.made / MADE
        estimate = corpus_estimate(total, documents, validation, test, works, rows, whole, few, seconds)
        operations = FLOOR + max((operation.memory(total) for operation in self.operations), default=0.0)
        flops = None if estimate.flops is None else estimate.flops + self.made
        return replace(estimate, flops=flops, memory_bytes=max(estimate.memory_bytes or 0.0, operations))

    @property
    def made(self) -> int:
        """FLOPs of the sources that make their documents."""
        return round(sum(source.flops() for source in self.sources))

    def _looked(self, known: Sequence[float]) -> Looked | None:
        """What its sources hold without copies, looked at once in a process as long as they are as large."""
        alike = next((getattr(each, "threshold", None) for each in self.operations if each.name == "deduplicate"), None)
        given = (self.longest, (self.validation, self.test), self.near_duplicates, alike, self.split_seed)
        key = (repr(self.sources), *known, *given)
        if key not in LOOKED:
            LOOKED[key] = looked(self.sources, *given, known)
        return LOOKED[key]

    def progress(self, folder: Path) -> str:
        """What operations keep while they work."""
        return "with its operations under way" if any(folder.glob("work/*.json")) else ""

    def _split(self, before: Corpus | None, say: Callable[[str], None]) -> Split:
        """How documents are split: as those of the corpus that it goes on with, lest copies and groups be parted."""
        asked = Split(validation=self.validation, test=self.test, split_seed=self.split_seed)
        there = (before and before.splitting) or asked
        usual = {name: type(self).model_fields[name].default for name in there}
        if asked not in (there, usual):
            shares = ", ".join(f"{name} {value}" for name, value in there.items())
            say(f"warning: documents are split as in {self.corpus}: {shares}")
        return there

    def run(self, job: Job) -> StageResult:
        """Write the corpus."""
        skipped = kinds.Skipped(self.longest)
        before = Corpus(corpus_of(job.inputs["corpus"])) if self.corpus else None
        again = before.again() if before else ()
        split = self._split(before, job.say)
        fresh = (document for source in self.sources for document in kinds.read(source, skipped))
        labels = Labels(name for source in self.sources for name in getattr(source, "numbers", ()))
        stream = reported(labels.over(chain(again, fresh)), job.say, "documents read")
        facts: Record = {"sources": [kinds.described(source) for source in self.sources], "split": dict(split)}
        spent: list[int] = []
        ledger = Ledger(job.folder / "work", self.dropped_characters, self.dropped_texts)
        operations = [_Metered(operation, spent, ledger) for operation in self.operations]
        with (
            Workers(self.workers, job.ray or self.ray, job.say) as workers,
            working(job.folder / "work", ledger, workers) as desk,
        ):
            # All are filled by the time `corpus.json` is written.
            facts |= {"operations": desk.reports, "funnel": ledger.funnel, "contradicting": labels.contradicting}
            info = write_corpus(
                stream, job.folder / "corpus", **split, near_duplicates=self.near_duplicates, operations=operations,
                facts=facts, skipped=skipped, beside=ledger.put, each=partial(_shared_out, workers),
            )  # fmt: skip
        shutil.rmtree(job.folder / "work", ignore_errors=True)
        write_samples(job.folder, document_samples(corpus_documents(job.folder / "corpus")))
        counted = f"{info['documents']['train']:,} training documents, {short(info['bytes']['train'], 'B')}"
        job.say(f"{counted}; {accounted(cast('CorpusInfo', info))}")
        for line in contradicting(cast("CorpusInfo", info)):
            job.say(f"warning: {line}")
        if pages := of_pages(skipped.pages):
            job.say(pages)
        if skipped.reasons:
            job.say(f"passed over: {skipped}")
        shares = dict(zip(HELD_OUT, (split["validation"], split["test"]), strict=True))
        for name, share in shares.items():
            if share and not info["documents"][name]:
                count = sum(info["documents"].values())
                job.say(f"no {name} documents: {count} are too few for a share of {share:g}")
        for line in uneven(info, shares):
            job.say(f"warning: {line}")
        sizes = {f"{what}/{name}": info[what][name] for what in ("documents", "bytes") for name in info[what]}
        return {
            "metrics": sizes | {f"removed/{k}": v for k, v in info["removed"].items()},
            "flops": sum(spent) + desk.flops + self.made,
        }


def _shared_out(
    workers: Workers, work: Callable[[list[str]], Signatures], lots: Iterable[list[str]], count: int
) -> Iterator[Signatures]:
    """What the workers make of each lot of texts."""
    return (made for _, made in workers.each("copies of held-out documents", work, map(Shard, lots), count))


@dataclass(frozen=True)
class _Metered:
    """An operation whose FLOPs are added to `spent`, and what it leaves out to `ledger`."""

    operation: DataOperation
    spent: list[int]
    ledger: Ledger

    @property
    def name(self) -> str:
        return self.operation.name

    def __call__(self, corpus: Dataset) -> Dataset:
        from datasets import Dataset

        from pretrain.core.meter import count_flops

        result, flops = count_flops(lambda: self.operation(corpus))
        self.spent.append(flops)
        if isinstance(result, Dataset):  # of anything else the store tells
            self.ledger.settle(self.name, corpus, result)
        return result
