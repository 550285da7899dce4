"""Classifiers at intermediate depths, trained on text while the model itself stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from pretrain.core.batch import Batch
from pretrain.core.bounds import Count, Positive
from pretrain.core.checkpoint import record, surgery_of
from pretrain.core.errors import PretrainError
from pretrain.core.models.exits import HEADS, check_exits, exit_logits, states_of_text, thirds
from pretrain.core.models.families import at, base, blocks, embeddings, family
from pretrain.surgery import Inputs, Surgery, report
from pretrain.surgery._calibration import batches_of


@dataclass(frozen=True)
class ExitHeads(Surgery):
    """Dynamically Sacrificing Accuracy for Reduced Computation: Cascaded Inference Based on Softmax Confidence
    (arXiv:1805.10982).

    The paper trains the whole network first, and then its intermediate classifiers with all else frozen. After each of
    `exits` blocks (None: a third and two thirds of them) the classifier here is a linear map A x + b, at first the
    identity, before the model's own final norm and head: E² weights in the place of a head's E V. Adam lessens each
    exit's cross-entropy of the next token for `epochs` over the calibration rows. The model's logits do not change;
    the decoding method `softmax_cascade` uses the maps. `metrics`: each exit's loss on the rows, before and after.
    """

    needs_text = True

    exits: tuple[Count, ...] | None = None
    epochs: Count = 4
    lr: Positive = 1e-3

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")

    @property
    def estimated(self) -> bool:
        """It trains."""
        return False

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with trained `exit_heads`."""
        batches = batches_of(inputs, self.name)
        if any(entry["method"] == self.name for entry in surgery_of(model)):
            raise PretrainError("exit_heads: the model has exit heads already; accepted: a model without")
        model = self.restore(model)
        maps: nn.ModuleDict = getattr(model, HEADS).float()
        depths = tuple(map(int, maps))
        weights, norm, dtype = list(model.parameters()), _norm(model), embeddings(model).weight.dtype
        trained = [weight.requires_grad for weight in weights]
        training = model.training
        try:
            model.eval().requires_grad_(False)
            before = self._losses(model, norm, batches, depths)
            maps.requires_grad_(True)
            optimizer = torch.optim.Adam(maps.parameters(), self.lr)
            for _ in range(self.epochs):
                for states, next_N in states_of_text(model, batches, depths):
                    losses = [
                        cross_entropy(self._logits(model, norm, states_NE, depth).float(), next_N, reduction="sum")
                        for depth, states_NE in zip(depths, states, strict=True)
                    ]
                    optimizer.zero_grad()
                    (torch.stack(losses).sum() / max(1, len(next_N))).backward()
                    optimizer.step()
            after = self._losses(model, norm, batches, depths)
        finally:
            for weight, requires_grad in zip(weights, trained, strict=True):
                weight.requires_grad_(requires_grad)
            model.train(training)
        maps.zero_grad(set_to_none=True)
        maps.to(dtype)
        for depth, old, new in zip(depths, before, after, strict=True):
            report(inputs, **{f"exit_{depth}_loss_before": old, f"exit_{depth}_loss": new})
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put the maps in, as identities."""
        name = family(model).name
        if name not in self.families or not hasattr(model, "lm_head"):
            raise PretrainError(
                f"exit_heads: {type(model).__name__}: accepted: a causal language model of {', '.join(self.families)}"
            )
        layers, like = len(blocks(model)), embeddings(model).weight
        exits = self.exits or thirds(layers)
        check_exits(self.name, exits, layers)
        maps = nn.ModuleDict()
        for depth in exits:
            linear = maps[str(depth)] = nn.Linear(like.shape[1], like.shape[1], dtype=like.dtype, device=like.device)
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        setattr(model, HEADS, maps)
        return model

    def _logits(self, model: PreTrainedModel, norm: nn.Module, states: Tensor, depth: int) -> Tensor:
        maps = {str(depth): lambda x: getattr(model, HEADS)[str(depth)](x.float()).to(x.dtype)}
        return exit_logits(norm, model.lm_head, maps, states, depth)

    @torch.no_grad()
    def _losses(
        self, model: PreTrainedModel, norm: nn.Module, batches: Sequence[Batch], depths: tuple[int, ...]
    ) -> list[float]:
        """Each exit's mean cross-entropy."""
        total, count = [0.0] * len(depths), 0
        for states, next_N in states_of_text(model, batches, depths):
            for number, (depth, states_NE) in enumerate(zip(depths, states, strict=True)):
                logits_NV = self._logits(model, norm, states_NE, depth)
                total[number] += float(cross_entropy(logits_NV.float(), next_N, reduction="sum"))
            count += len(next_N)
        return [loss / max(1, count) for loss in total]


def _norm(model: PreTrainedModel) -> nn.Module:
    return at(base(model), family(model).final_norm or "")
