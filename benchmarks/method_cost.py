"""What each objective, optimiser and policy costs a token, beside plain causal LM with AdamW.

    python benchmarks/method_cost.py [--steps 12]

All on one corpus (Python's standard library) and models of one size (4 layers, width 256, 4 heads, vocabulary 4096,
rows of 256, 8 a step), step by step in turn in one process: a row is the median of the paired ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDTH, LAYERS, HEADS, LENGTH, ROWS = 256, 4, 4, 256, 8
PLAIN = "causal_lm, adamw"
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": WIDTH, "intermediate_size": 688, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "tie_word_embeddings": True,
    },
    "bert": {
        "hidden_size": WIDTH, "intermediate_size": 1024, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "max_position_embeddings": LENGTH,
    },
    "t5": {
        "d_model": WIDTH, "d_ff": 688, "d_kv": WIDTH // HEADS, "num_heads": HEADS, "num_layers": LAYERS // 2,
        "num_decoder_layers": LAYERS // 2, "feed_forward_proj": "gated-gelu",
    },
}  # fmt: skip


def trainings(folder: Path) -> dict[str, Any]:
    """Each case as a `Training` that is ready to step."""
    from pretrain.core.batch import Vocabulary
    from pretrain.core.method import method_class
    from pretrain.core.models.families import new_model
    from pretrain.corpus.shards import tokenise
    from pretrain.corpus.sources import PythonStdlib, read
    from pretrain.corpus.store import Corpus, write_corpus
    from pretrain.corpus.tokenizers import train_tokenizer
    from pretrain.optim.schedules.constant import Constant
    from pretrain.training.budget import Budget
    from pretrain.training.loader import Loader
    from pretrain.training.loop import Settings, _start

    write_corpus(read(PythonStdlib()), folder / "corpus", near_duplicates=None)
    corpus = Corpus(folder / "corpus")
    tokenizer = train_tokenizer(
        (d["text"] for d in corpus.documents("train")),
        vocab_size=4096,
        cls=True,
        mask=True,
        sentinels=100,
        extra=["[R]", "[S]", "[X]"],
    )
    shards = tokenise(corpus, tokenizer, folder / "tokens", splits=["train"])["train"]
    vocabulary = Vocabulary.of(tokenizer)

    def case(family: str, objective: str, optimizer: str = "adamw", policy: str = "", **fields: Any) -> Any:
        """A training; `fields` are the policy's, or without one the objective's."""
        built: Any = method_class(objective, "objective")(**({} if policy else fields))
        policies: Any = [method_class(policy, "policy")(**fields)] if policy else []
        chosen: Any = method_class(optimizer, "optimiser")()
        model = new_model(family, MODELS[family], task=built.task, vocabulary=vocabulary)
        loader = Loader(shards, [built], vocabulary, length=LENGTH, batch_rows=ROWS)
        settings = Settings(budget=Budget(steps=1e9), save_every=0, bar=False)
        name = f"{objective}-{optimizer}-{policy}"
        return _start(model, loader, [built], chosen, Constant(), settings, folder / name, None, policies)

    return {
        PLAIN: case("llama", "causal_lm"),
        "causal_lm, conda": case("llama", "causal_lm", "conda"),
        "causal_lm, adamw, odm": case("llama", "causal_lm", policy="odm", warmup=0.0),
        "causal_lm, adamw, toremi": case("llama", "causal_lm", policy="toremi", interval=2),
        "causal_lm, adamw, spdf": case("llama", "causal_lm", policy="spdf"),
        "causal_lm, adamw, gradual_pruning": case("llama", "causal_lm", policy="gradual_pruning"),
        "prefix_lm": case("llama", "prefix_lm"),
        "ctcd, a companion of half the depth": case("llama", "ctcd", companion={"num_hidden_layers": LAYERS // 2}),
        "masked_lm": case("bert", "masked_lm"),
        "electra": case("bert", "electra"),
        "random_token_substitution": case("bert", "random_token_substitution"),
        "drbert": case("bert", "drbert"),
        "mask_later": case("bert", "mask_later"),
        "retromae_v2": case("bert", "retromae_v2"),
        "bag_of_words": case("bert", "bag_of_words"),
        "span_corruption": case("t5", "span_corruption"),
        "ul2": case("t5", "ul2"),
    }


def measured(cases: dict[str, Any], steps: int) -> Iterator[dict[str, float]]:
    """Seconds a token of each case, in turn, after three steps that do not count."""
    from pretrain.training.loop import step

    for number in range(steps + 3):
        seconds = {}
        for name, training in cases.items():
            started, before = time.perf_counter(), training.tokens
            step(training)
            seconds[name] = (time.perf_counter() - started) / (training.tokens - before)
        if number >= 3:
            yield seconds


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        cases = trainings(Path(folder))
        rounds = list(measured(cases, steps))
    print(
        "| what | seconds a token against the first | FLOPs a token against the first | parameters |\n|---|---|---|---|"
    )
    for name, training in cases.items():
        ratio = statistics.median(r[name] / r[PLAIN] for r in rounds)
        flops = (training.flops / training.tokens) / (cases[PLAIN].flops / cases[PLAIN].tokens)
        print(f"| {name} | {ratio:.3f} | {flops:.3f} | {training.model.num_parameters():,} |")


if __name__ == "__main__":
    main()
