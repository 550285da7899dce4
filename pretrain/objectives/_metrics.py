"""Metrics of predictions against references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


def classification(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`accuracy`, `macro_f1` over the classes of the references, and Matthews' correlation `matthews` (of one class 0).

    `majority` is the accuracy of always answering the commonest class.
    """
    from sklearn.metrics import f1_score, matthews_corrcoef

    classes = sorted(set(references))
    accuracy = float(np.mean([p == r for p, r in zip(predictions, references, strict=True)]))
    several = len({*references, *predictions}) > 1  # of one scikit-learn warns, and has no correlation either
    macro = f1_score(references, predictions, labels=classes, average="macro", zero_division=0)
    return {
        "accuracy": accuracy,
        "majority": majority(references),
        "macro_f1": float(macro),
        "matthews": float(matthews_corrcoef(references, predictions)) if several else 0.0,
    }


def majority(references: Sequence[str]) -> float:
    """The share of the commonest class: the accuracy of a classifier that has learnt nothing else."""
    return max(Counter(references).values(), default=0) / max(1, len(references))


def regression(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """`mse`, and the correlations `pearson` and `spearman` (0 where one side does not vary).

    `mse_of_mean` is the error of always answering the mean.
    """
    from scipy.stats import pearsonr, spearmanr

    p, r = np.asarray(predictions, float), np.asarray(references, float)
    varied = len(p) > 1 and np.ptp(p) > 0 and np.ptp(r) > 0  # a deviation is not 0 where the mean was rounded
    return {
        "mse": float(np.mean((p - r) ** 2)),
        "mse_of_mean": float(r.var()) if len(r) else 0.0,
        "pearson": float(pearsonr(p, r).statistic) if varied else 0.0,
        "spearman": float(spearmanr(p, r).statistic) if varied else 0.0,
    }


def log_error(predictions: Sequence[float], references: Sequence[float]) -> float:
    """The mean squared error of natural logarithms; a prediction that is not above 0 counts as the least number."""
    least = np.finfo(float).tiny
    p, r = np.asarray(predictions, float).clip(least), np.asarray(references, float).clip(least)
    return float(np.mean((np.log(p) - np.log(r)) ** 2))


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The `(type, start, end)` of a sequence's entities; an I- that follows no entity of its type begins one."""
    spans, start, kind = set(), 0, None
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind is not None and (mark != "I" or name != kind):
            spans.add((kind, start, place))
            kind = None
        if mark in ("B", "I") and kind is None and name:
            start, kind = place, name
    return spans


def tagging(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`accuracy` of words; where the tags are B-x, I-x and O, `precision`, `recall` and `f1` of whole entities too.

    `majority` is the accuracy of always answering the commonest tag.
    """
    pairs = [(p, r) for ps, rs in zip(predictions, references, strict=True) for p, r in zip(ps, rs, strict=True)]
    metrics = {"accuracy": float(np.mean([p == r for p, r in pairs])) if pairs else 0.0}
    metrics["majority"] = majority([r for _, r in pairs])
    if not all(r == "O" or r[:2] in ("B-", "I-") for _, r in pairs):
        return metrics
    predicted = [entities(tags) for tags in predictions]
    true = [entities(tags) for tags in references]
    hits = sum(len(p & r) for p, r in zip(predicted, true, strict=True))
    return metrics | _f1(hits, sum(map(len, predicted)), sum(map(len, true)))


def _f1(hits: int, predicted: int, true: int) -> dict[str, float]:
    precision, recall = hits / max(predicted, 1), hits / max(true, 1)
    return {"precision": precision, "recall": recall, "f1": 2 * hits / max(predicted + true, 1)}


def generation(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`exact_match`, and the mean F1 of shared words (`token_f1`) and of the longest common subsequence (`rouge_l`)."""
    exact: list[float] = []
    words: list[float] = []
    longest: list[float] = []
    for prediction, reference in zip(predictions, references, strict=True):
        predicted, true = prediction.split(), reference.split()
        exact.append(float(predicted == true))
        shared = sum((Counter(predicted) & Counter(true)).values())
        words.append(_f1(shared, len(predicted), len(true))["f1"] if predicted or true else 1.0)
        longest.append(_f1(_common(predicted, true), len(predicted), len(true))["f1"] if predicted or true else 1.0)
    names = ("exact_match", "token_f1", "rouge_l")
    columns: list[list[float]] = [exact, words, longest]
    return {name: float(np.mean(values)) for name, values in zip(names, columns, strict=True)}


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, 1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]
