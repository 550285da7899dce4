"""Data operations: `corpus -> corpus`, on a `datasets.Dataset` with a `text` column (filter, rewrite, order)."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pretrain.core.method import Method

if TYPE_CHECKING:
    from datasets import Dataset


class DataOperation(Method):
    """Base of the data operations."""

    kind: ClassVar[str] = "data operation"
    computes: ClassVar[bool] = True  # whether it may run a model, or other products that are metered
    speed: ClassVar[float] = 0.0  # bytes of text that a core does in a second; 0: not known, as of what runs a model
    shared: ClassVar[bool] = False  # whether the data stage's workers share what it does

    @property
    def adds(self) -> tuple[str, ...]:
        """The columns that it writes; a tagger drops nothing, and what comes after decides by them."""
        return ()

    @property
    def brings(self) -> tuple[str, ...]:
        """The domains of documents that it adds, where these are of others than it is given."""
        return ()

    def memory(self, size: float) -> float:
        """Bytes that it has in memory at once of a corpus of `size` bytes of text, where that grows with the corpus."""
        return 0.0

    def seconds(self, size: float, documents: float) -> float | None:
        """Of a core, for so many bytes of text in so many documents; None where that is not known."""
        return size / self.speed if self.speed else None

    @abstractmethod
    def __call__(self, corpus: Dataset) -> Dataset:
        """The corpus after the operation; columns that it does not know are kept."""
        raise NotImplementedError
