"""NMTune: a small network on frozen features that reshapes them, so that a noisy pretraining shows less.

Shape letters: N documents, E width, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pretrain.core.bounds import AnyInteger, Count, NonNegative, Positive, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.models.features import labelled, piece_features
from pretrain.evaluation import Evaluation, Measured
from pretrain.evaluation._intervals import bounds, resampled_sums
from pretrain.evaluation.probes.probe import to_fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document


@dataclass(frozen=True)
class NMTune(Evaluation):
    """Understanding and Mitigating the Label Noise in Pre-training on Downstream Tasks (arXiv:2309.17002).

    The model is a black box: all that is known of it are the features F of documents, which stay as they are. A
    two-layer network makes Z of them, a linear layer predicts the `label` from Z, and both are trained by

        L = CE + weight · (1/NE · Σ ‖f/‖f‖ - z/‖z‖‖² + 1/E · Σ over i ≠ j of C(Z)²_ij - σ₁(Z) / Σ σ_j(Z)),

    where the z of each of N documents, of E numbers, keeps to its f, the dimensions (covariance C) are decorrelated,
    and the largest singular value σ₁ is made to dominate (in the authors' code: the mean of the first five).
    `weight: 0` is the paper's MLP tuning. The three terms are of all documents to fit together, each of the `steps` of
    AdamW taking them all, where the paper takes mini-batches, of augmented images, and normalises over them in the
    network; F is scaled to a root mean square of 1.
    Features are those of the evaluation `probe`, documents to fit and to test chosen as there. Metrics on the latter:
    `nmtune_accuracy`, `nmtune_loss`, the mean of -log p(true label) in nats, labels that no document to fit has sharing
    probability as there; and the paper's two of the spectrum, of Z and (`_features`) of F: `nmtune_sve`, the entropy of
    σ_j / Σ σ, and `nmtune_lsvr`, -log(σ₁ / Σ σ). Intervals: bootstrap over the tested documents.
    """

    version: ClassVar[int] = 2  # features are brought to length 1 document by document

    cut: ClassVar[bool] = True

    label: str = "domain"
    weight: NonNegative = 0.01
    steps: Count = 200
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.01
    pooling: Literal["mean", "cls", "last"] = "mean"
    length: Whole = 128
    layer: AnyInteger = -1
    resamples: Count = 1000
    seed: Whole = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """The label's."""
        return (self.label,)

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on documents with the label and the columns that the processor reads."""
        length = self.length or 512
        kept = labelled(model, tokenizer, documents, self.label, length)
        names = [str(document[self.label]) for document, _ in kept]
        fit_N = np.array([to_fit(document) for document, _ in kept], np.bool_)
        fitted = sorted({name for name, fit in zip(names, fit_N, strict=True) if fit})
        if len(fitted) < 2 or fit_N.all():
            raise PretrainError(
                f"nmtune: label {self.label!r} has {len(fitted)} values in {int(fit_N.sum())} documents to fit, beside "
                f"{int((~fit_N).sum())} to test; accepted: two values or more, and a document to test"
            )
        pieces = [piece for _, piece in kept]
        f_NE = piece_features(model, tokenizer, pieces, length, pooling=self.pooling, layer=self.layer)
        number = {name: i for i, name in enumerate(fitted)}
        label_N = np.array([number.get(name, -1) for name in names])
        # The evaluation runs without gradients, of the model's.
        with torch.inference_mode(False), torch.enable_grad():
            features_NE = torch.tensor(f_NE, dtype=torch.float64)
            features_NE = features_NE / features_NE.square().mean().sqrt().clamp(min=1e-12)
            head = self.fit(features_NE[torch.from_numpy(fit_N)], torch.from_numpy(label_N[fit_N]), len(fitted))
        with torch.no_grad():
            tested_NE = features_NE[torch.from_numpy(~fit_N)]
            z_NE, log_NC = head[0](tested_NE), head(tested_NE).log_softmax(-1).numpy()
        unseen = len(set(names)) - len(fitted)
        nll_N = _nll(log_NC, label_N[~fit_N], unseen, int(fit_N.sum()))
        spectrum = {f"nmtune_{name}": value for name, value in spectral(z_NE).items()}
        spectrum |= {f"nmtune_{name}_features": value for name, value in spectral(tested_NE).items()}
        measured = self._measure(log_NC.argmax(-1) == label_N[~fit_N], nll_N)
        return Measured(measured.metrics | spectrum, intervals=measured.intervals)

    def fit(self, f_NE: Tensor, label_N: Tensor, classes: int) -> nn.Sequential:
        """The network that makes Z of features, and the linear layer on it."""
        width, source = f_NE.shape[1], torch.Generator().manual_seed(self.seed)
        mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        head = nn.Sequential(mlp, nn.Linear(width, classes)).double()
        for parameter in head.parameters():  # the bounds of `nn.Linear`, drawn from a source of their own
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator=source)
        optimizer = torch.optim.AdamW(head.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        for _ in range(self.steps):
            z_NE = mlp(f_NE)
            loss = nn.functional.cross_entropy(head[1](z_NE), label_N)
            if self.weight:
                loss = loss + self.weight * torch.stack([*penalties(f_NE, z_NE).values()]).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return copy.deepcopy(head).requires_grad_(False)

    def _measure(self, right_N: NDArray[np.bool_], nll_N: NDArray[np.float64]) -> Measured:
        sums_RK = resampled_sums(np.stack([right_N, nll_N], axis=1), self.resamples, self.seed) / len(nll_N)
        means = {"nmtune_accuracy": float(right_N.mean()), "nmtune_loss": float(nll_N.mean())}
        intervals = {name: bounds(sums_RK[:, k]) for k, name in enumerate(means)}
        return Measured(means | {"nmtune_documents": float(len(nll_N))}, intervals=intervals)


def penalties(f_NE: Tensor, z_NE: Tensor) -> dict[str, Tensor]:
    """The three terms: `consistency`, `covariance`, `dominance`."""
    covariance_EE = z_NE.T.cov()
    covariance_EE = covariance_EE - torch.diag(covariance_EE.diagonal())
    singular_K = torch.linalg.svdvals(z_NE)
    return {
        "consistency": nn.functional.mse_loss(
            nn.functional.normalize(z_NE, dim=1), nn.functional.normalize(f_NE, dim=1)
        ),
        "covariance": covariance_EE.square().sum() / z_NE.shape[1],
        "dominance": -singular_K[0] / singular_K.sum(),
    }


def spectral(x_NE: Tensor) -> dict[str, float]:
    """`sve` and `lsvr`: how evenly the singular values share, and how far the largest is from having all."""
    singular_K = torch.linalg.svdvals(x_NE)
    share_K = singular_K / singular_K.sum().clamp(min=torch.finfo(singular_K.dtype).tiny)
    return {"sve": float(torch.special.entr(share_K).sum()), "lsvr": float(-share_K[0].log())}


def _nll(log_NC: NDArray[np.float64], label_N: NDArray[np.int64], unseen: int, fitted: int) -> NDArray[np.float64]:
    """-log p of the true labels: u labels that none of n documents to fit has (-1) share u / (n + u)."""
    known_N = -log_NC[np.arange(len(label_N)), label_N] + np.log1p(unseen / fitted)
    return np.where(label_N >= 0, known_N, np.log(fitted + unseen))
