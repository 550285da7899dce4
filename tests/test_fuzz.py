"""Whatever a recipe, a corpus or a checkpoint holds, the answer is one line within seconds, and never a traceback.

`-m long` tries thousands of each (`PRETRAIN_MUTATIONS`), else some dozens: seeded, so that a finding can be repeated.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import shutil
from pathlib import Path

import pytest
import yaml
from mutations import VALUES, Tally, broken, changed

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.corpus.sources import Files, Images, Pixels, Sequences, Series, Skipped, read
from pretrain.corpus.store import write_corpus
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.forecast import forecast
from pretrain.identity import plan
from pretrain.interactive import generate
from pretrain.recipe import load
from pretrain.stages.evaluate import load_both

MANY = int(os.environ.get("PRETRAIN_MUTATIONS", "10000"))
FEW = 60
long = pytest.mark.long
counts = pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=long)])
FIRST = int(os.environ.get("PRETRAIN_FIRST", "0"))

RECIPE = {
    "name": "r", "seed": 1, "output": "runs/r",
    "stages": [
        {"stage": "data", "name": "corpus", "sources": [{"files": "text", "suffixes": [".txt"], "domain": "d", "on_error": "skip"}],
         "validation": 0.1, "test": 0.1, "near_duplicates": 0.8, "operations": [{"method": "deduplicate"}]},
        {"stage": "tokenizer", "corpus": "corpus", "vocab_size": 400},
        {"stage": "train", "name": "model", "corpus": "corpus", "tokenizer": "tokenizer", "length": 32, "batch_rows": 2,
         "model": {"family": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
         "objective": {"method": "causal_lm"}, "optimizer": {"method": "adamw", "lr": 1e-3, "beta2": 0.9},
         "schedule": {"method": "wsd"}, "policies": [{"method": "ema"}], "budget": {"steps": 3}, "mixture": {"d": 1.0},
         "evaluate_every": 2, "save_every": 2, "keep": 1, "clip": 1.0},
        {"stage": "surgery", "name": "lora", "checkpoint": "model", "surgeries": [{"method": "lora", "rank": 2}]},
        {"stage": "evaluate", "checkpoint": "model", "corpus": "corpus", "evaluations": [{"method": "held_out", "length": 32}], "max_documents": 5},
        {"stage": "decode", "checkpoint": "model", "prompts": ["def"], "max_new_tokens": 4},
    ],
}  # fmt: skip


@pytest.mark.promise(
    "What others have written",
    "Seeded mutators change recipes and `--set`, corpora and paths, and checkpoints, some dozens of each in every run of the tests and 10,000 of each with `-m long`; none ends in a traceback.",
)
@counts
def test_no_recipe_and_no_override_ends_in_a_traceback(tmp_path, monkeypatch, count):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("def f(): return 1\n" * 20)
    good, path = yaml.safe_dump(RECIPE, sort_keys=False), tmp_path / "r.yaml"
    path.write_text(good)
    forecast(plan(load(path)))
    fields = [".".join(map(str, place)) for place in _fields(RECIPE["stages"])]
    tally = Tally()
    for seed in range(FIRST, FIRST + count):
        rng, overrides, data = random.Random(seed), [], good.encode()
        match seed % 3:
            case 0:
                tree = RECIPE
                for _ in range(rng.randrange(1, 4)):
                    tree = changed(rng, tree)
                data = _dumped(tree)
            case 1:
                for _ in range(rng.randrange(1, 3)):
                    data = broken(rng, data)
            case 2:
                value = rng.choice(
                    [_dumped(rng.choice(VALUES)).decode() if rng.random() < 0.8 else "x" for _ in range(2)]
                )
                name = rng.choice(
                    [*fields, "seed", "name", "output", "stages", "x", "model.x.y.z", ".".join("x" * 2000)]
                )
                overrides = [
                    f"{name}={value}"
                    if rng.random() < 0.9
                    else broken(rng, f"{name}={value}".encode()).decode(errors="surrogateescape")
                ]
        path.write_bytes(data)
        tally.do(lambda overrides=overrides: forecast(plan(load(path, overrides))), f"seed {seed}")
    tally.settle("recipes")
    assert tally.refused > count / 2


def _fields(stages):
    for stage in stages:
        for place in (p for p in _places(stage)):
            yield (stage.get("name") or stage["stage"], *place)


def _places(value, place=()):
    if place:
        yield place
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(inner, (*place, key))


def _dumped(tree):
    """A tree as YAML, which JSON is too."""
    try:
        return json.dumps(tree, ensure_ascii=False).encode()
    except (UnicodeEncodeError, ValueError):  # halves of characters, or too many digits
        try:
            return json.dumps(tree).encode()
        except ValueError:
            return b"stages: [{stage: data, seed: " + b"9" * 6000 + b"}]"


ROWS = [
    {"text": f"text {n} é", "domain": "d", "id": f"i{n}", "label": n, "group": f"g{n // 2}", "tags": ["a", "b"]}
    for n in range(12)
]


def _files() -> dict[str, tuple[bytes, object]]:
    """Small good files by name, and which source reads them."""
    import pyarrow
    import pyarrow.parquet
    import zstandard
    from PIL import Image

    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    table, held, arrow = pyarrow.Table.from_pylist(ROWS), io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(table, held)
    with pyarrow.ipc.new_file(arrow, table.schema) as file:
        file.write_table(table)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(picture, "PNG")
    cells = "text,label\n" + "\n".join(f'"text, {n}",{n}' for n in range(12))
    book = {
        "cells": [{"cell_type": "code", "source": ["x = 1\n", "y = 2"]}, {"cell_type": "markdown", "source": "# A"}],
        "nbformat": 4,
    }
    chat = {"text": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    prose = ("words and words\n" * 40).encode()
    steps = "time,a,b\n" + "\n".join(f"{n},{n * 2},{n % 3}" for n in range(30))
    files, series = (lambda p: Files(p, on_error="skip")), (lambda p: Series(p))
    return {
        "a.jsonl": (lines, files), "b.jsonl": (lines, lambda p: Files(p)), "a.json": (json.dumps(ROWS).encode(), files),
        "chat.jsonl": (json.dumps(chat).encode(), files), "a.csv": (cells.encode(), files), "a.tsv": (cells.replace(",", "\t").encode(), files),
        "a.ipynb": (json.dumps(book).encode(), files), "a.parquet": (held.getvalue(), files), "a.arrow": (arrow.getvalue(), files),
        "a.txt": (prose, files), "a.txt.gz": (gzip.compress(prose), files), "a.txt.xz": (lzma.compress(prose), files),
        "a.txt.bz2": (bz2.compress(prose), files), "a.txt.zst": (zstandard.ZstdCompressor().compress(prose), files),
        "a.jsonl.gz": (gzip.compress(lines), files), "a.png": (picture.getvalue(), lambda p: Images(p, label="stem")),
        "p.csv": ("\n".join(",".join("123") + f",{n}" for n in range(9)).replace("1,2,3", "1,2,3,4").encode(), lambda p: Pixels(p)),
        "s.csv": (steps.encode(), series), "w.csv": (steps.encode(), lambda p: Series(p, window=4, stride=2, time="time")),
        "s.ts": (b"@problemName x\n@classLabel true a b\n@data\n1,2,3:a\n2,3,4:b\n", series), "s.tsf": (b"@attribute n string\n@data\nT1:1,2,3\nT2:4,5,6\n", series),
        "a.fasta": (b">x OS=Homo sapiens GN=1\nACGT\nAC\n>y [Mus]\nGGTT\n", lambda p: Sequences(p)),
        "a.gb": (b"LOCUS       X 10 bp\nDEFINITION  d.\n  ORGANISM  Homo\n            Eukaryota; M.\nORIGIN\n        1 acgtacgtac\n//\n", lambda p: Sequences(p, format="genbank")),
        "a.dat": (b"ID   X_Y\nOS   Homo.\nOC   Euk; M.\nCC   -!- SIMILARITY: Belongs to the A family.\nSQ   S\n     ACDE FG\n//\n", lambda p: Sequences(p, format="swissprot", label="organism")),
        "a.smi": (b"CCO ethanol\nCC\n", lambda p: Sequences(p)),
    }  # fmt: skip


@pytest.mark.promise("What others have written", "Seeded mutators change recipes")
@counts
def test_no_corpus_and_no_path_ends_in_a_traceback(tmp_path, monkeypatch, count):
    monkeypatch.chdir(tmp_path)
    known, tally = _files(), Tally()
    for name, (data, make) in known.items():
        Path(name).write_bytes(data)
        assert list(read(make(name))), name
    names = list(known)
    for seed in range(FIRST, FIRST + count):
        rng = random.Random(seed)
        name = names[seed % len(names)]
        data, make = known[name]
        if rng.random() < 0.3 and name.endswith((".jsonl", ".json", ".ipynb")):
            trees = [json.loads(line) for line in data.decode().splitlines()]
            tree = trees[0]
            for _ in range(rng.randrange(1, 4)):
                tree = changed(rng, tree)
            trees[rng.randrange(len(trees))] = tree
            data = b"\n".join(_dumped(tree) for tree in trees)
        else:
            for _ in range(rng.randrange(1, 4)):
                data = broken(rng, data)
        where = name
        if rng.random() < 0.05:
            where = str(
                rng.choice(
                    [
                        v
                        for v in VALUES
                        if isinstance(v, str) and v not in ("/", "..", "../..", "~", "**/*", "/proc/self/mem")
                    ]
                )
            )
        Path(name).write_bytes(data)
        try:
            source = make(where)
        except PretrainError:
            continue
        shutil.rmtree("corpus", ignore_errors=True)
        work = lambda source=source: write_corpus(read(source, Skipped()), Path("corpus"), near_duplicates=None)  # noqa: E731
        tally.do(work, f"seed {seed} ({where[:40]!r})")
        Path(name).write_bytes(known[name][0])
    tally.settle("corpora")


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory):
    """Folders of tiny models with a tokenizer, plain and after a surgery."""
    home = tmp_path_factory.mktemp("checkpoints")
    texts = [f"def f{n}(): return {n}" for n in range(50)]
    tokenizer = train_tokenizer(texts, vocab_size=290)
    from pretrain.core.method import method_class
    from pretrain.surgery import Inputs, operate

    for family in ("llama", "gpt2", "bert"):
        checkpoint.save(tiny(family, vocab_size=320), tokenizer, home / family, {"length": 16})
    model, _, _ = operate(
        [method_class("qk_norm", "surgery")()], tiny("llama", vocab_size=320), Inputs(tokenizer=tokenizer, seed=0)
    )
    checkpoint.save(model, tokenizer, home / "surgical", {"length": 16})
    for folder in home.iterdir():
        (folder / "checksums.json").unlink()
        checkpoint.load(folder)
    return home


def _copied(folder, place):
    """A copy of a checkpoint that may be changed, made once."""
    copy = place / folder.name
    return copy if copy.exists() else shutil.copytree(folder, copy)


@pytest.mark.promise("What others have written", "Seeded mutators change recipes")
@counts
def test_no_checkpoint_ends_in_a_traceback(checkpoints, tmp_path, count):
    tally = Tally()
    for seed in range(FIRST, FIRST + count):
        rng = random.Random(seed)
        family = ("llama", "gpt2", "bert", "surgical")[seed % 4]
        folder = _copied(checkpoints / family, tmp_path)
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        path = folder / rng.choice([*names, "config.json", "config.json", "pretrain.json"])
        good = path.read_bytes()
        if path.suffix == ".json" and rng.random() < 0.75:
            tree = json.loads(good)
            for _ in range(rng.randrange(1, 3)):
                tree = changed(rng, tree)
            path.write_bytes(_dumped(tree))
        elif path.suffix == ".safetensors" and rng.random() < 0.7:
            path.write_bytes(_header_changed(rng, good))
        else:
            path.write_bytes(broken(rng, good))
        tally.do(lambda folder=folder: checkpoint.load(folder), f"seed {seed} ({family}/{path.name})")
        path.write_bytes(good)
    tally.settle("checkpoints")


# Values that a number or a setting of generation may be given in place of its own.
ODD = [0, -1, 1, 2, 10**9, 10**30, 0.0, -0.5, 1e-9, 1e308, float("nan"), float("inf"), "x", "1", True, None, [], [1], [[1]], [[1, "x"]], [-1], {}, {"(1,)": 1.0}, [[[1], 2.0]], [10**9], [3, 1.1]]  # fmt: skip
GENERATION = [
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size",
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id",
    "eos_token_id", "pad_token_id", "bos_token_id", "min_length", "min_new_tokens", "max_length", "max_new_tokens", "num_beams",
    "do_sample", "stop_strings", "exponential_decay_length_penalty", "renormalize_logits", "remove_invalid_values", "length_penalty",
    "num_return_sequences", "guidance_scale", "watermarking_config", "cache_implementation", "use_cache", "early_stopping",
]  # fmt: skip
TOKENIZER = ["model_max_length", "padding_side", "truncation_side", "pad_token", "eos_token", "clean_up_tokenization_spaces", "split_special_tokens", "extra_special_tokens", "chat_template", "added_tokens_decoder", "tokenizer_class"]  # fmt: skip
PARTS = [
    "normalizer",
    "pre_tokenizer",
    "decoder",
    "post_processor",
    "added_tokens",
    "padding",
    "truncation",
]  # of tokenizer.json
STEPS = [
    {"type": "Sequence", inner: [{"type": "Replace", "pattern": pattern, "content": "ab" * 9}] * 9}
    for inner in ("normalizers", "decoders")
    for pattern in ({"String": "a"}, {"Regex": "."}, {"Regex": "x*"})
]  # fmt: skip


@pytest.mark.promise("What others have written", "Seeded mutators change recipes")
@counts
def test_no_setting_of_a_checkpoint_ends_in_a_traceback_when_it_generates(checkpoints, tmp_path, count):
    tally = Tally()
    for seed in range(FIRST, FIRST + count):
        rng = random.Random(seed)
        family = ("llama", "gpt2")[seed // 4 % 2]
        folder = _copied(checkpoints / family, tmp_path)
        path = folder / ("generation_config.json", "tokenizer_config.json", "config.json", "tokenizer.json")[seed % 4]
        good = path.read_bytes()
        tree = json.loads(good)
        numbers = [name for name, value in tree.items() if type(value) in (int, float)]
        for _ in range(rng.randrange(1, 3)):
            steps = path.name == "tokenizer.json"
            names = {"generation_config.json": GENERATION, "tokenizer_config.json": TOKENIZER}.get(path.name, numbers)
            tree[rng.choice(PARTS if steps else names)] = rng.choice([*STEPS, *ODD] if steps else ODD)
        path.write_text(json.dumps(tree))

        def work(folder=folder):
            model, tokenizer = load_both(folder)
            generate(model, tokenizer, "def", max_new_tokens=2)

        tally.do(work, f"seed {seed} ({family}/{path.name} {json.dumps(tree)[:300]})")
        path.write_bytes(good)
    tally.settle("settings")


def _header_changed(rng, data):
    """A safetensors file with another header."""
    size = int.from_bytes(data[:8], "little")
    text = _dumped(changed(rng, json.loads(data[8 : 8 + size])))
    return len(text).to_bytes(8, "little") + text + data[8 + size :]
