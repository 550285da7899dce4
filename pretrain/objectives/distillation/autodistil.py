"""AutoDistil: many students in one model, which learn together how a teacher's attention relates its tokens.

Shape letters: B rows, L positions, N tokens, S subnetworks of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pretrain.core.batch import Batch, Context, Row, document_mask
from pretrain.core.bounds import Count, NonNegative, Positive, PositiveShare, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.meter import recomputing
from pretrain.core.method import Ref
from pretrain.core.models.attention import attend
from pretrain.core.models.elastic.relations import distance, projections, scores
from pretrain.core.models.elastic.subnetworks import Subnetwork, check_elastic, check_space, run, space_of
from pretrain.core.models.families import Arguments, at
from pretrain.objectives import Loss, Objective, sum_of, summed
from pretrain.objectives._distil import Teacher, inside, open_teacher, weighted_mean
from pretrain.objectives._token_loss import token_loss
from pretrain.objectives.language.masked_lm import MaskedLM
from pretrain.surgery.search.autodistil_search import check_relations, check_teacher, relations

Terms = tuple[Tensor, Tensor]  # of one student: the distance of its relations, its loss of masked language modelling


@dataclass(frozen=True)
class AutoDistil(Objective):
    """AutoDistil: Few-shot Task-agnostic Neural Architecture Search for Distilling Large Language Models
    (arXiv:2201.12507).

    The model is a SuperLM: each combination of `hidden_size`, `num_attention_heads`, `num_hidden_layers` and
    `mlp_ratio` (of the feed-forward to the width) is a student whose weights are the first of the model's along each
    axis, its blocks spread evenly over the model's. A step trains the largest, the smallest and `sampled` others, drawn
    anew:

        L = Σ over students, over X in Q, K, V of the last block:  mean |X_s X_sᵀ / √d_s - X_t X_tᵀ / √d_t|²

    X in `relation_heads` parts (null: as many as the teacher has heads of attention), over the pairs of tokens of a
    document, of text with `rate` of its tokens hidden. `distance: kl` is KL of the teacher's softmax from the student's
    in place of the squares, as in MiniLMv2. `masked_lm` adds that many times each student's loss of masked language
    modelling, without which neither head nor last feed-forward is trained. The paper divides the space by size into
    three, each with a SuperLM: a stage for each, `init` the teacher for all. Then `autodistil_search` takes out a
    student.

    The authors' heads keep their 64 entries (`head_size`, the model's) at every width, which no BERT of `transformers`
    can; here a student has heads of its width over their number, the first entries of the model's, and combinations in
    which that is no whole number or more than `head_size` are left out: where a width is heads · 64 both are the same.
    Their processes and micro-batches draw the same students, ours each their own.
    """

    families: ClassVar[tuple[str, ...]] = ("bert", "roberta", "camembert")
    shares_vocabulary: ClassVar[tuple[str, ...]] = ("teacher",)
    task: ClassVar[str] = "masked"
    token_weights: ClassVar[bool] = True

    teacher: Ref
    hidden_size: tuple[Count, ...]
    num_attention_heads: tuple[Count, ...]
    num_hidden_layers: tuple[Count, ...]
    mlp_ratio: tuple[Positive, ...] = (4.0,)
    head_size: Count = 64
    sampled: Whole = 2
    relation_heads: Count | None = None
    distance: Literal["mse", "kl"] = "mse"
    masked_lm: NonNegative = 0.0
    rate: PositiveShare = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        check_space(self.name, self.space, self.head_size)

    @property
    def space(self) -> tuple[Subnetwork, ...]:
        """The students, from the smallest to the largest."""
        return space_of(self)

    @property
    def predicted(self) -> float:
        """The hidden tokens, where the head is trained."""
        return self.rate if self.masked_lm else 0.0

    @property
    def taught(self) -> float:
        """The teacher makes no logits."""
        return 0.0

    @property
    def effort(self) -> float:
        """The students of a step next to the largest, by their matrices."""
        works = [float(each.flops(1)) for each in self.space]
        smallest, between = (works[0] if len(works) > 1 else 0.0), works[1:-1]
        others = min(self.sampled, len(between)) * sum(between) / max(1, len(between))
        return (works[-1] + smallest + others) / works[-1]

    def modules(self, model: nn.Module) -> nn.Module:
        """The teacher."""
        student = cast("PreTrainedModel", model)
        check_elastic(self.name, self.families, student, self.space, self.head_size)
        teacher = open_teacher(self.teacher, model, self.name)
        check_teacher(self.name, self.families, teacher, student)
        check_relations(self.name, self.relation_heads, teacher, self.space)
        return Teacher(teacher)

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """What masked language modelling prepares; `weight_student_<number>`: the rows that a student reads, or 0.

        A step's FLOPs are affine in these and, where the head is trained, in `weight_logits`.
        """
        batch = MaskedLM(rate=self.rate).prepare(rows, context)
        drawn, targets = self.draw(context), batch["weight"]
        batch |= {"weight": inside(batch), "weight_masked_lm": targets}
        for number in range(len(self.space)):
            batch[f"weight_student_{number}"] = torch.tensor(len(rows) * (number in drawn))
        if self.masked_lm:
            batch["weight_logits"] = targets * sum(self.space[number].hidden_size for number in drawn)
        return batch

    def draw(self, context: Context) -> list[int]:
        """The numbers of the students of a step: the smallest, the largest, some of the others."""
        last = len(self.space) - 1
        between = min(self.sampled, max(last - 1, 0))
        others: list[int] = context.rng.choice(last - 1, between, replace=False).tolist() if between else []
        return sorted({0, last, *(1 + other for other in others)})

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """Both terms summed over the students; parts `largest`, `smallest`, `sampled` (their mean) and `masked_lm`."""
        assert isinstance(modules, Teacher), "autodistil reads a teacher: see `modules`"
        if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
            raise PretrainError(f"{self.name}: strategy fsdp: accepted: ddp")
        drawn = [number for number in range(len(self.space)) if int(batch[f"weight_student_{number}"]) > 0]
        heads = self.relation_heads or int(at(modules.model, "config").num_attention_heads)
        with torch.no_grad():
            theirs = relations(modules.model, _arguments(modules.model, batch), heads)
        work = partial(self._work, batch=batch, arguments=_arguments(model, batch), theirs=theirs, heads=heads)
        terms = {number: _student(model, self.space[number], work) for number in drawn}
        apart = {number: term[0] for number, term in terms.items()}
        # Every parameter has a gradient on every process: neither the last feed-forward nor all blocks need be reached.
        reached = [0.0 * parameter.flatten()[0] for parameter in model.parameters() if parameter.requires_grad]
        value = {"relations": sum_of([*apart.values(), *reached])}
        parts = {"largest": apart[drawn[-1]], "smallest": apart[drawn[0]]}
        if len(drawn) > 2:
            parts["sampled"] = torch.stack([apart[number] for number in drawn[1:-1]]).mean()
        if self.masked_lm:
            parts["masked_lm"] = sum_of(term[1] for term in terms.values())
            value["masked_lm"] = self.masked_lm * parts["masked_lm"]
        return summed(value, {name: part.detach() for name, part in parts.items()})

    def _work(
        self, student: PreTrainedModel, *, batch: Batch, arguments: Arguments, theirs: list[Tensor], heads: int
    ) -> Terms:
        """A student's distance from the teacher, and its loss of masked language modelling (0 if it is not asked)."""
        plain = torch.zeros((), device=batch["tokens_BL"].device)
        if self.masked_lm:
            with projections(student) as seen:
                plain = token_loss(student, batch | {"weight": batch["weight_masked_lm"]}, causal=False).value
            ours = [scores(x_BLE, heads) for x_BLE in seen]
        else:
            ours = relations(student, arguments, heads)
        inside_BL, mask_BLL = batch["document_BL"] != 0, document_mask(batch["document_BL"], causal=False)[:, 0]
        apart_BL = distance(ours, theirs, mask_BLL, self.distance)
        return weighted_mean(apart_BL[inside_BL], inside_BL, batch), plain


def _student(model: nn.Module, chosen: Subnetwork, work: Callable[[PreTrainedModel], Terms]) -> Terms:
    """What the work makes of a student, which lies in the SuperLM."""
    superlm = cast("PreTrainedModel", model)
    if any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):  # of whole students
        made = checkpoint(run, superlm, chosen, work, use_reentrant=False, context_fn=recomputing)
        return cast("Terms", made)
    return run(superlm, chosen, work)


def _arguments(model: nn.Module, batch: Batch) -> Arguments:
    """The inputs of a model without its head; of a SuperLM those of its students too."""
    return {"input_ids": batch["tokens_BL"], **attend(model, batch, causal=False)}
