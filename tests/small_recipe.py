"""The small recipe that tests of stages, comparisons and claims run: files, a tokenizer, a model of one block."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import yaml

MODEL = {
    "stage": "train", "name": "model", "corpus": "corpus", "tokenizer": "tokenizer", "length": 32, "batch_rows": 2,
    "model": {
        "family": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    },
}  # fmt: skip


def small_recipe(
    folder: Path, stories: list[dict[str, str]], *more: dict[str, Any], held_out: float = 0.1, **fields: Any
) -> str:
    """A recipe's text on `stories`, written into `folder`; `fields` are the training's, `more` the stages after it."""
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for number, story in enumerate(stories):
        (text / f"{number}.py").write_text(story["text"])
    corpus = {
        "stage": "data", "name": "corpus", "seed": 0, "sources": [{"files": str(text)}], "validation": held_out, "test": held_out,
    }  # fmt: skip
    tokenizer = {"stage": "tokenizer", "seed": 0, "corpus": "corpus", "vocab_size": 400}
    stages = yaml.safe_dump([corpus, tokenizer, MODEL | fields, *more], sort_keys=False)
    return "stages:\n" + textwrap.indent(stages, "  ")  # to which a test may add stages as text
