"""Deeper layers keep the keys and values of fewer tokens: those that recent tokens attend to."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from pretrain.core.bounds import Count, Positive, PositiveShare, Share, Whole
from pretrain.core.generation.rows import continue_rows, mask_of, prefill, stepper
from pretrain.decoding import Decoding
from pretrain.decoding.cache._pyramid import running

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from pretrain.core.generation.options import Options


@dataclass(frozen=True)
class PyramidInfer(Decoding):
    """PyramidInfer: Pyramid KV Cache Compression for High-throughput LLM Inference (arXiv:2405.12532).

    `with method(model): model.generate(...)`. In the pass over a prompt of L tokens the last
    R = floor(`recent_ratio` L) + 1 are recent, the others context. After block l of N, the share r_l of the context
    left with the highest s_j = mean over heads h and recent i of w_i a_hij goes on to the next block, with the recent;
    the rest is neither computed nor cached any more. w rises linearly from 1 to `distance_weight`; r_l falls from 1 to
    `prefill_decay_ratio` p: r_l = p + (1 - p) (1 + cos(pi l / N)) / 2 ("constant": p), so caches shrink with depth.
    The first `streamingllm_sink_len` tokens stay, and no context falls to `min_context_length` or below. While
    generating, the newest R tokens are whole; of each block of `exceed_length_to_compress` generated ones before them,
    layer l keeps the share `gen_compress_ratio` r'_l by the same score, r' falling from 1 to `gen_decay_ratio`.
    A token that left the prompt early has the logits of the states that it left with. Attention is PyTorch's SDPA.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    samples: ClassVar[bool] = True

    recent_ratio: Share = 0.2
    prefill_decay_ratio: PositiveShare = 0.9
    prefill_decay_strategy: Literal["cosine", "constant"] = "cosine"
    min_context_length: Whole = 64
    layerwise_downsample_interval: Count = 1
    streamingllm_sink_len: Whole = 4
    distance_weight: Positive = 1.2
    gen_decay_ratio: PositiveShare = 0.1
    gen_decay_strategy: Literal["cosine", "constant"] = "cosine"
    gen_compress_ratio: PositiveShare = 0.9
    exceed_length_to_compress: Count = 16

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """A context in which the model's caches are pyramids."""
        return running(self, model)

    def kept(self, layer: int, context: int, layers: int, prompt: int) -> int:
        """How many of `context` tokens go on after block `layer` of `layers`; `prompt` tokens there were at first."""
        share = _share(layer, layers, self.prefill_decay_ratio, self.prefill_decay_strategy)
        least = min(self.min_context_length, prompt - 1 - int(prompt * self.recent_ratio))
        wanted = int(context * share)
        return context if layer % self.layerwise_downsample_interval or wanted <= least else wanted

    def kept_of_block(self, layer: int, layers: int) -> int:
        """How many of a block of generated tokens a layer keeps."""
        share = _share(layer, layers, self.gen_decay_ratio, self.gen_decay_strategy)
        return max(1, int(self.exceed_length_to_compress * self.gen_compress_ratio * share))

    def lengths(self, prompt: int, layers: int, new: int = 0) -> tuple[int, ...]:
        """How many tokens each layer's cache holds after a prompt and, one at a time, `new` tokens."""
        recent, block, lengths = int(prompt * self.recent_ratio) + 1, self.exceed_length_to_compress, []
        context = max(0, prompt - recent)
        blocks = max(0, (new - recent) // block)
        for layer in range(layers):
            lengths.append(min(prompt, context + recent) + new - blocks * (block - self.kept_of_block(layer, layers)))
            context = self.kept(layer, context, layers, prompt)
        return tuple(lengths)

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts with pyramid caches; returns `tokens_BN`, padded with `pad` after the end."""
        mask_BL = mask_of(self.name, input_ids_BL, options.attention_mask_BL)
        rows, length = input_ids_BL.shape
        tokens_BN = input_ids_BL.new_full((rows, length + options.max_new_tokens), options.pad)
        tokens_BN[:, :length], uniform_NB, longest = input_ids_BL, options.draws(rows), length
        length_B = mask_BL.sum(1)
        for real in length_B.unique().tolist():  # what is kept is a share of the prompt's own length
            (row_G,) = (length_B == real).nonzero(as_tuple=True)
            ids_GL, mask_GL = input_ids_BL[row_G, length - real :], mask_BL[row_G, length - real :]
            uniform_NG = None if uniform_NB is None else uniform_NB[:, row_G.to(uniform_NB.device)]
            with torch.no_grad(), self(model):
                logits_GV, cache = prefill(model, ids_GL, mask_GL)
                new_GN = continue_rows(ids_GL, logits_GV, stepper(model, cache, mask_GL), options, uniform_NG)[:, real:]
            end = length + new_GN.shape[1]
            tokens_BN[row_G, length:end], longest = new_GN, max(longest, end)
        return tokens_BN[:, :longest]


def _share(layer: int, layers: int, ratio: float, strategy: str) -> float:
    """The share kept after block `layer`: from 1 down to `ratio` by half a cosine, or `ratio`."""
    return ratio if strategy == "constant" else ratio + (1 - ratio) * (1 + math.cos(math.pi * layer / layers)) / 2
