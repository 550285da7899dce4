"""What a configuration does not say of its model type: which have gates, tables of positions, the layout of BERT.

Mixtures of experts say it themselves, in names of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# A feed-forward of three matrices, besides those of `shapes.GATED` and the mixtures of experts.
GATED = {
    "gemma", "gemma2", "gemma3_text", "phi3", "olmo", "olmo2", "olmo3", "smollm3", "stablelm", "cohere", "cohere2",
    "granite", "glm", "glm4", "helium", "exaone4", "seed_oss", "ministral", "ministral3", "diffllama", "bitnet",
    "ernie4_5", "eurobert", "nomic_bert", "modernbert-decoder", "lfm2", "falcon_h1", "bamba", "jamba",
    "granitemoehybrid",
}  # fmt: skip
# As BERT: norms after each half, biases, a matrix before the head.
ENCODERS = {
    "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "deberta", "deberta-v2", "mpnet", "rembert",
    "megatron-bert", "ernie", "data2vec-text", "roberta-prelayernorm", "layoutlm", "roformer", "longformer", "ibert",
}  # fmt: skip
# A learned vector for each position, of both sides where there are two.
POSITIONS = (ENCODERS - {"roformer"}) | {
    "opt", "gpt_neo", "biogpt", "openai-gpt", "gpt_bigcode", "albert", "esm", "bart", "mbart", "plbart", "mvp",
    "led",
}  # fmt: skip
# Blocks without attention, of which nothing is known here.
OTHERS = {"mamba", "mamba2", "falcon_mamba", "recurrent_gemma"}
_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_k")
_SHARED = ("n_shared_experts", "moe_num_shared_experts")

Number = Callable[..., int]  # the first field of these names that is a number; 0 where none is


@dataclass(frozen=True)
class Mixture:
    """The feed-forwards of a model of which each token passes a part."""

    intermediate: int  # the width that a token passes, the mean over the blocks
    dormant: int  # all weights of experts that a token does not pass, and the routers'


def mixture_of(number: Number, dense_layers: int, width: int, depth: int, intermediate: int) -> Mixture | None:
    """The mixture that a configuration describes; None where it has none.

    `dense_layers` are those that it names one by one; others it has by a count or a period.
    """
    experts, chosen = number(*_EXPERTS), number(*_CHOSEN)
    if not experts or not chosen:
        return None
    inner = number("moe_intermediate_size") or intermediate
    shared = number("shared_expert_intermediate_size", "shared_intermediate_size") or number(*_SHARED) * inner
    period = number("decoder_sparse_step", "expert_layer_period", "moe_layer_interval") or 1
    sparse = len([i for i in range(depth) if i % period == period - 1])
    sparse = max(0, sparse - number("first_k_dense_replace", "moe_layer_start_index") - dense_layers)
    passed = sparse * (chosen * inner + shared) + (depth - sparse) * intermediate
    dormant = sparse * ((experts - chosen) * 3 * width * inner + experts * width)
    return Mixture(round(passed / depth), dormant)
