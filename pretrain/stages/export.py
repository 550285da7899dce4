"""`export`: a checkpoint in another program's format, read back and compared; writes the folder `export`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from pretrain.core.errors import PretrainError
from pretrain.core.exchange.task import OF, PACKED, check_option
from pretrain.core.quick.quantities import figure
from pretrain.records import StageResult
from pretrain.stages import Estimate, Given, Job, Ref, Stage
from pretrain.stages._estimates import Left


class Export(Stage):
    """Write a checkpoint in another program's format, read it back and compare; writes the folder `export`.

    checkpoint: The model to write.
    to: `gguf` for llama.cpp, `onnx` for onnxruntime, a folder of `sentence-transformers`, an adapter alone as `peft`
        opens it, or packed 4-bit weights in the layout of `awq`, as vLLM reads it.
    numbers: Of GGUF, how matrices are stored.
    pooling: Of sentence-transformers, how many states make one vector, where the checkpoint says nothing of it.
    """

    seeded: ClassVar[bool] = False
    stage: Literal["export"] = "export"
    checkpoint: Ref
    to: Literal["gguf", "onnx", "sentence-transformers", "peft", "awq"]
    numbers: Literal["f32", "f16", "bf16", "q8_0"] = "f16"
    pooling: Literal["mean", "cls", "lasttoken"] = "mean"

    def check_inputs(self, earlier: Mapping[str, Stage]) -> None:
        """Refuse options of other formats, and packed weights where the format has no form for them."""
        super().check_inputs(earlier)
        for name in OF:
            if getattr(self, name) != type(self).model_fields[name].default:
                check_option(self.to, name)
        made = getattr(earlier.get(self.checkpoint), "surgeries", [])
        if self.to == "onnx" and any(getattr(surgery, "pack", False) for surgery in made):
            raise PretrainError(f"{self.checkpoint}: {PACKED}", place=("checkpoint",))

    def estimate(self, given: Given) -> Estimate:
        """Next to nothing beside loading the model, which it leaves as it was."""
        return Estimate(flops=0.0, left=replace(given.get("checkpoint", Left()), exact=False))

    def run(self, job: Job) -> StageResult:
        """Write the folder."""
        from pretrain.core.exchange.exporting import export

        facts = export(job.inputs["checkpoint"], job.folder / "export", self.to, self.numbers, self.pooling)
        metrics = {name: float(value) for name, value in facts.items() if isinstance(value, int | float)}
        job.say(f"{self.to}: " + ", ".join(f"{name} {figure(value)}" for name, value in metrics.items()))
        return {"metrics": metrics}
