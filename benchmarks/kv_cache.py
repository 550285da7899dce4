"""PyramidInfer on long held-out text: bytes of the cache and perplexity, against the plain model.

    python benchmarks/kv_cache.py [--checkpoint FOLDER --corpus FOLDER] [--context 896] [--new 128] [--documents 16]
        [--recent 0.2]

Each held-out text gives a prompt of `--context` tokens; the perplexity is that of the next `--new` tokens, given one
at a time, so that both the prompt's tokens and later ones are dropped. Rows are shares kept after a block ("cosine" or
"constant") and, for each, what a plain model gives that sees only the last tokens, as many as the pyramid holds on
average: a pyramid that is no better chose its tokens in vain. The texts of a checkpoint are those of its corpus's test
split. Without a checkpoint, a Llama is trained here on Python's
standard library (`--layers`, `--width`, `--steps`) and evaluated on modules that it has not seen.
"""

from __future__ import annotations

import argparse
import math
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from pretrain.core.checkpoint import load
from pretrain.core.encoding import encode
from pretrain.core.hardware import pick_device
from pretrain.core.models.families import new_model
from pretrain.corpus.sources import PythonStdlib, read
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.decoding.cache._pyramid import cache_bytes
from pretrain.decoding.cache.pyramid_infer import PyramidInfer

SETTINGS = [("cosine", 0.9), ("cosine", 0.5), *(("constant", share) for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3))]


def texts() -> tuple[list[str], list[str]]:
    """Modules to train on, and every tenth to evaluate on."""
    found = [d["text"] for d in read(PythonStdlib(docstrings=False))]
    return [t for n, t in enumerate(found) if n % 10], found[::10]


def trained(settings: argparse.Namespace) -> tuple[Any, Any]:
    """A Llama trained on rows as long as prompt and continuation."""
    train, _ = texts()
    tokenizer = train_tokenizer(train, vocab_size=settings.vocabulary)
    length = settings.context + settings.new
    stream = np.concatenate(encode(tokenizer, train))
    rows_RL = torch.from_numpy(stream[: len(stream) // length * length].reshape(-1, length))
    fields = {
        "vocab_size": len(tokenizer), "hidden_size": settings.width, "intermediate_size": settings.width * 43 // 16,
        "num_hidden_layers": settings.layers, "num_attention_heads": max(1, settings.width // 32),
        "max_position_embeddings": length, "tie_word_embeddings": True,
    }  # fmt: skip
    model: Any = new_model("llama", fields).to(pick_device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(settings.steps):
        share = min((step + 1) / max(1, settings.steps // 20), 1 - step / settings.steps)
        optimizer.param_groups[0]["lr"] = settings.rate * share
        batch_BL = rows_RL[torch.randint(len(rows_RL), (settings.batch,), generator=generator)].to(model.device)
        loss = model(input_ids=batch_BL, labels=batch_BL, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval(), tokenizer


@torch.no_grad()
def measure(model: Any, rows_BN: torch.Tensor, context: int, method: PyramidInfer | None) -> dict[str, float]:
    """Loss of what follows the prompt, bytes of the cache after the prompt and at the end, and seconds."""
    losses = []
    with nullcontext() if method is None else method(model):
        started = time.perf_counter()
        output = model(input_ids=rows_BN[:, :context], use_cache=True, logits_to_keep=1)
        synchronise(model.device)
        prefilled, prompt = time.perf_counter() - started, cache_bytes(output.past_key_values)
        for at in range(context, rows_BN.shape[1]):
            losses.append(torch.nn.functional.cross_entropy(output.logits[:, -1].float(), rows_BN[:, at]))
            output = model(input_ids=rows_BN[:, at : at + 1], past_key_values=output.past_key_values, use_cache=True)
        synchronise(model.device)
    return {
        "loss": float(torch.stack(losses).mean()), "prompt": prompt, "end": cache_bytes(output.past_key_values),
        "prefill": prefilled, "new": time.perf_counter() - started - prefilled,
    }  # fmt: skip


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint")
    parser.add_argument("--corpus")
    parser.add_argument("--recent", type=float, default=0.2)  # the share of the prompt that is always kept
    whole = {"context": 896, "new": 128, "documents": 16, "layers": 12, "width": 192, "vocabulary": 4096}
    for name, value in (whole | {"steps": 600, "batch": 8, "least": 64}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=1e-3)
    settings = parser.parse_args()
    model, tokenizer = load(settings.checkpoint, device=pick_device()) if settings.checkpoint else trained(settings)
    if tokenizer is None:
        raise SystemExit(f"{settings.checkpoint}: the checkpoint has no tokenizer")
    length = settings.context + settings.new
    held_out = [d["text"] for d in Corpus(settings.corpus).documents("test")] if settings.corpus else texts()[1]
    rows = [ids[:length] for ids in encode(tokenizer, held_out) if len(ids) >= length][: settings.documents]
    if not rows:
        raise SystemExit(f"no held-out module has {length} tokens; accepted: a smaller --context or --new")
    rows_BN = torch.from_numpy(np.stack(rows)).long().to(model.device)
    plain = measure(model, rows_BN, settings.context, None)
    print(f"{len(rows)} texts, {settings.context} tokens of context, {settings.new} new")
    print(f"plain: perplexity {math.exp(plain['loss']):.3f}, {plain['end'] / 2**20:.2f} MiB at the end\n")
    print(
        "| share | bytes after prompt | at the end | perplexity | last tokens only | prefill time | time of the new |"
    )
    print("|---|---|---|---|---|---|---|")
    met = []
    for strategy, ratio in SETTINGS:
        method = PyramidInfer(
            prefill_decay_ratio=ratio,
            prefill_decay_strategy=strategy,
            min_context_length=settings.least,
            recent_ratio=settings.recent,
        )  # type: ignore[arg-type]
        found = measure(model, rows_BN, settings.context, method)
        lengths = method.lengths(settings.context, model.config.num_hidden_layers, settings.new)
        if round(plain["end"] * sum(lengths) / (len(lengths) * length)) != found["end"]:
            raise SystemExit(f"counted {found['end']} bytes, the formula says layers of {lengths} tokens")
        cut = round(found["end"] / plain["end"] * length)  # the plain model's cache holds as many at the end
        short = measure(model, rows_BN[:, length - max(cut, settings.new + 1) :], max(1, cut - settings.new), None)
        worse = [math.exp(other["loss"] - plain["loss"]) - 1 for other in (found, short)]
        share = found["end"] / plain["end"]
        print(
            f"| {strategy} {ratio} | {found['prompt'] / plain['prompt']:.1%} | {share:.1%} | {worse[0]:+.2%} "
            f"| {worse[1]:+.2%} | {found['prefill'] / plain['prefill']:.2f} | {found['new'] / plain['new']:.2f} |"
        )
        met += [f"{strategy} {ratio}"] if share <= 0.5 and worse[0] < 0.02 else []
    print(f"\nAt most half the bytes for less than 2% more perplexity: {', '.join(met) or 'none'}")


if __name__ == "__main__":
    main()
