"""How much of a program's syntax tree a frozen model's states hold in a low-rank subspace.

Shape letters: N snippets, B of a batch, T tokens of code, P neighbours (T - 1), E width, K rank, S subword tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pretrain.core.batch import Vocabulary
from pretrain.core.bounds import AnyInteger, Count, Ge, NonNegative, OpenShare, Positive, Whole
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import blocks
from pretrain.core.models.features import Framing, evaluating, states
from pretrain.evaluation import Evaluation, Measured
from pretrain.evaluation._intervals import bounds, resampled_sums
from pretrain.evaluation.probes._syntax import Labels, Snippet, agreement, constituents, snippets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document

SIDES = ("train", "validation", "test")


@dataclass(frozen=True)
class AstProbe(Evaluation):
    """AST-Probe: Recovering abstract syntax trees from hidden representations of pre-trained
    language models (arXiv:2206.11719).

    The syntax tree of n code tokens is three sequences: d, the height at which neighbours part, c, the labels there,
    and u, those of what holds one token. A probe reads them from the frozen states h (the mean of a token's subwords,
    after block `layer`, by default the middle one) through one projection B to `rank` dimensions:
    d_i = ||B (h_i+1 - h_i)||^2, c_i = argmax C B (h_i+1 - h_i), u_i = argmax U B h_i. It learns by a ranking loss of d,
    the cross-entropies of c and u, and `orthogonal` ||B B^T - 1||^2, with Adam until the validation loss has not fallen
    for `patience` epochs. `ast_precision`, `ast_recall` and `ast_f1` compare the named nodes of the recovered trees
    with the true ones', means over the tested snippets. Snippets are the documents' Python functions of at most
    `tokens` tokens, without comments and docstrings, about `snippets` at most; trees are those of Python's `ast`. A
    hash of its document puts a snippet to train, validation or test. Intervals: bootstrap over the tested snippets, the
    probe given.
    """

    estimated: ClassVar[bool] = False
    rank: Count = 128
    layer: AnyInteger | None = None
    orthogonal: NonNegative = 5.0
    lr: Positive = 1e-3
    batch: Count = 32
    epochs: Count = 20
    patience: Count = 5
    tokens: Annotated[int, Ge(2)] = 100
    snippets: Annotated[int, Ge(3)] = 2000
    validation: OpenShare = 0.1
    test: OpenShare = 0.2
    resamples: Count = 1000
    seed: Whole = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        super().__post_init__()
        if self.validation + self.test >= 1:
            raise PretrainError(
                f"ast_probe: validation {self.validation}, test {self.test}: accepted: shares that leave some to train"
            )

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on documents with Python in `text`."""
        depth = len(blocks(model))
        layer = max(1, depth // 2) if self.layer is None else self.layer
        if not -depth - 1 <= layer <= depth:
            raise PretrainError(f"ast_probe: layer {layer}: accepted: {-depth - 1} to {depth}, for {depth} blocks")
        sides = self.split(documents)
        chosen: dict[str, list[Snippet]] = {}
        states: dict[str, list[NDArray[np.float32]]] = {}
        for side, functions in sides.items():
            known = [
                (s, h)
                for s, h in zip(functions, token_states(model, tokenizer, functions, layer), strict=True)
                if h is not None
            ]
            chosen[side], states[side] = [s for s, _ in known], [h for _, h in known]
        if not all(chosen.values()):
            numbers = ", ".join(f"{len(chosen[side])} to {side}" for side in SIDES)
            raise PretrainError(
                f"ast_probe: {len(documents)} documents give {numbers} functions of at most {self.tokens} tokens; "
                "accepted: more documents with Python code"
            )
        probe = self.fit(chosen["train"], states["train"], chosen["validation"], states["validation"])
        tested = zip(chosen["test"], states["test"], strict=True)
        scores_N3 = np.array([agreement(probe.recover(h_TE), constituents(s.d, s.c, s.u)) for s, h_TE in tested])
        means_R3 = resampled_sums(scores_N3, self.resamples, self.seed) / len(scores_N3)
        names = ("ast_precision", "ast_recall", "ast_f1")
        counts = {"ast_tested": len(chosen["test"]), "ast_trained": len(chosen["train"]), "ast_layer": layer}
        return Measured(
            dict(zip(names, scores_N3.mean(0).tolist(), strict=True)) | {k: float(v) for k, v in counts.items()},
            intervals={name: bounds(means_R3[:, k]) for k, name in enumerate(names)},
        )

    def split(self, documents: Sequence[Document]) -> dict[str, list[Snippet]]:
        """The documents' functions by side, each once."""
        sides: dict[str, list[Snippet]] = {side: [] for side in SIDES}
        seen: set[tuple[str, ...]] = set()
        for document in documents:
            fresh = [s for s in snippets(document["text"], self.tokens) if s.tokens not in seen]
            seen |= {s.tokens for s in fresh}
            part = _share(document["text"])
            side = "test" if part < self.test else "validation" if part < self.test + self.validation else "train"
            sides[side] += {s.tokens: s for s in fresh}.values()
            if sum(map(len, sides.values())) >= self.snippets:
                break
        return sides

    def fit(
        self,
        train: Sequence[Snippet],
        states: Sequence[NDArray[np.float32]],
        validation: Sequence[Snippet],
        held: Sequence[NDArray[np.float32]],
    ) -> Probe:
        """The probe that has the least validation loss."""
        probe = Probe(states[0].shape[1], self.rank, train, self.seed)
        optimiser = torch.optim.Adam(probe.parameters(), lr=self.lr)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.1, patience=0)
        rng = np.random.default_rng(self.seed)
        best, kept, waited = float("inf"), probe.state_dict(), 0
        for _ in range(self.epochs):
            order = rng.permutation(len(train))
            for start in range(0, len(train), self.batch):
                batch = order[start : start + self.batch]
                loss = (
                    probe.loss([train[i] for i in batch], [states[i] for i in batch]) + self.orthogonal * probe.skew()
                )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            with torch.no_grad():
                losses = [
                    float(probe.loss(validation[start : start + self.batch], held[start : start + self.batch]))
                    for start in range(0, len(validation), self.batch)
                ]
            reached = float(np.mean(losses))
            plateau.step(reached)
            waited += 1
            if reached < best:
                best, waited = reached, 0
                kept = {name: value.clone() for name, value in probe.state_dict().items()}
            if waited == self.patience:
                break
        probe.load_state_dict(kept)
        return probe


class Probe(nn.Module):
    """The projection, and the vectors of the labels seen in training."""

    def __init__(self, width: int, rank: int, train: Sequence[Snippet], seed: int) -> None:
        super().__init__()
        self.c: list[Labels] = list(dict.fromkeys(label for s in train for label in s.c))
        self.u: list[Labels] = list(dict.fromkeys(label for s in train for label in s.u))
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).uniform_(-0.05, 0.05, generator=generator))

        rank = min(rank, width)
        self.projection_EK = uniform(width, rank)
        self.vectors_KC, self.vectors_KU = uniform(rank, len(self.c)), uniform(rank, len(self.u))

    def forward(self, h_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """d, and the scores of c and of u."""
        seen_BTK = h_BTE @ self.projection_EK
        step_BPK = seen_BTK[:, 1:] - seen_BTK[:, :-1]
        return (step_BPK**2).sum(-1), step_BPK @ self.vectors_KC, seen_BTK @ self.vectors_KU

    def loss(self, snippets: Sequence[Snippet], states: Sequence[NDArray[np.float32]]) -> Tensor:
        """The ranking loss of d, with the cross-entropies of c and u; labels that training has not are left out."""
        number_c, number_u = ({label: i for i, label in enumerate(labels)} for labels in (self.c, self.u))
        h_BTE = nn.utils.rnn.pad_sequence([torch.from_numpy(h_TE) for h_TE in states], batch_first=True)
        d_BP, c_BPC, u_BTU = self(h_BTE)
        width = h_BTE.shape[1]
        true_BP = torch.tensor([[*s.d, *[-1] * (width - 1 - len(s.d))] for s in snippets])
        c_BP = torch.tensor([[*(number_c.get(x, -1) for x in s.c), *[-1] * (width - 1 - len(s.c))] for s in snippets])
        u_BT = torch.tensor([[*(number_u.get(x, -1) for x in s.u), *[-1] * (width - len(s.u))] for s in snippets])
        return ranking_loss(d_BP, true_BP) + _cross_entropy(c_BPC, c_BP) + _cross_entropy(u_BTU, u_BT)

    def skew(self) -> Tensor:
        """How far the projection is from an orthogonal one."""
        inner_KK = self.projection_EK.T @ self.projection_EK
        return ((inner_KK - torch.eye(len(inner_KK))) ** 2).sum()

    def recover(self, h_TE: NDArray[np.float32]) -> Counter[tuple[str, int, int]]:
        """The named nodes of the tree that the states hold."""
        with torch.no_grad():
            d_BP, c_BPC, u_BTU = self(torch.from_numpy(h_TE)[None])
        c, u = ([labels[i] for i in x[0].argmax(-1)] for labels, x in ((self.c, c_BPC), (self.u, u_BTU)))
        return constituents(d_BP[0].tolist(), c, u)


def ranking_loss(d_BP: Tensor, true_BP: Tensor) -> Tensor:
    """The mean of max(0, 1 - (d_i - d_j)) over the pairs of a snippet with true d_i > d_j; -1 is padding."""
    known_BP = true_BP >= 0
    above_BPP = (true_BP[:, :, None] > true_BP[:, None]) & known_BP[:, :, None] & known_BP[:, None]
    short_BPP = torch.relu(1 - (d_BP[:, :, None] - d_BP[:, None]))
    return (short_BPP * above_BPP).sum() / above_BPP.sum().clamp(min=1)


def _cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    """The mean over the targets that are not -1; 0 if there are none."""
    total = nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten(), ignore_index=-1, reduction="sum")
    return total / (target >= 0).sum().clamp(min=1)


def token_states(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    snippets: Sequence[Snippet],
    layer: int,
    batch_tokens: int = 8192,
) -> list[NDArray[np.float32] | None]:
    """Of each snippet the states `h_TE` of its tokens; None where the model has too few positions for it.

    As in the paper the model reads the tokens of code parted by single spaces.
    """
    framing = Framing(model, Vocabulary.of(tokenizer), 1 << 30)
    texts = dict.fromkeys(("" if i == 0 else " ") + token for s in snippets for i, token in enumerate(s.tokens))
    subwords = dict(zip(texts, encode(tokenizer, list(texts)), strict=True))
    vectors: list[NDArray[np.float32] | None] = [None] * len(snippets)
    todo = []
    for number, snippet in enumerate(snippets):
        parts = [subwords[("" if i == 0 else " ") + token] for i, token in enumerate(snippet.tokens)]
        owner_S = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        if len(owner_S) <= framing.length and all(map(len, parts)):
            todo.append((number, framing.frame(np.concatenate(parts)), owner_S))
    todo.sort(key=lambda item: len(item[1]))
    device, start = next(model.parameters()).device, 0
    with evaluating(model):
        while start < len(todo):
            end = start + 1
            while end < len(todo) and (end + 1 - start) * len(todo[end][1]) <= batch_tokens:
                end += 1
            width = len(todo[end - 1][1])
            input_BS = torch.tensor([[*row, *[0] * (width - len(row))] for _, row, _ in todo[start:end]], device=device)
            mask_BS = torch.tensor(
                [[1] * len(row) + [0] * (width - len(row)) for _, row, _ in todo[start:end]], device=device
            )
            states_BSE = states(model, {"input_ids": input_BS, "attention_mask": mask_BS}, layer).float().cpu().numpy()
            for (number, _, owner_S), h_SE in zip(todo[start:end], states_BSE, strict=True):
                sums_TE = np.zeros((owner_S[-1] + 1, h_SE.shape[1]), np.float32)
                np.add.at(sums_TE, owner_S, h_SE[len(framing.before) :][: len(owner_S)])
                vectors[number] = (sums_TE / np.bincount(owner_S)[:, None]).astype(np.float32)
            start = end
    return vectors


def _share(text: str) -> float:
    """A number from 0 to 1 by a hash of its own."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=b"ast_probe").digest()
    return int.from_bytes(digest) / 2**64
