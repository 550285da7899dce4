"""BiPFT: an encoder whose matrices, and what they multiply, have one bit, with estimators of what attention loses.

Shape letters: B rows, L positions, E width, H heads, D width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pretrain.core.checkpoint import record
from pretrain.core.models.families import at, base, blocks, embeddings, family, model_inputs, set_module
from pretrain.core.models.features import evaluating
from pretrain.core.models.layers import Attention, like
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._calibration import plain_linears
from pretrain.surgery._random import generator

LEAST = 1e-5  # of a scale
ROWS, LENGTH = 4, 64  # of random tokens, where there is no text to begin the scales with
SIGNED, POSITIVE = 2.0, 4.0  # times the mean size of what is binarised: where a scale begins


def binarised(x: Tensor, scale_1: Tensor, *, signed: bool = True) -> Tensor:
    """α sign(x), or α [x > α/2] of what is not negative, α being the scale, LEAST at least.

    Gradients are those of learned step sizes (arXiv:1902.08153): of x straight through where |x| ≤ α (0 ≤ x ≤ α), of α
    those of the rounded value, over the root of how many values there are.
    """
    step_1 = scale_1.detach().clamp_min(LEAST).to(x.dtype)
    if signed:
        inside, level = x.clamp(-step_1, step_1), x.detach().sign()
        slope = level
    else:
        inside, ratio = x.clamp(torch.zeros_like(step_1), step_1), x.detach() / step_1
        level = ratio.round().clamp(0, 1)
        slope = torch.where((ratio >= 0) & (ratio <= 1), level - ratio, level)
    # Two terms that are nothing, for the gradients of x and of the scale.
    share_1 = (scale_1 - scale_1.detach()).to(x.dtype) / x.numel() ** 0.5
    return step_1 * level + (inside - inside.detach()) + share_1 * slope


def signs(weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    """sign(w - mean of w) times the mean of |w| over `dims`; the gradient goes straight through (arXiv:1603.05279)."""
    made = (weight - weight.mean()).sign() * weight.abs().mean(dims, keepdim=True)
    return weight + (made - weight).detach()


class Scale(nn.Module):
    """α, trained; `measuring` it begins at the mean size of what it is given, times `SIGNED` or `POSITIVE`."""

    def __init__(self, weight: Tensor, *, signed: bool = True) -> None:
        super().__init__()
        self.signed, self.measuring = signed, False
        self.scale = nn.Parameter(torch.ones(1, **like(weight)))

    def forward(self, x: Tensor) -> Tensor:
        """`x` with one bit a number."""
        if self.measuring:
            with torch.no_grad():
                size = (SIGNED if self.signed else POSITIVE) * x.float().abs().mean()
                self.scale.copy_(torch.where(size > 0, size, 1.0))  # a scale of nothing would learn nothing
        return binarised(x, self.scale, signed=self.signed)


class BinaryLinear(nn.Module):
    """A linear layer of one bit a weight and a number that it multiplies; takes the place of `layer`."""

    linear_like = True

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.out_features, self.in_features = layer.weight.shape
        self.move = nn.Parameter(torch.zeros(self.in_features, **like(layer.weight)))
        self.binarise = Scale(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """sign(x + move) · sign(W), times both scales, + bias."""
        return F.linear(self.binarise(x + self.move), signs(self.weight, (0, 1)), self.bias)

    def extra_repr(self) -> str:
        """What `print` says."""
        return f"{self.in_features}, {self.out_features}"


class BinaryEmbedding(nn.Embedding):
    """Token embeddings of one bit a number, and a scale for each token."""

    @staticmethod
    def of(layer: nn.Embedding) -> BinaryEmbedding:
        """In the place of `layer`, whose weight it keeps: a head that is tied to it goes on using that."""
        made = BinaryEmbedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
        made.weight = layer.weight
        return made

    def forward(self, input: Tensor) -> Tensor:
        """The tokens' rows of sign(W - mean of W), each times the mean size of its row."""
        return F.embedding(input, signs(self.weight, (1,)), self.padding_idx)


class BinaryAttention(nn.Module):
    """BERT's attention between binarised queries, keys, values and probabilities; takes the place of `layer`."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    dropout: nn.Module

    def __init__(self, layer: Attention, estimators: bool) -> None:
        super().__init__()
        for name, module in layer.named_children():
            self.add_module(name, module)
        config, weight = layer.config, self.query.get_parameter("weight")
        self.heads, width = int(config.num_attention_heads), int(config.hidden_size)
        self.of_query, self.of_key, self.of_value = (Scale(weight) for _ in range(3))
        self.of_probability = Scale(weight, signed=False)
        names = ("q_p", "k_p", "q_m", "k_m", "v_p") if estimators else ()
        self.estimators = nn.ModuleDict({name: nn.Linear(width, 1, **like(weight)) for name in names})

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> tuple[Tensor, Tensor]:
        """`y_BLE` and `p_BHLL`; `attention_mask` is added to the scores."""
        split = (*hidden_states.shape[:2], self.heads, -1)
        q_BHLD, k_BHLD, v_BHLD = (
            binarise(project(hidden_states).view(split).transpose(1, 2))
            for binarise, project in (
                (self.of_query, self.query), (self.of_key, self.key), (self.of_value, self.value),
            )
        )  # fmt: skip
        score_BHLL = q_BHLD @ k_BHLD.transpose(-1, -2)
        estimates = {name: layer(hidden_states) for name, layer in self.estimators.items()}
        if estimates:
            q_p, k_p, q_m, k_m = (estimates[name] for name in ("q_p", "k_p", "q_m", "k_m"))
            residual_BLL = q_p @ (k_p + k_m).transpose(-1, -2) + q_m @ k_p.transpose(-1, -2)
            score_BHLL = score_BHLL + residual_BLL[:, None]
        score_BHLL = score_BHLL / q_BHLD.shape[-1] ** 0.5
        if attention_mask is not None:
            score_BHLL = score_BHLL + attention_mask
        p_BHLL = self.of_probability(self.dropout(score_BHLL.softmax(-1)))
        if estimates:
            v_BHLD = v_BHLD + estimates["v_p"][:, None]
        return (p_BHLL @ v_BHLD).transpose(1, 2).flatten(2), p_BHLL


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """While open, each scale begins at what passes it."""
    scales = [module for module in model.modules() if isinstance(module, Scale)]
    for scale in scales:
        scale.measuring = True
    try:
        yield
    finally:
        for scale in scales:
            scale.measuring = False


@dataclass(frozen=True)
class BiPFT(Surgery):
    """BiPFT: Binary Pre-trained Foundation Transformer with Low-rank Estimation of Binarization Residual Polynomials
    (arXiv:2312.08937).

    Each linear layer of the blocks multiplies α sign(x + b) by mean |W| · sign(W - mean W), the token embeddings are
    signs with a scale for each token, and attention binarises its queries, keys, values and probabilities; b and all α
    are trained, the weights straight through their signs. What binarising loses of Q Kᵀ and P V, polynomials of the
    residuals, `estimators` learn: (q_p + q_m) k_pᵀ + q_p k_mᵀ on the scores of all heads and v_p on the values, each
    a projection of the states to one number. Train the model further on its text after it, with `masked_lm` or from a
    teacher (`distillation` with `features: 1`, the paper's), and only then on a task.

    As in the authors' code: LayerNorms, positions, biases and the head keep all their bits, a scale begins at twice the
    mean size of what it binarises first (a probability's at four times), which are the stage's text or random tokens.
    Products are computed in floating point here: the paper's 56 times fewer operations need kernels for bits.
    """

    families: ClassVar[tuple[str, ...]] = ("bert",)

    estimators: bool = True

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with other layers, changed in place; what they compute is another thing until it is trained."""
        model, source = self.restore(model), generator(self.name, inputs)
        for module in model.modules():
            if isinstance(module, BinaryAttention):
                for layer in module.estimators.values():
                    assert isinstance(layer, nn.Linear), "each is one"
                    drawn = torch.randn(layer.weight.shape, generator=source) * model.config.initializer_range
                    layer.weight.copy_(drawn)
                    layer.bias.zero_()
        with _measuring(model), evaluating(model):
            if inputs is not None and inputs.batches:
                batch = inputs.batches[0]
            else:
                length = min(LENGTH, int(model.config.max_position_embeddings))
                entries = embeddings(model).num_embeddings
                batch = {"input_ids": torch.randint(entries, (ROWS, length), generator=source)}
            base(model)(**model_inputs(model, batch))
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Replace the layers; scales and estimators are as they come."""
        for path, layer in plain_linears(model, self.name, self.families).items():
            assert isinstance(layer, nn.Linear), "BERT has no other"
            set_module(model, path, BinaryLinear(layer).train(model.training))
        entry = family(model)
        for block in blocks(model):
            place = f"{entry.attention}.self"
            set_module(block, place, BinaryAttention(at(block, place), self.estimators).train(model.training))
        model.set_input_embeddings(BinaryEmbedding.of(embeddings(model)).train(model.training))
        model.set_attn_implementation("eager")  # which hands layers a mask to add
        return model
