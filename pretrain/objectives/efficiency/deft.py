"""DEFT: any objective, and a loss on how many of the feed-forwards' activations are not zero.

Shape letters: B rows, L positions, F width of a feed-forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core.batch import Batch, Context, Example, Row
from pretrain.core.bounds import NonNegative, Positive
from pretrain.core.errors import PretrainError
from pretrain.core.method import InnerObjective
from pretrain.core.models.cross_entropy import IGNORE
from pretrain.core.models.density import activations
from pretrain.objectives import Loss, Objective, summed
from pretrain.objectives.labelled import FineTuning

_OF_FINE_TUNING = {name for name in vars(FineTuning) if name[0] != "_" and not hasattr(Objective, name)}


@dataclass(frozen=True)
class Deft(Objective):
    """From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in Transformers
    (arXiv:2402.01911).

    The loss of the wrapped `objective` and a smooth count of the activations a that are not zero,

        L + weight · mean over blocks, tokens and neurons of a² / (a² + epsilon),

    a being what a feed-forward's nonlinearity (ReLU, GELU, SiLU; of a gated one the gate's) puts out. An
    encoder-decoder pays for the mean of each of its sides. Tokens of padding do not count where the batch says which
    they are (`real`). Meant for a model with adapters (`lora`, …), whose other weights are frozen. Evaluation sees the
    wrapped objective alone; the evaluation `activation_density` counts exactly. Parts: `objective`, its loss, and
    `density`, the mean itself.
    """

    version: ClassVar[int] = 2  # each term is weighed by its own number
    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert", "modernbert", "t5")

    objective: InnerObjective = "classification"
    weight: NonNegative = 1.0
    epsilon: Positive = 1e-7

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.wrapped, Deft):
            raise PretrainError("deft: objective 'deft': accepted: one that is not deft", place=("objective",))

    @cached_property
    def wrapped(self) -> Objective:
        """The objective that pays for density."""
        return self.held()["objective"]

    def __getattr__(self, name: str) -> Any:
        """What an objective on labelled documents has besides, where the wrapped one is such."""
        if name in _OF_FINE_TUNING:
            return getattr(self.wrapped, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def task(self) -> str:
        """The kind of model that the wrapped objective trains."""
        return self.wrapped.task

    @property
    def reads(self) -> Literal["rows", "examples"]:
        """As the wrapped objective."""
        return self.wrapped.reads

    @property
    def columns(self) -> tuple[str, ...]:
        """The wrapped objective's."""
        return self.wrapped.columns

    @property
    def own_evaluation(self) -> bool:
        """As the wrapped objective."""
        return self.wrapped.own_evaluation

    def raw_length(self, length: int) -> int:
        """The wrapped objective's."""
        return self.wrapped.raw_length(length)

    @property
    def divisible(self) -> bool:
        """As the wrapped objective, if batches say which of the positions that it runs hold tokens."""
        return self.wrapped.divisible and self.wrapped.name != "cache_augmentation"

    @property
    def token_weights(self) -> bool:
        """As the wrapped objective: a token's activations weigh as its loss does."""
        return self.wrapped.token_weights

    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """What the wrapped objective prepares, and the numbers of tokens that density may be the mean over."""
        batch = self.wrapped.prepare(rows, context)
        return batch | {f"weight_{name}": real_BL.sum() for name, real_BL in real(batch).items()}

    def modules(self, model: nn.Module) -> nn.Module | None:
        """The wrapped objective's."""
        return self.wrapped.modules(model)

    def export(self, modules: nn.Module | None) -> dict[str, PreTrainedModel]:
        """The wrapped objective's."""
        return self.wrapped.export(modules)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The two sums; parts `objective`, `density` and the wrapped objective's."""
        if not model.training:
            return self.wrapped.loss(model, batch, modules)
        with activations(model, self.name) as seen:
            plain = self.wrapped.loss(model, batch, modules)
        places, weight_BL = real(batch), batch.get("token_weight_BL")
        sides: dict[str, list[tuple[str, Tensor]]] = {}
        for place, passes in seen.items():
            side = place.rpartition(".")[0]
            for activation_BLF in passes:
                name = _name_of(activation_BLF, side, places)
                density = self.density(activation_BLF, places.get(name), weight_BL)
                sides.setdefault(side, []).append((name, density))
        if not sides:
            raise PretrainError("deft: the objective ran no feed-forward: accepted: an objective that runs the model")
        terms, means = dict(plain.terms or {"": plain.value}), []
        for densities in sides.values():
            for name in dict.fromkeys(name for name, _ in densities):
                mean = torch.stack([density for n, density in densities if n == name]).sum() / len(densities)
                terms[name] = terms[name] + self.weight * mean if name in terms else self.weight * mean
            means.append(torch.stack([density.detach() for _, density in densities]).mean())
        parts = {"objective": plain.value.detach(), "density": torch.stack(means).mean()} | plain.parts
        return summed(terms, parts, plain.nll_BL, plain.logged)

    def density(self, activation_BLF: Tensor, real_BL: Tensor | None = None, weight_BL: Tensor | None = None) -> Tensor:
        """The mean of a² / (a² + epsilon) over neurons and tokens, those of padding left out, weighted if asked."""
        square_BLF = activation_BLF.float().square()
        share_BL = (square_BLF / (square_BLF + self.epsilon)).mean(-1)
        if weight_BL is not None and weight_BL.shape == share_BL.shape:
            share_BL = share_BL * weight_BL
        if real_BL is None:
            return share_BL.mean()
        return (share_BL * real_BL).sum() / real_BL.sum().clamp(min=1)


def real(batch: Batch) -> dict[str, Tensor]:
    """Which positions hold tokens, for each way in which a model may be given them, as far as the batch says so.

    `density` is of a text that is read as it stands, `density_written` of what a decoder writes; `density_read` is of a
    prompt and its end, `density_whole` of a prompt and its answer in one; `density_shown` is without masked tokens.
    """
    places = {}
    for name in ("mask_BL", "mask_NL", "document_BL", "document_BS"):
        if name in batch:
            places["density"] = batch[name] != 0
            break
    if "owner_BM" in batch:
        places["density_written"] = batch["owner_BM"] != 0
    if "prompt_BL" in batch:
        prompt_BL, target_BM = batch["mask_BL"] != 0, batch["target_BM"] != IGNORE
        places["density_written"] = target_BM
        places["density_read"] = torch.cat([prompt_BL, torch.ones_like(prompt_BL[:, :1])], 1)
        places["density_whole"] = torch.cat([prompt_BL, target_BM], 1)
    if "tokens_BK" in batch:
        places["density_shown"] = batch["document_BS"][:, : batch["tokens_BK"].shape[1]] != 0
    return places


def _name_of(activation_BLF: Tensor, side: str, places: dict[str, Tensor]) -> str:
    """Which of `real` these activations are of; the empty name where none fits."""
    order = ["density_written", *places] if side else [name for name in places if name != "density_written"]
    fitting = (n for n in order if n in places and places[n].shape == activation_BLF.shape[:-1])
    return next(fitting, "")
