"""A tokenizer that knows another's tokens too: the old tokens keep their numbers, the new ones follow."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core.checkpoint import surgery_of
from pretrain.core.errors import PretrainError
from pretrain.core.files import JSONObject
from pretrain.core.folders import tokenizer_of
from pretrain.core.method import method_class
from pretrain.core.models.families import embeddings
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.surgery import Inputs, report

MODELS = ("BPE", "Unigram", "WordPiece")
State = JSONObject  # `tokenizer.json`


def expand(method: str, model: PreTrainedModel, folder: str, inputs: Inputs | None) -> tuple[list[int], list[int]]:
    """Give the model rows, yet of no meaning, for the tokens of the tokenizer in `folder` that it lacks.

    Returns the ids of its old tokens and of the new ones; the joined tokenizer is handed back in `inputs.extra`.
    """
    if inputs is None or inputs.tokenizer is None:
        raise PretrainError(f"{method}: the checkpoint has no tokenizer; accepted: one that has")
    tokenizer = joined(method, inputs.tokenizer, load_tokenizer(tokenizer_of(Path(folder))))
    known = set(inputs.tokenizer.get_vocab().values())
    old, new = sorted(known), sorted(set(tokenizer.get_vocab().values()) - known)
    rows = len(embeddings(model).weight)
    if old[-1] >= rows:
        raise PretrainError(
            f"{method}: the checkpoint has {rows} rows and its tokenizer {old[-1] + 1} ids; accepted: as many rows or "
            "more"
        )
    if new and new[-1] >= rows:
        resize(model, new[-1] + 1)
    inputs.extra["tokenizer"] = tokenizer
    report(inputs, **{f"{method}/new_tokens": len(new)})
    return old, new


@torch.no_grad()
def resize(model: PreTrainedModel, rows: int) -> None:
    """That many rows of the embeddings, of the head and of its bias: what was one weight stays one, and no more.

    `transformers` ties anew by its classes and configurations: an untied BERT's bias to one that is never used, and
    the head of T5 to the embeddings, be it another's. Raises `PretrainError` after a surgery that knows the vocabulary.
    """
    for entry in surgery_of(model):
        if getattr(method_class(entry["method"], "surgery"), "keeps_vocabulary", False):
            raise PretrainError(
                f"{rows} entries for a model of {entry['method']}: accepted: a change of the vocabulary before that "
                "surgery"
            )
    before = dict(model.named_parameters(remove_duplicate=False))
    count, head = len(embeddings(model).weight), model.get_output_embeddings()
    around = next((name.rpartition(".")[0] for name, module in model.named_modules() if module is head), "")
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(rows, mean_resizing=False)
    made: dict[int, nn.Parameter] = {}
    for name, now in list(model.named_parameters(remove_duplicate=False)):
        was = before[name]
        unused = name == f"{around}.bias" and len(was) == count  # an untied RoBERTa's has been left as it was
        if now is was and not unused:
            continue
        if id(was) not in made:
            table, kept = was.new_zeros(rows, *was.shape[1:]), min(len(was), rows)
            table[:kept] = was[:kept]
            table[kept : len(now)] = now[kept:rows]
            made[id(was)] = nn.Parameter(table, requires_grad=was.requires_grad)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made[id(was)])


def joined(method: str, old: PreTrainedTokenizerBase, added: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`added` itself where it has all tokens of `old` under their numbers; else `old` with the tokens of `added`.

    Those are given the next numbers in their order; special tokens stay those of `old`. Text is normalised and split as
    by `old`. BPE applies its old merges first, then those of `added`; pieces of a Unigram model keep their scores.
    """
    known = old.get_vocab()
    given = added.get_vocab()
    if all(given.get(token) == index for token, index in known.items()):
        return copy.deepcopy(added)
    state, other = _state(method, "the checkpoint", old), _state(method, "the new one", added)
    _comparable(method, state, other)
    special = {entry["content"] for entry in other["added_tokens"]}
    new = [t for t, _ in sorted(given.items(), key=lambda item: item[1]) if t not in known and t not in special]
    model, its = state["model"], other["model"]
    if model["type"] == "Unigram":
        if len(model["vocab"]) != len(known):
            beside = len(known) - len(model["vocab"])
            raise PretrainError(
                f"{method}: the checkpoint's Unigram tokenizer has {beside} tokens beside its pieces, whose numbers "
                "new pieces would take; accepted: one whose tokens are all pieces"
            )
        scores = dict(map(tuple, its["vocab"]))
        model["vocab"] += [[token, scores[token]] for token in new]
    else:
        first = max(known.values()) + 1
        model["vocab"] |= {token: first + number for number, token in enumerate(new)}
    if model["type"] == "BPE":
        merges, prefix = [_pair(merge) for merge in model["merges"]], model.get("continuing_subword_prefix") or ""
        have = set(merges)
        for pair in map(_pair, its["merges"]):
            parts = {*pair, pair[0] + pair[1].removeprefix(prefix)}
            if pair not in have and model["vocab"].keys() >= parts:
                merges.append(pair)
        model["merges"] = merges
    return with_state(old, state)


def state_of(tokenizer: PreTrainedTokenizerBase) -> State:
    """The tokenizer's `tokenizer.json`; of one that has none the type of its model alone."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}


def with_state(tokenizer: PreTrainedTokenizerBase, state: State) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer with another `tokenizer.json`.

    Added tokens that are none of the model's are numbered anew, after all of those, unless these hold them as well.
    """
    vocabulary = state["model"].get("vocab")
    if isinstance(vocabulary, dict):
        last = max(vocabulary.values(), default=-1)
        beside = {entry["content"]: entry["id"] for entry in state["added_tokens"] if entry["id"] < last}
        vocabulary |= {token: number for token, number in beside.items() if token not in vocabulary}
    made = copy.deepcopy(tokenizer)
    vars(made)["_tokenizer"] = Tokenizer.from_str(json.dumps(state))
    return made


def _state(method: str, whose: str, tokenizer: PreTrainedTokenizerBase) -> State:
    state = state_of(tokenizer)
    if state["model"]["type"] not in MODELS:
        raise PretrainError(
            f"{method}: the tokenizer of {whose} is a {state['model']['type']}; accepted: {', '.join(MODELS)}, or a "
            "new one that has all tokens of the checkpoint's under their numbers"
        )
    return state


def _comparable(method: str, state: State, other: State) -> None:
    """Refuse two tokenizers of which one cannot meet the other's tokens in its text."""

    def signs(s: State) -> State:
        model = s["model"]
        names = ("type", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        return {name: model.get(name) or None for name in names} | {"decoder": (s["decoder"] or {}).get("type")}

    expected, given = signs(state), signs(other)
    for name, value in expected.items():
        if given[name] != value:
            raise PretrainError(
                f"{method}: the new tokenizer's {name} is {given[name]!r}; accepted: {value!r}, as the checkpoint's, "
                "or one that has all tokens of the checkpoint's under their numbers"
            )


def _pair(merge: str | list[str]) -> tuple[str, ...]:
    """A merge's two parts; older files hold them as one text."""
    return tuple(merge.split(" ") if isinstance(merge, str) else merge)
