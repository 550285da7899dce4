"""The pass over a long prompt computes the part of the attention that each head's pattern foresees."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError
from pretrain.core.files import JSONObject, read_json
from pretrain.core.generation.forward import Forward, pads
from pretrain.core.generation.options import Options
from pretrain.core.generation.rows import continue_rows
from pretrain.core.models.families import family
from pretrain.decoding import Decoding
from pretrain.decoding.long_context._sparse_attention import (
    BLOCK,
    SIZES,
    Pattern,
    SparseForward,
    choose,
    dense,
    sparse_attention,
)

VERTICALS = (30, 100, 500, 1000, 3500)  # the numbers of columns that the search tries
STEP = 50  # of the number of slashes
DEFAULT: list[str | int] = ["vertical_and_slash", 1000, 6096]  # of a head that the authors' files leave out
BLOCKS = 100  # of a block-sparse head of theirs, whatever its file says


@dataclass(frozen=True)
class MInference(Decoding):
    """MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention (arXiv:2407.02490).

    In the pass over the prompt a head computes one of three parts of its attention, in blocks of 64 queries. A-shape:
    the first `sink` keys and the `local` last ones. Vertical-slash: the `vertical` columns j and the `slash` diagonals
    i - j with the largest sums of softmax(q_i k_j / sqrt(d)) over the last `last_q` queries i; the first 30 columns and
    the nearest 100 diagonals are among them. Block-sparse: for each block of queries the `blocks` blocks of 64 keys
    with the largest product of means, mean(q) mean(k). Then decoding is dense over the whole cache. `search` finds each
    head's pattern offline; `patterns` is the JSON file with what it returned, or one that the authors have published:
    a list of layers with `[vertical_and_slash, vertical, slash, error]` by the number of a head, where a head that is
    missing is vertical-slash with 1000 and 6096, and block-sparse is always of 100 blocks. Without one all heads are
    vertical-slash with `vertical` and `slash`, which keep every key of a prompt of up to 6096 tokens.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    samples: ClassVar[bool] = True

    patterns: str | None = None
    vertical: Count = 1000
    slash: Count = 6096
    last_q: Count = 64

    def prefill(
        self, model: PreTrainedModel, input_ids_BL: Tensor, *, attention_mask_BL: Tensor | None = None, new: int = 0
    ) -> tuple[Tensor, Forward]:
        """`logits_BV` after left-padded prompts, and the pass that goes on from them for up to `new` tokens."""
        kept_BL, patterns = pads(input_ids_BL, attention_mask_BL), self.of(model)

        def attend(layer: int, query_BHLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, scaling: float) -> Tensor:
            if all(pattern.whole(query_BHLD.shape[2]) for pattern in patterns[layer]):
                return dense(query_BHLD, key_BGLD, value_BGLD, scaling)
            query_HLD, key_GLD, value_GLD = (x.flatten(0, 1) for x in (query_BHLD, key_BGLD, value_BGLD))
            every = patterns[layer] * len(query_BHLD)
            kept = choose(query_HLD, key_GLD, every, scaling=scaling, last_q=self.last_q)
            return sparse_attention(query_HLD, key_GLD, value_GLD, kept, scaling).view_as(query_BHLD)

        with torch.no_grad():
            forward = SparseForward(model, input_ids_BL.shape[1] + max(0, new), attend)
            return forward.prefill(input_ids_BL, kept_BL), forward

    def of(self, model: PreTrainedModel) -> list[list[Pattern]]:
        """The pattern of each head of each layer."""
        if family(model).name not in self.families:
            raise PretrainError(f"{self.name}: family {family(model).name!r}: accepted: {', '.join(self.families)}")
        layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
        if self.patterns is None:
            return [[Pattern("vertical_slash", (self.vertical, self.slash))] * heads] * layers
        return _read(Path(self.patterns), layers, heads)

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts after a sparse pass over them; returns `tokens_BN`."""
        mask_BL, new = options.attention_mask_BL, options.max_new_tokens
        with torch.inference_mode():
            logits_BV, forward = self.prefill(model, input_ids_BL, attention_mask_BL=mask_BL, new=new)
            tokens_BN = continue_rows(input_ids_BL, logits_BV, lambda token_B: forward.step(token_B[:, None]), options)
        return tokens_BN.clone()


def _read(path: Path, layers: int, heads: int) -> list[list[Pattern]]:
    """The patterns in a file that `search` filled."""
    wanted = f"{layers} layers of {heads} heads, each {{pattern: {' or '.join(SIZES)}, and its sizes, 1 or more}}"
    try:
        given = read_json(path)
        if isinstance(given, list):
            patterns = [[_published(layer.get(str(head), DEFAULT)) for head in range(heads)] for layer in given]
        else:
            patterns = [[_pattern(head) for head in layer] for layer in given["layers"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PretrainError(f"minference: patterns {path}: {error!r}: accepted: {wanted}") from error
    if [len(layer) for layer in patterns] != [heads] * layers or min(
        min(h.sizes) for layer in patterns for h in layer
    ) < 1:
        raise PretrainError(
            f"minference: patterns {path}: {[len(layer) for layer in patterns]} heads: accepted: {wanted}"
        )
    return patterns


def _published(head: list[str | int]) -> Pattern:
    """A head's pattern as the authors' files have it."""
    name, first, second = head[:3]
    kind = {"vertical_and_slash": "vertical_slash", "stream_llm": "a_shape", "block_sparse": "block_sparse"}[str(name)]
    return Pattern(kind, (BLOCKS,) if kind == "block_sparse" else (int(first), int(second)))


def _pattern(head: JSONObject) -> Pattern:
    kind = head["pattern"]
    return Pattern(kind, tuple(int(head[size]) for size in SIZES[kind]))


def search(
    model: PreTrainedModel, batches: Iterable[Tensor], *, sink: int = 1024, local: int = 4096, last_q: int = 64
) -> dict[str, object]:
    """Each head's pattern of least error at the cost of an A-shape of `sink` and `local` keys.

    `batches` are `input_ids_BL` without padding. The cost is what is really computed, products of queries and keys in
    whole blocks. Each number of columns in `VERTICALS` gets as many slashes, a multiple of `STEP`, and block-sparse as
    many blocks, as fit on the first prompt. The error is the sum of |o - o'| over that of |o|, o the dense output of
    the head and o' the sparse one. What is returned is JSON for the field `patterns`.
    """
    for name, value in (("sink", sink), ("local", local), ("last_q", last_q)):
        if value < 1:
            raise PretrainError(f"search: {name} {value}: accepted: 1 or more")
    tried: dict[int, list[dict[Pattern, list[float]]]] = {}  # by layer, of each head: errors by pattern

    def attend(layer: int, query_BHLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, scaling: float) -> Tensor:
        out_BHLD = dense(query_BHLD, key_BGLD, value_BGLD, scaling)
        heads, groups = query_BHLD.shape[1], key_BGLD.shape[1]
        for row in range(len(query_BHLD)):
            for head in range(heads):
                of = head * groups // heads
                qkv = query_BHLD[row, head, None], key_BGLD[row, of, None], value_BGLD[row, of, None]
                errors = tried.setdefault(layer, [{} for _ in range(heads)])[head]
                for pattern in errors or candidates(qkv[0], qkv[1], sink, local, scaling=scaling, last_q=last_q):
                    kept = choose(qkv[0], qkv[1], [pattern], scaling=scaling, last_q=last_q)
                    wrong_LD = sparse_attention(*qkv, kept, scaling)[0] - out_BHLD[row, head]
                    whole = out_BHLD[row, head].abs().sum().clamp(min=1e-30)
                    errors.setdefault(pattern, []).append(float(wrong_LD.abs().sum() / whole))
        return out_BHLD

    with torch.inference_mode():
        for input_ids_BL in batches:
            SparseForward(model, input_ids_BL.shape[1], attend).prefill(input_ids_BL)
    if not tried:
        raise PretrainError("minference: search: no batches: accepted: one or more of input_ids_BL")
    return {
        "sink": sink, "local": local, "last_q": last_q,
        "layers": [[_best(head) for head in tried[layer]] for layer in sorted(tried)],
    }  # fmt: skip


def _best(errors: dict[Pattern, list[float]]) -> dict[str, object]:
    """The pattern of least mean error, of equal ones the first, as it stands in the file."""
    mean = {pattern: sum(values) / len(values) for pattern, values in errors.items()}
    (kind, sizes), error = min(mean.items(), key=lambda item: item[1])
    return {"pattern": kind} | dict(zip(SIZES[kind], sizes, strict=True)) | {"error": error}


def candidates(
    query_1LD: Tensor, key_1LD: Tensor, sink: int, local: int, *, scaling: float, last_q: int = 64
) -> list[Pattern]:
    """The patterns of one head that cost at most as much as the A-shape, which is the first, and no smaller ones."""
    length = query_1LD.shape[1]
    first = Pattern("a_shape", (sink, local))

    def cost(pattern: Pattern) -> int:
        return choose(query_1LD, key_1LD, [pattern], scaling=scaling, last_q=last_q).pairs()

    def slashed(vertical: int, slashes: int) -> int:
        return cost(Pattern("vertical_slash", (vertical, slashes * STEP)))

    budget, patterns = cost(first), [first]
    for vertical in sorted({min(vertical, length) for vertical in VERTICALS}):
        most = _most(functools.partial(slashed, vertical), -(-length // STEP), budget)
        if most:
            patterns.append(Pattern("vertical_slash", (vertical, most * STEP)))
    most = _most(lambda n: cost(Pattern("block_sparse", (n,))), -(-length // BLOCK), budget)
    return [*patterns, Pattern("block_sparse", (most,))] if most else patterns


def _most(cost: Callable[[int], int], high: int, budget: int) -> int:
    """The largest number up to `high` whose cost is within the budget; 0 where 1 is not."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low
