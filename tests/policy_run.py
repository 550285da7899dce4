"""A short training with policies, as their tests need it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain.core.batch import Vocabulary
from pretrain.corpus.shards import Shards
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.optim.optimizers.adamw import AdamW
from pretrain.optim.schedules.constant import Constant
from pretrain.training.budget import Budget
from pretrain.training.loader import Loader
from pretrain.training.loop import Settings, Training, train


def run(
    prepared: Path, model: Any, folder: Path, *policies: Any, budget: Budget | None = None, **given: Any
) -> Training:
    """Train `model` on the small corpus; `given` goes to `train` or the loader where they know it, else to the settings."""
    vocabulary = Vocabulary.of(load_tokenizer(prepared / "tokenizer"))
    objective, evaluate = given.pop("objective", CausalLM()), given.pop("evaluate", None)
    optimizer, schedule = given.pop("optimizer", AdamW(lr=1e-2)), given.pop("schedule", Constant())
    chosen = {k: given.pop(k) for k in ("mixture", "workers", "micro_rows") if k in given}
    if any(policy.name in ("dp_sgd", "ew_tune") for policy in policies):  # which must see each example's gradient
        chosen.setdefault("micro_rows", 1)
    loader = Loader(Shards(prepared / "tokens" / "train"), [objective], vocabulary, length=64, batch_rows=8, **chosen)
    settings = Settings(budget=budget or Budget(steps=6), bar=False, **({"save_every": 0} | given))
    return train(
        model, loader, [objective], optimizer, schedule, settings, folder, policies=policies, evaluate=evaluate
    )


def steps(folder: Path) -> list[dict[str, Any]]:
    """The log's records of steps."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "step"]
