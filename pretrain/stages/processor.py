"""`processor`: what turns documents into a model's inputs, from a class of transformers or a checkpoint; writes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from pretrain.core.files import atomic_folder, digest, file_digest
from pretrain.core.folders import cache_folder
from pretrain.core.quick.outline import torch_imported
from pretrain.records import StageResult
from pretrain.stages import Estimate, Given, Job, Record, Ref, Stage
from pretrain.stages._estimates import FLOOR, RECORDS

if TYPE_CHECKING:
    from pretrain.core import processors


class Processor(Stage):
    """Make what turns images, recordings or series into a model's inputs: one of `processor` and `checkpoint`.

    processor: `class` names a processor, image processor or feature extractor of `transformers`, or `SeriesProcessor`;
        the rest are that class's own fields.
    checkpoint: Whose processor is taken as it is.
    """

    seeded: ClassVar[bool] = False
    writes: ClassVar[str] = "processor"
    stage: Literal["processor"] = "processor"
    processor: Record = {}
    checkpoint: Ref | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Processor:
        if bool(self.processor) == (self.checkpoint is not None):
            raise ValueError("accepted: exactly one of processor, checkpoint")
        if self.processor:
            if not isinstance(self.processor.get("class"), str):
                raise ValueError(f"processor {self.processor}: accepted: {{class: ViTImageProcessor, …}}")
            self._check()
        return self

    def estimate(self, given: Given) -> Estimate:
        """Next to nothing."""
        return Estimate(0.0, FLOOR, 1.0, RECORDS)

    def _check(self) -> None:
        """Make the processor to see whether it can be made; not where torch is yet to come and it was made before."""
        made_before = cache_folder() / "processors" / digest([self.processor, *_makers()])[:24]
        if not torch_imported() and made_before.exists():
            return
        self._new()
        with suppress(OSError):
            made_before.parent.mkdir(parents=True, exist_ok=True)
            made_before.touch()

    def _new(self) -> processors.Processor:
        """The processor that the fields make."""
        from pretrain.core.processors import new_processor

        return new_processor(self.processor["class"], {k: v for k, v in self.processor.items() if k != "class"})

    def run(self, job: Job) -> StageResult:
        """Write the processor."""
        from pretrain.stages._training_data import open_processor

        made = self._new() if self.checkpoint is None else open_processor(job.inputs["checkpoint"])
        with atomic_folder(job.folder / "processor") as work:
            made.save_pretrained(work)
        job.say(type(made).__name__)
        return {"metrics": {}}


def _makers() -> Iterator[str]:
    """The state of what makes processors: a file of ours, and the libraries."""
    yield file_digest(Path(__file__).parents[1] / "core" / "processors.py")
    for name in ("transformers", "torch"):
        with suppress(PackageNotFoundError):
            yield version(name)
