"""K-means of single numbers, with the numbers in order: sums of clusters are differences of running sums.

Shape letters: N numbers, K clusters.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Initialisation = Literal["kmeans++", "quantiles"]


def assign(value: Tensor, centroids_K: Tensor) -> Tensor:
    """The number of each value's nearest centroid, the centroids in ascending order."""
    edges_K = (centroids_K[1:] + centroids_K[:-1]) / 2
    return torch.searchsorted(edges_K.contiguous(), value.contiguous())


class Line:
    """Numbers in ascending order with their running sums."""

    def __init__(self, value: Tensor) -> None:
        self.value_N = value.detach().flatten().double().sort().values
        zero = self.value_N.new_zeros(1)
        self.sum_N = torch.cat([zero, self.value_N.cumsum(0)])
        self.square_N = torch.cat([zero, self.value_N.square().cumsum(0)])

    def cuts(self, centroids_K: Tensor) -> Tensor:
        """Where each cluster begins, and where the last one ends."""
        edges_K = (centroids_K[1:] + centroids_K[:-1]) / 2
        cuts_K = torch.searchsorted(self.value_N, edges_K, right=True)
        ends = torch.tensor([0, len(self.value_N)], device=cuts_K.device)
        return torch.cat([ends[:1], cuts_K, ends[1:]])

    def moved(self, centroids_K: Tensor) -> Tensor:
        """Each centroid at the mean of its cluster; one of an empty cluster stays."""
        cuts_K = self.cuts(centroids_K)
        count_K = cuts_K.diff()
        mean_K = self.sum_N[cuts_K].diff() / count_K.clamp(min=1)
        return torch.where(count_K > 0, mean_K, centroids_K).sort().values

    def inertia(self, centroids_K: Tensor) -> float:
        """The sum of squared distances to the nearest centroid."""
        cuts_K = self.cuts(centroids_K)
        sums_K, count_K = self.sum_N[cuts_K].diff(), cuts_K.diff()
        squares_K = self.square_N[cuts_K].diff() - 2 * centroids_K * sums_K + count_K * centroids_K.square()
        return squares_K.sum().item()

    def start(self, clusters: int, way: Initialisation, source: torch.Generator | None) -> Tensor:
        """Centroids to begin with: spread by k-means++, or the middles of equally many numbers."""
        if way == "quantiles":
            places_K = (torch.arange(clusters, dtype=torch.double) + 0.5) / clusters * len(self.value_N)
            return self.value_N[places_K.long().to(self.value_N.device)]

        def draw(weight_N: Tensor) -> Tensor:
            running_N = weight_N.cumsum(0)
            chosen = torch.rand((), generator=source, dtype=torch.double).to(running_N) * running_N[-1]
            return self.value_N[torch.searchsorted(running_N, chosen, right=True).clamp(max=len(running_N) - 1)]

        centroids = [draw(torch.ones_like(self.value_N))]
        distance_N = (self.value_N - centroids[0]).square()
        for _ in range(clusters - 1):
            centroids.append(draw(distance_N) if bool(distance_N.any()) else centroids[0])
            distance_N = torch.minimum(distance_N, (self.value_N - centroids[-1]).square())
        return torch.stack(centroids).sort().values


def kmeans(
    value: Tensor, clusters: int, *, way: Initialisation = "kmeans++", source: torch.Generator | None = None,
    iterations: int = 300, restarts: int = 1,
) -> Tensor:  # fmt: skip
    """The ascending centroids of Lloyd's algorithm, of several starts those of least inertia; float32."""
    line = Line(value)
    starts: list[tuple[float, Tensor]] = []
    for _ in range(restarts if way == "kmeans++" else 1):
        centroids_K = line.start(clusters, way, source)
        for _ in range(iterations):
            before_K, centroids_K = centroids_K, line.moved(centroids_K)
            if torch.equal(before_K, centroids_K):
                break
        starts.append((line.inertia(centroids_K), centroids_K))
    _, best_K = min(starts, key=lambda start: start[0])
    return best_K.float()
