"""How many positions a model has, from its configuration's fields alone."""

from __future__ import annotations

from collections.abc import Mapping

from pretrain.core.errors import PretrainError

NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")
PADDED = ("roberta", "xlm-roberta", "camembert", "longformer", "xlm-roberta-xl", "esm", "mpnet", "data2vec-text")


def positions(config: Mapping[str, object]) -> int | None:
    """The most tokens that a model of text can tell apart by their places; None where the configuration says no limit.

    RoBERTa and its like count positions from the padding's index on, and so have that many fewer.
    """
    count = next((n for n in map(config.get, NAMES) if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
    padding = config.get("pad_token_id")
    if count is not None and config.get("model_type") in PADDED and isinstance(padding, int):
        return count - padding - 1
    return count


def check_length(length: int, count: int | None, whose: str, remedy: str = "") -> None:
    """Refuse a length that is beyond the positions of a model."""
    if count is not None and length > count:
        raise PretrainError(
            f"length {length}: {whose} has {count} positions; accepted: at most {count}{remedy}", place=("length",)
        )
