"""Blocks that begin as the identity: what they add to the residual stream starts at zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from pretrain.core.bounds import NonNegative
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import at, blocks, embeddings, family
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._random import generator


@dataclass(frozen=True)
class ZeroInit(Surgery):
    """Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer (arXiv:2203.03466).

    What writes to the residual stream, the last matrices of attention and feed-forward, starts at zero (the paper's
    appendix D.2 has it for the output layer and the queries, the speed-run records for these), so that each block is
    the identity at first and the depth of a new model costs no signal. With `untie` the output layer gets a matrix of
    its own, normal with the standard deviation `head`: the first prediction is that all tokens are as likely. For a
    model about to be trained; a plain model of `transformers`.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")

    untie: bool = False
    head: NonNegative = 0.001

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model with other numbers, and with `untie` another output layer."""
        entry = family(model)
        if entry.name not in self.families:
            raise PretrainError(f"{self.name}: family {entry.name!r}: accepted: {', '.join(self.families)}")
        for block in blocks(model):
            for part, name in ((entry.attention, entry.output), (entry.feed_forward, entry.down)):
                layer = at(at(block, part), name)
                if not isinstance(getattr(layer, "weight", None), torch.nn.Parameter):
                    raise PretrainError(f"{self.name}: {name} is a {type(layer).__name__}: accepted: a linear layer")
                layer.weight.zero_()
                if layer.bias is not None:
                    layer.bias.zero_()
        if self.untie:
            self._untie(model, generator(self.name, inputs))
        return model

    def _untie(self, model: PreTrainedModel, source: torch.Generator) -> None:
        """Give the output layer numbers of its own."""
        output, table = model.get_output_embeddings(), embeddings(model)
        if output is None:
            raise PretrainError(f"{self.name}: untie of {type(model).__name__}: accepted: a causal language model")
        drawn_VE = torch.empty(output.weight.shape).normal_(0, self.head, generator=source)
        output.weight = torch.nn.Parameter(drawn_VE.to(table.weight))
        model.config.tie_word_embeddings = False
