"""Faults: runs of a small recipe of all kinds of stages that are killed, or go on with damaged files.

`python faults.py` is a warm process: it has imported what a run needs, and runs the command line in a fork of itself
for each line of JSON that it reads. So a kill costs a fork, and not the seconds that torch takes to be imported.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.core.errors import PretrainError
from pretrain.core.files import SUMS, damage, read_json_lines, read_object

STAGES = """
stages:
  - stage: data
    name: corpus
    sources: [{files: %(text)s}]
    operations: [{method: deduplicate}]
    validation: 0.1
    test: 0.1
  - {stage: tokenizer, corpus: corpus, vocab_size: 400}
  - stage: train
    name: model
    corpus: corpus
    tokenizer: tokenizer
    model: {family: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
      attention_dropout: 0.1}
    length: 32
    batch_rows: 4
    micro_rows: 2
    evaluate_every: 3
    evaluate_tokens: 500
    save_every: 2
    budget: {steps: 9}
    policies: [{method: ema}]
  - {stage: surgery, name: grown, checkpoint: model, surgeries: [{method: g_stack, growth: 2}]}
  - {stage: train, name: more, init: grown, corpus: corpus, length: 32, batch_rows: 4, workers: 2, save_every: 3,
    evaluate_tokens: 500, budget: {steps: 5}}
  - {stage: evaluate, checkpoint: more, corpus: corpus, split: validation, max_documents: 4, compressors: false}
  - {stage: decode, checkpoint: more, prompts: ["def "], max_new_tokens: 4}
"""
MORE = """
  - {stage: train, name: onward, init: more, corpus: corpus, length: 32, batch_rows: 4, save_every: 2,
    evaluate_tokens: 500, budget: {steps: 3}}
  - {stage: evaluate, name: again, checkpoint: more, corpus: corpus, split: test, max_documents: 4, compressors: false}
"""
WRITES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod", "shutil.rmtree")


@dataclass(frozen=True)
class Ended:
    """How a run has ended: its exit status (that of a kill is negative), what it said, its events and seconds."""

    status: int
    text: str
    events: int
    seconds: float


class Warm:
    """The warm process, and runs in forks of it."""

    def __init__(self, desk: Path) -> None:
        desk.mkdir(parents=True, exist_ok=True)
        self.log = desk / "said.txt"
        environment = os.environ | {"TMPDIR": str(desk), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def run(self, *arguments: object, at: int = 0, after: float = 0.0, prelude: str = "") -> Ended:
        """`pretrain ARGUMENTS`, killed before its event number `at` or `after` so many seconds, if not 0.

        An event is a call that changes files. `prelude` is Python that the fork runs first.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.log.unlink(missing_ok=True)
        job = {
            "arguments": [str(a) for a in arguments],
            "log": str(self.log),
            "at": at,
            "after": after,
            "prelude": prelude,
        }
        print(json.dumps(job), file=self.process.stdin, flush=True)
        status = int(self.process.stdout.readline())
        text, _, counted = self.log.read_text(encoding="utf-8", errors="replace").partition("\n#counted ")
        events, seconds = counted.split() or ("0", "0")
        return Ended(status, text, int(events), float(seconds))


def serve() -> None:
    """The warm process: a fork for each line, whose status is answered."""
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    import pretrain.engine
    import pretrain.report.page
    import pretrain.training.loop  # noqa: F401
    from pretrain.stages import stage_classes

    stage_classes()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            run_forked(job)
        if job["after"]:
            timer = threading.Timer(job["after"], os.kill, (child, signal.SIGKILL))
            timer.start()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if job["after"]:
            timer.cancel()
        print(status, flush=True)


def run_forked(job: dict[str, Any]) -> None:
    """Run the command line, and leave with its status; what it says goes into a file, and its events' number."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.argv[0], events, status, begun = "pretrain", 0, 1, time.perf_counter()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal events
        if event in WRITES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            events += 1
            if events == job["at"]:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        exec(job["prelude"], {})
        sys.addaudithook(hook)
        from pretrain.cli import app

        app(job["arguments"])
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os.write(2, f"\n#counted {events} {time.perf_counter() - begun}".encode())
        os._exit(status)


# What a run leaves


def outcome(run: Path) -> dict[str, Any]:
    """All that a run has made, by name, as it must be the same however it came to be: corpora, weights, measures."""
    made: dict[str, Any] = {}
    for stage in sorted(path for path in run.iterdir() if path.is_symlink()):
        for path in (
            sorted(stage.glob("corpus/**/*.*"))
            + sorted(stage.glob("*/*.safetensors"))
            + sorted(stage.glob("*/tokenizer.json"))
        ):
            if path.name != SUMS:  # which vouches for the rest, and is no part of it
                made[str(path.relative_to(run))] = path.read_bytes()
        if (stage / "log.jsonl").exists():
            rows = read_json_lines(stage / "log.jsonl")
            made[f"{stage.name}/log"] = [[row.get(n) for n in ("event", "step", "loss", "metrics")] for row in rows]
        for name, known in (("evaluation", ("metrics", "domains")), ("samples", ("samples",))):
            if (stage / f"{name}.json").exists():
                made[f"{stage.name}/{name}"] = _told(stage / f"{name}.json", known)
    return made


def _told(path: Path, known: tuple[str, ...]) -> object:
    """What of a file for people must be the same, without what it took; None of what is no JSON object."""
    try:
        values = read_object(path)
    except PretrainError:
        return None
    rows = values.get("samples")
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        values["samples"] = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    return [values.get(name) for name in known]


def differing(expected: dict[str, Any], made: dict[str, Any]) -> list[str]:
    """The names of what differs or is not there."""
    return [name for name in expected if made.get(name) != expected[name]]


def left_over(run: Path) -> list[str]:
    """What killed processes have left of what they were writing."""
    return sorted(str(path.relative_to(run)) for path in run.rglob(".tmp-*"))


# Kills


@dataclass(frozen=True)
class Small:
    """The small recipe on a folder of texts, the same with stages that read what those before have left, and a whole
    run of it that nothing has disturbed."""

    warm: Warm
    folder: Path
    recipe: Path
    longer: Path
    events: int
    seconds: float
    first: dict[str, Any]  # the outcome of the recipe, undisturbed
    last: dict[str, Any]  # that of the longer one
    other: Path  # a run of the recipe on half of the texts with another seed, whose folders are whole and another's

    @classmethod
    def made(cls, warm: Warm, folder: Path, texts: Path) -> Small:
        """Write the recipes and make the undisturbed run."""
        (folder / "recipe.yaml").write_text(STAGES % {"text": texts})
        (folder / "longer.yaml").write_text(STAGES % {"text": texts} + MORE)
        shutil.rmtree(folder / "whole", ignore_errors=True)
        run = warm.run("run", folder / "recipe.yaml", "--output", folder / "whole")
        first = outcome(folder / "whole")
        rest = warm.run("run", folder / "longer.yaml", "--output", folder / "whole")
        assert run.status == rest.status == 0, run.text + rest.text
        shutil.rmtree(folder / "other", ignore_errors=True)
        half = shutil.copytree(texts, folder / "half", dirs_exist_ok=True)
        for path in sorted(half.iterdir())[::2]:
            path.unlink()
        (folder / "other.yaml").write_text("seed: 7\n" + STAGES % {"text": half})
        assert warm.run("run", folder / "other.yaml", "--output", folder / "other").status == 0
        names = folder / "recipe.yaml", folder / "longer.yaml"
        last = outcome(folder / "whole")
        return cls(warm, folder, *names, run.events, run.seconds, first, last, folder / "other")

    def go_on(self, run: Path, **kill: float) -> Ended:
        """Go on with a run of the recipe, to its end or to the kill."""
        return self.warm.run("run", self.recipe, "--output", run, **kill)

    def moment(self, rng: random.Random) -> dict[str, Any]:
        """When to kill: before one of the calls that change files, or at any moment; soon, so that a run is killed often."""
        if rng.random() < 0.5:
            return {"at": rng.randrange(1, self.events // 2)}
        return {"after": rng.uniform(0.05, self.seconds / 2)}


def killed(small: Small, kills: int, seed: int, until: float = float("inf")) -> tuple[int, int]:
    """Kill runs so many times, go on with each to its end and compare it; how many kills, and how many runs, there were.

    No run is begun after the time `until`.
    """
    rng, done, runs = random.Random(seed), 0, 0
    while done < kills and time.monotonic() < until:
        run, history = small.folder / "killed", []
        shutil.rmtree(run, ignore_errors=True)
        status = -1
        while status:
            moment = small.moment(rng) if done < kills else {}
            ended = small.go_on(run, **moment)
            status = ended.status
            done += status != 0
            history.append(f"{moment}: {status}")
            assert status in (0, -signal.SIGKILL) and "Traceback" not in ended.text, f"{history}\n{ended.text}"
        assert differing(small.first, outcome(run)) == [], history
        assert left_over(run) == [], history
        runs += 1
    return done, runs


# Damage


def _flip(path: Path, rng: random.Random, _: list[Path]) -> Path:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return path


def _cut(path: Path, rng: random.Random, _: list[Path]) -> Path:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    return path


def _empty(path: Path, rng: random.Random, _: list[Path]) -> Path:
    path.write_bytes(b"")
    return path


def _delete(path: Path, rng: random.Random, _: list[Path]) -> Path:
    path.unlink()
    return path


def _swap(path: Path, rng: random.Random, others: list[Path]) -> Path:
    alike = [other for other in others if other.suffix == path.suffix and other.read_bytes() != path.read_bytes()]
    other = rng.choice(alike or [other for other in others if other != path])
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its), other.write_bytes(mine)
    return other


DAMAGES: dict[str, Callable[[Path, random.Random, list[Path]], Path]] = {  # which give the other file that they damage
    "one bit of": _flip,
    "the end of": _cut,
    "all of": _empty,
    "the place of": _swap,
    "the whole file": _delete,
}


def folders(run: Path) -> list[Path]:
    """The folders of a run that vouch for their files, states of trainings among them."""
    sums = [path for path in run.rglob("checksums*.json") if not any(p.is_symlink() for p in path.parents)]
    return sorted({path.parent for path in sums})


def replaced(run: Path, folder: Path, rng: random.Random, other: Path) -> Path | None:
    """Put another's in the place of a folder, whole and with its own checksums: of the other run, of another stage, of
    another step, split or length; None where there is none. Which it was."""
    alike = [path for path in folders(other) if _kind(other, path) == _kind(run, folder)]
    alike += [
        p for p in folders(run) if p != folder and (p.parent == folder.parent or _kind(run, p) == _kind(run, folder))
    ]
    alike = [path for path in alike if _bytes(path) != _bytes(folder)]
    if not alike:
        return None
    chosen = rng.choice(alike)
    shutil.rmtree(folder)
    shutil.copytree(chosen, folder, symlinks=True)
    return chosen


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def files(run: Path) -> list[Path]:
    """The files of a run in the order of their names; locks hold nothing."""
    found = [Path(folder) / name for folder, _, names in os.walk(run) for name in names]
    return sorted(
        path for path in found if path.is_file() and not path.is_symlink() and not path.name.endswith(".lock")
    )


def begun(small: Small, count: int) -> list[Path]:
    """Runs that were killed on their way, evenly spread over it, and one that has come to its end."""
    runs = [small.folder / f"begun-{number}" for number in range(count)]
    for number, run in enumerate(runs):
        shutil.rmtree(run, ignore_errors=True)
        small.go_on(run, at=(number + 1) * small.events // count if number + 1 < count else 0)
    return runs


def damaged(small: Small, bases: list[Path], seed: int) -> tuple[str, str]:
    """Damage one file of a run that was begun, and go on: what was damaged and what came of it, with an error in front
    where that is not what it should be."""
    rng, run = random.Random(seed), small.folder / "damaged"
    base = rng.choice(bases)
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(base, run, symlinks=True)
    if seed % 5 == 4 and (whole := folders(run)):
        kind = rng.choice(sorted({_kind(run, path) for path in whole}))
        folder = rng.choice([path for path in whole if _kind(run, path) == kind])
        if chosen := replaced(run, folder, rng, small.other):
            ended = small.warm.run("run", small.longer, "--output", run)
            case = f"{seed}: {folder.relative_to(run)} by {chosen.relative_to(small.folder)} ({base.name})"
            return case, _verdict(small, run, {folder}, ended)
    every = files(run)
    kinds = sorted({_kind(run, path) for path in every})
    kind = rng.choice(kinds)  # so that the many files of a kind do not hide the few of another
    path = rng.choice([p for p in every if _kind(run, p) == kind])
    how = rng.choice(sorted(DAMAGES) if path.stat().st_size else ["the whole file"])
    touched = {path, DAMAGES[how](path, rng, every)}
    ended = small.warm.run("run", small.longer, "--output", run)
    case = f"{seed}: {how} {', '.join(sorted(str(each.relative_to(run)) for each in touched))} ({base.name})"
    return case, _verdict(small, run, touched, ended)


def _kind(run: Path, path: Path) -> str:
    """What a file is, whatever stage and step it is of."""
    return re.sub(r"[0-9a-f]{6,}|\d+", "#", str(path.relative_to(run)))


def _only_told(name: str, run: Path, path: Path, named: list[str]) -> bool:
    """Whether it is the damaged file itself, of those that no stage reads: a log, or one that the run has named."""
    place, _, part = name.partition("/")
    if not (run / place).exists() or path.parent != (run / place).resolve():
        return False
    return part == "log" if path.stem == "log" else bool(named) and path.stem == part


def _verdict(small: Small, run: Path, touched: set[Path], ended: Ended) -> str:
    lines = [line for line in ended.text.splitlines() if line.startswith(("error:", "warning:"))]
    words = {word for path in touched for word in (path.name, path.parent.name)}
    named = [line for line in lines if any(word in line for word in words)]
    if "Traceback" in ended.text:
        return f"WRONG: traceback\n{ended.text}"
    if ended.status:
        last = ended.text.strip().splitlines()[-1]
        return f"error: {last}" if named and last.startswith("error:") else f"WRONG: not named\n{ended.text}"
    names = differing(small.last, outcome(run))
    names = [name for name in names if not any(_only_told(name, run, path, named) for path in touched)]
    # What nothing has read again is looked at when it is opened.
    unread = [
        name for name in names if any(damage(place) for place in list((run / name).parents)[:2] if place.exists())
    ]
    if set(names) - set(unread):
        return f"WRONG: {'' if named else 'silently '}other {names}\n{ended.text}"
    if left_over(run):
        return f"WRONG: left {left_over(run)}"
    return f"found when it is opened: {unread}" if unread else named[0] if named else "the same"


if __name__ == "__main__":
    serve()
