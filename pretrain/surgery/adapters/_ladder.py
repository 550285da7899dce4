"""The weights of a narrow block that are cut out of a wide one, by what matters most.

Shape letters: E width, O outputs, I inputs, H heads, K heads of keys and values, D width of a head, F feed-forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core.batch import Batch, document_mask
from pretrain.core.models.cross_entropy import IGNORE, linear_cross_entropy
from pretrain.core.models.families import at, attention_inputs, blocks, embeddings, family, head, hidden
from pretrain.core.models.layers import Linear
from pretrain.surgery._calibration import parts, set_weight, weight_of


class Heads(NamedTuple):
    """Of one block's attention: how many heads, how many of keys and values, how wide, and whether positions rotate."""

    queries: int
    shared: int
    width: int
    rotary: bool


def heads_of(model: PreTrainedModel) -> Heads:
    """Those of the model's blocks."""
    config = model.config
    count = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // count
    shared = getattr(config, "num_key_value_heads", None) or count
    return Heads(count, shared, width, family(model).name == "llama")


def fisher(model: PreTrainedModel, batches: Sequence[Batch]) -> dict[int, Tensor]:
    """The mean over batches of the squared gradient of the causal loss, by `id` of each parameter.

    Each gradient is squared and let go as soon as it is there, and blocks are computed a second time on the way back:
    never in memory are the gradients of the whole model, or the activations of all blocks.
    """
    trained = [(weight, weight.requires_grad) for weight in model.parameters()]
    mode, squares = model.training, {id(weight): torch.zeros_like(weight, dtype=torch.float32) for weight, _ in trained}

    def add(weight: Tensor) -> None:
        if weight.grad is not None:
            squares[id(weight)].addcmul_(weight.grad.float(), weight.grad.float(), value=1 / len(batches))
            weight.grad = None

    model.eval().requires_grad_(True)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for block in blocks(model):
        block.training = True  # itself, which is when it is computed a second time; what is in it drops nothing out
    handles = [weight.register_post_accumulate_grad_hook(add) for weight, _ in trained]
    try:
        for batch in batches:
            tokens_BL, document_BL = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
            target_BL = torch.full_like(tokens_BL, IGNORE)
            same_BL = (document_BL[:, 1:] == document_BL[:, :-1]) & (document_BL[:, 1:] > 0)
            target_BL[:, :-1] = torch.where(same_BL, tokens_BL[:, 1:], IGNORE)
            position_BL = batch["position_ids"].to(model.device)
            inputs = attention_inputs(model, document_mask(document_BL, causal=True), position_BL)
            weight_VE, bias_V = head(model)
            states_BLE = hidden(model, input_ids=tokens_BL, **inputs)
            loss, _ = linear_cross_entropy(states_BLE, weight_VE, target_BL, bias_V=bias_V)
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad()
        model.gradient_checkpointing_disable()
        model.train(mode)
        for weight, requires_grad in trained:
            weight.requires_grad_(requires_grad)
    return squares


class Importance:
    """How much each entry of a weight matters: its size, or its entry in the Fisher information."""

    def __init__(self, measured: dict[int, Tensor] | None = None) -> None:
        self.measured = measured

    def of(self, layer: Linear) -> Tensor:
        """`score_OI` of a linear layer."""
        if self.measured is None:
            return weight_of(layer).abs()
        score = self.measured[id(layer.weight)]
        return score if isinstance(layer, nn.Linear) else score.T

    def of_table(self, table: nn.Embedding) -> Tensor:
        """`score_VE` of the embeddings."""
        return table.weight.detach().abs() if self.measured is None else self.measured[id(table.weight)]


def largest(score: Tensor, count: int) -> Tensor:
    """Where the `count` largest of the last dimension are, in order."""
    return score.topk(count, dim=-1).indices.sort(dim=-1).values


def kept_width(model: PreTrainedModel, importance: Importance, count: int) -> Tensor:
    """Which of the width's E places stay: the same in all blocks, for their states are added up."""
    score_VE = importance.of_table(embeddings(model))
    return largest(score_VE.float().sum(0), count)


def cut(model: PreTrainedModel, block: nn.Module, narrow: nn.Module, width_E: Tensor, importance: Importance) -> Tensor:
    """Fill a narrow block from a wide one; returns which places of a head's queries stay, for rotary tables.

    A head's queries and keys keep the same places, its values and their outputs too. Rotary positions turn places in
    pairs, with one table for all heads: there the pairs are the same in all.
    """
    entry, heads, shapes = family(model), heads_of(model), parts(model)
    wide: dict[str, Linear] = {path: at(block, path) for group in shapes.values() for path in group}
    small: dict[str, Linear] = {path: at(narrow, path) for path in wide}
    fused = len(shapes["queries"]) == 1
    score_OI = [importance.of(wide[path]) for path in shapes["queries"]]
    if fused:
        score_OI = list(score_OI[0].chunk(3))
    reduction = len(weight_of(wide[shapes["down"][0]])) // len(width_E)
    query_KD, value_KD = _kept_heads(
        heads, score_OI, importance.of(wide[shapes["output"][0]]), heads.width // reduction
    )

    rows = (
        _rows(heads, query_KD, heads.queries),
        _rows(heads, query_KD, heads.shared),
        _rows(heads, value_KD, heads.shared),
    )
    taken: dict[str, tuple[Tensor, Tensor]] = {}
    if fused:
        size = heads.queries * heads.width
        taken[shapes["queries"][0]] = torch.cat([row + n * size for n, row in enumerate(rows)]), width_E
    else:
        taken |= {path: (row, width_E) for path, row in zip(shapes["queries"], rows, strict=True)}
    taken[shapes["output"][0]] = width_E, _rows(heads, value_KD, heads.queries)
    score_F = importance.of(wide[shapes["down"][0]]).sum(0)
    score_F = score_F + sum(importance.of(wide[path]).sum(1) for path in shapes["up"])
    inner_F = largest(score_F, len(score_F) // reduction)
    taken |= {path: (inner_F, width_E) for path in shapes["up"]} | {shapes["down"][0]: (width_E, inner_F)}

    for path, (out_O, in_I) in taken.items():
        set_weight(small[path], weight_of(wide[path])[out_O][:, in_I])
        if wide[path].bias is not None:
            small[path].bias.data.copy_(wide[path].bias[out_O])
    for path in entry.norms:
        cut_norm(at(block, path), at(narrow, path), width_E)
    for name in ("q_norm", "k_norm"):  # of each head
        if hasattr(at(block, entry.attention), name):
            path = f"{entry.attention}.{name}"
            cut_norm(at(block, path), at(narrow, path), query_KD[0])
    return query_KD[0]


def cut_norm(wide: nn.Module, narrow: nn.Module, kept: Tensor) -> None:
    """The norm's scale, and shift where it has one, at the places that stay."""
    for name, parameter in narrow.named_parameters():
        parameter.data.copy_(wide.get_parameter(name).detach()[kept])


def _kept_heads(heads: Heads, score_OI: list[Tensor], output_EO: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which places of each head of keys and of values stay."""
    groups = heads.queries // heads.shared
    query_KD = score_OI[0].sum(1).view(heads.shared, groups, heads.width).sum(1)
    query_KD = query_KD + score_OI[1].sum(1).view(heads.shared, heads.width)
    value_KD = score_OI[2].sum(1).view(heads.shared, heads.width)
    value_KD = value_KD + output_EO.sum(0).view(heads.shared, groups, heads.width).sum(1)
    if not heads.rotary:
        return largest(query_KD, count), largest(value_KD, count)
    half = heads.width // 2
    pairs = largest(query_KD.sum(0).view(2, half).sum(0), count // 2)
    return torch.cat([pairs, pairs + half]).expand(heads.shared, -1), largest(value_KD, count)


def _rows(heads: Heads, kept_KD: Tensor, count: int) -> Tensor:
    """The rows of a matrix to `count` heads, where each group of heads shares one of `kept_KD`."""
    kept_HD = kept_KD.repeat_interleave(count // heads.shared, dim=0)
    return (kept_HD + heads.width * torch.arange(count, device=kept_KD.device)[:, None]).flatten()
