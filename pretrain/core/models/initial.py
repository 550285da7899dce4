"""New models: a configuration from a type and its fields, and random weights for it.

`transformers` leaves some out, by the type of the model: it skips what it takes for initialised already. A ViTMAE built
from its configuration (`transformers` 5.23) has neither position embeddings nor a class token nor a mask token: all are
0, and it learns no more than the mean of the images.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError, nearest
from pretrain.core.models.layers import at
from pretrain.core.quick.model_fields import check_heads, check_values, in_our_words, misfit
from pretrain.core.quick.table import GENERATING, TASKS, accepted_fields, unknown_field, unknown_task, unknown_type


def new_config(model_type: str, fields: Mapping[str, object]) -> PreTrainedConfig:
    """A `transformers` configuration from its type and fields; an unknown one of either is an error."""
    if model_type not in CONFIG_MAPPING:
        raise unknown_type(model_type, CONFIG_MAPPING, transformers.__version__)
    known = config_fields(model_type)
    for name in fields:
        if name not in known:
            raise unknown_field(name, model_type, known)
    check_values(model_type, fields)
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # a strict configuration has error types of its own
        raise in_our_words(model_type, fields, error) from error
    given = ("hidden_size", "num_attention_heads", "num_key_value_heads")
    width, heads, shared = (getattr(config, name, None) for name in given)
    called = {standard: config.attribute_map.get(standard, standard) for standard in given}
    whole = width if model_type in ("gpt2", "bert", "modernbert") else None  # others may have a head_dim of their own
    check_heads(model_type, whole, heads, shared, (called["hidden_size"], called["num_attention_heads"]))
    _check_activation(model_type, fields)
    return config


def _check_activation(model_type: str, fields: Mapping[str, object]) -> None:
    """Refuse an activation that transformers does not know."""
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        value = fields.get(name)
        if isinstance(value, str) and value not in ACT2FN:
            raise misfit(model_type, name, value, ", ".join(sorted(ACT2FN)), nearest(value, ACT2FN))


@functools.cache
def config_fields(model_type: str) -> frozenset[str]:
    """The fields that `new_config` accepts for a type; a checkpoint's `config.json` may hold others beside them."""
    blank = AutoConfig.for_model(model_type)
    return accepted_fields({*blank.to_dict(), *blank.attribute_map})


def new_model(
    model_type: str,
    fields: Mapping[str, object],
    *,
    task: str = "causal",
    vocabulary: Vocabulary | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A model with random weights. `vocabulary` sets the size and the special ids.

    `task` is "causal", "masked", "seq2seq", "pretraining", "base" for a model without a head, "generating" for
    a seq2seq model or else a causal one, or the name of an `AutoModelFor…` of transformers. Raises `PretrainError` for
    an unknown type, field or task, and for a model that cannot be built.
    """
    if task != GENERATING:
        check_task(task)
    if vocabulary is not None and model_type in CONFIG_MAPPING:
        ids = {
            "pad_token_id": vocabulary.pad, "bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.eos,
            "cls_token_id": vocabulary.bos, "sep_token_id": vocabulary.eos, "mask_token_id": vocabulary.mask,
            "vocab_size": vocabulary.size,
        }  # fmt: skip
        known = config_fields(model_type)
        fields = {k: v for k, v in ids.items() if k in known} | dict(fields)
    config = new_config(model_type, fields)
    if task == GENERATING:
        task = "seq2seq" if config.is_encoder_decoder else "causal"
    made = model_for(config, task)
    if made is None:
        able = ", ".join(t for t in TASKS if model_for(config, t) is not None)
        raise PretrainError(f"model family {model_type!r} has no model for task {task!r}; accepted: {able}")
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return completed(made._from_config(config))
        except Exception as error:  # whatever a model's constructor makes of a value that does not suit it
            raise in_our_words(model_type, fields, error) from error


def check_task(task: str) -> None:
    """Refuse a task that there is not."""
    if task not in TASKS and not (task.startswith("AutoModelFor") and hasattr(transformers, task)):
        known = [name for name in _library() if name.startswith("AutoModelFor")]
        raise unknown_task(task, known, transformers.__version__)


def model_for(config: PreTrainedConfig, task: str) -> type[PreTrainedModel] | None:
    """The class of `transformers` that a configuration's model has for a task; None where there is none.

    Not all models made for pretraining are in the table of `AutoModelForPreTraining`: others are known by their name.
    """
    table = getattr(transformers, TASKS.get(task, task))._model_mapping
    if type(config) in table:
        made = table[type(config)]
        return made[0] if isinstance(made, tuple) else made
    if task != "pretraining":
        return None
    named = f"{type(config).__name__.removesuffix('Config')}ForPretraining".lower()
    return next((getattr(transformers, name) for name in _library() if name.lower() == named), None)


@functools.cache
def _library() -> list[str]:
    """All names of transformers, which takes it a quarter of a second to tell."""
    return dir(transformers)


def completed(model: PreTrainedModel) -> PreTrainedModel:
    """The model with what its class's own `initialize_weights` was to give it."""
    if model.config.model_type == "vit_mae":
        with torch.no_grad():
            _vit_mae(model)
    return model


def _vit_mae(model: PreTrainedModel) -> None:
    embeddings = at(model, "base_model.embeddings")
    _forget(embeddings)
    embeddings.initialize_weights()
    decoder = getattr(model, "decoder", None)
    if decoder is not None:
        for parameter in (decoder.mask_token, decoder.decoder_pos_embed):
            parameter.__dict__.pop("_is_hf_initialized", None)
        decoder.initialize_weights(embeddings.patch_embeddings.num_patches)


def _forget(module: nn.Module) -> None:
    """Take back the mark that tells `transformers` that a module's weights are there."""
    for part in (*module.modules(), *module.parameters()):
        part.__dict__.pop("_is_hf_initialized", None)
