"""Weights of a few bits whose distribution stays near the trained one's, without any text.

Shape letters: O outputs, I inputs, H bins of a histogram.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.bounds import Count, Ge, Le, NonNegative, OpenShare
from pretrain.dial.effort import Task, Work, sorting, through
from pretrain.surgery import Inputs, Surgery, report
from pretrain.surgery._calibration import plain_linears, set_weight, weight_of
from pretrain.surgery.compression._grid import ROUNDED, GroupSize, round_to_nearest


def shrunk(weight_OI: Tensor, penalty: float) -> Tensor:
    """The V of least (w - v)² / 2 + λ |v| / |w|, the adaptive Lasso with inputs that know nothing of one another."""
    size_OI = weight_OI.abs()
    return weight_OI.sign() * (size_OI - penalty / size_OI.clamp(min=torch.finfo(size_OI.dtype).tiny)).clamp(min=0)


def on_two_grids(weight_OI: Tensor, penalty: float, bits: int, group_size: int, symmetric: bool) -> Tensor:
    """Weights that the penalty leaves and those that it takes away, each sort to the nearest point of its own grid."""
    salient_OI = shrunk(weight_OI, penalty) != 0
    parts = [weight_OI * sort_OI for sort_OI in (salient_OI, ~salient_OI)]
    first_OI, second_OI = (round_to_nearest(part_OI, bits, group_size, symmetric).dense() for part_OI in parts)
    return torch.where(salient_OI, first_OI, second_OI)


def divergence(weight_OI: Tensor, other_OI: Tensor, bins: int) -> float:
    """KL(P ‖ Q) in nats of histograms over the weights' range, each bin with one count more than it has."""
    low, high = weight_OI.min().item(), weight_OI.max().item()
    if low == high:
        return 0.0
    counts = [torch.histc(x.clamp(low, high).cpu(), bins, low, high).double() + 1 for x in (weight_OI, other_OI)]
    p_H, q_H = (count_H / count_H.sum() for count_H in counts)
    return (p_H * (p_H / q_H).log()).sum().item()


@dataclass(frozen=True)
class PreCalibration(Surgery):
    """Rethinking Post-Training Quantization: Introducing a Statistical Pre-Calibration Approach (arXiv:2501.09107).

    Weights of the blocks' linear layers go to `bits` bits such that their distribution stays near the trained one's; no
    text is needed. The adaptive Lasso ½‖W - V‖² + λ Σ |v| / |w|, the inputs replaced by pseudo-activations of which
    none knows of another, is least at V = sign(W) max(|W| - λ / |W|, 0): weights that stay are salient, and they and
    the rest are rounded to the nearest point of a min-max grid each, `group_size` inputs of a row sharing one (as
    `gptq` has it). λ of a layer is, of `steps` values that leave up to a `salient` share of its weights, and of 0, that
    of the least KL divergence of the rounded weights' histogram of `bins` bins from the trained ones'; `penalty` sets
    it, in units of the layer's mean square. A λ of 0 is rounding to nearest. The model stays plain, with dense weights:
    alone a quantised model, before `gptq` in one list the weights that it begins with and whose outputs it keeps.
    """

    families: ClassVar[tuple[str, ...]] = ("causal", "masked", "seq2seq")

    bits: Annotated[int, Ge(2), Le(8)] = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    salient: OpenShare = 0.1
    steps: Count = 10
    bins: Annotated[int, Ge(2)] = 64
    penalty: NonNegative | None = None

    def work(self, task: Task) -> Work:
        """Of each penalty tried two roundings and two histograms; the weights in order, for the penalties."""
        tried = 2 if self.penalty is not None else 1 + self.steps
        ranks = [sorting(each.outputs * each.inputs) * each.blocks for each in task.inner if self.penalty is None]
        return sum(ranks, through(task.linear, (2 * ROUNDED + 20) * tried))

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model with its linear layers' weights on their grids."""
        totals = dict.fromkeys(("kl", "kl_nearest", "error", "error_nearest", "salient"), 0.0)
        layers = plain_linears(model, self.name, self.families)
        for path, layer in layers.items():
            weight_OI = weight_of(layer)
            best_OI, metrics = self.rounded(weight_OI)
            set_weight(layer, best_OI)
            report(inputs, **{f"pre_calibration/{path}/{name}": value for name, value in metrics.items()})
            totals = {name: total + metrics[name] / len(layers) for name, total in totals.items()}
        report(inputs, **{f"pre_calibration/{name}": total for name, total in totals.items()})
        return model

    def rounded(self, weight_OI: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The weights on their grids, and their metrics; errors are shares of the weights' sum of squares."""
        square = weight_OI.square().sum().item() or 1.0

        def measured(penalty: float) -> tuple[float, Tensor, dict[str, float]]:
            on_OI = on_two_grids(weight_OI, penalty, self.bits, self.group_size, self.symmetric)
            kept = (shrunk(weight_OI, penalty) != 0).double().mean().item() if penalty else 0.0
            error = (on_OI - weight_OI).square().sum().item() / square
            kl = divergence(weight_OI, on_OI, self.bins)
            return kl, on_OI, {"kl": kl, "error": error, "salient": kept, "penalty": penalty}

        nearest = best = measured(0.0)
        for penalty in self.penalties(weight_OI):
            best = (
                min(best, measured(penalty), key=lambda tried: tried[0]) if self.penalty is None else measured(penalty)
            )
        return best[1], best[2] | {"kl_nearest": nearest[0], "error_nearest": nearest[2]["error"]}

    def penalties(self, weight_OI: Tensor) -> list[float]:
        """The λ to try: of each, the weights whose square is greater are salient."""
        square_N = weight_OI.square().flatten()
        if self.penalty is not None:
            return [self.penalty * square_N.mean().item()]
        sorted_N = square_N.sort(descending=True).values
        places = [round(len(sorted_N) * self.salient * step / self.steps) for step in range(1, self.steps + 1)]
        return [sorted_N[place].item() for place in dict.fromkeys(places) if 0 < place < len(sorted_N)]
