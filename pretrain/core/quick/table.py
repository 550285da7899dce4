"""The table of families and tasks, and what is said of a model that fits none: needs neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pretrain.core.errors import PretrainError, nearest


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
    unused: tuple[str, ...] = ()  # beginnings of weights in published checkpoints that a language model has no use for

    @property
    def kind(self) -> str:
        """The first three of `KINDS`: what its members are made for."""
        return "seq2seq" if self.decoder_blocks is not None else "causal" if self.causal else "masked"

    def among(self, families: Iterable[str]) -> bool:
        """Whether a method that declares these families, or kinds of them, works on it; none means any."""
        accepted = {*families}
        kinds = {self.name, self.kind, *([] if self in FAMILIES else ["unlisted"])}
        return not accepted or bool(accepted & kinds)


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
        unused=("bert.pooler.", "cls.seq_relationship."),
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
KINDS = {  # of families: a method that names one of them works on any model of the kind
    "causal": "llama", "masked": "bert", "seq2seq": "t5",  # each with a family of it
    "unlisted": None,  # whatever no entry describes
}  # fmt: skip
GENERATING = "generating"  # what an objective asks for that has text written: a seq2seq model, or else a causal one
TASKS = {  # besides them any `AutoModelFor…` of transformers is a task
    "causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "seq2seq": "AutoModelForSeq2SeqLM",
    "base": "AutoModel", "pretraining": "AutoModelForPreTraining",
}  # fmt: skip


def listed(model_type: object) -> Family | None:
    """The entry of a model type; None where there is none."""
    return next((entry for entry in FAMILIES if model_type in entry.types), None)


def accepted_fields(names: Iterable[str]) -> frozenset[str]:
    """The fields of a configuration that a recipe may give."""
    known = {*names}
    known |= {"rope_theta", "rope_scaling"} if "rope_parameters" in known else set()  # the names in older config.json
    return frozenset(known - {"model_type", "transformers_version"})


def unknown_field(name: str, model_type: str, known: Iterable[str]) -> PretrainError:
    """The error for a field that a model type does not have."""
    hint = nearest(name, known)
    return PretrainError(f"unknown field {name!r} of model family {model_type!r}{hint}", place=(name,))


def unknown_type(model_type: object, known: Iterable[str], version: str) -> PretrainError:
    """The error for a model type that `transformers` does not have."""
    types = sorted(name for entry in FAMILIES for name in entry.types)
    return PretrainError(
        f"unknown model family {model_type!r}{nearest(str(model_type), known)}; accepted: {', '.join(types)}, "
        f"or another model_type of transformers {version}"
    )


def unknown_task(task: str, known: Iterable[str], version: str) -> PretrainError:
    """The error for a task that there is not."""
    return PretrainError(
        f"unknown task {task!r}{nearest(task, (*TASKS, *known))}; accepted: {', '.join(TASKS)}, or an AutoModelFor… of "
        f"transformers {version}"
    )
