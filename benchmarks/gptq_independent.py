"""Our GPTQ beside GPTQModel's, layer by layer on the same weights and text: the loss of held-out outputs.

    pip install gptqmodel        # it asks for a newest torch; --no-deps and what it then misses will do
    python benchmarks/gptq_independent.py CHECKPOINT [--bits 4 3] [--group 64] [--rows 64] [--length 256]

Each linear layer of the blocks is quantised by both from the inputs that it has on `--rows` rows of Python's standard
library, and by rounding to nearest; the loss is the mean squared change of its outputs on 16 other rows. A row is the
median over layers of the losses' ratios, and the range of ours over theirs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.core.checkpoint import load
from pretrain.core.encoding import encode
from pretrain.core.models.families import linears
from pretrain.corpus.sources import PythonStdlib, read
from pretrain.surgery._calibration import weight_of
from pretrain.surgery.compression._grid import round_to_nearest
from pretrain.surgery.compression.gptq import solve

HELD_OUT = 16  # rows


def rows_of_text(tokenizer: Any, count: int, length: int) -> Tensor:
    """The first `length` tokens of as many modules."""
    texts = (document["text"][: 20 * length] for document in read(PythonStdlib(docstrings=False)))
    found = (torch.tensor(encode(tokenizer, [text])[0][:length]) for text in texts)
    return torch.stack(list(itertools.islice((row for row in found if len(row) == length), count)))


def inputs_of(model: Any, ids_BL: Tensor) -> dict[str, Tensor]:
    """What enters each linear layer, `x_NI`."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0].flatten(0, 1)}))
        for name, layer in linears(model).items()
    ]
    with torch.no_grad():
        model(ids_BL)
    for handle in handles:
        handle.remove()
    return seen


def theirs(name: str, weight_OI: Tensor, x_NI: Tensor, bits: int, group: int) -> Tensor:
    """GPTQModel's weight."""
    from gptqmodel.looper.named_module import NamedModule
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    settings = {"act_group_aware": False, "desc_act": False, "sym": True, "damp_percent": 0.01}
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    layer.weight.data = weight_OI.clone()
    named = NamedModule(layer, name=name.rpartition(".")[2], full_name=name, layer_index=0)
    task = GPTQ(named, QuantizeConfig(bits=bits, group_size=group, **settings))
    task.quantizer.configure(perchannel=True)
    for part_NI in x_NI.split(4096):
        task.add_batch(part_NI[None], layer(part_NI)[None])
    found = task.quantize(blocksize=128)[0].float()
    return found if found.shape == weight_OI.shape else found.T


def ours(weight_OI: Tensor, x_NI: Tensor, bits: int, group: int) -> Tensor:
    """Our weight, with the same settings."""
    settings: dict[str, Any] = {"symmetric": True, "desc_act": False, "damping": 0.01, "block_size": 128}
    hessian_II = 2 * x_NI.T @ x_NI / len(x_NI)
    return solve(weight_OI=weight_OI, hessian_II=hessian_II, bits=bits, group_size=group, **settings).dense()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    for name, value in {"group": 64, "rows": 64, "length": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    settings = parser.parse_args()
    model, tokenizer = load(Path(settings.checkpoint))
    ids_BL = rows_of_text(tokenizer, settings.rows + HELD_OUT, settings.length)
    seen, held_out = inputs_of(model, ids_BL[:-HELD_OUT]), inputs_of(model, ids_BL[-HELD_OUT:])
    print("| bits | layers | ours / nearest | theirs / nearest | ours / theirs | range |\n|---|---|---|---|---|---|")
    for bits in settings.bits:
        ratios = []
        for name, layer in linears(model).items():
            weight_OI, x_NI = weight_of(layer), seen[name]
            made = (
                round_to_nearest(weight_OI, bits, settings.group, True).dense(),
                ours(weight_OI.clone(), x_NI, bits, settings.group),
                theirs(name, weight_OI, x_NI, bits, settings.group),
            )
            nearest, own, other = (((held_out[name] @ (weight_OI - w).T) ** 2).mean().item() for w in made)
            ratios.append((own / nearest, other / nearest, own / other))
        columns = [statistics.median(column) for column in zip(*ratios, strict=True)]
        ends = f"{min(r[2] for r in ratios):.3f} to {max(r[2] for r in ratios):.3f}"
        print(f"| {bits} | {len(ratios)} | " + " | ".join(f"{value:.3f}" for value in columns) + f" | {ends} |")


if __name__ == "__main__":
    main()
