"""The model's own loss: what `model(**batch).loss` of any model of transformers says, trained on examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core.batch import Batch, Context, Example
from pretrain.core.bounds import PositiveShare
from pretrain.core.errors import PretrainError
from pretrain.core.models.reconstruction import reconstructions
from pretrain.core.processors import inputs_of
from pretrain.core.samples import Sample
from pretrain.objectives import Loss, Objective, sum_of
from pretrain.objectives.generic._inputs import additions, answer, arguments


@dataclass(frozen=True)
class Native(Objective):
    """Transformers: State-of-the-Art Natural Language Processing (arXiv:1910.03771).

    Trains any model of the library on the loss that its class computes, with inputs from its processor: ViTMAE's of
    hidden patches, Wav2Vec2's of hidden frames, PatchTST's, a masked or causal language model's. What a class needs
    besides (which patches to hide, labels) is drawn from the seed. `rate` is the share of tokens that a masked language
    model has to predict. Of a causal language model examples are one document each, unpacked: `causal_lm` packs them.
    """

    task: ClassVar[str] = "pretraining"
    reads: ClassVar[Literal["rows", "examples"]] = "examples"
    own_evaluation: ClassVar[bool] = True
    # Of the table's; models of no family there are asked for their loss too. T5's needs a target beside its input.
    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert", "modernbert", "unlisted")

    rate: PositiveShare = 0.15

    def prepare(self, rows: Sequence[Any], context: Context) -> Batch:
        """The model's arguments under their own names, `weight` and `tokens`; `seed` and `divisor` where needed."""
        if not all(isinstance(row, Example) for row in rows):
            raise PretrainError("native reads examples, not packed rows: give it `Examples`")
        batch = inputs_of(context.processor, [row.columns for row in rows], context.length)
        return batch | additions(batch, context, self.rate)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The model's loss, the mean over the batch's targets."""
        aimed = "labels" in batch or "decoder_input_ids" in batch
        if getattr(model.config, "is_encoder_decoder", False) and "input_ids" in batch and not aimed:
            raise PretrainError(
                f"native: {type(model).__name__}: an encoder-decoder of text needs a target beside its input; "
                "accepted: a model that learns from its inputs alone"
            )
        output = answer(model, batch)
        value = output.loss
        if value is not None and not batch["weight"]:  # the mean over no targets is no number
            made = (part for name, part in output.items() if name != "loss" and isinstance(part, Tensor))
            return Loss(sum_of(part.float().sum() * 0 for part in made), {})
        if value is None:
            raise PretrainError(
                f"{type(model).__name__} gives no loss on {', '.join(arguments(model, batch))}; accepted: a task whose "
                "model learns from its inputs alone"
            )
        return Loss(value / batch["divisor"] if "divisor" in batch else value, {})

    def show(self, model: PreTrainedModel, examples: Sequence[Example], context: Context) -> list[Sample]:
        """What the model makes of what is hidden from it, to look at."""
        batch = self.prepare(examples, context)
        documents = [example.columns for example in examples]
        return reconstructions(model, batch, documents, context.processor, seed=int(batch.get("seed", 0)))
