"""Leaving a model early, on held-out text: the softmax cascade and FlexiDepth, against what costs as much.

    python benchmarks/early_exit.py --checkpoint FOLDER --corpus FOLDER [--drops 0.005 0.01 0.02] [--alphas 0.001 0.03]
        [--steps 150] [--rows 64] [--texts 16] [--rules paper bound] [--output FOLDER]

Documents are cut into pieces of `--length` tokens, and pieces taken evenly from each split. The cascade reads `--texts`
test pieces token by token, each true token given whatever was predicted, with the exits after a third and two thirds of
the blocks; its thresholds are those that `--rows` validation pieces give for a drop of next-token accuracy. "plain"
exits are the model's norm and head alone, "trained" ones the surgery `exit_heads` on `--rows` training pieces.
"expected" is the drop on the validation pieces, read whole; "drop" that of the test pieces against all blocks, with the
standard error of paired tokens; "MACs" the share that the cascade itself counts.

FlexiDepth's routers and adapters are trained for `--steps` steps at each alpha. Its loss on `--rows` test pieces stands
beside that of the whole model and of the first blocks alone, as many as it takes on average (rounded): "static" with
the model's norm and head as they are, "with a map" after the map that `exit_heads` trains there on the same pieces as
above. Everything trained by a recipe is in `--output` (by default a temporary folder) and is not trained twice.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from pretrain import engine
from pretrain.core.batch import Batch
from pretrain.core.checkpoint import load
from pretrain.core.encoding import encode
from pretrain.core.hardware import pick_device
from pretrain.core.models.exits import HEADS, exit_logits, states_of_text
from pretrain.core.models.families import at, base, blocks, family
from pretrain.corpus.sources import evenly
from pretrain.corpus.store import Corpus
from pretrain.decoding.ensembles._cascade import Cascade, cascaded, measure
from pretrain.decoding.ensembles.softmax_cascade import NEVER, SoftmaxCascade
from pretrain.recipe import check
from pretrain.surgery import Inputs
from pretrain.surgery.architecture.exit_heads import ExitHeads
from pretrain.surgery.architecture.flexi_depth import depths

BATCH = 8


def pieces(settings: argparse.Namespace, tokenizer: Any, split: str) -> torch.Tensor:
    """At most `--rows` pieces of a split's documents, `rows_RL`."""
    length, texts = settings.length, [d["text"] for d in Corpus(settings.corpus).sample(split, 4 * settings.rows)]
    found = [ids[n : n + length] for ids in encode(tokenizer, texts) for n in range(0, len(ids) - length + 1, length)]
    if not found:
        raise SystemExit(f"{split}: no document has {length} tokens; accepted: a smaller --length")
    return torch.stack([torch.from_numpy(ids) for ids in evenly(found, settings.rows)])


def batches(rows_RL: torch.Tensor) -> list[Batch]:
    """The pieces as surgeries are given text."""
    return [{"input_ids": ids_BL} for ids_BL in rows_RL.split(BATCH)]


@torch.no_grad()
def loss(model: Any, rows_RL: torch.Tensor, depth: int, *, mapped: bool = False) -> float:
    """The mean cross-entropy of the next token after `depth` blocks, or after the map that was trained there."""
    norm, total, count = at(base(model), family(model).final_norm or ""), 0.0, 0
    for (states_NE,), next_N in states_of_text(model, batches(rows_RL), (depth,)):
        logits_NV = exit_logits(norm, model.lm_head, getattr(model, HEADS) if mapped else None, states_NE, depth)
        total += float(cross_entropy(logits_NV.float(), next_N, reduction="sum"))
        count += len(next_N)
    return total / count


@torch.inference_mode()
def read(
    model: Any, rows_RL: torch.Tensor, exits: tuple[int, ...], thresholds: tuple[float, ...]
) -> tuple[torch.Tensor, float, list[float]]:
    """Token by token: whether each next token is predicted, `right_N`, the share of MACs, the share of each depth."""
    right, left, macs, full = [], [], 0, 0
    for ids_L in rows_RL.tolist():
        cascade = Cascade(model, len(ids_L), exits, thresholds)
        cascade.prefill(torch.tensor([ids_L[:1]], device=cascade.device))
        for token, following in pairwise(ids_L[1:]):
            logits_1V, depth = cascade.token(token)
            right.append(int(logits_1V.argmax()) == following)
            left.append(depth)
        macs, full = macs + cascade.trace.macs, full + cascade.trace.full
    shares = [left.count(depth) / len(left) for depth in (*exits, len(blocks(model)))]
    return torch.tensor(right), macs / full, shares


def cascade_table(settings: argparse.Namespace, models: dict[str, Any], rows: dict[str, torch.Tensor]) -> None:
    """What the cascade loses and spares, by rule, exits and allowed drop."""
    test_RL = torch.stack(evenly(list(rows["test"]), settings.texts))
    exits = SoftmaxCascade().depths(models["plain"])
    whole_N, most, _ = read(models["plain"], test_RL, exits, (NEVER,) * len(exits))
    _, correct_MN = measure(models["plain"], batches(test_RL), exits)
    direct_N = correct_MN[-1].view(len(test_RL), -1)[:, 1:].flatten()  # the first token is read before the cascade
    if int((direct_N != whole_N).sum()) > len(whole_N) // 1000:
        raise SystemExit("a cascade that never exits does not predict what the model does")
    print(f"Cascade: {len(test_RL)} test pieces, exits after {exits} of {len(blocks(models['plain']))} blocks")
    print(f"whole model: accuracy {whole_N.double().mean():.2%}; asking each exit in vain: MACs x {most:.3f}\n")
    print("| exits | rule | allowed | thresholds | expected | drop | MACs | tokens by exit |")
    print("|---|---|---|---|---|---|---|---|")
    for name, model in models.items():
        sure_MN, right_MN = measure(model, batches(rows["validation"]), exits)
        for rule in settings.rules:
            for drop in settings.drops:
                method = SoftmaxCascade(exits=exits)
                thresholds = method.calibrate(model, batches(rows["validation"]), drop, rule=rule)
                expected = float(right_MN[-1].double().mean()) - cascaded(sure_MN, right_MN, thresholds)[0]
                right_N, share, left = read(model, test_RL, exits, thresholds)
                lost_N = whole_N.double() - right_N.double()
                error = float(lost_N.std()) / len(lost_N) ** 0.5
                print(
                    f"| {name} | {rule} | {drop:.1%} | {' '.join(f'{t:.3f}' for t in thresholds)} | {expected:+.2%} "
                    f"| {lost_N.mean():+.2%} ± {error:.2%} | {share:.1%} | {' '.join(f'{s:.0%}' for s in left)} |",
                    flush=True,
                )


def flexible(settings: argparse.Namespace, output: Path) -> list[Path]:
    """A trained FlexiDepth checkpoint for each alpha."""
    stages = [
        {
            "name": f"alpha-{number}", "stage": "train", "init": settings.checkpoint, "corpus": settings.corpus,
            "surgeries": ["flexi_depth"], "objective": {"method": "flexi_depth_lm", "alpha": alpha},
            "length": settings.length, "batch_rows": settings.batch, "budget": {"steps": settings.steps},
            "optimizer": {"method": "adamw", "lr": settings.rate, "weight_decay": 0.0},
            "schedule": {"method": "cosine", "warmup": 0.03}, "evaluate_tokens": 1000, "save_every": 0,
        }
        for number, alpha in enumerate(settings.alphas)
    ]  # fmt: skip
    made = check({"name": "early-exit", "seed": 0, "stages": stages}, None, output=output / "run")
    engine.run(made, store=output / "stages", report=False)
    return [output / "run" / stage["name"] / "checkpoint" for stage in stages]


def flexible_table(
    settings: argparse.Namespace, used: Sequence[tuple[float, float]], models: dict[str, Any], test_RL: torch.Tensor
) -> None:
    """FlexiDepth's blocks and loss, and those of the first blocks alone."""
    layers = len(blocks(models["plain"]))
    whole = loss(models["plain"], test_RL, layers)
    print(f"\nFlexiDepth: {len(test_RL)} test pieces, {settings.steps} steps of {settings.batch} x {settings.length}")
    print("\n| model | blocks a token | loss | against the whole | static, blocks | static | with a map |")
    print("|---|---|---|---|---|---|---|")
    print(f"| whole | {layers} | {whole:.4f} | | | | |")
    for alpha, (mean, found) in zip(settings.alphas, used, strict=True):
        kept = round(mean)
        static = loss(models["plain"], test_RL, kept)
        mapped = whole if kept == layers else loss(models["trained"], test_RL, kept, mapped=True)
        print(
            f"| alpha {alpha:g} | {mean:.2f} | {found:.4f} | {found - whole:+.4f} "
            f"| {kept} | {static:.4f} ({static - whole:+.4f}) | {mapped:.4f} ({mapped - whole:+.4f}) |"
        )


def main() -> None:
    """Train, measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--drops", type=float, nargs="+", default=[0.005, 0.01, 0.02])
    parser.add_argument("--rules", nargs="+", default=["paper", "bound"], choices=["paper", "bound"])
    parser.add_argument("--alphas", type=float, nargs="+", default=[1e-3, 3e-2])
    parser.add_argument("--rate", type=float, default=3e-3)
    for name, value in {"steps": 150, "batch": 4, "length": 256, "rows": 64, "texts": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output", type=Path)
    settings = parser.parse_args()
    started = time.perf_counter()
    plain, tokenizer = load(settings.checkpoint, device=pick_device())
    if tokenizer is None:
        raise SystemExit(f"{settings.checkpoint}: the checkpoint has no tokenizer")
    rows = {split: pieces(settings, tokenizer, split) for split in ("train", "validation", "test")}
    used: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for folder in flexible(settings, settings.output or Path(temporary)):
            model = load(folder, device=pick_device())[0].eval()
            taken = [depths(model, ids_BL.to(model.device)).double().mean(1) for ids_BL in rows["test"].split(BATCH)]
            used.append((float(torch.cat(taken).mean()), loss(model, rows["test"], len(blocks(model)))))
    layers, exits = len(blocks(plain)), SoftmaxCascade().depths(plain)
    wanted = {round(mean) for mean, _ in used} - {layers} | set(exits)
    inputs = Inputs(tokenizer=tokenizer, batches=batches(rows["train"]))
    trained = ExitHeads(exits=tuple(sorted(wanted)))(load(settings.checkpoint, device=pick_device())[0], inputs)
    models = {"plain": plain.eval(), "trained": trained.eval()}
    cascade_table(settings, models, rows)
    flexible_table(settings, used, models, rows["test"])
    print("\nExit heads on training text: " + ", ".join(f"{k} {v:.3f}" for k, v in inputs.extra["metrics"].items()))
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
