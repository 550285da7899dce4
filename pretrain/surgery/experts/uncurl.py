"""Fewer experts for one task: those that its router treats alike become one.

Shape letters: X experts, N tokens, H width, I hidden units of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.bounds import Count, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.experts.places import mixtures, number_of_experts
from pretrain.core.models.families import base, model_inputs, separated
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._calibration import batches_of, kept_tokens, token_rows, watched
from pretrain.surgery.experts._experts import with_experts


class Seen:
    """What a router says of the tokens: sums of its logits and of their products, and how often each is chosen."""

    def __init__(self, experts: int, top_k: int) -> None:
        self.top_k, self.tokens = top_k, 0
        self.sum_X = torch.zeros(experts, dtype=torch.float64)
        self.products_XX = torch.zeros(experts, experts, dtype=torch.float64)
        self.chosen_X = torch.zeros(experts, dtype=torch.float64)

    def add(self, logits_NX: Tensor) -> None:
        """Count some tokens."""
        wide_NX = logits_NX.double().cpu()
        self.tokens += len(wide_NX)
        self.sum_X += wide_NX.sum(0)
        self.products_XX += wide_NX.T @ wide_NX
        self.chosen_X += wide_NX.topk(self.top_k).indices.flatten().bincount(minlength=len(self.sum_X))

    def alike_XX(self) -> Tensor:
        """The correlation of the experts' logits over the tokens; 0 with one that is always the same."""
        mean_X = self.sum_X / self.tokens
        covariance_XX = self.products_XX / self.tokens - mean_X[:, None] * mean_X
        deviation_X = covariance_XX.diagonal().clamp(min=1e-12).sqrt()
        return (covariance_XX / (deviation_X[:, None] * deviation_X)).clamp(-1, 1).fill_diagonal_(1)


@dataclass(frozen=True)
class Uncurl(Surgery):
    """Revisiting SMoE Language Models by Evaluating Inefficiencies with Task Specific Expert Pruning
    (arXiv:2409.01483).

    Each mixture is left with `experts` experts, for the text of the stage: a task's. Its routers' logits tell which
    experts do the same there: they are grouped by spectral clustering of the logits' correlations over the tokens. A
    group becomes one expert. Its experts' hidden units, whose order means nothing, are put in the order of the one
    that is chosen most, so that the most alike of gate, up and down stand together; then the experts and their rows of
    the router are averaged, weighted by how often the tokens choose them. A token sees `top_k` experts, 0: as many as
    before. Train on the task after it.

    The paper groups by the router's logits, aligns and averages; the measure of likeness, the assignment and the
    router's rows are ours, since its text leaves them open. The assignment of I hidden units takes of the order of I³
    steps for each expert.
    """

    needs_text = True
    calibration: ClassVar[float] = 1.0
    families: ClassVar[tuple[str, ...]] = (
        "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "granitemoe", "minimax",
    )  # fmt: skip

    experts: Count
    top_k: Whole = 0

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with fewer experts, a plain one of its type."""
        routers, before = mixtures(model, self.name, self.families), number_of_experts(model)
        top_k = self.top_k or min(model.config.num_experts_per_tok, self.experts)
        if self.experts >= before or top_k > self.experts:
            raise PretrainError(
                f"{self.name}: experts {self.experts}, top_k {top_k} of a model of {before} experts: accepted: fewer "
                "experts than it has, and at least top_k"
            )
        weights = model.state_dict()
        made: dict[str, Tensor] = {}
        for place, seen in self._seen(model, routers, inputs).items():
            groups = self._groups(seen, inputs.seed if inputs else 0)
            made |= _merged(weights, place, routers[place], groups, seen.chosen_X)
        return with_experts(model, self.experts, top_k, [*routers, *routers.values()], lambda name, _: made[name])

    def _seen(self, model: PreTrainedModel, routers: Mapping[str, str], inputs: Inputs | None) -> dict[str, Seen]:
        """What the routers say of the text, by the experts' places."""
        modules, training = dict(model.named_modules()), model.training
        seen = {place: Seen(number_of_experts(model), model.config.num_experts_per_tok) for place in routers}
        noted: dict[str, tuple[Tensor, Tensor]] = {}
        for batch in (separated(model.eval(), batch) for batch in batches_of(inputs, self.name)):
            arguments, kept_N = model_inputs(model, batch), kept_tokens(batch).to(model.device)
            with watched({place: modules[router] for place, router in routers.items()}, noted):
                base(model)(**arguments)
            for place, (_, routing) in noted.items():  # the logits, and what is made of them
                seen[place].add(token_rows(routing[0], kept_N))
        model.train(training)
        return seen

    def _groups(self, seen: Seen, seed: int) -> list[list[int]]:
        """`experts` groups in the order of their first, each with those chosen most first."""
        from sklearn.cluster import SpectralClustering

        affinity = ((1 + seen.alike_XX()) / 2).numpy()
        labels = SpectralClustering(self.experts, affinity="precomputed", random_state=seed).fit_predict(affinity)
        order = sorted(range(len(labels)), key=lambda expert: (-float(seen.chosen_X[expert]), expert))
        groups = [[expert for expert in order if labels[expert] == label] for label in sorted({*labels.tolist()})]
        while len(groups) < self.experts:  # experts that no logit tells apart count as one point
            largest = max(groups, key=len)
            groups.append([largest.pop()])
        return sorted(groups, key=min)


def _merged(
    weights: Mapping[str, Tensor], place: str, router: str, groups: list[list[int]], chosen_X: Tensor
) -> dict[str, Tensor]:
    """What a mixture and its router hold after the groups have become one expert each, by qualified name."""
    up, down = f"{place}.gate_up_proj", f"{place}.down_proj"
    names = [up, down, *(name for name in weights if name.startswith(f"{router}."))]
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for group in groups:
        share = chosen_X[group] if chosen_X[group].sum() else torch.ones(len(group), dtype=chosen_X.dtype)
        share = (share / share.sum()).to(weights[up].device)
        first = _units(weights[up][group[0]], weights[down][group[0]])
        orders = [_order(first, _units(weights[up][each], weights[down][each])) for each in group]
        for name in names:
            parts = [weights[name][each] for each in group]
            if name == up:
                parts = [part.unflatten(0, (2, -1))[:, order].flatten(0, 1) for part, order in zip(parts, orders)]
            elif name == down:
                parts = [part[:, order] for part, order in zip(parts, orders)]
            stacked = torch.stack(parts)
            mean = torch.tensordot(share, stacked.double(), 1) if len(parts) > 1 else parts[0]
            rows[name].append(mean.to(stacked.dtype))
    return {name: torch.stack(each) for name, each in rows.items()}


def _units(up_2IH: Tensor, down_HI: Tensor) -> Tensor:
    """All weights of each hidden unit."""
    gate_IH, up_IH = up_2IH.float().chunk(2)
    return torch.cat([gate_IH, up_IH, down_HI.float().T], 1)


def _order(first: Tensor, other: Tensor) -> Tensor:
    """Which hidden unit of the other expert stands beside each of the first."""
    if torch.equal(first, other):
        return torch.arange(len(first), device=first.device)
    gains_II = (first @ other.T).cpu().numpy()
    return torch.from_numpy(linear_sum_assignment(gains_II, maximize=True)[1]).to(first.device)
