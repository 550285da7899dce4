"""`evaluate`: measure a checkpoint on a corpus's held-out documents; writes `evaluation.json`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from pretrain.evaluation.held_out import HeldOut
from pretrain.stages import EvaluationField, Job, Ref, Stage, checkpoint_of, corpus_of


class Evaluate(Stage):
    """Fields of an `evaluate` stage. `compressors` adds xz and zstd on the same text as a yardstick."""

    stage: Literal["evaluate"] = "evaluate"
    checkpoint: Ref
    corpus: Ref
    split: Literal["validation", "test"] = "test"
    evaluations: list[EvaluationField] = [HeldOut()]
    max_documents: int = Field(2000, ge=1)
    compressors: bool = True

    model_config = ConfigDict(validate_default=True)

    def run(self, job: Job) -> dict[str, Any]:
        """Write `evaluation.json`."""
        from itertools import islice

        from pretrain.core import checkpoint
        from pretrain.core.files import write_json
        from pretrain.core.hardware import pick_device
        from pretrain.corpus.store import Corpus

        model, tokenizer = checkpoint.load(checkpoint_of(job.inputs["checkpoint"]), device=pick_device())
        corpus = Corpus(corpus_of(job.inputs["corpus"]))
        every = max(1, -(-corpus.info["documents"][self.split] // self.max_documents))  # from all sources alike
        documents = list(islice(corpus.documents(self.split), 0, None, every))
        result = evaluate(model, tokenizer, documents, self.evaluations, compressors=self.compressors)
        write_json(job.folder / "evaluation.json", result)
        metrics = result["metrics"]
        if "bits_per_byte" in metrics:
            others = "".join(f", {tool} {bits['all']:.3f}" for tool, bits in result["compressors"].items())
            job.say(f"{metrics['bits_per_byte']:.3f} bits per byte of held-out text{others}")
        return {"metrics": metrics}


def evaluate(
    model: Any, tokenizer: Any, documents: list[dict[str, Any]], methods: list[Any], *, compressors: bool
) -> dict[str, Any]:
    """What `evaluation.json` holds: metrics, their 95% intervals, and the compressors' bits per byte."""
    from pretrain.core.errors import PretrainError
    from pretrain.evaluation._compressors import compressed_bits

    if not documents:
        raise PretrainError("there are no documents to evaluate on; accepted: at least one")
    metrics: dict[str, float] = {}
    for method in methods:
        metrics |= method(model, tokenizer, documents)
    intervals = {k[:-4]: [metrics[k], metrics[f"{k[:-4]}/high"]] for k in list(metrics) if k.endswith("/low")}
    return {
        "metrics": {k: v for k, v in metrics.items() if not k.endswith(("/low", "/high"))},
        "intervals": intervals,
        "compressors": compressed_bits(documents) if compressors else {},
        "documents": len(documents),
        "methods": [method.name for method in methods],
    }
