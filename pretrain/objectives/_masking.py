"""Choosing what to hide: words or tokens at a rate, spans of T5 and UL2. All `numpy`, all by the given generator."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.models.cross_entropy import IGNORE
from pretrain.objectives._fill import fill


def check_shares(name: str, masked: float, random: float) -> None:
    """Refuse shares of the chosen tokens, those that are masked and those that are swapped, of more than all."""
    if masked + random > 1 + 1e-9:  # 0.7 + 0.3 need not be 1
        accepted = "shares that come to 1 at most"
        raise PretrainError(f"{name}: masked {masked}, random {random}: accepted: {accepted}", place=("random",))


def choose_words(
    tokens_L: NDArray[np.int64], rate: float, vocabulary: Vocabulary, rng: np.random.Generator, whole_words: bool
) -> NDArray[np.bool_]:
    """Which tokens to hide: about `rate` of those that are not special, as whole words or each for itself.

    Words are taken in random order until the number is reached; as in BERT, one that would pass it is left out and the
    next is tried. Where not even the shortest fits, the first is taken all the same.
    """
    allowed_L = ~vocabulary.special_V[tokens_L]
    wanted = round(rate * int(allowed_L.sum()))
    chosen_L = np.zeros(len(tokens_L), dtype=bool)
    if wanted == 0:
        return chosen_L
    if not whole_words:
        chosen_L[rng.choice(np.flatnonzero(allowed_L), wanted, replace=False)] = True
        return chosen_L
    begins_L = vocabulary.starts_word_V[tokens_L] | ~allowed_L
    begins_L[1:] |= ~allowed_L[:-1]
    begins_L[0] = True
    word_L = np.cumsum(begins_L) - 1
    words = np.unique(word_L[allowed_L])
    size_W = np.bincount(word_L[allowed_L], minlength=word_L[-1] + 1)
    order = rng.permutation(words)
    chosen = order[fill(size_W[order].tolist(), wanted)]
    if not len(chosen):
        chosen = order[:1]
    return np.isin(word_L, chosen) & allowed_L


def hide(
    original_L: NDArray[np.int64], rate: float, masked: float, random: float, vocabulary: Vocabulary,
    rng: np.random.Generator, whole_words: bool = False,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """BERT's corruption of a row: its tokens with about `rate` of them hidden, and the targets, -100 elsewhere."""
    assert vocabulary.mask is not None, "whoever hides tokens has asked for a mask"
    tokens_L, target_L = original_L.copy(), np.full(len(original_L), IGNORE)
    chosen = np.flatnonzero(choose_words(original_L, rate, vocabulary, rng, whole_words))
    target_L[chosen] = original_L[chosen]
    draw = rng.random(len(chosen))
    tokens_L[chosen[draw < masked]] = vocabulary.mask
    swapped = chosen[(draw >= masked) & (draw < masked + random)]
    tokens_L[swapped] = rng.choice(vocabulary.ordinary, len(swapped))
    return tokens_L, target_L


def choose_spans(
    length: int, rate: float, mean_span: float, rng: np.random.Generator, most: int | None = None
) -> NDArray[np.bool_]:
    """T5's random spans: about `rate` of `length` tokens, in spans of `mean_span` on average, never at the very start.

    Hidden and shown tokens are each cut into as many random non-empty parts as there are spans, and the parts
    alternate, beginning with a shown one. There are at most `most` spans: where the mean would ask for more of them,
    they are longer, so that `rate` of the text is hidden, and all over it.
    """
    hidden_L = np.zeros(length, dtype=bool)
    noise = min(max(round(length * rate), 1), length - 1)
    if length < 2:
        return hidden_L
    spans = min(max(round(noise / mean_span), 1), noise, length - noise, noise if most is None else most)
    position = 0
    for shown, hidden in zip(_parts(length - noise, spans, rng), _parts(noise, spans, rng), strict=True):
        hidden_L[position + shown : position + shown + hidden] = True
        position += shown + hidden
    return hidden_L


def _parts(total: int, count: int, rng: np.random.Generator) -> list[int]:
    """`total` cut into `count` random parts of at least one."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1 if count > 1 else np.zeros(0, np.int64)
    return np.diff(np.concatenate([[0], cuts, [total]])).tolist()


def corrupt(
    tokens_L: NDArray[np.int64], hidden_L: NDArray[np.bool_], sentinels: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Input and target of span corruption: each hidden span becomes a sentinel; the target is sentinel, span, … .

    The last sentinel that is needed ends the target, as in T5. There must be fewer spans than sentinels.
    """
    begins_L = hidden_L & ~np.concatenate([[False], hidden_L[:-1]])
    number_L = np.cumsum(begins_L) - 1
    used = int(begins_L.sum())
    if used >= len(sentinels):
        raise PretrainError(f"corrupt: {used} spans: accepted: fewer than the {len(sentinels)} sentinels")
    marks = np.asarray(sentinels, np.int64)
    shown_L = np.where(begins_L, marks[np.clip(number_L, 0, len(marks) - 1)], tokens_L)[~hidden_L | begins_L]
    starts = np.flatnonzero(begins_L)
    kept_L = np.flatnonzero(hidden_L)
    target = np.insert(tokens_L[kept_L], np.searchsorted(kept_L, starts), marks[:used])
    return shown_L, np.append(target, marks[used])
