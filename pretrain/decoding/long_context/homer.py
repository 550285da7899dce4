"""A prompt beyond the context limit is read in chunks that are pruned and merged, two by two, on the way up."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pretrain.core.bounds import Count, Ge, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.foreign.paths import expanded
from pretrain.core.generation.forward import Forward
from pretrain.core.generation.rows import continue_rows
from pretrain.core.method import Ref
from pretrain.core.models.families import additive, blocks, family
from pretrain.core.weights import load_tensors
from pretrain.decoding import Decoding
from pretrain.decoding._tree import prompts
from pretrain.decoding.long_context._homer import Plan, attending, mean_significance, read

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pretrain.core.batch import Batch
    from pretrain.core.generation.options import Options
    from pretrain.decoding.long_context._homer import Chunk

FILE = "homer_bias.safetensors"
_AFFIX = 100  # tokens of the prefix and of the suffix in the authors' language modelling


@dataclass(frozen=True)
class Homer(Decoding):
    """Hierarchical Context Merging: Better Long Context Understanding for Pre-trained LLMs (arXiv:2404.10308).

    A prompt longer than `max_chunk_len` becomes 2^h chunks. Each is the first `prefix` tokens, a part of the context
    and the last `suffix` tokens, with positions from 0 and the suffix at one place in all. `layers_warmup` blocks and
    N_0 more read the chunks apart; then neighbours merge, N blocks a level: contexts side by side, each token at its
    position, affixes' states, keys and values as means. At the last block before each merge a chunk is cut to half its
    context, at the last of all to `target_len`, by the lowest s_i = max over heads of a_(last, i) - b(distance of i);
    what is cut leaves the caches of all blocks below as well. No position exceeds `max_chunk_len` and the new tokens.
    The bias b, per block, is the mean of s over text: `calibrate` writes its file, `bias` names it (none: b = 0).
    None: `max_chunk_len` half the model's limit; `target_len` as much; affixes 100 tokens, at most an eighth of it;
    `layers_warmup` 3/8 of the blocks (the authors' 12 of 32), fewer where the tree is too high for that.
    """

    max_chunk_len: Annotated[int, Ge(3)] | None = None
    target_len: Annotated[int, Ge(3)] | None = None
    layers_warmup: Whole | None = None
    prefix: Whole | None = None
    suffix: Count | None = None
    bias: Ref = ""

    longer: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    samples: ClassVar[bool] = True

    def lengths(self, model: PreTrainedModel) -> tuple[int, int, int, int, int]:
        """The model's limit, the chunks' length, the target and the affixes' lengths."""
        if family(model).name not in self.families:
            raise PretrainError(f"{self.name}: family {family(model).name!r}: accepted: {', '.join(self.families)}")
        limit = model.config.max_position_embeddings
        chunk = limit // 2 if self.max_chunk_len is None else self.max_chunk_len
        if not 3 <= chunk < limit:
            raise PretrainError(
                f"homer: max_chunk_len {chunk}: accepted: from 3 to {limit - 1}, below the model's limit"
            )
        prefix, suffix = (
            max(1, min(_AFFIX, chunk // 8)) if value is None else value for value in (self.prefix, self.suffix)
        )
        if chunk - prefix - suffix < 2:
            raise PretrainError(f"homer: prefix {prefix} and suffix {suffix}: accepted: together at most {chunk - 2}")
        target = chunk if self.target_len is None else self.target_len
        if not prefix + suffix < target <= chunk:
            raise PretrainError(f"homer: target_len {target}: accepted: from {prefix + suffix + 1} to {chunk}")
        return limit, chunk, target, prefix, suffix

    def plan(self, model: PreTrainedModel, length: int) -> Plan:
        """How a prompt of `length` tokens is read."""
        _, chunk, target, prefix, suffix = self.lengths(model)
        layers = len(blocks(model))
        if length <= chunk:
            if length < prefix + suffix:
                prefix = suffix = 0
            return Plan(prefix, suffix, ((prefix, length - suffix),), ((0, layers),), (target,))
        context, room = length - prefix - suffix, chunk - prefix - suffix
        height = (-(-context // room) - 1).bit_length()
        if height + 1 > layers:
            most = prefix + suffix + room * 2 ** (layers - 1)
            raise PretrainError(f"homer: a prompt of {length} tokens: accepted: at most {most} in {layers} blocks")
        warmup = 3 * layers // 8 if self.layers_warmup is None else self.layers_warmup
        level = (layers - min(warmup, layers - height - 1)) // (height + 1)
        first = layers - level * height
        cuts = [prefix + context * number // 2**height for number in range(2**height + 1)]
        return Plan(
            prefix, suffix, tuple(itertools.pairwise(cuts)),
            ((0, first), *((first + level * number, first + level * (number + 1)) for number in range(height))),
            (*[prefix + room // 2 + suffix] * height, target),
        )  # fmt: skip

    def read(
        self, model: PreTrainedModel, input_ids_BL: Tensor, attention_mask_BL: Tensor | None = None
    ) -> list[Chunk]:
        """What each left-padded prompt becomes: its last states, and the keys and values that are kept of it."""
        rows = [ids_1L[0] for ids_1L in prompts(input_ids_BL, attention_mask_BL)]
        chunk = self.lengths(model)[1]
        bias_ND = self._bias(len(blocks(model)), chunk) if self.bias else None
        with torch.inference_mode():
            forward = Forward(model, min(chunk, max(map(len, rows))))
            with attending(model):
                return [read(forward, self.plan(model, len(ids_L)), ids_L, bias_ND) for ids_L in rows]

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts, read row by row and continued together; returns `tokens_BN`."""
        limit, chunk, *_ = self.lengths(model)
        mask_BL, new = options.attention_mask_BL, options.max_new_tokens
        longest = input_ids_BL.shape[-1] if mask_BL is None else int(mask_BL.sum(1).max())
        longest = min(chunk, longest)
        if longest + new > limit:
            raise PretrainError(
                f"homer: max_new_tokens {new}: accepted: at most {limit - longest}, what the model's limit "
                f"of {limit} leaves"
            )
        chunks = self.read(model, input_ids_BL, mask_BL)
        with torch.inference_mode():
            forward = _continued(model, chunks, longest + new)
            last_BE = torch.cat([chunk.states_1TE[:, -1] for chunk in chunks])
            return continue_rows(
                input_ids_BL,
                forward.head(forward.norm(last_BE)),
                lambda token_B: forward.step(token_B[:, None]),
                options,
            )

    def calibrate(self, model: PreTrainedModel, batches: Iterable[Batch], file: Path | str) -> Path:
        """Write the bias: the mean significance by distance over the batches' rows, each cut to a chunk's length.

        `file` ends in .safetensors, or is a folder. Documents that share a row are read as one
        text; rows with padding before that length are left out.
        """
        length = self.lengths(model)[1]
        rows = []
        for batch in batches:
            ids_BL = batch["input_ids"]
            kept_BL = batch.get("attention_mask", torch.ones_like(ids_BL))[:, :length] > 0
            if ids_BL.shape[1] >= length:
                rows.append(ids_BL[kept_BL.all(1), :length])
        rows_BL = torch.cat(rows) if rows else torch.empty(0)
        if len(rows_BL) == 0:
            raise PretrainError(
                f"homer: calibration without a row of {length} tokens: accepted: rows of a chunk's length"
            )
        path = _file(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"bias_ND": mean_significance(model, rows_BL.to(model.device)).contiguous()}, path)
        return path

    def _bias(self, layers: int, distances: int) -> Tensor:
        path = _file(self.bias)
        try:
            bias_ND = load_tensors(path)["bias_ND"]
        except (OSError, SafetensorError, KeyError) as error:
            raise PretrainError(f"homer: bias {path}: {error}; accepted: a file that `calibrate` wrote") from error
        if bias_ND.ndim != 2 or len(bias_ND) != layers or bias_ND.shape[1] < distances:
            raise PretrainError(
                f"homer: bias of shape {tuple(bias_ND.shape)} in {path}: accepted: {layers} blocks and at least "
                f"{distances} distances"
            )
        return bias_ND


def _file(place: Path | str) -> Path:
    path = expanded(place)
    return path if path.suffix == ".safetensors" else path / FILE


def _continued(model: PreTrainedModel, chunks: list[Chunk], room: int) -> Forward:
    """A `Forward` whose cache holds each row's chunk on the right, and whose next positions are the rows' own."""
    forward = Forward(model, room)
    sizes = [len(chunk.position_T) for chunk in chunks]
    most = max(sizes)
    for layer in range(len(forward.blocks)):
        pairs = [chunk.cache[layer] for chunk in chunks]
        keys, values = (
            torch.cat([torch.nn.functional.pad(pair[which], (0, 0, most - pair[which].shape[2], 0)) for pair in pairs])
            for which in (0, 1)
        )
        forward.update(keys, values, layer)
    forward.length = most
    next_B = torch.stack([chunk.position_T[-1] for chunk in chunks]) + 1
    if bool((next_B != most).any()):
        forward.start_B1 = (next_B - most)[:, None]
    if min(sizes) < most:
        place_C = torch.arange(room, device=forward.device)
        held_BC = place_C >= most - torch.tensor(sizes, device=forward.device)[:, None]
        forward.pad_mask_B11C = additive(held_BC[:, None, None], forward.dtype)
    return forward
