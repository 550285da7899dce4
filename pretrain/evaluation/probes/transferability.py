"""How well a frozen model's features fit a label, without training anything on them.

Shape letters: N documents, E width, C classes, K directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from pretrain.core.bounds import AnyInteger, Count, Ge, Positive, Whole
from pretrain.core.errors import PretrainError, unknown
from pretrain.core.models.features import labelled, piece_features
from pretrain.evaluation import Evaluation, Measured

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Transferability(Evaluation):
    """How to Determine the Most Powerful Pre-trained Language Model without Brute Force Fine-tuning? An
    Empirical Survey (arXiv:2312.04775).

    Scores of the survey that read only the features f of the documents and their `label` y; the higher, the better a
    model should do on the task once it is tuned. `h_score`: tr(cov(f)^-1 cov(E[f|y])), the survey's best;
    `h_score_shrunk`: the same with Ledoit and Wolf's covariance, for fewer documents than features; `logme`: the log
    evidence of a Bayesian linear model of each class, per document; `transrate`: R(f) less the mean over classes of
    R(f|y), with the coding rate R(f) = log det(I + f^T f / (N `epsilon`)) / 2; `gbc`: minus the summed Bhattacharyya
    coefficients of the classes as spherical Gaussians; `knn`: accuracy of the `neighbours` nearest other documents;
    `msc`: the mean silhouette by cosine; `parc`: Spearman's correlation of the distances between features and between
    labels. Features are those of the probe, from `layer`, or their first `components` principal components (0: all).
    Documents of classes with fewer than `smallest` are left out. Intervals: jackknife over `groups` of documents (a
    bootstrap would repeat documents, which are then each other's neighbours).
    """

    cut: ClassVar[bool] = True

    label: str = "domain"
    measures: tuple[str, ...] = ("h_score", "h_score_shrunk", "logme", "transrate", "gbc", "knn", "msc", "parc")
    pooling: Literal["mean", "cls", "last"] = "mean"
    length: Count = 128
    layer: AnyInteger = -1
    components: Whole = 0
    neighbours: Count = 1
    epsilon: Positive = 1e-4
    smallest: Annotated[int, Ge(2)] = 10
    groups: Annotated[int, Ge(2)] = 10
    seed: Whole = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        super().__post_init__()
        if self.smallest <= self.neighbours:
            raise PretrainError(
                f"transferability: neighbours {self.neighbours}: accepted: fewer than smallest ({self.smallest})"
            )
        for measure in self.measures:
            if measure not in MEASURES:
                raise unknown("measure of transferability", measure, MEASURES)

    @property
    def columns(self) -> tuple[str, ...]:
        """The label's."""
        return (self.label,)

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on documents with the label and the columns that the processor reads."""
        kept = labelled(model, tokenizer, documents, self.label, self.length)
        values = [str(document[self.label]) for document, _ in kept]
        _, number_N, count_C = np.unique(values, return_inverse=True, return_counts=True)
        enough_N = (count_C >= self.smallest)[number_N] if len(kept) else np.zeros(0, bool)
        label_N = np.unique(number_N[enough_N], return_inverse=True)[1]
        if not len(label_N) or label_N.max() < 1:
            raise PretrainError(
                f"transferability: label {self.label!r} has {int((count_C >= self.smallest).sum())} values in "
                f"{self.smallest} documents or more; accepted: a column with two or more, or a smaller smallest"
            )
        chosen = [piece for (_, piece), enough in zip(kept, enough_N, strict=True) if enough]
        f_NE = piece_features(model, tokenizer, chosen, self.length, pooling=self.pooling, layer=self.layer)
        f_NE = f_NE.astype(np.float64)
        measured = self.measure(f_NE, label_N)
        counts = {
            "transferability_documents": len(label_N),
            "transferability_classes": int(label_N.max()) + 1,
            "transferability_skipped": len(documents) - len(label_N),
        }
        return Measured(measured.metrics | {name: float(n) for name, n in counts.items()}, intervals=measured.intervals)

    def measure(self, features_NE: NDArray[np.floating], label_N: Labels) -> Measured:
        """The scores of given features, with their intervals; labels are numbers from 0."""
        f_NE = np.asarray(features_NE, np.float64)
        if 0 < self.components < min(f_NE.shape):
            from sklearn.decomposition import PCA

            f_NE = PCA(self.components, svd_solver="full").fit_transform(f_NE)
        whole = {name: MEASURES[name](self, f_NE, label_N) for name in self.measures}
        # Each class is dealt out over the groups, so that none is lost when a group is left out.
        order_N = np.lexsort((np.random.default_rng(self.seed).random(len(label_N)), label_N))
        group_N = np.empty(len(label_N), np.int64)
        group_N[order_N] = np.arange(len(label_N)) % self.groups
        without: dict[str, list[float]] = {name: [] for name in self.measures}
        for group in range(self.groups):
            rest_N = group_N != group
            for name in self.measures:
                without[name].append(MEASURES[name](self, f_NE[rest_N], label_N[rest_N]))
        spread = {name: np.sqrt((self.groups - 1) * np.var(values)) for name, values in without.items()}
        intervals = {n: (float(v - 1.96 * spread[n]), float(v + 1.96 * spread[n])) for n, v in whole.items()}
        return Measured(whole, intervals=intervals)


def _centred(f_NE: Array) -> Array:
    return f_NE - f_NE.mean(0)


def _class_means(f_NE: Array, label_N: Labels) -> Array:
    """Each document's features replaced by the mean of its class."""
    sums_CE = np.zeros((label_N.max() + 1, f_NE.shape[1]))
    np.add.at(sums_CE, label_N, f_NE)
    return (sums_CE / np.bincount(label_N)[:, None])[label_N]


def h_score(_: Transferability, f_NE: Array, label_N: Labels) -> float:
    """tr(cov(f)^+ cov(E[f|y])): with f = U S V^T it is the sum of squares of U's class means."""
    u_NK, s_K, _vt = np.linalg.svd(_centred(f_NE), full_matrices=False)
    u_NK = u_NK[:, s_K > s_K.max() * max(f_NE.shape) * np.finfo(np.float64).eps]
    return float((_class_means(u_NK, label_N) ** 2).sum())


def h_score_shrunk(_: Transferability, f_NE: Array, label_N: Labels) -> float:
    """(1 - a) tr(cov_a(f)^-1 cov(E[f|y])), a the shrinkage of Ledoit and Wolf."""
    from sklearn.covariance import ledoit_wolf

    covariance_EE, shrinkage = ledoit_wolf(f_NE)
    means_NE = _centred(_class_means(f_NE, label_N))
    between_EE = means_NE.T @ means_NE / (len(f_NE) - 1)
    return float((1 - shrinkage) * np.trace(np.linalg.lstsq(covariance_EE, between_EE, rcond=None)[0]))


def logme(_: Transferability, f_NE: Array, label_N: Labels) -> float:
    """The mean over classes of the largest log evidence per document."""
    u_NK, s_K, _vt = np.linalg.svd(f_NE, full_matrices=False)
    classes = range(int(label_N.max()) + 1)
    return float(np.mean([evidence(u_NK, s_K**2, f_NE.shape[1], label_N == c)[0] for c in classes]))


def evidence(u_NK: Array, sigma_K: Array, width: int, is_N: NDArray[np.bool_]) -> tuple[float, float, float]:
    """The log evidence per document of y = f w + noise, w ~ N(0, 1/alpha), noise ~ N(0, 1/beta), and alpha and beta.

    MacKay's fixed point finds them, in at most 11 steps; f has left singular vectors `u_NK` and squared singular values
    `sigma_K`.
    """
    y_N = is_N.astype(np.float64)
    x2_K, count = (u_NK.T @ y_N) ** 2, len(y_N)
    outside = max(0.0, (y_N**2).sum() - x2_K.sum())  # of y, what no direction of f reaches
    alpha = beta = 1.0

    def fit(ratio: float) -> tuple[float, float]:
        """||w||^2 and ||y - f w||^2 of the posterior mean."""
        return (sigma_K * x2_K / (ratio + sigma_K) ** 2).sum(), (
            x2_K * (ratio / (ratio + sigma_K)) ** 2
        ).sum() + outside

    for _ in range(11):
        ratio = alpha / beta
        gamma = (sigma_K / (sigma_K + ratio)).sum()
        size, error = fit(ratio)
        alpha, beta = gamma / (size + 1e-5), (count - gamma) / (error + 1e-5)
        if abs(alpha / beta - ratio) <= 1e-3 * ratio:
            break
    size, error = fit(alpha / beta)
    log_determinant = np.log(alpha + beta * sigma_K).sum() + (width - len(sigma_K)) * np.log(alpha)
    total = width * np.log(alpha) + count * np.log(beta / (2 * np.pi)) - log_determinant - beta * error - alpha * size
    return float(total / 2 / count), float(alpha), float(beta)


def transrate(method: Transferability, f_NE: Array, label_N: Labels) -> float:
    """The coding rate of all features, less the mean of the classes'."""
    f_NE = _centred(f_NE)

    def rate(z_NE: Array) -> float:
        s_K = np.linalg.svd(z_NE, compute_uv=False)
        return float(np.log1p(s_K**2 / (len(z_NE) * method.epsilon)).sum() / 2)

    return rate(f_NE) - float(np.mean([rate(f_NE[label_N == c]) for c in range(label_N.max() + 1)]))


def gbc(_: Transferability, f_NE: Array, label_N: Labels) -> float:
    """Minus the sum over ordered pairs of classes of exp(-Bhattacharyya distance)."""
    class_features = [f_NE[label_N == c] for c in range(label_N.max() + 1)]
    mean_CE = np.stack([z.mean(0) for z in class_features])
    variance_C = np.array([np.maximum(z.var(0), 1e-4).mean() for z in class_features])
    middle_CC = (variance_C[:, None] + variance_C) / 2
    apart_CC = ((mean_CE[:, None] - mean_CE) ** 2).sum(-1) / middle_CC / 8
    wide_CC = f_NE.shape[1] / 2 * np.log(middle_CC / np.sqrt(variance_C[:, None] * variance_C))
    overlap_CC = np.exp(-apart_CC - wide_CC)
    return float(np.trace(overlap_CC) - overlap_CC.sum())


def knn(method: Transferability, f_NE: Array, label_N: Labels) -> float:
    """How often most of the nearest other documents are of a document's class."""
    from sklearn.neighbors import NearestNeighbors

    near = NearestNeighbors(n_neighbors=method.neighbours).fit(f_NE)
    votes_NC = np.apply_along_axis(
        np.bincount, 1, label_N[near.kneighbors(return_distance=False)], minlength=label_N.max() + 1
    )
    return float((votes_NC.argmax(1) == label_N).mean())


def msc(_: Transferability, f_NE: Array, label_N: Labels) -> float:
    """The mean silhouette coefficient by cosine distance."""
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(f_NE, label_N, metric="cosine"))


def parc(_: Transferability, f_NE: Array, label_N: Labels) -> float:
    """Spearman's correlation of 1 - Pearson's between documents' standardised features, and between their labels."""
    from scipy.stats import spearmanr

    spread_E = f_NE.std(0)
    f_NE = _centred(f_NE) / np.where(spread_E > 0, spread_E, 1)
    pairs = np.triu_indices(len(f_NE), 1)
    # Of two one-hot labels the distance is 0 or one and the same number, and ranks do not ask which.
    apart_NN = 1 - np.atleast_2d(np.corrcoef(f_NE))
    return float(spearmanr(apart_NN[pairs], (label_N[:, None] != label_N)[pairs]).statistic)


MEASURES: dict[str, Callable[[Transferability, Array, Labels], float]] = {
    "h_score": h_score,
    "h_score_shrunk": h_score_shrunk,
    "logme": logme,
    "transrate": transrate,
    "gbc": gbc,
    "knn": knn,
    "msc": msc,
    "parc": parc,
}
