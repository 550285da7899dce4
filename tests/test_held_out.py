"""Training documents that are copies of held-out ones: against the comparison of all with all, and shared out."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from pretrain.core.system.processes import usable_cores
from pretrain.corpus.copies.held_out import LOT, Nearest, here, near_held_out
from pretrain.corpus.copies.minhash import PERMUTATIONS, band_keys, bands, copies, signatures
from pretrain.corpus.store import Corpus, write_corpus
from pretrain.data._workers import Shard, Workers
from pretrain.data.deduplication import _near

WORDS = [f"word{number}" for number in range(400)]


def document(rng, changed=0, of=None):
    words = list(of) if of is not None else list(rng.choice(WORDS, 80))
    for place in rng.choice(80, changed, replace=False):
        words[place] = str(rng.choice(WORDS))
    return words


def texts(count, seed):
    """Documents, and as many that are more or less like them."""
    rng = np.random.default_rng(seed)
    first = [document(rng) for _ in range(count)]
    second = [document(rng, int(rng.integers(0, 8)), of) for of in first]
    return [" ".join(each) for each in first], [" ".join(each) for each in second]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_the_first_that_is_alike_is_that_of_a_comparison_of_all_with_all_that_share_a_band(threshold):
    held, others = texts(150, seed=1)
    held += held[:20]  # the first of them is told
    others += ["", "of none of them"]
    held_NP, other_MP = signatures(held), signatures(others)
    shape = (-1, bands(threshold), PERMUTATIONS // bands(threshold))
    shared_MNB = (held_NP.reshape(shape)[None] == other_MP.reshape(shape)[:, None]).all(3)
    alike_MN = ((held_NP[None] == other_MP[:, None]).mean(2) >= threshold) & shared_MNB.any(2)
    expected_M = np.where(alike_MN.any(1), alike_MN.argmax(1), -1)
    assert Nearest(held_NP, threshold).first(other_MP).tolist() == expected_M.tolist()
    assert 10 < (expected_M >= 0).sum() < len(others)
    assert threshold > 0.9 or (alike_MN & ~shared_MNB[:, :, 0]).any(), "some are found by another band than the first"


def test_numbers_of_bands_are_the_same_where_all_rows_and_the_beginning_are():
    rows_NP = np.random.default_rng(0).integers(0, 2, (400, 8), dtype=np.uint32)
    begin_N = np.random.default_rng(1).integers(0, 2, 400).astype(np.uint64)
    key_NB = band_keys(rows_NP, 2, begin_N)
    for band in range(2):
        part = [(*row[4 * band : 4 * band + 4], begin) for row, begin in zip(rows_NP.tolist(), begin_N, strict=True)]
        assert len(set(zip(part, key_NB[:, band], strict=True))) == len(set(part)) == len(set(key_NB[:, band]))


def test_a_document_of_more_than_text_is_a_copy_where_its_content_is_the_same():
    held = [{"text": "one two three four five"}, {"text": "seen", "image": {"bytes": b"\x00"}}]
    training = [{"text": "seen", "image": {"bytes": b"\x01"}}, {"text": "one two three four five"}, *held[1:]]
    assert near_held_out(held, training, (2, 3), 0.8, here).tolist() == [-1, 0, 1]
    assert near_held_out([], training, (0, 3), 0.8, here).tolist() == [-1, -1, -1]
    assert near_held_out(held[1:], training, (1, 3), 0.8, here).tolist() == [-1, -1, 0]


def test_places_go_on_from_lot_to_lot():
    held, _ = texts(3, seed=2)
    training = [{"text": f"nothing alike {number}"} for number in range(LOT + 1)] + [{"text": held[2]}]
    found = near_held_out([{"text": text} for text in held], training, (3, len(training)), 0.8, here)
    assert np.flatnonzero(found >= 0).tolist() == [LOT + 1] and found[-1] == 2


def test_a_corpus_is_the_same_where_the_search_for_copies_is_shared_out(tmp_path):
    first, second = texts(300, seed=3)
    number = count()
    documents = [{"text": text, "domain": "d", "id": f"{next(number)}"} for text in (*first, *second)]
    written = {}
    with Workers(max(2, usable_cores()), start=-1.0) as workers:

        def each(work, lots, count):
            return (made for _, made in workers.each("copies", work, map(Shard, lots), count))

        for name, shared in (("here", None), ("there", each)):
            write_corpus(documents, folder := tmp_path / name, validation=0.2, test=0.2, each=shared)
            written[name] = {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.*"))}
    assert written["here"] == written["there"]
    assert Corpus(tmp_path / "here").info["removed"]["near"] > 10


def test_copies_found_in_files_are_those_found_in_memory_whichever_bands_they_share_with_whom():
    rng = np.random.default_rng(4)
    written = [document(rng) for _ in range(40)]
    rows = [(" ".join(document(rng, int(rng.integers(0, 12)), of)), "") for _ in range(12) for of in written]
    expected = [(place, copy[0]) for place, copy in enumerate(copies(rows, 0.6)) if copy]
    with _near.Signatures(0.6) as signed:
        for start in range(0, len(rows), 64):
            signed.add(*_near.signed(rows[start : start + 64], 0.6))
        assert [(place, what) for place, what, *_ in signed.copies()] == expected
    assert 40 < len(expected) < len(rows) - 80
