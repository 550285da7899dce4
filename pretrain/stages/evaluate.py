"""`evaluate`: measure a checkpoint on a corpus's held-out documents; writes `evaluation.json` and `documents.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias, cast

from pydantic import ConfigDict, Field, field_validator

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError
from pretrain.core.files import read_object, write_json
from pretrain.core.quick.confusion import Mistake
from pretrain.core.quick.hub import located
from pretrain.core.quick.positions import check_length, positions
from pretrain.core.quick.quantities import figure
from pretrain.core.quick.vocabulary import check_named, labels_of
from pretrain.corpus.overlap import learnt_from, overlap_warning
from pretrain.corpus.sources import Document
from pretrain.corpus.store import Corpus
from pretrain.decoding import Decoding
from pretrain.evaluation import Evaluation, Measured
from pretrain.evaluation._intervals import LEAST
from pretrain.evaluation.likelihood._compressors import compressed_bits
from pretrain.evaluation.likelihood.held_out import HeldOut
from pretrain.records import StageResult
from pretrain.stages import (
    DecodingField,
    Estimate,
    EvaluationField,
    Given,
    Job,
    Record,
    Ref,
    Stage,
    checkpoint_of,
    corpus_of,
)
from pretrain.stages._estimates import Left, answering, reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.core.processors import Processor

SHOWN = 6  # domains in a line
Opener: TypeAlias = "Callable[..., tuple[PreTrainedModel, Processor | None]]"  # of a folder and a keyword `device`


class Evaluate(Stage):
    """Measure a checkpoint on held-out documents; writes `evaluation.json` and the numbers of each document.

    checkpoint: The model to measure.
    corpus: The documents to measure it on.
    split: Which of the held-out ones.
    evaluations: What is measured, each method once.
    max_documents: Documents at most, taken evenly from the whole split.
    max_characters: Characters of each at most, from its beginning (none: all), so that few large ones do not decide.
    compressors: Whether xz and zstd are tried on the same text, as a yardstick.
    opening: A decoding method that opens the checkpoint, `expert_store`: in less memory; its metrics stand beside.
    """

    accepts: ClassVar[dict[str, tuple[str, ...]]] = Stage.accepts | {"checkpoint": ("train", "surgery", "export")}
    stage: Literal["evaluate"] = "evaluate"
    version = 3
    checkpoint: Ref
    corpus: Ref
    split: Literal["validation", "test"] = "test"
    evaluations: list[EvaluationField] = Field([HeldOut()], min_length=1)
    max_documents: Count = 2000
    max_characters: Count | None = None  # of a document's text, from its beginning
    compressors: bool = True
    opening: DecodingField | None = None

    model_config = ConfigDict(validate_default=True)

    def splits(self) -> dict[str, str]:
        """The one that is measured on."""
        return {"corpus": self.split}

    def check_inputs(self, earlier: Mapping[str, Stage]) -> None:
        """Refuse windows beyond the positions of the checkpoint that is named, where it is there."""
        super().check_inputs(earlier)
        exported = earlier.get(self.checkpoint)
        if exported is not None and getattr(exported, "to", "gguf") not in ("gguf", "peft", "awq"):
            to = f"{self.checkpoint!r} exports {getattr(exported, 'to', '')}"
            raise PretrainError(
                f"{to}, which is not read again; accepted: one to gguf, peft or awq", place=("checkpoint",)
            )
        path = located(self.checkpoint) / "config.json"
        if self.checkpoint not in earlier and path.exists():
            for number, method in enumerate(self.evaluations):
                check_windows(method, positions(read_object(path)), self.checkpoint, ("evaluations", number))

    @field_validator("evaluations")
    @classmethod
    def _once(cls, evaluations: list[Evaluation]) -> list[Evaluation]:
        names = [method.name for method in evaluations]
        if len(set(names)) < len(names):
            raise ValueError(f"{', '.join(names)}: accepted: each method once, since their metrics have the same names")
        return evaluations

    @field_validator("opening")
    @classmethod
    def _opens(cls, opening: Decoding | None) -> Decoding | None:
        if opening is not None and not opening.opens:
            raise ValueError(f"{opening.name}: accepted: a method that opens checkpoints: expert_store")
        return opening

    def config(self) -> Record:
        """Whole documents, opened whole, have the address that they had before there was another way."""
        fields = super().config()
        return {k: v for k, v in fields.items() if k not in ("max_characters", "opening") or v is not None}

    def estimate(self, given: Given) -> Estimate:
        """The documents' tokens, read as often as the evaluations say."""
        tasks = [each for each in self.evaluations if hasattr(getattr(each, "method", None), "inputs")]
        if len(tasks) == len(self.evaluations) == 1:
            task = tasks[0]
            limit = getattr(task, "length", 0) or given.get("checkpoint", Left()).length or 512
            method, resamples = getattr(task, "method"), getattr(task, "resamples", 0)  # noqa: B009
            return answering(given, method, self.split, self.max_documents, limit, resamples)
        return reading(given, self.split, self.max_documents, self.evaluations, self.compressors, self.max_characters)

    def run(self, job: Job) -> StageResult:
        """Write `evaluation.json`, each document's numbers to `documents.json`, and a list of codes to `codes.json`."""
        from pretrain.core.checkpoint import lineage
        from pretrain.core.meter import count_flops

        folder = checkpoint_of(job.inputs["checkpoint"])
        model, processor = load_both(folder, self.opening.load if self.opening else None)
        corpus = Corpus(corpus_of(job.inputs["corpus"]))
        documents = documents_of(
            corpus, self.split, self.max_documents, self.evaluations, processor, self.max_characters
        )
        length = lineage(folder).get("length")
        measured, flops = count_flops(
            lambda: measure(model, processor, documents, self.evaluations, length=length, of=folder)
        )
        result, count = summary(measured, documents, compressors=self.compressors), corpus.info["documents"][self.split]
        result["taken"] = {"documents": len(documents), "of": count}
        if len(documents) < count:
            job.say(f"{len(documents):,} of {count:,} {self.split} documents, from all alike (max_documents)")
        if seen := overlap_warning(documents, folder, corpus.folder):
            result["seen"] = seen
            job.say(f"warning: {seen}")
        write_json(job.folder / "evaluation.json", result)
        write_json(job.folder / "documents.json", {name: m.documents for name, m in measured.items() if m.documents})
        if listed := {name: m.listed for name, m in measured.items() if m.listed}:
            write_json(job.folder / "codes.json", listed)
        self._say(job, result)
        metrics = result["metrics"]
        by_domain = {f"{k}/{domain}": v for domain, values in result["domains"].items() for k, v in values.items()}
        opened = self.opening.measured(model) if self.opening else {}
        return {"metrics": by_domain | metrics | opened, "flops": flops}

    def _say(self, job: Job, result: Record) -> None:
        """What came out, in a line, and of the largest domains in another."""
        metrics, domains = result["metrics"], result["domains"]
        if "bits_per_byte" in metrics:
            tools = {tool: values["metrics"].get("bits_per_byte") for tool, values in result["compressors"].items()}
            others = "".join(f", {tool} {bits:.3f}" for tool, bits in tools.items() if bits is not None)
            whole = " (all text as one stream)" if others and len(result["domains"]) > 1 else ""
            job.say(f"{metrics['bits_per_byte']:.3f} bits per byte of {self.split} text{others}{whole}")
            bits = {name: values["bits_per_byte"] for name, values in domains.items() if "bits_per_byte" in values}
            size = {name: result["sizes"].get(name, {}).get("bytes", 0) for name in bits}
            largest = sorted(bits, key=lambda name: -size[name])[:SHOWN]
            more = f", {len(bits) - SHOWN} more" if len(bits) > SHOWN else ""
            if len(bits) > 1:
                job.say(f"by domain: {', '.join(f'{name} {bits[name]:.3f}' for name in largest)}{more}")
        else:
            job.say(", ".join(f"{name} {figure(value)}" for name, value in metrics.items()))
            for name, words in result.get("yardsticks", {}).items():
                job.say(f"{name} is of {words}, chosen on the training documents")


def check_windows(method: Evaluation, count: int | None, whose: str, place: tuple[str | int, ...] = ()) -> None:
    """Refuse windows of an evaluation that are longer than the positions of the model."""
    if not method.windowed:  # it cuts to the positions by itself
        return
    try:
        check_length(int(getattr(method, "length", 0)), count, whose)
    except PretrainError as error:
        raise PretrainError(f"{method.name}: {error}", place=place) from error


def documents_of(
    corpus: Corpus, split: str, most: int, methods: Sequence[Evaluation], processor: Processor,
    longest: int | None = None,
) -> list[Document]:  # fmt: skip
    """At most so many documents of a split, from all sources alike, with the columns that are needed.

    Of text there are at most `longest` characters.
    """
    from pretrain.core.processors import columns_of

    read = columns_of(processor)
    missing = next((name for name in read if name not in corpus.columns), None)
    if missing is not None:
        raise PretrainError(
            f"{corpus.folder} has no column {missing!r}, which a {type(processor).__name__} reads; accepted: another "
            f"corpus, or another checkpoint; its columns: {', '.join(corpus.columns)}"
        )
    documents = corpus.sample(split, most, (*read, *columns(methods)))
    if longest is None:
        return documents
    texts = [document.get("text") for document in documents]
    return [d if text is None else d | {"text": text[:longest]} for d, text in zip(documents, texts, strict=True)]


def columns(methods: Sequence[Evaluation]) -> tuple[str, ...]:
    """Those of the documents that evaluations read."""
    return tuple(dict.fromkeys(("text", "domain", "id", *(c for method in methods for c in method.columns))))


def load_both(folder: Path, opener: Opener | None = None) -> tuple[PreTrainedModel, Processor]:
    """A checkpoint's model, on the device that there is, and its processor, which must be there.

    `opener` is `core.checkpoint.load` by default.
    """
    from pretrain.core import checkpoint
    from pretrain.core.hardware import pick_device
    from pretrain.core.models.families import vocabulary_of
    from pretrain.core.processors import check_tokens, tokenizer_in

    model, tokenizer = (opener or checkpoint.load)(folder, device=pick_device())
    if tokenizer is None:
        raise PretrainError(
            f"checkpoint {folder} has no tokenizer; accepted: one with tokenizer.json beside config.json"
        )
    check_named(folder, labels_of(model))
    if (entries := vocabulary_of(model)) is not None:
        check_tokens(folder, tokenizer_in(tokenizer), entries)
    return model, tokenizer


def load_text(folder: Path, opener: Opener | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint's model and its tokenizer, or the one that its processor holds."""
    from pretrain.core.processors import tokenizer_in

    model, processor = load_both(folder, opener)
    tokenizer = tokenizer_in(processor)
    if tokenizer is None:
        raise PretrainError(f"checkpoint {folder} has a {type(processor).__name__}; accepted: one with a tokenizer")
    return model, tokenizer


def evaluate(
    model: PreTrainedModel,
    processor: Processor,
    documents: list[Document],
    methods: Sequence[Evaluation],
    *,
    compressors: bool,
    length: int | None = None,
    of: Path | None = None,
) -> Record:
    """The `summary` of what is measured."""
    measured = measure(model, processor, documents, methods, length=length, of=of)
    return summary(measured, documents, compressors=compressors)


def measure(
    model: PreTrainedModel,
    processor: Processor,
    documents: list[Document],
    methods: Sequence[Evaluation],
    *,
    length: int | None = None,
    of: Path | None = None,
) -> dict[str, Measured]:
    """What each evaluation finds, by its name.

    `length` is the one that the checkpoint was trained at, for the methods that leave their own at 0; `of` is the
    checkpoint, for yardsticks that are made of what it has learnt from.
    """
    from pretrain.core.generation.finite import NotFinite
    from pretrain.core.models.families import family
    from pretrain.training.compatible import check_families

    if not documents:
        raise PretrainError("there are no documents to evaluate on; accepted: at least one")
    check_families(methods, family(model))
    measured, count = {}, positions(model.config.to_dict())
    for method in methods:
        if length and getattr(method, "length", None) == 0:
            method = dataclasses.replace(method, length=length)
        check_windows(method, count, "the model")
        try:
            measured[method.name] = method(model, cast("PreTrainedTokenizerBase", processor), documents)
        except NotFinite as error:
            raise PretrainError(f"{method.name}: {error}") from error
        if of is not None:
            beside = method.yardsticks(model, documents, partial(learnt_from, of))
            metrics = measured[method.name].metrics | beside.metrics
            measured[method.name] = dataclasses.replace(measured[method.name], metrics=metrics, yardsticks=beside.words)
        count = int(measured[method.name].metrics.get("documents", len(documents)))
        if method.given and measured[method.name].intervals and count < LEAST:  # drawing from them says nothing
            measured[method.name] = dataclasses.replace(measured[method.name], intervals={}, few=count)
    return measured


def summary(measured: dict[str, Measured], documents: list[Document], *, compressors: bool) -> Record:
    """What `evaluation.json` holds: metrics, the same by domain, 95% intervals, and the compressors' bits per byte.

    `domain_intervals` are those of the domains that have documents enough, `sizes` each domain's documents and bytes.
    Of classes besides which is taken for which, and the most confident of the wrong answers.
    """
    texts = [document for document in documents if document.get("text") is not None]
    metrics: dict[str, float] = {}
    confusion: dict[str, dict[str, int]] = {}
    domains: dict[str, dict[str, float]] = {}
    intervals: dict[str, list[float]] = {}
    apart: dict[str, dict[str, list[float]]] = {}
    yardsticks: dict[str, str] = {}
    mistakes: list[Mistake] = []
    for part in measured.values():
        metrics |= part.metrics
        yardsticks |= part.yardsticks
        mistakes += part.mistakes
        confusion |= part.confusion
        intervals |= {name: list(ends) for name, ends in part.intervals.items()}
        for domain, values in part.domains.items():
            domains[domain] = domains.get(domain, {}) | values
        for domain, each in part.domain_intervals.items():
            apart[domain] = apart.get(domain, {}) | {name: list(ends) for name, ends in each.items()}
    whole: Record = {
        "metrics": metrics,
        "domains": domains,
        "intervals": intervals,
        "compressors": compressed_bits(texts) if compressors and texts else {},
        "documents": len(documents),
        "sizes": _sizes(documents),
        "domain_intervals": apart,
        "methods": list(measured),
    }
    if few := [part.few for part in measured.values() if part.few]:
        number = f"{min(few)} documents are" if min(few) > 1 else "1 document is"
        whole["no_intervals"] = f"{number} too few to tell how far other documents would differ: {LEAST} or more"
    more = {"confusion": confusion, "mistakes": mistakes, "yardsticks": yardsticks}
    return whole | {name: value for name, value in more.items() if value}


def _sizes(documents: Sequence[Document]) -> dict[str, dict[str, int]]:
    """How many `documents` each domain has, and in how many `bytes` of text."""
    sizes: dict[str, dict[str, int]] = {}
    for document in documents:
        row = sizes.setdefault(document.get("domain", "text"), {"documents": 0, "bytes": 0})
        row["documents"] += 1
        row["bytes"] += len((document.get("text") or "").encode("utf-8", "surrogatepass"))
    return dict(sorted(sizes.items()))
