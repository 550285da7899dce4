"""Whether a change leaves training's arithmetic as it was: one small run at each of several revisions, bit against bit.

    python benchmarks/identical.py main HEAD              # the losses of all steps and the weights must be the same
    python benchmarks/identical.py 6463151 7b0f62d HEAD   # each with the one before it

Each revision runs from a work tree of its own, with this interpreter's libraries (reports before 34f4a93 want `plotly`
beside them): a decoder of two layers, 30 steps on the package's own source, seed 0. It says where the first loss
differs; the exit status is 1 where one does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = """
name: identical
stages:
  - {name: corpus, stage: data, sources: [{files: CORPUS}], validation: 0.1, test: 0.1}
  - {name: tokenizer, stage: tokenizer, corpus: corpus, vocab_size: 384}
  - name: model
    stage: train
    corpus: corpus
    tokenizer: tokenizer
    model:
      family: llama
      hidden_size: 32
      intermediate_size: 48
      num_hidden_layers: 2
      num_attention_heads: 2
    length: 64
    batch_rows: 8
    optimizer: {method: adamw, lr: 0.005}
    schedule: {method: cosine, warmup: 3}
    budget: {steps: 30}
"""


def main() -> None:
    """Run all revisions and compare each with the one before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revisions", nargs="+", help="two or more that git knows")
    revisions = parser.parse_args().revisions
    before: tuple[list[float], str] | None = None
    same = True
    with tempfile.TemporaryDirectory(prefix="identical-") as folder:
        corpus = Path(folder) / "corpus"  # of one revision for all
        subprocess.run(["git", "worktree", "add", "-q", "--detach", corpus, revisions[0]], cwd=ROOT, check=True)
        for number, revision in enumerate(revisions):
            losses, weights = run(revision, Path(folder) / str(number), corpus / "pretrain" / "**" / "*.py")
            line = f"{revision}: {len(losses)} steps, last loss {losses[-1]!r}, weights {weights}"
            if before is not None:
                other = [step for step, pair in enumerate(zip(before[0], losses, strict=True), 1) if pair[0] != pair[1]]
                same = same and not other and weights == before[1]
                line += f"; {len(other)} losses differ, the first after step {other[0]}" if other else "; the same"
            print(line, flush=True)
            before = losses, weights
        subprocess.run(["git", "worktree", "remove", "--force", corpus], cwd=ROOT, check=True)
    sys.exit(not same)


def run(revision: str, folder: Path, sources: Path) -> tuple[list[float], str]:
    """The losses of all steps, and the beginning of the digest of the weights."""
    tree, recipe = folder / "tree", folder / "recipe.yaml"
    subprocess.run(["git", "worktree", "add", "-q", "--detach", tree, revision], cwd=ROOT, check=True)
    try:
        recipe.write_text(RECIPE.replace("CORPUS", str(sources)), encoding="utf-8")
        command = [sys.executable, "-m", "pretrain", "run", str(recipe), "--output", str(folder / "run")]
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{revision}: {done.stderr[-1000:]}")
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    rows = map(json.loads, (folder / "run" / "model" / "log.jsonl").read_text(encoding="utf-8").splitlines())
    weights = (folder / "run" / "model" / "checkpoint" / "model.safetensors").read_bytes()
    return [row["loss"] for row in rows if row["event"] == "step"], hashlib.sha256(weights).hexdigest()[:12]


if __name__ == "__main__":
    main()
