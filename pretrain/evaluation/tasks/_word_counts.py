"""What counts of words alone say of labelled documents: the yardstick of a model that learnt from the same ones.

Classes: multinomial naive Bayes; numbers: ridge regression on tf-idf. Both take seconds, since documents, letters and
words are bounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import regex

from pretrain.corpus.sources import evenly

if TYPE_CHECKING:
    from pretrain.corpus.sources import Document

MOST_DOCUMENTS, MOST_LETTERS, MOST_WORDS = 20_000, 4_000_000, 50_000  # that are counted
LONGEST = 30  # letters of a word; of longer ones (sequences, formulas) pieces are counted
# Scripts that put no spaces between words.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
WORD = regex.compile(rf"[{UNSPACED}]+|[^\W{UNSPACED}]+|[^\w\s]", regex.V1)
PIECES = regex.compile(rf"[{UNSPACED}]", regex.V1)


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
) -> list[str] | list[float] | None:
    """What word counts answer to the documents `asked`, after those `learnt` from; the last of `columns` is the label.

    A list of classes, or with `numbers` of numbers, in order; None where the documents have a single label or no words.
    """
    from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
    from sklearn.linear_model import Ridge
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    *texts, label = columns
    whole = [document for document in learnt if all(document.get(column) is not None for column in columns)]
    known = evenly(whole, MOST_DOCUMENTS)
    labels = [float(d[label]) if numbers else str(d[label]) for d in known]
    if len(set(labels)) < 2:
        return None
    most = max(200, MOST_LETTERS // (len(known) + len(asked)))
    counter = CountVectorizer(analyzer=lambda words: words, max_features=MOST_WORDS)
    fitted = make_pipeline(TfidfTransformer(sublinear_tf=True), Ridge()) if numbers else MultinomialNB()
    try:
        counts_DW = counter.fit_transform([counted(document, texts, most) for document in known])
    except ValueError:  # no document holds a word
        return None
    fitted.fit(counts_DW, labels)
    answered = fitted.predict(counter.transform([counted(d, texts, most) for d in asked])).tolist()
    return [float(each) for each in answered] if numbers else [str(each) for each in answered]
