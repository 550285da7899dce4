"""Objectives: what is asked of the model at each step.

`prepare(rows, context) -> batch` runs in the loader and does all the corrupting, masking and shifting with `numpy`;
`loss(model, batch) -> Loss` runs on the device. What must be trained beside the model and thrown away afterwards (a
generator, a stronger decoder) comes from `modules(model)` and is handed back to `loss`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pretrain.core.method import Method

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor, nn

    from pretrain.core.batch import Batch, Context, Row


class Loss(NamedTuple):
    """What `loss` returns: the scalar to minimise, its named parts (scalars, for the log), and each target's own loss.

    `value` is the mean over the batch's targets (`batch["weight"]` many): the loop weighs micro-batches and ranks by
    that number, so that the gradient is the one of the whole batch.
    """

    value: Tensor
    parts: dict[str, Tensor]
    nll_BL: Tensor | None = None  # detached, zero where there is no target; policies read it


class Objective(Method):
    """Base of the objectives. `task` is the kind of model it trains: causal, masked or seq2seq.

    `labelled` ones learn from labelled documents instead of rows of text. While training, a causal model is evaluated
    by the likelihood of held-out text, unless `own_evaluation` asks for the objective's own loss, as others are.
    """

    kind: ClassVar[str] = "objective"
    task: ClassVar[str] = "causal"
    labelled: ClassVar[bool] = False
    own_evaluation: ClassVar[bool] = False

    def raw_length(self, length: int) -> int:
        """How many tokens of text make a row of `length` once prepared (span corruption takes more than it shows)."""
        return length

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """Turn rows of text into the tensors that `loss` needs, `weight` (the number of targets) among them."""
        raise NotImplementedError

    def modules(self, model: nn.Module) -> nn.Module | None:
        """Modules trained with the model and left out of its checkpoint; `None` when there are none."""
        return None

    def export(self, modules: nn.Module | None) -> dict[str, Any]:
        """Models among `modules` that are worth a checkpoint of their own, by the name of their folder."""
        return {}

    def loss(self, model: torch.nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The loss on one micro-batch."""
        raise NotImplementedError
