"""All that is worth knowing on a machine with a GPU, in one go and one file: `make gpu`.

    python3 benchmarks/gpu.py [--out FOLDER] [--seconds 460] [--only NAME ...] [--smoke]

Asks for torch, transformers and numpy, and for no network; a section that needs a package which is missing says so and
is skipped. Each section is a process of its own with a time limit, the most telling first, and FOLDER/gpu.json is
written anew after each. Loops train a Llama in bfloat16 on random tokens; a row is one document or, where `packed`,
about eight. `mfu` is the share of the card's bfloat16 peak, with 6 FLOPs a weight and token and attention's whole
square (that of packed rows too, whose kernel leaves most of it out), and `of_matrix_rate` that of the rate which a
matrix product reaches here. `--smoke` runs everything small, on a CPU too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bfloat16, FLOP/s


@dataclass(frozen=True)
class Shape:
    """A model and its batch; feed-forwards are 8/3 of the width, heads 64 wide."""

    layers: int
    width: int
    rows: int
    length: int = 2048
    vocabulary: int = 50304
    warmup: int = 5
    steps: int = 20

    @property
    def inner(self) -> int:
        """The feed-forward's width."""
        return -(-8 * self.width // 3 // 64) * 64

    @property
    def weights(self) -> int:
        """Those that a token is multiplied with: blocks and head."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.inner) + self.vocabulary * self.width

    def flops(self) -> float:
        """Of a training step."""
        return self.rows * self.length * (6 * self.weights + 12 * self.layers * self.length * self.width)


SHAPES = {"125M": Shape(12, 768, rows=16), "350M": Shape(24, 1024, rows=8)}
SMOKE = Shape(2, 64, rows=2, length=256, vocabulary=512, warmup=2, steps=2)


def device() -> Any:
    """Where all runs."""
    from pretrain.core.hardware import pick_device

    return pick_device()


def model(shape: Shape) -> Any:
    """A Llama with random weights, on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.width // 64, tie_word_embeddings=True,
        max_position_embeddings=shape.length,
    )  # fmt: skip
    with torch.device(device()):
        return LlamaForCausalLM(config)


def wait() -> None:
    """Until the device has done all it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock:
    """Seconds and peak memory of the steps after the warm-up; the device is waited for at both ends only."""

    def __init__(self, shape: Shape) -> None:
        from pretrain.core.hardware import matrix_rate

        self.shape, self.done, self.start, self.rate = shape, 0, 0.0, matrix_rate(device())

    def tick(self) -> None:
        """A step is done."""
        import torch

        self.done += 1
        if self.done == self.shape.warmup:
            wait()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.start = time.perf_counter()

    def result(self) -> dict[str, Any]:
        """What the section says."""
        import torch

        from pretrain.core.meter import peak_memory

        wait()
        seconds = (time.perf_counter() - self.start) / (self.done - self.shape.warmup)
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        card, rate = next((f for card, f in PEAKS.items() if card in name), None), self.shape.flops() / seconds
        return {
            "tokens_per_second": round(self.shape.rows * self.shape.length / seconds),
            "milliseconds": round(1e3 * seconds, 2),
            "mfu": round(rate / card, 4) if card else None,
            "of_matrix_rate": round(rate / self.rate, 4),
            "peak_gib": round(peak_memory(device()) / 2**30, 3),
        }


def tokens(shape: Shape) -> Any:
    """The same random tokens for all, a row a document."""
    import numpy as np

    return np.random.default_rng(0).integers(4, shape.vocabulary, (8 * shape.rows, shape.length))


def trainer(shape: Shape) -> dict[str, Any]:
    """`transformers.Trainer` with its defaults but for bfloat16, TF32, the batch, and no saving."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    clock = Clock(shape)

    class Tick(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    rows = [{"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)} for row in tokens(shape)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=shape.rows, max_steps=shape.warmup + shape.steps, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, learning_rate=1e-3, bf16=True,
            use_cpu=device().type == "cpu",
        )  # fmt: skip
        Trainer(model(shape), arguments, train_dataset=rows, callbacks=[Tick()]).train()
    return clock.result()


def bare(shape: Shape) -> dict[str, Any]:
    """The loop that one writes by hand: compiled model, autocast, fused AdamW, tokens on the device."""
    import torch

    net, clock, where = model(shape).train(), Clock(shape), device()
    fast: Any = torch.compile(net) if where.type == "cuda" else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    rows = torch.from_numpy(tokens(shape)).to(where).split(shape.rows)
    for step in range(shape.warmup + shape.steps):
        with torch.autocast(where.type, torch.bfloat16):
            loss = fast(input_ids=rows[step % len(rows)], labels=rows[step % len(rows)], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
    return clock.result()


def shards(shape: Shape, folder: Path, *, packed: bool) -> Any:
    """Random tokens on disk as the loop reads them, in documents of a row each or of an eighth on average."""
    import numpy as np

    from pretrain.core.files import file_digest, write_json
    from pretrain.corpus.shards import Shards

    flat, g = tokens(shape).astype(np.uint16).ravel(), np.random.default_rng(1)
    lengths = np.full(len(flat) // shape.length, shape.length)
    if packed:
        cuts = np.sort(g.choice(np.arange(1, len(flat)), 8 * len(lengths) - 1, replace=False))
        lengths = np.diff([0, *cuts, len(flat)])
    flat.tofile(folder / "tokens.bin")
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(folder / "domains.npy", np.zeros(len(lengths), np.uint16))
    np.save(folder / "bytes.npy", (4 * lengths).astype(np.uint32))
    sums = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
    facts = {"documents": len(lengths), "tokens": len(flat), "dtype": "uint16", "domains": ["all"], "checksums": sums}
    write_json(folder / "tokens.json", facts | {"begins": True, "vocabulary": shape.vocabulary})
    return Shards(folder)


def ours(shape: Shape, *, packed: bool = False, compiled: bool = False, kernel: str | None = None) -> dict[str, Any]:
    """The whole of our loop with its loader, log, clipping and meter, without saving."""
    from contextlib import nullcontext

    from pretrain.core.batch import Vocabulary
    from pretrain.core.models.attention import using
    from pretrain.objectives.language.causal_lm import CausalLM
    from pretrain.optim.optimizers.adamw import AdamW
    from pretrain.optim.schedules.constant import Constant
    from pretrain.training.budget import Budget
    from pretrain.training.loader import Loader
    from pretrain.training.loop import Settings, train

    clock, objective = Clock(shape), CausalLM()

    class Timed(Loader):
        def step(self, step: int, progress: float) -> Any:
            if step:
                clock.tick()
            return super().step(step, progress)

    settings = Settings(
        budget=Budget(steps=shape.warmup + shape.steps), save_every=0, bar=False, compile=compiled,
        log_every=10 * shape.steps, precision="bfloat16",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name, using(kernel) if kernel else nullcontext():
        data = shards(shape, Path(name), packed=packed)
        loader = Timed(
            data, [objective], Vocabulary(shape.vocabulary, 0), length=shape.length, batch_rows=shape.rows, workers=2
        )
        train(model(shape), loader, [objective], AdamW(), Constant(), settings, Path(name) / "run")
        clock.tick()
        return clock.result()


def lora(shape: Shape) -> dict[str, Any]:
    """Low-rank adapters on frozen weights of bfloat16, held wide and as they came: memory and speed of a step."""
    import numpy as np
    import torch

    from pretrain.core.batch import Context, Row, Vocabulary, to_device
    from pretrain.core.models.storage import narrow
    from pretrain.objectives.language.causal_lm import CausalLM
    from pretrain.surgery.adapters.dylora import DyLoRA

    start, rows = np.zeros(1, np.int64), tokens(shape)[: shape.rows].astype(np.int32)
    objective, context = CausalLM(), Context(Vocabulary(shape.vocabulary, 0), shape.length, np.random.default_rng(0))
    batch = to_device(objective.prepare([Row(row, start, start, 0, 0) for row in rows], context), device())
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        net = DyLoRA(rank=8, where="all")(model(shape).cpu().to(torch.bfloat16).float()).train()
        narrow(net, dtype)
        optimizer = torch.optim.AdamW([p for p in net.to(device()).parameters() if p.requires_grad], fused=True)
        clock = Clock(shape)
        for _ in range(shape.warmup + shape.steps):
            with torch.autocast(device().type, torch.bfloat16):
                loss = objective.loss(net, batch).value
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            clock.tick()
        weights = sum(p.nbytes for p in net.parameters()) / 2**20
        found[name] = clock.result() | {"loss": float(loss.detach()), "weights_mib": round(weights, 2)}
        del net, optimizer, loss
    return found


def decoding(shape: Shape) -> dict[str, Any]:
    """Greedy tokens a second of our loop and of `generate`, weights in bfloat16, one prompt and eight."""
    import torch

    from pretrain.core.generation.loop import decode

    new, found = (128 if torch.cuda.is_available() else 8), {}
    net = model(shape).to(torch.bfloat16).eval()
    for rows in (1, 8):
        prompt_BL = torch.from_numpy(tokens(shape)[:rows, :128]).to(device())
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda prompt_BL=prompt_BL: decode(net, prompt_BL, max_new_tokens=new),
            "generate": lambda prompt_BL=prompt_BL: net.generate(
                prompt_BL, attention_mask=torch.ones_like(prompt_BL), max_new_tokens=new, min_new_tokens=new,
                do_sample=False,
            ),
        }  # fmt: skip
        out = {}
        for name, way in ways.items():
            way()
            wait()
            started = time.perf_counter()
            out[name] = way().cpu()  # which waits for it
            found[f"{name}_{rows}"] = round(rows * new / (time.perf_counter() - started), 1)
        found[f"same_tokens_{rows}"] = round(float((out["ours"] == out["generate"]).float().mean()), 4)
    return found


def tests(smoke: bool) -> dict[str, Any]:
    """The tests for a GPU: how each ended, and of those that failed the end of what they said."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["-n", "4"] if importlib.util.find_spec("xdist") and not smoke else []  # most of it is compiling
        command += ["-k", "cross_entropy"] if smoke else []
        process = subprocess.Popen([*command, "tests/test_gpu.py"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            said = process.communicate(timeout=SECTIONS["tests"].seconds - 20)[0]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it reports on what it has done
            said = process.communicate()[0]
        if not report.exists():
            raise RuntimeError(said[-3000:])
        found: dict[str, Any] = {"passed": [], "skipped": [], "failed": {}, "last_line": said.splitlines()[-1]}
        for case in ElementTree.parse(report).iter("testcase"):
            bad = [end for kind in ("failure", "error") for end in case.iter(kind)]
            if bad:
                found["failed"][case.get("name")] = (bad[0].text or "")[-1500:]
            else:
                found["passed" if case.find("skipped") is None else "skipped"].append(case.get("name"))
        return found


def environment(smoke: bool) -> dict[str, Any]:
    """The machine, and what a bfloat16 matrix product reaches on it."""
    from pretrain.core.hardware import describe, matrix_rate
    from pretrain.core.models.attention import has_flex

    return describe() | {"matrix_rate": matrix_rate(device()), "flex_attention": has_flex(device())}


@dataclass(frozen=True)
class Section:
    """What to run, the seconds it may take, and the packages it cannot do without."""

    run: Callable[..., dict[str, Any]]
    seconds: int
    shape: str | None = None  # of a section that trains or decodes
    needs: tuple[str, ...] = ()
    given: tuple[tuple[str, Any], ...] = ()


COMPILED, PACKED = ("compiled", True), ("packed", True)
SECTIONS: dict[str, Section] = {
    "environment": Section(environment, 40),
    "125M/ours_compiled": Section(ours, 75, "125M", given=(COMPILED,)),
    "125M/packed_compiled": Section(ours, 75, "125M", given=(PACKED, COMPILED)),
    "125M/trainer": Section(trainer, 60, "125M", needs=("accelerate",)),
    "125M/bare_compiled": Section(bare, 90, "125M"),
    "tests": Section(tests, 150, needs=("pytest",)),
    "lora": Section(lora, 60, "350M"),
    "decoding": Section(decoding, 45, "125M"),
    "350M/ours_compiled": Section(ours, 75, "350M", given=(COMPILED,)),
    "350M/packed_compiled": Section(ours, 75, "350M", given=(PACKED, COMPILED)),
    "350M/trainer": Section(trainer, 60, "350M", needs=("accelerate",)),
    "350M/bare_compiled": Section(bare, 90, "350M"),
    "125M/ours": Section(ours, 60, "125M"),
    "125M/packed": Section(ours, 60, "125M", given=(PACKED,)),
    "125M/packed_dense": Section(ours, 60, "125M", given=(PACKED, ("kernel", "dense"))),
}


def attempt(name: str, seconds: float, smoke: bool) -> dict[str, Any]:
    """A section in a process of its own: its result, or why there is none."""
    missing = [package for package in SECTIONS[name].needs if importlib.util.find_spec(package) is None]
    if missing:
        return {"skipped": f"{', '.join(missing)} not installed"}
    command = [sys.executable, __file__, "--section", name, *(["--smoke"] if smoke else [])]
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    given = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it has started
        return {"failed": f"no end after {seconds:.0f} s", "errors": process.communicate()[1][-1500:]}
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        return {"failed": f"exit status {process.returncode}", "errors": (out + errors)[-3000:]}
    return json.loads(lines[-1])


def section(name: str, smoke: bool) -> None:
    """Run a section here and print its result."""
    chosen = SECTIONS[name]
    if chosen.shape is None:
        found = chosen.run(smoke)
    else:
        found = chosen.run(SMOKE if smoke else SHAPES[chosen.shape], **dict(chosen.given))
    print(json.dumps(found))


def main() -> None:
    """All sections in turn, as long as there is time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "runs"))
    parser.add_argument("--seconds", type=float, default=460)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.section:
        section(arguments.section, arguments.smoke)
        return
    started, results = time.monotonic(), {}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        left = arguments.seconds - (time.monotonic() - started)
        limit, before = min(left, SECTIONS[name].seconds), time.monotonic()
        results[name] = attempt(name, limit, arguments.smoke) if left > 15 else {"skipped": "no time left"}
        results[name]["section_seconds"] = round(time.monotonic() - before, 1)
        print(name, json.dumps(results[name])[:600], flush=True)
        work = arguments.out / "gpu.json.new"
        work.write_text(json.dumps({"smoke": arguments.smoke, "sections": results}, indent=1), encoding="utf-8")
        work.replace(arguments.out / "gpu.json")


if __name__ == "__main__":
    main()
