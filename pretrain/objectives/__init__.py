"""Objectives: what is asked of the model at each step.

`prepare(rows, context) -> batch` runs in the loader and does all the corrupting, masking and shifting with `numpy`;
`loss(model, batch) -> Loss` runs on the device. What must be trained beside the model and thrown away afterwards (a
generator, a stronger decoder) comes from `modules(model)` and is handed back to `loss`.
"""

from __future__ import annotations

import functools
import operator
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pretrain.core.method import Method

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from pretrain.core.batch import Batch, Context
    from pretrain.core.samples import Sample


class Loss(NamedTuple):
    """What `loss` returns: the scalar to minimise, its named parts (scalars, for the log), and each target's own loss.

    `value` is the mean over the batch's targets (`batch["weight"]` many): the loop weighs micro-batches and processes
    by that number, so that the gradient is the one of the whole batch. A loss whose summands are means over different
    things is made by `summed`: the loop weighs each of its `terms`, and each part, by `batch["weight_<name>"]`, and by
    `weight` where the batch has no such number.

    `measured`, where `value` is more than what held-out text is measured by (coefficients that change while it trains,
    terms that hold training alone): the summands of that. The log's `loss` is their sum, as is a held-out one, so that
    the two can be compared; the gradient is `value`'s.
    """

    value: Tensor
    parts: dict[str, Tensor]
    nll_BL: Tensor | None = None  # detached, zero where there is no target; policies read it
    terms: dict[str, Tensor] | None = None  # the summands of `value` by name, where there are several
    measured: dict[str, Tensor] | None = None  # those of the loss that is logged, where it is another

    def shared(self, shares: Mapping[str, float], weight: float = 1.0) -> Tensor:
        """`weight` times the micro-batch's share of the step's loss; `shares` are those of the step's numbers."""
        if self.terms is None:
            return self.value * weight * shares["weight"]
        return sum_of(term * share(name, shares) for name, term in self.terms.items()) * weight

    @property
    def logged(self) -> dict[str, Tensor]:
        """The detached summands by name of what the log and a held-out measurement call the loss."""
        terms = self.measured or self.terms or {"": self.value}
        return {name: term.detach() for name, term in terms.items()}

    def logged_share(self, shares: Mapping[str, float], weight: float = 1.0) -> Tensor:
        """The micro-batch's share of the step's loss as it is logged, as `shared` is of that which is minimised."""
        if self.measured is None:
            return self.shared(shares, weight).detach()
        return sum_of(term * share(name, shares) for name, term in self.logged.items()) * weight


def summed(
    terms: Mapping[str, Tensor], parts: dict[str, Tensor], nll_BL: Tensor | None = None,
    measured: Mapping[str, Tensor] | None = None,
) -> Loss:  # fmt: skip
    """The loss that is the sum of `terms`, each with its coefficient already on it; `measured` as of `Loss`."""
    return Loss(sum_of(terms.values()), parts, nll_BL, dict(terms), None if measured is None else dict(measured))


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """Their sum, from the first to the last."""
    return functools.reduce(operator.add, tensors)


def share(name: str, shares: Mapping[str, float]) -> float:
    """What a term or part of this name is weighed by."""
    return shares.get(f"weight_{name}", shares["weight"])


class Objective(Method):
    """Base of the objectives. `task` is the kind of model it trains: causal, masked, seq2seq, base, pretraining.

    `reads` says what `prepare` is given: `rows` of packed text, or `examples`, whole documents that have all of
    `columns`. While training, a causal model is evaluated by the likelihood of held-out text, unless `own_evaluation`
    asks for the objective's own loss, as others are. A class of one answer says these as a class variable.

    `divisible`: the loss is a sum over rows, so that micro-batches and processes add up to the whole batch's gradient,
    for equal draws: random masks are drawn for each micro-batch. One that is not (each row is compared with all others
    of its batch) is refused where a step is more than one batch.
    `token_weights`: every term of the loss follows the `token_weight_BL` that policies write; they are refused beside
    an objective that does not.
    """

    kind: ClassVar[str] = "objective"
    again: ClassVar[bool] = False  # whether logits, of more than one chunk, are made again for the backward pass

    @property
    def task(self) -> str:
        """The kind of model."""
        return "causal"

    @property
    def reads(self) -> Literal["rows", "examples"]:
        """What `prepare` is given."""
        return "rows"

    @property
    def own_evaluation(self) -> bool:
        """Whether its own held-out loss is what is measured while training."""
        return False

    @property
    def divisible(self) -> bool:
        """Whether a batch may be cut into several."""
        return True

    @property
    def token_weights(self) -> bool:
        """Whether policies may weigh tokens."""
        return False

    @property
    def predicted(self) -> float:
        """The share of positions with a target, for which logits are made."""
        return float(getattr(self, "rate", 1.0)) if self.task == "masked" else 1.0

    @property
    def taught(self) -> float:
        """The share of positions at which a model that is only read, as a teacher, makes its logits."""
        return self.predicted

    @property
    def teaching(self) -> float:
        """The share of training in which such a model is run."""
        return 1.0

    @property
    def effort(self) -> float:
        """What a step computes in blocks, the model's and others, next to one pass of the model and back."""
        return 1.0

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that each example must have; empty: those that the processor reads."""
        return ()

    def raw_length(self, length: int) -> int:
        """How many tokens of text make a row of `length` once prepared (span corruption takes more than it shows)."""
        return length

    @abstractmethod
    def prepare(self, rows: Sequence[Any], context: Context) -> Batch:
        """Turn rows or examples into the tensors that `loss` needs, `weight` (the number of targets) among them.

        Where terms of the loss are means over other things, `weight_<term>` says how many of those there are.
        """
        raise NotImplementedError

    def modules(self, model: nn.Module) -> nn.Module | None:
        """Modules trained with the model and left out of its checkpoint; `None` when there are none."""
        return None

    def export(self, modules: nn.Module | None) -> dict[str, PreTrainedModel]:
        """Models among `modules` that are worth a checkpoint of their own, by the name of their folder."""
        return {}

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The loss on one micro-batch.

        `weight`, `weight_<term>` and `tokens` are on the host. Reading a value of another tensor (`float(x)`, a boolean
        mask as an index) makes the host wait for the device: avoid it where it can be.
        """
        raise NotImplementedError

    def show(self, model: PreTrainedModel, examples: Sequence[Any], context: Context) -> list[Sample]:
        """What the trained model makes of held-out examples, to look at (`core.samples`); none by default."""
        return []
