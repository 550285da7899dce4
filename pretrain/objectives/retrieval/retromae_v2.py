"""DupMAE (RetroMAE v2): rebuild a document from its [CLS] state, and its words from the states of all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pretrain.core.batch import Batch, Context, Row, Vocabulary
from pretrain.core.bounds import NonNegative, OpenShare
from pretrain.core.models.cross_entropy import IGNORE, linear_cross_entropy
from pretrain.core.models.families import at, base, embeddings, family, head
from pretrain.objectives import Loss, Objective, summed
from pretrain.objectives._fill import fill
from pretrain.objectives.retrieval._passages import bag_loss, encode, masked_loss, masked_passages, pieces, to_head


@dataclass(frozen=True)
class RetroMAEv2(Objective):
    """RetroMAE v2: Duplex Masked Auto-Encoder For Pre-Training Retrieval-Oriented Language Models (arXiv:2211.08769).

    The encoder sees a document with `rate` of its tokens masked. Three losses are added: that of masked language
    modelling; the mean of -log p(x_i) over all words, by a decoder of one layer whose queries are h_[CLS] + p_i and
    whose keys and values are h_[CLS] and the true e_j + p_j, j ≠ i, of which each i sees its own sample, without
    `decoder_rate` of them; and `bag_weight` times the bag-of-words loss of the vocabulary scores of the other states,
    max-pooled over the document:

        v = max_i W h_i,   L_bow = -1/n Σ_{w in the set of its words} log softmax(v)_w,   n the number of its words

    The decoder shares the encoder's embeddings and head; it is thrown away. Where packing cuts a document, each piece
    is one, with a [CLS] in place of its first token. An encoder with rotary positions lends no p: the decoder has a
    table of its own.
    """

    version: ClassVar[int] = 3  # whole words fill the rate
    families: ClassVar[tuple[str, ...]] = ("bert", "modernbert")
    task: ClassVar[str] = "masked"
    token_weights: ClassVar[bool] = True

    rate: OpenShare = 0.3
    decoder_rate: OpenShare = 0.5
    bag_weight: NonNegative = 0.1
    whole_words: bool = True

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """What `masked_lm` prepares, the originals in `original_BL`, `word_BL`, and `visible_BLL`: each row of it tells
        which tokens the decoder may see to rebuild that position."""
        batch = masked_passages("retromae_v2", self.rate, self.whole_words, rows, context)
        original_BL = batch["original_BL"].numpy()
        visible_BLL = np.zeros((*original_BL.shape, context.length), dtype=bool)
        visible_BLL[:, np.arange(context.length), np.arange(context.length)] = True  # what rebuilds nothing sees itself
        for b, row in enumerate(rows):
            for start, end in zip(row.starts_D, [*row.starts_D[1:], len(row.tokens_L)], strict=True):
                visible_BLL[b, start:end, start:end] = contexts(
                    original_BL[b, start:end], self.decoder_rate, context.vocabulary, context.rng, self.whole_words
                )
        batch["visible_BLL"] = torch.from_numpy(visible_BLL)
        batch["weight_decoder"] = batch["word_BL"].sum()
        return batch

    def modules(self, model: nn.Module) -> nn.Module:
        """The decoder."""
        return Decoder(at(model, "config"), positions=family(model).positions is None)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The three losses; parts `masked_lm`, `decoder`, `bag_of_words`."""
        assert isinstance(modules, Decoder), "retromae_v2 trains a decoder beside the model: see `modules`"
        states_BLE = encode(model, batch)
        ready_BLE = to_head(model, states_BLE)
        masked, nll_BL = masked_loss(model, ready_BLE, batch)
        rebuilt = self._rebuild(model, modules, states_BLE, batch)
        bag = bag_loss(pooled_scores(model, ready_BLE, batch), batch, per_token=True)
        parts = {"masked_lm": masked.detach(), "decoder": rebuilt.detach(), "bag_of_words": bag.detach()}
        terms = {"masked_lm": masked, "decoder": rebuilt, "bag_of_words": self.bag_weight * bag}
        return summed(terms, parts, nll_BL)

    def _rebuild(self, model: nn.Module, decoder: Decoder, states_BLE: Tensor, batch: Batch) -> Tensor:
        """The decoder's loss: the mean over all words."""
        first_BL, piece_BL = pieces(batch)
        cls_BLE = states_BLE[first_BL][piece_BL.clamp(min=0)]  # of the piece that each token belongs to
        position_BL = batch["position_BL"]
        query_BLE = embed(model, decoder, cls_BLE, position_BL)
        token_BLE = embed(model, decoder, embeddings(model)(batch["original_BL"]), position_BL)
        memory_BLE = torch.where(first_BL[..., None], cls_BLE, token_BLE)
        out_BLE = decoder(query_BLE, memory_BLE, batch["visible_BLL"][:, None])
        weight_VE, bias_V = head(model)
        target_BL = torch.where(batch["word_BL"], batch["original_BL"], IGNORE)
        weight_BL = batch.get("token_weight_BL")
        return linear_cross_entropy(to_head(model, out_BLE), weight_VE, target_BL, bias_V=bias_V, weight_BL=weight_BL)[
            0
        ]


class Decoder(nn.Module):
    """One layer as BERT's, whose queries are not its keys and values, and a table of positions where one is needed."""

    def __init__(self, config: PreTrainedConfig, *, positions: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        eps = getattr(config, "layer_norm_eps", None) or config.norm_eps
        self.attention_norm, self.norm = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(getattr(config, "hidden_dropout_prob", 0.0))
        self.attention_dropout = getattr(config, "attention_probs_dropout_prob", 0.0)
        self.positions = nn.Embedding(config.max_position_embeddings, width) if positions else None
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, query_BLE: Tensor, memory_BLE: Tensor, visible_B1LL: Tensor) -> Tensor:
        """Attention over the memory, added to the queries, then the feed-forward; a norm after each."""
        q_BHLD, k_BHLD, v_BHLD = (
            layer(x_BLE).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x_BLE in ((self.query, query_BLE), (self.key, memory_BLE), (self.value, memory_BLE))
        )
        mixed_BHLD = nn.functional.scaled_dot_product_attention(
            q_BHLD, k_BHLD, v_BHLD, visible_B1LL, dropout_p=self.attention_dropout if self.training else 0.0
        )
        attended_BLE = self.dropout(self.output(mixed_BHLD.transpose(1, 2).flatten(2)))
        x_BLE = self.attention_norm(query_BLE + attended_BLE)
        return self.norm(x_BLE + self.dropout(self.down(nn.functional.gelu(self.up(x_BLE)))))


def embed(model: nn.Module, decoder: Decoder, states_BLE: Tensor, position_BL: Tensor) -> Tensor:
    """States with positions added, through the norm of the encoder's embeddings."""
    layer = at(base(model), "embeddings")
    if decoder.positions is None:
        return layer(inputs_embeds=states_BLE, position_ids=position_BL)
    return layer(inputs_embeds=states_BLE + decoder.positions(position_BL))


def pooled_scores(model: nn.Module, ready_BLE: Tensor, batch: Batch) -> Tensor:
    """`scores_PV`: each vocabulary entry's largest score over a piece's tokens but the [CLS].

    Piece by piece, and for the backward pass `max` keeps which token was the largest (`amax` would keep the scores),
    so that the scores of one piece alone are ever held.
    """
    weight_VE, bias_V = head(model)
    first_BL, piece_BL = pieces(batch)
    present_BL = (batch["document_BL"] > 0) & ~first_BL
    # Waits for the device: pieces are of different lengths, and each is cut out by its own.
    sizes = torch.bincount(piece_BL[present_BL], minlength=int(first_BL.sum())).tolist()
    parts = ready_BLE[present_BL].split(sizes)
    empty_1E = ready_BLE.new_zeros(1, ready_BLE.shape[-1])  # a piece that is a [CLS] and nothing else
    return torch.stack([
        nn.functional.linear(part_NE if len(part_NE) else empty_1E, weight_VE, bias_V).max(0).values
        for part_NE in parts
    ])  # fmt: skip


def contexts(
    tokens_N: NDArray[np.int64], rate: float, vocabulary: Vocabulary, rng: np.random.Generator, whole_words: bool
) -> NDArray[np.bool_]:
    """`visible_NN`: for each position of a piece its own sample of the others, which leaves out `rate` of the words.

    Special tokens, the [CLS] among them, are always seen; a position never sees itself, but for the [CLS].
    """
    allowed_N = ~vocabulary.special_V[tokens_N]
    begins_N = ~allowed_N | ~np.concatenate([[False], allowed_N[:-1]])
    begins_N |= vocabulary.starts_word_V[tokens_N] if whole_words else True
    word_N = np.cumsum(begins_N) - 1
    size_W = np.bincount(word_N[allowed_N], minlength=word_N[-1] + 1)
    wanted = round(rate * int(allowed_N.sum()))
    # Words in random order, special tokens of size 0 among them, until the number is reached.
    order_NW = rng.random((len(tokens_N), len(size_W)), dtype=np.float32).argsort(-1)
    fits_NW = np.stack([fill(sizes, wanted) for sizes in size_W[order_NW].tolist()])
    hidden_NW = np.empty_like(fits_NW)
    np.put_along_axis(hidden_NW, order_NW, fits_NW, -1)
    visible_NN = ~(hidden_NW[:, word_N] & allowed_N)
    np.fill_diagonal(visible_NN, False)
    visible_NN[0, 0] = True
    return visible_NN
