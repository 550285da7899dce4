"""Which documents a checkpoint was trained on: those of the corpora in its lineage, as long as they lie beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.files import JSONObject, read_json
from pretrain.corpus.payload import CONTENT, content
from pretrain.corpus.sources import Document
from pretrain.corpus.store import Corpus, iterate

RECORD = "pretrain.json"  # of a checkpoint
FEW = 0.03  # of the documents, below which those that were trained on hardly change what is measured
KNOWN = "in the training data"
MOST_LEARNT = 20_000  # documents for a yardstick


def training_corpora(checkpoint: Path) -> tuple[list[Path], int]:
    """The corpora that a checkpoint comes from, and how many more are named by its lineage and not to be found."""
    record = checkpoint / RECORD
    lineage: JSONObject = read_json(record).get("lineage") or {} if record.exists() else {}
    addresses = [stage["address"] for stage in lineage.get("stages") or [] if stage.get("stage") == "data"]
    home = checkpoint.resolve().parent.parent  # the store: stages lie beside one another
    places: list[Path] = []
    for address in dict.fromkeys(addresses):
        end = f"*-{str(address)[:12]}/corpus/corpus.json"
        # Of `glob`, not of `Path`, which fails where another process removes a folder that it is about to look into.
        near = [home / path for path in glob(end, root_dir=home, include_hidden=True)]
        far = [home.parent / path for path in glob(f"*/{end}", root_dir=home.parent, include_hidden=True)]
        places += [path.parent for path in [*sorted(near), *sorted(far)][:1]]
    return places, len({*addresses}) - len(places)


def text_column(checkpoint: Path) -> str:
    """The column that held the texts of the tables which a checkpoint has learnt from; `text` where that is unknown."""
    names = set()
    for corpus in training_corpora(checkpoint)[0]:
        sources = read_json(corpus / "corpus.json").get("sources") or []
        names |= {str(source.get("text") or "text") for source in sources if isinstance(source, dict)}
    return names.pop() if len(names) == 1 else "text"


def header_of(checkpoint: Path, header: bool | None) -> bool | None:
    """Whether a CSV has a header: as is said, else as the tables had it which the checkpoint has learnt from."""
    known = set()
    for corpus in training_corpora(checkpoint)[0] if header is None else ():
        sources = read_json(corpus / "corpus.json").get("sources") or []
        known |= {source.get("header") for source in sources if isinstance(source, dict)}
    return known.pop() if len(known) == 1 else header


def skips(checkpoint: Path, data: str) -> bool:
    """Whether a checkpoint's run has passed over what did not fit: it skips errors, or has read this very file."""
    for corpus in training_corpora(checkpoint)[0]:
        for source in read_json(corpus / "corpus.json").get("sources") or []:
            if isinstance(source, dict) and "files" in source:
                same = Path(str(source["files"])).absolute() == Path(data).absolute()
                if same or source.get("on_error") == "skip":
                    return True
    return False


def learnt_from(checkpoint: Path, columns: Sequence[str]) -> list[Document]:
    """Documents that a checkpoint has last been trained on, `MOST_LEARNT` at most; none where they are not there."""
    record = checkpoint / RECORD
    lineage: JSONObject = read_json(record).get("lineage") or {} if record.exists() else {}
    for place in training_corpora(checkpoint)[0]:
        corpus = Corpus(place)
        if corpus.info["fingerprint"] == lineage.get("data") and set(columns) <= set(corpus.columns):
            return corpus.sample("train", MOST_LEARNT, columns)
    return []


def trained_on(documents: Sequence[Document], corpora: Sequence[Path]) -> list[int]:
    """The numbers of the documents whose content, but for white space, stands in the training split of a corpus."""
    sought: dict[bytes, list[int]] = {}
    for number, document in enumerate(documents):
        if any(document.get(name) is not None for name in CONTENT):
            sought.setdefault(_mark(document), []).append(number)
    seen: set[int] = set()
    for corpus in corpora:
        for document in iterate(corpus / "train", CONTENT):
            seen.update(sought.pop(_mark(document), ()))
            if not sought:
                return sorted(seen)
    return sorted(seen)


def overlap_warning(documents: Sequence[Document], checkpoint: Path, known: Path | None = None) -> str:
    """A line where documents were trained on, or where that cannot be told; none for a corpus's own held-out ones.

    `known` is the corpus that they are from: its splits share no document.
    """
    corpora, missing = training_corpora(checkpoint)
    corpora = [place for place in corpora if known is None or not _same(place, known)]
    count, total = len(trained_on(documents, corpora)), len(documents)
    if count:
        were = "was" if count == 1 else "were"
        line = f"{count:,} of {total:,} documents {were} {KNOWN}"
        return line if count < FEW * total else f"{line}: what is measured says little of new text"
    if missing and known is None:
        return "the corpus that it was trained on is not there any more: whether it has seen these documents is unknown"
    return ""


def distrusted(seen: str) -> bool:
    """Whether a line of `overlap_warning` makes what is measured doubtful, and does not merely count a few."""
    return not seen.endswith(KNOWN)


def _same(first: Path, second: Path) -> bool:
    """Whether two corpora hold the same documents."""
    try:
        marks = [read_json(folder / "corpus.json").get("fingerprint") for folder in (first, second)]
    except PretrainError:
        return False
    return marks[0] is not None and marks[0] == marks[1]


def _mark(document: Document) -> bytes:
    """16 bytes of a document's content; of text its words, so that line ends make no difference."""
    only = [name for name in CONTENT if document.get(name) is not None] == ["text"]
    data = " ".join(str(document["text"]).split()).encode("utf-8", "surrogatepass") if only else content(document)
    return hashlib.blake2b(data, digest_size=16).digest()
