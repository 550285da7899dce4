"""Cheap substitutes for ELECTRA's generator: tokens are replaced by chance, or by those that were hard to tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch, Context, Row, rows_to_tensors
from pretrain.core.bounds import Ge, NonNegative, OpenShare
from pretrain.core.checkpoint import checkpoint_of, load
from pretrain.core.errors import PretrainError
from pretrain.core.method import Ref
from pretrain.core.models.attention import attend
from pretrain.core.models.cross_entropy import IGNORE
from pretrain.core.models.families import at, base, embeddings
from pretrain.objectives import Loss, Objective
from pretrain.objectives._masking import choose_words
from pretrain.objectives._token_loss import token_loss


@dataclass(frozen=True)
class RandomTokenSubstitution(Objective):
    """Efficient pre-training objectives for Transformers (arXiv:2104.09694).

    `rate` of the tokens are replaced, never by a mask token. `rts`: by ordinary tokens drawn uniformly; the encoder
    tells for each token whether it is the original (mean binary cross-entropy over all). `c_rts`: the same, but the
    replacement comes from a statistical generator. The vocabulary is cut into `clusters` by k-means of the embeddings
    (the model's own at the start, or those of the checkpoint `embeddings`); of a token of cluster a, cluster b takes
    the place with probability

        P(b | a) = softmax_b(beta · (n_ab - min_b n_ab) / (max_b n_ab - min_b n_ab)),

    and then any of its tokens. n_ab starts at 1; each replacement that was not detected adds 1, each detected takes 1
    away. `slm` (swapped language modelling): masked language modelling over the tokens replaced as in `rts`. The names
    and the constants are those of the authors' code, of *Effective Pre-Training Objectives for Transformer-based
    Autoencoders* (arXiv:2210.13536). Two things in it are taken for faults and are otherwise here: a pair of clusters
    that a step replaces several times changes n_ab each time (there, by an assignment to repeated indices, once), and
    tokens that were not replaced change no n_aa (there they do, unless `update_only_on_predictions` is set).
    """

    version: ClassVar[int] = 3  # whole words fill the rate
    families: ClassVar[tuple[str, ...]] = ("bert", "modernbert")
    shares_vocabulary: ClassVar[tuple[str, ...]] = ("embeddings",)

    objective: Literal["rts", "c_rts", "slm"] = "rts"
    rate: OpenShare = 0.15
    whole_words: bool = False
    clusters: Annotated[int, Ge(2)] = 100
    beta: NonNegative = 2.0
    embeddings: Ref | None = None

    @property
    def token_weights(self) -> bool:
        """Masked language modelling follows them."""
        return self.objective == "slm"

    @property
    def task(self) -> str:
        """A detector needs no vocabulary head."""
        return "masked" if self.objective == "slm" else "base"

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """`tokens_BL` with tokens replaced, the originals in `original_BL`; for `slm` the latter where replaced, as
        `target_BL`; for `c_rts` nothing is replaced yet: `chosen_BL` tells where the generator must."""
        vocabulary = context.vocabulary
        batch = rows_to_tensors(rows, context.length, vocabulary.pad)
        original_BL = batch["tokens_BL"].clone()
        tokens_BL, chosen_BL = batch["tokens_BL"].numpy(), np.zeros(original_BL.shape, dtype=bool)
        for b, row in enumerate(rows):
            tokens_L = row.tokens_L.astype(np.int64)
            chosen_BL[b, : len(tokens_L)] = choose_words(tokens_L, self.rate, vocabulary, context.rng, self.whole_words)
        if self.objective == "c_rts":
            batch["chosen_BL"], batch["special_V"] = torch.from_numpy(chosen_BL), torch.from_numpy(vocabulary.special_V)
        else:
            ordinary = np.flatnonzero(~vocabulary.special_V)
            tokens_BL[chosen_BL] = context.rng.choice(ordinary, int(chosen_BL.sum()))
        if self.objective == "slm":
            batch["target_BL"] = torch.where(torch.from_numpy(chosen_BL), original_BL, IGNORE)
            return batch | {"weight": (batch["target_BL"] != IGNORE).sum()}
        return batch | {"original_BL": original_BL, "weight": (batch["document_BL"] > 0).sum()}

    def modules(self, model: nn.Module) -> nn.Module | None:
        """The binary head and, for `c_rts`, the generator's counts."""
        if self.objective == "slm":
            return None
        pooler = getattr(base(model), "pooler", None)
        if pooler is not None:
            pooler.requires_grad_(False)  # nothing is asked of it, and processes wait for every gradient
        width = int(at(model, "config").hidden_size)
        head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, 1))
        head.apply(at(model, "_init_weights"))
        made = nn.ModuleDict({"head": head})
        if self.objective == "c_rts":
            made["generator"] = Generator(self._clusters(model), self.beta)
        return made

    def _clusters(self, model: nn.Module) -> Tensor:
        """`cluster_V`: the cluster of each token."""
        from sklearn.cluster import KMeans

        weight_VE = embeddings(model).weight
        if self.embeddings is not None:
            size = len(weight_VE)
            weight_VE = embeddings(load(checkpoint_of(Path(self.embeddings)))[0]).weight
            if len(weight_VE) != size:
                raise PretrainError(
                    f"random_token_substitution: embeddings {self.embeddings}: {len(weight_VE)} tokens; "
                    f"accepted: a checkpoint with the model's vocabulary of {size}"
                )
        x_VE = weight_VE.detach().float().cpu().numpy()
        means = KMeans(min(self.clusters, len(x_VE)), n_init=1, random_state=0).fit(x_VE)
        return torch.from_numpy(means.labels_.astype(np.int64))

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The mean loss; of a detector also the share of `replaced` tokens and of those `detected` among them."""
        if self.objective == "slm":
            return token_loss(model, batch, causal=False)
        assert isinstance(modules, nn.ModuleDict), "a detector's head is beside the model: see `modules`"
        tokens_BL, original_BL, present_BL = batch["tokens_BL"], batch["original_BL"], batch["document_BL"] > 0
        generator = modules["generator"] if self.objective == "c_rts" else None
        if isinstance(generator, Generator):
            if (
                not modules.training or next(modules["head"].parameters()).grad is None
            ):  # the first micro-batch of a step
                generator.settle()
            chosen_BL = batch["chosen_BL"]
            tokens_BL = tokens_BL.masked_scatter(chosen_BL, generator.draw(tokens_BL[chosen_BL], batch["special_V"]))
        states_BLE = base(model)(input_ids=tokens_BL, **attend(model, batch, causal=False)).last_hidden_state
        score_BL = modules["head"](states_BLE)[..., 0].float()
        replaced_BL = tokens_BL != original_BL
        value = nn.functional.binary_cross_entropy_with_logits(score_BL[present_BL], replaced_BL[present_BL].float())
        detected_BL = replaced_BL & (score_BL.detach() > 0)
        if isinstance(generator, Generator) and modules.training:
            generator.learn(original_BL[replaced_BL], tokens_BL[replaced_BL], detected_BL[replaced_BL])
        parts = {
            "replaced": replaced_BL.sum() / present_BL.sum(),
            "detected": detected_BL.sum() / replaced_BL.sum().clamp(min=1),
        }
        return Loss(value, parts)


class Generator(nn.Module):
    """The statistical generator: how often each pair of clusters got past the detector, less how often it did not.

    What a step's micro-batches find counts from the next step on, so that all of a step draw from the same counts.
    """

    cluster_V: Tensor
    count_CC: Tensor
    pending_CC: Tensor  # not counted yet

    def __init__(self, cluster_V: Tensor, beta: float) -> None:
        super().__init__()
        number = int(cluster_V.max()) + 1
        self.beta = beta
        self.register_buffer("cluster_V", cluster_V)
        self.register_buffer("count_CC", torch.ones(number, number, dtype=torch.int64))
        self.register_buffer("pending_CC", torch.zeros(number, number, dtype=torch.int64), persistent=False)
        self.register_state_dict_pre_hook(lambda generator, *_: generator.settle())

    def probability_CC(self) -> Tensor:
        """P(b | a), a row for each a."""
        count_CC = self.count_CC.float()
        least_C1, most_C1 = count_CC.amin(1, keepdim=True), count_CC.amax(1, keepdim=True)
        return torch.softmax(self.beta * (count_CC - least_C1) / (most_C1 - least_C1).clamp(min=1), 1)

    def draw(self, token_N: Tensor, special_V: Tensor) -> Tensor:
        """A replacement for each token, never a special one."""
        number = len(self.count_CC)
        cluster_V = self.cluster_V[: len(special_V)].masked_fill(special_V, number)
        order_V, size_C = cluster_V.argsort(stable=True), cluster_V.bincount(minlength=number + 1)[:number]
        first_C = size_C.cumsum(0) - size_C
        odds_NC = self.probability_CC()[self.cluster_V[token_N]] * (size_C > 0)
        chosen_N = torch.multinomial(odds_NC, 1)[:, 0] if len(token_N) else token_N
        inside_N = (torch.rand(len(token_N), device=token_N.device) * size_C[chosen_N]).long()
        return order_V[first_C[chosen_N] + torch.minimum(inside_N, size_C[chosen_N] - 1)]

    def settle(self) -> None:
        """Count what was found."""
        self.count_CC += self.pending_CC
        self.pending_CC.zero_()

    def learn(self, original_N: Tensor, token_N: Tensor, detected_N: Tensor) -> None:
        """Note replacements that were detected (-1) and that were not (+1), those of all processes."""
        change_CC, pair = torch.zeros_like(self.count_CC), (self.cluster_V[original_N], self.cluster_V[token_N])
        change_CC.index_put_(pair, torch.where(detected_N, -1, 1), accumulate=True)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(change_CC)
        self.pending_CC += change_CC
