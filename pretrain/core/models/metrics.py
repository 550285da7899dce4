"""Which way a metric is better: the one table that whatever compares models goes by."""

from __future__ import annotations

import re
from typing import Literal

from pretrain.core.errors import PretrainError

Direction = Literal["lower", "higher"]

HIGHER = (
    "accuracy", "acc", "acc_norm", "precision", "recall", "f1", "matthews", "pearson", "spearman", "exact_match",
    "bleu", "rouge_l", "mrr", "ndcg", "auroc", "tpr", "bartscore", "bartscore_f", "bartscore_reverse",
    "scbench_multi_turn", "scbench_multi_request", "h_score", "h_score_shrunk", "logme", "transrate", "gbc", "knn",
    "msc", "parc", "gv_utility", "gv_verified", "gv_gap", "logp",
    "majority", "naive_bayes", "accuracy_of_counts",
)  # fmt: skip
LOWER = (
    "loss", "perplexity", "bits_per_byte", "mse", "ece", "mce", "seconds", "flops", "kv_bytes", "activation_density",
    "intrinsic_d90", "mse_of_mean", "mse_of_counts",
)  # fmt: skip


def better(metric: str) -> Direction:
    """Whether a metric is better `lower` or `higher`.

    A name goes by its last words: `evaluation.probe_accuracy`, `loss/python`, `mrr@10`. One that is not in the table is
    an error that asks for the direction.
    """
    name = re.split(r"[/@]|\.\d+$", metric)[0].rpartition(".")[2]
    directions: dict[Direction, tuple[str, ...]] = {"lower": LOWER, "higher": HIGHER}
    for direction, words in directions.items():
        if any(name == word or name.endswith(f"_{word}") for word in words):
            return direction
    raise PretrainError(f"metric {metric!r}: it is not known which way it is better; accepted: better: lower or higher")
