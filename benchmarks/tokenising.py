"""Tokenising speed: our shards, whole (read Parquet, tokenise, checksum, write), against the library's encoding alone.

    python benchmarks/tokenising.py [--rounds 5]

The corpus is Python's standard library; both use the same trained tokenizer and all cores, in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "true"


def main() -> None:
    """Measure and print a table."""
    from pretrain.corpus.shards import tokenise
    from pretrain.corpus.sources import PythonStdlib, read
    from pretrain.corpus.store import Corpus, write_corpus
    from pretrain.corpus.tokenizers import train_tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_corpus(read(PythonStdlib(tests=True)), folder / "corpus", near_duplicates=None)
        corpus = Corpus(folder / "corpus")
        texts = [d["text"] for d in corpus.documents("train")]
        tokenizer = train_tokenizer(texts, vocab_size=4096)
        size = sum(len(t.encode()) for t in texts) / 1e6
        seconds: dict[str, list[float]] = {"library": [], "ours": []}
        for number in range(rounds + 1):
            started = time.perf_counter()
            tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
            middle = time.perf_counter()
            tokenise(corpus, tokenizer, folder / str(number), splits=["train"])
            if number:
                seconds["library"].append(middle - started)
                seconds["ours"].append(time.perf_counter() - middle)
    print(f"{size:.1f} MB of text, {os.cpu_count()} cores, {rounds} rounds\n")
    print("| what | MB/s (median) | min | max | of the library |\n|---|---|---|---|---|")
    for name, values in seconds.items():
        rates = sorted(size / v for v in values)
        ratio = statistics.median(a / b for a, b in zip(seconds["library"], values))
        print(f"| {name} | {statistics.median(rates):.2f} | {rates[0]:.2f} | {rates[-1]:.2f} | {ratio:.0%} |")


if __name__ == "__main__":
    main()
