"""DyLoRA at each rank against a LoRA trained for that rank alone.

    python benchmarks/dylora.py [--ranks 1 2 4 8] [--steps 150] [--rates 3e-3 1e-2] [--seeds 0] [--frozen]

A Llama (`--layers`, `--width`) is pretrained on one domain of Python's standard library (`--source`: docstrings) for
`--pretraining` steps, then adapted to the other (`--target`: python), at equal steps: by a LoRA for each rank, and by
one DyLoRA of the highest rank, which `dylora_truncate` then cuts to each. Every adapter is tried at all `--rates`, and
each rank's best counts. The table has the held-out loss by rank, the ratio to LoRA's (the aim: at most 1.05), and what
the LoRA of the highest rank gives when it is cut to the same rank. Printed besides: the loss without an adapter and the
time of it all.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.models.families import new_model
from pretrain.corpus.shards import tokenise
from pretrain.corpus.sources import PythonStdlib, read
from pretrain.corpus.store import Corpus, write_corpus
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.evaluation.likelihood._shards import shard_loss
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.optim.optimizers.adamw import AdamW
from pretrain.optim.schedules.cosine import Cosine
from pretrain.surgery import Inputs
from pretrain.surgery.adapters._adapters import adapters
from pretrain.surgery.adapters.dylora import DyLoRA
from pretrain.surgery.adapters.dylora_truncate import DyLoRATruncate
from pretrain.training.budget import Budget
from pretrain.training.loader import Loader
from pretrain.training.loop import Settings, train

DOMAINS = ("docstrings", "python")
ALPHA = 16.0


class Bench:
    """The corpus, and what is trained and measured on it."""

    def __init__(self, settings: argparse.Namespace, folder: Path) -> None:
        self.settings, self.folder, self.runs = settings, folder, 0
        write_corpus(read(PythonStdlib(limit=settings.limit)), folder / "corpus", validation=0.05, near_duplicates=None)
        corpus = Corpus(folder / "corpus")
        texts = (d["text"] for d in corpus.documents("train"))
        self.tokenizer = train_tokenizer(texts, vocab_size=settings.vocabulary)
        self.vocabulary = Vocabulary.of(self.tokenizer)
        self.shards = tokenise(corpus, self.tokenizer, folder / "tokens", splits=["train", "validation"])

    def train(self, model: Any, domain: str, steps: int, lr: float, seed: int) -> None:
        """Train what is not frozen, on one domain."""
        given = self.settings
        loader = Loader(
            self.shards["train"], [CausalLM()], self.vocabulary, length=given.length, batch_rows=given.rows, seed=seed,
            mixture={name: float(name == domain) for name in DOMAINS},
        )  # fmt: skip
        self.runs += 1
        settings = Settings(budget=Budget(steps=steps), seed=seed, save_every=0, bar=False)
        optimizer = AdamW(lr=lr, weight_decay=0.0)
        train(model, loader, [CausalLM()], optimizer, Cosine(warmup=0.06), settings, self.folder / f"run{self.runs}")

    def loss(self, model: Any) -> float:
        """The held-out loss on the target domain, at the adapter's highest rank."""
        given = self.settings
        found = shard_loss(model.eval(), self.shards["validation"], length=given.length, max_tokens=given.tokens)
        return found[f"loss/{given.target}"]

    def pretrained(self) -> Any:
        """The model that all adapters begin from."""
        return checkpoint.load(self.folder / "pretrained")[0]

    def adapted(self, method: DyLoRA, lr: float, seed: int) -> Any:
        """The pretrained model with a trained adapter."""
        model = method(self.pretrained(), Inputs(seed=seed))
        self.train(model, self.settings.target, self.settings.steps, lr, seed)
        return model

    def by_rank(self, model: Any) -> dict[int, float]:
        """The losses of a DyLoRA cut to each rank."""
        checkpoint.save(model, None, self.folder / "adapted")
        found = {}
        for rank in self.settings.ranks:
            cut = DyLoRATruncate(rank)(checkpoint.load(self.folder / "adapted")[0])
            found[rank] = self.loss(cut)
        return found

    @torch.no_grad()
    def cut(self, model: Any) -> dict[int, float]:
        """The losses of a LoRA of the highest rank whose last components are left out."""
        found = {}
        for rank in sorted(self.settings.ranks, reverse=True):
            for module in adapters(model).values():
                layer: Any = module
                layer.A[rank:] = 0
                layer.scale = layer.alpha / rank
            found[rank] = self.loss(model)
        return found


def compare(bench: Bench, seed: int) -> dict[str, dict[int, float]]:
    """The best losses over the learning rates, by method and rank."""
    given = bench.settings
    highest, methods = max(given.ranks), ["LoRA", "LoRA, cut", "DyLoRA"] + (["DyLoRA, frozen"] if given.frozen else [])
    tried: dict[str, list[dict[int, float]]] = {name: [] for name in methods}
    for lr in given.rates:
        alone: dict[int, float] = {}
        for rank in given.ranks:  # whose lowest rank is the highest is LoRA
            model = bench.adapted(DyLoRA(rank, ALPHA, rank, where=given.where), lr, seed)
            alone[rank] = bench.loss(model)
            if rank == highest:
                tried["LoRA, cut"].append(bench.cut(model))
        tried["LoRA"].append(alone)
        tried["DyLoRA"].append(bench.by_rank(bench.adapted(DyLoRA(highest, ALPHA, where=given.where), lr, seed)))
        if given.frozen:
            method = DyLoRA(highest, ALPHA, frozen=True, where=given.where)
            tried["DyLoRA, frozen"].append(bench.by_rank(bench.adapted(method, lr, seed)))
    return {name: {r: min(losses[r] for losses in some) for r in given.ranks} for name, some in tried.items()}


def main() -> None:
    """Pretrain, adapt, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--pretraining", type=int, default=300)
    parser.add_argument("--frozen", action="store_true", help="also DyLoRA that trains the newest component only")
    parser.add_argument("--source", choices=DOMAINS, default="docstrings")
    parser.add_argument("--target", choices=DOMAINS, default="python")
    parser.add_argument("--where", choices=("attention", "feed_forward", "all"), default="attention")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=60_000, help="held-out tokens of an evaluation")
    parser.add_argument("--limit", type=int, default=None, help="modules of the library")
    given = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given, Path(folder))
        fields = {
            "hidden_size": given.width, "intermediate_size": given.width * 43 // 16, "tie_word_embeddings": True,
            "num_hidden_layers": given.layers, "num_attention_heads": max(1, given.width // 32),
        }  # fmt: skip
        model = new_model("llama", fields, vocabulary=bench.vocabulary, seed=0)
        bench.train(model, given.source, given.pretraining, 3e-3, 0)
        checkpoint.save(model, bench.tokenizer, bench.folder / "pretrained")
        print(f"without an adapter: {bench.loss(model):.4f}", flush=True)
        rows = [compare(bench, seed) for seed in given.seeds]
    names = [name for name in rows[0] if name != "LoRA"]
    print(f"| rank | LoRA | {' | '.join(f'{name} | ratio' for name in names)} |\n|---|{'---|' * (1 + 2 * len(names))}")
    for rank in given.ranks:
        cells = [f"{statistics.mean(row['LoRA'][rank] for row in rows):.4f}"]
        for name in names:
            cells.append(f"{statistics.mean(row[name][rank] for row in rows):.4f}")
            cells.append(f"{statistics.mean(row[name][rank] / row['LoRA'][rank] for row in rows):.4f}")
        print(f"| {rank} | {' | '.join(cells)} |")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
