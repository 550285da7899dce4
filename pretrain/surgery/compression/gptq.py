"""Weights of a few bits from second-order information, packed or as plain dense weights.

Shape letters: N tokens, O outputs, I inputs, G groups of inputs, C inputs of a block of columns, R rows of words.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pretrain.core.bounds import Count, OpenShare
from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import at, family, in_table, set_module
from pretrain.core.models.layers import Linear, sides
from pretrain.dial.effort import Task, Work, by_columns, through
from pretrain.surgery import Inputs, Surgery
from pretrain.surgery._calibration import (
    Blocks,
    batches_of,
    factors_of,
    inverse_factor,
    parts,
    plain_linears,
    set_weight,
    weight_of,
)
from pretrain.surgery.compression._grid import (
    ROUNDED,
    GroupSize,
    Quantised,
    grid,
    groups_of,
    nearest,
    pack,
    round_to_nearest,
    unpack,
    words,
)

COLUMN = 15.5  # operations on a column of weights


def solve(
    weight_OI: Tensor, hessian_II: Tensor, *, bits: int, group_size: int, symmetric: bool, desc_act: bool,
    damping: float, block_size: int,
) -> Quantised:  # fmt: skip
    """Column by column to the nearest grid point, the error made up for by the columns to come.

    A group's grid is set when its first column comes, from the weights as they are then; blocks end where groups do.
    """
    outputs, inputs = weight_OI.shape
    size = inputs if group_size == -1 else group_size
    order_I = torch.arange(inputs, device=weight_OI.device)
    if desc_act:
        order_I = torch.argsort(hessian_II.diagonal(), descending=True, stable=True)
    W_OI = weight_OI[:, order_I].clone()
    U_II = inverse_factor(hessian_II[order_I][:, order_I], damping, "gptq").to(W_OI.dtype)
    code_OI, scales, zeros = torch.empty_like(W_OI, dtype=torch.uint8), [], []
    cuts = sorted({*range(0, inputs, block_size), *range(0, inputs, size), inputs})
    for start, end in itertools.pairwise(cuts):
        if start % size == 0:
            scale_O, zero_O = grid(W_OI[:, start : start + size], bits, symmetric)
            scales.append(scale_O)
            zeros.append(zero_O)
        error_OC = W_OI.new_zeros(outputs, end - start)
        for i in range(start, end):
            code_O = nearest(W_OI[:, i], scale_O, zero_O, bits)
            error_O = (W_OI[:, i] - scale_O * (code_O - zero_O)) / U_II[i, i]
            code_OI[:, i] = code_O
            W_OI[:, i:end] -= torch.outer(error_O, U_II[i, i:end])
            error_OC[:, i - start] = error_O
        W_OI[:, end:] -= error_OC @ U_II[start:end, end:]
    back_I = torch.argsort(order_I)
    group_I = (torch.arange(inputs, device=W_OI.device) // size)[back_I]
    return Quantised(code_OI[:, back_I], torch.stack(scales, 1), torch.stack(zeros, 1), group_I)


class PackedLinear(nn.Module):
    """A linear layer of packed integers in the layout of AutoGPTQ; takes the place of `layer`.

    `qweight` (words of the inputs' codes, O), `qzeros` (G, words of the outputs' zeros), `scales` (G, O) and `g_idx`,
    the group of each input. Symmetric zeros are stored less one, as the first version of that format has them; others
    as they are, as its second version does, since the first has no room for a zero of 0.
    """

    linear_like = True
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def __init__(self, layer: Linear, bits: int, group_size: int, symmetric: bool) -> None:
        super().__init__()
        self.bits, self.offset = bits, int(symmetric)
        self.out_features, self.in_features = sides(layer)
        groups, device = groups_of(self.in_features, group_size), layer.weight.device

        def blank(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*sizes, dtype=dtype, device=device)

        self.register_buffer("qweight", blank(words(self.in_features, bits), self.out_features))
        self.register_buffer("qzeros", blank(groups, words(self.out_features, bits)))
        self.register_buffer("scales", blank(groups, self.out_features, dtype=torch.float16))
        self.register_buffer("g_idx", blank(self.in_features))
        self.bias = layer.bias

    def fill(self, matrix: Quantised) -> None:
        """Take the numbers."""
        self.qweight.copy_(pack(matrix.code_OI.T, self.bits))
        self.qzeros.copy_(pack(matrix.zero_OG - self.offset, self.bits).T)
        self.scales.copy_(matrix.scale_OG.T)
        self.g_idx.copy_(matrix.group_I)

    def quantised(self) -> Quantised:
        """The numbers again, in float32."""
        code_IO = unpack(self.qweight, self.bits, self.in_features).to(torch.uint8)
        zero_OG = unpack(self.qzeros.T.contiguous(), self.bits, self.out_features).float() + self.offset
        return Quantised(code_IO.T, self.scales.float().T, zero_OG, self.g_idx.long())

    def dense(self) -> Tensor:
        """The weight as one matrix O × I."""
        return self.quantised().dense()

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias; W is made for the call and not kept."""
        return F.linear(x, self.dense().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """What `print` says."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, groups={len(self.scales)}"


@dataclass(frozen=True)
class GPTQ(Surgery):
    """GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (arXiv:2210.17323).

    Each linear layer of the blocks gets integers of `bits` bits that keep its outputs on calibration text: with H =
    2XXᵀ + λI, λ = `damping` times H's mean diagonal, and U the upper Cholesky factor of H⁻¹, the columns are rounded
    one after another, and each one's error goes to those after it: W[:, i:] -= (w_i - q_i) / U[i, i] · U[i, i:], lazily
    in blocks of `block_size`. Blocks of the model come in order, each on what the quantised ones before it give;
    `true_sequential` goes on the same way inside of a block. Each row has a min-max grid of its own for every
    `group_size` inputs (-1: for all), set from the weights as they are when the group's turn comes. `desc_act` takes
    the columns with the greatest inputs first. `solver: rtn` rounds to nearest, the paper's baseline, and needs no
    text. `pack: false` leaves a plain model with dense weights on the grid. Embeddings and head stay as they are.
    """

    families: ClassVar[tuple[str, ...]] = ("causal", "masked")

    bits: Literal[2, 3, 4, 8] = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    desc_act: bool = False
    true_sequential: bool = False
    damping: OpenShare = 0.01
    block_size: Count = 128
    solver: Literal["gptq", "rtn"] = "gptq"
    pack: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.desc_act and self.solver == "rtn":
            raise PretrainError(
                "gptq: desc_act True: accepted: only with solver gptq; rounding knows no order", place=("desc_act",)
            )

    @property
    def needs_text(self) -> bool:
        """Rounding does not."""
        return self.solver == "gptq"

    def work(self, task: Task) -> Work:
        """Passes, second moments and a column after another; of rounding only that, and packing."""
        packing = through(task.linear, 12 if self.pack else 2)
        if self.solver == "rtn":
            return through(task.linear, ROUNDED) + packing
        steps = len({each.place for each in task.inner}) if self.true_sequential else 1
        passes = Work((2 + steps) * task.forward + task.second_moments())
        return sum((by_columns(each, COLUMN) for each in task.inner), passes + packing)

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The model with its linear layers quantised."""
        layers = plain_linears(model, self.name, self.families, inside=True)
        training = model.training
        model.eval()
        if self.solver == "gptq":
            self._calibrated(model, layers, inputs)
        for name in [*layers]:  # those that no block has used among them
            layer = layers.pop(name)
            self._keep(model, name, layer, self._put(layer, self._nearest(weight_of(layer))))
        model.train(training)
        if self.pack:
            model.config.quantization_config = self.quantization_config()
            # Of Llama's packed weights it was checked that others open them to the same logits.
            record(model, self, foreign=family(model).name != "llama")
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Replace the layers; their numbers are zero."""
        if not self.pack:
            return super().restore(model)
        for name, layer in plain_linears(model, self.name, self.families, inside=True).items():
            replaced = PackedLinear(layer, self.bits, self.group_size, self.symmetric)
            set_module(model, name, replaced.train(model.training))
        return model

    def _nearest(self, weight_OI: Tensor) -> Quantised:
        return round_to_nearest(weight_OI, self.bits, self.group_size, self.symmetric)

    def _put(self, layer: Linear, matrix: Quantised) -> Quantised:
        """Put the weights on the grid into the layer, so that later layers are calibrated on what comes of them."""
        set_weight(layer, matrix.dense())
        return matrix

    def _calibrated(self, model: PreTrainedModel, layers: dict[str, Linear], inputs: Inputs | None) -> None:
        """The blocks in order, each calibrated on what the quantised ones before it give; `layers` loses theirs.

        A block is packed as soon as its states have passed: of one block alone codes and weights are in memory at once.
        """
        batches, names = batches_of(inputs, self.name), {id(layer): name for name, layer in layers.items()}
        stack = Blocks(model, batches)
        for number in range(len(stack)):
            matrices: dict[str, Quantised] = {}
            for step in self._steps(model, stack, number, names):
                together = stack.layers(number, step)
                hessians = stack.hessians(number, together)
                for name, layer in together.items():
                    matrices[names[id(layer)]] = self._put(layer, self._solved(layer, hessians[name]))
            stack.advance(number)
            for name, matrix in matrices.items():
                self._keep(model, name, layers.pop(name), matrix)

    def _steps(self, model: PreTrainedModel, stack: Blocks, number: int, names: dict[int, str]) -> Iterator[list[str]]:
        """The layers of a block that are calibrated together, in the order of its forward pass."""
        block = stack.blocks[number]
        if in_table(model):
            steps: list[Sequence[str]] = list(parts(model).values())
        else:
            steps = [*stack.order(number, {n: m for n, m in block.named_modules() if id(m) in names})]
        if not self.true_sequential:
            steps = [tuple(dict.fromkeys(name for step in steps for name in step))]
        return _in_order(block, steps)

    def _solved(self, layer: Linear, hessian_II: Tensor) -> Quantised:
        return solve(
            weight_OI=weight_of(layer), hessian_II=hessian_II, bits=self.bits, group_size=self.group_size,
            symmetric=self.symmetric, desc_act=self.desc_act, damping=self.damping, block_size=self.block_size,
        )  # fmt: skip

    def _keep(self, model: PreTrainedModel, name: str, layer: Linear, matrix: Quantised) -> None:
        """Put the packed layer in the place of the dense one, where it is to be packed."""
        if self.pack:
            replaced = PackedLinear(layer, self.bits, self.group_size, self.symmetric)
            replaced.fill(matrix)
            set_module(model, name, replaced.train(model.training))

    def quantization_config(self) -> dict[str, object]:
        """What `transformers` and GPTQModel read in `config.json` of such weights."""
        try:
            quantizer = f"pretrain:{version('pretrain')}"
        except PackageNotFoundError:
            quantizer = "pretrain"
        return {
            "quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "sym": self.symmetric,
            "desc_act": self.desc_act, "damp_percent": self.damping, "true_sequential": self.true_sequential,
            "checkpoint_format": "gptq" if self.symmetric else "gptq_v2", "pack_dtype": "int32", "lm_head": False,
            "meta": {"quantizer": [quantizer]},
        }  # fmt: skip


def _in_order(block: nn.Module, steps: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """The steps of a block, each where layers are factorised as one step of first factors and one of second ones."""
    for step in steps:
        paths = [factors_of(name, at(block, name)) for name in step]
        for depth in range(max(map(len, paths))):
            yield [path[depth] for path in paths if depth < len(path)]
