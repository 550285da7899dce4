"""A small model that is already trained teaches a larger one in the first part of its pretraining, and then no more.

Shape letters: B rows, L positions, N targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch, Context, Row
from pretrain.core.bounds import Positive, PositiveShare
from pretrain.core.method import Ref
from pretrain.core.models.families import head
from pretrain.objectives import Loss, Objective
from pretrain.objectives._distil import Side, Teacher, in_chunks, open_teacher, scattered, states, targets
from pretrain.objectives.language.causal_lm import CausalLM


@dataclass(frozen=True)
class SALT(Objective):
    """A Little Help Goes a Long Way: Efficient LLM Training by Leveraging Small LMs (arXiv:2410.18779).

    Small model aided large model training, in two phases. While less than `share` of the budget is spent, the small
    `teacher` gives soft labels beside the hard ones; with p the student's and q the teacher's predictions:

        L = mean over targets of (1 - omega) · -log p(x)  +  omega · Σ_v -q(v) log p(v),    q ∝ q_teacher^(1 / temperature)

    Then plain causal language modelling goes on under the same schedule, and the teacher is not run any more, so that
    its forward passes cost nothing. `share: 1` distils throughout. The log's loss is the hard term in both phases. The
    order of the phases and both terms are the paper's; its values of omega, temperature and of the step at which the
    phases change could not be verified: the defaults are ours. The paper trains with UL2's mixture of denoisers, this
    with the next token. The choice of sequences for the first phase is `salt_ds`.
    """  # noqa: E501

    again: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ("causal",)
    token_weights: ClassVar[bool] = True
    shares_vocabulary: ClassVar[tuple[str, ...]] = ("teacher",)

    teacher: Ref
    omega: PositiveShare = 0.5
    temperature: Positive = 1.0
    share: PositiveShare = 0.2

    @property
    def teaching(self) -> float:
        """The share of training in which the teacher is run."""
        return self.share

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """What causal LM prepares; in the first phase also `omega_1`, by which the loss knows of the phase."""
        batch = CausalLM().prepare(rows, context)
        if context.progress >= self.share:
            return batch
        # A tensor, not a number: the meter tells work apart by the shapes of a batch, and the phases cost differently.
        return batch | {"omega_1": torch.tensor([self.omega])}

    def modules(self, model: nn.Module) -> nn.Module:
        """The teacher."""
        return Teacher(open_teacher(self.teacher, model, self.name))

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The loss of the batch's phase; in the first with the parts `hard` and `soft`, both cross-entropies."""
        if "omega_1" not in batch:
            return CausalLM().loss(model, batch)
        assert isinstance(modules, Teacher), "salt reads a teacher: see `modules`"
        has_target_BL, target_N, weight_N = targets(batch)
        ours = states(model, batch, causal=True)[has_target_BL], *head(model)
        with torch.no_grad():
            theirs = states(modules.model, batch, causal=True)[has_target_BL], *head(modules.model)
        losses_2N = in_chunks(self._losses, ours, theirs, target_N)
        hard, soft = (losses_2N * weight_N).sum(-1) / max(len(target_N), 1)
        omega = batch["omega_1"][0]
        value = (1 - omega) * hard + omega * soft
        parts = {"hard": hard.detach(), "soft": soft.detach()}
        return Loss(value, parts, scattered(losses_2N[0], has_target_BL), measured={"": hard})

    def _losses(self, ours: Side, theirs: Side, target_N: Tensor) -> Tensor:
        """`losses_2N`: the cross-entropies with the token that is there, and with what the teacher predicts."""
        logits_NV, taught_NV = (nn.functional.linear(*side).float() for side in (ours, theirs))
        log_NV, q_NV = logits_NV.log_softmax(-1), taught_NV.detach().div(self.temperature).softmax(-1)
        return torch.stack([-log_NV.gather(-1, target_N[:, None])[:, 0], -(q_NV * log_NV).sum(-1)])
