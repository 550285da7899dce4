"""Attention among documents that share a row, by the fastest kernel that keeps them apart.

`dense` is the reference: a mask B × 1 × L × L that is added to the scores. `flex` gives PyTorch's `flex_attention`
(arXiv:2412.05496) the documents' boundaries in blocks of 128 positions and never makes that mask. `whole` is for rows
of one document each, which need no mask at all. CPUs take `dense`: recorded results there were made by it.

Shape letters: B rows, L positions, N blocks of positions, H heads, D a head's width.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pretrain.core.batch import Batch, document_mask
from pretrain.core.errors import PretrainError, unknown
from pretrain.core.meter import counting
from pretrain.core.models.families import Arguments, attention_inputs, blocks, family, in_table, layout, with_windows

KERNELS = ("dense", "whole", "flex")
BLOCK = 128
LEAST_LENGTH = 2 * BLOCK  # shorter rows gain nothing from blocks
LEAST_WIDTH = 16  # of a head in flex_attention's kernel
DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")  # their names in configurations

_kernel: ContextVar[str | None] = ContextVar("kernel", default=None)


def attend(model: nn.Module, batch: Batch, *, causal: bool) -> Arguments:
    """The keyword arguments with which a model of one stack attends inside each document of `batch`.

    `document_BL` numbers a row's documents (0: padding) and `position_BL` counts in each. With `causal` no position
    sees a later one, except those of `prefix_BL` where the batch has it. What is made here serves all layers. Kernels
    agree on every document up to rounding; they differ in what padding sees.
    """
    if not in_table(model) and not layout(model).packs:
        if causal != family(model).causal or "prefix_BL" in batch:
            entry = family(model)
            kind = "causal" if entry.causal else "bidirectional"
            raise PretrainError(f"model type {entry.name!r}: accepted: {kind} attention alone")
        more = (batch["sizes_2"],) if "sizes_2" in batch else ()
        return {"documents": (batch["document_BL"], *more)}
    kernel = _kernel.get() or choose(model, batch, causal=causal)
    document_BL, position_BL = batch["document_BL"], batch["position_BL"]
    if kernel == "dense":
        mask_B1LL = document_mask(document_BL, causal=causal, prefix_BL=batch.get("prefix_BL"))
        return attention_inputs(model, mask_B1LL, position_BL)
    if kernel == "whole":
        # Of four dimensions, so that transformers hands it on; for None it would look for documents in the positions,
        # and wait for the device to tell.
        nothing = torch.empty(0, 0, 0, 0, device=document_BL.device)
        return with_windows(model, position_BL, lambda window: nothing)
    ahead = not family(model).causal
    return with_windows(model, position_BL, lambda window: block_mask(batch, causal=causal, window=window, ahead=ahead))


@contextmanager
def using(kernel: str) -> Iterator[None]:
    """While open, `attend` takes this kernel without asking whether it suits: for tests and measurements."""
    if kernel not in KERNELS:
        raise unknown("attention kernel", kernel, KERNELS)
    before = _kernel.set(kernel)
    try:
        yield
    finally:
        _kernel.reset(before)


def choose(model: nn.Module, batch: Batch, *, causal: bool) -> str:
    """The kernel for this model, batch and device: the fastest that is exact.

    `packed` and `padded`, which `rows_to_tensors` leaves in the batch on the CPU, say whether a row holds several
    documents and whether one ends early; a batch without them may be both.
    """
    entry, config, device = family(model), model.config, batch["document_BL"].device
    plain = getattr(config, "_attn_implementation", None) == "sdpa" and entry.decoder_blocks is None and in_table(model)
    # FLOPs are counted without the compiler, where flex_attention would make all scores of all heads, and the counter
    # of older PyTorch knows no attention whose heads share keys.
    if device.type == "cpu" or not plain or counting() or any(hasattr(block, "dense_mask") for block in blocks(model)):
        return "dense"
    length, window = batch["document_BL"].shape[1], getattr(config, "sliding_window", None)
    apart = bool(batch.get("packed", True)) or "prefix_BL" in batch or causal != entry.causal
    # Padding stands at the end, where what a causal model predicts before it does not see it.
    padded = not causal and bool(batch.get("padded", True))
    if not apart and not padded and (window is None or length <= window):
        return "whole"
    dropout = model.training and any(getattr(config, name, None) for name in DROPOUTS)
    return "dense" if length < LEAST_LENGTH or dropout or not has_flex(device) else "flex"


@functools.cache
def has_flex(device: torch.device) -> bool:
    """Whether `flex_attention` can be compiled for the device: an NVIDIA GPU since Ampere, Triton, a C compiler."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    return importlib.util.find_spec("triton") is not None and any(shutil.which(c) for c in compilers if c)


def block_mask(batch: Batch, *, causal: bool, window: int | None = None, ahead: bool = False) -> BlockMask:
    """What `document_mask` allows, for `flex_attention`: which blocks of positions to visit, and a rule inside them.

    `window` is a sliding window's reach, back alone or `ahead` too. A block is visited where the lowest and highest
    document and position in it leave the possibility of a pair, and taken whole where they leave no other.
    """
    document_BL, position_BL = batch["document_BL"].int(), batch["position_BL"].int()
    prefix_BL = batch["prefix_BL"] if causal and "prefix_BL" in batch else None
    device, length = document_BL.device, document_BL.shape[1]
    number = -(-length // BLOCK)
    first, last = (_blocks(document_BL, number, how) for how in (torch.amin, torch.amax))
    same = (first == last)[:, :, None] & (first == last)[:, None, :] & (first[:, :, None] == first[:, None, :])
    maybe = (first[:, :, None] <= last[:, None, :]) & (first[:, None, :] <= last[:, :, None])
    if causal:
        index_N = torch.arange(number, device=device)
        before, after = index_N[:, None] > index_N, index_N[:, None] < index_N
        if prefix_BL is None:
            same, maybe = same & before, maybe & ~after
        else:
            any_prefix, all_prefix = (
                _blocks(prefix_BL.int(), number, how)[:, None] > 0 for how in (torch.amax, torch.amin)
            )
            same, maybe = same & (before | all_prefix), maybe & (~after | any_prefix)
    if window is not None:
        # Positions grow along a document, so no pair of blocks of one is nearer than what follows from their ends.
        low, high = (_blocks(position_BL, number, how) for how in (torch.amin, torch.amax))
        reach, back = high[:, :, None] - low[:, None, :], high[:, None, :] - low[:, :, None]
        same = same & ((reach <= window) & (back <= window) if ahead else reach < window)
        maybe = maybe & _near(number, window, ahead, device)
    if length % BLOCK:  # what is beyond the end is nobody's
        same[:, -1, :] = same[:, :, -1] = False
    rule = _rule(document_BL, position_BL, prefix_BL, causal, window, ahead)
    mask = BlockMask.from_kv_blocks(
        *_listed(maybe & ~same), *_listed(same), BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=(length, length)
    )
    vars(mask)["ndim"] = 4  # GPT-2 asks a mask for it
    return mask


def _blocks(x_BL: Tensor, number: int, how: Callable[..., Tensor]) -> Tensor:
    """The least or greatest of each block, `x_BN`."""
    missing = number * BLOCK - x_BL.shape[1]
    return how(torch.cat([x_BL, x_BL[:, -1:].expand(-1, missing)], 1).unflatten(1, (number, BLOCK)), -1)


def _near(number: int, window: int, ahead: bool, device: torch.device) -> Tensor:
    """Blocks with a pair of places within the window: in one document, positions are at least as far apart."""
    index_N = torch.arange(number, device=device)
    apart_NN = (index_N[:, None] - index_N).mul(BLOCK)
    least_NN = (apart_NN.abs() - (BLOCK - 1)).clamp(min=0)
    return least_NN <= window if ahead else (least_NN < window) | (apart_NN < 0)


def _rule(
    document_BL: Tensor, position_BL: Tensor, prefix_BL: Tensor | None, causal: bool, window: int | None, ahead: bool
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether position q of row b may see position k."""

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = document_BL[b, q] == document_BL[b, k]
        if causal:
            seen = seen & (q >= k if prefix_BL is None else (q >= k) | prefix_BL[b, k])
        if window is not None:
            distance = position_BL[b, q] - position_BL[b, k]
            seen = seen & ((distance.abs() <= window) if ahead else (distance < window))
        return seen

    return allowed


def _listed(wanted_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries visits, and which, these first: B × 1 × N and B × 1 × N × N."""
    order_BNN = wanted_BNN.int().argsort(dim=-1, descending=True, stable=True)
    return wanted_BNN.sum(-1, dtype=torch.int32)[:, None], order_BNN.int()[:, None]


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """`flex_attention` compiled for each shape: in training they are as good as constant.

    Of one function PyTorch compiles eight variants by default and then no more, which here would be to make all scores.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """`transformers`' "sdpa" that also understands what `attend` gives."""
    if isinstance(attention_mask, BlockMask):
        if given.get("dropout"):
            raise PretrainError(f"flex attention: dropout {given['dropout']}: accepted: 0")
        return _flex(query, key, value, attention_mask, given.get("scaling")), None
    if attention_mask is not None and attention_mask.shape[0] == 0:
        attention_mask = None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **given)


def _flex(query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """`flex_attention`'s output, `out_BLHD`, with what its kernel asks for."""
    kind, width = query_BHLD.device.type, value_BHLD.shape[-1]
    qkv = [query_BHLD, key_BHLD, value_BHLD]
    if torch.is_autocast_enabled(kind):  # which does not know this operation
        qkv = [x.to(torch.get_autocast_dtype(kind)) for x in qkv]
    if width < LEAST_WIDTH:
        scale = width**-0.5 if scale is None else scale
        qkv = [F.pad(x, (0, LEAST_WIDTH - width)) for x in qkv]
    shared = qkv[0].shape[1] // qkv[1].shape[1]
    if shared & (shared - 1):  # heads share keys by powers of two
        qkv[1:] = [x.repeat_interleave(shared, dim=1) for x in qkv[1:]]
    grouped = qkv[0].shape[1] != qkv[1].shape[1]
    compiled = kind == "cuda" and not torch.compiler.is_compiling()
    kernel = cast("Callable[..., Tensor]", _compiled() if compiled else flex_attention)
    out_BHLD = kernel(*qkv, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out_BHLD[..., :width].transpose(1, 2).contiguous()


# In the place of "sdpa" and not beside it: models keep the name that everything else knows, and what a checkpointed
# block computes anew in the backward pass finds the same function.
AttentionInterface.register("sdpa", _attention)
