"""Families: where a model's blocks, attention, feed-forward, norms, embeddings and head are.

One entry of `FAMILIES` describes a family; what `transformers` already answers (embeddings, output layer, base model)
is asked of it. A model of no family is an error that lists those there are.

Shape letters: B rows, L positions, E width, V vocabulary.
"""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pretrain.core.errors import PretrainError, unknown


@dataclass(frozen=True)
class Family:
    """Paths are relative to the base model (`blocks`, `final_norm`) or to one block (the rest)."""

    name: str
    types: tuple[str, ...]  # `config.model_type` of its members
    blocks: str
    attention: str
    queries: tuple[str, ...]  # projections to queries, keys, values: one when fused
    output: str
    feed_forward: str
    up: tuple[str, ...]  # the gate first where there is one; one name when fused
    down: str
    norms: tuple[str, ...]  # before attention, before the feed-forward
    final_norm: str | None
    positions: str | None = None  # the table of absolute positions
    causal: bool = True
    decoder_blocks: str | None = None  # encoder-decoders: `blocks` are the encoder's
    head_transform: str | None = None  # what stands between the base model and the head's linear


FAMILIES = (
    Family(
        "llama", ("llama", "mistral", "qwen2", "qwen3"),
        "layers", "self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj",
        "mlp", ("gate_proj", "up_proj"), "down_proj", ("input_layernorm", "post_attention_layernorm"), "norm",
    ),
    Family(
        "gpt2", ("gpt2",), "h", "attn", ("c_attn",), "c_proj",
        "mlp", ("c_fc",), "c_proj", ("ln_1", "ln_2"), "ln_f", positions="wpe",
    ),
    Family(
        "bert", ("bert",), "encoder.layer", "attention", ("self.query", "self.key", "self.value"), "output.dense",
        "", ("intermediate.dense",), "output.dense", ("attention.output.LayerNorm", "output.LayerNorm"), None,
        positions="embeddings.position_embeddings", causal=False, head_transform="cls.predictions.transform",
    ),
    Family(
        "modernbert", ("modernbert",), "layers", "attn", ("Wqkv",), "Wo",
        "mlp", ("Wi",), "Wo", ("attn_norm", "mlp_norm"), "final_norm", causal=False, head_transform="head",
    ),
    Family(
        "t5", ("t5",), "encoder.block", "layer.0.SelfAttention", ("q", "k", "v"), "o",
        "layer.-1.DenseReluDense", ("wi", "wi_0", "wi_1"), "wo", ("layer.0.layer_norm", "layer.-1.layer_norm"),
        "encoder.final_layer_norm", causal=False, decoder_blocks="decoder.block",
    ),
)  # fmt: skip
TASKS = {"causal": "CausalLM", "masked": "MaskedLM", "seq2seq": "Seq2SeqLM", "base": ""}


def family(model: nn.Module) -> Family:
    """The model's family."""
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    for entry in FAMILIES:
        if model_type in entry.types:
            return entry
    raise unknown("model family", model_type, [t for entry in FAMILIES for t in entry.types])


def at(module: nn.Module, path: str) -> Any:
    """The submodule at a dotted path; numbers index into lists, from the end when negative."""
    for name in filter(None, path.split(".")):
        module = module[int(name)] if name.lstrip("-").isdigit() else getattr(module, name)  # type: ignore[index]
    return module


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the one of that qualified name is."""
    parent, _, last = name.rpartition(".")
    setattr(at(model, parent), last, module)


def base(model: nn.Module) -> nn.Module:
    """The model without its head."""
    return getattr(model, "base_model", model)


def blocks(model: nn.Module, side: str = "encoder") -> list[nn.Module]:
    """The transformer blocks in order; of an encoder-decoder those of one `side`."""
    entry = family(model)
    path = entry.decoder_blocks if side == "decoder" and entry.decoder_blocks else entry.blocks
    return list(at(base(model), path))


def linears(model: nn.Module, where: str = "all") -> dict[str, nn.Module]:
    """The weight matrices of the blocks by qualified name: of `attention`, `feed_forward`, or `all`."""
    if where not in ("attention", "feed_forward", "all"):
        raise unknown("place of linear layers", where, ("attention", "feed_forward", "all"))
    entry, inside = family(model), {id(m) for block in _all_blocks(model) for m in block.modules()}
    found = {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside and (isinstance(module, nn.Linear | Conv1D) or hasattr(module, "linear_like"))
    }
    if where == "all":
        return found
    names = {"attention"} if entry.name == "bert" else {entry.attention.split(".")[-1], "EncDecAttention"}
    in_attention = {n for n in found if names & set(n.split("."))}
    return {n: m for n, m in found.items() if (n in in_attention) == (where == "attention")}


def _all_blocks(model: nn.Module) -> list[nn.Module]:
    entry = family(model)
    return blocks(model) + (blocks(model, "decoder") if entry.decoder_blocks else [])


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """All norms by qualified name."""
    return {n: m for n, m in model.named_modules() if type(m).__name__.endswith(("Norm", "RMSNorm"))}


def embeddings(model: nn.Module) -> nn.Embedding:
    """The token embeddings."""
    return model.get_input_embeddings()  # type: ignore[operator]


def head(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """`weight_VE` and `bias_V` of the linear layer that gives the logits."""
    layer = model.get_output_embeddings()  # type: ignore[operator]
    if layer is None:
        raise PretrainError(
            f"{type(model).__name__} has no language-model head; accepted: a causal, masked or seq2seq LM"
        )
    return layer.weight, layer.bias


def hidden(model: nn.Module, **inputs: Any) -> Tensor:
    """The states that the head's linear layer multiplies: `hidden_BLE @ weight_VE.T + bias_V` are the logits."""
    entry = family(model)
    states_BLE = base(model)(**inputs).last_hidden_state
    if entry.head_transform is not None:
        states_BLE = at(model, entry.head_transform)(states_BLE)
    if getattr(model.config, "scale_decoder_outputs", False):
        states_BLE = states_BLE * model.config.d_model**-0.5  # type: ignore[union-attr, operator]
    return states_BLE


def additive(mask_B1LL: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the numbers that attention adds to its scores: 0 where allowed."""
    return torch.zeros(mask_B1LL.shape, dtype=dtype, device=mask_B1LL.device).masked_fill_(
        ~mask_B1LL, torch.finfo(dtype).min
    )


def attention_inputs(model: nn.Module, mask_B1LL: Tensor, position_BL: Tensor) -> dict[str, Any]:
    """The keyword arguments that make the model attend as the boolean mask says, with positions that restart.

    For decoders and encoders; an encoder-decoder is given its masks by `encode_decode`.
    """
    entry, dtype = family(model), embeddings(model).weight.dtype
    inputs: dict[str, Any] = {"position_ids": position_BL, "attention_mask": additive(mask_B1LL, dtype)}
    if entry.name == "modernbert":
        near = (position_BL[:, :, None] - position_BL[:, None, :]).abs()[:, None] <= model.config.local_attention // 2  # type: ignore[union-attr, operator]
        inputs["attention_mask"] = {
            "full_attention": inputs["attention_mask"],
            "sliding_attention": additive(mask_B1LL & near, dtype),
        }
    elif entry.causal:
        inputs["use_cache"] = False
    return inputs


def encode_decode(
    model: nn.Module, input_ids_BL: Tensor, decoder_ids_BM: Tensor, masks: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """`hidden` of an encoder-decoder: `masks` are the encoder's, the decoder's own and the cross-attention's."""
    dtype = embeddings(model).weight.dtype
    encoder_mask, decoder_mask, cross_mask = (additive(mask, dtype) for mask in masks)
    encoded_BLE = model.get_encoder()(input_ids=input_ids_BL, attention_mask=encoder_mask).last_hidden_state  # type: ignore[operator]
    states_BME = model.get_decoder()(  # type: ignore[operator]
        input_ids=decoder_ids_BM, attention_mask=decoder_mask, encoder_hidden_states=encoded_BLE,
        encoder_attention_mask=cross_mask, use_cache=False,
    ).last_hidden_state  # fmt: skip
    scaled = getattr(model.config, "scale_decoder_outputs", False)
    return states_BME * model.config.d_model**-0.5 if scaled else states_BME  # type: ignore[union-attr, operator]


def new_config(model_type: str, fields: dict[str, Any]) -> PreTrainedConfig:
    """A `transformers` configuration from its type and fields; an unknown one of either is an error."""
    try:
        known = _config_fields(model_type)
    except ValueError as error:
        raise unknown("model family", model_type, [t for entry in FAMILIES for t in entry.types]) from error
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise PretrainError(f"unknown field {name!r} of model family {model_type!r}{hint}")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:
        raise PretrainError(f"model family {model_type!r}: {' '.join(str(error).split())}") from error


@functools.cache
def _config_fields(model_type: str) -> frozenset[str]:
    blank = AutoConfig.for_model(model_type)
    return frozenset(blank.to_dict()) | frozenset(blank.attribute_map)


def new_model(
    model_type: str, fields: dict[str, Any], *, task: str = "causal", vocabulary: Any = None, seed: int = 0
) -> PreTrainedModel:
    """A model with random weights. `vocabulary` (`core.batch.Vocabulary`) sets the size and the special ids."""
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    fields = dict(fields)
    if vocabulary is not None:
        ids = {"pad_token_id": vocabulary.pad, "bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.eos}
        known = _config_fields(model_type)
        fields = {"vocab_size": vocabulary.size} | {k: v for k, v in ids.items() if k in known} | fields
    config = new_config(model_type, fields)
    if task == "seq2seq" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id
    auto = getattr(transformers, f"AutoModelFor{TASKS[task]}" if TASKS[task] else "AutoModel")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return auto.from_config(config, attn_implementation="sdpa")
        except (ValueError, ZeroDivisionError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise PretrainError(f"model family {model_type!r} as {task} model: {reason}") from error
