"""A small training in a process of its own, for tests that kill it or run several: FOLDER PREPARED STEPS [DROPOUT]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pretrain.core.batch import Vocabulary
from pretrain.core.checkpoint import save
from pretrain.core.hardware import pick_device
from pretrain.core.models.families import new_model
from pretrain.corpus.shards import Shards
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.evaluation.likelihood._shards import shard_loss
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.optim.optimizers.adamw import AdamW
from pretrain.optim.schedules.cosine import Cosine
from pretrain.training.budget import Budget
from pretrain.training.distributed import join
from pretrain.training.loader import Loader
from pretrain.training.loop import Settings, train


def parts(
    folder: Path, prepared: Path, steps: int, strategy: str = "ddp", dropout: float = 0.1, workers: int = 1
) -> tuple[Any, ...]:
    """What `train` takes, to its folder."""
    world = join(pick_device())
    tokenizer = load_tokenizer(prepared / "tokenizer")
    vocabulary = Vocabulary.of(tokenizer)
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = new_model("llama", fields | {"attention_dropout": dropout}, vocabulary=vocabulary, seed=1)
    shards, objective = Shards(prepared / "tokens" / "train"), CausalLM()
    loader = Loader(
        shards, [objective], vocabulary, length=64, batch_rows=8, micro_rows=2, seed=1, rank=world.rank,
        world=world.size, workers=workers, mixture={"python": 0.7, "docstrings": 0.3},
    )  # fmt: skip
    settings = Settings(
        budget=Budget(steps=steps), seed=1, evaluate_every=7, save_every=3, keep=2, bar=False, strategy=strategy
    )
    return model, loader, [objective], AdamW(lr=1e-2), Cosine(), settings, folder


def main(folder: Path, prepared: Path, steps: int, *chosen: Any) -> None:
    """Train, evaluate now and then, save the weights; `chosen`: strategy and dropout."""
    held_out = Shards(prepared / "tokens" / "validation")
    training = train(
        *parts(folder, prepared, steps, *chosen),
        evaluate=lambda trainee: shard_loss(trainee.model, held_out, length=64, max_tokens=500),
    )
    if training.world.main:
        save(training.model, load_tokenizer(prepared / "tokenizer"), folder / "checkpoint")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:5], *map(float, sys.argv[5:6]))
