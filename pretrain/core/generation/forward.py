"""One pass of a model over new tokens, with keys and values in a buffer that is allocated once.

The blocks are `transformers`' own and are called one by one: what its models do again for each token (masks, rotary
angles, growing the cache, checks of arguments) is done here once for all tokens, and the head sees only the positions
asked for.

Shape letters: B rows, L prompt tokens, T tokens of a pass, C room of the cache, H key heads, D width of a head, P
places, E width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core.errors import PretrainError
from pretrain.core.generation.finite import check_outputs
from pretrain.core.models.families import additive, at, base, blocks, embeddings, family

FAMILIES = ("llama", "gpt2")
_ATTENTION = ("sdpa", "eager")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on the length so far


def why_not(model: PreTrainedModel, length: int) -> str | None:
    """Why `Forward` cannot run the model over `length` positions and what would be accepted; None where it can."""
    try:
        name = family(model).name
    except PretrainError as error:
        return str(error)
    config = model.config
    if name not in FAMILIES:
        return f"model family {config.model_type!r}; accepted: {', '.join(FAMILIES)}"
    if not hasattr(model, "lm_head"):
        return f"{type(model).__name__} predicts no next token; accepted: a causal language model"
    if any(_changed(part) for part in (model, base(model))):
        return f"{type(model).__name__} has a forward pass of its own; accepted: that of transformers"
    if config._attn_implementation not in _ATTENTION:
        return f"attention {config._attn_implementation!r}; accepted: {', '.join(_ATTENTION)}"
    window = getattr(config, "sliding_window", None)
    if window is not None and length > window:
        return f"{length} positions and a sliding window of {window}; accepted: at most {window} positions"
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in _STATIC_ROPE:
        return f"rope_type {kind!r}; accepted: {', '.join(_STATIC_ROPE)}"
    return None


def _changed(module: nn.Module) -> bool:
    """Whether calling a model does something besides its class's `forward`, which `Forward` would leave out."""
    ours = not type(module).__module__.startswith("transformers.models.")
    hooks = [
        hook for hook in module._forward_hooks.values() if hook is not check_outputs
    ]  # which tokens are checked by
    return ours or "forward" in vars(module) or bool(module._forward_pre_hooks or hooks)


def pads(input_ids_BL: Tensor, attention_mask_BL: Tensor | None) -> Tensor | None:
    """`kept_BL`, where tokens are, of prompts padded on the left; None where nothing is padded."""
    if input_ids_BL.ndim != 2 or 0 in input_ids_BL.shape:
        raise PretrainError(f"prompts of shape {tuple(input_ids_BL.shape)}: accepted: (rows, tokens), none of them 0")
    if attention_mask_BL is None or bool(attention_mask_BL.all()):
        return None
    kept_BL = attention_mask_BL.bool()
    if not bool((kept_BL[:, 1:] >= kept_BL[:, :-1]).all() & kept_BL[:, -1].all()):
        raise PretrainError("attention_mask: pads after tokens; accepted: prompts padded on the left")
    return kept_BL


class Forward:
    """The model's blocks over a cache with room for `length` positions and `extra` ones that are not kept.

    `self.length` positions of the cache are valid; a pass writes its own after them and does not count them: whoever
    calls it moves `length`. As the blocks' `past_key_values` it answers `update`.
    """

    def __init__(self, model: PreTrainedModel, length: int, extra: int = 0) -> None:
        reason = why_not(model, length)
        if reason is not None:
            raise PretrainError(f"decoding {type(model).__name__}: {reason}")
        config, weight_VE = model.config, embeddings(model).weight
        entry, inner = family(model), base(model)
        limit = config.max_position_embeddings
        if entry.positions is not None and length > limit:
            raise PretrainError(
                f"{length} positions, prompt and new tokens: {type(model).__name__} has {limit}; "
                f"accepted: max_new_tokens smaller by at least {length - limit}"
            )
        self.blocks, self.norm = blocks(model), at(inner, entry.final_norm or "")
        self.embed, self.head = embeddings(model), model.lm_head
        self.eager = config._attn_implementation == "eager"
        self.dtype, self.device, self.room = weight_VE.dtype, weight_VE.device, length + extra
        self.cache: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by layer: both, keys, values
        self.length = 0
        self.given: dict[str, object] = {}  # what the blocks hand on to the attention
        self.pad_mask_B11C: Tensor | None = None
        self.start_B1: Tensor | None = None  # minus the number of pads: position = place in the cache + start
        places_1C = torch.arange(self.room, device=self.device)[None]
        if entry.positions is None:
            self.table_CE = None
            rotary: Callable[..., tuple[Tensor, Tensor]] = at(inner, "rotary_emb")
            self.cos_1CD, self.sin_1CD = rotary(weight_VE.detach()[:1, None], places_1C)
        else:
            self.table_CE = at(inner, entry.positions).weight
            self.last, self.drop = self.table_CE.shape[0] - 1, at(inner, "drop")

    def update(
        self, keys_BHTD: Tensor, values_BHTD: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values; returns all up to them."""
        end = self.length + keys_BHTD.shape[2]
        if layer not in self.cache:
            rows, heads, _, width = keys_BHTD.shape
            both_2BHCD = keys_BHTD.new_zeros(2, rows, heads, self.room, width)
            self.cache[layer] = (both_2BHCD, *both_2BHCD)
        _, keys_BHCD, values_BHCD = self.cache[layer]
        keys_BHCD[:, :, self.length : end] = keys_BHTD
        values_BHCD[:, :, self.length : end] = values_BHTD
        return keys_BHCD[:, :, :end], values_BHCD[:, :, :end]

    def prefill(self, input_ids_BL: Tensor, kept_BL: Tensor | None = None) -> Tensor:
        """Read the prompts, of which `kept_BL` (see `pads`) are tokens; returns the last position's `logits_BV`."""
        rows, length = input_ids_BL.shape
        positions_BL = torch.arange(length, device=self.device)[None]
        mask_B1LL = None
        if kept_BL is not None:
            self.start_B1 = kept_BL.sum(1, keepdim=True) - length
            positions_BL = (positions_BL + self.start_B1).clamp(min=0)
            room_BC = torch.ones(rows, self.room, dtype=torch.bool, device=self.device)
            room_BC[:, :length] = kept_BL
            self.pad_mask_B11C = additive(room_BC[:, None, None], self.dtype)
        if kept_BL is not None or self.eager:
            causal_11LL = torch.ones(1, 1, length, length, dtype=torch.bool, device=self.device).tril()
            mask_B1LL = additive(causal_11LL if kept_BL is None else causal_11LL & kept_BL[:, None, None], self.dtype)
        states_BLE = self.states(input_ids_BL, positions_BL, mask_B1LL)
        self.length = length
        return self.head(self.norm(states_BLE[:, -1]))

    def step(self, token_B1: Tensor) -> Tensor:
        """One more token a row; returns the logits after it, `logits_BV`."""
        place, end = self.length, self.length + 1
        mask_B11C = None if self.pad_mask_B11C is None else self.pad_mask_B11C[..., :end]
        if self.start_B1 is None:
            states_B1E = self.states(token_B1, slice(place, end), mask_B11C)
        else:
            states_B1E = self.states(token_B1, place + self.start_B1, mask_B11C)
        self.length = end
        return self.head(self.norm(states_B1E[:, -1]))

    def states(self, ids_BT: Tensor, positions: Tensor | slice, mask_B1TC: Tensor | None) -> Tensor:
        """The blocks' output for new tokens, `states_BTE`, before the final norm.

        Positions are `positions_BT`, or a slice that holds for all rows.
        """
        states_BTE = self.embed(ids_BT)
        more: dict[str, tuple[Tensor, Tensor]] = {}
        if self.table_CE is not None:
            if isinstance(positions, Tensor):
                states_BTE = states_BTE + self.table_CE[positions.clamp(max=self.last)]
            else:
                states_BTE = states_BTE + self.table_CE[positions]
            states_BTE = self.drop(states_BTE)
        elif isinstance(positions, Tensor):
            more["position_embeddings"] = (self.cos_1CD[0][positions], self.sin_1CD[0][positions])
        else:
            more["position_embeddings"] = (self.cos_1CD[:, positions], self.sin_1CD[:, positions])
        for block in self.blocks:
            states_BTE = block(
                states_BTE, attention_mask=mask_B1TC, past_key_values=self, use_cache=True, **more, **self.given
            )  # fmt: skip
        return states_BTE

    def keep(self, path: list[int]) -> None:
        """Of the positions that the last pass wrote, keep those of `path` (ascending), in its order, and count them."""
        begin, end = self.length, self.length + len(path)
        if path != list(range(len(path))):
            places_P = torch.tensor(path, device=self.device) + begin
            for both_2BHCD, _, _ in self.cache.values():
                both_2BHCD[..., begin:end, :] = both_2BHCD[..., places_P, :]
        self.length = end
