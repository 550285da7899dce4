"""Documents of any kind in a corpus: what makes two of them the same, on which side they are, how they are stored."""

from __future__ import annotations

import io
import json

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from pretrain.core.errors import PretrainError
from pretrain.corpus import parts
from pretrain.corpus.payload import content, identity, table_of
from pretrain.corpus.shards import tokenise
from pretrain.corpus.store import SPLITS, Corpus, side, write_corpus
from pretrain.data.deduplication.deduplicate import Deduplicate


def png(seed, size=(8, 8)):
    held = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, size, np.uint8)).save(held, "PNG")
    return {"bytes": held.getvalue(), "path": f"{seed}.png"}


def images(count, **more):
    return [{"image": png(i), "label": i % 3, "domain": "d", "id": str(i)} | more for i in range(count)]


def series(count):
    rng = np.random.default_rng(0)
    return [
        {"series": rng.normal(size=(5 + i % 3, 2)), "label": "ab"[i % 2], "domain": "s", "id": str(i)}
        for i in range(count)
    ]


def test_images_and_series_come_back_as_they_were(tmp_path):
    given = images(12) + series(9) + [{"audio": {"bytes": b"RIFF", "path": None}, "domain": "a", "id": "a"}]
    for number, document in enumerate(given):
        document["label"] = str(document.get("label"))
        document["group"] = number
    write_corpus(given, tmp_path / "c", validation=0.2, test=0.2)
    corpus = Corpus(tmp_path / "c")
    rows = {row["id"] + row["domain"]: row for split in SPLITS for row in corpus.split(split)}
    assert len(rows) == len(given) and {"image", "audio", "series", "label"} <= set(corpus.columns)
    for document in given:
        row = rows[document["id"] + document["domain"]]
        if "image" in document:
            held = Image.open(io.BytesIO(document["image"]["bytes"]))
            assert np.array_equal(np.asarray(row["image"]), np.asarray(held)), "decoded by `datasets` from the schema"
        if "series" in document:
            assert np.allclose(row["series"], document["series"], atol=1e-6)
        if "audio" in document:
            assert row["audio"]["bytes"] == b"RIFF"


def test_copies_are_those_with_the_same_payload_and_not_with_the_same_facts(tmp_path):
    one = {"image": png(0), "label": "cat", "domain": "d", "id": "1", "url": "here"}
    copy = one | {"image": one["image"] | {"path": "elsewhere"}, "id": "2", "url": "there"}
    other = one | {"label": "dog", "id": "3"}
    assert identity(one) == identity(copy) != identity(other) and content(one) == content(other)
    info = write_corpus([one, copy, other], tmp_path / "c", validation=0, test=0)
    assert info["documents"]["train"] == 2 and info["removed"]["exact"] == 1


@pytest.mark.parametrize(
    "first, second",
    [(1, 1.0), (0.0, -0.0), ([1, 2.0], (1.0, 2)), ({"a": 1, "b": 2.5}, {"b": 2.5, "a": 1.0}), ({"a": 1, "b": None}, {"a": 1}), (np.int64(1), 1)],
)  # fmt: skip
def test_labels_that_are_the_same_once_stored_make_copies(tmp_path, first, second):
    documents = [{"text": "a", "label": label, "domain": "d", "id": "0"} for label in (first, second)]
    assert identity(documents[0]) == identity(documents[1])
    assert write_corpus(documents, tmp_path / "c", validation=0, test=0)["documents"]["train"] == 1


@pytest.mark.parametrize("first, second", [(1, 2), (1, 1.5), ("1", 1), (True, 1), ([1], [1, 1]), (float("nan"), 0)])
def test_labels_that_differ_make_two_documents(first, second):
    assert identity({"text": "a", "label": first}) != identity({"text": "a", "label": second})


def test_a_series_is_its_values_and_its_shape():
    values = np.arange(6.0)
    assert identity({"series": values.reshape(3, 2)}) != identity({"series": values.reshape(2, 3)})
    assert identity({"series": values.reshape(3, 2)}) == identity({"series": values.reshape(3, 2).tolist()})


def test_the_fingerprint_and_the_sizes_are_of_the_whole_payload(tmp_path):
    made = {}
    for name, more in {"plain": {}, "facts": {"url": "x"}, "labels": {"label": 9}}.items():
        made[name] = write_corpus(images(6, **more), tmp_path / name, validation=0, test=0)
    assert made["plain"]["fingerprint"] == made["facts"]["fingerprint"] != made["labels"]["fingerprint"]
    texts = [{"text": "añb", "domain": "d", "id": "1"}]
    plain = write_corpus(texts, tmp_path / "t", validation=0, test=0)
    labelled = write_corpus([texts[0] | {"label": "x"}], tmp_path / "l", validation=0, test=0)
    assert plain["bytes"]["train"] == 4 and plain["fingerprint"] != labelled["fingerprint"]
    assert made["plain"]["bytes"]["train"] > sum(len(d["image"]["bytes"]) for d in images(6))


def test_plain_text_keeps_the_sides_and_the_fingerprint_that_it_had(tmp_path):
    texts = [{"text": f"text {i}", "domain": "d", "id": str(i)} for i in range(40)]
    info = write_corpus(texts, tmp_path / "c", validation=0.2, test=0.2, near_duplicates=None)
    for split in SPLITS:
        found = {d["text"] for d in Corpus(tmp_path / "c").documents(split)}
        assert found == {d["text"] for d in texts if side(d["text"], 0.2, 0.2) == split}
    assert info["fingerprint"] == "3ae4c691745d86583f3069044e969b5e874eb24d566b6493d0c5f3541365c9d3"


def test_the_side_of_an_image_is_that_of_its_content_whatever_its_label(tmp_path):
    given = [d | {"label": label, "id": f"{d['id']}{label}"} for d in images(60) for label in "ab"]
    write_corpus(given, tmp_path / "c", validation=0.3, test=0.3)
    sides: dict[bytes, set[str]] = {}
    for split in SPLITS:
        for document in Corpus(tmp_path / "c").documents(split, ("image",)):
            sides.setdefault(document["image"]["bytes"], set()).add(split)
    assert len(sides) == 60 and all(len(found) == 1 for found in sides.values())
    assert {next(iter(found)) for found in sides.values()} == set(SPLITS)


def test_training_documents_with_the_content_of_a_held_out_one_go(tmp_path):
    given = [d | {"group": g, "label": g, "id": f"{d['id']}{g}"} for d in images(20) for g in (int(d["id"]), 100)]
    info = write_corpus(given, tmp_path / "c", validation=0, test=0.5)
    held_out = {d["image"]["bytes"] for d in Corpus(tmp_path / "c").documents("test", ("image",))}
    kept = {d["image"]["bytes"] for d in Corpus(tmp_path / "c").documents("train", ("image",))}
    assert info["removed"]["near"] > 0 and held_out and kept and not held_out & kept


def test_deduplication_of_documents_without_text_removes_exact_copies():
    given = [d | {"url": u} for d in images(4) for u in "ab"]
    data = datasets.Dataset.from_list([{"image": d["image"], "label": d["label"], "url": d["url"]} for d in given])
    data = data.cast_column("image", datasets.Image())
    assert Deduplicate()(data)["url"][:] == ["a"] * 4


def test_a_row_group_holds_no_more_than_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "GROUP_BYTES", 20_000)
    write_corpus(
        [{"image": png(i, (64, 64)), "domain": "d", "id": str(i)} for i in range(40)],
        tmp_path / "c",
        validation=0,
        test=0,
    )
    (path,) = (tmp_path / "c" / "train").glob("*.parquet")
    file = pyarrow.parquet.ParquetFile(path)
    assert file.num_row_groups > 5
    assert max(file.read_row_group(i).nbytes for i in range(file.num_row_groups)) < 40_000


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"label": 1}, "document 'x' has no content; accepted: one of text, image, audio, series"),
        ({"image": "a.png"}, r"column 'image' holds str; accepted: \{bytes, path\}"),
        ({"series": [1.0, 2.0]}, "column 'series' has 1 dimensions; accepted: 2, time x channels"),
        ({"series": [[1.0], [-1e39]]}, r"document 'x': column 'series' holds -1e\+39; accepted: numbers"),
    ],
    ids=["nothing", "a path", "one dimension", "beyond float32"],
)
def test_what_is_no_document_is_named(tmp_path, document, message):
    with pytest.raises(PretrainError, match=message):
        write_corpus([document | {"domain": "d", "id": "x"}], tmp_path / "c", validation=0, test=0)


def test_operations_keep_the_columns_types(tmp_path):
    write_corpus(images(20), tmp_path / "c", validation=0, test=0, operations=[lambda corpus: corpus.select(range(7))])
    rows = Corpus(tmp_path / "c").split("train")
    assert len(rows) == 7 and isinstance(rows[0]["image"], Image.Image)
    assert json.loads((tmp_path / "c" / "corpus.json").read_text())["documents"]["train"] == 7


def test_a_column_of_several_types_is_named(tmp_path):
    documents = [{"text": str(n), "label": label, "domain": "d", "id": str(n)} for n, label in enumerate((1, "x"))]
    with pytest.raises(
        PretrainError, match=r"column 'n' holds numbers too large to store .*; accepted: whole numbers from"
    ):
        table_of([{"text": "a", "n": 2**63}, {"text": "b", "n": 2**63 + 1}])
    with pytest.raises(PretrainError, match="column 'label' holds several types .*; accepted: one type a column"):
        write_corpus(documents, tmp_path / "c", validation=0, test=0)


def test_documents_without_text_are_named_where_text_is_read(tmp_path, tokenizer):
    write_corpus(images(6), tmp_path / "c", validation=0, test=0)
    mixed = [*images(3), *({"text": f"text {n}", "domain": "d", "id": f"t{n}"} for n in range(3))]
    write_corpus(mixed, tmp_path / "m", validation=0, test=0)
    for folder in ("c", "m"):
        corpus = Corpus(tmp_path / folder)
        words = f"{folder}: train document '.' has no 'text'; accepted: a corpus of text; its columns: .*image"
        for read in (lambda: list(corpus.documents("train")), lambda: corpus.sample("train", 6)):  # noqa: B023
            with pytest.raises(PretrainError, match=words):
                read()
        with pytest.raises(PretrainError, match=words):
            tokenise(corpus, tokenizer, tmp_path / f"tokens-{folder}", splits=("train",))
        assert len(list(corpus.documents("train", ("id",)))) == 6
