"""Nothing but the room at the boundary opens and parses what others have written, and damaged models are named."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from package_code import PACKAGE, calls, nodes, texts
from safetensors.torch import load_file, save_file

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.files import read_json_lines
from pretrain.core.folders import MANY
from pretrain.core.foreign import yaml as foreign_yaml
from pretrain.core.foreign.paths import expanded
from pretrain.corpus.tokenizers import load_tokenizer, train_tokenizer
from pretrain.evaluation.likelihood.held_out import HeldOut
from pretrain.identity import plan
from pretrain.recipe import load
from pretrain.stages.evaluate import load_both, measure
from pretrain.training.log import keep_until

ROOM = "core/foreign/"
# What parses, by the names of calls, and the files besides the room that may call it: what they read is the package's
# own, the system's, of this process, or what the room has looked at before.
PARSERS = {
    r"(yaml\.)(load|load_all|safe_load|compose|parse|full_load|unsafe_load)": {"core/foreign/yaml.py"},
    r"json\.(load|loads|JSONDecoder)": {
        "core/foreign/json.py", "docs/site.py", "core/sandbox/__init__.py", "core/sandbox/inside.py", "papers/__init__.py", "identity.py",
        "surgery/_tokens.py",
    },
    r"(np|numpy)\.load": {"core/foreign/arrays.py"},
    r"(gzip|bz2|lzma|zstandard|zstd)\.(open|decompress|GzipFile|BZ2File|LZMAFile)": {"core/foreign/archives.py"},
    r"zlib\.decompress(obj)?|tarfile\.open|zipfile\.ZipFile": {"core/packages.py", "core/foreign/pickles.py", "core/foreign/documents/members.py"},
    r".*\.expanduser": {"core/foreign/paths.py", "core/folders.py"},
    r"Image\.open": {"corpus/sources/images.py", "core/processors.py", "core/samples.py", "new/look.py"},
    r"(.*\.)?tokenizer(\.(encode|decode|tokenize|batch_decode|batch_encode_plus|encode_plus|__call__))?": {
        "core/encoding/__init__.py"
    },
    r"(.*\.)?backend\.(encode|decode)\w*": {"core/encoding/__init__.py"},
    r"tomllib\.loads?|pickle\..*|configparser\..*|ET\.parse": {"data/_workers.py"},
}  # fmt: skip


@pytest.mark.promise("What others have written", "No other file parses what others have written.")
@pytest.mark.parametrize("parser", PARSERS)
def test_no_other_file_parses_what_others_have_written(parser):
    for name in texts():
        imports = [node for node in nodes(name) if isinstance(node, ast.ImportFrom)]
        room = {
            alias.asname or alias.name
            for node in imports
            if node.module == "pretrain.core.foreign"
            for alias in node.names
        }
        for call, node in calls(name):
            if re.fullmatch(parser, call):
                ours = call.partition(".")[0] in room
                assert ours or name in PARSERS[parser], f"{name}:{node.lineno}: {call}: through pretrain.core.foreign"


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Folders of tiny models with a tokenizer, without checksums, as they come from elsewhere."""
    home = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([f"def f{n}(): return {n}" for n in range(50)], vocab_size=290)
    for family in ("llama", "gpt2"):
        checkpoint.save(tiny(family, vocab_size=320), tokenizer, home / family)
        (home / family / "checksums.json").unlink()
    return home


def edited(folder: Path, name: str, **fields: object) -> None:
    """Set fields of a JSON file."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def reweighted(folder: Path, change) -> None:
    """Change the tensors of a checkpoint."""
    path = folder / "model.safetensors"
    tensors = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


def retokenized(folder: Path, change) -> None:
    """Change the tokenizer of a checkpoint."""
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
NORM = "model.layers.0.input_layernorm.weight"
PELA = [{"method": "pela", "config": {}, "foreign": False}]
BAD = {
    "weights that are not finite": (lambda f: reweighted(f, lambda n, t: t * float("nan") if n == NORM else t), rf"{NORM} holds NaN or infinity"),
    "weights of whole numbers": (lambda f: reweighted(f, lambda n, t: t.to(torch.int32) if n == NORM else t), rf"{NORM} is of I32; accepted: floating-point"),
    "weights of bits": (lambda f: reweighted(f, lambda n, t: t.bool() if n == NORM else t), rf"{NORM} is of BOOL; accepted: floating-point"),
    "an unknown activation": (lambda f: edited(f, "config.json", hidden_act="nosuch"), r"config.json: .*nosuch"),
    "an unknown rope": (lambda f: edited(f, "config.json", rope_parameters={"rope_type": "nosuch", "rope_theta": 1e4}), r"config.json: .*nosuch"),
    "padding outside the vocabulary": (lambda f: edited(f, "config.json", pad_token_id=10**9), r"config.json: pad_token_id 1000000000: accepted: .*to 319"),
    "a thousand million layers": (lambda f: edited(f, "config.json", num_hidden_layers=10**9), r"config.json: num_hidden_layers 1e\+09: accepted: at most 10,000"),
    "more layers than weights": (lambda f: edited(f, "config.json", num_hidden_layers=9000), r"config.json: num_hidden_layers 9000: accepted: layers of which"),
    "a width that is not the files'": (lambda f: edited(f, "config.json", intermediate_size=10**8), r"config.json: a model of [\d,]+ weights, of which the files hold"),
    "such a width after a surgery": (lambda f: (edited(f, "config.json", intermediate_size=10**8), edited(f, "pretrain.json", surgery=PELA)), r"config.json: a model of [\d,]+ weights, of which the files hold"),
    "a surgery that is a text": (lambda f: edited(f, "pretrain.json", surgery="x"), r"pretrain.json: surgery 'x': accepted: a list"),
    "a lineage that is a list": (lambda f: edited(f, "pretrain.json", lineage=[]), r"pretrain.json: lineage '\[\]': accepted: a JSON object"),
    "a generation that is a list": (lambda f: (f / "generation_config.json").write_text("[]"), r"generation_config.json holds a list"),
    "an epsilon that is none": (lambda f: edited(f, "config.json", rms_norm_eps=float("nan")), r"config.json: rms_norm_eps nan: accepted: a number from 0 to 1"),
    "an epsilon below 0": (lambda f: edited(f, "config.json", rms_norm_eps=-1e9), r"config.json: rms_norm_eps -1000000000.0: accepted: a number from 0"),
    "an epsilon that is a text": (lambda f: edited(f, "config.json", rms_norm_eps="x"), r"config.json: rms_norm_eps x: accepted"),
    "a base without end": (lambda f: edited(f, "config.json", rope_parameters={"rope_type": "default", "rope_theta": float("inf")}), r"config.json: rope_parameters.rope_theta inf: accepted: a number above 0"),
    "no positions": (lambda f: edited(f, "config.json", max_position_embeddings=0), r"config.json: max_position_embeddings 0: accepted: 1 or more"),
    "positions that are scaled by nothing": (lambda f: edited(f, "config.json", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}), r"config.json: rope_parameters.factor 0.0: accepted: a number above 0"),
    "a type that torch has not": (lambda f: edited(f, "config.json", dtype="float99"), r"config.json: dtype float99: accepted: float32, bfloat16"),
    "what torch has that is no type": (lambda f: edited(f, "config.json", torch_dtype="nn"), r"config.json: torch_dtype nn: accepted: float32, bfloat16"),
    "less than no heads": (lambda f: edited(f, "config.json", num_attention_heads=-1), r"config.json: num_attention_heads -1: accepted: 0 or more"),
    "another number that is none": (lambda f: edited(f, "config.json", initializer_range=float("nan")), r"config.json: initializer_range NaN: accepted: a number"),
    "a temperature that is a word": (lambda f: edited(f, "generation_config.json", temperature="hot"), r"generation_config.json: temperature 'hot': accepted: a number from 0"),
    "a top_k that is a word": (lambda f: edited(f, "generation_config.json", top_k="x"), r"generation_config.json: top_k 'x': accepted: a whole number"),
    "a penalty of 0": (lambda f: edited(f, "generation_config.json", repetition_penalty=0.0), r"generation_config.json: repetition_penalty 0.0: accepted: a number above 0"),
    "a token that is a word": (lambda f: edited(f, "generation_config.json", suppress_tokens=[1, "x"]), r"generation_config.json: suppress_tokens \[1, 'x'\]: accepted: a list of tokens"),
    "words that are none": (lambda f: edited(f, "generation_config.json", bad_words_ids=[[1, 2], "x"]), r"generation_config.json: bad_words_ids .*: accepted: lists of tokens"),
    "words outside the vocabulary": (lambda f: edited(f, "generation_config.json", bad_words_ids=[[1, 320]]), r"generation_config.json: bad_words_ids 320: accepted: .*from 0 to 319"),
    "biases by texts": (lambda f: edited(f, "generation_config.json", sequence_bias={"(1,)": 1e9}), r"generation_config.json: sequence_bias .*: accepted: a list of \[tokens, number\]"),
    "beams without end": (lambda f: edited(f, "generation_config.json", num_beams=10**9), r"generation_config.json: num_beams 1000000000: accepted: a whole number from 1"),
    "a length that is a word": (lambda f: edited(f, "tokenizer_config.json", model_max_length="x"), r"tokenizer_config.json: model_max_length 'x': accepted: a number of tokens"),
    "a side that is none": (lambda f: edited(f, "tokenizer_config.json", padding_side="x"), r"tokenizer_config.json: padding_side 'x': accepted: left, right"),
    "tokens of one number": (lambda f: retokenized(f, lambda t: t["model"]["vocab"].update(dict.fromkeys("abc", 5))), r"tokenizer.json: model.vocab: token 5 is both .* and .*; accepted: a number of its own"),
    "no tokens": (lambda f: retokenized(f, lambda t: (t["model"].update(vocab={}, merges=[]), t.update(added_tokens=[]))), r"tokenizer.json: model.vocab is empty; accepted: one with a token"),
    "special tokens alone": (lambda f: retokenized(f, lambda t: t["model"].update(vocab={}, merges=[])), r"tokenizer.json: model.vocab is empty"),
    "a token of two numbers": (lambda f: retokenized(f, lambda t: t["added_tokens"].append(ADDED | {"content": "a", "id": 2**32 - 1})), r"tokenizer.json: added_tokens: 'a' is token 4294967295, and token \d+ in model.vocab"),
    "a token without end": (lambda f: retokenized(f, lambda t: t["model"]["vocab"].update({"a" * 20_000: 300})), r"tokenizer.json: a token of 20,000 characters; accepted: at most 10,000"),
    "JSON without an end": (lambda f: (f / "config.json").write_text("[" * 100_000), r"config.json is not valid JSON .*more than 200"),
}  # fmt: skip


@pytest.mark.promise(
    "What others have written",
    "A checkpoint whose configuration does not go with its weights, whose weights are no finite floating-point numbers, or whose record is none is refused before a model of that size is built.",
)
@pytest.mark.parametrize("what", BAD)
def test_a_damaged_checkpoint_is_one_line_that_names_it(models, tmp_path, what):
    shutil.copytree(models / "llama", folder := tmp_path / "m")
    change, message = BAD[what]
    change(folder)
    start = time.process_time()
    with pytest.raises(PretrainError, match=message):
        checkpoint.load(folder)
    assert time.process_time() - start < 5


def test_tokens_without_a_row_are_refused_before_anything_is_measured(models, tmp_path, tiny):
    _, tokenizer = checkpoint.load(models / "llama")
    checkpoint.save(tiny("llama"), tokenizer, tmp_path / "m")
    with pytest.raises(PretrainError, match=r"has no row in the model; accepted: tokens from 0 to 96"):
        load_both(tmp_path / "m")
    shutil.copytree(models / "llama", folder := tmp_path / "added")
    retokenized(folder, lambda t: t["added_tokens"].append(ADDED | {"content": "qq", "id": 320}))
    with pytest.raises(PretrainError, match=r"token 320 of its tokenizer, 'qq', has no row in the model; .* 0 to 319"):
        load_both(folder)


@pytest.mark.promise("What others have written", "A byte-order mark")
def test_a_byte_order_mark_in_any_file_of_a_checkpoint_changes_nothing(models, tmp_path):
    shutil.copytree(models / "llama", folder := tmp_path / "m")
    for name in ("config.json", "generation_config.json", "pretrain.json"):
        (folder / name).write_text((folder / name).read_text(), encoding="utf-8-sig")
    edited_generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8-sig")) | {
        "max_length": 77
    }
    (folder / "generation_config.json").write_text(json.dumps(edited_generation), encoding="utf-8-sig")
    assert checkpoint.load(folder)[0].generation_config.max_length == 77
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text(), encoding="utf-16")
    assert (
        checkpoint.load(folder)[1].get_vocab()
        == load_tokenizer(folder).get_vocab()
        == checkpoint.load(models / "llama")[1].get_vocab()
    )


def test_windows_beyond_the_learned_positions_are_refused_when_planned_and_when_measured(models, tmp_path):
    model, tokenizer = checkpoint.load(models / "gpt2")
    with pytest.raises(PretrainError, match="held_out: length 100: the model has 64 positions; accepted: at most 64"):
        measure(model, tokenizer, [{"text": "words " * 100}], [HeldOut(length=100)])
    recipe = {
        "stages": [
            {
                "stage": "evaluate",
                "checkpoint": str(models / "gpt2"),
                "corpus": str(tmp_path),
                "evaluations": [{"method": "held_out", "length": 100}],
            }
        ]
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(PretrainError, match="evaluate.evaluations.0: held_out: length 100: .* has 64 positions"):
        load(tmp_path / "r.yaml")


@pytest.mark.promise("What others have written", "A reference to a folder of more than 20,000 files is refused.")
def test_a_reference_to_a_whole_tree_is_refused_at_once(tmp_path):
    home = tmp_path / "home"
    for number in range(MANY // 1000 + 1):
        (home / str(number)).mkdir(parents=True)
        for name in range(1000):
            os.symlink("/dev/null", home / str(number) / str(name))
    os.symlink("x" * 300, home / "odd")  # which cannot be looked at, like much of /proc
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({"stages": [{"stage": "evaluate", "checkpoint": str(home), "corpus": str(home)}]})
    )
    start = time.process_time()
    with pytest.raises(PretrainError, match="holds more than 20,000 files"):
        plan(load(tmp_path / "r.yaml"))
    assert time.process_time() - start < 5


@pytest.mark.parametrize("path", ["~nosuch", "~nosuch/x", "x" * 300, "d/" * 3000, "a\0b", "\ud800"])
def test_what_can_be_no_path_is_one_line(path):
    with pytest.raises(PretrainError, match="path .*accepted: "):
        expanded(path)


def test_one_bad_byte_in_a_log_stops_nothing(tmp_path):
    rows = [
        b'{"step": 1}',
        b'{"step": 2, \xff}',
        b"\x00",
        b'{"step": "x"}',
        b"[1]",
        b"9" * 6000,
        b"[" * 5000,
        b'{"step": 3}',
        b'{"step": 4}',
        b'{"st',
    ]
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\n".join(rows))
    assert [row["step"] for row in read_json_lines(path)] == [1, "x", 3, 4]
    keep_until(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


ODD = (
    "", "# nothing", "a", "~", "!", "a: !\n", "a: \t1", "a\tb: c", "[a? b, 2e-?3]", "? a\n: b", "a:\n\ufeff  b: 1", "a: |# no\n  b", "a: >-2\n    b",
    "{a:1, b: {c: d}}", "[a, b,]", "[a b\n c]", "'it''s'", '"\\x41\\u00e9\\\n  b"', '"\\ud800"', "a: &x [1, 1e6]\nb: *x", "<<: {a: 1}\nb: 2", "a: *no",
    "&a x: &a y", "a: 1\na: 2", "[1]: 2", "a: 1\r\nb: 2\rc: 3", "a: b: c", "a: 'b", "%YAML 1.1\n---\na: 1\n...\n", "a: 1\n---\nb: 2", "a: 1\x85b: 2",
    "a: é \U0001f600", "a: 0x1f\nb: 0o17\nc: 017\nd: 1_000\ne: .inf\nf: 12:30", "\x00", "\x07", "a:\n- b\n-  c\n - d", "- |\n a\n\n  b\n- >\n a\n b\n\n c",
)  # fmt: skip


def test_what_libyaml_takes_to_pieces_is_what_pyyaml_reads(monkeypatch):
    """The same value, places and errors, over the recipes and claims here, odd texts, and pieces of these put together."""
    pytest.importorskip("yaml._yaml")
    root, rng = PACKAGE.parent, random.Random(0)
    files = [path.read_text() for folder in ("recipes", "claims") for path in sorted((root / folder).rglob("*.yaml"))]
    pieces = [line for text in files for line in text.splitlines(keepends=True)]
    mixed = ["".join(rng.sample(pieces, 3)) for _ in range(60)]
    for _ in range(200):
        text = "".join(rng.sample(pieces, 2))
        at = rng.randrange(len(text))
        mixed.append(text[:at] + rng.choice([*ODD, *"\t\n:-?[]{},#&*!|>'\"%@`"]) + text[at + rng.randrange(3) :])

    def outcome(text):
        try:
            return foreign_yaml.loads(text, "a file")
        except PretrainError as error:
            return str(error)

    given = [*files[::9], *ODD, *mixed]
    fast = [outcome(text) for text in given]
    monkeypatch.setattr(foreign_yaml.yaml, "__with_libyaml__", False)
    assert fast == [outcome(text) for text in given]


@pytest.mark.parametrize("libyaml", [True, False])
def test_numbers_in_parts_of_60_and_of_base_8_are_texts(monkeypatch, libyaml):
    monkeypatch.setattr(foreign_yaml.yaml, "__with_libyaml__", libyaml and foreign_yaml.yaml.__with_libyaml__)
    for text in ("1:30", "190:20:30", "1:30.5", "-1:30", "010", "007", "00"):
        assert foreign_yaml.loads(f"a: {text}", "x")[0] == {"a": text}
    for text, value in (("0", 0), ("-7", -7), ("1_000", 1000), ("0x1F", 31), ("0b11", 3), (".5", 0.5), ("1.", 1.0)):
        assert foreign_yaml.loads(f"a: {text}", "x")[0] == {"a": value}
    for text in ("!!int 1:30", "!!float 1:30.5"):
        with pytest.raises(PretrainError, match="^x:1: not valid YAML: a number in parts of 60"):
            foreign_yaml.loads(f"a: {text}", "x")
