"""A coprocessor reads a frozen model's cache and adds latent embeddings to it; trained at many places of a row at once.

Shape letters: B rows, L positions, M traces of a row (one place of insertion each), N latents of a trace, A tokens
ahead, S slots of all traces, E width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from pretrain.core.batch import Batch, Context, Row, rows_to_tensors
from pretrain.core.bounds import Count, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.generation.cache import layers_of
from pretrain.core.models.attention import attend
from pretrain.core.models.cross_entropy import IGNORE, linear_cross_entropy
from pretrain.core.models.families import additive, at, base, embeddings, family, head
from pretrain.core.models.fast import accelerate
from pretrain.objectives import Loss, Objective
from pretrain.objectives.language.causal_lm import next_tokens

LATENTS = "cache_augmentation_latents"  # in the coprocessor's configuration: how many it emits
Pairs = list[tuple[Tensor, Tensor]]  # each layer's keys and values


@dataclass(frozen=True)
class CacheAugmentation(Objective):
    """Deliberation in Latent Space via Differentiable Cache Augmentation (arXiv:2412.17747).

    The model is frozen. A coprocessor, a trained copy of it, reads the model's cache of a prefix x_1 … x_p and after it
    `latents` learnt soft tokens; its last states there are latent embeddings z. The model reads them after the prefix,
    as embeddings of positions p + 1 …, and the loss is the mean of -log p(x_{p+a} | x_≤p, z, x_{p+1} … x_{p+a-1}),
    a = 1 … `ahead`, over `traces` random places p of each row, all in one pass by an attention mask: a trace sees its
    document up to p, and itself. Targets end with the document. Parts: `ahead_1`, `ahead_2`, `ahead_4` …, the loss of
    the token that many places on.

    The stage writes the coprocessor's checkpoint in its folder `coprocessor`; its table of embeddings are the soft
    tokens. Decode with `latent_deliberation`. With 0 latents `loss` is the model's own on these targets, to compare
    with; that trains nothing.
    """

    own_evaluation: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")

    latents: Whole = 32
    ahead: Count = 16
    traces: Count = 128

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """The row's tensors, `place_BM`, where each prefix ends, and `target_BMA`, the tokens ahead of it or -100."""
        batch = rows_to_tensors(rows, context.length, context.vocabulary.pad)
        follows_BL = next_tokens(batch["tokens_BL"], batch["document_BL"]).numpy() != IGNORE
        place_BM = np.zeros((len(rows), self.traces), dtype=np.int64)
        real_BM = np.zeros((len(rows), self.traces), dtype=bool)
        for row, follows_L in enumerate(follows_BL):
            able = np.flatnonzero(follows_L)
            chosen = np.sort(context.rng.permutation(able)[: self.traces])
            place_BM[row, : len(chosen)], real_BM[row, : len(chosen)] = chosen, True
        batch["place_BM"] = torch.from_numpy(place_BM)
        at_BMA = batch["place_BM"][..., None] + torch.arange(1, self.ahead + 1)
        inside_BMA = torch.from_numpy(real_BM)[..., None] & (at_BMA < context.length)
        at_BMA = at_BMA.clamp(max=context.length - 1)
        same_BMA = _at(batch["document_BL"], at_BMA) == _at(batch["document_BL"], batch["place_BM"])[..., None]
        batch["target_BMA"] = torch.where(inside_BMA & same_BMA, _at(batch["tokens_BL"], at_BMA), IGNORE)
        number_A = (batch["target_BMA"] != IGNORE).sum((0, 1))
        batch |= {"weight": number_A.sum()} | {f"weight_ahead_{a}": number_A[a - 1] for a in self._shown()}
        return batch

    def modules(self, model: nn.Module) -> nn.Module:
        """The coprocessor, a copy of the model with the soft tokens as its vocabulary; the model is frozen."""
        if self.latents == 0:
            raise PretrainError("cache_augmentation: latents 0: nothing to train: accepted: 1 or more")
        _check(model)
        assert isinstance(model, PreTrainedModel), f"{type(model).__name__} is no model of transformers"
        coprocessor = copy.deepcopy(model)
        model.requires_grad_(False)
        std = float(embeddings(model).weight.detach().float().std())
        config = coprocessor.config
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
        config.tie_word_embeddings = True  # the head is never asked: no weights for it
        coprocessor.generation_config = type(coprocessor.generation_config)()
        coprocessor.resize_token_embeddings(self.latents, mean_resizing=False)
        table = embeddings(coprocessor)
        table.padding_idx = None
        with torch.no_grad():
            table.weight.normal_(0, std)
        coprocessor.tie_weights()
        setattr(config, LATENTS, self.latents)
        accelerate(coprocessor)
        return coprocessor.requires_grad_(True)

    def export(self, modules: nn.Module | None) -> dict[str, PreTrainedModel]:
        """The coprocessor."""
        assert isinstance(modules, PreTrainedModel), "cache_augmentation trains a coprocessor: see `modules`"
        return {"coprocessor": modules}

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean loss over all traces' targets."""
        states_BMAE, target_BMA = self.states(model, batch, modules), batch["target_BMA"]
        weight_VE, bias_V = head(model)
        value, nll_BS = linear_cross_entropy(states_BMAE.flatten(1, 2), weight_VE, target_BMA.flatten(1), bias_V=bias_V)
        nll_BMA, has_target_BMA = nll_BS.view_as(target_BMA), target_BMA != IGNORE
        mean_A = nll_BMA.sum((0, 1)) / has_target_BMA.sum((0, 1)).clamp(min=1)
        return Loss(value, {f"ahead_{a}": mean_A[a - 1] for a in self._shown()})

    def _shown(self) -> list[int]:
        """The places ahead whose loss is a part: 1, 2, 4, …"""
        return [2**n for n in range(self.ahead.bit_length()) if 2**n <= self.ahead]

    def states(self, model: nn.Module, batch: Batch, coprocessor: nn.Module | None) -> Tensor:
        """`states_BMAE`: what the model's head multiplies to predict each target."""
        _check(model, batch["tokens_BL"].shape[1] + self.latents + self.ahead)
        place_BM, rows = batch["place_BM"], len(batch["place_BM"])
        with _asleep(model):
            with torch.no_grad():
                prefix_BLE, pairs = read(model, batch)
            first_BME = prefix_BLE.gather(1, place_BM[..., None].expand(-1, -1, prefix_BLE.shape[-1]))
            ahead_BMA = batch["target_BMA"][..., :-1].clamp(min=0)  # what follows the last target is not read
            parts = [embeddings(model)(ahead_BMA)]
            if self.latents:
                assert coprocessor is not None, "cache_augmentation trains a coprocessor: see `modules`"
                soft_BS = torch.arange(self.latents, device=place_BM.device).repeat(rows, place_BM.shape[1])
                z_BSE = augment(coprocessor, pairs, {"input_ids": soft_BS}, traces(batch, self.latents))
                parts.insert(0, z_BSE.view(*place_BM.shape, self.latents, -1).to(parts[0].dtype))
            x_BMNE = torch.cat(parts, 2)
            length = x_BMNE.shape[2]
            if length == 0:
                return first_BME[:, :, None]
            seen = {"inputs_embeds": x_BMNE.flatten(1, 2)}
            out_BMNE = augment(model, pairs, seen, traces(batch, length)).view_as(x_BMNE)
        if self.latents:
            return out_BMNE[:, :, self.latents - 1 :]
        return torch.cat([first_BME[:, :, None], out_BMNE], 2)


def read(model: nn.Module, batch: Batch) -> tuple[Tensor, Pairs]:
    """The model's states of the rows, and each layer's keys and values."""
    given = attend(model, batch, causal=True) | {"use_cache": True}
    cache = DynamicCache()
    states_BLE = base(model)(input_ids=batch["tokens_BL"], past_key_values=cache, **given).last_hidden_state
    return states_BLE, [(layer.keys, layer.values) for layer in layers_of(cache)]


def traces(batch: Batch, length: int) -> tuple[Tensor, Tensor]:
    """`mask_B1SK` and `position_BS` of `length` slots after each place; K are the row's positions, then the slots."""
    place_BM, document_BL = batch["place_BM"], batch["document_BL"]
    rows, number = place_BM.shape
    position_BM1 = _at(batch["position_BL"], place_BM)[..., None] + 1
    position_BS = (position_BM1 + torch.arange(length, device=place_BM.device)).flatten(1)
    same_BML = document_BL[:, None] == _at(document_BL, place_BM)[..., None]
    seen_BML = same_BML & (torch.arange(document_BL.shape[1], device=place_BM.device) <= place_BM[..., None])
    trace_NN = torch.ones(length, length, dtype=torch.bool, device=place_BM.device).tril()
    trace_SS = torch.block_diag(*[trace_NN] * number)
    seen_BSL = seen_BML.repeat_interleave(length, 1)
    return torch.cat([seen_BSL, trace_SS.expand(rows, -1, -1)], 2)[:, None], position_BS


def augment(model: nn.Module, pairs: Pairs, seen: Batch, where: tuple[Tensor, Tensor]) -> Tensor:
    """The model's states at slots that come after the cache of `pairs`, which is left as it is."""
    mask_B1SK, position_BS = where
    return base(model)(
        **seen, position_ids=position_BS, attention_mask=additive(mask_B1SK, embeddings(model).weight.dtype),
        past_key_values=DynamicCache(pairs), use_cache=True,
    ).last_hidden_state  # fmt: skip


@contextmanager
def _asleep(model: nn.Module) -> Iterator[None]:
    """Without dropout, and without the recomputing of activations, which would leave out the cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check(model: nn.Module, length: int = 0) -> None:
    """An error where the model cannot be augmented over so many positions."""
    entry, config = family(model), at(model, "config")
    if entry.name not in CacheAugmentation.families:
        accepted = ", ".join(CacheAugmentation.families)
        raise PretrainError(f"cache_augmentation: family {entry.name!r}: accepted: {accepted}")
    if entry.positions is not None and length > config.max_position_embeddings:
        raise PretrainError(
            f"cache_augmentation: {length} positions, row, latents and tokens ahead: {type(model).__name__} has "
            f"{config.max_position_embeddings}; accepted: a length smaller by {length - config.max_position_embeddings}"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and length > window:
        raise PretrainError(
            f"cache_augmentation: {length} positions and a sliding window of {window}; accepted: at most {window}"
        )


def _at(x_BL: Tensor, place_BS: Tensor) -> Tensor:
    """The row's values at places of any shape."""
    return x_BL.gather(1, place_BS.flatten(1)).view(place_BS.shape)
