"""A few documents of a stored corpus to look at, with all their columns."""

from __future__ import annotations

from pathlib import Path

from pretrain.corpus.sources import Document, evenly


def corpus_documents(corpus: Path, count: int = 8, split: str = "train") -> list[Document]:
    """`count` documents from the whole length of a split alike; of its files only the parts that hold them are read."""
    import pyarrow.parquet

    groups: list[tuple[Path, int, range]] = []  # a file, a row group in it, and which of the documents it holds
    total = 0
    for path in sorted((corpus / split).glob("*.parquet")):
        metadata = pyarrow.parquet.read_metadata(path)
        for number in range(metadata.num_row_groups):
            held = range(total, total + metadata.row_group(number).num_rows)
            groups.append((path, number, held))
            total = held.stop
    chosen = evenly(range(total), count)
    documents: list[Document] = []
    for path, number, held in groups:
        wanted = [row - held.start for row in chosen if row in held]
        if wanted:
            with pyarrow.parquet.ParquetFile(path) as file:
                documents += file.read_row_group(number).take(wanted).to_pylist()
    return documents
