"""No answer is made of outputs that are not finite: of NaN the likeliest class is the first, and no token is any.

Weights that are finite may give such outputs, where sums within the model overflow.

Shape letters: B rows, L positions, C classes or widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core.errors import PretrainError

OUTPUTS = ("logits", "last_hidden_state", "pooler_output", "image_embeds", "text_embeds")


class NotFinite(PretrainError):
    """Outputs that are not finite; `rows` of a batch have them."""

    def __init__(self, model: str, rows: Sequence[int] = ()) -> None:
        super().__init__(
            f"the outputs of the {model} are not finite (NaN or infinity); accepted: a model with finite outputs"
        )
        self.rows = tuple(rows)


@contextmanager
def watching(model: nn.Module) -> Iterator[None]:
    """While open, outputs of the model, of it without its head and of its head raise `NotFinite` where they are not."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    parts = (model, getattr(model, "base_model", model), head)
    hooks = [
        part.register_forward_hook(check_outputs, with_kwargs=True)
        for part in {id(part): part for part in parts}.values() if isinstance(part, nn.Module)
    ]  # fmt: skip
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_outputs(module: nn.Module, _: tuple[object, ...], given: Mapping[str, object], output: object) -> None:
    """A hook after `forward`: refuse outputs of it that are not finite, what stands in padding left aside."""
    if isinstance(output, Tensor):  # of a head: the last position is what is asked for
        check_logits(output[:, -1] if output.ndim > 2 and output.numel() else output, type(module).__name__)
    for name in OUTPUTS:
        values = getattr(output, name, None)
        if type(values) is not Tensor or values.is_meta or values.ndim < 2 or not values.is_floating_point():
            continue
        bad_B = _bad(values, given.get("attention_mask"), masked=name == "logits")
        if bool(bad_B.any()):
            raise NotFinite(type(module).__name__, bad_B.nonzero()[:, 0].tolist())


def check_logits(logits_BV: Tensor, what: str) -> None:
    """Refuse logits of which the likeliest is none; -infinity is that of what must not be chosen."""
    if type(logits_BV) is Tensor and logits_BV.is_floating_point() and not logits_BV.is_meta:
        bad_B = _bad(logits_BV, None, masked=True)
        if bool(bad_B.any()):
            raise NotFinite(what, bad_B.nonzero()[:, 0].tolist())


def _bad(values: Tensor, mask: object, *, masked: bool) -> Tensor:
    """`bad_B`: the rows with a value that is not finite; where `masked`, one of -infinity is no such value.

    Of a row whose padding is not known all positions must be such.
    """
    if not values.numel():
        return torch.zeros(len(values), dtype=torch.bool, device=values.device)
    low, high = torch.aminmax(values, dim=-1)
    bad = ~high.isfinite() if masked else ~(high.isfinite() & low.isfinite())
    bad_BL = bad.reshape(len(values), -1)
    if values.ndim == 2:
        return bad_BL[:, 0]
    if isinstance(mask, Tensor) and mask.shape == bad_BL.shape:
        return (bad_BL & mask.bool()).any(1)
    return bad_BL.all(1) if mask is not None else bad_BL.any(1)
