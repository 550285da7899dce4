"""What the surgeries that merge models share: which weights there are, whether models fit, sums that round once.

Shape letters: V rows of a vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from pretrain.core.checkpoint import Entry, surgery_of
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import embeddings
from pretrain.core.quick.vocabulary import check_labels, labels_of

# Fields of a configuration that change nothing of what the same weights compute.
_NEUTRAL = re.compile(
    r"_.*|architectures|.*dropout.*|.*_pdrop|.*_token_ids?|(torch_)?dtype|transformers_version|initializer.*|use_cache"
    r"|(output|return)_.*|id2label|label2id|problem_type|pretraining_tp"
)


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters, tied ones once, and the buffers that a checkpoint holds."""
    stored = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return {name: tensor.detach() for name, tensor in model.named_parameters()} | buffers


def check(method: str, model: PreTrainedModel, other: PreTrainedModel, label: str, *, rows: bool = False) -> None:
    """Refuse a model of other weights than `model`; the error names the first difference.

    With `rows` the tables of the vocabulary may be longer in one of them. What is no floating-point number, which
    cannot be averaged, must be equal.
    """
    if type(model) is not type(other):
        raise PretrainError(
            f"{method}: {label} is a {type(other).__name__}; accepted: a {type(model).__name__}, as the checkpoint is"
        )
    check_surgeries(method, surgery_of(model), surgery_of(other), label)
    check_labels(method, {"the checkpoint": labels_of(model), label: labels_of(other)})
    expected, given = weights(model), weights(other)
    lacking = next((n for n in (*expected, *given) if n not in expected or n not in given), None)
    if lacking is not None:
        has, hint = ("does not have", "has") if lacking in expected else ("has", "does not have")
        raise PretrainError(
            f"{method}: {label} {has} the weight {lacking}, which the checkpoint {hint}; accepted: a model of the same "
            "weights (tied alike)"
        )
    sizes = (len(embeddings(model).weight), len(embeddings(other).weight))
    for name, tensor in expected.items():
        its = given[name]
        table = rows and tensor.ndim > 0 and tensor.shape[1:] == its.shape[1:] and (len(tensor), len(its)) == sizes
        if tensor.shape != its.shape and not table:
            raise PretrainError(
                f"{method}: {label} has {name} of shape {tuple(its.shape)}; accepted: {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point() and not torch.equal(tensor.cpu(), its.cpu()):
            raise PretrainError(
                f"{method}: {label} has other values in {name} ({its.dtype}), which has no mean; accepted: the "
                "checkpoint's"
            )


def check_surgeries(method: str, expected: Sequence[Entry], given: Sequence[Entry], label: str) -> None:
    """Refuse a model that has been through other surgeries than the checkpoint."""
    surgeries, others = ([(e["method"], e["config"]) for e in entries] for entries in (expected, given))
    if surgeries != others:
        done = ", ".join(name for name, _ in others) or "no recorded surgery"
        raise PretrainError(
            f"{method}: {label} has been through {done}; accepted: "
            f"{', '.join(name for name, _ in surgeries) or 'no recorded surgery'}, as the checkpoint, and alike"
        )


def check_config(
    method: str, expected: PreTrainedConfig, given: PreTrainedConfig, label: str, *, but: Sequence[str] = ()
) -> None:
    """Refuse a configuration with which equal weights would compute something else; fields in `but` may differ."""
    ours, its = expected.to_dict(), given.to_dict()
    for name in sorted({*ours, *its} - {*but}):
        if ours.get(name) != its.get(name) and not _NEUTRAL.fullmatch(name):
            raise PretrainError(
                f"{method}: {label} has {name} {its.get(name)!r} in its config; accepted: {ours.get(name)!r}"
            )


@torch.no_grad()
def mean_into(target: PreTrainedModel, models: Sequence[PreTrainedModel], shares: Sequence[float]) -> None:
    """Give `target` the weighted mean Σ shares · weights / Σ shares, summed in float64 and rounded once."""
    tables, sum_of_shares = [weights(model) for model in models], float(sum(shares))
    for name, into in weights(target).items():
        if into.is_floating_point():
            total = torch.zeros(into.shape, dtype=torch.float64, device=into.device)
            for table, share in zip(tables, shares, strict=True):
                total += table[name].to(into.device, torch.float64) * share
            into.copy_(total / sum_of_shares)


def add_vectors(base: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """base + (first - base) + (second - base), exactly `first` where second = base, and `second` where first = base."""
    return torch.where(second == base, first, second + (first - base))


def toward(base: Tensor, end: Tensor, scale: float) -> Tensor:
    """base + scale · (end - base) in float64; exactly `end` at 1, exactly `base` at 0."""
    return torch.lerp(base.double(), end.double(), scale)
