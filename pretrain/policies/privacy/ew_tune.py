"""EW-Tune: DP-SGD whose noise the Edgeworth accountant chooses, which asks for less of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pretrain.policies.privacy.dp_sgd import DPSGD


@dataclass(frozen=True)
class EWTune(DPSGD):
    """Privately Fine-Tuning Large Language Models with Differential Privacy (arXiv:2210.15042).

    `dp_sgd` with `accountant: edgeworth`: for a target epsilon and the few steps of a fine-tuning less noise than by
    Rényi's bounds. It is for models of which low-rank parts are trained, such as the surgery `lora` (the paper's are
    of Yu et al., made anew each step from the gradient). What the accountant says is an estimate and no bound, as in
    the authors' code, whose expansion of the first order was up to a quarter below the exact value; here it is of the
    third, and gives way to Rényi's bound where it cannot be relied on. `epsilon_renyi` beside it is proved: where the
    promise counts, take `dp_sgd`.
    """

    accountant: Literal["renyi", "edgeworth"] = "edgeworth"
