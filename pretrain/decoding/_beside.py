"""A checkpoint that decodes beside the model: opened once, of the same vocabulary."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pretrain.core.checkpoint import load
from pretrain.core.errors import PretrainError
from pretrain.core.folders import newest_checkpoint
from pretrain.core.generation.computed import count_too
from pretrain.core.quick.vocabulary import Numbers, check_alike, numbers_of, stored_numbers


def beside(method: str, model: PreTrainedModel, **folders: str) -> list[PreTrainedModel]:
    """The checkpoints of a method's fields, on the model's device; other vocabularies than the model's are an error.

    Tables may differ in rows that no token of the vocabulary has.
    """
    words: dict[str, Numbers | None] = {}
    ours = Path(model.config._name_or_path or "/none")
    if ours.is_dir():
        words["the model"] = stored_numbers(ours)
    _check_causal(method, "the model", model)
    opened = []
    for field, place in folders.items():
        folder = newest_checkpoint(Path(place))  # of a stage, or of a run
        other, vocabulary = _open(folder, model.device, stamp(folder))
        _check_causal(method, f"{field} {folder}", other)
        least = 0 if vocabulary is None else max(vocabulary.values(), default=-1) + 1  # rows after that are padding
        if rows(other) != rows(model) and not 0 < least <= min(rows(other), rows(model)):
            raise PretrainError(
                f"{method}: {field} {folder}: a vocabulary of {rows(other)} tokens: accepted: the model's "
                f"{rows(model)}, or another number of rows after the tokenizer's last"
            )
        words[f"{field} {folder}"] = vocabulary
        opened.append(other)
        count_too(f"method.{field}", other)
    check_alike(method, words)
    return opened


def rows(model: PreTrainedModel) -> int:
    """How many tokens a model's head tells apart."""
    return int(model.get_output_embeddings().weight.shape[0])


def _check_causal(method: str, what: str, model: PreTrainedModel) -> None:
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise PretrainError(f"{method}: {what}: {type(model).__name__}: accepted: a causal language model")


def stamp(folder: Path) -> int:
    """When the checkpoint was last written; one that is not there is an error of `load`."""
    return max((path.stat().st_mtime_ns for path in folder.glob("*.json")), default=0)


@functools.lru_cache(maxsize=2)
def _open(folder: Path, device: torch.device, _: int) -> tuple[PreTrainedModel, Numbers | None]:
    """A checkpoint and its vocabulary, kept for the next prompt."""
    model, tokenizer = load(folder, device=device)
    return model, numbers_of(tokenizer)
