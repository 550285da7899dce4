"""Queries and keys of a length of their own, whatever the weights that make them.

Shape letters: B rows, L positions, N heads, D width of a head, K parts with a gain of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pretrain.core.bounds import Positive
from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import at, blocks, family, set_module
from pretrain.core.models.layers import Attention, Linear, like, sides
from pretrain.surgery import Inputs, Surgery


class NormedProjection(nn.Module):
    """A projection whose first `normed` outputs, head by head, are brought to rms 1 and scaled.

    Scales are the number `start`, or trained vectors of `gains` parts: 2 for queries and keys that one matrix makes.
    """

    def __init__(self, linear: Linear, normed: int, head: int, gains: int, eps: float, start: float) -> None:
        super().__init__()
        self.linear, self.normed, self.head, self.eps, self.start = linear, normed, head, eps, start
        alike = like(linear.weight)
        self.gain = nn.Parameter(torch.full((gains * head,), start, **alike)) if gains else None

    def forward(self, x: Tensor) -> Tensor:
        """The projection's outputs, in its own type; the norm is taken in float32 or wider."""
        out: Tensor = self.linear(x)
        first, rest = out[..., : self.normed], out[..., self.normed :]
        heads_BLND = first.unflatten(-1, (-1, self.head))
        wide_BLND = heads_BLND.to(torch.promote_types(out.dtype, torch.float32))
        inverse_BLN1 = wide_BLND.square().mean(-1, keepdim=True).add(self.eps).rsqrt()
        scale: Tensor | float = self.start
        if self.gain is not None:
            gain_KD = self.gain.view(-1, self.head)
            scale = gain_KD.repeat_interleave(heads_BLND.shape[-2] // len(gain_KD), 0)
        normed = (wide_BLND * inverse_BLN1 * scale).to(out.dtype).flatten(-2)
        return normed if not rest.shape[-1] else torch.cat([normed, rest], -1)

    def extra_repr(self) -> str:
        """What `print` says."""
        return f"normed={self.normed}, head={self.head}"


@dataclass(frozen=True)
class QKNorm(Surgery):
    """Scaling Vision Transformers to 22 Billion Parameters (arXiv:2302.05442).

    Queries and keys are normalised head by head, q ← g ⊙ q / rms(q), before positions turn them, so that attention's
    scores stay within g² √D however the weights grow. The paper takes LayerNorms with a trained gain; here, as in the
    speed-run records, it is an RMSNorm, and g one number that is not trained (a rotation changes no rms, so that before
    and after rotary positions are the same), or with `gain` a trained vector of each layer's queries and of its keys.
    Both begin at `start`. The records have 1.2 with scores over √D, which makes attention sharper.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert", "modernbert")

    gain: bool = False
    start: Positive = 1.2
    eps: Positive = 1e-6

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with other projections to queries and keys, changed in place."""
        model = self.restore(model)
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put in the norms; gains are at their start."""
        entry = family(model)
        if entry.name not in self.families:
            raise PretrainError(f"{self.name}: family {entry.name!r}: accepted: {', '.join(self.families)}")
        for block in blocks(model):
            attention = at(block, entry.attention)
            head = _head_width(attention, model)
            fused = len(entry.queries) == 1
            for path in entry.queries[:1] if fused else entry.queries[:2]:
                layer = at(attention, path)
                if not isinstance(layer, nn.Linear | Conv1D):
                    raise PretrainError(f"{self.name}: {path} is a {type(layer).__name__}: accepted: a linear layer")
                outputs, _ = sides(layer)
                normed = outputs * 2 // 3 if fused else outputs
                gains = (2 if fused else 1) if self.gain else 0
                made = NormedProjection(layer, normed, head, gains, self.eps, self.start)
                set_module(attention, path, made.train(model.training))
        return model


def _head_width(attention: Attention, model: PreTrainedModel) -> int:
    config = model.config
    width = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)
