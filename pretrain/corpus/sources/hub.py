"""Data sets of the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.core.bounds import Count
from pretrain.core.errors import PretrainError
from pretrain.core.foreign.parsing import raise_memory, reason
from pretrain.corpus.sources._files import Document, Source
from pretrain.corpus.sources._paths import below, stamp
from pretrain.corpus.sources._skipped import Skipped
from pretrain.corpus.sources.content.rows import Columns, Conversations, OnError, documents_of, wrong_of


@dataclass(frozen=True)
class HubDataset(Source):
    """A data set of the `datasets` library: a name on the hub, or a local folder written by it; streaming if asked."""

    dataset: str
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    text: str = "text"
    domain: str | None = None
    limit: Count | None = None  # read at most so many documents
    on_error: OnError = "stop"  # what rows without the column do: stop, or skip
    conversations: Conversations = "answers"  # as for files

    def domains(self) -> None:
        """Those of files and rows are not known before they are read."""

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        rows = ((f"{self.dataset}, row {number}", row) for number, row in enumerate(self._open(), 1))
        columns = Columns(self.text, self.domain, self.conversations)
        documents = documents_of(rows, self.dataset, columns, skipped, wrong_of(self.on_error, skipped))
        for number, (_, document) in enumerate(documents):
            if self.limit is not None and number >= self.limit:
                return
            yield document

    def _open(self) -> Iterator[Document]:
        import datasets

        place = Path(self.dataset)
        try:
            if (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists():
                data = datasets.load_from_disk(self.dataset)
                data = data[self.split] if isinstance(data, datasets.DatasetDict) else data
            else:
                data = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=self.streaming)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise PretrainError(f"data set {self.dataset!r} cannot be loaded: {reason}") from error
        return self._rows(data)

    def _rows(self, data: Iterable[Document]) -> Iterator[Document]:
        count = 0
        try:
            for row in data:
                count += 1
                yield row
        except Exception as error:  # of its files, its columns' types, and what is installed for them
            raise_memory(error, self.dataset)
            what = f"data set {self.dataset!r} cannot be read after row {count} ({reason(error)})"
            raise PretrainError(f"{what}; accepted: a data set that `datasets` reads to its end") from error

    def state(self) -> object:
        return [stamp(path) for path in below(Path(self.dataset))] if Path(self.dataset).exists() else None
