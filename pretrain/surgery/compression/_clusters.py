"""K-means of single numbers, with the numbers in order: sums of clusters are differences of running sums.

A step of Lloyd's algorithm, or a further centroid of k-means++, is then a search for a few places among the numbers,
however many these are. So small steps are made in NumPy, whose calls take a few microseconds, on the CPU.

Shape letters: N numbers, K clusters.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.dial.effort import Task, Work, through

Initialisation = Literal["kmeans++", "quantiles"]
Floats = NDArray[np.float64]
# Of its time: seconds of a step of Lloyd's and of drawing a centroid, how many steps there are for a root of how many
# clusters, and how many plain operations a number costs until it is sorted and summed.
STEP, SEARCHED, MOVES, ORDERED = 45e-6, 60e-6, 32, 45
ROUNDING = 1e-12  # of the sum of squares: distances of less are those of numbers that lie at centroids


def assign(value: Tensor, centroids_K: Tensor) -> Tensor:
    """The number of each value's nearest centroid, the centroids in ascending order."""
    edges_K = (centroids_K[1:] + centroids_K[:-1]) / 2
    return torch.searchsorted(edges_K.contiguous(), value.contiguous())


class Line:
    """Numbers in ascending order with their running sums, which begin at 0."""

    def __init__(self, value: Tensor) -> None:
        flat = value.detach().flatten().cpu()
        values_N = (flat if flat.dtype == torch.double else flat.float()).numpy()
        self.value_N: Floats = np.sort(values_N).astype(np.float64)
        self.sum_N, self.square_N = (np.zeros(len(self.value_N) + 1) for _ in range(2))
        np.cumsum(self.value_N, out=self.sum_N[1:])
        np.cumsum(np.square(self.value_N), out=self.square_N[1:])

    def cuts(self, centroids_K: Floats) -> NDArray[np.int64]:
        """Where each cluster begins, and where the last one ends."""
        edges_K = (centroids_K[1:] + centroids_K[:-1]) / 2
        return np.concatenate([[0], np.searchsorted(self.value_N, edges_K, side="right"), [len(self.value_N)]])

    def moved(self, centroids_K: Floats) -> Floats:
        """Each centroid at the mean of its cluster; one of an empty cluster stays."""
        cuts_K = self.cuts(centroids_K)
        count_K, sums_K = np.diff(cuts_K), np.diff(self.sum_N[cuts_K])
        return np.sort(np.divide(sums_K, count_K, out=centroids_K.copy(), where=count_K > 0))

    def distances(self, centroids_K: Floats) -> Floats:
        """The sum of each cluster's squared distances to its centroid."""
        cuts_K = self.cuts(centroids_K)
        sums_K, count_K = np.diff(self.sum_N[cuts_K]), np.diff(cuts_K)
        return np.diff(self.square_N[cuts_K]) - 2 * centroids_K * sums_K + count_K * np.square(centroids_K)

    def inertia(self, centroids_K: Floats) -> float:
        """The sum of squared distances to the nearest centroid."""
        return float(self.distances(centroids_K).sum())

    def start(self, clusters: int, way: Initialisation, source: torch.Generator | None) -> Floats:
        """Centroids to begin with: spread by k-means++, or the middles of equally many numbers."""
        count = len(self.value_N)
        if way == "quantiles":
            places_K = (np.arange(clusters) + 0.5) / clusters * count
            return self.value_N[places_K.astype(np.int64)]

        def share() -> float:
            return torch.rand((), generator=source, dtype=torch.double).item()

        first = self.value_N[min(int(share() * count), count - 1)]
        centroids_K = np.array([first])
        for _ in range(clusters - 1):
            distance_K = self.distances(centroids_K).clip(min=0)
            apart = distance_K.sum() > ROUNDING * self.square_N[-1]
            further = self._drawn(centroids_K, distance_K, share()) if apart else first
            centroids_K = np.insert(centroids_K, np.searchsorted(centroids_K, further), further)
        return centroids_K

    def _drawn(self, centroids_K: Floats, distance_K: Floats, share: float) -> float:
        """The number at a `share` of the running sum of all squared distances to the nearest centroid."""
        running_K = distance_K.cumsum()
        goal = share * running_K[-1]
        cluster = min(int(np.searchsorted(running_K, goal, side="right")), len(running_K) - 1)
        goal -= running_K[cluster] - distance_K[cluster]
        low, high = (int(place) for place in self.cuts(centroids_K)[cluster : cluster + 2])
        begin, centroid = low, float(centroids_K[cluster])
        while low < high - 1:  # the first number whose running sum, itself included, is beyond
            middle = (low + high) // 2
            squares, sums = (line_N[middle] - line_N[begin] for line_N in (self.square_N, self.sum_N))
            beyond = squares - 2 * centroid * sums + (middle - begin) * centroid**2 > goal
            low, high = (low, middle) if beyond else (middle, high)
        return float(self.value_N[min(low, len(self.value_N) - 1)])


def clustering(task: Task, clusters: int, starts: int) -> Work:
    """What k-means of the weights of each linear layer does: one sort, and for each start steps of a few searches."""
    steps = MOVES * clusters**0.5 * STEP + clusters * SEARCHED
    layers = sum(each.blocks for each in task.inner)
    return through(task.linear, ORDERED) + Work(seconds=layers * starts * steps)


def kmeans(
    value: Tensor, clusters: int, *, way: Initialisation = "kmeans++", source: torch.Generator | None = None,
    iterations: int = 300, restarts: int = 1,
) -> Tensor:  # fmt: skip
    """The ascending centroids of Lloyd's algorithm, of several starts those of least inertia; float32."""
    line = Line(value)
    starts: list[tuple[float, Floats]] = []
    for _ in range(restarts if way == "kmeans++" else 1):
        centroids_K = line.start(clusters, way, source)
        for _ in range(iterations):
            before_K, centroids_K = centroids_K, line.moved(centroids_K)
            if np.array_equal(before_K, centroids_K):
                break
        starts.append((line.inertia(centroids_K), centroids_K))
    _, best_K = min(starts, key=lambda start: start[0])
    return torch.from_numpy(best_K).to(value.device, torch.float32)
