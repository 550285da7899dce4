"""What a frozen model makes of an example: one vector, pooled from the states of one layer.

`features(model, batch)` is the protocol: any model of `transformers`, given its batch by its processor, answers with a
vector for each example. `text_features` and `document_features` go through many.

Shape letters: N pieces or documents, B those of a batch, L tokens, patches or frames, E width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pretrain.core.batch import Batch, Vocabulary, to_device
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.generation.finite import watching
from pretrain.core.models.families import at, base, blocks, family, in_table, is_causal, positions_of, set_module
from pretrain.core.processors import Document, Processor, columns_of, inputs_of

POOLINGS = ("mean", "cls", "last")
N = TypeVar("N", bound=np.generic)
Piece: TypeAlias = "NDArray[np.integer] | Document"  # what is read of a document: some of its tokens, or all of it


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients; afterwards each module is as it was.

    While open, outputs that are not finite raise `NotFinite`, in place of answers that are made of them.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), watching(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class Framing:
    """How a piece of text is given to a model: `[bos] tokens [eos]`, without the end where the model is causal.

    A causal model has not seen an end of document after a piece from the middle of one; the beginning it has learnt to
    start from.
    """

    def __init__(self, model: nn.Module, vocabulary: Vocabulary, length: int) -> None:
        self.before = [] if vocabulary.before is None else [vocabulary.before]
        self.after = [] if vocabulary.after is None or is_causal(model) else [vocabulary.after]
        limit = positions_of(model)
        room = limit - len(self.before) - len(self.after) if isinstance(limit, int) else length
        if room < 1:
            raise PretrainError(f"a model of {limit} positions has no room for text; accepted: 3 positions or more")
        self.length = min(length, room)  # tokens of text

    def frame(self, tokens: NDArray[np.integer]) -> list[int]:
        """The model's input for a piece of at most `length` tokens."""
        return [*self.before, *tokens.tolist(), *self.after]


def labelled(
    model: nn.Module, processor: Processor, documents: Sequence[Document], label: str, length: int
) -> list[tuple[Document, Piece]]:
    """The documents that have the label and anything to read, each with what of it is read."""
    return readable(model, processor, [d for d in documents if d.get(label) is not None], length)


def readable(
    model: nn.Module, processor: Processor, documents: Sequence[Document], length: int
) -> list[tuple[Document, Piece]]:
    """The documents that have anything to read, each with what of it is read.

    That is at most `length` tokens from the middle of its text, or of another processor's the document itself.
    """
    known = [d for d in documents if all(d.get(c) is not None for c in columns_of(processor))]
    if not isinstance(processor, PreTrainedTokenizerBase):
        return [(document, document) for document in known]
    room = Framing(model, Vocabulary.of(processor), length).length
    pieces = [middle(ids, room) for ids in encode(processor, [d["text"] for d in known])]
    return [(document, piece) for document, piece in zip(known, pieces, strict=True) if len(piece)]


def piece_features(
    model: nn.Module, processor: Processor, pieces: Sequence[Piece], length: int, *, pooling: str, layer: int
) -> NDArray[np.float32]:
    """`features_NE` of what `readable` gives to read."""
    if not isinstance(processor, PreTrainedTokenizerBase):
        documents = [piece for piece in pieces if isinstance(piece, dict)]
        return document_features(model, processor, documents, length, pooling=pooling, layer=layer)
    framing = Framing(model, Vocabulary.of(processor), length)
    texts = [piece for piece in pieces if isinstance(piece, np.ndarray)]
    return text_features(model, texts, framing, pooling=pooling, layer=layer)


def framed(
    method: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], length: int
) -> list[tuple[list[int], str]]:
    """The model's input for each document that has text, at most `length` tokens from its middle, and its domain.

    Raises `PretrainError` of the evaluation `method` where none has.
    """
    framing = Framing(model, Vocabulary.of(tokenizer), length)
    pieces = [middle(ids, framing.length) for ids in encode(tokenizer, [d["text"] for d in documents])]
    pairs = zip(pieces, documents, strict=True)
    rows = [(framing.frame(piece), str(document.get("domain") or "")) for piece, document in pairs if len(piece)]
    if not rows:
        raise PretrainError(f"{method}: no document has text: accepted: at least one")
    return rows


def middle(tokens: NDArray[N], length: int) -> NDArray[N]:
    """At most `length` tokens from the middle."""
    start = max(0, (len(tokens) - length) // 2)
    return tokens[start : start + length]


def features(model: nn.Module, batch: Batch, *, pooling: str = "mean", layer: int = -1) -> Tensor:
    """`features_BE` of a batch: the base model's arguments by name, as a processor gives them.

    `layer` 0 is the embeddings, n the states after block n, -1 the last states (of an encoder-decoder the encoder's),
    final norm included. `pooling`: `mean` over the positions that `pooled_BL` marks where the batch has it, else over
    those that the batch's masks leave; `cls` the first position; `last` the last that is no padding. A model that gives
    no states but a pooled output gives that.
    """
    states_BLE = states(model, batch, layer).float()
    if states_BLE.ndim == 2:
        return states_BLE
    if pooling == "cls":
        return states_BLE.flatten(1, -2)[:, 0]
    counts_BL = _counted(model, batch, states_BLE)
    states_BLE = states_BLE.flatten(1, -2)
    if pooling == "last":
        mask_BL = batch.get("attention_mask")
        last_B = (counts_BL * torch.arange(counts_BL.shape[1], device=counts_BL.device)).argmax(1)
        if mask_BL is not None and mask_BL.shape == counts_BL.shape:
            last_B = mask_BL.sum(1) - 1
        return states_BLE[torch.arange(len(states_BLE), device=states_BLE.device), last_B]
    return (states_BLE * counts_BL[..., None]).sum(1) / counts_BL.sum(1, keepdim=True).clamp(min=1)


def _counted(model: nn.Module, batch: Batch, states_BLE: Tensor) -> Tensor:
    """Which positions hold something: by the batch's masks, at the rate of the model's patches or frames."""
    inner = base(model)
    counts = torch.ones(states_BLE.shape[:-1], dtype=torch.bool, device=states_BLE.device)
    mask, seen_BTC = batch.get("attention_mask"), batch.get("past_observed_mask")
    if "pooled_BL" in batch:
        counts = batch["pooled_BL"]
    elif mask is not None and mask.shape == counts.shape:
        counts = mask.bool()
    elif mask is not None and hasattr(inner, "_get_feature_vector_attention_mask"):
        counts = at(inner, "_get_feature_vector_attention_mask")(counts.shape[1], mask).bool()
    elif seen_BTC is not None and hasattr(inner, "patchifier"):
        counts = at(inner, "patchifier")(seen_BTC.float()).amax(-1) > 0
    elif "pixel_values" in batch and any(name.endswith("cls_token") for name, _ in inner.named_parameters()):
        counts[:, 0] = False
    return counts.flatten(1)


def states(model: nn.Module, batch: Batch, layer: int = -1) -> Tensor:
    """`states_BLE` of one layer, with nothing of the input hidden; `(B, E)` of a model with a pooled output alone."""
    if in_table(model):
        return _states_of_blocks(model, layer, batch["input_ids"], batch["attention_mask"])
    encoder = getattr(model.config, "is_encoder_decoder", False)
    inner: nn.Module = at(model, "get_encoder")() if encoder else base(model)
    accepted = inspect.signature(inner.forward).parameters
    inputs = {name: value for name, value in batch.items() if name in accepted}
    more = {"output_hidden_states": True} if layer != -1 else {}
    with _nothing_hidden(inner, inputs):
        output = inner(**inputs, **more)
    if layer != -1:
        layers = output.hidden_states
        if not -len(layers) <= layer < len(layers):
            raise PretrainError(f"layer {layer}: accepted: {-len(layers)} to {len(layers) - 1}")
        if layer % len(layers) != len(layers) - 1:
            return layers[layer]
    for name in ("last_hidden_state", "pooler_output", "image_embeds", "text_embeds"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    raise PretrainError(
        f"{type(model).__name__} gives no states: accepted: one with last_hidden_state or pooler_output"
    )


@contextmanager
def _nothing_hidden(inner: nn.Module, inputs: Batch) -> Iterator[None]:
    """Without the part of its input that a model hides from itself for its pretraining.

    ViTMAE drops a share of the patches, in an order drawn by chance; PatchTST blanks a share.
    """
    config, masking = at(inner, "config"), getattr(inner, "masking", nn.Identity())
    ratio = getattr(config, "mask_ratio", None)
    if ratio is not None:
        patches = int(at(inner, "embeddings.patch_embeddings.num_patches"))
        first = next(iter(inputs.values()))
        inputs["noise"] = torch.arange(patches, device=first.device, dtype=torch.float32).expand(len(first), patches)
        config.mask_ratio = 0.0
    hides = getattr(inner, "do_mask_input", None)
    if hides:
        vars(inner)["do_mask_input"] = False
        set_module(inner, "masking", nn.Identity())
    try:
        yield
    finally:
        if ratio is not None:
            config.mask_ratio = ratio
        if hides:
            vars(inner)["do_mask_input"] = hides
            set_module(inner, "masking", masking)


def document_features(
    model: nn.Module,
    processor: Processor,
    documents: Sequence[Document],
    length: int,
    *,
    pooling: str = "mean",
    layer: int = -1,
    batch: int = 32,
) -> NDArray[np.float32]:
    """`features_NE` of whole documents, as the processor reads their columns."""
    if pooling not in POOLINGS:
        raise PretrainError(f"pooling {pooling!r}: accepted: {', '.join(POOLINGS)}")
    device = next(model.parameters()).device
    chunks = []
    with evaluating(model):
        for start in range(0, len(documents), batch):
            inputs = to_device(inputs_of(processor, documents[start : start + batch], length), device)
            chunks.append(features(model, inputs, pooling=pooling, layer=layer).cpu().numpy())
    return _finite(np.concatenate(chunks), layer)


def text_features(
    model: nn.Module,
    pieces: Sequence[NDArray[np.integer]],
    framing: Framing,
    *,
    pooling: str = "mean",
    layer: int = -1,
    batch_tokens: int = 8192,
) -> NDArray[np.float32]:
    """`features_NE` of pieces of text tokens, each beside others of its length.

    `pooling`: `mean` over the text's tokens, `cls` the first special token, `last` the last token.
    """
    _check(model, framing, pooling, layer)
    device = next(model.parameters()).device
    rows = [framing.frame(tokens) for tokens in pieces]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    vectors = [np.empty(0, np.float32)] * len(rows)
    start = 0
    with evaluating(model):
        while start < len(order):
            end = start + 1
            while end < len(order) and (end + 1 - start) * len(rows[order[end]]) <= batch_tokens:
                end += 1
            chosen, start = order[start:end], end
            batch = _batch([rows[i] for i in chosen], framing, device)
            pooled_BE = features(model, batch, pooling=pooling, layer=layer)
            for i, vector_E in zip(chosen, pooled_BE.float().cpu().numpy(), strict=True):
                vectors[i] = vector_E
    return _finite(np.stack(vectors), layer)


def _finite(features_NE: NDArray[np.float32], layer: int) -> NDArray[np.float32]:
    if not np.isfinite(features_NE).all():
        raise PretrainError(f"layer {layer} gives states that are not finite; accepted: a model with finite states")
    return features_NE


def _check(model: nn.Module, framing: Framing, pooling: str, layer: int) -> None:
    if pooling not in POOLINGS:
        raise PretrainError(f"pooling {pooling!r}: accepted: {', '.join(POOLINGS)}")
    if pooling == "cls" and is_causal(model):
        raise PretrainError("pooling 'cls': a causal model's first token sees no text; accepted: mean, last")
    if pooling == "cls" and not framing.before:
        raise PretrainError("pooling 'cls': the tokenizer has no cls or bos token; accepted: mean, last")
    depth = len(blocks(model)) if in_table(model) else int(at(model, "config").num_hidden_layers)
    if not -depth - 1 <= layer <= depth:
        raise PretrainError(f"layer {layer}: accepted: {-depth - 1} to {depth}, for {depth} blocks")


def _batch(rows: list[list[int]], framing: Framing, device: torch.device) -> Batch:
    """Framed pieces as the model's arguments, and `pooled_BL`, True on the text's own tokens."""
    lengths_B = torch.tensor([len(row) for row in rows], device=device)
    # Any id will do for padding: the mask hides it, and it is left out of the mean.
    input_BL = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows], device=device)
    position_L = torch.arange(input_BL.shape[1], device=device)
    text_BL = (position_L >= len(framing.before)) & (position_L < lengths_B[:, None] - len(framing.after))
    mask_BL = (position_L < lengths_B[:, None]).long()
    return {"input_ids": input_BL, "attention_mask": mask_BL, "pooled_BL": text_BL}


def _states_of_blocks(model: nn.Module, layer: int, input_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """The states of one layer, taken from the blocks themselves, so that a block of another class gives them too."""
    encoder = family(model).decoder_blocks is not None
    inner = at(model, "get_encoder")() if encoder else base(model)
    taken: list[Tensor] = []

    def take(_: nn.Module, states: Tensor | tuple[Tensor, ...]) -> None:
        taken.append(states[0] if isinstance(states, tuple) else states)

    every = blocks(model)
    wanted = layer % (len(every) + 1)
    handle = None
    if wanted == 0:
        handle = every[0].register_forward_pre_hook(take)
    elif wanted < len(every):
        handle = every[wanted - 1].register_forward_hook(lambda module, _, states: take(module, states))
    try:
        more = {} if encoder or not family(model).causal else {"use_cache": False}
        last_BLE = inner(input_ids=input_BL, attention_mask=mask_BL, **more).last_hidden_state
    finally:
        if handle is not None:
            handle.remove()
    return taken[0] if taken else last_BLE
