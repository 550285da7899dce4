"""What counts of words or characters say of labelled documents: the yardstick of a model that learnt from the same.

Counted are words and character n-grams, for a few models that are well kept elsewhere, of which the training documents
choose: the best by cross-validation on them alone. All of it takes seconds, since documents, letters, words and the
work of a fit are bounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import regex

from pretrain.corpus.sources import evenly

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix
    from sklearn.base import BaseEstimator

    from pretrain.corpus.sources import Document

MOST_DOCUMENTS, MOST_LETTERS, MOST_WORDS = 20_000, 4_000_000, 50_000  # that are counted
MOST_CHOOSING = 4000  # documents that the models are compared on
MOST_WORK = 5e7  # of a fit by linear regression: counts that are not 0, times classes
FOLDS = 3
LONGEST = 30  # letters of a word; of longer ones (sequences, formulas) pieces are counted
# Character n-grams: their lengths, the places that they are hashed to, and how many letters are read in all.
LENGTHS, PLACES, MOST_READ = (2, 5), 2**18, 1_000_000
# Scripts that put no spaces between words.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
WORD = regex.compile(rf"[{UNSPACED}]+|[^\W{UNSPACED}]+|[^\w\s]", regex.V1)
PIECES = regex.compile(rf"[{UNSPACED}]", regex.V1)
Counts: TypeAlias = "csr_matrix"  # documents, words or n-grams
Counted = Literal["words", "characters"]


class Model(NamedTuple):
    """What a report calls it, what it counts, and the model of `scikit-learn`."""

    words: str
    counts: Counted
    fitted: BaseEstimator


class Answers(NamedTuple):
    """What the best of the models answers, in order, and what it is in words."""

    values: list[str] | list[float]
    words: str


def words_of(text: str) -> list[str]:
    """The words and marks of a text in small letters; where nothing parts words, its characters and pairs of them."""
    words: list[str] = []
    for run in WORD.findall(text.lower()):
        if len(run) > LONGEST or PIECES.match(run):
            words += [*run, *map("".join, itertools.pairwise(run))]
        else:
            words.append(run)
    return words


def counted(document: Document, columns: Sequence[str], most: int) -> list[str]:
    """The words of a document's columns, at most so many letters of each; of a pair those of both texts besides."""
    each = [words_of(str(document[column])[:most]) for column in columns]
    if len(each) == 1:
        return each[0]
    marked = [f"{number} {word}" for number, words in enumerate(each) for word in words]
    both, either = set.intersection(*map(set, each)), set.union(*map(set, each))
    share = round(10 * len(both) / max(1, len(either)))
    return [*marked, *(f"both {word}" for word in both), f"shared {share}"]


def answers(
    learnt: Sequence[Document], asked: Sequence[Document], columns: Sequence[str], *, numbers: bool
) -> Answers | None:
    """What counts answer to the documents `asked`, after those `learnt` from; the last of `columns` is the label.

    Classes, or with `numbers` numbers; None where the documents have a single label or no words.
    """
    *texts, label = columns
    whole = [document for document in learnt if all(document.get(column) is not None for column in columns)]
    known = evenly(whole, MOST_DOCUMENTS)
    labels = np.array([float(d[label]) if numbers else str(d[label]) for d in known])
    if len(set(labels.tolist())) < 2:
        return None
    models = _models(numbers, pair=len(texts) > 1)
    try:
        counts = {kind: _count(kind, known, asked, texts) for kind in dict.fromkeys(each.counts for each in models)}
    except ValueError:  # no document holds a word
        return None
    width = 1 if numbers else len(set(labels.tolist()))
    fitting = [m for m in models if not _linear(m) or counts[m.counts][0].nnz * width <= MOST_WORK]
    best = _best(fitting or models[:1], {kind: pair[0] for kind, pair in counts.items()}, labels)
    first, second = counts[best.counts]
    answered = best.fitted.fit(first, labels).predict(second).tolist()
    return Answers([float(each) for each in answered] if numbers else [str(each) for each in answered], best.words)


def _models(numbers: bool, pair: bool) -> list[Model]:
    """Those that are tried, the cheapest first; character n-grams do not say what the texts of a pair share."""
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import Ridge, RidgeClassifier
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    def linear() -> BaseEstimator:
        return make_pipeline(TfidfTransformer(sublinear_tf=True), Ridge() if numbers else RidgeClassifier())

    bayes = [
        Model("naive Bayes on word counts", "words", MultinomialNB()),
        Model("little smoothed naive Bayes on word counts", "words", MultinomialNB(alpha=0.1)),
    ]
    ridge = [Model("ridge regression on word counts", "words", linear())]
    ngrams = [Model("ridge regression on character n-grams", "characters", linear())]
    return [*([] if numbers else bayes), *ridge, *([] if pair else ngrams)]


def _linear(model: Model) -> bool:
    return hasattr(model.fitted, "steps")


def _count(
    kind: Counted, known: Sequence[Document], asked: Sequence[Document], texts: Sequence[str]
) -> tuple[Counts, Counts]:
    """The counts of the documents that are learnt from and of those that are asked."""
    from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer

    number = len(known) + len(asked)
    if kind == "words":
        most = max(200, MOST_LETTERS // number)
        counter = CountVectorizer(analyzer=lambda words: words, max_features=MOST_WORDS)
        first = counter.fit_transform([counted(document, texts, most) for document in known])
        return first, counter.transform([counted(document, texts, most) for document in asked])
    most = max(100, MOST_READ // number)
    hashed = HashingVectorizer(
        analyzer="char_wb", ngram_range=LENGTHS, n_features=PLACES, alternate_sign=False, norm=None
    )
    sides = ([str(document[texts[0]])[:most] for document in documents] for documents in (known, asked))
    first, second = map(hashed.transform, sides)
    return first, second


def _best(models: Sequence[Model], counts: dict[Counted, Counts], labels: NDArray[np.generic]) -> Model:
    """The model with the best mean over folds of the training documents: the share that is right, or the error."""
    if len(models) == 1 or len(labels) < 2 * FOLDS:
        return models[0]
    rows = np.random.default_rng(0).permutation(len(labels))[:MOST_CHOOSING]
    folds = np.array_split(rows, FOLDS)

    def score(model: Model) -> float:
        return float(np.mean([_score(model, counts[model.counts], labels, fold, rows) for fold in folds]))

    return max(models, key=score)  # of equals the first


def _score(
    model: Model, counts: Counts, labels: NDArray[np.generic], fold: NDArray[np.int64], rows: NDArray[np.int64]
) -> float:
    """How well a model that has learnt from the other rows answers those of a fold; more is better."""
    from sklearn.base import clone

    others = np.setdiff1d(rows, fold)
    if len(set(labels[others].tolist())) < 2:
        return -np.inf
    answered = clone(model.fitted).fit(counts[others], labels[others]).predict(counts[fold])
    if labels.dtype.kind == "f":
        return -float(np.mean((answered - labels[fold]) ** 2))
    return float(np.mean(answered == labels[fold]))
