"""New subwords that begin as mixtures of old ones of similar meaning, in embeddings of two thin factors.

Shape letters: V rows, N new tokens, K neighbours, E width, R the factors' common length, D length of a word vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core.bounds import Count, Positive, Whole
from pretrain.core.checkpoint import record
from pretrain.core.encoding import text_of
from pretrain.core.errors import PretrainError
from pretrain.core.method import Ref
from pretrain.core.models.families import embeddings
from pretrain.core.models.layers import like
from pretrain.surgery import Inputs, Surgery, report
from pretrain.surgery._random import generator
from pretrain.surgery._tokens import expand
from pretrain.surgery.vocabulary._vectors import read, subwords

CHUNK = 1024  # rows
RANK = 1e-14  # of the greatest eigenvalue: what is below is rounding


class FactorisedEmbedding(nn.Module):
    """Embeddings coordinates_VR @ primitives_RE; takes the place of `layer`."""

    def __init__(self, layer: nn.Embedding, rank: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = layer.weight.shape
        self.padding_idx = layer.padding_idx
        self.coordinates = nn.Parameter(torch.zeros(self.num_embeddings, rank, **like(layer.weight)))
        self.primitives = nn.Parameter(torch.zeros(rank, self.embedding_dim, **like(layer.weight)))

    @property
    def weight(self) -> Tensor:
        """The whole table, made anew."""
        return self.coordinates @ self.primitives

    def forward(self, ids: Tensor) -> Tensor:
        """The tokens' embeddings."""
        return F.embedding(ids, self.coordinates, self.padding_idx) @ self.primitives


class FactorisedHead(nn.Module):
    """The head that is tied to such embeddings."""

    def __init__(self, embedding: FactorisedEmbedding, bias_V: nn.Parameter | None) -> None:
        super().__init__()
        self.tied = (embedding,)  # not a submodule: the factors are stored once
        self.bias = bias_V

    @property
    def weight(self) -> Tensor:
        """The whole table, made anew."""
        return self.tied[0].weight

    def forward(self, states: Tensor) -> Tensor:
        """The logits."""
        (embedding,) = self.tied
        return F.linear(F.linear(states, embedding.primitives), embedding.coordinates, self.bias)


@dataclass(frozen=True)
class Ofa(Surgery):
    """OFA: A Framework of Initializing Unseen Subword Embeddings for Efficient Large-scale Multilingual Continued
    Pretraining (arXiv:2311.08849).

    The embeddings U Σ Vᵀ become two factors, coordinates F = U_R and primitives P = Σ_R V_Rᵀ, R the `dimension`; the
    head, tied to them, uses both. The tokens of `tokenizer` that the checkpoint's lacks are added. With the mean of
    the words that a subword is part of, in external aligned word vectors, as its own vector, a new token's coordinates
    are Σ_k softmax(s_k / temperature) F_k over the `neighbors` old subwords k of the highest cosine s_k; of a token
    that is an old one but for case they are that one's; where no word has it, normal with the old ones' mean and
    deviation. Old rows keep theirs. `dimension` 0, or the width: no factors, mixtures of whole rows, of a head that is
    not tied too. A head's bias is mixed alike. `vectors` are files (.vec or .txt, .json, .safetensors) of one space,
    of each the first `max_words` (0: all).
    """

    new_vocabulary: ClassVar[bool] = True

    tokenizer: Ref
    vectors: tuple[Ref, ...]
    dimension: Whole = 400
    neighbors: Count = 10
    temperature: Positive = 0.1
    max_words: Whole = 0

    def __post_init__(self) -> None:
        """Refuse what gives no mixture."""
        super().__post_init__()
        if self.vectors == ():
            raise PretrainError("ofa: vectors []: accepted: one or more files of word vectors")

    @property
    def estimated(self) -> bool:
        """How many tokens are new, and how many words have vectors, is not known before the files are read."""
        return False

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model with more rows and, of a smaller dimension, in factors."""
        factors = self._rank(model)
        words, vectors_WD = read(self.name, self.vectors, self.max_words)
        table_VE = embeddings(model).weight.detach()
        old, new = expand(self.name, model, self.tokenizer, inputs)
        assert inputs is not None and inputs.tokenizer is not None
        before, after = inputs.tokenizer, inputs.extra["tokenizer"]
        near_VD, far_VD = (subwords(t, words, vectors_WD, max(old + new) + 1) for t in (before, after))
        alike = _same_but_for_case(before, after, new)
        mixed = [i for i in new if i not in alike and far_VD[i].any()]
        mixture = _mixture(near_VD[old], far_VD[mixed], self.neighbors, self.temperature)
        counts = {"new_tokens": len(new), "copied": len(alike), "mixed": len(mixed)}
        report(inputs, **{f"ofa/{name}": count for name, count in counts.items()})
        source = generator(self.name, inputs)

        def fill(into_VX: Tensor, from_VX: Tensor) -> None:
            """Write the old rows and the new ones, in float64 a few rows at a time."""
            into_VX[: len(from_VX)] = from_VX.to(into_VX)
            places = torch.tensor(old, dtype=torch.long, device=from_VX.device)
            mean_X, deviation_X = _moments(from_VX, places)
            for rows in torch.tensor(new, dtype=torch.long).split(CHUNK):
                drawn = torch.randn(len(rows), *from_VX.shape[1:], generator=source, dtype=torch.float64)
                into_VX[rows] = (mean_X + deviation_X * drawn.to(mean_X.device)).to(into_VX)
            if alike:
                into_VX[list(alike)] = from_VX[list(alike.values())].to(into_VX)
            parts = (part.split(CHUNK) for part in (torch.tensor(mixed, dtype=torch.long), *mixture))
            for rows, where_NK, share_NK in zip(*parts, strict=True):
                where_NK, share_NK = places[where_NK.to(places.device)], share_NK.to(places.device)
                into_VX[rows] = torch.einsum("nk,nk...->n...", share_NK, from_VX[where_NK].double()).to(into_VX)

        head: nn.Linear | None = model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        if bias is not None:
            fill(bias, bias.detach().clone()[: len(table_VE)])
        if not factors:
            weight = embeddings(model).weight
            fill(weight, table_VE)
            if head is not None and head.weight is not weight:
                fill(head.weight, head.weight.detach().clone()[: len(table_VE)])
            return model
        coordinates_VR, primitives_RE = factorised(table_VE, factors)
        model = self.restore(model)
        layer = model.get_input_embeddings()
        assert isinstance(layer, FactorisedEmbedding)
        fill(layer.coordinates, coordinates_VR)
        layer.primitives.copy_(primitives_RE)
        record(model, self)
        return model

    def _rank(self, model: PreTrainedModel) -> int:
        """The factors' length; 0 where there are none."""
        layer, head = model.get_input_embeddings(), model.get_output_embeddings()
        if not isinstance(layer, nn.Embedding):
            raise PretrainError(f"ofa: the embeddings are a {type(layer).__name__}; accepted: a plain table")
        rows, width = layer.weight.shape
        if self.dimension in (0, width):
            return 0
        if self.dimension > min(rows, width):
            raise PretrainError(f"ofa: dimension {self.dimension}: accepted: 0 to {min(rows, width)}")
        shared = sum(isinstance(m, nn.Embedding) and m.weight is layer.weight for m in model.modules())
        if shared > 1 or (head is not None and head.weight is not layer.weight):
            what = "embeddings shared by several layers" if shared > 1 else "a head that is not tied"
            raise PretrainError(f"ofa: dimension {self.dimension} with {what}: accepted: 0, or one table, tied")
        return self.dimension

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put the factors, yet zero, in place of the table."""
        head: nn.Linear | None = model.get_output_embeddings()
        embedding = FactorisedEmbedding(embeddings(model), self.dimension)
        model.set_input_embeddings(embedding)
        if head is not None:
            model.set_output_embeddings(FactorisedHead(embedding, head.bias))
        return model


def factorised(table_VE: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The greatest `rank` of the singular vectors: U, V × R, and Σ Vᵀ, R × E, of the table U Σ Vᵀ.

    By the eigenvectors of its E × E Gram matrix, in float64 with some rows of the table at a time.
    """
    parts = table_VE.split(CHUNK)
    gram_EE = torch.zeros(table_VE.shape[1], table_VE.shape[1], dtype=torch.float64, device=table_VE.device)
    for part_NE in parts:
        gram_EE += part_NE.double().T @ part_NE.double()
    value_E, vector_EE = torch.linalg.eigh(gram_EE)  # in ascending order
    S_R, V_ER = value_E.flip(0)[:rank].clamp(min=0).sqrt(), vector_EE.flip(1)[:, :rank]
    there_R = value_E.flip(0)[:rank] > value_E[-1] * RANK
    unit_ER = V_ER * torch.where(there_R, 1 / S_R, 0)
    coordinates_VR = torch.cat([(part_NE.double() @ unit_ER).to(table_VE.dtype) for part_NE in parts])
    return coordinates_VR, (S_R * V_ER).T


def _moments(table_VX: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the rows at these places, in float64."""
    parts = places.split(CHUNK)
    mean_X = sum((table_VX[part].double().sum(0) for part in parts), torch.zeros(())) / len(places)
    square_X = sum(((table_VX[part].double() - mean_X).square().sum(0) for part in parts), torch.zeros(()))
    return mean_X, (square_X / len(places)).sqrt()


def _mixture(
    old_VD: NDArray[np.float64], new_ND: NDArray[np.float64], neighbors: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Which old subwords each new one is mixed of, by the cosine of their vectors, and their shares."""
    near_VD, far_ND = (F.normalize(torch.from_numpy(x), dim=1) for x in (old_VD, new_ND))
    count = min(neighbors, len(near_VD))
    places, shares = [torch.zeros(0, count, dtype=torch.long)], [torch.zeros(0, count, dtype=torch.float64)]
    for part_ND in far_ND.split(CHUNK):
        cosine_NK, place_NK = (part_ND @ near_VD.T).topk(count, dim=1)
        places.append(place_NK)
        shares.append(torch.softmax(cosine_NK / temperature, dim=1))
    return torch.cat(places), torch.cat(shares)


def _same_but_for_case(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, ids: list[int]) -> dict[int, int]:
    """New tokens whose text is an old token's but for case, with the old one; of several the last.

    Tokens of bytes that are no whole character have no text.
    """
    special = set(old.all_special_ids)
    lower = {text_of(old, [i]).lower(): i for i in sorted(old.get_vocab().values()) if i not in special}
    texts = {i: text_of(new, [i]).lower() for i in ids}
    return {i: lower[text] for i, text in texts.items() if text in lower and text and "\ufffd" not in text}
