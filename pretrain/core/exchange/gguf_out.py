"""A checkpoint as a GGUF file, for llama.cpp and what is built on it: Llama's kind and GPT-2, with byte-level BPE.

llama.cpp turns pairs of neighbouring values by position where transformers turns halves: of Llama's queries and keys
the rows are put in that order (for a head of width D, row 2i + j comes from row jD/2 + i). GPT-2's matrices are stored
by outputs. Matrices are stored in the type that is asked for, in float16 where their rows are no whole blocks of it;
what has one dimension, and tables of positions, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core.encoding import encoded
from pretrain.core.errors import PretrainError
from pretrain.core.exchange.gguf_in import read_gguf
from pretrain.core.exchange.task import Export
from pretrain.core.files import JSONObject
from pretrain.core.foreign import json
from pretrain.core.foreign.gguf import header, splitting
from pretrain.core.processors import tokenizer_in

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

NAME = "model.gguf"
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}
BLOCK = 32  # values of Q8_0 that share a scale
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5  # types of tokens
PROBE, LENGTH = 4, 32  # rows and tokens on which logits are compared


def write(given: Export, work: Path) -> JSONObject:
    """Write `model.gguf`, read it back, and compare the logits of a few random rows with those of the rounded model."""
    import gguf

    model, config = given.model.float(), given.model.config
    tokenizer = tokenizer_in(given.processor)
    _check(given.source, model)
    vocabulary = _vocabulary(given.source, tokenizer, config.vocab_size) if tokenizer is not None else None
    writer = gguf.GGUFWriter(work / NAME, ARCHITECTURES[config.model_type])
    _describe(writer, config)
    if tokenizer is not None and vocabulary is not None:
        _name_tokens(writer, tokenizer, vocabulary)
    kinds: dict[str, int] = {}
    ids_BL = torch.randint(0, config.vocab_size, (PROBE, min(LENGTH, _positions(config))), generator=torch.Generator())
    whole_BLV = _logits(model, ids_BL)
    for name, parameter, weight in _tensors(model):
        kind = _kind(name, weight, given.numbers)
        packed = gguf.quantize(weight, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        kinds[kind.name] = kinds.get(kind.name, 0) + 1
        parameter.data = torch.from_numpy(_placed(model, name, gguf.dequantize(packed, kind)).copy())
    writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[given.numbers])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again, its = read_gguf(work / NAME, header(work / NAME))
    rounded_BLV, read_BLV = _logits(model, ids_BL), _logits(again.float(), ids_BL)
    off, span = float((rounded_BLV - read_BLV).abs().max()), float(rounded_BLV.abs().max())
    if not off <= 64 * torch.finfo(torch.float32).eps * max(1.0, span):
        raise PretrainError(f"{given.source}: the GGUF file answers otherwise: logits are off by {off:.3g}")
    _check_tokens(given.source, tokenizer, its)
    return {
        "types": kinds, "logits_off": off, "logits_span": span,
        "logits_off_by_rounding": float((whole_BLV - read_BLV).abs().max()),
    }  # fmt: skip


def _check(source: Path, model: PreTrainedModel) -> None:
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    odd = {
        f"model_type {config.model_type!r}": config.model_type not in ARCHITECTURES,
        "quantization_config": getattr(config, "quantization_config", None) is not None,
        f"rope_type {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default",
        "attention_bias": config.model_type != "qwen2" and bool(getattr(config, "attention_bias", False)),
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "sliding_window": config.model_type == "mistral" and bool(config.sliding_window),
        f"{type(model).__name__}": not model.can_generate(),
    }
    wrong = next((name for name, is_odd in odd.items() if is_odd), None)
    if wrong:
        raise PretrainError(
            f"{source}: {wrong}: accepted, for GGUF: models that continue text, of {', '.join(ARCHITECTURES)}, with "
            "plain rotary positions, without biases, unpacked"
            + ("; a surgery with `pack: false` leaves one so" if wrong == "quantization_config" else "")
        )


def _positions(config: PreTrainedConfig) -> int:
    return int(getattr(config, "max_position_embeddings", None) or config.n_positions)


def _describe(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    """The sizes under llama.cpp's names."""
    writer.add_name(str(getattr(config, "name_or_path", "") or config.model_type))
    writer.add_context_length(_positions(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Parameter, NDArray[np.float32]]]:
    """Each parameter with its name and values in the file; tied ones once."""
    import gguf

    config = model.config
    architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == ARCHITECTURES[config.model_type])
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        stem, _, part = name.rpartition(".")
        theirs = table.get_name(stem)
        if theirs is None:
            raise PretrainError(f"{name} has no name in GGUF for {config.model_type}; accepted: a model without it")
        values = parameter.detach().numpy()
        yield f"{theirs}.{part}", parameter, np.ascontiguousarray(_placed(model, f"{theirs}.{part}", values, out=True))


def _placed(
    model: PreTrainedModel, name: str, values: NDArray[np.float32], *, out: bool = False
) -> NDArray[np.float32]:
    """A tensor with its rows where the file has them, or with `out` false back where the model has them."""
    config = model.config
    if config.model_type == "gpt2" and values.ndim == 2 and name.startswith("blk."):
        return values.T
    if ARCHITECTURES[config.model_type] == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        half = values.shape[0] // heads // 2
        sizes = (heads, 2, half) if out else (heads, half, 2)
        return values.reshape(*sizes, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    return values


def _kind(name: str, weight: NDArray[np.float32], numbers: str) -> GGMLQuantizationType:
    import gguf

    types = gguf.GGMLQuantizationType
    if weight.ndim < 2 or name.startswith("position_embd") or numbers == "f32":
        return types.F32
    if numbers == "q8_0" and weight.shape[-1] % BLOCK:
        return types.F16
    return {"f16": types.F16, "bf16": types.BF16, "q8_0": types.Q8_0}[numbers]


def _vocabulary(source: Path, tokenizer: PreTrainedTokenizerBase, size: int) -> JSONObject:
    """Tokens by number with their types, merges, and the name of the rule that splits text before them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = json.loads(backend.to_str(), halves=True) if backend is not None else {}
    model = facts.get("model") or {}
    pre = splitting(facts)
    if pre is None:
        raise PretrainError(
            f"{source}: its tokenizer is no byte-level BPE that splits text as GPT-2, SmolLM, Llama 3 or Qwen 2: "
            "accepted: one that does, or a checkpoint without a tokenizer"
        )
    tokens = {number: (token, NORMAL) for token, number in model["vocab"].items()}
    added = facts.get("added_tokens") or []
    tokens |= {entry["id"]: (entry["content"], CONTROL if entry["special"] else USER) for entry in added}
    if max(tokens) >= size:
        raise PretrainError(f"{source}: token {max(tokens)} has no row in the model, which has {size}")
    filled = [tokens.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    return {"tokens": [t for t, _ in filled], "types": [kind for _, kind in filled], "merges": merges, "pre": pre}


def _name_tokens(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocabulary: JSONObject) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if isinstance(number, int):
            getattr(writer, f"add_{name}_token_id")(number)
    framed = encoded(tokenizer, "")["input_ids"]
    writer.add_add_bos_token(bool(framed) and framed[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


@torch.no_grad()
def _logits(model: PreTrainedModel, ids_BL: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=ids_BL, use_cache=False).logits
    return logits


SENTENCE = "Numbers as 1234567, don't  they?\n\n\tdéjà vu: x_1 += 2; 你好 🙂"


def _check_tokens(source: Path, tokenizer: PreTrainedTokenizerBase | None, its: PreTrainedTokenizerBase | None) -> None:
    if tokenizer is None or its is None:
        return
    ours, theirs = (encoded(each, SENTENCE, add_special_tokens=False)["input_ids"] for each in (tokenizer, its))
    if ours != theirs:
        raise PretrainError(f"{source}: the GGUF file's tokenizer splits otherwise: {theirs[:8]}, not {ours[:8]}")
