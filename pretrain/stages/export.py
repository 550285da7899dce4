"""`export`: a checkpoint in another program's format, read back and compared; writes the folder `export`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from pretrain.core.errors import PretrainError
from pretrain.core.exchange.task import OF, PACKED, check_option
from pretrain.core.quick.quantities import figure
from pretrain.dial.configs import shape_from
from pretrain.records import StageResult
from pretrain.stages import Estimate, Given, Job, Ref, Stage
from pretrain.stages._estimates import FLOOR, OPENED, OPENING, RECORDS, Left, tokenizer_bytes

WIDTHS = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "onnx": 4.0, "sentence-transformers": 4.0, "awq": 0.6}
TRACED, GRAPH, TABLE = 4.0, 9e4, 0.53  # seconds to trace a model, bytes of its graph for each, and of a tokenizer's


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
        """Opening, writing and opening again; the model stays as it was."""
        before = given.get("checkpoint", Left())
        left, shape = replace(before, exact=False), shape_from(before.config)
        if shape is None or self.to == "peft":  # of an adapter alone
            return Estimate(flops=0.0, left=left)
        words, traced = tokenizer_bytes(before.vocabulary or 0), TRACED if self.to == "onnx" else 0.0
        disk = WIDTHS[self.numbers if self.to == "gguf" else self.to] * shape.weights + traced * GRAPH
        disk += (TABLE if self.to == "gguf" else 1.0) * words
        seconds = 2 * OPENING + 4 * OPENED * shape.weights + traced
        return Estimate(0.0, FLOOR + 8.0 * shape.weights, seconds, RECORDS + disk, left=left)

    def run(self, job: Job) -> StageResult:
        """Write the folder."""
        from pretrain.core.exchange.exporting import export

        facts = export(job.inputs["checkpoint"], job.folder / "export", self.to, self.numbers, self.pooling)
        metrics = {name: float(value) for name, value in facts.items() if isinstance(value, int | float)}
        job.say(f"{self.to}: " + ", ".join(f"{name} {figure(value)}" for name, value in metrics.items()))
        return {"metrics": metrics}
