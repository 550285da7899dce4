"""Low-rank and sparse updates of weights that may be sparse themselves.

Shape letters: O outputs, I inputs, R rank, C numbers of the sparse part.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pretrain.core.bounds import Count, Positive, ProperShare, Whole
from pretrain.core.checkpoint import Entry, record, surgery_of
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import linears
from pretrain.core.models.layers import Linear, like
from pretrain.dial.effort import Task, Work, orthogonal, sorting, through
from pretrain.dial.tuned import Layers, Tuning
from pretrain.surgery import Inputs, PeftFormat, Surgery, report
from pretrain.surgery._random import generator
from pretrain.surgery.adapters._adapters import Adapter, LowRankAdapter, Where, adapt, adapters_of, peft_lora, targets

Frozen = tuple[Tensor, nn.Module]  # a weight, and the module that stands for it
_ROUNDS = 10  # of alternation after each direction more: with 2 the sparse part of a planted sum is not always found


def decompose(weight_OI: Tensor, rank: int, nonzero: int, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """W ≈ UV + S by greedy bilateral smoothing: U_OR, V_RI and the places of S in the flattened matrix, in order.

    V grows by one direction at a time, a leading one of what is left (by a random sketch); after each, in turn, U is
    an orthogonal basis of (W - S)Vᵀ, V = Uᵀ(W - S), and S the `nonzero` largest entries of W - UV.
    """
    weight_OI = weight_OI.float()
    S_OI, low_OI = torch.zeros_like(weight_OI), torch.zeros_like(weight_OI)
    V_RI = weight_OI.new_zeros(0, weight_OI.shape[1])
    places_C = torch.zeros(0, dtype=torch.long, device=weight_OI.device)
    while len(V_RI) < rank:
        left_OI = weight_OI - low_OI - S_OI
        sketch_O = torch.randn(weight_OI.shape[0], generator=source).to(left_OI)
        for _ in range(2):
            sketch_O = F.normalize(left_OI @ (left_OI.T @ sketch_O), dim=0)
        V_RI = torch.cat([V_RI, (sketch_O @ left_OI)[None]])
        for _ in range(_ROUNDS):
            U_OR = torch.linalg.qr((weight_OI - S_OI) @ V_RI.T)[0]
            V_RI = U_OR.T @ (weight_OI - S_OI)
            low_OI = U_OR @ V_RI
            rest = (weight_OI - low_OI).flatten()
            places_C = rest.abs().topk(nonzero).indices.sort().values
            S_OI = torch.zeros_like(rest).index_copy_(0, places_C, rest[places_C]).view_as(weight_OI)
    return U_OR, V_RI, places_C


class SparseAndLowRank(LowRankAdapter):
    """The change scale · (BA + S): S has `values` at fixed `places` of the flattened matrix, and is zero at first."""

    places: Tensor

    def __init__(self, layer: Linear, rank: int, nonzero: int, scale: float) -> None:
        super().__init__(layer, rank, scale, None)
        self.values = nn.Parameter(torch.zeros(nonzero, **like(layer.weight)))
        self.values.requires_grad_(nonzero > 0)
        self.register_buffer("places", torch.arange(nonzero, device=layer.weight.device))

    @torch.no_grad()
    def initialise(self, source: torch.Generator) -> None:
        """A normal with deviation 0.02, B and S zero, the places those of the frozen weight's own sparse part."""
        self.A.copy_(torch.empty(self.A.shape).normal_(0, 0.02, generator=source))
        if len(self.values):
            weight = self.layer.weight
            _, _, places_C = decompose(weight.T if self.conv1d else weight, len(self.A), len(self.values), source)
            self.places.copy_(places_C)

    def sparse(self) -> Tensor:
        """S as a matrix."""
        flat = self.values.new_zeros(self.out_features * self.in_features)
        return flat.index_copy(0, self.places, self.values).view(self.out_features, self.in_features)

    def change(self) -> Tensor:
        """scale · (BA + S)."""
        return (self.B @ self.A + self.sparse()) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Through the rank and the few numbers of S, without ever making the change."""
        change = F.linear(F.linear(x, self.A), self.B)
        part = x[..., self.places % self.in_features] * self.values
        change = change.index_add(-1, self.places // self.in_features, part.to(change.dtype))
        return self.layer(x) + change * self.scale

    def factors(self) -> tuple[Tensor, Tensor]:
        """The change as a LoRA: each row of S that is not empty is one rank more."""
        rows = (self.places // self.in_features).unique()
        one_hot_OR = torch.zeros_like(self.B[:, :1]).repeat(1, len(rows))
        one_hot_OR[rows, torch.arange(len(rows), device=rows.device)] = 1
        return torch.cat([self.B, one_hot_OR], 1) * self.scale, torch.cat([self.A, self.sparse()[rows]])

    def extra_repr(self) -> str:
        """What `print` says."""
        return f"{self.in_features}, {self.out_features}, rank={len(self.A)}, nonzero={len(self.values)}"


@dataclass(frozen=True)
class DSEE(Surgery):
    """DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models (arXiv:2111.00160).

    W becomes W ⊙ S1 + (alpha / rank) · (BA + S2). B, A and the `nonzero` numbers of S2 alone are trained, (O + I) ·
    rank + `nonzero` a matrix; B and S2 are zero at first. The places of S2 are those of S in W ≈ UV + S, found by
    greedy bilateral smoothing at the same rank, where the authors' code takes the largest entries of what is left
    after a hundred rounds of five directions: of a query matrix of SmolLM2-135M 3% of its norm, by two random starts
    with 23 of 64 places in common, none of them ours, which two starts agree on in 54. S1 sets `sparsity` of the
    frozen weights to zero, the smallest first, in all linear layers of the blocks, the adapted ones and the others
    ranked apart; merging makes the adapted ones dense again. In the paper the model is tuned, then pruned, then tuned
    again: on a model that dsee has adapted, with the same other fields, it only prunes, and `scores: updates` ranks
    the adapted layers' weights by the change learnt there. The meter counts products with these zeros. With no zeros
    the adapter is a LoRA in `peft`'s format too, of one rank more for each row of S2 in use. `where`: query_value,
    attention, feed_forward or all; `targets`: the ends of other layers' names. Metrics: `trained_parameters` and,
    where something is pruned, `zeros`, their share.
    """

    adapts: ClassVar[bool] = True

    rank: Count = 16
    nonzero: Whole = 64
    alpha: Positive = 32.0
    sparsity: ProperShare = 0.0
    scores: Literal["weights", "updates"] = "weights"
    where: Where = "query_value"
    targets: tuple[str, ...] = ()

    def tuning(self, layers: Layers, before: Tuning | None) -> Tuning | None:
        """Both factors, and the numbers of the sparse part."""
        tuning = layers.low_rank(self.where, self.targets, self.rank)
        sparse = sum(each.blocks for each in layers.chosen(self.where, self.targets)) * self.nonzero
        return replace(tuning, trained=tuning.trained + sparse)

    def work(self, task: Task) -> Work:
        """The greedy low-rank and sparse parts of each chosen matrix, and the ranking of all weights to prune."""
        chosen, made = task.layers.chosen(self.where, self.targets), Work()
        for each in chosen:
            size = float(each.outputs * each.inputs * each.blocks)
            for rank in range(1, self.rank + 1):
                made += _ROUNDS * (orthogonal(each, rank) + Work(6.0 * rank * size) + through(size, 7))
        return made + (sorting(task.linear) + through(task.linear, 20) if self.sparsity else Work())

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The adapted, pruned model: only the adapter, and a classifier's last layer, are trained from now on."""
        before = self._before(model)
        if before is not None:
            self._check_same(before["config"])
        elif self.scores == "updates":
            raise PretrainError(
                "dsee: scores 'updates': accepted: a model that dsee has adapted and training has changed"
            )
        else:
            model, source = self.restore(model), generator(self.name, inputs)
            for module in adapters_of(model, SparseAndLowRank).values():
                module.initialise(source)
        if self.sparsity:
            self._prune(model)
        if before is not None:
            before["config"] = asdict(self)
        else:
            record(model, self)
        report(inputs, trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad))
        if self.sparsity:
            weights = [weight for group in _frozen(model) for weight, _ in group]
            report(inputs, zeros=sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights))
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same layers, with numbers yet to be loaded."""
        layers = targets(model, self.name, self.where, self.targets)
        for name, layer in layers.items():
            if self.rank >= min(layer.weight.shape):
                raise PretrainError(
                    f"dsee: rank {self.rank}: accepted: below {min(layer.weight.shape)}, the smaller side of {name}"
                )
            if self.nonzero > layer.weight.numel():
                raise PretrainError(
                    f"dsee: nonzero {self.nonzero}: accepted: at most {layer.weight.numel()}, the numbers of {name}"
                )
        return adapt(model, layers, lambda _, layer: self._adapted(layer).train(layer.training))

    def adapter(self, model: PreTrainedModel) -> PeftFormat | None:
        """The change as a LoRA of `peft`; none over pruned weights, which are not those that it would be put on."""
        if self.sparsity:
            return None
        adapters = adapters_of(model, SparseAndLowRank)
        return peft_lora(model, {name: module.factors() for name, module in adapters.items()})

    def _adapted(self, layer: Linear) -> SparseAndLowRank:
        return SparseAndLowRank(layer, self.rank, self.nonzero, self.alpha / self.rank)

    def _before(self, model: PreTrainedModel) -> Entry | None:
        """The record of this surgery on a model that it has adapted already."""
        return next((entry for entry in surgery_of(model) if entry["method"] == self.name), None)

    def _check_same(self, before: dict[str, object]) -> None:
        """On an adapted model only `sparsity` and `scores` may differ from what adapted it."""
        for field in ("rank", "nonzero", "alpha", "where", "targets"):
            value, recorded = getattr(self, field), before[field]
            if value != (tuple(recorded) if isinstance(recorded, list) else recorded):
                raise PretrainError(
                    f"dsee: {field} {value!r}: accepted: {recorded!r}, by which the model is adapted already"
                )
        reached = before["sparsity"]
        if isinstance(reached, float | int) and self.sparsity <= reached:
            raise PretrainError(f"dsee: sparsity {self.sparsity}: accepted: above {reached}, that of the adapted model")

    @torch.no_grad()
    def _prune(self, model: PreTrainedModel) -> None:
        """The share `sparsity` of each group's weights, those of the least scores in the whole group, become zero."""
        for group in _frozen(model):
            scores = [self._score(weight, module).flatten() for weight, module in group]
            if not scores:
                continue
            flat = torch.cat(scores)
            keep = torch.ones_like(flat, dtype=torch.bool)
            keep[flat.argsort(stable=True)[: round(self.sparsity * len(flat))]] = False
            for (weight, _), mask in zip(group, keep.split([len(s) for s in scores]), strict=True):
                weight.mul_(mask.view_as(weight))

    def _score(self, weight: Tensor, module: nn.Module) -> Tensor:
        """What ranks a weight's numbers; those that are zero already come first."""
        if self.scores == "weights" or not isinstance(module, Adapter):
            return weight.abs().float()
        change_OI = module.change().abs().float()
        return torch.where(weight == 0, -1, change_OI.T if module.conv1d else change_OI)


def _frozen(model: PreTrainedModel) -> tuple[list[Frozen], list[Frozen]]:
    """The frozen weights, each with the module that stands for it: those of the adapted layers, then the others."""
    adapted: list[Frozen] = []
    others: list[Frozen] = []
    for module in linears(model).values():
        if isinstance(module, Adapter):
            adapted.append((module.layer.weight, module))
        elif isinstance(weight := module.weight, Tensor):
            others.append((weight, module))
    return adapted, others
