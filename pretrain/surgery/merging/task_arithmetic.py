"""Sums of what fine-tuned models have learnt, as differences of weights."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.surgery.merging._task_vectors import TaskVectors


@dataclass(frozen=True)
class TaskArithmetic(TaskVectors):
    """Editing Models with Task Arithmetic (arXiv:2212.04089).

    With the task vectors τ_k = θ_k - θ_0 of `models` that were fine-tuned from the checkpoint θ_0,
    θ = θ_0 + scale · Σ w_k τ_k: sums learn several tasks, a negative weight unlearns. The paper gives all the same
    weight and searches `scale` on held-out data. `weights` are one for all models or one for each; each is a number, a
    list of numbers spread over the blocks, or a mapping from parts of weights' names to either (`*`: all others).
    `normalize` divides by the sum of the weights, `elect` drops disagreeing signs as TIES does. Sums are in float64 and
    rounded once; the models are read weight by weight, so that two tensors are in memory besides the checkpoint.
    Checked against mergekit 0.1.5 (arcee-ai/mergekit) on whole checkpoints.
    """
