"""Outliers of activations moved into weights, before both are quantised.

Shape letters: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.bounds import Share
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._calibration import weight_of
from pretrain.surgery.compression._smoothing import fold, places, stack_of

LEAST = 1e-5  # of weights and of scales


@dataclass(frozen=True)
class SmoothQuant(Surgery):
    """SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models (arXiv:2211.10438).

    For the layers behind each norm of a block, of an input j on the stage's text: s_j = max|X_j|^α / max|W_j|^(1-α),
    α `alpha`, the weights' maximum over all of these layers. The norm is divided by s and the layers' weights are
    multiplied by it: the model computes the same, and its activations are easier to quantise. A surgery after it does
    that: the paper's is `w8a8` with `format: int8`. The model stays plain.
    """

    needs_text = True
    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "modernbert")
    calibration: ClassVar[float] = 3.0  # the whole model, then each block twice

    alpha: Share = 0.5

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model, smoothed."""
        training, stack = model.training, stack_of(self, model, inputs)
        for number, block in enumerate(stack.blocks):
            behind = [place for place in places(model, block) if place.norm]
            firsts = stack.layers(number, [place.layers[0] for place in behind])
            sizes: dict[str, Tensor] = {}
            for seen in stack.seen(number, firsts):
                for name, (x_NI, _) in seen.items():
                    size_I = x_NI.abs().amax(0).float()
                    sizes[name] = torch.maximum(sizes.get(name, size_I), size_I)
            for place in behind:
                layers = stack.layers(number, place.layers).values()
                weight_I = torch.stack([weight_of(layer).abs().amax(0) for layer in layers]).amax(0).clamp(min=LEAST)
                scale_I = sizes[place.layers[0]] ** self.alpha / weight_I ** (1 - self.alpha)
                fold(block, place, scale_I.clamp(min=LEAST))
            stack.advance(number)
        return model.train(training)
