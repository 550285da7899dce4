"""The places where many papers put their adapters: the projections to queries and to values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from pretrain.core.errors import PretrainError
from pretrain.core.families import family
from pretrain.surgery._adapters import PLACES, targets

QUERY_VALUE = "query_value"


def chosen(model: PreTrainedModel, method: str, where: str, names: Sequence[str] = ()) -> dict[str, nn.Module]:
    """`targets`, with one place more: `query_value`, the projections to queries and values, whole where fused.

    `names` there are of any linear layers of the blocks.
    """
    if where not in (QUERY_VALUE, *PLACES):
        raise PretrainError(f"{method}: where {where!r}: accepted: {', '.join((QUERY_VALUE, *PLACES))}")
    if where != QUERY_VALUE:
        return targets(model, method, where, names)
    if names:
        return targets(model, method, "all", names)
    projections = family(model).queries
    ends = [path.rpartition(".")[2] for path in (projections[0], projections[-1])]
    return targets(model, method, "attention", tuple(dict.fromkeys(ends)))
