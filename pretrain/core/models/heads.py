"""Heads: a pretrained model with a classifier in place of its head, or with a language model's where it has none."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from pretrain.core.batch import Vocabulary
from pretrain.core.checkpoint import lineage, surgery_of
from pretrain.core.errors import PretrainError, unknown
from pretrain.core.foreign.code import brought
from pretrain.core.models.families import base
from pretrain.core.models.initial import model_for

HEADS: dict[str, Any] = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
NUMBER = "number"  # the name of the one output of a regression
LOGARITHMS = "logarithms_of_labels"  # the field of a regression's config that says that its outputs are such
_OUTPUTS = ("classifier", "score", "classification_head")  # the names that `transformers` gives the last layer


def labels_of(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of the model's classes, in the order of their numbers."""
    return tuple(str(name) for _, name in sorted((model.config.id2label or {}).items()))


def answers_with_labels(model: PreTrainedModel) -> bool:
    """Whether it is a classifier, of texts or of tokens, and not a language model or a bare encoder."""
    return "Classif" in type(model).__name__ or output(model) is not None


def other_column(model: PreTrainedModel, asked: str) -> str:
    """That the model's labels are those of another column of its training documents, where that is known."""
    trained = lineage(getattr(model.config, "_name_or_path", "") or "/none").get("objective")
    while isinstance(trained, Mapping) and isinstance(trained.get("objective"), Mapping):
        trained = trained["objective"]  # that another one wraps
    column = trained.get("label") if isinstance(trained, Mapping) else None
    return "" if column in (None, asked) else f" (the model was trained on the labels of {column!r}, not of {asked!r})"


def output(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The name and the module of a classifier's last layer; None of a model without one."""
    return next(((name, module) for name, module in model.named_children() if name in _OUTPUTS), None)


def last_linear(model: nn.Module) -> nn.Linear | None:
    """The layer that gives a classifier's outputs; None of a model without one."""
    last = output(model)
    layers = [] if last is None else [module for module in last[1].modules() if isinstance(module, nn.Linear)]
    return layers[-1] if layers else None


def new_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """What a classifier may have that its pretrained model has not: what stands on the base model, BERT's pooler."""
    if output(model) is None:
        return {}
    inner, pooler = base(model), getattr(base(model), "pooler", None)
    modules = {name: module for name, module in model.named_children() if module is not inner}
    if pooler is not None:
        modules[f"{model.base_model_prefix}.pooler"] = pooler
    return {name: module for name, module in modules.items() if next(module.parameters(), None) is not None}


def with_head(
    model: PreTrainedModel, head: str, labels: Sequence[str], vocabulary: Vocabulary, *, seed: int = 0
) -> PreTrainedModel:
    """The model as `transformers`' classifier of documents (`sequence`) or of tokens (`token`).

    The pretrained modules are moved, not copied; the last layer is new, drawn by `seed`, unless the model is such a
    classifier already and knows all `labels`. The only label `NUMBER` makes a regression. Raises `PretrainError` for a
    model of which `transformers` has no such class.
    """
    if head not in HEADS:
        raise unknown("head", head, HEADS)
    code = brought(model)
    mapped = HEADS[head]._model_mapping
    wanted = mapped.get(type(model.config), None) if code is None else code.first_of(HEADS[head].__name__)
    if wanted is None:
        kind, whose = model.config.model_type, "transformers" if code is None else "its code"
        raise PretrainError(f"{whose} has no {head} classifier of model type {kind!r}")
    if type(model) is wanted and set(labels) <= set(labels_of(model)):
        return model
    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: number for number, name in enumerate(labels)}
    config.problem_type = "regression" if list(labels) == [NUMBER] else "single_label_classification"
    # A causal model's classifier reads the last token before the padding, an encoder-decoder's the last end.
    config.pad_token_id = vocabulary.pad
    config.eos_token_id = vocabulary.eos if vocabulary.eos is not None else config.eos_token_id
    return _moved(model, wanted, config, seed)


def with_language_head(model: PreTrainedModel, task: str, *, seed: int = 0) -> PreTrainedModel:
    """A model that is saved without a head, as an encoder of sentences is, as `transformers`' class for a task.

    The head is new, drawn by `seed`, but for the output layer of a model that ties it to the embeddings. Any other
    model, and one that has no class for the task, comes back as it is.
    """
    wanted = model_for(model.config, task) if brought(model) is None else None
    if wanted is None or type(model) is not model_for(model.config, "base"):
        return model
    made = _moved(model, wanted, copy.deepcopy(model.config), seed)
    made.tie_weights()
    return made.eval()


def _moved(model: PreTrainedModel, wanted: Any, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A new model of the class `wanted`, by `seed`, with the model's modules in it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = wanted(config)
    _move(base(model), base(made))
    _move(model, made)
    made.pretrain_surgery = surgery_of(model)
    if hasattr(model, "peft_config"):
        made.peft_config = model.peft_config
    moved: PreTrainedModel = made.to(model.dtype).to(model.device)
    return moved


def _move(source: nn.Module, target: nn.Module) -> None:
    """Put the source's modules where the target has ones of the same name, but for the last layer."""
    for name, module in source.named_children():
        if name not in _OUTPUTS and getattr(target, name, None) is not None and module is not base(source):
            setattr(target, name, module)
