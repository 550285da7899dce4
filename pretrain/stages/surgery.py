"""`surgery`: change a checkpoint's model by surgeries, one after another; writes a checkpoint."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pretrain.stages import Job, Ref, Stage, SurgeryField, checkpoint_of


class Surgery(Stage):
    """Fields of a `surgery` stage. `models` are the other models of a merge, or a teacher."""

    stage: Literal["surgery"] = "surgery"
    checkpoint: Ref
    surgeries: list[SurgeryField] = Field(min_length=1)
    models: list[Ref] = []

    def run(self, job: Job) -> dict[str, Any]:
        """Operate and save."""
        from pretrain.core import checkpoint
        from pretrain.core.meter import count_flops
        from pretrain.surgery import Inputs

        source = checkpoint_of(job.inputs["checkpoint"])
        model, tokenizer = checkpoint.load(source)
        merged = [checkpoint_of(folder) for folder in job.inputs.get("models", [])]
        others = [checkpoint.load(folder)[0] for folder in merged]
        inputs = Inputs(tokenizer=tokenizer, models=others, seed=job.seed)
        before, flops = model.num_parameters(), 0
        for surgery in self.surgeries:
            model, cost = count_flops(lambda surgery=surgery, model=model: surgery(model, inputs))  # type: ignore[misc]
            flops += cost
        own = {"metrics": {"parameters": model.num_parameters(), "parameters_before": before}, "flops": flops}
        lineage = checkpoint.lineage(source)
        history = job.history(own, lineage, *map(checkpoint.lineage, merged))
        lineage |= history | {"flops": lineage.get("flops", 0) + flops}
        checkpoint.save(model, tokenizer, job.folder / "checkpoint", lineage)
        job.say(f"{before:,} -> {model.num_parameters():,} parameters")
        return own
