"""Fewer tokens: their rows of a model, and a tokenizer that splits text of the kept ones as before.

Shape letters: V old tokens, K kept tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core.batch import Batch
from pretrain.core.encoding.merges import closed, pairs
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import embeddings
from pretrain.surgery import Inputs, report
from pretrain.surgery._tokens import MODELS, State, resize, state_of, with_state
from pretrain.surgery.vocabulary.vocabulary_expansion import tables

Ids: TypeAlias = "int | list[Ids]"  # token ids, or lists of them
LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")  # of a generation config


def check(method: str, model: PreTrainedModel, inputs: Inputs | None) -> tuple[Inputs, PreTrainedTokenizerBase]:
    """The inputs and their tokenizer; refuses embeddings and heads that are no plain tables."""
    if inputs is None or inputs.tokenizer is None:
        raise PretrainError(f"{method}: the checkpoint has no tokenizer; accepted: one that has")
    layer, head = model.get_input_embeddings(), model.get_output_embeddings()
    for what, table, plain in (("embeddings", layer, nn.Embedding), ("head", head, nn.Linear)):
        if table is not None and type(table) is not plain:
            raise PretrainError(f"{method}: {what}: a {type(table).__name__}; accepted: a plain table")
    return inputs, inputs.tokenizer


def counted(method: str, model: PreTrainedModel, inputs: Inputs, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """`count_V`: how often each token occurs in the text, which must hold none that is not known."""
    count_V = inputs.counts() if inputs.counts is not None else _counts(inputs.batches)
    known, rows = {*tokenizer.get_vocab().values()}, len(embeddings(model).weight)
    wrong = next((i for i in count_V.nonzero()[:, 0].tolist() if i not in known or i >= rows), None)
    if wrong is not None:
        raise PretrainError(
            f"{method}: the text holds token {wrong}; accepted: tokens that the tokenizer and the model know"
        )
    return count_V


@torch.no_grad()
def cut(
    method: str, model: PreTrainedModel, inputs: Inputs, chosen: Iterable[int], count_V: Tensor | None,
    spelt: Callable[[str], bool] = bool,
) -> PreTrainedModel:  # fmt: skip
    """The model with the rows of the tokens `chosen`, and of those that cannot be done without, alone.

    Of the single characters of a tokenizer without bytes those stay that are `spelt`. The tokenizer, and the text in
    its numbers, go back in `inputs.extra`.
    """
    assert inputs.tokenizer is not None
    names = {index: token for token, index in inputs.tokenizer.get_vocab().items()}
    configs = [c for c in (model.config, getattr(model, "generation_config", None)) if c is not None]
    named = {index for config in configs for value in _ids(config).values() for index in _flat(value)}
    rows = len(embeddings(model).weight)
    stay = {*chosen, *(i for i in named if i in names and i < rows)}
    tokenizer, kept = trimmed(method, inputs.tokenizer, [names[index] for index in sorted(stay)], rows, spelt)
    before = model.num_parameters()
    new = {old: number for number, old in enumerate(kept)}
    take_rows(model, kept, new)
    for config in configs:
        for name, value in _ids(config).items():
            setattr(config, name, _renumbered(value, new))
    inputs.extra["tokenizer"] = tokenizer
    inputs.extra["batches"] = [_translated(batch, new) for batch in inputs.batches]
    metrics: dict[str, float] = {
        "tokens_before": len(names), "tokens": len(kept), "parameters_before": before,
        "parameters": model.num_parameters(),
    }  # fmt: skip
    if count_V is not None:
        there = torch.tensor([index for index in kept if index < len(count_V)])
        metrics["text_kept"] = int(count_V[there].sum()) / max(1, int(count_V.sum()))
    report(inputs, **{f"{method}/{name}": value for name, value in metrics.items()})
    return model


def _counts(batches: Sequence[Batch]) -> Tensor:
    """How often each token occurs in the text, padding left out."""
    ids = [b["input_ids"][b.get("attention_mask", torch.ones_like(b["input_ids"])) > 0].cpu() for b in batches]
    return torch.bincount(torch.cat(ids))


def take_rows(model: PreTrainedModel, kept: list[int], new: dict[int, int]) -> None:
    """Only the rows `kept` of the embeddings, of the head and of its bias, in that order."""
    for table in tables(model):
        table[: len(kept)] = table[kept]
    weight = embeddings(model).weight
    padded = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is weight]
    padding = [m.padding_idx for m in padded]
    resize(model, len(kept))
    for module, index in zip(padded, padding, strict=True):
        module.padding_idx = new.get(index) if index is not None else None


def _ids(config: PreTrainedConfig | GenerationConfig) -> dict[str, Ids]:
    """A configuration's fields that name tokens: `eos_token_id` and the like."""
    names = [n for n in (*config.to_dict(), *LISTS) if n.endswith("_token_id") or n in LISTS]
    return {name: value for name in names if (value := getattr(config, name, None)) is not None}


def _flat(value: Ids) -> Iterable[int]:
    return [value] if isinstance(value, int) else [index for part in value for index in _flat(part)]


def _renumbered(value: Ids, new: dict[int, int]) -> Ids | None:
    """The tokens' new numbers; None for one that is gone, lists without those (a list in a list goes whole)."""
    if isinstance(value, int):
        return new.get(value)
    parts = [part for part in value if isinstance(part, int) or all(index in new for index in _flat(part))]
    return [new_part for part in parts if (new_part := _renumbered(part, new)) is not None]


def _translated(batch: Batch, new: dict[int, int]) -> Batch:
    """The batch in new numbers; a token that is gone is left out as padding is."""
    ids_BL = batch["input_ids"]
    number_V = torch.full((max(int(ids_BL.max()), *new) + 1,), -1, dtype=ids_BL.dtype, device=ids_BL.device)
    number_V[list(new)] = torch.tensor(list(new.values()), dtype=ids_BL.dtype, device=ids_BL.device)
    mapped_BL = number_V[ids_BL]
    document_BL = batch.get("attention_mask", torch.ones_like(ids_BL))
    gone_BL = mapped_BL < 0
    return batch | {
        "input_ids": mapped_BL.masked_fill(gone_BL, 0), "attention_mask": document_BL.masked_fill(gone_BL, 0)
    }  # fmt: skip


def trimmed(
    method: str, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], rows: int | None = None,
    spelt: Callable[[str], bool] = bool,
) -> tuple[PreTrainedTokenizerBase, list[int]]:  # fmt: skip
    """The tokenizer with these tokens and those it cannot do without, and the old numbers in the order of the new."""
    state = state_of(tokenizer)
    model, known = state["model"], tokenizer.get_vocab()
    if model["type"] not in MODELS:
        raise PretrainError(f"{method}: the tokenizer is a {model['type']}; accepted: {', '.join(MODELS)}")
    wanted = {*tokens, *(entry["content"] for entry in state["added_tokens"]), *_alphabet(state, known, spelt)}
    wanted |= {token for token in tokenizer.all_special_tokens if token in known}
    if model["type"] == "Unigram" and model["vocab"]:
        wanted.add(min(model["vocab"], key=lambda piece: piece[1])[0])  # unknown characters score less than the least
        if model.get("unk_id") is not None:
            wanted.add(model["vocab"][model["unk_id"]][0])
    elif model.get("unk_token") in known:
        wanted.add(model["unk_token"])
    names = {index: token for token, index in known.items()}
    wanted |= {names[index] for index in _ends(state["post_processor"])}
    if state.get("padding"):
        wanted.add(names[state["padding"]["pad_id"]])
    if model["type"] == "BPE":
        wanted = closed(model, wanted)
    kept = sorted(known[token] for token in wanted)
    if rows is not None and kept[-1] >= rows:
        raise PretrainError(
            f"{method}: the checkpoint has {rows} rows and its tokenizer token {kept[-1]}; accepted: as many "
            "rows or more"
        )
    new = {old: number for number, old in enumerate(kept)}
    _write(state, wanted, new)
    made = with_state(tokenizer, state)
    if made.get_vocab() != {token: new[known[token]] for token in wanted}:
        raise PretrainError(
            f"{method}: the tokenizer's added tokens stand before or among its others; accepted: such as stand "
            "behind them, or are some of them"
        )
    return made, kept


def of_bytes(state: State) -> bool:
    """Whether the characters of a tokenizer's tokens stand for bytes."""
    return "ByteLevel" in json.dumps([state["pre_tokenizer"], state["decoder"]])


def stem(state: State, token: str) -> str:
    """A token without the marks of its place in a word."""
    prefix, suffix = (state["model"].get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    return token.removeprefix(prefix).removesuffix(suffix)


def _alphabet(state: State, known: dict[str, int], spelt: Callable[[str], bool]) -> set[str]:
    """What any text can be spelt in: the bytes; where there are none, the single characters that are `spelt`."""
    model = state["model"]
    alphabet = {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else set()
    if of_bytes(state):
        alphabet |= set(pre_tokenizers.ByteLevel.alphabet())
    if not alphabet:
        alphabet = {token for token in known if len(stem(state, token)) == 1 and spelt(token)}
    return alphabet & known.keys()


def _write(state: State, wanted: set[str], new: dict[int, int]) -> None:
    """Leave only the wanted tokens in a tokenizer's state, in their new numbers."""
    model = state["model"]
    if model["type"] == "Unigram":
        unknown = None if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
        model["vocab"] = [piece for piece in model["vocab"] if piece[0] in wanted]
        model["unk_id"] = None if unknown is None else [piece[0] for piece in model["vocab"]].index(unknown)
    else:
        model["vocab"] = {token: new[index] for token, index in model["vocab"].items() if token in wanted}
    if model["type"] == "BPE":
        model["merges"] = [list(pair) for pair, made in pairs(model) if wanted >= {*pair, made}]
    for entry in state["added_tokens"]:
        entry["id"] = new[entry["id"]]
    if state.get("padding"):
        state["padding"]["pad_id"] = new[state["padding"]["pad_id"]]
    _ends(state["post_processor"], new)


def _ends(processor: State | None, new: dict[int, int] | None = None) -> set[int]:
    """The numbers of what a post-processor puts around a text; with `new`, those take their place."""
    if processor is None:
        return set()
    ends = {index for part in processor.get("processors", []) for index in _ends(part, new)}
    places = [(entry["ids"], range(len(entry["ids"]))) for entry in processor.get("special_tokens", {}).values()]
    places += [(processor[end], range(1, 2)) for end in ("sep", "cls") if isinstance(processor.get(end), list)]
    for values, where in places:
        for place in where:
            ends.add(values[place])
            values[place] = values[place] if new is None else new[values[place]]
    return ends
