"""Surgery: `model -> model` (grow, sparsify, factorise, adapt, quantise, merge, change vocabulary, swap a block)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pretrain.core.errors import PretrainError
from pretrain.core.method import Method
from pretrain.dial.effort import Task, Work

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.core.batch import Batch
    from pretrain.dial.tuned import Layers, Tuning


PeftFormat = tuple[dict[str, object], dict[str, "Tensor"]]  # an adapter's configuration, and its tensors by name


@dataclass(frozen=True)
class Inputs:
    """What a surgery may ask for besides the model; most need none of it."""

    tokenizer: PreTrainedTokenizerBase | None = None
    # For calibration: input_ids, position_ids, as attention_mask each token's document in its row (0: padding), and as
    # domain_B the domain of each row.
    batches: Sequence[Batch] = ()
    models: Sequence[PreTrainedModel] = ()  # the other models of a merge, or a teacher
    tokenizers: Sequence[PreTrainedTokenizerBase | None] = ()  # theirs
    seed: int = 0
    domains: Sequence[str] = ()  # the names of the domains, by the numbers in `batches`
    # What a surgery hands back: a new `tokenizer`, the `batches` in its tokens, its `metrics`.
    extra: dict[str, Any] = field(default_factory=dict)
    # How often each token of the tokenizer occurs in all of the text, if it was counted: `batches` are some of it.
    counts: Callable[[], Tensor] | None = None


def report(inputs: Inputs | None, **metrics: float) -> None:
    """Add to the metrics of the stage."""
    if inputs is not None:
        inputs.extra.setdefault("metrics", {}).update(metrics)


def operate(
    surgeries: Sequence[Surgery], model: PreTrainedModel, inputs: Inputs
) -> tuple[PreTrainedModel, Inputs, int]:
    """The model after all of them, the inputs with the tokenizer that they left, and the FLOPs that they took."""
    from pretrain.core.meter import count_flops
    from pretrain.core.quick.vocabulary import check_references, labels_of, numbers_of

    flops = 0
    for surgery in surgeries:
        check_references(surgery, numbers_of(inputs.tokenizer), "the checkpoint", labels=labels_of(model))
        model, cost = count_flops(partial(surgery, model, inputs))
        flops += cost
        counts = None if "tokenizer" in inputs.extra else inputs.counts
        changed = {name: inputs.extra.pop(name, getattr(inputs, name)) for name in ("tokenizer", "batches")}
        inputs = replace(inputs, counts=counts, **changed)
    return model, inputs, flops


class Surgery(Method):
    """Base of the surgeries. One whose change of weights `merge_adapters` can fold in says so with `adapts`."""

    kind: ClassVar[str] = "surgery"
    adapts: ClassVar[bool] = False
    calibration: ClassVar[float] = 0.0  # passes of the rows of calibration through the blocks, without sparing zeros
    backward: ClassVar[bool] = False  # whether it takes gradients of every weight on those rows
    split: ClassVar[str] = "train"  # of the stage's corpus, whose rows it is shown
    new_vocabulary: ClassVar[bool] = False  # whether it leaves other tokens than there were
    keeps_vocabulary: ClassVar[bool] = False  # whether the tokens may not change after it

    @property
    def needs_text(self) -> bool:
        """Whether it refuses a stage without a `corpus`."""
        return False

    @property
    def estimated(self) -> bool:
        """Whether `work` tells what it computes: not of one that trains."""
        return True

    @property
    def growth_of_blocks(self) -> float:
        """The weights of the blocks after it, next to those before."""
        return 1.0

    def work(self, task: Task) -> Work:
        """What it computes on such a model: FLOPs, and the seconds of what is no product of matrices.

        By default the passes that `calibration` says and, where the blocks grow, the new model.
        """
        growth = self.growth_of_blocks
        return Work(self.calibration * task.forward) + (task.made(growth) if growth > 1 else Work())

    def tuning(self, layers: Layers, before: Tuning | None) -> Tuning | None:
        """What is trained of a model after it, `before` of the model that it is given; None: all of its weights."""
        return before

    @abstractmethod
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The operated model: a new one, or the same one changed in place; always use what is returned."""
        raise NotImplementedError

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Repeat the change of structure, without its numbers, on a fresh model: for what plain `transformers` lacks.

        A surgery that needs it calls `core.checkpoint.record(model, self)` when it operates.
        """
        raise PretrainError(f"surgery {self.name!r} leaves a plain transformers model: it has nothing to restore")

    def adapter(self, model: PreTrainedModel) -> PeftFormat | None:
        """What it put into the model in `peft`'s format (configuration, tensors), where that can express it.

        A checkpoint with such a recorded surgery holds a folder `adapter` that `peft` opens over the model it adapts.
        """
        return None
