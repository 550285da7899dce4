"""Bottlenecks of vector quantisation after the heads of attention and the feed-forwards of a trained model.

Shape letters: N tokens, H codebooks side by side, D width of each, K codes, E width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pretrain.core.bounds import Count, Whole
from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.models.discrete.codebooks import Codebooks, modules_of
from pretrain.core.models.families import at, blocks, family, set_module
from pretrain.core.models.layers import Linear, like, sides
from pretrain.surgery import Inputs, Surgery, report
from pretrain.surgery._calibration import Blocks, batches_of, wide_type
from pretrain.surgery._random import generator

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

PARTS = ("attention", "feed_forward")


class CodedInput(nn.Module):
    """Attention's output projection, which is given codes in the place of what the heads have made."""

    @property
    def estimated(self) -> bool:
        """How long its k-means goes on is not known beforehand."""
        return False

    def __init__(self, linear: Linear, codebooks: Codebooks) -> None:
        super().__init__()
        self.linear, self.codebooks = linear, codebooks

    def forward(self, x_BLE: Tensor) -> Tensor:
        """The projection of the codes."""
        out: Tensor = self.linear(self.codebooks(x_BLE))
        return out


class _Coded(nn.Module):
    """What a feed-forward becomes; its own modules keep their names."""

    codebooks: Codebooks

    def forward(self, *args: object, **more: object) -> Tensor:
        """The codes of its output."""
        before: Callable[..., Tensor] = super().forward
        return self.codebooks(before(*args, **more))


@functools.cache
def _coded(kind: type) -> type[_Coded]:
    """A feed-forward's class with another `forward`."""
    return cast("type[_Coded]", type(f"Coded{kind.__name__}", (_Coded, kind), {}))


@dataclass(frozen=True)
class CodebookFeatures(Surgery):
    """Codebook Features: Sparse and Discrete Interpretability for Neural Networks (arXiv:2310.17230).

    After each head of attention, before the output projection, and after each feed-forward stands a codebook: the
    activation's layer norm gives way to the mean of the `k` of its `codes` codes that have the greatest cosine with it.
    Hidden states are then a few discrete codes, which `code_activations` lists with what they fire on, and which
    `code_steering` sets while text is generated. Train the model afterwards with the objective `codebook_lm`: as it
    stands it has lost most of what it knew.

    Codes begin at the centres of k-means, by mini-batches of `batch_size` tokens, of what stands at their place on the
    rows of calibration; or standard normal, as in the authors' code where k-means is switched off (its default).
    `heads` off: one codebook for the whole of attention. `k` and `codes` are the defaults of the authors' code, which
    divides the sum of the codes by `k` and compares after a layer norm whose scale and shift are trained.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")

    codes: Count = 10000
    k: Count = 8
    places: Literal["both", "attention", "feed_forward"] = "both"
    heads: bool = True
    layers: tuple[Whole, ...] = ()  # none named: all
    initialisation: Literal["kmeans", "normal"] = "kmeans"
    batch_size: Count = 24576

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k > self.codes:
            raise PretrainError(f"codebook_features: k {self.k}: accepted: at most {self.codes}, the codes")

    @property
    def needs_text(self) -> bool:
        """For the means."""
        return self.initialisation == "kmeans"

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with codebooks, changed in place; `code_error` is ‖y - n‖² / ‖n‖² where k-means began."""
        self._check(model)
        source = generator(self.name, inputs)
        rows = self._rows(model, inputs) if self.needs_text else {}
        self.restore(model)
        if not self.needs_text:
            with torch.no_grad():
                for module in modules_of(model):
                    module.codes.copy_(torch.empty(module.codes.shape).normal_(generator=source))
        errors = [
            self._fit(module, x_NE, source)
            for number, block in enumerate(blocks(model))
            for module in modules_of(block)
            for x_NE in rows.pop((number, module.part), ())
        ]
        if errors:
            report(inputs, code_error=sum(errors) / len(errors))
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put in the codebooks, all zero."""
        self._check(model)
        entry, count = family(model), model.config.num_attention_heads
        for _, block in self._chosen(model):
            attention, ffn = at(block, entry.attention), at(block, entry.feed_forward)
            linear, alike = at(attention, entry.output), like(at(ffn, entry.down).weight)
            outputs, inputs = sides(linear)
            for part in self._parts():
                heads = count if part == "attention" and self.heads else 1
                width = (inputs if part == "attention" else outputs) // heads
                made = Codebooks(part, heads, self.codes, width, self.k, alike).train(model.training)
                if part == "attention":
                    set_module(attention, entry.output, CodedInput(linear, made).train(model.training))
                else:
                    kind: type = type(ffn)
                    ffn.__class__ = _coded(kind)
                    ffn.codebooks = made
        return model

    def _parts(self) -> tuple[str, ...]:
        return PARTS if self.places == "both" else (self.places,)

    def _chosen(self, model: nn.Module) -> list[tuple[int, nn.Module]]:
        """The blocks that get codebooks, with their numbers."""
        return [(n, block) for n, block in enumerate(blocks(model)) if n in self.layers or not self.layers]

    def _check(self, model: PreTrainedModel) -> None:
        entry = family(model)
        if entry.name not in self.families:
            raise PretrainError(f"codebook_features: family {entry.name!r}: accepted: {', '.join(self.families)}")
        if modules_of(model):
            raise PretrainError("codebook_features: this model has codebooks already; accepted: one codebook_features")
        depth = len(blocks(model))
        if not all(number < depth for number in self.layers):
            raise PretrainError(f"codebook_features: layers {list(self.layers)}: accepted: 0 to {depth - 1}")
        for _, block in self._chosen(model):
            for path in (f"{entry.attention}.{entry.output}", f"{entry.feed_forward}.{entry.down}"):
                if not isinstance(at(block, path), nn.Linear | Conv1D):
                    kind = type(at(block, path)).__name__
                    raise PretrainError(f"codebook_features: {path} is a {kind}: accepted: a plain linear layer")

    def _rows(self, model: PreTrainedModel, inputs: Inputs | None) -> dict[tuple[int, str], list[Tensor]]:
        """By block and part what stands there on the rows of calibration, `x_NE`, before there are codebooks."""
        run, entry = Blocks(model, batches_of(inputs, self.name)), family(model)
        if run.tokens() < self.codes:
            raise PretrainError(
                f"codebook_features: codes {self.codes}: accepted: at most {run.tokens()}, the tokens of the text that "
                "it is shown; more `calibration_rows`, or the initialisation normal"
            )
        chosen, rows = {number for number, _ in self._chosen(model)}, dict[tuple[int, str], list[Tensor]]()
        for number, block in enumerate(run.blocks):
            if number in chosen:
                places = {"attention": f"{entry.attention}.{entry.output}", "feed_forward": entry.feed_forward}
                layers = {part: at(block, places[part]) for part in self._parts()}
                seen = list(run.seen(number, layers))
                for part in layers:
                    each = [batch[part][part == "feed_forward"] for batch in seen]  # what comes in, what goes out
                    rows[number, part] = [torch.cat(each).cpu()]
            run.advance(number)
        return rows

    @torch.no_grad()
    def _fit(self, module: Codebooks, x_NE: Tensor, source: torch.Generator) -> float:
        """Put the codes at the centres; returns how much of the activations' squares the nearest codes miss."""
        from sklearn.cluster import MiniBatchKMeans

        n_NHD = module.normed(x_NE.to(module.codes.device))
        n_NHD = n_NHD.to(wide_type(n_NHD))
        for head, codes_KD in enumerate(module.codes):
            seed = int(torch.randint(2**31, (), generator=source))
            means = MiniBatchKMeans(self.codes, batch_size=self.batch_size, n_init="auto", random_state=seed)
            means.fit(n_NHD[:, head].cpu().numpy())
            codes_KD.copy_(torch.from_numpy(means.cluster_centers_))
        y_NHD = module.mean(module.nearest(n_NHD))
        return float((y_NHD - n_NHD).square().sum() / n_NHD.square().sum())
