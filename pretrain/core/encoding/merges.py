"""What a byte-pair tokenizer's tokens are merged of."""

from __future__ import annotations

from pretrain.core.files import JSONObject


def pairs(model: JSONObject) -> list[tuple[tuple[str, str], str]]:
    """The merges of a `tokenizer.json`'s BPE, each with the token it makes; older files hold both parts as one text."""
    prefix = model.get("continuing_subword_prefix") or ""
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    return [((first, second), first + second.removeprefix(prefix)) for first, second in merges]


def closed(model: JSONObject, tokens: set[str]) -> set[str]:
    """The tokens and, by any merge that makes one of them, its parts, and theirs."""
    parts: dict[str, set[str]] = {}
    for pair, made in pairs(model):
        parts.setdefault(made, set()).update(pair)
    known, left = set(tokens), list(tokens)
    while left:
        more = parts.get(left.pop(), set()) - known
        known |= more
        left += more
    return known
