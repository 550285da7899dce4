"""Bits per byte at equal training time: ours at once; nanoGPT, nanochat and the `transformers` Trainer at their best.

    python benchmarks/beside.py --nanogpt FOLDER --nanochat FOLDER [--seconds 180] [--output runs/beside]

FOLDER: clones of github.com/karpathy's nanoGPT and nanochat, run as they are in processes of their own; nanochat needs
rustbpe, tiktoken, kernels and wandb beside its torch. All train on the quickstart's training documents; each of the
others tries three sizes and three rates, from the settings that it recommends for CPUs, for a third of the seconds, and
its best two whole. Ours is the quickstart as shipped, and with what the frugal recipe gives its model. How many steps
fit into the seconds is measured first, so that schedules end with the time; set-up, compiling and tokenising are not
counted.
Measured are the beginnings of the quickstart's test documents, each token after half a window of its own text or more,
where so much comes before it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import pickle
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parent.parent / "recipes"
QUICKSTART = RECIPES / "quickstart.yaml"
CHARACTERS = 4_000  # of a test document, from its beginning
PROBE = 12  # steps from which the speed is known
SETTLED = 4  # of them are not looked at
LEAST = 30  # steps that a size must make in a third of the seconds to be tried


def corpus(folder: Path, documents: int) -> dict[str, list[str]]:
    """The quickstart's training and validation texts, and the beginnings of its test documents."""
    from pretrain import engine
    from pretrain.core.folders import corpus_of
    from pretrain.corpus.store import Corpus
    from pretrain.recipe import check, read

    raw, _ = read(QUICKSTART)
    engine.run(check(raw | {"stages": raw["stages"][:1]}, output=folder / "corpus"), report=False)
    texts = Corpus(corpus_of(folder / "corpus" / "corpus"))
    split = {name: [d["text"] for d in texts.documents(name)] for name in ("train", "validation")}
    return split | {"test": [d["text"][:CHARACTERS] for d in texts.sample("test", documents)]}


def ours(folder: Path, seconds: float, documents: int, *, frugal: bool = False) -> float:
    """The quickstart, as it is or with what the frugal recipe gives its model; its bits per byte."""
    from pretrain import engine
    from pretrain.recipe import read

    changes = [f"model.budget={{seconds: {seconds}}}", f"evaluation.max_documents={documents}"]
    if frugal:
        model = next(stage for stage in read(RECIPES / "frugal.yaml")[0]["stages"] if stage["name"] == "model")
        changes += [f"model.{field}={json.dumps(model[field])}" for field in ("surgeries", "policies")]
    run = engine.run(QUICKSTART, overrides=changes, output=folder)
    return float(run.stages["evaluation"]["metrics"]["bits_per_byte"])


def windows(tokens: Sequence[int], length: int) -> Iterator[tuple[Sequence[int], int]]:
    """Pieces of at most `length` + 1 tokens and how many of their last ones are to be counted: each token once."""
    counted = 1  # the first token is what a document begins with
    while counted < len(tokens):
        end = min(len(tokens), max(length + 1, counted + length // 2))
        begin = max(0, end - length - 1)
        yield tokens[begin:end], end - counted
        counted = end


def bits(
    logits_of: Callable[[Any], Any], texts: Sequence[str], encode: Callable[[str], list[int]], length: int
) -> float:
    """Bits per byte of texts; `encode` puts what a document begins with before it."""
    import torch

    nats, pieces = 0.0, [piece for text in texts for piece in windows(encode(text), length)]
    pieces.sort(key=lambda piece: len(piece[0]))
    with torch.no_grad():
        for first in range(0, len(pieces), 16):
            batch = pieces[first : first + 16]
            longest = max(len(ids) for ids, _ in batch)
            rows_BL = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in batch])
            nll_BL = torch.nn.functional.cross_entropy(
                logits_of(rows_BL[:, :-1].contiguous()).float().transpose(1, 2), rows_BL[:, 1:], reduction="none"
            )
            for row_L, (ids, last) in zip(nll_BL, batch, strict=True):
                nats += float(row_L[len(ids) - 1 - last : len(ids) - 1].double().sum())
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def program(*words: str, folder: Path, pattern: str, unit: float, **environment: str) -> list[float]:
    """Run a program; the seconds of each step that it prints."""
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False, env=os.environ | environment
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [float(each) / unit for each in re.findall(pattern, done.stdout)]


# nanoGPT: bytes, after its README's setting for CPUs.


def nanogpt(place: Path, texts: dict[str, list[str]], output: Path) -> tuple[list[Any], list[float], Any, Any]:
    """Sizes, rates, and what trains and measures one."""
    import numpy as np

    data = output / "nanogpt"
    data.mkdir(parents=True, exist_ok=True)
    for name, split in (("train", "train"), ("val", "validation")):
        joined = b"".join(b"\0" + text.encode() for text in texts[split])
        np.frombuffer(joined, dtype=np.uint8).astype(np.uint16).tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 256}))

    def train(size: int, rate: float, steps: int) -> list[float]:
        return program(
            "train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=1",
            "--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", f"--n_embd={size}",
            f"--max_iters={steps}", f"--lr_decay_iters={steps}", "--dropout=0.0", f"--dataset={data.resolve()}",
            f"--learning_rate={rate}", f"--min_lr={rate / 10}", f"--eval_interval={steps}",
            "--always_save_checkpoint=True", f"--out_dir={(data / 'out').resolve()}",
            folder=place, pattern=r"time ([\d.]+)ms", unit=1000.0,
        )  # fmt: skip

    def score(texts: Sequence[str]) -> float:
        import torch

        sys.path.insert(0, str(place))
        from model import GPT, GPTConfig

        saved = torch.load(data / "out" / "ckpt.pt", weights_only=True)
        model = GPT(GPTConfig(**saved["model_args"]))
        model.load_state_dict(saved["model"])
        model.eval()
        return bits(lambda ids: model(ids, ids)[0], texts, lambda text: [0, *text.encode()], 64)

    return [64, 128, 256], [1e-3, 2e-3, 4e-3], train, score


# nanochat: its tokenizer with as many entries as the quickstart's model of minutes, after its two examples for CPUs.


def nanochat(place: Path, texts: dict[str, list[str]], output: Path) -> tuple[list[Any], list[float], Any, Any]:
    """Sizes, rates (times its own), and what trains and measures one."""
    import pyarrow
    import pyarrow.parquet

    base = (output / "nanochat").resolve()
    environment = {"NANOCHAT_BASE_DIR": str(base), "WANDB_MODE": "disabled"}
    shards = base / "base_data_climbmix"
    shards.mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(("train", "validation")):
        table = pyarrow.table({"text": texts[split]})
        pyarrow.parquet.write_table(table, shards / f"shard_{number:05}.parquet", row_group_size=64)
    if not (base / "tokenizer").exists():
        program("-m", "scripts.tok_train", "--vocab-size=8192", folder=place, pattern="$^", unit=1.0, **environment)

    def train(size: tuple[int, int, int], rate: float, steps: int) -> list[float]:
        depth, rows, tokens = size
        rates = {"embedding": 0.3, "unembedding": 0.008, "matrix": 0.02, "scalar": 0.5}
        return program(
            "-m", "scripts.base_train", f"--depth={depth}", "--head-dim=64", "--window-pattern=L", "--max-seq-len=512",
            f"--device-batch-size={rows}", f"--total-batch-size={tokens}", "--eval-every=-1", "--core-metric-every=-1",
            "--sample-every=-1", f"--num-iterations={steps}", "--device-type=cpu", "--model-tag=beside",
            *(f"--{name}-lr={rate * lr}" for name, lr in rates.items()),
            folder=place, pattern=r"dt: ([\d.]+)ms", unit=1000.0, **environment,
        )  # fmt: skip

    def score(texts: Sequence[str]) -> float:
        import torch

        sys.path.insert(0, str(place))
        os.environ.update(environment)
        from nanochat.checkpoint_manager import load_model

        model, tokenizer, _ = load_model("base", torch.device("cpu"), phase="eval", model_tag="beside")
        begin = tokenizer.get_bos_token_id()
        return bits(model, texts, lambda text: tokenizer.encode(text, prepend=begin), 512)

    return [(2, 4, 2048), (4, 8, 4096), (6, 32, 16384)], [1.0, 2.0, 4.0], train, score


# The Trainer: a Llama with a byte-level BPE of 4,096 entries, AdamW and a linear schedule.


def trainer(texts: dict[str, list[str]], output: Path) -> tuple[list[Any], list[float], Any, Any]:
    """Widths, rates, and what trains and measures one."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts["train"], vocab_size=4096, special_tokens=["<s>"], show_progress=False)
    stream = [token for text in texts["train"] for token in (0, *tokenizer.encode(text).ids)]
    rows = [stream[first : first + 256] for first in range(0, len(stream) - 255, 256)]
    last: list[Any] = []

    def train(width: int, rate: float, steps: int) -> list[float]:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

        clock: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.append(time.perf_counter())

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4096, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=4,
            num_attention_heads=4, tie_word_embeddings=True, max_position_embeddings=256,
        )  # fmt: skip
        arguments = TrainingArguments(
            str(output / "trainer"), per_device_train_batch_size=8, max_steps=steps, learning_rate=rate,
            warmup_steps=max(1, steps // 20), report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        data = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(model, arguments, train_dataset=data, callbacks=[Clock()]).train()
        last[:] = [model.eval()]
        return [b - a for a, b in itertools.pairwise(clock)]

    def score(texts: Sequence[str]) -> float:
        return bits(
            lambda ids: last[0](input_ids=ids).logits, texts, lambda text: [0, *tokenizer.encode(text).ids], 256
        )

    return [64, 128, 256], [3e-3, 1e-2, 3e-2], train, score


def tried(
    name: str, seconds: float, sizes: Sequence[Any], rates: Sequence[float], train: Any, score: Any, test: Sequence[str]
) -> list[Any]:
    """All sizes and rates of one for a third of the seconds, judged by some of the documents, then the best two whole.

    The best first.
    """
    speed: dict[Any, float] = {}  # seconds of a step, by size

    def run(size: Any, rate: float, seconds: float, documents: Sequence[str]) -> Any:
        steps = round(seconds / speed[size])
        times = train(size, rate, steps)[1:]
        row = {"size": size, "rate": rate, "steps": steps, "seconds": sum(times), "bits_per_byte": score(documents)}
        print(json.dumps({"name": name} | row), flush=True)
        return row

    rows = []
    for size in sizes:
        speed[size] = statistics.median(train(size, rates[0], PROBE)[SETTLED:])
        if seconds / 3 < LEAST * speed[size]:
            print(f"{name}, size {size}: {speed[size]:.2g} s a step, too slow to be tried", flush=True)
            continue
        rows += [run(size, rate, seconds / 3, test[::5]) for rate in rates]
    best = sorted(rows, key=lambda row: row["bits_per_byte"])[:2]
    whole = [run(row["size"], row["rate"], seconds, test) for row in best]
    return sorted(whole, key=lambda row: row["bits_per_byte"])


def main() -> None:
    """Each in turn; a table and `beside.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--nanochat", type=Path)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--documents", type=int, default=2000, help="of the test split")
    parser.add_argument("--output", type=Path, default=Path("runs") / "beside")
    parser.add_argument("--only", nargs="*", default=["ours", "frugal", "nanogpt", "nanochat", "trainer"])
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    texts = corpus(output, arguments.documents)
    rows: dict[str, Any] = {}
    for name in arguments.only:
        if name in ("ours", "frugal"):
            score = ours(output / name, arguments.seconds, arguments.documents, frugal=name == "frugal")
            rows[name] = [{"bits_per_byte": score}]
        elif name == "trainer":
            rows[name] = tried(name, arguments.seconds, *trainer(texts, output), texts["test"])
        elif (place := getattr(arguments, name)) is not None:
            made = {"nanogpt": nanogpt, "nanochat": nanochat}[name](place.resolve(), texts, output)
            rows[name] = tried(name, arguments.seconds, *made, texts["test"])
    (output / "beside.json").write_text(json.dumps({"seconds": arguments.seconds, "rows": rows}, indent=2))
    for name, each in rows.items():
        best = each[0]
        print(f"| {name} | {best.get('size', '')} | {best.get('rate', '')} | {best['bits_per_byte']:.3f} |")


if __name__ == "__main__":
    main()
