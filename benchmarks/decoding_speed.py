"""Tokens a second of decoding: `transformers` greedily and with prompt lookup, our loop, Token Recycling, ADED.

    python benchmarks/decoding_speed.py FOLDER [--seconds 120] [--prompts 8] [--new 128] [--rounds 5] [--threads 1]

A small Llama of Python's standard library is trained in FOLDER by a recipe (once: a second call finds it there).
Prompts are the first tokens of held-out modules (code) and docstrings (prose). In a round every prompt is continued by
every method in turn; methods that remember begin each round with nothing and keep what they see from prompt to prompt.
A row is the median over the rounds: tokens a second, its ratio to `transformers`' greedy decoding of the same round,
tokens for each pass of the model, and whether all tokens are those of greedy decoding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.core.generation.loop import decode
from pretrain.decoding.speculative.aded import ADED
from pretrain.decoding.speculative.token_recycling import TokenRecycling

RECIPE = """
name: decoding
seed: 0
stages:
  - {{name: corpus, stage: data, sources: [stdlib]}}
  - {{name: tokenizer, stage: tokenizer, corpus: corpus, algorithm: bpe, vocab_size: {vocabulary}}}
  - name: model
    stage: train
    corpus: corpus
    tokenizer: tokenizer
    model: {{family: llama, hidden_size: {width}, intermediate_size: {inner}, num_hidden_layers: {layers},
             num_attention_heads: {heads}, max_position_embeddings: 1024, tie_word_embeddings: true}}
    length: 256
    batch_rows: 8
    objective: causal_lm
    optimizer: {{method: adamw, lr: 3e-3, weight_decay: 0.1}}
    schedule: {{method: cosine, warmup: 0.03, final: 0.05}}
    budget: {{seconds: {seconds}}}
    save_every: 100
"""
KINDS = {"code": "python", "prose": "docstrings"}
GENERATE = "transformers, greedy"
Case = Callable[[torch.Tensor], torch.Tensor]


def trained(folder: Path, seconds: float, width: int, layers: int, vocabulary: int) -> tuple[Any, Any, Path]:
    """The model, its tokenizer and the corpus."""
    from pretrain import engine
    from pretrain.core import checkpoint
    from pretrain.recipe import load
    from pretrain.stages import checkpoint_of

    folder.mkdir(parents=True, exist_ok=True)
    inner = -(-8 * width // 3 // 8) * 8
    text = RECIPE.format(
        seconds=seconds, width=width, inner=inner, layers=layers, heads=max(1, width // 64), vocabulary=vocabulary
    )
    (folder / "decoding.yaml").write_text(text, encoding="utf-8")
    engine.run(load(folder / "decoding.yaml", output=folder / "run"), report=False)
    model, tokenizer = checkpoint.load(checkpoint_of(folder / "run" / "model"))
    return model.eval(), tokenizer, folder / "run" / "corpus" / "corpus"


def prompts(corpus: Path, tokenizer: Any, kind: str, count: int, length: int) -> list[torch.Tensor]:
    """The first `length` tokens of held-out documents that are twice as long."""
    from pretrain.corpus.store import Corpus

    found: list[torch.Tensor] = []
    for document in Corpus(corpus).documents("test"):
        if document["domain"] != KINDS[kind] or len(document["text"]) < 4 * length:
            continue
        ids = tokenizer(document["text"][: 40 * length], add_special_tokens=False)["input_ids"]
        if len(ids) >= 2 * length:
            found.append(torch.tensor([[tokenizer.bos_token_id, *ids[: length - 1]]]))
        if len(found) == count:
            break
    return found


def cases(model: Any, new: int, pad: int) -> dict[str, Case]:
    """What is compared, each with nothing in its memory."""

    def generate(ids_1L: torch.Tensor, **more: Any) -> torch.Tensor:
        return model.generate(
            ids_1L, attention_mask=torch.ones_like(ids_1L), max_new_tokens=new, do_sample=False,
            eos_token_id=None, pad_token_id=pad, **more,
        )  # fmt: skip

    def by(method: Any) -> Case:
        return lambda ids_1L: method.generate(model, ids_1L, max_new_tokens=new, pad=pad)

    return {
        GENERATE: generate,
        "transformers, prompt lookup (10)": lambda ids_1L: generate(ids_1L, prompt_lookup_num_tokens=10),
        "our loop, greedy": lambda ids_1L: decode(model, ids_1L, max_new_tokens=new, pad=pad),
        "token_recycling": by(TokenRecycling()),
        "token_recycling, the paper's 80 nodes": by(TokenRecycling(nodes=80)),
        "aded": by(ADED()),
        "aded, the paper's 24 sequences of 150 iterations": by(ADED(sequences=24, iterations=150)),
    }


def measured(model: Any, ids: list[torch.Tensor], new: int, pad: int, rounds: int) -> dict[str, dict[str, Any]]:
    """By case: seconds of each round, passes of the model, whether the tokens are the greedy ones."""
    count = [0]
    handle = model.lm_head.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    found: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for number in range(rounds + 1):  # the first does not count
            seconds: dict[str, float] = {}
            compared = cases(model, new, pad)
            for ids_1L in ids if number else ids[:1]:
                expected = None
                for name, case in compared.items():
                    row = found.setdefault(name, {"seconds": [], "passes": 0, "tokens": 0, "same": True})
                    count[0], started = 0, time.perf_counter()
                    out_1N = case(ids_1L)
                    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
                    expected = out_1N if expected is None else expected
                    row["same"] &= torch.equal(out_1N, expected)
                    if number:
                        row["passes"] += count[0]
                        row["tokens"] += new
            if number:
                for name, spent in seconds.items():
                    found[name]["seconds"].append(spent)
    handle.remove()
    return found


def main() -> None:
    """Measure and print a table for each kind of text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, value in {
        "seconds": 120, "prompts": 8, "length": 64, "new": 128, "rounds": 5, "threads": 1, "width": 192, "layers": 4,
        "vocabulary": 4096,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    model, tokenizer, corpus = trained(given.folder, given.seconds, given.width, given.layers, given.vocabulary)
    torch.set_num_threads(given.threads)
    parameters = f"{model.num_parameters() / 1e6:.1f} M parameters, {given.layers} layers, width {given.width}"
    print(f"{parameters}; {given.threads} threads; {given.new} new tokens; medians of {given.rounds} rounds")
    for kind in KINDS:
        ids = prompts(corpus, tokenizer, kind, given.prompts, given.length)
        rows = measured(model, ids, given.new, tokenizer.pad_token_id or 0, given.rounds)
        print(f"\n{kind}, {len(ids)} prompts\n| method | tokens/s | ratio | tokens a pass | same tokens |")
        print("|---|---|---|---|---|")
        for name, row in rows.items():
            pairs = zip(rows[GENERATE]["seconds"], row["seconds"], strict=True)
            ratio = statistics.median(plain / own for plain, own in pairs)
            speed = len(ids) * given.new / statistics.median(row["seconds"])
            same = "yes" if row["same"] else "NO"
            print(f"| {name} | {speed:.0f} | {ratio:.2f} | {row['tokens'] / row['passes']:.2f} | {same} |")


if __name__ == "__main__":
    main()
