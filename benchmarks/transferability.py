"""Which score of `transferability` ranks small checkpoints as fine-tuning them does?

    python benchmarks/transferability.py [--families llama bert] [--widths 64 192] [--tokens 5e4 1e6] [--layers 2]
        [--packages stdlib numpy scipy sklearn torch transformers] [--modules 400] [--functions 400] [--steps 60]
        [--rates 3e-4 1e-3 3e-3] [--seeds 2] [--components 0 48] [--output FOLDER]

After "How to Determine the Most Powerful Pre-trained Language Model without Brute Force Fine-tuning?"
(arXiv:2312.04775). Every family, width and number of pretraining tokens makes a checkpoint, on Python's standard
library (`causal_lm` or `masked_lm`, byte-level BPE of 2048 entries, rows of 128). The task: which package a documented
function of at most 400 characters is from; at most `--functions` a package and 5 a module, and those of a module are on
one side of the split. Scores are of the features of validation functions (`--components`: of their first principal
components, 0 for all). Fine-tuning: `classification`, `--steps` steps of 16 functions, at each of `--rates`; the rate
with the best mean validation accuracy over seeds is kept, and what is ranked is its mean test accuracy. Each score's
correlations with it over the checkpoints come with a 95% bootstrap over checkpoints. FLOPs of pretraining, weights and
the features' width stand beside the scores as yardsticks.
Everything is a recipe in `--output` (by default a temporary folder): run again with the same folder, finished stages
are not run twice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from pretrain import engine
from pretrain.core.checkpoint import load
from pretrain.corpus.sources import Functions, evenly, read
from pretrain.corpus.store import Corpus
from pretrain.recipe import check

LENGTH, TUNED_LENGTH = 128, 128
LONGEST, OF_A_MODULE = 400, 5  # characters of a function, functions
OBJECTIVES = {"llama": "causal_lm", "bert": "masked_lm"}
RATES = {"llama": 2e-3, "bert": 1e-3}  # of pretraining
Stages = list[dict[str, Any]]
Array = NDArray[np.float64]


def checkpoints(settings: argparse.Namespace) -> dict[str, tuple[str, int, float]]:
    """Family, width and tokens by the checkpoint's name."""
    every = product(settings.families, settings.widths, settings.tokens)
    return {f"{family}-{width}-{tokens:.0f}": (family, width, tokens) for family, width, tokens in every}


def write_task(settings: argparse.Namespace, path: Path) -> None:
    """Write the labelled functions; a file that says the same already is left as it is, so that it stays unchanged."""
    packages: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for document in read(Functions(tuple(settings.packages), settings.modules, LONGEST)):
        packages.setdefault(document["domain"], {}).setdefault(document["group"], []).append(document)
    chosen: list[dict[str, Any]] = []
    for groups in packages.values():
        some = [document for group in groups.values() for document in evenly(group, OF_A_MODULE)]
        chosen += evenly(some, settings.functions)
    rows = [{name: document[name] for name in ("text", "domain", "id", "group")} for document in chosen]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def tuned(name: str, rate: float, seed: int) -> str:
    """The name of a fine-tuning stage."""
    return f"{name}-tuned-{rate:g}-{seed}".replace(".", "_")


def pretrained(settings: argparse.Namespace, name: str, family: str, width: int, tokens: float) -> dict[str, Any]:
    """The stage that makes a checkpoint."""
    model = {
        "family": family, "hidden_size": width, "num_hidden_layers": settings.layers,
        "intermediate_size": 4 * width if family == "bert" else width * 8 // 3,
        "num_attention_heads": max(1, width // 32), "max_position_embeddings": LENGTH,
    }  # fmt: skip
    return {
        "name": name, "stage": "train", "corpus": "text", "tokenizer": "tokenizer", "model": model, "length": LENGTH,
        "objective": OBJECTIVES[family], "batch_rows": 16, "optimizer": {"method": "adamw", "lr": RATES[family]},
        "schedule": {"method": "cosine"}, "budget": {"tokens": tokens}, "save_every": 0, "seed": 0,
        "evaluate_tokens": 10_000,
    }  # fmt: skip


def scored(settings: argparse.Namespace, name: str) -> Stages:
    """The stages that score a checkpoint."""
    shared = {"stage": "evaluate", "checkpoint": name, "corpus": "task", "compressors": False, "seed": 0}
    shared |= {"split": "validation", "max_documents": settings.documents}
    score = {"method": "transferability", "label": "domain", "length": TUNED_LENGTH, "groups": 2, "smallest": 2}
    return [
        shared | {"name": f"{name}-scores-{count}", "evaluations": [score | {"components": count}]}
        for count in settings.components
    ]


def finetuned(settings: argparse.Namespace, name: str) -> Stages:
    """The stages that fine-tune a checkpoint and test what became of it."""
    objective = {"method": "classification", "label": "domain"}
    stages: Stages = []
    for rate, seed in product(settings.rates, range(settings.seeds)):
        stage = tuned(name, rate, seed)
        stages.append(
            {
                "name": stage, "stage": "train", "corpus": "task", "init": name, "length": TUNED_LENGTH,
                "objective": objective, "batch_rows": 16, "optimizer": {"method": "adamw", "lr": rate},
                "schedule": {"method": "linear", "warmup": 0.1}, "budget": {"steps": settings.steps}, "save_every": 0,
                "evaluate_tokens": settings.documents * TUNED_LENGTH, "seed": seed,
            }
        )  # fmt: skip
        stages.append(
            {
                "name": f"{stage}-test", "stage": "evaluate", "checkpoint": stage, "corpus": "task", "seed": 0,
                "compressors": False, "max_documents": settings.documents,
                "evaluations": [{"method": "task", "objective": objective, "resamples": 0}],
            }
        )  # fmt: skip
    return stages


def recipe(settings: argparse.Namespace, task: Path) -> dict[str, Any]:
    """All checkpoints, each followed by its scores and fine-tunings."""
    stages: Stages = [
        {"name": "text", "stage": "data", "sources": [{"stdlib": True, "limit": settings.text}], "seed": 0},
        {
            "name": "task", "stage": "data", "sources": [{"files": str(task)}], "validation": 0.25, "test": 0.25,
            "near_duplicates": None, "seed": 0,
        },
        {
            "name": "tokenizer", "stage": "tokenizer", "corpus": "text", "vocab_size": settings.vocabulary,
            "mask": True, "seed": 0,
        },
    ]  # fmt: skip
    for name, (family, width, tokens) in checkpoints(settings).items():
        stages += [pretrained(settings, name, family, width, tokens)]
        stages += scored(settings, name) + finetuned(settings, name)
    return {"name": "transferability", "seed": 0, "stages": stages}


def accuracies(settings: argparse.Namespace, stages: dict[str, Any], name: str) -> tuple[float, list[float]]:
    """The learning rate that is best on validation documents, and each seed's accuracy with it on test documents."""
    seeds = range(settings.seeds)

    def validation(rate: float) -> float:
        return statistics.mean(stages[tuned(name, rate, seed)]["metrics"]["accuracy"] for seed in seeds)

    best = max(settings.rates, key=validation)
    return best, [stages[f"{tuned(name, best, seed)}-test"]["metrics"]["accuracy"] for seed in seeds]


def ranks(x_DK: Array) -> Array:
    """What Spearman's correlation is the cosine of."""
    ranks_DK = rankdata(x_DK, axis=1)
    return ranks_DK - ranks_DK.mean(1, keepdims=True)


def orders(x_DK: Array) -> Array:
    """What Kendall's correlation (tau-b) is the cosine of."""
    return np.sign(x_DK[:, :, None] - x_DK[:, None]).reshape(len(x_DK), -1)


def cosine(one: Array, other: Array) -> Array:
    """Of each row of both; not a number where one is zero."""
    with np.errstate(invalid="ignore"):
        return (one * other).sum(1) / np.sqrt((one**2).sum(1) * (other**2).sum(1))


def correlation(kind: Callable[[Array], Array], one_K: Array, other_K: Array, draws: int) -> str:
    """The correlation with its bootstrap interval; draws in which one side is constant have none and are left out."""
    chosen_DK = np.random.default_rng(0).integers(len(one_K), size=(draws, len(one_K)))
    whole = cosine(kind(one_K[None]), kind(other_K[None]))[0]
    drawn_D = cosine(kind(one_K[chosen_DK]), kind(other_K[chosen_DK]))
    finite = drawn_D[np.isfinite(drawn_D)]
    if not len(finite) or not np.isfinite(whole):
        return "none"
    low, high = np.quantile(finite, [0.025, 0.975])
    return f"{whole:+.2f} [{low:+.2f}, {high:+.2f}]"


def scores_of(settings: argparse.Namespace, stages: dict[str, Any], name: str, folder: Path) -> dict[str, float]:
    """A checkpoint's scores and yardsticks by name."""
    found: dict[str, float] = {}
    for count in settings.components:
        metrics = stages[f"{name}-scores-{count}"]["metrics"]
        suffix = f" of {count} components" if count else ""
        own = {n: v for n, v in metrics.items() if not n.startswith("transferability_") and "/" not in n}
        found |= {n + suffix: v for n, v in own.items()}
    model, _ = load(folder / name / "checkpoint")
    found |= {"FLOPs of pretraining": stages[name]["flops"], "weights": sum(p.numel() for p in model.parameters())}
    return found | {"width": model.config.hidden_size}


def report(settings: argparse.Namespace, stages: dict[str, Any], folder: Path) -> None:
    """Print the checkpoints, then the correlations."""
    names = list(checkpoints(settings))
    print("| checkpoint | rate | test accuracy | h_score | logme |")
    print("|---|---|---|---|---|")
    reached, table = [], []
    for name in names:
        rate, values = accuracies(settings, stages, name)
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        reached.append(statistics.mean(values))
        table.append(scores_of(settings, stages, name, folder))
        metrics = stages[f"{name}-scores-{settings.components[0]}"]["metrics"]
        print(
            f"| {name} | {rate:g} | {reached[-1]:.4f}{spread} | {metrics['h_score']:.4f} | {metrics['logme']:.4f} |",
        )
    print("\n| score | Spearman | Kendall |\n|---|---|---|")
    for score in table[0]:
        values_K = np.array([row[score] for row in table], float)
        told = [correlation(kind, values_K, np.array(reached), settings.draws) for kind in (ranks, orders)]
        print(f"| {score} | {' | '.join(told)} |")
    domains = [d["domain"] for d in Corpus(folder / "task" / "corpus").sample("test", settings.documents, ("domain",))]
    common = max(map(domains.count, domains)) / len(domains)
    print(f"\n{len(domains)} test functions, {common:.4f} of them of the commonest package")
    spent = {"scoring": 0.0, "fine-tuning": 0.0, "pretraining": 0.0}
    for stage, record in stages.items():
        if any(stage.startswith(name) for name in names):
            kind = "scoring" if "-scores-" in stage else "fine-tuning" if "-tuned-" in stage else "pretraining"
            spent[kind] += record["seconds"]
    print("seconds: " + ", ".join(f"{kind} {seconds:.0f}" for kind, seconds in spent.items()))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=sorted(OBJECTIVES), default=["llama", "bert"])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 192])
    parser.add_argument("--tokens", type=float, nargs="+", default=[5e4, 1e6])
    parser.add_argument("--layers", type=int, default=2)
    packages = ["stdlib", "numpy", "scipy", "sklearn", "torch", "transformers"]
    parser.add_argument("--packages", nargs="+", default=packages)
    parser.add_argument("--modules", type=int, default=400, help="of each package")
    parser.add_argument("--functions", type=int, default=400, help="at most, of each package")
    parser.add_argument("--text", type=int, default=400, help="modules of the standard library to pretrain on")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=600, help="at most, of validation and of test")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--components", type=int, nargs="+", default=[0, 48])
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--output", type=Path)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        output = settings.output or Path(temporary)
        task = (output / "task.jsonl").resolve()
        write_task(settings, task)
        made = check(recipe(settings, task), None, output=output / "run")
        stages = engine.run(made, store=output / "stages", report=False).stages
        report(settings, stages, output / "run")


if __name__ == "__main__":
    main()
