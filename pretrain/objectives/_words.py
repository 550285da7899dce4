"""Which of a text's tokens stand for its words."""

from __future__ import annotations

from collections.abc import Sequence


def words_of_characters(text: str, words: Sequence[str] | None = None) -> list[int]:
    """For each character the number (from 1) of the word that it is of, else 0; a `ValueError` of one not there.

    Words are what white space parts, or those given, in the order in which they stand in the text.
    """
    number_C, place = [0] * len(text), 0
    for number, word in enumerate(text.split() if words is None else words, 1):
        begin = text.index(word, place)
        place = begin + len(word)
        number_C[begin:place] = [number] * len(word)
    return number_C


def words_of_tokens(number_C: Sequence[int], spans: Sequence[tuple[int, int]], token: str = "first") -> list[int]:
    """For each token the number of the word that it is the first (or last) of, else 0."""
    words = [next((word for word in number_C[start:end] if word), 0) for start, end in spans]
    places = {word: place for place, word in (enumerate(words) if token == "last" else reversed([*enumerate(words)]))}
    return [word if places[word] == place else 0 for place, word in enumerate(words)]
