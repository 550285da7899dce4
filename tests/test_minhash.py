"""Near-duplicates: found at any threshold and in any script, and only those."""

from __future__ import annotations

import random

import datasets
import pytest

from pretrain.corpus.copies.minhash import Index, bands, copies, shingles, signature, units
from pretrain.corpus.store import Corpus, write_corpus
from pretrain.data.deduplication.deduplicate import Deduplicate

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
RUNS, PAIRS = 300, 200
SCRIPTS = {"words": None, "han": (0x4E00, 0x9FFF), "kana": (0x3041, 0x30FF), "thai": (0x0E01, 0x0E2E)}


def passage(script: str, count: int, rng: random.Random) -> str:
    """So many words or characters at random."""
    if SCRIPTS[script] is None:
        return " ".join(f"w{rng.randrange(10**6)}" for _ in range(count))
    return "".join(chr(rng.randint(*SCRIPTS[script])) for _ in range(count))


def pair(script: str, alike: float, rng: random.Random) -> tuple[str, str]:
    """Two texts of `RUNS` runs each, `alike` of all of which they share: m of 2 RUNS - m."""
    shared = round(2 * RUNS * alike / (1 + alike))
    start = passage(script, shared + 4, rng) if shared else ""
    space = " " if script == "words" else ""
    first, second = (start + space + passage(script, RUNS - shared, rng) for _ in range(2))
    return first, second


def found(script: str, threshold: float, alike: float) -> float:
    """The share of such pairs that is found."""
    rng, count = random.Random(f"{script}{threshold}{alike}"), 0
    for _ in range(PAIRS):
        first, second = pair(script, alike, rng)
        index = Index(threshold)
        index.add(signature(first))
        count += index.has_near(signature(second))
    return count / PAIRS


@pytest.mark.parametrize("script", SCRIPTS)
def test_pairs_are_as_alike_as_they_are_made(script):
    for alike in (0.1, 0.5, 0.9):
        first, second = (set(shingles(text)) for text in pair(script, alike, random.Random(0)))
        assert len(first & second) / len(first | second) == pytest.approx(alike, abs=0.02)


@pytest.mark.parametrize("script", ["words", "han"])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_of_pairs_a_tenth_above_the_threshold_95_in_100_are_found(script, threshold):
    assert found(script, threshold, min(1.0, threshold + 0.1)) >= 0.95


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_of_pairs_well_below_the_threshold_hardly_one_is_found(threshold):
    # Four standard deviations of an estimate from 128 permutations are at most 4 · √(¼ / 128) = .18; .15 is 3.4 of them.
    assert found("words", threshold, threshold - 0.15) <= 0.02


def test_the_bands_follow_from_the_threshold():
    assert [bands(t) for t in (0.05, 0.2, 0.5, 0.8, 1.0)] == [128, 64, 32, 16, 1]


def test_characters_are_units_where_a_script_has_no_spaces():
    assert units("a short text") == ["a", "short", "text"]
    assert units("北京 is 首都。") == ["北", "京", "is", "首", "都", "。"]
    assert units("カタ\nかな 한국어 말") == ["カ", "タ", "か", "な", "한국어", "말"]
    assert units("ไทย ລາວ 𠀀𠀁") == [*"ไทย", *"ລາວ", *"𠀀𠀁"]


def test_short_texts_keep_the_order_of_their_words():
    texts = ["dog bites man", "man bites dog", "dog  bites man", "狗咬人", "人咬狗", "狗咬人"]
    kept = [copy is None for copy in copies([(text, "") for text in texts], 0.2)]
    assert kept == [True, True, False, True, True, False]


@pytest.mark.parametrize("script", ["han", "kana", "thai"])
def test_copies_without_spaces_are_removed_from_training_and_from_a_corpus(script, tmp_path):
    rng, texts = random.Random(0), []
    for _ in range(40):
        text = passage(script, 200, rng)
        texts += [text, text[:150] + passage(script, 1, rng) + text[150:]]
    assert Deduplicate()(datasets.Dataset.from_dict({"text": texts}))["text"] == texts[::2]
    rows = [{"text": text, "domain": "d", "id": str(number // 2)} for number, text in enumerate(texts)]
    write_corpus(rows, tmp_path / "c", validation=0.3, test=0.1)
    sides = {s: {d["id"] for d in Corpus(tmp_path / "c").documents(s)} for s in ("train", "validation", "test")}
    assert sides["train"] and not sides["train"] & (sides["validation"] | sides["test"])
