"""Families: where a model's blocks, attention, feed-forward, norms, embeddings and head are.

One entry of `FAMILIES` describes a family; what `transformers` already answers (embeddings, output layer, base model)
is asked of it. A model that no entry describes is asked itself (`unlisted`): how documents share its rows, what its
logits follow from, where its blocks are.

Shape letters: B rows, L positions, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from pretrain.core.batch import Batch, document_mask, exact
from pretrain.core.batch import additive as additive
from pretrain.core.errors import PretrainError, unknown
from pretrain.core.foreign.code import brought
from pretrain.core.models.initial import check_task as check_task
from pretrain.core.models.initial import config_fields as config_fields
from pretrain.core.models.initial import model_for as model_for
from pretrain.core.models.initial import new_config as new_config
from pretrain.core.models.initial import new_model as new_model
from pretrain.core.models.layers import Arguments as Arguments
from pretrain.core.models.layers import at as at
from pretrain.core.models.storage import widened
from pretrain.core.models.unlisted.apart import Apart, captured_apart
from pretrain.core.models.unlisted.blocks import derived, mixers
from pretrain.core.models.unlisted.layout import accepts, captured, layout, masked_inputs, output_bias
from pretrain.core.quick.positions import positions
from pretrain.core.quick.table import FAMILIES as FAMILIES
from pretrain.core.quick.table import Family as Family
from pretrain.core.quick.table import listed

M = TypeVar("M")  # a mask of any kind
_MASKS = ("attention_mask", "decoder_attention_mask", "cross_attention_mask")  # of an encoder-decoder


def family(model: nn.Module) -> Family:
    """The model's family; of a type that no entry has, what its modules tell."""
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if brought(model):  # whatever type it names
        return derived(model)
    entry = listed(model_type)
    if entry is None and model_type not in CONFIG_MAPPING:
        raise unknown("model family", model_type, [t for entry in FAMILIES for t in entry.types])
    return entry or derived(model)


def in_table(model: nn.Module) -> bool:
    """Whether a family of `FAMILIES` describes the model."""
    return not brought(model) and listed(at(model, "config").model_type) is not None


def apart(model: nn.Module) -> bool:
    """Whether the documents of packed rows are given to the model in rows of their own."""
    if in_table(model) or vocabulary_of(cast("PreTrainedModel", model)) is None:
        return False
    with suppress(PretrainError):  # of a model that reads something else, or no rows: nothing lays them out
        return at(model, "get_output_embeddings")() is not None and not layout(model).packs
    return False


def is_causal(model: nn.Module) -> bool:
    """Whether a position sees only those before it, of any model."""
    return family(model).causal


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the one of that qualified name is."""
    parent, _, last = name.rpartition(".")
    setattr(at(model, parent), last, module)


def base(model: nn.Module) -> nn.Module:
    """The model without its head."""
    return getattr(model, "base_model", model)


def blocks(model: nn.Module, side: str = "encoder") -> list[nn.Module]:
    """The transformer blocks in order; of an encoder-decoder those of one `side`, "encoder" or "decoder"."""
    if side not in ("encoder", "decoder"):
        raise unknown("side of the model", side, ("encoder", "decoder"))
    entry = family(model)
    if brought(model):
        raise PretrainError(
            f"model type {at(model, 'config').model_type!r} is made by code of its checkpoint, whose blocks nobody "
            "describes; accepted: a type of transformers"
        )
    path = entry.decoder_blocks if side == "decoder" and entry.decoder_blocks else entry.blocks
    if not path:
        raise PretrainError(f"model type {entry.name!r}: no list of blocks in {type(base(model)).__name__}")
    return list(at(base(model), path))


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """What is compiled and sharded one by one: the family's blocks, or what the model's class says not to split.

    Where the class says nothing they are its layers whose activations can be recomputed; a model without any of them is
    one piece, and the list is empty.
    """
    if in_table(model):
        return blocks(model)
    names = set(getattr(model, "_no_split_modules", None) or ())
    modules = [m for m in model.modules() if type(m).__name__ in names or (not names and _recomputable(m))]
    inner = {id(part) for module in modules for part in module.modules() if part is not module}
    return [module for module in modules if id(module) not in inner]


def _recomputable(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def linears(model: nn.Module, where: str = "all") -> dict[str, nn.Module]:
    """The weight matrices of the blocks by qualified name: of `attention`, `feed_forward`, or `all`."""
    if where not in ("attention", "feed_forward", "all"):
        raise unknown("place of linear layers", where, ("attention", "feed_forward", "all"))
    entry, inside = family(model), {id(m) for block in _all_blocks(model) for m in block.modules()}
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        linear = is_linear(module) or hasattr(module, "linear_like")
        around = accumulate(name.split("."), "{}.{}".format)  # what is made of linear layers is one, and comes first
        if linear and id(module) in inside and not any(other in layers for other in around):
            parent, _, last = name.rpartition(".")
            # A state-space mixer reads the weights of its other layers itself, past whatever stands in their place.
            if not hasattr(at(model, parent), "A_log") or last.startswith("in_proj"):
                layers[name] = module
    if where == "all":
        return layers
    if in_table(model):
        names = {"attention"} if entry.name == "bert" else {entry.attention.split(".")[-1], "EncDecAttention"}
        in_attention = {n for n in layers if names & set(n.split("."))}
    else:
        mixing = {id(m) for block in _all_blocks(model) for path in mixers(block) for m in at(block, path).modules()}
        in_attention = {n for n, layer in layers.items() if id(layer) in mixing}
    return {n: m for n, m in layers.items() if (n in in_attention) == (where == "attention")}


def is_linear(module: nn.Module) -> bool:
    """Whether it is a weight matrix and no more: a router of experts is made of one, and answers something else."""
    return isinstance(module, nn.Linear | Conv1D) and "Router" not in type(module).__name__


def _all_blocks(model: nn.Module) -> list[nn.Module]:
    entry = family(model)
    if brought(model):
        return [block for path in (entry.blocks, entry.decoder_blocks) if path for block in at(base(model), path)]
    return blocks(model) + (blocks(model, "decoder") if entry.decoder_blocks else [])


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """All norms by qualified name."""
    return {n: m for n, m in model.named_modules() if type(m).__name__.endswith(("Norm", "RMSNorm"))}


def embeddings(model: nn.Module) -> nn.Embedding:
    """The token embeddings."""
    layer: nn.Embedding = at(model, "get_input_embeddings")()
    return layer


def vocabulary_of(model: PreTrainedModel) -> int | None:
    """How many entries the table of token embeddings has; None for a model that reads no tokens."""
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # what transformers raises of series, speech, images
        return None
    count = getattr(table, "num_embeddings", None)
    return count if isinstance(count, int) else None


def positions_of(model: nn.Module) -> int | None:
    """The most tokens that the model can tell apart by their places; None where it has no limit."""
    config = at(model, "config")
    names = ("model_type", "pad_token_id", "max_position_embeddings")
    return positions({name: getattr(config, name, None) for name in names})


def head(model: nn.Module, *, capped: bool = False) -> tuple[Tensor, Tensor | None]:
    """`weight_VE` and `bias_V` of the linear layer that gives the logits.

    Whoever applies `softcap` to what they give says so with `capped`; others are refused models that have one.
    """
    layer = at(model, "get_output_embeddings")()
    if layer is None:
        raise PretrainError(
            f"{type(model).__name__} has no language-model head; accepted: a causal, masked or seq2seq LM"
        )
    if not capped and softcap(model) is not None:
        raise PretrainError(f"logits capped at {softcap(model)}: accepted here: a model without logit_softcap")
    return widened(layer), layer.bias if in_table(model) else output_bias(model)


def softcap(model: nn.Module) -> float | None:
    """c of a model whose logits are c · tanh(z / c) of its head's z."""
    cap: float | None = getattr(at(model, "get_output_embeddings")(), "softcap", None)
    return cap if in_table(model) else layout(model).softcap


def hidden(model: nn.Module, **inputs: Any) -> Tensor:
    """The states that the head's linear layer multiplies: `hidden_BLE @ weight_VE.T + bias_V` are the logits.

    Of a model without a language-model head, its last states. An encoder-decoder takes `input_ids`,
    `decoder_input_ids` and the masks that `attention_inputs` gives, and answers for the decoder's positions.
    """
    if not in_table(model):
        return _shown(model, **inputs)
    entry, headed = family(model), at(model, "get_output_embeddings")() is not None
    states_BLE = _decoded(model, **inputs) if entry.decoder_blocks else base(model)(**inputs).last_hidden_state
    if entry.head_transform is not None and headed:
        states_BLE = at(model, entry.head_transform)(states_BLE)
    if getattr(model.config, "scale_decoder_outputs", False) and headed:
        states_BLE = states_BLE * at(model, "config.d_model") ** -0.5
    return states_BLE


def _shown(model: nn.Module, *, documents: tuple[Tensor, ...] | None = None, **inputs: Any) -> Tensor:
    """`hidden` of a model that no entry describes; `documents` are those of rows in which it cannot keep them apart."""
    if at(model, "get_output_embeddings")() is None:
        return base(model)(**inputs).last_hidden_state
    states_BLE = captured(model, **inputs) if documents is None else captured_apart(model, documents, **inputs)
    scale = layout(model).scale
    return states_BLE if scale == 1 else states_BLE * scale


def _decoded(
    model: nn.Module, *, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None, cross_attention_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The decoder's last states; unlike the model's own `forward` this can give cross-attention a mask of its own."""
    if cross_attention_mask is None:
        if attention_mask is not None and attention_mask.ndim == 4:
            raise PretrainError("packed documents in an encoder-decoder need a cross_attention_mask as well")
        cross_attention_mask = attention_mask
    encoder, decoder = at(model, "get_encoder")(), at(model, "get_decoder")()
    encoded_BLE = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return decoder(
        input_ids=decoder_input_ids, attention_mask=decoder_attention_mask, encoder_hidden_states=encoded_BLE,
        encoder_attention_mask=cross_attention_mask, use_cache=False,
    ).last_hidden_state  # fmt: skip


def encode_decode(
    model: nn.Module, input_ids_BL: Tensor, decoder_ids_BM: Tensor, document_BL: Tensor, owner_BM: Tensor,
    sizes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`hidden` of an encoder-decoder: documents of its rows, and whose the decoder's positions are, see only their own.

    `sizes` as `core.batch.spread` gives them, where they are known.
    """
    if not in_table(model):
        more = () if sizes is None else (sizes,)
        return hidden(
            model, input_ids=input_ids_BL, decoder_input_ids=decoder_ids_BM, documents=(document_BL, owner_BM, *more)
        )
    cross_B1ML = (owner_BM[:, :, None] == document_BL[:, None, :])[:, None]
    masks = document_mask(document_BL, causal=False), document_mask(owner_BM, causal=True), cross_B1ML
    dtype = embeddings(model).weight.dtype
    given = {name: additive(mask, dtype) for name, mask in zip(_MASKS, masks, strict=True)}
    return hidden(model, input_ids=input_ids_BL, decoder_input_ids=decoder_ids_BM, **given)


def attention_inputs(
    model: nn.Module, mask_B1LL: Tensor, position_BL: Tensor, *,
    decoder_B1MM: Tensor | None = None, cross_B1ML: Tensor | None = None,
) -> Arguments:  # fmt: skip
    """The keyword arguments that make the model attend as the boolean masks say, with positions that restart.

    A model with a sliding window keeps it inside each document. An encoder-decoder, whose positions are relative, needs
    the decoder's and the cross-attention's masks too; its arguments are for `hidden`.
    """
    entry, dtype = family(model), embeddings(model).weight.dtype
    if not in_table(model):
        if entry.decoder_blocks or not layout(model).packs:
            raise PretrainError(
                f"model type {entry.name!r}: it takes no mask that keeps the documents of a row apart; accepted: one "
                "that does"
            )
        return masked_inputs(model, mask_B1LL, position_BL + (layout(model).first or 0), causal=entry.causal)
    if entry.decoder_blocks:
        if decoder_B1MM is None or cross_B1ML is None:
            raise PretrainError(f"model family {entry.name!r} needs three masks: decoder_B1MM and cross_B1ML as well")
        masks = dict(zip(_MASKS, (mask_B1LL, decoder_B1MM, cross_B1ML), strict=True))
        return {name: additive(mask, dtype) for name, mask in masks.items()}

    def windowed(window: int | None) -> Tensor:
        if window is None:
            return additive(mask_B1LL, dtype)
        distance_B1LL = (position_BL[:, :, None] - position_BL[:, None, :])[:, None]
        near_B1LL = distance_B1LL < window if entry.causal else distance_B1LL.abs() <= window
        return additive(mask_B1LL & near_B1LL, dtype)

    return with_windows(model, position_BL, windowed)


def with_windows(model: nn.Module, position_BL: Tensor, make: Callable[[int | None], M]) -> Arguments:
    """The arguments of a model of one stack: `make(window)` gives the mask of layers with that sliding window, or none.

    A causal model's window reaches back so many positions, itself included; another's so many to both sides.
    """
    config: PreTrainedConfig = at(model, "config")
    inputs: Arguments = {"position_ids": position_BL}
    window = getattr(config, "sliding_window", None)
    if window is not None and config.model_type != "mistral" and "sliding_attention" in config.layer_types:
        inputs["attention_mask"] = {"full_attention": make(None), "sliding_attention": make(window)}
    else:  # all of Mistral's layers have the window
        inputs["attention_mask"] = make(window if config.model_type == "mistral" else None)
    if family(model).causal:
        inputs["use_cache"] = False  # nothing is generated, and a cache costs memory
    return inputs


def separated(model: PreTrainedModel, batch: Batch) -> Batch:
    """A calibration batch whose rows hold one document each, where the model cannot keep several apart."""
    if not apart(model) or "attention_mask" not in batch:
        return batch
    document_BL = batch["attention_mask"]
    inner = Apart(document_BL, exact(document_BL.cpu().numpy()))
    ids_DM = inner.to_rows(batch["input_ids"], getattr(model.config, "pad_token_id", None) or 0)
    return {"input_ids": ids_DM, "attention_mask": inner.mask()}


def model_inputs(model: PreTrainedModel, batch: Batch) -> Arguments:
    """A calibration batch as the base model's arguments: documents that share a row do not see one another."""
    if apart(model):
        batch = separated(model, batch)
        alone: Arguments = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        return alone | ({"use_cache": False} if accepts(base(model), "use_cache") else {})
    ids_BL = batch["input_ids"].to(model.device)
    document_BL = batch.get("attention_mask", torch.ones_like(ids_BL)).to(model.device)
    position_BL = batch.get("position_ids", torch.arange(ids_BL.shape[1]).expand_as(ids_BL)).to(model.device)
    if document_BL.shape != ids_BL.shape:
        shape, wanted = tuple(document_BL.shape), tuple(ids_BL.shape)
        raise PretrainError(f"calibration batch: attention_mask of shape {shape}: accepted: {wanted}, as input_ids")
    mask_B1LL = document_mask(document_BL, causal=family(model).causal)
    return {"input_ids": ids_BL} | attention_inputs(model, mask_B1LL, position_BL)
