"""SMART: fine-tuning that is held smooth around each input, and near the average of the model's own past.

Shape letters: B examples of a batch, L tokens, E width of the embeddings, C classes (a regression: 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pretrain.core.batch import Batch, Context, Example, Row, Vocabulary
from pretrain.core.bounds import Count, NonNegative, Positive, ProperShare, Share
from pretrain.core.errors import PretrainError
from pretrain.core.method import InnerObjective
from pretrain.core.models.families import embeddings
from pretrain.core.models.features import evaluating
from pretrain.objectives import Loss
from pretrain.objectives._fine_tuning import classified
from pretrain.objectives.labelled import Answered, FineTuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WRAPPED = ("classification", "regression")


@dataclass(frozen=True)
class Smart(FineTuning[str | float]):
    """SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models
    through Principled Regularized Optimization (arXiv:1911.03437).

    The loss of the wrapped `objective` and two distances d between the model's outputs f, d being the symmetric
    KL(p ‖ q) + KL(q ‖ p) of a classification and the squared difference of a regression; all are means over examples:

        L + lambda_s · max over |δ|∞ ≤ epsilon of d(f(x + δ; θ), f(x; θ)) + mu · d(f(x; θ), f(x; θ̃))

    δ is added to the token embeddings, whose root mean square in the example is the unit of epsilon, sigma and eta:
    from N(0, sigma²) it takes `steps` ascents u = δ + eta · g / |g|∞, δ ← epsilon · u / |u|∞, g the gradient of the
    example's distance, the norms those of each token. θ̃ ← beta · θ̃ + (1 - beta) · θ after each step, with `late_beta`
    once the share `early` of training is over. The sums are computed in float32, beside whose rounding sigma is small;
    the evaluation sees the wrapped objective alone.

    The paper cuts δ to a ball of 1e-5, in which the distance is about 1e-8 and does nothing. The authors' code (mt-dnn)
    has no ball: it scales δ to |δ|∞ = 1 in each token, beside embeddings that come from a layer norm. That is the scale
    here. It adds eta · g as it is, which is lost in the noise that it starts from; g / |g|∞ is the paper's.
    """

    version: ClassVar[int] = 2  # the perturbation has the scale of the embeddings
    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert", "modernbert")

    objective: InnerObjective = "classification"
    lambda_s: NonNegative = 1.0
    mu: NonNegative = 1.0
    epsilon: Positive = 1.0
    sigma: Positive = 1e-5  # where δ = 0 there is no gradient
    eta: Positive = 1e-3
    steps: Count = 1
    beta: ProperShare = 0.99
    late_beta: ProperShare = 0.999
    early: Share = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wrapped.name not in WRAPPED:
            raise PretrainError(
                f"smart: objective {self.wrapped.name!r}: accepted: {', '.join(WRAPPED)}", place=("objective",)
            )

    @cached_property
    def wrapped(self) -> FineTuning[str | float]:
        """The objective that is regularised."""
        return self.held()["objective"]

    @property
    def columns(self) -> tuple[str, ...]:
        """The wrapped objective's."""
        return self.wrapped.columns

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The wrapped objective's."""
        return self.wrapped.metric_names

    def labels(self, values: Iterable[object]) -> tuple[str, ...]:
        """The wrapped objective's."""
        return self.wrapped.labels(values)

    def ready(
        self, model: PreTrainedModel, labels: Sequence[str], vocabulary: Vocabulary, seed: int
    ) -> PreTrainedModel:
        """The model with the wrapped objective's head."""
        return self.wrapped.ready(model, labels, vocabulary, seed)

    def begin(self, model: PreTrainedModel, values: Iterable[object], *, fresh: bool) -> None:
        """As the wrapped objective begins."""
        self.wrapped.begin(model, values, fresh=fresh)

    def end(self, model: PreTrainedModel, stored: torch.dtype | None) -> torch.dtype | None:
        """As the wrapped objective ends."""
        return self.wrapped.end(model, stored)

    def prepare(self, rows: Sequence[Row] | Sequence[Example], context: Context) -> Batch:
        """What the wrapped objective prepares, and `beta`, the average's momentum at this point of training."""
        beta = self.beta if context.progress <= self.early else self.late_beta
        return self.wrapped.prepare(rows, context) | {"beta": torch.tensor(beta)}

    def modules(self, model: nn.Module) -> nn.Module | None:
        """The averaged weights, where `mu` asks for them."""
        return Average(model) if self.mu else None

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The three sums; parts `objective`, `smoothness`, `proximal` and the wrapped objective's."""
        if not model.training or not (self.lambda_s or self.mu):
            return self.wrapped.loss(model, batch)
        with torch.autocast(batch["tokens_BL"].device.type, enabled=False):
            with _outputs(model) as seen:
                plain = self.wrapped.loss(model, batch)
            embedded_BLE, logits_BC = seen["embedded"], seen["logits"].float()
            value, parts = plain.value, {"objective": plain.value.detach()} | plain.parts
            if self.lambda_s:
                delta_BLE = self.ascend(model, batch, logits_BC.detach(), embedded_BLE)
                smoothness = _mean(self.distance(_shifted(model, batch, delta_BLE), logits_BC), batch)
                value, parts["smoothness"] = value + self.lambda_s * smoothness, smoothness.detach()
            if self.mu:
                assert isinstance(modules, Average), "smart averages the weights: see `modules`"
                modules.update(model, batch["beta"])
                proximal = _mean(self.distance(logits_BC, modules.logits(model, batch)), batch)
                value, parts["proximal"] = value + self.mu * proximal, proximal.detach()
        return Loss(value, parts, measured=plain.logged)

    def ascend(self, model: nn.Module, batch: Batch, clean_BC: Tensor, embedded_BLE: Tensor) -> Tensor:
        """`delta_BLE` that moves each example's output away from `clean_BC`, as large in each token; 0 on padding."""
        present_BL1 = batch["mask_BL"][..., None].to(embedded_BLE.dtype)
        square_BL1 = embedded_BLE.detach().square().mean(-1, keepdim=True) * present_BL1
        unit_B11 = (square_BL1.sum(1, keepdim=True) / present_BL1.sum(1, keepdim=True)).sqrt()
        delta_BLE = torch.randn_like(embedded_BLE) * self.sigma * unit_B11 * present_BL1
        for _ in range(self.steps):
            delta_BLE.requires_grad_()
            moved = self.distance(_shifted(model, batch, delta_BLE), clean_BC).sum()
            (gradient_BLE,) = torch.autograd.grad(moved, delta_BLE)
            delta_BLE = delta_BLE.detach() + self.eta * unit_B11 * _to_one(gradient_BLE)
            delta_BLE = self.epsilon * unit_B11 * _to_one(delta_BLE) * present_BL1
        return delta_BLE

    def distance(self, ours_BC: Tensor, theirs_BC: Tensor) -> Tensor:
        """`distance_B` between two outputs; products of differences, so that what is close is not lost in rounding."""
        if self.wrapped.name == "regression":
            return (ours_BC - theirs_BC).square().sum(-1)
        p_BC, q_BC = ours_BC.log_softmax(-1), theirs_BC.log_softmax(-1)
        return ((p_BC.exp() - q_BC.exp()) * (p_BC - q_BC)).sum(-1)

    def predict(self, model: PreTrainedModel, batch: Batch, context: Context) -> list[str | float]:
        """The wrapped objective's."""
        return self.wrapped.predict(model, batch, context)

    def answers(self, model: PreTrainedModel, batch: Batch, context: Context) -> Answered[str | float]:
        """The wrapped objective's."""
        return self.wrapped.answers(model, batch, context)

    def expected(self, examples: Sequence[Example], context: Context) -> list[str | float]:
        """The wrapped objective's."""
        return self.wrapped.expected(examples, context)

    def learnt(self, value: object, labels: Sequence[str]) -> bool:
        """The wrapped objective's."""
        return self.wrapped.learnt(value, labels)

    def classes(self, answers: Sequence[str | float]) -> list[str]:
        """The wrapped objective's."""
        return self.wrapped.classes(answers)

    def metrics(self, predictions: Sequence[str | float], references: Sequence[str | float]) -> dict[str, float]:
        """The wrapped objective's."""
        return self.wrapped.metrics(predictions, references)


class Average(nn.Module):
    """θ̃: the average of the trained weights, as buffers, so that a training's state holds it.

    Nobody calls an objective after a step. The weights that a step has left are taken in by the first micro-batch of
    the next one, which is the one that finds no gradients; so does the first of a resumed training, whose average was
    saved before that.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, parameter in _trained(model).items():
            self.register_buffer(name.replace(".", "/"), parameter.detach().clone())

    @property
    def weights(self) -> dict[str, Tensor]:
        """The averages by the parameters' names."""
        return {name.replace("/", "."): average for name, average in self.named_buffers()}

    @torch.no_grad()
    def update(self, model: nn.Module, beta: Tensor) -> None:
        """Take the model's weights in, once a step."""
        trained = _trained(model)
        if any(hasattr(parameter, "device_mesh") for parameter in trained.values()):
            raise PretrainError("smart: strategy fsdp: accepted: ddp, or mu: 0 (the average is not sharded)")
        if any(parameter.grad is not None for parameter in trained.values()):
            return
        for name, average in self.weights.items():
            average.lerp_(trained[name].to(average.dtype), (1 - beta).to(average.dtype))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """`logits_BC` of the model with the averaged weights, without dropout."""
        with evaluating(model):
            weights = {f"model.{name}": average for name, average in self.weights.items()}
            return functional_call(_Reader(model), weights, (batch,)).float()


class _Reader(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return classified(self.model, batch)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _to_one(vectors_BLE: Tensor) -> Tensor:
    """Each token's vector with 1 as its largest entry; zeros stay zeros."""
    largest_BL1 = vectors_BLE.abs().amax(-1, keepdim=True)
    return vectors_BLE / largest_BL1.clamp(min=torch.finfo(vectors_BLE.dtype).tiny)


def _mean(distance_B: Tensor, batch: Batch) -> Tensor:
    """The mean over the examples that count: those with a label."""
    counts_B = batch["label_B"] != -100 if "label_B" in batch else torch.ones_like(distance_B, dtype=torch.bool)
    return (distance_B * counts_B).sum() / counts_B.sum().clamp(min=1)


@contextmanager
def _outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While open, a forward pass leaves the token embeddings and the logits."""
    seen: dict[str, Tensor] = {}
    handles = [
        embeddings(model).register_forward_hook(lambda _, __, out: seen.update(embedded=out)),
        model.register_forward_hook(lambda _, __, out: seen.update(logits=out.logits)),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _shifted(model: nn.Module, batch: Batch, delta_BLE: Tensor) -> Tensor:
    """`logits_BC` of the batch with `delta_BLE` on its token embeddings."""
    handle = embeddings(model).register_forward_hook(lambda _, __, out: out + delta_BLE.to(out.dtype))
    try:
        return classified(model, batch).float()
    finally:
        handle.remove()
