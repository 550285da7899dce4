"""Operations on text, ours and datatrove's: megabytes a second of processor time on one core, in turn in one run.

    python benchmarks/operations.py --datatrove PYTHON [--megabytes 4] [--rounds 5] [--only mask_pii line_deduplication]

PYTHON: the interpreter of an environment with datatrove and what its parts need (spacy, ftfy; no models). Both have the
same documents, every so many of Python's standard library and its tests, in memory: ours in a `datasets.Dataset`,
theirs in a list. Each stays in a process of its own, held to one core, and runs an operation once for each round after
one that does not count; whose turn is first changes. Ours writes its texts to disk, theirs yields them. datatrove's
exact substrings need a program in Rust, so of these there are ours alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

OURS = (
    "gopher_quality", "gopher_repetition", "fineweb_quality", "c4_quality", "deduplicate", "line_deduplication",
    "paragraph_deduplication", "exact_substring_deduplication", "mask_pii", "repair_text", "document_statistics",
)  # fmt: skip
MADE = "documents.json"


def worker_ours(texts: list[str], name: str) -> None:
    """Run one of our operations."""
    from datasets import Dataset

    from pretrain.core.method import method_class

    corpus = Dataset.from_dict({"text": texts})
    operation = method_class(name)()
    begun = time.process_time()
    after = operation(corpus)
    seconds = time.process_time() - begun
    print(json.dumps([seconds, len(after), sum(len(text) for text in after["text"])]), flush=True)


def worker_theirs(texts: list[str], name: str) -> None:
    """Run datatrove's operation of the same kind, or say that there is none."""
    from datatrove.data import Document

    kinds = theirs()
    if name not in kinds:
        print(json.dumps(None), flush=True)
        return
    documents = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
    folder = Path(tempfile.mkdtemp())
    begun = time.process_time()
    left = [len(document.text) for document in kinds[name](documents, folder)]
    seconds = time.process_time() - begun
    shutil.rmtree(folder)
    print(json.dumps([seconds, len(left), sum(left)]), flush=True)


def theirs() -> dict[str, Callable[[list[Any], Path], Iterable[Any]]]:
    """What datatrove has, by the names of ours."""
    from datatrove.pipeline import filters, formatters
    from datatrove.pipeline.stats import DocStats, WordStats

    def statistics_of(documents: list[Any], folder: Path) -> Iterable[Any]:
        kinds = [kind(output_folder=str(folder)) for kind in (DocStats, WordStats)]
        for document in documents:
            for kind in kinds:
                document.metadata.update(kind.extract_stats(document))
            yield document

    simple = {
        "gopher_quality": filters.GopherQualityFilter, "gopher_repetition": filters.GopherRepetitionFilter,
        "fineweb_quality": filters.FineWebQualityFilter, "c4_quality": filters.C4QualityFilter,
        "mask_pii": formatters.PIIFormatter, "repair_text": formatters.FTFYFormatter,
    }  # fmt: skip
    runs = {name: (lambda documents, folder, kind=kind: kind().run(documents)) for name, kind in simple.items()}
    return {
        **runs, "document_statistics": statistics_of, "deduplicate": near_duplicates, "line_deduplication": sentences,
    }  # fmt: skip


def sentences(documents: list[Any], folder: Path) -> Iterable[Any]:
    """Lines that stand before, in datatrove's three steps."""
    from datatrove.pipeline.dedup import SentenceDedupFilter, SentenceDedupSignature, SentenceFindDedups
    from datatrove.pipeline.dedup.sentence_dedup import SentDedupConfig

    config = SentDedupConfig(n_sentences=1, split_sentences=False, min_num_sentences=0)
    signatures, copies = str(folder / "signatures"), str(folder / "copies")
    SentenceDedupSignature(signatures, config=config).run(documents)
    SentenceFindDedups(signatures, copies, config=config).run()
    return SentenceDedupFilter(copies, config=config).run(documents)


def near_duplicates(documents: list[Any], folder: Path) -> Iterable[Any]:
    """Near-duplicates, in datatrove's four steps."""
    from datatrove.pipeline.dedup import minhash

    places = [str(folder / name) for name in ("signatures", "buckets", "copies")]
    config = minhash.MinhashConfig()
    minhash.MinhashDedupSignature(places[0], config=config).run(documents)
    for rank in range(config.num_buckets):
        minhash.MinhashDedupBuckets(places[0], places[1], config=config).run(None, rank, config.num_buckets)
    minhash.MinhashDedupCluster(places[1], places[2], config=config).run(None)
    return minhash.MinhashDedupFilter(places[2]).run(documents)


def serve(role: str, folder: Path) -> None:
    """Answer each name on a line with the seconds, documents and characters of one run."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    texts = json.loads((folder / MADE).read_text())
    for line in sys.stdin:
        (worker_ours if role == "ours" else worker_theirs)(texts, line.strip())


def documents(megabytes: float) -> list[str]:
    """Documents of so many characters, from the whole length of the corpus."""
    from pretrain.corpus.sources import PythonStdlib, read

    texts = [document["text"] for document in read(PythonStdlib(tests=True))]
    step = max(1, round(sum(map(len, texts)) / (megabytes * 1e6)))
    return texts[::step]


def started(role: str, python: str, folder: Path) -> subprocess.Popen[str]:
    """A process that serves."""
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "RAYON")}
    silent = {"DATATROVE_COLORIZE_LOGS": "0", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    if role == "theirs":
        threads["PYTHONPATH"] = ""
    command = [python, __file__, "--role", role, "--folder", str(folder)]
    return subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | threads | silent,
    )  # fmt: skip


def asked(process: subprocess.Popen[str], name: str) -> list[float] | None:
    """One run; None where there is no such operation, or what it needs is missing."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{name}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    return json.loads(line) if line else None


def measure(name: str, folder: Path, python: str, rounds: int, size: float) -> str:
    """A row of the table: both in turn, medians of the rates and of the paired ratios."""
    sides = {role: started(role, path, folder) for role, path in (("ours", sys.executable), ("theirs", python))}
    took: dict[str, list[float]] = {role: [] for role in sides}
    left: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for role in sorted(sides, reverse=bool(number % 2)):
            answer = asked(sides[role], name) if number == 0 or role in left else None
            if answer is not None:
                left[role] = answer[1:]
                took[role] += [answer[0]] if number else []
    for process in sides.values():
        process.communicate()
    cells = [
        f"{size / statistics.median(took[role]):.2f} | {left[role][0]:.0f}" if took[role] else "– | –" for role in sides
    ]
    ratios = sorted(b / a for a, b in zip(took["ours"], took["theirs"]))
    ratio = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})" if ratios else "–"
    return f"| {name} | {cells[0]} | {cells[1]} | {ratio} |"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datatrove", default=sys.executable)
    parser.add_argument("--megabytes", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(OURS))
    parser.add_argument("--role", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        return serve(options.role, options.folder)
    with tempfile.TemporaryDirectory() as folder:
        texts = documents(options.megabytes)
        (Path(folder) / MADE).write_text(json.dumps(texts))
        size = sum(len(text.encode()) for text in texts) / 1e6
        load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        print(f"{len(texts)} documents, {size:.1f} MB, {options.rounds} rounds, {os.cpu_count()} cores{load}\n")
        print("| operation | ours MB/s | documents left | datatrove MB/s | documents left | times as fast |")
        print("|---|---|---|---|---|---|")
        for name in options.only:
            print(measure(name, Path(folder), options.datatrove, options.rounds, size), flush=True)


if __name__ == "__main__":
    main()
