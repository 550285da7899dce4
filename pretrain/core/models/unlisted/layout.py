"""What a model shows of itself on a few tokens: how documents share its rows, and what it makes of its last states.

Two short documents are given to it one by one and then in one row, with masks of the kinds that models of
`transformers` take; the first with which the answers agree is the one to use. One that takes none (a recurrent one,
one whose attention counts distances along the row) has its documents in rows of their own (`apart`).

Shape letters: B rows, L positions, E width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from pretrain.core.batch import additive, document_mask
from pretrain.core.errors import PretrainError, warn
from pretrain.core.foreign.code import brought
from pretrain.core.models.layers import Arguments, at
from pretrain.core.models.storage import widened

FIRST, SECOND = 5, 7  # tokens of the two documents
CAPS = ("final_logit_softcapping", "logits_soft_cap")  # names of a soft cap in configurations
NEAR = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}  # of the largest entry


@dataclass(frozen=True)
class Layout:
    """How a model reads rows of documents, and how its logits follow from `hidden`."""

    first: int | None  # the number of a document's first position; None where documents need rows of their own
    scale: float = 1.0  # the head's linear layer gives the logits of this times what enters it,
    softcap: float | None = None  # and c · tanh(z / c) of them where there is a cap c
    bias: str | None = None  # of the logits, where it is not the linear layer's

    @property
    def packs(self) -> bool:
        """Whether several documents can share a row."""
        return self.first is not None


_known: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def layout(model: nn.Module) -> Layout:
    """What the model has shown; asked once.

    Raises `PretrainError` where it does not read tokens alone, or its logits are not those of a linear layer.
    """
    if model not in _known:
        try:
            _known[model] = _asked(model)
        except PretrainError:
            raise
        except Exception as error:  # of a forward pass that wants more than tokens
            kind = at(model, "config.model_type")
            raise PretrainError(
                f"model type {kind!r}: no logits of tokens alone ({type(error).__name__}); accepted: a language model"
            ) from error
    return _known[model]


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's `forward` has an argument of a name, or hands it to a base model whose has."""
    parameters = inspect.signature(model.forward).parameters
    inner: nn.Module = getattr(model, "base_model", model)
    handed = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return name in parameters or (handed and name in inspect.signature(inner.forward).parameters)


@torch.no_grad()
def _asked(model: nn.Module) -> Layout:
    config, device = at(model, "config"), next(model.parameters()).device
    entries = min(len(at(model, "get_input_embeddings")().weight), 1000)
    ids_BL = (torch.arange(FIRST + SECOND, device=device)[None] * 7 + 3) % entries
    pad = getattr(config, "pad_token_id", None)
    if pad is not None:  # which some models take for the end of what there is
        ids_BL = torch.where(ids_BL == pad, (pad + 1) % entries, ids_BL)
    more: Arguments = {"decoder_input_ids": ids_BL} if getattr(config, "is_encoder_decoder", False) else {}
    with _at_rest(model):
        logits_BLV = model(input_ids=ids_BL, **more).logits
        shown = _head(model, logits_BLV, captured(model, input_ids=ids_BL, **more))
        if more:
            return shown
        parts = ids_BL.split((FIRST, SECOND), dim=1)
        apart_BLV = torch.cat([model(input_ids=part_BL).logits for part_BL in parts], 1)
        document_BL = torch.tensor([[1] * FIRST + [2] * SECOND], device=device)
        position_BL = torch.cat([torch.arange(n, device=device) for n in (FIRST, SECOND)])[None]
        for first in (0, *([] if pad is None else [pad + 1])):  # RoBERTa's positions begin after its padding's number
            try:
                inputs = packed_inputs(model, document_BL, position_BL + first, causal=causal(model))
                if _near(model(input_ids=ids_BL, **inputs).logits, apart_BLV):
                    return replace(shown, first=first)
            except Exception:  # whatever a model makes of a mask that is not for it
                continue
        _check_padding(model, parts[0], apart_BLV[:, :FIRST])
    return shown


def _check_padding(model: nn.Module, ids_BL: Tensor, logits_BLV: Tensor) -> None:
    """Say where what stands beside a text changes what the model makes of it."""
    padded_BL, mask_BL = F.pad(ids_BL, (0, SECOND)), F.pad(torch.ones_like(ids_BL), (0, SECOND))
    if not _near(model(input_ids=padded_BL, attention_mask=mask_BL).logits[:, :FIRST], logits_BLV):
        kind = at(model, "config.model_type")
        warn(f"model type {kind!r}: what it makes of a document changes a little with the padding beside it")


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Without dropout, autocast, or counting of what is done here."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False), _disable_current_modes():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _near(a: Tensor, b: Tensor) -> bool:
    """Whether they agree up to rounding."""
    near = max(NEAR[a.dtype], NEAR[b.dtype])
    return bool((a.float() - b.float()).abs().max() <= near * b.float().abs().max())


def causal(model: nn.Module) -> bool:
    """Whether a position sees only those before it, by what `transformers`, or `auto_map`, has of the type."""
    config, code = at(model, "config"), brought(model)
    if code is not None:
        names = [each.rpartition(".")[2] for each in code.classes.get("AutoModelForCausalLM", ())]
        return type(model).__name__ in names or bool(getattr(config, "is_decoder", False))
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        if type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING:
            return True
        decodes = type(model).__name__.endswith("ForCausalLM") or getattr(config, "is_decoder", False)
        return bool(decodes or getattr(config, "causal", False))
    return bool(getattr(config, "is_decoder", False))


def _head(model: nn.Module, logits_BLV: Tensor, hidden_BLE: Tensor) -> Layout:
    """What makes the head's linear layer give the logits."""
    layer, config = at(model, "get_output_embeddings")(), at(model, "config")
    plain_BLV, vocabulary = F.linear(hidden_BLE, widened(layer)), len(layer.weight)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    beside = [name for name, x in tensors if x.numel() == vocabulary and name.endswith("bias")]
    caps = [None, *filter(None, (getattr(config, name, None) for name in CAPS))]
    same = hidden_BLE.shape[:-1] == logits_BLV.shape[:-1]
    for scale, cap, bias in product((1.0, *_scales(config)), caps, (None, *beside)) if same else ():
        made_BLV = scale * plain_BLV
        bias_V = _bias(model, bias)
        if bias_V is not None:
            made_BLV = made_BLV + bias_V
        if _near(made_BLV if cap is None else cap * torch.tanh(made_BLV / cap), logits_BLV):
            return Layout(None, scale, cap, bias)
    raise PretrainError(
        f"model type {config.model_type!r}: its logits are not those of a linear layer of its last states, nor scaled "
        "or capped ones; accepted: a model whose are"
    )


def _scales(config: object) -> list[float]:
    """By what models multiply their logits, by the names that configurations have for it."""
    times, over = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return [*([float(times)] if times else []), *([1 / float(over)] if over else [])]


def _bias(model: nn.Module, beside: str | None) -> Tensor | None:
    """The head's bias: its layer's, unless another is named that the model adds itself."""
    layer = at(model, "get_output_embeddings")()
    return getattr(layer, "bias", None) if beside is None else at(model, beside).flatten()


def output_bias(model: nn.Module) -> Tensor | None:
    """`bias_V` of the logits, wherever the model holds it."""
    return _bias(model, layout(model).bias)


def captured(model: nn.Module, **inputs: Any) -> Tensor:
    """The states that the head's linear layer is given when the model's own `forward` runs; it makes no logits."""
    layer: nn.Module | None = at(model, "get_output_embeddings")()
    if layer is None:
        raise PretrainError(
            f"{type(model).__name__} has no language-model head; accepted: a causal, masked or seq2seq LM"
        )
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught.append(args[0])
        return (args[0][..., :0, :], *args[1:])

    handle = layer.register_forward_pre_hook(catch)
    try:
        model(**inputs)
    finally:
        handle.remove()
    if caught:
        return caught[0]
    raise PretrainError(
        f"model type {at(model, 'config.model_type')!r}: its forward pass does not use its output layer; "
        "accepted: a model that does"
    )


def packed_inputs(
    model: nn.Module, document_BL: Tensor, position_BL: Tensor, *, causal: bool, prefix_BL: Tensor | None = None
) -> Arguments:
    """The arguments with which a model of one stack keeps the documents of a row apart."""
    mask_B1LL = document_mask(document_BL, causal=causal, prefix_BL=prefix_BL)
    return masked_inputs(model, mask_B1LL, position_BL, causal=causal)


def masked_inputs(model: nn.Module, mask_B1LL: Tensor, position_BL: Tensor, *, causal: bool) -> Arguments:
    """The arguments for a boolean mask: a sliding window inside it, for the layers that have one."""
    config = at(model, "config")
    dtype = at(model, "get_input_embeddings")().weight.dtype
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())

    def windowed(window: int | None) -> Tensor:
        allowed_B1LL = mask_B1LL
        if window is not None:
            distance_B1LL = (position_BL[:, :, None] - position_BL[:, None, :])[:, None]
            allowed_B1LL = mask_B1LL & (distance_B1LL < window if causal else distance_B1LL.abs() <= window)
        return additive(allowed_B1LL, dtype)

    inputs: Arguments = {"use_cache": False} if causal and accepts(model, "use_cache") else {}
    if accepts(model, "position_ids"):
        inputs["position_ids"] = position_BL
    if window is not None and "sliding_attention" in kinds:
        masks: Mapping[str, Tensor] = {
            kind: windowed(window if kind == "sliding_attention" else None) for kind in sorted(kinds)
        }
        return inputs | {"attention_mask": masks}
    return inputs | {"attention_mask": windowed(None if kinds else window)}
