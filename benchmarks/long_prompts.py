"""HOMER on prompts up to and beyond a model's limit, against a plain model that sees the last tokens alone.

    python benchmarks/long_prompts.py --checkpoint FOLDER --corpus FOLDER [--chunk 512] [--times 1 2 4] [--new 32]
        [--texts 24] [--calibration 32] [--threads 1]

Each text is a stretch of a held-out document (the corpus's test split): the longest prompt and `--new` tokens after
it. A shorter prompt is the end of the longest, so that all rows of the table predict the same tokens. They are given
one at a time after the prompt is read, and their perplexity is compared, text by text, with that of the plain model,
which reads the whole prompt where prompt and new tokens fit its limit, and else the last tokens that do. A further
plain model sees as many last tokens as `homer` keeps: a `homer` that is no better chose its tokens in vain. "biased" is
`homer` with the bias that `calibrate` finds in `--calibration` documents of the train split (0: leave it out). Texts
are read one by one; the seconds are the median over them, the bytes those of the cache once the prompt is read.
The ± is a standard error over texts as if they were independent, which stretches of one document are not quite.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from pretrain.core.checkpoint import load
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.generation.forward import Forward
from pretrain.core.hardware import pick_device
from pretrain.corpus.store import Corpus
from pretrain.decoding.long_context.homer import Homer, _continued

Read = Callable[[torch.Tensor], tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor], int]]


def stretches(tokenizer: Any, corpus: Corpus, length: int, new: int, most: int) -> tuple[list[torch.Tensor], int]:
    """At most `most` stretches of held-out documents, the documents in turn, and how many documents they are of.

    Prompts of one document may share tokens, what follows them never does.
    """
    stride = max(new, length // 8)
    documents = [d["text"] for d in corpus.documents("test")]
    cut = [
        [torch.from_numpy(ids[at : at + length]).long() for at in range(0, len(ids) - length + 1, stride)]
        for ids in encode(tokenizer, documents)
        if len(ids) >= length
    ]
    turns = [(rank, number) for rank in range(max(map(len, cut), default=0)) for number in range(len(cut))]
    chosen = [(rank, number) for rank, number in turns if rank < len(cut[number])][:most]
    return [cut[number][rank] for rank, number in chosen], len({number for _, number in chosen})


def plain(model: Any, seen: int, new: int) -> Read:
    """The model that reads the last `seen` tokens of a prompt."""

    def read(ids_1L: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor], int]:
        forward = Forward(model, seen + new)
        logits_1V = forward.prefill(ids_1L[:, -seen:])
        held = sum(both.nbytes for both, _, _ in forward.cache.values()) * seen // forward.room
        return logits_1V, forward.step, held

    return read


def homer(model: Any, method: Homer, length: int, new: int) -> Read:
    """The model whose prompt of `length` tokens is read by `homer`."""
    room = min(length, method.lengths(model)[1]) + new

    def read(ids_1L: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor], int]:
        (chunk,) = method.read(model, ids_1L)
        forward = _continued(model, [chunk], room)
        held = sum(keys.nbytes + values.nbytes for keys, values in chunk.cache)
        return forward.head(forward.norm(chunk.states_1TE[:, -1])), forward.step, held

    return read


@torch.inference_mode()
def measure(read: Read, rows: list[torch.Tensor], new: int) -> tuple[torch.Tensor, float, int]:
    """Each text's mean loss on its last `new` tokens, the median seconds of reading, bytes of the cache."""
    read(rows[0][None, :-new])  # once without the clock
    losses, seconds, held = [], [], 0
    for row_N in rows:
        synchronise(row_N.device)
        started = time.perf_counter()
        logits_1V, step, held = read(row_N[None, :-new])
        synchronise(row_N.device)
        seconds.append(time.perf_counter() - started)
        found = []
        for at in range(len(row_N) - new, len(row_N)):
            found.append(torch.nn.functional.cross_entropy(logits_1V.float(), row_N[at : at + 1]))
            if at + 1 < len(row_N):
                logits_1V = step(row_N[None, at : at + 1])
        losses.append(torch.stack(found).mean())
    return torch.stack(losses).cpu(), float(torch.tensor(seconds).median()), held


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def calibrated(model: Any, tokenizer: Any, corpus: Corpus, chunk: int, count: int, folder: str) -> Homer:
    """`homer` with a bias from the beginnings of training documents."""
    texts = (d["text"] for d in corpus.documents("train"))
    rows = (torch.from_numpy(ids[:chunk]).long() for text in texts for ids in encode(tokenizer, [text]))
    batches = ({"input_ids": row_L[None]} for row_L in itertools.islice((r for r in rows if len(r) == chunk), count))
    return Homer(max_chunk_len=chunk, bias=str(Homer(max_chunk_len=chunk).calibrate(model, batches, folder)))


def compare(model: Any, methods: dict[str, Homer], rows: list[torch.Tensor], length: int, new: int) -> None:
    """Print one prompt length's rows of the table."""
    limit = model.config.max_position_embeddings
    chunk = methods["homer"].lengths(model)[1]
    whole, rows = min(length, limit - new), [row_N[-length - new :] for row_N in rows]
    reads = {"plain, whole prompt" if whole == length else f"plain, last {whole}": plain(model, whole, new)}
    if chunk < whole:
        reads[f"plain, last {chunk}"] = plain(model, chunk, new)
    refused = ""
    try:
        methods["homer"].plan(model, length)
        reads |= {name: homer(model, method, length, new) for name, method in methods.items()}
    except PretrainError as error:  # the tree of chunks is higher than the model
        refused = str(error)
    base_R = torch.empty(0)
    for name, read in reads.items():
        loss_R, seconds, held = measure(read, rows, new)
        base_R = loss_R if not len(base_R) else base_R
        worse_R = loss_R - base_R
        if name in methods and length <= chunk and float(worse_R.abs().max()) > 1e-3:
            raise SystemExit(f"{name}: a prompt of one chunk is not read as by the plain model: {worse_R.tolist()}")
        spread = float(worse_R.std()) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
        against = "" if not worse_R.any() else f"{float(worse_R.mean()):+.3f} ± {spread:.3f}"
        perplexity = math.exp(float(loss_R.mean()))
        print(f"| {length} | {name} | {perplexity:.2f} | {against} | {seconds:.3f} | {held:,} |", flush=True)
    if refused:
        print(f"| {length} | {refused} | | | | |", flush=True)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--chunk", type=int)  # half the model's limit
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 4])  # prompts, in chunks' lengths
    for name, value in {"new": 32, "texts": 24, "calibration": 32, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    model, tokenizer = load(settings.checkpoint, device=pick_device())
    if tokenizer is None:
        raise SystemExit(f"{settings.checkpoint}: the checkpoint has no tokenizer")
    model.eval()
    corpus, limit = Corpus(settings.corpus), model.config.max_position_embeddings
    chunk = Homer(max_chunk_len=settings.chunk).lengths(model)[1]
    if chunk + settings.new > limit:
        raise SystemExit(f"--new {settings.new}: accepted: at most {limit - chunk}, what a chunk leaves of {limit}")
    length = chunk * max(settings.times) + settings.new
    rows, documents = stretches(tokenizer, corpus, length, settings.new, settings.texts)
    if not rows:
        raise SystemExit(f"no held-out document has {length} tokens; accepted: a smaller --chunk, --times or --new")
    rows = [row_N.to(model.device) for row_N in rows]
    print(
        f"{len(rows)} texts of {documents} documents, {settings.new} new tokens each, chunks of {chunk}, limit {limit}"
    )
    methods = {"homer": Homer(max_chunk_len=chunk)}
    with tempfile.TemporaryDirectory() as folder:
        if settings.calibration:
            count = settings.calibration
            methods["homer, biased"] = calibrated(model, tokenizer, corpus, chunk, count, folder)
        print("\n| prompt | method | perplexity | loss against the first row | seconds of reading | cache bytes |")
        print("|---|---|---|---|---|---|")
        for times in settings.times:
            compare(model, methods, rows, chunk * times, settings.new)


if __name__ == "__main__":
    main()
