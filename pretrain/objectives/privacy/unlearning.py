"""Unlearning: a model forgets some of the documents that it was trained on, and keeps the rest.

Shape letters: B rows, L positions, E width, N positions of one side, C of a chunk, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch, Context, Row, rows_to_tensors
from pretrain.core.bounds import NonNegative
from pretrain.core.errors import PretrainError, unknown
from pretrain.core.models.cross_entropy import CHUNK_BYTES, IGNORE, LEAST_ROWS, linear_cross_entropy
from pretrain.core.models.families import head, softcap
from pretrain.core.models.fast import accelerate
from pretrain.objectives import Loss, Objective, summed
from pretrain.objectives._distil import Side, Teacher, in_chunks, kl, states
from pretrain.objectives.language.causal_lm import next_tokens


@dataclass(frozen=True)
class Unlearning(Objective):
    """Machine Unlearning of Pre-trained Large Language Models (arXiv:2402.15159).

    Rows of the domain `forget` are unlearnt, those of all others are retained; `mixture` of the stage says how many of
    each a step takes. L_f is the mean over the targets to forget,

        gradient_ascent:      L_f = log p(x_t | x_<t)
        random_labels:        L_f = -log p(y_t | x_<t),  y_t any ordinary token, drawn anew each time
        adversarial_samples:  L_f = -log p(a_t | x_<t),  a_t the likeliest but x_t for the model as it was

    and the whole L_f + weight · L_r, L_r the mean over the targets of retained rows,

        descent:        L_r = -log p(x_t | x_<t)
        kl_divergence:  L_r = KL(p₀(· | x_<t) ‖ p(· | x_<t)),  p₀ the model as it was at first, as above.

    Without retained rows, or with `weight: 0`, it is the paper's plain gradient ascent, fine-tuning with random labels
    or unlearning with adversarial samples. Its ascent with descent (or the divergence) on in-distribution or on general
    data is this with retained rows of a domain like the forgotten one, or of text in general. A side that a step has no
    rows of counts nothing. Judge it by `held_out` of both, and by `min_k`, before and after. Parts: `forget`, the mean
    of -log p of what is asked of the rows to forget (rising in gradient ascent), and `retain`.

    The authors' code takes the divergence as the cross-entropy to p₀, which has the same gradient. Its random and
    adversarial labels are shifted by the trainer once more, and so stand a position late: taken for a fault, and here
    as the paper has them.
    """

    families: ClassVar[tuple[str, ...]] = ("causal",)
    domain_fields: ClassVar[tuple[str, ...]] = ("forget",)

    forget: str  # a domain
    mode: Literal["gradient_ascent", "random_labels", "adversarial_samples"] = "gradient_ascent"
    retain: Literal["descent", "kl_divergence"] = "descent"
    weight: NonNegative = 1.0

    @property
    def _remembers(self) -> bool:
        """Whether the model as it was at first is read."""
        return self.mode == "adversarial_samples" or (self.retain == "kl_divergence" and self.weight > 0)

    @property
    def effort(self) -> float:
        """The first model's pass is a third of a step."""
        return 4 / 3 if self._remembers else 1.0

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """The tensors of plain language modelling, the targets of the two sides apart."""
        if self.forget not in context.domains:
            raise unknown("domain to forget", self.forget, context.domains)
        batch = rows_to_tensors(rows, context.length, context.vocabulary.pad)
        target_BL = next_tokens(batch["tokens_BL"], batch["document_BL"])
        forget_B1 = torch.tensor([[context.domains[row.domain] == self.forget] for row in rows])
        forget_BL = target_BL.where(forget_B1, IGNORE)
        batch["retain_target_BL"] = target_BL.masked_fill(forget_B1, IGNORE)
        batch["weight"] = (target_BL != IGNORE).sum()
        batch["weight_forget"] = (forget_BL != IGNORE).sum()
        batch["weight_retain"] = batch["weight"] - batch["weight_forget"]
        if self.mode == "random_labels":
            ordinary_V = np.flatnonzero(~context.vocabulary.special_V)
            labels_BL = ordinary_V[context.rng.integers(0, len(ordinary_V), size=tuple(forget_BL.shape))]
            forget_BL = torch.from_numpy(np.where(forget_BL != IGNORE, labels_BL, IGNORE))
        return batch | {"forget_target_BL": forget_BL}

    def modules(self, model: nn.Module) -> nn.Module | None:
        """The model as it is at first, where it is read."""
        if not self._remembers:
            return None
        first = copy.deepcopy(model)
        accelerate(first)
        return Teacher(first)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The two sides; parts `forget` and `retain`."""
        ours_BLE, first_BLE = states(model, batch, causal=True), None
        if self._remembers:
            if not isinstance(modules, Teacher):
                raise PretrainError(
                    "unlearning: the model as it was at first is missing; accepted: what `modules` gives"
                )
            with torch.no_grad():
                first_BLE = states(modules.model, batch, causal=True)
        forget_BL = batch["forget_target_BL"]
        if self.mode == "adversarial_samples" and first_BLE is not None and isinstance(modules, Teacher):
            forget_BL = runners_up(first_BLE, modules.model, forget_BL)
        forget, forget_nll_BL = _nll(ours_BLE, model, forget_BL, int(batch["weight_forget"]))
        retain_BL, kept = batch["retain_target_BL"], int(batch["weight_retain"])
        if self.retain == "kl_divergence" and first_BLE is not None and isinstance(modules, Teacher):
            retain, retain_nll_BL = _divergence(first_BLE, modules.model, ours_BLE, model, retain_BL)
        else:
            retain, retain_nll_BL = _nll(ours_BLE, model, retain_BL, kept)
        sign = -1.0 if self.mode == "gradient_ascent" else 1.0
        parts = {"forget": forget.detach(), "retain": retain.detach()}
        return summed(
            {"forget": sign * forget, "retain": self.weight * retain}, parts, forget_nll_BL + retain_nll_BL
        )  # fmt: skip


def _nll(states_BLE: Tensor, model: nn.Module, target_BL: Tensor, targets: int) -> tuple[Tensor, Tensor]:
    """The mean negative log-likelihood of the targets, 0 without any, and each one's."""
    weight_VE, bias_V = head(model, capped=True)
    return linear_cross_entropy(
        states_BLE, weight_VE, target_BL, bias_V=bias_V, targets=targets, softcap=softcap(model)
    )


def _divergence(
    first_BLE: Tensor, first: nn.Module, ours_BLE: Tensor, model: nn.Module, target_BL: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean KL(p₀ ‖ p) over the positions that have a target, and each one's negative log-likelihood."""
    has_target_BL = target_BL != IGNORE
    target_N = target_BL[has_target_BL]
    ours, theirs = (ours_BLE[has_target_BL], *head(model)), (first_BLE[has_target_BL], *head(first))
    losses_2N = in_chunks(_nll_and_kl, ours, theirs, target_N)
    nll_BL = torch.zeros(target_BL.shape, device=target_BL.device).masked_scatter(has_target_BL, losses_2N[0].detach())
    return losses_2N[1].sum() / max(len(target_N), 1), nll_BL


def _nll_and_kl(ours: Side, theirs: Side, target_N: Tensor) -> Tensor:
    p_NV, first_NV = (nn.functional.linear(*side).float().log_softmax(-1) for side in (ours, theirs))
    return torch.stack([-p_NV.gather(-1, target_N[:, None])[:, 0], kl(first_NV, p_NV)])


@torch.no_grad()
def runners_up(states_BLE: Tensor, model: nn.Module, target_BL: Tensor) -> Tensor:
    """In place of each target the token that the model finds likeliest but for it, chunk by chunk."""
    has_target_BL = target_BL != IGNORE
    weight_VE, bias_V = head(model, capped=True)  # a cap keeps the order
    h_NE, target_N, likeliest = states_BLE[has_target_BL], target_BL[has_target_BL], []
    rows = max(LEAST_ROWS, CHUNK_BYTES.get(h_NE.device.type, 64 << 20) // (4 * len(weight_VE)))
    for h_CE, target_C in zip(h_NE.split(rows), target_N.split(rows), strict=True):
        logits_CV = nn.functional.linear(h_CE, weight_VE, bias_V)
        likeliest.append(logits_CV.scatter(-1, target_C[:, None], -torch.inf).argmax(-1))
    return target_BL.masked_scatter(has_target_BL, torch.cat(likeliest))
