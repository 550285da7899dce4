"""A long text is many documents where a source says so: at its separator, or in pieces that end where a paragraph does."""

from __future__ import annotations

import pytest
from documents_made import pdf, put, zipped
from hypothesis import given
from hypothesis import strategies as st

from pretrain.core.errors import PretrainError
from pretrain.corpus.sources import Files, Skipped, read
from pretrain.corpus.sources.content.parts import cut, parts

TEXT = st.text(alphabet="ab \n|", max_size=300)


def documents(place, longest=4_000_000, **fields):
    return [document["text"] for document in read(Files(str(place), **fields), Skipped(longest))]


@given(TEXT, st.integers(1, 40))
def test_pieces_are_the_text_and_none_is_too_long_or_blank(text, most):
    pieces = list(cut(text, most))
    assert all(0 < len(piece) <= most and piece.strip() for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    start = 0
    for piece in pieces:
        start = text.index(piece, start) + len(piece)
        assert text[start - len(piece) : start] == piece


@given(TEXT, st.integers(1, 12), st.integers(20, 60))
def test_however_a_text_comes_its_documents_are_what_stands_between_separators(text, step, most):
    chunks = [text[n : n + step] for n in range(0, len(text), step)]
    expected = [part for part in text.split("||") if part.strip()]
    if all(len(part) <= most for part in text.split("||")):
        assert list(parts(chunks, "||", most)) == expected
    assert all(len(part) <= most for part in parts(chunks, "||", most))


def test_a_piece_ends_with_a_paragraph_else_a_line_else_a_word():
    assert list(cut("aa aa\n\nbb bb\ncc", 9)) == ["aa aa\n\n", "bb bb\ncc"]
    assert list(cut("aaaa\nbbbb cc", 8)) == ["aaaa\n", "bbbb cc"]
    assert list(cut("aaaa bbbb", 7)) == ["aaaa ", "bbbb"] and list(cut("aaaaaaaaa", 4)) == ["aaaa", "aaaa", "a"]


def test_a_file_that_is_longer_than_a_document_may_be_is_parted_all_the_same(tmp_path):
    stories = [f"Story {n}. " + "It ends well. " * (n % 40) for n in range(400)]
    put(tmp_path / "stories.txt", "<|endoftext|>\n".join(stories).encode())
    assert documents(tmp_path / "stories.txt", longest=4000, separator="<|endoftext|>\n") == stories
    skipped = Skipped(4000)
    rows = list(read(Files(str(tmp_path), separator="<|endoftext|>"), skipped))
    assert len({row["id"] for row in rows}) == 400 and not any("group" in row for row in rows) and not skipped.reasons


def test_pieces_are_of_every_text_and_of_no_row(tmp_path):
    put(tmp_path / "a.txt", b"word " * 100)
    put(tmp_path / "b.pdf", pdf("of a page " * 20, "and another " * 20))
    put(tmp_path / "c.zip", zipped({"d.md": b"line\n" * 100}))
    put(tmp_path / "e.jsonl", b'{"text": "' + b"cell " * 100 + b'"}\n')
    texts = documents(tmp_path, pieces=120)
    assert [len(text) for text in texts if "cell" in text] == [500]
    assert all(len(text) <= 120 for text in texts if "cell" not in text) and len(texts) > 14
    assert documents(tmp_path, pieces=10_000) == documents(tmp_path)


def test_a_piece_with_a_key_is_left_out_and_the_others_stay(tmp_path):
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7bq\n-----END RSA PRIVATE KEY-----\n"
    put(tmp_path / "a.txt", ("words\n" * 40 + "\n" + key + "\n" + "more words\n" * 40).encode())
    skipped = Skipped()
    rows = list(read(Files(str(tmp_path / "a.txt"), pieces=200), skipped))
    assert skipped.reasons == {"holding what looks like a key or a password": 1} and len(rows) > 2


def test_what_parts_nothing_is_refused():
    with pytest.raises(PretrainError, match="separator '': accepted: what stands between documents"):
        Files("x", separator="")
    with pytest.raises(PretrainError, match="group 'stem': accepted: none where a text is several documents"):
        Files("x", group="stem", pieces=100)
