"""3ML: encode the tokens that are shown, and bring in those that are masked later, when little remains to be computed.

Shape letters: B rows, K slots of shown tokens, M slots of masked ones, S = K + M, E width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pretrain.core.batch import Batch, Context, Row, rows_to_tensors
from pretrain.core.bounds import PositiveShare, Share, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.models.attention import attend
from pretrain.core.models.cross_entropy import IGNORE, linear_cross_entropy
from pretrain.core.models.families import at, blocks, embeddings, family, head
from pretrain.objectives import Loss, Objective
from pretrain.objectives._masking import check_shares
from pretrain.objectives.language._encoder_blocks import embedded, last_norm, new_blocks, run


@dataclass(frozen=True)
class MaskLater(Objective):
    """Mask More and Mask Later: Efficient Pre-training of Masked Language Models by Disentangling the [MASK] Token (arXiv:2211.04898).

    The tokens that masked language modelling would turn into [MASK] are left out of the first `layer` blocks (None: of
    all), which so see about `1 - rate · masked` of a row, at its original positions. Then a vector that is no word's,
    with the position's embedding, is appended for each, and the remaining blocks and `decoder_layers` further ones see
    the whole row (3ML_self). The loss is the mean of -log p(original) over the chosen tokens, of which `masked` are left
    out, `random` become another token and the rest stay. The further blocks and the vector are thrown away.
    """  # noqa: E501

    families: ClassVar[tuple[str, ...]] = ("bert", "modernbert")
    task: ClassVar[str] = "masked"

    rate: PositiveShare = 0.5
    masked: PositiveShare = 0.8
    random: Share = 0.1
    layer: Whole | None = None
    decoder_layers: Whole = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.name, self.masked, self.random)
        if self.layer is None and not self.decoder_layers:
            accepted = "1 or more, or 0 with a layer inside the model"
            raise PretrainError(f"mask_later: decoder_layers {self.decoder_layers}: accepted: {accepted}")

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """`tokens_BK`, the tokens shown, and `document_BS`, `position_BS`, `target_BS` of these and then of the masked.

        Every batch has the same K and M, unless rows with more special tokens than can be shown need a larger K.
        """
        vocabulary, length = context.vocabulary, context.length
        slots = min(max(1, round(self.rate * self.masked * length)), length - 1)
        plain = {k: v.numpy() for k, v in rows_to_tensors(rows, length, vocabulary.pad).items()}
        target_BL, hidden_BL = np.full(plain["tokens_BL"].shape, IGNORE), np.zeros(plain["tokens_BL"].shape, bool)
        ordinary = np.flatnonzero(~vocabulary.special_V)
        for b, row in enumerate(rows):
            tokens_L = plain["tokens_BL"][b, : len(row.tokens_L)]
            chosen, hidden = self._choose(tokens_L, slots, length, context)
            target_BL[b, chosen] = tokens_L[chosen]
            hidden_BL[b, chosen[:hidden]] = True
            swapped = chosen[hidden : hidden + round(self.random * len(chosen))]
            tokens_L[swapped] = context.rng.choice(ordinary, len(swapped))
        shown_BL = ~hidden_BL & (plain["document_BL"] > 0)
        longest, shown = int(shown_BL.sum(1).max()), length - slots
        if longest > shown:
            shown = min(length, -(-longest // 16) * 16)
        columns = _columns(shown_BL, shown), _columns(hidden_BL, slots)
        batch = {"tokens_BK": _take(plain["tokens_BL"], columns[0], vocabulary.pad)}
        for name, array_BL, fill in (
            ("document_BS", plain["document_BL"], 0), ("position_BS", plain["position_BL"], 0),
            ("target_BS", target_BL, IGNORE),
        ):  # fmt: skip
            batch[name] = np.concatenate([_take(array_BL, part, fill) for part in columns], axis=1)
        made = {name: torch.from_numpy(array) for name, array in batch.items()}
        return made | {"weight": (made["target_BS"] != IGNORE).sum()}

    def _choose(
        self, tokens_L: NDArray[np.int64], slots: int, length: int, context: Context
    ) -> tuple[NDArray[np.int64], int]:
        """The chosen tokens in random order, and how many of them, the first, are left out: the rest must fit."""
        allowed = np.flatnonzero(~context.vocabulary.special_V[tokens_L])
        count = round(self.rate * len(allowed))
        hidden = max(round(self.masked * count), len(tokens_L) - (length - slots))
        hidden = min(hidden, len(allowed), slots)
        return context.rng.choice(allowed, max(count, hidden), replace=False), hidden

    def modules(self, model: nn.Module) -> nn.Module:
        """The vector of what is masked, and the further blocks."""
        last = len(blocks(model)) - (not self.decoder_layers)  # some block must see what is masked
        if self.layer is not None and not 0 <= self.layer <= last:
            raise PretrainError(f"mask_later: layer {self.layer}: accepted: from 0 to {last}")
        return _Later(model, self.decoder_layers)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean loss over the chosen tokens, and each one's own in the order of the slots."""
        assert isinstance(modules, _Later), "mask_later trains modules beside the model: see `modules`"
        layers, tokens_BK = blocks(model), batch["tokens_BK"]
        layer, shown = len(layers) if self.layer is None else self.layer, tokens_BK.shape[1]
        document_BS, position_BS = batch["document_BS"], batch["position_BS"]
        whole = {"document_BL": document_BS, "position_BL": position_BS}
        inputs = attend(model, whole, causal=False)
        inputs_shown = attend(model, {name: x[:, :shown] for name, x in whole.items()}, causal=False)
        masked_BME = modules.mask_E.expand(*document_BS[:, shown:].shape, -1)
        later_BME = embedded(model, masked_BME, position_BS[:, shown:])

        states = embedded(model, embeddings(model)(tokens_BK), position_BS[:, :shown])
        states = run(model, layers[:layer], states, inputs_shown)
        if layer < len(layers):
            states = torch.cat([states, later_BME], 1)
            states = run(model, layers[layer:], states, inputs)
        states = last_norm(model)(states)
        if layer == len(layers):
            states = torch.cat([states, later_BME], 1)
        states = modules.norm(run(model, modules.blocks, states, inputs))
        states = at(model, str(family(model).head_transform))(states)
        weight_VE, bias_V = head(model)
        value, nll_BS = linear_cross_entropy(
            states, weight_VE, batch["target_BS"], bias_V=bias_V, targets=int(batch["weight"])
        )
        return Loss(value, {}, nll_BS)


class _Later(nn.Module):
    """`mask_E`, the blocks that are thrown away, and the norm after them where the model has one."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        config = at(model, "config")
        self.mask_E = nn.Parameter(torch.randn(config.hidden_size) * config.initializer_range)
        self.blocks = new_blocks(model, count)
        self.norm = copy.deepcopy(last_norm(model)) if count else nn.Identity()


def _columns(chosen_BL: NDArray[np.bool_], width: int) -> NDArray[np.int64]:
    """The numbers of each row's chosen columns, in order, then -1 up to `width`."""
    columns = np.full((len(chosen_BL), width), -1)
    for b, chosen_L in enumerate(chosen_BL):
        places = np.flatnonzero(chosen_L)
        columns[b, : len(places)] = places
    return columns


def _take(array_BL: NDArray[np.int64], columns: NDArray[np.int64], fill: int) -> NDArray[np.int64]:
    """The entries at each row's columns, `fill` where there is none."""
    return np.where(columns >= 0, np.take_along_axis(array_BL, np.maximum(columns, 0), 1), fill)
