"""Linear attention: its quadratic and its recurrent form, the state that takes a cache's place, and its masks.

With features φ(q), φ(k) ≥ 0, position i puts out Σ_j a_ij v_j with a_ij = φ(q_i)·φ(k_j) / Σ_l φ(q_i)·φ(k_l), the sums
over the positions that i sees. Where those are all before i and i itself, S = Σ φ(k_j) v_jᵀ and z = Σ φ(k_j) are all
that has to be kept of them.

Shape letters: B rows, H heads, L positions, C positions of a chunk, Q queries, K keys, F features, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.masking_utils import causal_mask_function, sdpa_mask

from pretrain.core.errors import PretrainError

NAME = "linear_attention"  # of the attention in a model's configuration
CHUNK = 128  # positions that are compared with each other rather than through the state
State = tuple[Tensor, Tensor]  # S_BHFD and z_BHF


def weights(q_BHQF: Tensor, k_BHKF: Tensor, allowed_B1QK: Tensor) -> Tensor:
    """`a_BHQK`: each row sums to one, but those that see nothing, which are zero."""
    score_BHQK = q_BHQF @ k_BHKF.transpose(-1, -2) * allowed_B1QK
    return score_BHQK / _positive(score_BHQK.sum(-1, keepdim=True))


def quadratic(
    q_BHLF: Tensor, k_BHLF: Tensor, v_BHLD: Tensor, allowed_B1LL: Tensor, state: State | None = None
) -> tuple[Tensor, State]:
    """`y_BHLD` under any mask, and the state after the last position: of what that position sees, and of `state`."""
    score_BHLL = q_BHLF @ k_BHLF.transpose(-1, -2) * allowed_B1LL
    sum_BHLD, sum_BHL1 = score_BHLL @ v_BHLD, score_BHLL.sum(-1, keepdim=True)
    if state is not None:
        sum_BHLD, sum_BHL1 = sum_BHLD + q_BHLF @ state[0], sum_BHL1 + q_BHLF @ state[1][..., None]
    seen_BHLF = k_BHLF * allowed_B1LL[:, :, -1, :, None]
    return sum_BHLD / _positive(sum_BHL1), _added(state, seen_BHLF, v_BHLD)


def recurrent(
    q_BHLF: Tensor, k_BHLF: Tensor, v_BHLD: Tensor, kept_BL: Tensor | None = None, state: State | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, State]:  # fmt: skip
    """`y_BHLD` of causal attention in memory linear in L, and the state after; no one sees what is not `kept_BL`.

    Positions of one chunk see each other directly and all earlier ones through the state; of chunks of 1 it is the
    recurrence.
    """
    if kept_BL is not None:
        k_BHLF = k_BHLF * kept_BL[:, None, :, None]
    parts = []
    causal_CC = torch.ones(chunk, chunk, dtype=torch.bool, device=q_BHLF.device).tril()
    for begin in range(0, q_BHLF.shape[2], chunk):
        part = slice(begin, begin + chunk)
        q_BHCF, k_BHCF, v_BHCD = q_BHLF[:, :, part], k_BHLF[:, :, part], v_BHLD[:, :, part]
        length = q_BHCF.shape[2]
        y_BHCD, state = quadratic(q_BHCF, k_BHCF, v_BHCD, causal_CC[None, None, :length, :length], state)
        parts.append(y_BHCD)
    assert state is not None
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0], state


def _added(state: State | None, k_BHLF: Tensor, v_BHLD: Tensor) -> State:
    S_BHFD, z_BHF = k_BHLF.transpose(-1, -2) @ v_BHLD, k_BHLF.sum(2)
    return (S_BHFD, z_BHF) if state is None else (state[0] + S_BHFD, state[1] + z_BHF)


def _positive(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny)


class LinearState(CacheLayerMixin):
    """A layer of a `transformers` cache: S as its `keys` and z as its `values`, as large for one token as for many."""

    keys: Tensor
    values: Tensor
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0  # tokens, padding included

    def state(self) -> State | None:
        """S and z; None before the first token."""
        return (self.keys, self.values) if self.seen else None

    def put(self, state: State, tokens: int) -> None:
        """Keep the state after `tokens` more."""
        self.keys, self.values = state
        self.device, self.seen, self.is_initialized = self.keys.device, self.seen + tokens, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The first `put` does it."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Refused: keys and values are not kept."""
        raise PretrainError("linear attention: its cache keeps no keys and values; accepted: only its own layers")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are over the new tokens alone."""
        return query_length, self.seen

    def get_seq_length(self) -> int:
        """How many tokens it has seen."""
        return self.seen

    def get_max_length(self) -> int:
        """There is no most."""
        return -1

    def reset(self) -> None:
        """Forget all."""
        super().reset()
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a sum does not say what was added last."""
        raise PretrainError("linear attention: its state cannot be cropped; accepted: no assistant model")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.seen:
            self.keys, self.values = (x.repeat_interleave(repeats, dim=0) for x in (self.keys, self.values))

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows alone."""
        if self.seen:
            self.keys, self.values = self.keys[indices], self.values[indices]


def state_of(cache: object, layer: int) -> LinearState:
    """The state of a layer in a cache of `transformers`, put there in place of an empty layer."""
    layers = getattr(cache, "layers", None)
    if layers is None or (layer < len(layers) and type(layers[layer]) not in (LinearState, DynamicLayer)):
        kind = type(cache if layers is None else layers[layer]).__name__
        raise PretrainError(f"linear attention: cache {kind}: accepted: DynamicCache, or none")
    while len(layers) <= layer:
        layers.append(LinearState())
    if type(layers[layer]) is DynamicLayer:
        if layers[layer].get_seq_length():
            raise PretrainError("linear attention: a cache that holds keys and values: accepted: an empty one, or none")
        layers[layer] = LinearState()
    return layers[layer]


def allowed(mask: Tensor | None, rows: int, length: int, device: torch.device) -> Tensor:
    """`allowed_B1LL` from what an attention layer is given: nothing, `kept_BL`, a boolean mask or one that is added.

    Of padding, each position sees itself.
    """
    if mask is not None and mask.ndim == 4:
        if mask.shape[-2:] != (length, length):
            raise PretrainError(
                f"linear attention: attention_mask of shape {tuple(mask.shape)}: accepted: over the {length} new tokens"
            )
        return mask if mask.dtype == torch.bool else mask == 0
    causal_11LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    if mask is None:
        return causal_11LL.expand(rows, -1, -1, -1)
    return causal_11LL & mask[:, None, None] | torch.eye(length, dtype=torch.bool, device=device)


def kept(mask_B1LL: Tensor) -> Tensor:
    """`kept_BL` of a mask under which a position sees all up to its own, and padding sees and is seen by none."""
    length, kept_BL = mask_B1LL.shape[-1], mask_B1LL[:, 0, -1]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=mask_B1LL.device).tril()
    if not torch.equal(mask_B1LL[:, 0], causal_LL & kept_BL[:, None] & kept_BL[..., None]):
        raise PretrainError(
            "linear attention: a cache and an attention_mask that is not causal: accepted: use_cache False for packed "
            "documents"
        )
    return kept_BL


def _mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
    mask_function: Callable[..., bool] = causal_mask_function, attention_mask: Tensor | None = None, **more: object,
) -> Tensor | None:  # fmt: skip
    """What the model makes of its `attention_mask`: None for causal attention, `kept_BL` where there is padding."""
    if mask_function is not causal_mask_function:  # packed documents, found by the positions
        options = {"mask_function": mask_function, "attention_mask": attention_mask} | more
        make: Callable[..., Tensor | None] = sdpa_mask
        return make(batch_size, q_length, kv_length, q_offset, kv_offset, **options | {"allow_is_causal_skip": False})
    if attention_mask is None:
        return None
    if attention_mask.shape[1] != kv_offset + kv_length:
        raise PretrainError(
            f"linear attention: attention_mask of shape {tuple(attention_mask.shape)}: accepted: {batch_size} rows of "
            f"{kv_offset + kv_length} tokens, those seen before included"
        )
    kept_BL = attention_mask[:, kv_offset:]
    return None if bool(kept_BL.all()) else kept_BL


def _attention(module: nn.Module, *_: object, **__: object) -> NoReturn:
    raise PretrainError(f"{type(module).__name__} with attention {NAME!r}: accepted: a layer of linear attention")


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
