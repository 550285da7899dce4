"""`data`: read sources, split, deduplicate, apply data operations; writes a corpus."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator

from pretrain.corpus import sources as kinds
from pretrain.corpus.store import write_corpus
from pretrain.stages import DataOperationField, Job, Stage, build_dataclass, dump

SOURCES: dict[str, type] = {
    "files": kinds.Files,
    "dataset": kinds.HubDataset,
    "stdlib": kinds.PythonStdlib,
    "debian": kinds.DebianDocs,
}


def build_source(value: Any) -> Any:
    """A source from a path or a mapping; its first word tells its kind."""
    if isinstance(value, tuple(SOURCES.values())):
        return value
    if isinstance(value, str):
        value = {value: True} if value in ("stdlib", "debian") else {"files": value}
    found = [word for word in SOURCES if isinstance(value, dict) and word in value]
    if len(found) != 1:
        raise ValueError(f"{value!r} is no source; accepted: a path, or a mapping with one of {', '.join(SOURCES)}")
    return build_dataclass(SOURCES[found[0]], value, f"source {found[0]!r}")


SourceField = Annotated[Any, PlainValidator(build_source), PlainSerializer(dump)]


class Data(Stage):
    """Fields of a `data` stage. `near_duplicates`: how alike training documents may be to held-out ones (null: any)."""

    version = 1
    stage: Literal["data"] = "data"
    sources: list[SourceField] = Field(min_length=1)
    operations: list[DataOperationField] = []
    validation: float = Field(0.02, ge=0, lt=1)
    test: float = Field(0.02, ge=0, lt=1)
    near_duplicates: float | None = Field(0.8, gt=0, le=1)

    def outside(self) -> Any:
        """The state of the sources."""
        return [kinds.fingerprint(source) for source in self.sources]

    def run(self, job: Job) -> dict[str, Any]:
        """Write the corpus."""
        skipped = kinds.Skipped()
        stream = (document for source in self.sources for document in kinds.read(source, skipped))
        facts = {"sources": [{"source": type(s).__name__} | asdict(s) for s in self.sources]}
        info = write_corpus(
            stream, job.folder / "corpus", validation=self.validation, test=self.test,
            near_duplicates=self.near_duplicates, operations=self.operations, facts=facts, skipped=skipped.reasons,
        )  # fmt: skip
        counted = f"{info['documents']['train']:,} training documents, {info['bytes']['train'] / 1e6:,.1f} MB"
        job.say(f"{counted}; removed {info['removed']['exact']} copies, {info['removed']['near']} near-duplicates")
        if skipped.reasons:
            job.say("passed over: " + ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.reasons.items())))
        sizes = {f"{what}/{split}": info[what][split] for what in ("documents", "bytes") for split in info[what]}
        return {"metrics": sizes | {f"removed/{k}": v for k, v in info["removed"].items()}}
