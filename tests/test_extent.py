"""How much of a table's bytes is text, which the estimates of what is learnt from it go by."""

from __future__ import annotations

import csv
import gzip
import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from pretrain.corpus.sources import Files, read
from pretrain.forecast import forecast
from pretrain.identity import plan
from pretrain.new.look import look
from pretrain.new.plans import Asked
from pretrain.recipe import load


def rows(count, beside=15):
    """Documents of which the text is about a half."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopäé", k=rng.randint(2, 9))) for _ in range(500)]
    return [
        {"id": n, "text": " ".join(rng.choices(words, k=rng.randint(20, 60))), "url": f"http://example.org/{n}",
         "note": "\n".join(rng.choices(words, k=beside))}
        for n in range(count)
    ]  # fmt: skip


def write(path, documents):
    """A table of a kind that its name tells."""
    if path.name.endswith(".csv"):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(documents[0]))
            table.writeheader()
            table.writerows(documents)
    elif path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(documents), path)
    elif path.name.endswith(".json"):
        path.write_text(json.dumps(documents))
    else:
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.mark.parametrize("count", [40, 5000], ids=["whole", "beginning"])
@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.json", "t.parquet"])
def test_the_text_of_a_table_is_estimated_and_not_the_size_of_its_file(tmp_path, name, count):
    source = Files(str(write(tmp_path / name, rows(count))))
    documents = list(read(source))
    text = sum(len(document["text"].encode()) for document in documents)
    assert source.size().bytes == pytest.approx(text, rel=0.06)
    assert source.extent().documents == pytest.approx(count, rel=0.06)
    assert name == "t.parquet" or source.size().whole > 1.3 * text


def test_of_a_packed_table_that_is_read_whole_the_text_is_known(tmp_path):
    source = Files(str(write(tmp_path / "t.jsonl.gz", rows(300))))
    assert source.size().bytes == sum(len(document["text"].encode()) for document in read(source))


def test_rows_that_are_passed_over_are_none_of_the_text(tmp_path):
    path = write(tmp_path / "t.jsonl", rows(200))
    whole = Files(str(path)).size().bytes
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line if n % 2 else line[:40] for n, line in enumerate(lines)))
    assert Files(str(path), on_error="skip").size().bytes == pytest.approx(whole / 2, rel=0.1)


def test_of_many_tables_a_few_tell_of_all_and_texts_beside_them_are_counted_whole(tmp_path):
    for number in range(12):
        write(tmp_path / f"{number}.jsonl", rows(20 + number))
    (tmp_path / "a.txt").write_text("some words " * 1000)
    source = Files(str(tmp_path))
    text = sum(len(document["text"].encode()) for document in read(source))
    assert source.size().bytes == pytest.approx(text, rel=0.06)
    as_text = Files(str(tmp_path), tables="text")
    assert as_text.size().bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv"])
def test_plans_and_new_recipes_go_by_the_text(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    documents = rows(5000, beside=40)
    write(tmp_path / name, documents)
    text = sum(len(document["text"].encode()) for document in documents)
    (tmp_path / "r.yaml").write_text(
        f"stages: [{{stage: data, sources: [{name}], validation: 0.1, test: 0.1}}, "
        "{stage: tokenizer, corpus: data, vocab_size: 2048}, {stage: train, corpus: data, tokenizer: tokenizer, "
        "size: auto, model: {family: llama}, budget: {tokens: 1e6}}]"
    )
    recipe = load(tmp_path / "r.yaml")
    corpus, _, model = forecast(plan(recipe))
    assert corpus.estimate.left.bytes["train"] == pytest.approx(0.8 * text, rel=0.06)
    assert recipe.sizes[0].task.unique == pytest.approx(0.8 * text, rel=0.06)
    assert model.estimate.passes == pytest.approx(1e6 / (0.8 * text / 7.07), rel=0.15)  # a BPE of the whole text
    seen = look(name)
    assert Asked("t", seen, "pretrain").text == pytest.approx((1 - 2 * seen.share) * text, rel=0.06)
