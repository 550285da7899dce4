"""Tiny models of the types of `transformers`, made from their own configurations: what users come with.

A type whose sizes have names of their own, or do not fit one another, has its fields in `FIELDS`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from pretrain.core.models.families import model_for

ENTRIES, WIDTH, HEADS, BLOCKS, POSITIONS = 96, 32, 4, 2, 512
CAUSAL = [
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "olmo",
    "olmo2",
    "olmo3",
    "smollm3",
    "gpt_neox",
    "gpt_neo",
    "gptj",
    "opt",
    "bloom",
    "falcon",
    "starcoder2",
    "stablelm",
    "cohere",
    "cohere2",
    "granite",
    "glm",
    "glm4",
    "helium",
    "nemotron",
    "persimmon",
    "codegen",
    "gpt_bigcode",
    "mpt",
    "biogpt",
    "xglm",
    "openai-gpt",
    "exaone4",
    "seed_oss",
    "arcee",
    "apertus",
    "nanochat",
    "ministral",
    "diffllama",
    "bitnet",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "phimoe",
    "granitemoe",
    "jetmoe",
    "deepseek_v3",
    "ernie4_5",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "minimax",
    "lfm2",
    "mamba",
    "mamba2",
    "falcon_mamba",
    "falcon_h1",
    "bamba",
    "jamba",
    "recurrent_gemma",
    "qwen3_next",
    "granitemoehybrid",
    "modernbert-decoder",
]
MASKED = [
    "roberta",
    "xlm-roberta",
    "camembert",
    "distilbert",
    "albert",
    "electra",
    "deberta",
    "deberta-v2",
    "mpnet",
    "rembert",
    "roformer",
    "megatron-bert",
    "ernie",
    "data2vec-text",
    "roberta-prelayernorm",
    "esm",
    "eurobert",
    "longformer",
    "nomic_bert",
    "layoutlm",
]
SEQ2SEQ = [
    "mt5",
    "umt5",
    "bart",
    "mbart",
    "pegasus",
    "marian",
    "blenderbot",
    "blenderbot-small",
    "m2m_100",
    "plbart",
    "mvp",
    "led",
    "longt5",
    "switch_transformers",
]
PADDED = ["convbert", "nystromformer", "fnet"]  # encoders whose answers change with the padding beside a text
REFUSED = {"mobilebert": "masked", "prophetnet": "seq2seq"}  # whose logits are not those of a linear layer
TASKS = dict.fromkeys(CAUSAL, "causal") | dict.fromkeys(MASKED, "masked") | dict.fromkeys(SEQ2SEQ, "seq2seq")
_SIZES = {
    ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim", "d_embed"): WIDTH,
    ("num_attention_heads", "n_heads", "n_head", "num_heads"): HEADS,
    ("encoder_attention_heads", "decoder_attention_heads"): HEADS,
    ("num_encoder_attention_heads", "num_decoder_attention_heads"): HEADS,
    ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_decoder_layers"): BLOCKS,
    ("encoder_layers", "decoder_layers", "num_encoder_layers"): BLOCKS,
    ("intermediate_size", "hidden_dim", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"): 2 * WIDTH,
    ("n_inner", "ffn_hidden_size"): 2 * WIDTH,
    ("max_position_embeddings", "n_positions", "max_seq_len"): POSITIONS,
    ("head_dim", "d_kv", "kv_channels"): WIDTH // HEADS, ("num_key_value_heads",): 2, ("vocab_size",): ENTRIES,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"): 4,
    ("num_experts_per_tok", "moe_k"): 2, ("n_shared_experts", "moe_num_shared_experts"): 1,
    ("moe_intermediate_size", "shared_expert_intermediate_size"): WIDTH,
    ("pad_token_id",): 0, ("bos_token_id",): 1, ("eos_token_id",): 2,
}  # fmt: skip
_UNSET = ("num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id", "n_inner", "head_dim")
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
FIELDS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"n_embd": 32, "n_head": 4, "rotary_dim": 8}, "codegen": {"n_embd": 32, "n_head": 4, "rotary_dim": 8},
    "gpt_bigcode": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512},
    "openai-gpt": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "expansion_ratio": 2},
    "deepseek_v3": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    },
    "mamba": {"state_size": 8}, "falcon_mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_h1": _MAMBA2 | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_n_groups": 1},
    "bamba": _MAMBA2 | {"attn_layer_indices": [1]},
    "granitemoehybrid": _MAMBA2 | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 8, "mamba_dt_rank": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "marian": {"decoder_start_token_id": 0, "forced_eos_token_id": 2},
    "gemma2": {"query_pre_attn_scalar": 8},
    "distilbert": {"dim": 32, "n_heads": 4, "hidden_dim": 64, "n_layers": 2},
    "longformer": {"attention_window": 8},
    "esm": {"vocab_size": ENTRIES, "mask_token_id": 3, "token_dropout": False, "hidden_dropout_prob": 0.0},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "mobilebert": {"true_hidden_size": 16, "intra_bottleneck_size": 16, "embedding_size": 16},
    "layoutlm": {"max_2d_position_embeddings": 512},
    "led": {"attention_window": 8, "max_encoder_position_embeddings": 512, "max_decoder_position_embeddings": 512},
    "prophetnet": {"num_buckets": 8, "relative_max_distance": 16},
}  # fmt: skip


def fields(kind: str, **more: Any) -> dict[str, Any]:
    """The fields of a tiny configuration of a model type."""
    blank = AutoConfig.for_model(kind)
    there, given = blank.to_dict(), FIELDS.get(kind, {}) | more
    sizes = {name: size for names, size in _SIZES.items() for name in names}
    small = {
        name: size
        for name, size in sizes.items()
        if (isinstance(there.get(name), int) and not isinstance(there.get(name), bool))
        or (name in there and there[name] is None and name in _UNSET)
    }
    small = {name: size for name, size in small.items() if blank.attribute_map.get(name) not in given}
    return small | given


def make(kind: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A tiny model in evaluation mode; its weights are large enough that what it attends to matters."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(kind, **fields(kind, **more))
        wanted = model_for(config, TASKS.get(kind) or REFUSED.get(kind, "masked"))
        assert wanted is not None
        torch.manual_seed(seed)
        model = wanted._from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
            else:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model
