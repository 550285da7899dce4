"""`pretrain new` cuts a few long texts, so that something can be held out, and finds the separators of others."""

from __future__ import annotations

import pytest
import yaml
from documents_made import WORDS

from pretrain.corpus.sources import Files, Skipped, read
from pretrain.corpus.store import side
from pretrain.new.corpora import corpus
from pretrain.new.look import look


def stage(seen):
    (made,) = yaml.safe_load(corpus(seen, "pretrain", None))
    return made


def book(count):
    return "\n\n".join(f"{WORDS['en'] * (1 + n % 3)}Chapter {n}." for n in range(count))


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("chapters", [300, 40_000])
def test_of_a_book_pieces_are_held_out_on_both_sides(tmp_path, files, chapters):
    text = book(chapters)
    for n in range(files):
        (tmp_path / f"{n}.txt").write_text(f"Volume {n}.\n\n{text}")
    made = stage(look(str(tmp_path)))
    (source,) = made["sources"]
    assert source["pieces"] == min(20_000, max(1000, round(files * len(text) / 200 / 1000) * 1000))
    rows = [row["text"] for row in read(Files(str(tmp_path), pieces=source["pieces"]), Skipped())]
    sides = {side(row, made["validation"], made["test"]) for row in rows}
    assert sides == {"train", "validation", "test"}


def test_stories_that_a_separator_parts_are_documents(tmp_path):
    place = tmp_path / "stories.txt"
    place.write_text("<|endoftext|>\n".join(f"{WORDS['en']}It was {n} years ago.\n" for n in range(2000)))
    seen = look(str(place))
    made = stage(seen)
    assert made["sources"] == [{"files": str(place), "separator": "<|endoftext|>"}] and made["test"] >= 0.02
    assert seen.languages == ("English",) and seen.prompts and not any("endoftext" in line for line in seen.prompts)


@pytest.mark.parametrize("count", [1, 60])
def test_texts_that_are_enough_or_short_stay_whole(tmp_path, count):
    for n in range(count):
        (tmp_path / f"{n}.txt").write_text(WORDS["fr"] * (3 if count == 1 else 200) + f"{n}")
    seen = look(str(tmp_path))
    assert seen.cut is None and bool(seen.share) == (count > 1)
