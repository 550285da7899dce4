"""How `softmax_cascade` runs: a pass that may stop at an exit, what it multiplies, and thresholds from held-out text.

Shape letters: B rows, L positions, N tokens of text, M exits and the end, H key heads, D width of a head, E width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from pretrain.core.batch import Batch
from pretrain.core.generation.forward import Forward
from pretrain.core.models.exits import HEADS, exit_logits, states_of_text
from pretrain.core.models.families import at, base, blocks, embeddings, family


@dataclass
class Trace:
    """What decoding did after the prompts: the tokens, and the multiply-accumulate operations of its passes."""

    tokens_BN: Tensor
    depths: list[list[int]] = field(default_factory=list)  # by row: how many blocks gave each new token
    macs: int = 0  # blocks, exits that were asked, keys and values of skipped blocks
    full: int = 0  # of the same passes through all blocks and the head

    @property
    def share(self) -> float:
        """The operations done of those of the whole model; 1 where there was no pass."""
        return self.macs / self.full if self.full else 1.0


class Cascade(Forward):
    """A `Forward` of one unpadded row whose passes after the prompt may stop early."""

    def __init__(
        self, model: PreTrainedModel, length: int, exits: tuple[int, ...], thresholds: tuple[float, ...]
    ) -> None:
        super().__init__(model, length)
        self.thresholds = dict(zip(exits, thresholds, strict=True))
        self.entry, self.config, self.maps = family(model), model.config, getattr(model, HEADS, None)
        width = model.config.num_attention_heads * head_width(model.config)
        self.block_macs = [matrix_macs(block) for block in self.blocks]
        self.fill_macs = [sum(map(matrix_macs, self._projections(number))) for number in range(len(self.blocks))]
        self.key_macs, self.head_macs = 2 * width, embeddings(model).weight.numel()
        self.trace = Trace(torch.empty(0))

    def token(self, token: int) -> tuple[Tensor, int]:
        """One more token; returns the logits after it, `logits_1V`, and how many blocks they took."""
        place, end, trace = self.length, self.length + 1, self.trace
        states_11E = self.embed(torch.tensor([[token]], device=self.device))
        more: dict[str, tuple[Tensor, Tensor]] = {}
        if self.table_CE is None:
            more["position_embeddings"] = (self.cos_1CD[:, place:end], self.sin_1CD[:, place:end])
        else:
            states_11E = self.drop(states_11E + self.table_CE[place:end])
        attention = self.key_macs * end
        trace.full += sum(self.block_macs) + attention * len(self.blocks) + self.head_macs
        for depth, block in enumerate(self.blocks, 1):
            states_11E = block(states_11E, attention_mask=None, past_key_values=self, use_cache=True, **more)
            trace.macs += self.block_macs[depth - 1] + attention
            if depth in self.thresholds:
                logits_1V = exit_logits(self.norm, self.head, self.maps, states_11E[:, -1], depth)
                trace.macs += self.head_macs + (0 if self.maps is None else matrix_macs(self.maps[str(depth)]))
                if float(confidence(logits_1V)) >= self.thresholds[depth]:
                    break
        else:
            logits_1V = self.head(self.norm(states_11E[:, -1]))
            trace.macs += self.head_macs
        for number in range(depth, len(self.blocks)):
            self.update(*self.keys_and_values(number, states_11E, **more), number)
            trace.macs += self.fill_macs[number]
        self.length = end
        return logits_1V, depth

    def keys_and_values(
        self, number: int, states_11E: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """What a block would write into its cache, `_1H1D` each, if these states entered it."""
        block, projections = self.blocks[number], self._projections(number)
        inner_11E = at(block, self.entry.norms[0])(states_11E)
        made = [projection(inner_11E) for projection in projections]
        if len(made) == 1:
            made = list(made[0].chunk(3, -1))[1:]
        keys_11HD, values_11HD = (projected.view(1, 1, -1, head_width(self.config)) for projected in made)
        attention = at(block, self.entry.attention)
        if hasattr(attention, "k_norm"):
            keys_11HD = attention.k_norm(keys_11HD)
        keys_1H1D = keys_11HD.transpose(1, 2)
        if position_embeddings is not None:
            cos_111D, sin_111D = (angles[:, None] for angles in position_embeddings)
            keys_1H1D = keys_1H1D * cos_111D + rotate_half(keys_1H1D) * sin_111D
        return keys_1H1D, values_11HD.transpose(1, 2)

    def _projections(self, number: int) -> list[nn.Module]:
        """The projections to keys and values; the one to queries, too, where the three are one."""
        attention = at(self.blocks[number], self.entry.attention)
        return [at(attention, name) for name in self.entry.queries[-2:]]


def head_width(config: PreTrainedConfig) -> int:
    """The width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def matrix_macs(module: nn.Module) -> int:
    """The multiply-accumulate operations of a module's weight matrices on one token."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)


def confidence(logits: Tensor) -> Tensor:
    """The greatest probability, in float32."""
    return logits.float().softmax(-1).amax(-1)


@torch.no_grad()
def measure(model: PreTrainedModel, batches: Iterable[Batch], exits: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`confidence_MN` and `correct_MN` of each exit and of the end, over the tokens of text that have a next one."""
    maps, norm = getattr(model, HEADS, None), at(base(model), family(model).final_norm or "")
    depths, sure, right = (*exits, len(blocks(model))), [], []
    for states, next_N in states_of_text(model, batches, depths):
        rows = []
        for depth, states_NE in zip(depths, states, strict=True):
            logits_NV = exit_logits(norm, model.lm_head, maps if depth in exits else None, states_NE, depth)
            rows.append((confidence(logits_NV), logits_NV.argmax(-1) == next_N))
        sure.append(torch.stack([row[0] for row in rows]).cpu())
        right.append(torch.stack([row[1] for row in rows]).cpu())
    return (torch.cat(sure, 1), torch.cat(right, 1)) if sure else (torch.empty(0, 0), torch.empty(0, 0))


def paper_threshold(confidence_N: Tensor, correct_N: Tensor, drop: float) -> float:
    """The least δ with α(δ) ≥ max α - `drop`: α(δ) is the accuracy on the tokens of confidence δ or more."""
    sorted_N, order_N = confidence_N.sort()
    left_N = torch.arange(len(order_N), 0, -1, dtype=torch.float64)
    accuracy_N = correct_N[order_N].double().flip(0).cumsum(0).flip(0) / left_N
    first_N = torch.cat([torch.ones(1, dtype=torch.bool), sorted_N[1:] > sorted_N[:-1]])  # of equal confidences
    accuracy_N = accuracy_N.masked_fill(~first_N, -1.0)
    return float(sorted_N[int((accuracy_N >= accuracy_N.max() - drop - 1e-12).nonzero()[0])])


def bounded_thresholds(confidence_MN: Tensor, correct_MN: Tensor, drop: float, never: float) -> tuple[float, ...]:
    """From the first exit on, the least threshold with which the whole cascade has lost at most its part of `drop`.

    An exit loses a token that it predicts wrong and the whole model right, and wins one the other way round. Exit m of
    M may spend the share m/M of the budget, less what those before it have spent.
    """
    exits, count = len(confidence_MN) - 1, confidence_MN.shape[1]
    left_N, spent, thresholds = torch.ones(count, dtype=torch.bool), 0, []
    for number in range(exits):
        places_N = left_N.nonzero()[:, 0]
        sure_N, order_N = confidence_MN[number][places_N].sort(descending=True)
        loss_N = (correct_MN[-1].long() - correct_MN[number].long())[places_N][order_N].cumsum(0)
        allowed = drop * count * (number + 1) / exits - spent + 1e-9
        last_N = torch.cat([sure_N[1:] < sure_N[:-1], torch.ones(len(sure_N[:1]), dtype=torch.bool)])
        fits = (last_N & (loss_N <= allowed)).nonzero()[:, 0]
        thresholds.append(never if len(fits) == 0 else float(sure_N[fits[-1]]))
        if len(fits):
            spent += int(loss_N[fits[-1]])
            left_N[places_N[order_N[: int(fits[-1]) + 1]]] = False
    return tuple(thresholds)


def cascaded(confidence_MN: Tensor, correct_MN: Tensor, thresholds: tuple[float, ...]) -> tuple[float, list[int]]:
    """The accuracy of a cascade on measured tokens, and how many of them leave at each exit and at the end."""
    exit_N = torch.full((confidence_MN.shape[1],), len(thresholds))
    for number in reversed(range(len(thresholds))):
        exit_N[confidence_MN[number] >= thresholds[number]] = number
    right_N = correct_MN.gather(0, exit_N[None])[0]
    return float(right_N.double().mean()), exit_N.bincount(minlength=len(thresholds) + 1).tolist()
