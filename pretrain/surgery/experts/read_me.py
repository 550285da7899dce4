"""A dense model's feed-forwards cut into experts, and one router beside the blocks that chooses for all of them.

Shape letters: B rows, L positions, E width, F neurons of a feed-forward, G domains, X experts, M neurons of an expert,
N tokens, V vocabulary, D width of the router, H its heads, K width of such a head, J width of one of the model's heads.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pretrain.core.models.attention  # whose "sdpa" knows every mask that a block is given  # noqa: F401
from pretrain.core.batch import Batch, document_mask
from pretrain.core.bounds import Count, Positive, PositiveShare, Whole
from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import additive, at, base, blocks, embeddings, family, model_inputs
from pretrain.core.models.fast import rotary
from pretrain.core.models.layers import Like, like
from pretrain.surgery import Inputs, Surgery, report
from pretrain.surgery._calibration import batches_of, kept_tokens, watched
from pretrain.surgery._passing import Pass, Reader, inform
from pretrain.surgery._random import generator

EPS = 1e-6  # of the router's norms
ROUTER = "router"  # its name in the base model
Turns = tuple[Tensor, Tensor]  # cosines and sines `_BLJ` of rotary positions


class Given(NamedTuple):
    """What the router reads in a pass."""

    tokens_BL: Tensor
    turns: Turns
    mask: Tensor | BlockMask | None  # as the first block is given it


class RouterBlock(nn.Module):
    """u = x + attention(norm(x)), then u + W₂ silu(W₁ norm(u))."""

    num_key_value_groups: ClassVar[int] = 1  # what attention's function asks a module for
    is_causal: ClassVar[bool] = True

    def __init__(self, width: int, heads: int, scaling: float, place: int, alike: Like) -> None:
        super().__init__()
        self.heads, self.scaling, self.place = heads, scaling, place  # among the layers of a cache
        self.attention_norm = nn.RMSNorm(width, eps=EPS, **alike)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, **alike) for _ in range(4))
        self.feed_forward_norm = nn.RMSNorm(width, eps=EPS, **alike)
        self.up, self.down = (nn.Linear(width, width, **alike) for _ in range(2))

    def forward(self, x_BLD: Tensor, turns: Turns, mask: Tensor | BlockMask | None, cache: Cache | None) -> Tensor:
        """The states after the block, `x_BLD`; keys and values go into the cache."""
        normed_BLD = self.attention_norm(x_BLD)
        query_BHLK, key_BHLK, value_BHLK = (
            layer(normed_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        query_BHLK, key_BHLK = rotary(query_BHLK, key_BHLK, *turns)
        if cache is not None:
            key_BHLK, value_BHLK = cache.update(key_BHLK, value_BHLK, self.place)
        if isinstance(mask, Tensor) and mask.numel() and (mask.ndim, mask.shape[-1]) != (4, key_BHLK.shape[2]):
            raise PretrainError(
                f"read_me: a mask of shape {tuple(mask.shape)} over {key_BHLK.shape[2]} positions that the router has "
                "read; accepted: attention sdpa or eager, and a cache that keeps all positions"
            )
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out_BLHK, _ = attend(self, query_BHLK, key_BHLK, value_BHLK, mask, dropout=0.0, scaling=self.scaling)
        x_BLD = x_BLD + self.output(out_BLHK.flatten(-2))
        return x_BLD + self.down(F.silu(self.up(self.feed_forward_norm(x_BLD))))


class Router(nn.Module):
    """Which expert each token takes, from the tokens alone: a small causal transformer with a table of its own."""

    def __init__(self, method: ReadMe, vocabulary: int, depth: int, alike: Like) -> None:
        super().__init__()
        width, heads = method.embedding_dim, method.n_head
        self.head_width = width // heads
        self.embed = nn.Embedding(vocabulary, width, **alike)
        self.blocks = nn.ModuleList(
            RouterBlock(width, heads, 1 / method.normalizer, depth + number, alike) for number in range(method.n_layer)
        )
        self.norm = nn.RMSNorm(width, eps=EPS, **alike)
        self.out = nn.Linear(width, max(1, method.experts), **alike)
        self.last = depth + method.n_layer - 1
        self.choosing = True
        self.given: Given | None = None  # of the newest pass in which it did not choose

    def forward(self, given: Given, cache: Cache | None = None) -> Tensor:
        """`logit_BLX`."""
        cos_BLJ, sin_BLJ = given.turns
        turns = self._narrowed(cos_BLJ), self._narrowed(sin_BLJ)
        x_BLD = self.embed(given.tokens_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD, turns, given.mask, cache)
        return self.out(self.norm(x_BLD))

    def _narrowed(self, table_BLJ: Tensor) -> Tensor:
        """The rotary table of a narrower head: every J / K-th of the model's frequencies is one of its own."""
        wide = table_BLJ.shape[-1]
        half = table_BLJ[..., : wide // 2 : wide // self.head_width]
        return torch.cat([half, half], -1)

    def enter(self, _: nn.Module, __: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Before the first block: choose for all of them, or note what there was to choose from."""
        this_pass, cache = cast("Pass", kwargs["this_pass"]), cast("Cache | None", kwargs.get("past_key_values"))
        mask = cast("Tensor | BlockMask | None", kwargs.get("attention_mask"))
        given = Given(this_pass.tokens_BL, cast("Turns", kwargs["position_embeddings"]), mask)
        if not self.choosing:
            self.given = given
        elif this_pass.expert_BL is None:  # or the block is computed anew in the backward pass
            with torch.no_grad():
                make_room(cache, self.last)
                this_pass.expert_BL = self(given, cache).argmax(-1)


def make_room(cache: Cache | None, last: int) -> None:
    """Layers for the router's keys and values behind those of the blocks, of the first block's kind."""
    layers = getattr(cache, "layers", None)
    if cache is None or layers is None or len(layers) > last:
        return
    if layers and layers[0].is_initialized:
        raise PretrainError("read_me: a cache without what the router has read; accepted: one that this model made")
    if cache.layer_class_to_replicate is None:  # which would grow by itself
        layers.extend(copy.deepcopy(layers[0]) for _ in range(last + 1 - len(layers)))


class Mixture(Reader):
    """What a feed-forward becomes: a token takes the neurons of its expert alone; its matrices keep their names."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module
    members_XM: Tensor  # each expert's neurons, in order

    @property
    def neurons(self) -> int:
        """How many there are."""
        return int(at(self.down_proj, "weight").shape[1])

    def forward(self, x_BLE: Tensor) -> Tensor:
        """One row a token; all neurons where the router was not asked."""
        expert_BL = self.reads().expert_BL
        if expert_BL is None:
            return super().forward(x_BLE)
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if all(type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks) for layer in layers):
            return self._apart(x_BLE, expert_BL)
        # What adapts, replaces or watches a matrix is asked for all of it.
        hidden_BLF = self.act_fn(self.gate_proj(x_BLE)) * self.up_proj(x_BLE)
        return self.down_proj(hidden_BLF * inside(self.members_XM, hidden_BLF.shape[-1])[expert_BL])

    def _apart(self, x_BLE: Tensor, expert_BL: Tensor) -> Tensor:
        """Each expert for its own tokens."""
        x_NE, expert_N = x_BLE.flatten(0, -2), expert_BL.flatten()
        order_N = expert_N.argsort(stable=True)
        counts = expert_N.bincount(minlength=len(self.members_XM)).tolist()
        parts = [
            self._expert(x_NE[rows], members_M)
            for rows, members_M in zip(order_N.split(counts), self.members_XM, strict=True)
            if len(rows)
        ]
        return torch.cat(parts)[order_N.argsort()].unflatten(0, x_BLE.shape[:-1])

    def _expert(self, x_NE: Tensor, members_M: Tensor) -> Tensor:
        gate, up, down = (cast("nn.Linear", layer) for layer in (self.gate_proj, self.up_proj, self.down_proj))
        gate_NM, up_NM = (
            F.linear(x_NE, layer.weight[members_M], None if layer.bias is None else layer.bias[members_M])
            for layer in (gate, up)
        )
        return F.linear(self.act_fn(gate_NM) * up_NM, down.weight[:, members_M], down.bias)


def inside(members_XM: Tensor, neurons: int) -> Tensor:
    """`inside_XF`: which neurons an expert has."""
    shape = (len(members_XM), neurons)
    return torch.zeros(shape, dtype=torch.bool, device=members_XM.device).scatter_(1, members_XM, value=True)


@functools.cache
def _mixture(kind: type) -> type[Mixture]:
    """The class of a feed-forward of `kind` that has experts: of the same name, and one for all models."""
    return cast("type[Mixture]", type(kind.__name__, (Mixture, kind), {"__module__": kind.__module__}))


def mixtures(model: nn.Module) -> list[Mixture]:
    """The feed-forwards with experts, in the order of the blocks."""
    return [module for module in base(model).modules() if isinstance(module, Mixture)]


def router_of(model: nn.Module, name: str) -> Router:
    """The router; an error of the method `name` where there is none."""
    router = base(model)._modules.get(ROUTER)
    if not isinstance(router, Router):
        raise PretrainError(f"{name}: the model has no router: accepted: one that the surgery read_me made")
    return router


@contextmanager
def dense(model: nn.Module, name: str) -> Iterator[Router]:
    """While open, tokens take all neurons, and the router notes what it is `given` in place of choosing."""
    router = router_of(model, name)
    router.choosing = False
    try:
        yield router
    finally:
        router.choosing, router.given = True, None


@torch.no_grad()
def experts_of(model: PreTrainedModel, tokens_BL: Tensor, name: str = "read_me") -> Tensor:
    """`expert_BL` by the router alone, before any block; rows are one document each, padded at the end if at all."""
    router, length = router_of(model, name), tokens_BL.shape[1]
    table = router.embed.weight
    turns: Turns = at(base(model), "rotary_emb")(table[:1, None], torch.arange(length, device=table.device)[None])
    mask_11LL = document_mask(torch.ones(1, length, device=table.device), causal=True)
    return router(Given(tokens_BL.to(table.device), turns, additive(mask_11LL, table.dtype))).argmax(-1)


@dataclass(frozen=True)
class ReadMe(Surgery):
    """Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design (arXiv:2410.19123).

    A dense model becomes a mixture of experts without new weights in its blocks. Of each block's feed-forward W_down
    (silu(W_gate x) · W_up x), whose inner values are its neurons, an expert has the share `remain_rate` that have the
    largest mean |value| over the text of a domain: an expert for each domain of the stage's `corpus`, or with `experts`
    1 a single one of all text, which prunes the model. Experts overlap, and the weights of a neuron are those of all
    experts that have it. One router, apart from the blocks, reads the tokens and chooses an expert for each, the same
    in all blocks: a causal transformer of `n_layer` blocks and `embedding_dim`, its table the first columns of the
    model's own at first, its attention softmax(q k / `normalizer`) v in `n_head` heads. What a token's expert has not
    is not computed for it.

    The router is frozen, here and whenever the checkpoint is opened; the objective `read_me_router` trains it, and no
    other weight. The authors train in rounds: the router for 100 steps, the rest with `causal_lm` for 200, five times.
    Surgeries that change the vocabulary come before. Where an adapter, a calibration or another layer than `nn.Linear`
    stands in a feed-forward, all its neurons are computed, to the same end.

    Fields and defaults are those of the authors' code, from which this differs: there an expert has one neuron less,
    since that at the threshold is left out; in training a mask stands in for experts; and after it they become copies.
    """

    needs_text = True
    calibration: ClassVar[float] = 1.0
    families: ClassVar[tuple[str, ...]] = ("llama",)
    keeps_vocabulary: ClassVar[bool] = True

    remain_rate: PositiveShare = 0.5
    experts: Whole = 0  # as many as the text has domains
    embedding_dim: Count = 64
    n_layer: Count = 2
    n_head: Count = 2
    normalizer: Positive = 1.0

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with experts and a router that has learnt nothing, changed in place."""
        self._check(model)
        means = self._means(model, inputs)
        made = replace(self, experts=len(means[0]))
        made.restore(model)
        for ffn, mean_GF in zip(mixtures(model), means, strict=True):
            order_GF = mean_GF.argsort(dim=1, descending=True, stable=True)
            ffn.members_XM.copy_(order_GF[:, : ffn.members_XM.shape[1]].sort(1).values)
        _draw(router_of(model, self.name), model, generator(self.name, inputs))
        record(model, made)
        _report(model, inputs)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put in the router, not drawn, and experts of the first neurons."""
        self._check(model)
        every, entry, weight_VE = inform(model, self.name), family(model), embeddings(model).weight
        router = Router(self, len(weight_VE), len(every), like(weight_VE)).requires_grad_(False)
        base(model).add_module(ROUTER, router.train(model.training))
        every[0].register_forward_pre_hook(router.enter, with_kwargs=True)
        for block in every:
            ffn = at(block, entry.feed_forward)
            kind: type = type(ffn)
            ffn.__class__ = _mixture(kind)
            size = max(1, int(self.remain_rate * at(ffn, entry.down).weight.shape[1]))
            first_M = torch.arange(size, device=weight_VE.device)
            ffn.register_buffer("members_XM", first_M.repeat(max(1, self.experts), 1))
        return model

    def _check(self, model: PreTrainedModel) -> None:
        entry, width = family(model), self.embedding_dim
        if entry.name not in self.families:
            raise PretrainError(f"{self.name}: family {entry.name!r}: accepted: {', '.join(self.families)}")
        if ROUTER in base(model)._modules:
            raise PretrainError(f"{self.name}: this model has a router already; accepted: one read_me")
        for ffn in (at(block, entry.feed_forward) for block in blocks(model)):
            if any(not hasattr(getattr(ffn, name, None), "weight") for name in (*entry.up, entry.down)):
                raise PretrainError(
                    f"{self.name}: a feed-forward of {', '.join(name for name, _ in ffn.named_children())}: accepted: "
                    f"one of {', '.join((*entry.up, entry.down))}, with weights of their own"
                )
        wide, head = embeddings(model).weight.shape[1], int(at(blocks(model)[0], entry.attention).head_dim)
        if width > wide:
            raise PretrainError(f"{self.name}: embedding_dim {width}: accepted: at most {wide}, the model's width")
        if width % (2 * self.n_head) or head % (width // self.n_head):
            raise PretrainError(
                f"{self.name}: embedding_dim {width} in n_head {self.n_head}: accepted: heads of an even width that "
                f"divides {head}, that of the model's heads"
            )

    def _means(self, model: PreTrainedModel, inputs: Inputs | None) -> list[Tensor]:
        """Of each block `mean_GF`, the neurons' mean |value| over the tokens of each domain, padding left out."""
        batches, entry, training = batches_of(inputs, self.name), family(model), model.training
        domains = self._domains(batches, inputs.domains if inputs else ())
        layers = {str(number): at(block, entry.feed_forward).down_proj for number, block in enumerate(blocks(model))}
        sums = {number: torch.zeros(domains, at(layer, "weight").shape[1]).double() for number, layer in layers.items()}
        tokens_G = torch.zeros(domains, dtype=torch.float64)
        noted: dict[str, tuple[Tensor, Tensor]] = {}
        for batch in batches:
            kept_BL = kept_tokens(batch).view(batch["input_ids"].shape)
            domain_B = _domain(batch) if domains > 1 else torch.zeros(len(kept_BL), dtype=torch.long)
            tokens_G.index_add_(0, domain_B, kept_BL.sum(1).double().cpu())
            with watched(layers, noted):
                base(model.eval())(**model_inputs(model, batch))
            for number, (value_BLF, _) in noted.items():
                value_BLF = value_BLF.float().abs() * kept_BL.to(value_BLF.device)[..., None]
                sums[number].index_add_(0, domain_B, value_BLF.sum(1).double().cpu())
        model.train(training)
        if not tokens_G.all():
            missing = int(tokens_G.argmin())
            name = repr(inputs.domains[missing]) if inputs and inputs.domains else f"number {missing}"
            raise PretrainError(
                f"{self.name}: the text has no row of domain {name}: accepted: more calibration_rows, or a corpus "
                "without it"
            )
        return [sum_GF / tokens_G[:, None] for sum_GF in sums.values()]

    def _domains(self, batches: Sequence[Batch], names: Sequence[str]) -> int:
        """How many experts the text makes."""
        count = len(names) or 1 + max(int(_domain(batch).max()) for batch in batches)
        if self.experts not in (0, 1, count):
            raise PretrainError(
                f"{self.name}: experts {self.experts} of a text of {count} domains: accepted: 0 for as many, or 1"
            )
        return self.experts or count


def _domain(batch: Batch) -> Tensor:
    """`domain_B`; text that says nothing of it is of one domain."""
    return batch.get("domain_B", torch.zeros(len(batch["input_ids"]), dtype=torch.long)).cpu()


def _draw(router: Router, model: PreTrainedModel, source: torch.Generator) -> None:
    """The table from the model's, matrices uniform as Kaiming's, biases as `nn.Linear` draws them."""
    table_VD = router.embed.weight
    table_VD.copy_(embeddings(model).weight[:, : table_VD.shape[1]])
    for layer in router.modules():
        if isinstance(layer, nn.Linear):
            inputs = layer.in_features
            for tensor, bound in ((layer.weight, math.sqrt(6 / inputs)), (layer.bias, math.sqrt(1 / inputs))):
                tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=source))


def _report(model: PreTrainedModel, inputs: Inputs | None) -> None:
    """How many experts there are, and which shares of the neurons each, all and any of them have."""
    every = [inside(ffn.members_XM, ffn.neurons).float() for ffn in mixtures(model)]
    shares = {
        "expert": torch.stack([inside_XF.mean() for inside_XF in every]),
        "all": torch.stack([inside_XF.amin(0).mean() for inside_XF in every]),
        "any": torch.stack([inside_XF.amax(0).mean() for inside_XF in every]),
    }
    metrics = {f"read_me/neurons_of_{name}": float(share.mean()) for name, share in shares.items()}
    report(inputs, **{"read_me/experts": float(len(every[0]))}, **metrics)
