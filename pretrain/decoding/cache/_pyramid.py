"""How `pyramid_infer` runs: a cache whose layers forget, hooks on the blocks, and an attention that keeps its scores.

Shape letters: B rows, L positions of the prompt, Q queries of one pass, K kept keys, R recent queries, T keys that may
still be dropped, H heads, D width of a head, E width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pretrain.core.errors import PretrainError
from pretrain.core.models.families import additive, base, blocks, embeddings, family
from pretrain.decoding.cache._press import check_full_attention

AT_ONCE = 1 << 25  # attention weights that are made at once
NAME = "pyramid_infer"  # of the attention, and of the attribute by which it finds what runs

Args = tuple[Any, ...]  # of a forward pass, as hooks are given them
Given = dict[str, Any]


class PyramidLayer(DynamicLayer):
    """The keys and values of the tokens that one layer keeps, in order; their length is not the number seen."""

    keys: Tensor  # once it has seen some
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        super().reset()
        self.seen = 0  # tokens, dropped ones included
        self.prompt = self.recent = 0  # tokens of the first pass, and how many queries score
        self.settled = 0  # the keys before this one are never dropped again
        self.padded = False  # whether there is padding among the tokens seen
        self.place_BK: Tensor | None = None  # int32, where each kept token was; -1 on padding
        self.score_BT: Tensor | None = None  # attention so far to the keys after `settled`

    def get_seq_length(self) -> int:
        """How many tokens the layer has seen."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was dropped for later tokens does not come back."""
        raise PretrainError("pyramid_infer: a cache that drops tokens cannot be cropped; accepted: no assistant model")

    def keep(self, index_BK: Tensor) -> None:
        """Keep these keys alone."""
        at_BHKD = index_BK[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        self.keys, self.values = self.keys.gather(2, at_BHKD), self.values.gather(2, at_BHKD)
        self.place_BK = self.places().gather(1, index_BK)

    def places(self) -> Tensor:
        """Where each kept token was."""
        assert self.place_BK is not None, "the layer has seen nothing"
        return self.place_BK

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("keys", "values", "place_BK", "score_BT"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Other rows, as beam search wants them."""
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows alone."""
        self._rows(lambda tensor: tensor[indices])


def allowed(place_BK: Tensor, queries: int) -> Tensor:
    """Which keys the last `queries` of the tokens see: no padding and no later ones; `_BQK`."""
    length = place_BK.shape[1]
    order_K = torch.arange(length, device=place_BK.device)
    return (place_BK >= 0)[:, None] & (order_K <= order_K[length - queries :, None])


class Pyramid(Protocol):
    """What is run: the shape of the caches (`pyramid_infer.PyramidInfer`)."""

    families: ClassVar[tuple[str, ...]]

    @property
    def recent_ratio(self) -> float:
        """The share of a prompt that counts as recent."""

    @property
    def distance_weight(self) -> float:
        """The weight of the most recent token in a score."""

    @property
    def exceed_length_to_compress(self) -> int:
        """How many generated tokens make a block."""

    @property
    def streamingllm_sink_len(self) -> int:
        """How many first tokens stay."""

    def kept(self, layer: int, context: int, layers: int, prompt: int) -> int:
        """How many of `context` tokens go on after a block."""

    def kept_of_block(self, layer: int, layers: int) -> int:
        """How many of a block of generated tokens a layer keeps."""


class Running:
    """One `with`: what the hooks of a model share."""

    def __init__(self, method: Pyramid, model: PreTrainedModel) -> None:
        self.method, self.dtype, self.layers = method, embeddings(model).weight.dtype, len(blocks(model))
        self.kept: list[PyramidLayer] = []  # by block, of the cache
        self.number: dict[nn.Module, int] = {}  # of each block's attention
        self.first = self.padded = False  # whether this pass is the prompt's; whether it has padding
        self.tokens = 0  # of this pass
        self.index_BQ = self.place_BQ = torch.empty(0)  # of those of them that the next block is given
        self.score_BC: Tensor | None = None  # of the context in the block before
        self.all_BLE: Tensor | None = None  # the last states of every token, once one has left

    def begin(self, module: PreTrainedModel, args: Args, given: Given) -> tuple[Args, Given]:
        """Before the whole model: find or make the cache, and which tokens are padding."""
        tokens = args[0] if args else given.get("input_ids")
        tokens = given["inputs_embeds"] if tokens is None else tokens
        use = given.get("use_cache")
        if not (module.config.use_cache if use is None else use):
            raise PretrainError("pyramid_infer: use_cache False: accepted: a model that keeps its cache")
        cache = given.get("past_key_values")
        cache = DynamicCache() if cache is None else cache
        if not all(isinstance(layer, PyramidLayer) for layer in cache.layers) or not cache.layers:
            if not isinstance(cache, DynamicCache) or cache.get_seq_length() or getattr(cache, "offloading", False):
                raise PretrainError(f"pyramid_infer: {type(cache).__name__}: accepted: an empty DynamicCache, or none")
            cache.layers = [PyramidLayer() for _ in range(self.layers)]
            cache.layer_class_to_replicate = None
        seen, queries = cache.get_seq_length(), tokens.shape[1]
        place_1Q = torch.arange(seen, seen + queries, dtype=torch.int32, device=tokens.device)[None]
        self.place_BQ = place_1Q.expand(len(tokens), -1)
        mask = given.get("attention_mask")
        if mask is not None:
            if mask.shape != (len(tokens), seen + queries):
                raise PretrainError(
                    f"pyramid_infer: attention_mask of shape {tuple(mask.shape)}: accepted: {len(tokens)} rows of "
                    f"{seen + queries} tokens"
                )
            self.place_BQ = self.place_BQ.masked_fill(mask[:, seen:] == 0, -1)
        self.padded = mask is not None and bool((self.place_BQ < 0).any())
        self.kept = cast("list[PyramidLayer]", cache.layers)
        self.first, self.tokens, self.all_BLE = seen == 0, queries, None
        self.index_BQ = torch.arange(queries, device=tokens.device).expand(len(tokens), -1)
        return args, given | {"past_key_values": cache, "use_cache": True}

    def before(self, number: int, _: nn.Module, args: Args, given: Given) -> tuple[Args, Given]:
        """Before a block: note its tokens, and give it their mask and positions."""
        layer, place_BQ = self.kept[number], self.place_BQ
        layer.seen, layer.padded = layer.seen + self.tokens, layer.padded or self.padded
        layer.place_BK = place_BQ if layer.place_BK is None else torch.cat([layer.place_BK, place_BQ], 1)
        queries = place_BQ.shape[1]
        if self.first:
            layer.prompt, layer.settled = layer.seen, queries
            layer.recent = int(layer.seen * self.method.recent_ratio) + 1
        mask = None
        if layer.padded or (queries > 1 and not self.first):
            mask = additive(allowed(layer.places(), queries)[:, None], self.dtype)
        if "attention_mask" in given:
            given = given | {"attention_mask": mask}
        else:
            args = (*args[:2], mask, *args[3:])
        if self.all_BLE is not None:
            if given.get("position_embeddings") is not None:
                turned = tuple(_rows(tensor, self.index_BQ) for tensor in given["position_embeddings"])
                given = given | {"position_embeddings": turned}
            if given.get("position_ids") is not None:
                ids_BL = given["position_ids"].expand(len(place_BQ), -1)
                given = given | {"position_ids": ids_BL.gather(1, self.index_BQ)}
        return args, given

    def attend(self, number: int, query_BHQD: Tensor, key_BHKD: Tensor, scaling: float) -> None:
        """Add up the attention by which keys are ranked: the mean over heads, weighted by how recent the query is."""
        layer = self.kept[number]
        recent = layer.recent
        weights_R = torch.linspace(1.0, self.method.distance_weight, recent, device=key_BHKD.device)
        self.score_BC = None
        if self.first:
            if recent < key_BHKD.shape[2]:
                weight_RK = weights_R[:, None].expand(-1, key_BHKD.shape[2])
                score_BK = scores(query_BHQD[:, :, -recent:], key_BHKD, layer.places(), scaling, weight_RK)
                self.score_BC = score_BK[:, :-recent] / recent
            return
        queries, block = query_BHQD.shape[2], self.method.exceed_length_to_compress
        # Tokens after the prompt are compressed in blocks; a block is scored by the `recent` queries that follow it.
        query_Q = torch.arange(layer.seen - queries, layer.seen, device=key_BHKD.device) - layer.prompt
        later = key_BHKD.shape[2] - layer.settled
        key_T = torch.arange(layer.seen - later, layer.seen, device=key_BHKD.device) - layer.prompt
        age_QT = query_Q[:, None] - (key_T // block + 1) * block
        weight_QT = weights_R[age_QT.clamp(0, recent - 1)] * ((age_QT >= 0) & (age_QT < recent))
        weight_QK = torch.cat([weight_QT.new_zeros(queries, layer.settled), weight_QT], 1)
        score_BK = scores(query_BHQD, key_BHKD, layer.places(), scaling, weight_QK)
        score_BT = score_BK[:, layer.settled :] / recent
        if layer.score_BT is not None:
            score_BT[:, : layer.score_BT.shape[1]] += layer.score_BT
        layer.score_BT = score_BT

    def after(self, number: int, _: nn.Module, __: Args, ___: Given, states_BQE: Tensor) -> Tensor:
        """After a block: let tokens of the prompt go, or drop old keys of later tokens."""
        layer = self.kept[number]
        if not self.first:
            self._compress(number, layer)
            return states_BQE
        if self.score_BC is not None and number + 1 < self.layers:
            keep = self.method.kept(number, self.score_BC.shape[1], self.layers, layer.prompt)
            if keep < self.score_BC.shape[1]:
                chosen_BC = pivotal(self.score_BC, self.place_BQ, keep, self.method.streamingllm_sink_len)
                return self._leave(chosen_BC, layer.recent, states_BQE)
        if number + 1 < self.layers or self.all_BLE is None:
            return states_BQE
        states_BLE, self.all_BLE = self._scattered(states_BQE), None  # who left keeps the state that it left with
        return states_BLE

    def _leave(self, chosen_BC: Tensor, recent: int, states_BQE: Tensor) -> Tensor:
        last_BR = torch.arange(states_BQE.shape[1], device=states_BQE.device)[-recent:].expand(len(chosen_BC), -1)
        index_BK = torch.cat([chosen_BC, last_BR], 1)
        self.all_BLE = states_BQE if self.all_BLE is None else self._scattered(states_BQE)
        self.place_BQ, self.index_BQ = self.place_BQ.gather(1, index_BK), self.index_BQ.gather(1, index_BK)
        return _rows(states_BQE, index_BK)

    def _scattered(self, states_BQE: Tensor) -> Tensor:
        assert self.all_BLE is not None
        return self.all_BLE.scatter(1, self.index_BQ[:, :, None].expand_as(states_BQE), states_BQE)

    def _compress(self, number: int, layer: PyramidLayer) -> None:
        block = self.method.exceed_length_to_compress
        keep = self.method.kept_of_block(number, self.layers)
        while layer.score_BT is not None and layer.score_BT.shape[1] >= layer.recent + block:
            if keep < block:
                chosen_BC = layer.score_BT[:, :block].topk(keep, dim=1).indices.sort(dim=1).values + layer.settled
                every_BK = torch.arange(layer.keys.shape[2], device=chosen_BC.device).expand(len(chosen_BC), -1)
                parts = (every_BK[:, : layer.settled], chosen_BC, every_BK[:, layer.settled + block :])
                layer.keep(torch.cat(parts, 1))
            layer.settled += keep
            layer.score_BT = layer.score_BT[:, block:]


def pivotal(score_BC: Tensor, place_BQ: Tensor, keep: int, sinks: int) -> Tensor:
    """The `keep` context tokens with the highest scores, in order; the first `sinks` always, padding last."""
    real_BC = place_BQ[:, : score_BC.shape[1]] >= 0
    score_BC = score_BC.masked_fill(~real_BC, -1.0)
    score_BC = score_BC.masked_fill(real_BC & (real_BC.cumsum(1) <= sinks), torch.inf)
    return score_BC.topk(keep, dim=1).indices.sort(dim=1).values


def _rows(tensor: Tensor, index_BK: Tensor) -> Tensor:
    """The positions `index_BK` of a tensor (B or 1, L, E)."""
    return tensor.expand(len(index_BK), -1, -1).gather(1, index_BK[:, :, None].expand(-1, -1, tensor.shape[2]))


def scores(
    query_BHQD: Tensor, key_BHKD: Tensor, place_BK: Tensor, scaling: float, weight_QK: Tensor
) -> Tensor:  # fmt: skip
    """`score_BK`: the last queries' attention to each key, weighed and summed, the mean over heads; float32 or finer.

    Some heads, or some queries of one head, at a time: all would be as much as a whole attention without a cache.
    """
    (rows, heads, queries, _), length = query_BHQD.shape, key_BHKD.shape[2]
    alike, of_head = heads // key_BHKD.shape[1], rows * length  # weights of a query
    some = max(1, min(queries, AT_ONCE // of_head))
    together = max(1, min(heads, AT_ONCE // (of_head * some)))
    key_of_H = torch.arange(heads, device=key_BHKD.device) // alike
    order_K = torch.arange(length, device=place_BK.device)
    wide = torch.promote_types(key_BHKD.dtype, torch.float32)
    total_BK = torch.zeros(rows, length, dtype=wide, device=key_BHKD.device)
    for start in range(0, queries, some):
        end = min(start + some, queries)
        last_Q = order_K[length - queries :][start:end]
        seen_BQK = (place_BK >= 0)[:, None] & (order_K <= last_Q[:, None])
        for head in range(0, heads, together):
            part = slice(head, min(head + together, heads))
            score_BHQK = query_BHQD[:, part, start:end] @ key_BHKD[:, key_of_H[part]].transpose(2, 3) * scaling
            score_BHQK = score_BHQK.to(wide).masked_fill_(~seen_BQK[:, None], -torch.inf)
            share_BHQK = score_BHQK.softmax(-1).nan_to_num_(0.0)
            total_BK += torch.einsum("bhqk,qk->bk", share_BHQK, weight_QK[start:end].to(wide))
    return total_BK / heads


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    running: Running = getattr(module, NAME)
    with torch.no_grad():
        running.attend(running.number[module], query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)


AttentionInterface.register(NAME, _attention)


@contextmanager
def running(method: Pyramid, model: PreTrainedModel) -> Iterator[None]:
    """Run the method on every pass of the model; what was changed on it is put back at the end."""
    entry = family(model)
    if entry.name not in method.families:
        raise PretrainError(f"pyramid_infer: model family {entry.name!r}: accepted: {', '.join(method.families)}")
    check_full_attention("pyramid_infer", model)
    parts = blocks(model)
    attentions = [block.get_submodule(entry.attention) for block in parts]
    if any(hasattr(module, NAME) for module in attentions):
        raise PretrainError("pyramid_infer: it runs on this model already; accepted: one at a time")
    state = Running(method, model)
    state.number = {module: number for number, module in enumerate(attentions)}
    before = model.config._attn_implementation
    hooks = [base(model).register_forward_pre_hook(state.begin, with_kwargs=True)]
    try:
        model.set_attn_implementation(NAME)
        for number, (block, module) in enumerate(zip(parts, attentions, strict=True)):
            setattr(module, NAME, state)
            hooks.append(block.register_forward_pre_hook(functools.partial(state.before, number), with_kwargs=True))
            hooks.append(block.register_forward_hook(functools.partial(state.after, number), with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in attentions:
            if hasattr(module, NAME):
                delattr(module, NAME)
        model.set_attn_implementation(before)
