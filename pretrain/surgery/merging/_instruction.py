"""What the surgeries share that bring an instruction-tuned model's difference from its base to a continued model.

A vocabulary may have grown on either side. Rows stand for the same tokens in all three models as far as they reach, and
the tokenizers are asked whether that is so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core.checkpoint import checkpoint_of, load
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import embeddings
from pretrain.core.quick.vocabulary import check_alike, numbers_of
from pretrain.surgery import Inputs
from pretrain.surgery._merge import check, weights
from pretrain.surgery._tokens import resize


def open_both(
    method: str, model: PreTrainedModel, base: str, instruct: str, inputs: Inputs
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The base and the instruction-tuned model, which must fit `model`; the tokenizer to save goes to `inputs`."""
    opened, tokenizers = {}, {"the checkpoint": inputs.tokenizer}
    for name, folder in (("base", base), ("instruct", instruct)):
        if not folder:
            raise PretrainError(f"{method}: {name} '': accepted: an earlier stage or a checkpoint's folder")
        opened[name], tokenizers[name] = load(checkpoint_of(Path(folder)), device=model.device)
        check(method, model, opened[name], name, rows=True)
    tokenizer = _tokenizer(method, tokenizers)
    if tokenizer is not None:
        inputs.extra["tokenizer"] = tokenizer
    return opened["base"], opened["instruct"]


def triples(
    model: PreTrainedModel, base: PreTrainedModel, instruct: PreTrainedModel
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views of the same weights in the three models, to be written to; of vocabularies the rows that all have."""
    before, after = weights(base), weights(instruct)
    for name, tensor in weights(model).items():
        if tensor.is_floating_point():
            triple = (tensor, before[name], after[name])
            rows = min((len(t) for t in triple if t.ndim), default=0)
            first, second, third = (t[:rows] if t.ndim else t for t in triple)
            yield first, second, third


def add_rows(model: PreTrainedModel, instruct: PreTrainedModel) -> None:
    """Give `model` the rows of the vocabulary that only the instruction-tuned one has."""
    rows, more = (len(embeddings(each).weight) for each in (model, instruct))
    if more > rows:
        resize(model, more)
        instructed = weights(instruct)
        for name, tensor in weights(model).items():
            if _is_table(model, tensor):
                tensor[rows:] = instructed[name][rows:].to(tensor)


def _is_table(model: PreTrainedModel, tensor: Tensor) -> bool:
    """Whether these are the embeddings, or the head's weight or bias."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = [getattr(layer, name, None) for layer in layers for name in ("weight", "bias")]
    return any(table is not None and table.data_ptr() == tensor.data_ptr() for table in tables)


def keep_manners(model: PreTrainedModel, instruct: PreTrainedModel) -> None:
    """Text is generated as the instruction-tuned model does: with its settings, up to its tokens for an end."""
    if instruct.can_generate() and getattr(instruct, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(instruct.generation_config)


def _tokenizer(method: str, given: dict[str, PreTrainedTokenizerBase | None]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the longest vocabulary, with the instruction-tuned model's template; the others must agree."""
    known = {name: tokenizer for name, tokenizer in given.items() if tokenizer is not None}
    if "the checkpoint" not in known and "instruct" not in known:
        return None
    longest = max((name for name in known if name != "base"), key=lambda name: len(known[name]))
    check_alike(method, {name: numbers_of(tokenizer) for name, tokenizer in known.items()})
    chosen = copy.deepcopy(known[longest])
    template = getattr(known.get("instruct"), "chat_template", None)
    if template is not None:
        chosen.chat_template = template
    return chosen
