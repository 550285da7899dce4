"""A student out of a model that holds many: the one that is nearest to the teacher within a size.

Shape letters: B rows, L positions, E width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core.batch import document_mask
from pretrain.core.bounds import Count, Positive
from pretrain.core.errors import PretrainError
from pretrain.core.models.elastic.relations import distance, projections, scores
from pretrain.core.models.elastic.subnetworks import (
    Subnetwork,
    check_elastic,
    check_space,
    config_of,
    parameters,
    run,
    space_of,
    weights,
)
from pretrain.core.models.families import Arguments, base, family, model_inputs, vocabulary_of
from pretrain.surgery import Inputs, Surgery, report
from pretrain.surgery._calibration import batches_of
from pretrain.surgery._growth import fresh


@dataclass(frozen=True)
class AutoDistilSearch(Surgery):
    """AutoDistil: Few-shot Task-agnostic Neural Architecture Search for Distilling Large Language Models
    (arXiv:2201.12507).

    The search after `autodistil` has trained the model. Of the subnetworks of the given sizes with at most
    `max_parameters` weights and `max_flops` FLOPs (of their blocks, on a row of `length` tokens; null: any number), the
    one whose attention relations are nearest to the teacher's on held-out text, by the distance that was trained. It is
    taken out as an ordinary checkpoint of its type, to be fine-tuned without further pretraining. `models: [TEACHER]`
    of the stage names the teacher, `corpus` the text, of which the validation split is read. Sizes, `head_size`,
    `relation_heads` and `distance` as in `autodistil`. One choice of each size takes out that subnetwork, without text.

    Metrics: `distance` of the chosen, `distance_largest` of the largest that was tried, how many were `tried`, the
    chosen sizes, its `flops`. The authors' code has the searches by the accuracy on a task alone; the one without
    labels is the paper's. Here the text is whole, where in training some of it is hidden.
    """

    families: ClassVar[tuple[str, ...]] = ("bert", "roberta", "camembert")
    split: ClassVar[str] = "validation"

    hidden_size: tuple[Count, ...]
    num_attention_heads: tuple[Count, ...]
    num_hidden_layers: tuple[Count, ...]
    mlp_ratio: tuple[Positive, ...] = (4.0,)
    head_size: Count = 64
    max_parameters: Count | None = None
    max_flops: Positive | None = None
    length: Count = 128
    relation_heads: Count | None = None
    distance: Literal["mse", "kl"] = "mse"

    @property
    def estimated(self) -> bool:
        """It depends on what is within the limits."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_space(self.name, self.space, self.head_size)

    @property
    def space(self) -> tuple[Subnetwork, ...]:
        """The subnetworks, from the smallest to the largest."""
        return space_of(self)

    @property
    def needs_text(self) -> bool:
        """Whether there is anything to choose."""
        return len(self.space) > 1

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The chosen subnetwork, a plain model of the type."""
        check_elastic(self.name, self.families, model, self.space, self.head_size)
        within = self._within(model)
        apart = self._apart(model, within, inputs) if len(self.space) > 1 else {within[0]: 0.0}
        chosen = min(within, key=lambda each: (apart[each], parameters(model, each), each))
        made = fresh(model, config_of(model, chosen))
        cut = weights(model, chosen)
        for name, weight in made.named_parameters():
            weight.copy_(cut[name])
        if len(self.space) > 1:
            report(inputs, **{
                "autodistil/distance": apart[chosen], "autodistil/distance_largest": apart[within[-1]],
                "autodistil/tried": len(within),
            })  # fmt: skip
        sizes = chosen._asdict() | {"flops": chosen.flops(self.length)}
        report(inputs, **{f"autodistil/{field}": value for field, value in sizes.items()})
        return made

    def _within(self, model: PreTrainedModel) -> list[Subnetwork]:
        """The subnetworks within the limits, from the smallest to the largest."""
        most = self.max_parameters or float("inf"), self.max_flops or float("inf")
        sizes = {each: (parameters(model, each), each.flops(self.length)) for each in self.space}
        within = [each for each, size in sizes.items() if size[0] <= most[0] and size[1] <= most[1]]
        if not within:
            smallest = sizes[self.space[0]]
            raise PretrainError(
                f"{self.name}: max_parameters {self.max_parameters}, max_flops {self.max_flops}: accepted: at least "
                f"{smallest[0]:,} parameters and {smallest[1]:,} FLOPs, those of the smallest subnetwork",
                place=("max_parameters" if smallest[0] > most[0] else "max_flops",),
            )
        return within

    def _apart(
        self, model: PreTrainedModel, within: list[Subnetwork], inputs: Inputs | None
    ) -> dict[Subnetwork, float]:
        """How far each is from the teacher, the mean over the tokens of the text."""
        batches = batches_of(inputs, self.name)
        teacher = self._teacher(model, inputs)
        heads = check_relations(self.name, self.relation_heads, teacher, self.space)
        modes, total, tokens = [(each, each.training) for each in (model, teacher)], dict.fromkeys(within, 0.0), 0
        for each, _ in modes:
            each.eval()
        for batch in batches:
            document_BL = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).to(model.device)
            inside_BL, mask_BLL = document_BL > 0, document_mask(document_BL, causal=False)[:, 0]
            theirs = relations(teacher, model_inputs(teacher, batch), heads)
            arguments = model_inputs(model, batch)
            for chosen in within:
                ours = run(model, chosen, partial(relations, arguments=arguments, heads=heads))
                total[chosen] += float(distance(ours, theirs, mask_BLL, self.distance)[inside_BL].sum())
            tokens += int(inside_BL.sum())
        for each, mode in modes:
            each.train(mode)
        return {chosen: value / max(1, tokens) for chosen, value in total.items()}

    def _teacher(self, model: PreTrainedModel, inputs: Inputs | None) -> PreTrainedModel:
        """The stage's one other model."""
        models = inputs.models if inputs is not None else ()
        if len(models) != 1:
            raise PretrainError(f"{self.name}: {len(models)} other models: accepted: a stage with `models: [TEACHER]`")
        check_teacher(self.name, self.families, models[0], model)
        return models[0]


def relations(model: nn.Module, arguments: Arguments, heads: int) -> list[Tensor]:
    """The scores of the last block's queries, keys and values, `scores_BRLL` each."""
    with projections(model) as seen:
        base(model)(**arguments)
    return [scores(x_BLE, heads) for x_BLE in seen]


def check_teacher(name: str, families: tuple[str, ...], teacher: PreTrainedModel, model: PreTrainedModel) -> None:
    """An error where the teacher's relations cannot be compared with the model's."""
    entry = family(teacher)
    if not entry.among(families):
        raise PretrainError(f"{name}: the teacher's family {entry.name!r}: accepted: {', '.join(families)}")
    theirs, ours = vocabulary_of(teacher), vocabulary_of(model)
    if theirs != ours:
        raise PretrainError(f"{name}: the teacher's vocabulary has {theirs} entries: accepted: {ours}")


def check_relations(
    name: str, relation_heads: int | None, teacher: PreTrainedModel, space: tuple[Subnetwork, ...]
) -> int:
    """How many relation heads there are: by default as many as the teacher has of attention. Too many are an error."""
    heads = relation_heads or int(teacher.config.num_attention_heads)
    narrowest = min(space[0].hidden_size, teacher.config.hidden_size)
    if heads > narrowest:
        raise PretrainError(
            f"{name}: relation_heads {heads}: accepted: at most {narrowest}, the width of the narrowest model",
            place=("relation_heads",),
        )
    return heads
