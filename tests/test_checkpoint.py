"""Checkpoints: plain transformers opens them, damage is named, an interrupted write loses nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from closeness import assert_same_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import pretrain
from pretrain.core import checkpoint, files
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import new_model, set_module
from pretrain.surgery import Surgery

TOKENS = torch.arange(3, 23)[None]
PLAIN_CASES: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> Auto class, family, fields
    "llama": ("CausalLM", "llama", {}),
    "llama-tied": ("CausalLM", "llama", {"tie_word_embeddings": True}),
    "llama-odd": ("CausalLM", "llama", {"num_hidden_layers": 1, "hidden_size": 40, "intermediate_size": 7}),
    "qwen3-biased": ("CausalLM", "qwen3", {"attention_bias": True}),
    "gpt2": ("CausalLM", "gpt2", {}),
    "gpt2-untied": ("CausalLM", "gpt2", {"tie_word_embeddings": False}),
    "bert": ("MaskedLM", "bert", {}),
    "modernbert": ("MaskedLM", "modernbert", {}),
    "t5": ("Seq2SeqLM", "t5", {}),
    "t5-unscaled": ("Seq2SeqLM", "t5", {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
}
PLAIN = """
import json, sys, torch, transformers
folder, cases = sys.argv[1], json.loads(sys.argv[2])
tokens = torch.arange(3, 23)[None]
out, refused = {}, {}
with torch.no_grad():
    for name, auto in cases.items():
        model = getattr(transformers, "AutoModelFor" + auto).from_pretrained(folder + "/" + name).eval()
        extra = {"decoder_input_ids": tokens} if auto == "Seq2SeqLM" else {}
        out[name] = model(input_ids=tokens, **extra).logits
for name in ("AutoModelForCausalLM", "AutoModel", "AutoConfig", "LlamaForCausalLM", "LlamaModel"):
    try:
        getattr(transformers, name).from_pretrained(folder + "/surgical")
    except Exception as error:
        refused[name] = f"{type(error).__name__}: {error}"
assert not any(name.partition(".")[0] == "pretrain" for name in sys.modules)
torch.save(out, folder + "/logits.pt")
json.dump(refused, open(folder + "/refused.json", "w"))
"""


@dataclass(frozen=True)
class Factorise(Surgery):
    """A throw-away surgery: feed-forward matrices as products of two thin ones."""

    name: ClassVar[str] = "factorise_for_this_test"
    ranks: tuple[int, ...] = (2, 2)

    def restore(self, model):
        for block, rank in zip(model.model.layers, self.ranks, strict=True):
            rows, columns = block.mlp.up_proj.weight.shape
            thin, wide = nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows, bias=False)
            set_module(block, "mlp.up_proj", nn.Sequential(thin, wide))
        return model

    def __call__(self, model, inputs=None):
        model = self.restore(model)
        checkpoint.record(model, self)
        return model


@pytest.fixture
def known_surgery(monkeypatch):
    monkeypatch.setattr(checkpoint, "method_class", lambda name, kind: {"factorise_for_this_test": Factorise}[name])


def logits(model):
    extra = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=TOKENS, **extra).logits


def stored(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """The folder in which another process, without pretrain, opened one checkpoint of each case."""
    folder = tmp_path_factory.mktemp("plain")
    models = {}
    for name, (_, family, fields) in PLAIN_CASES.items():
        models[name] = tiny(family, **fields)
        checkpoint.save(models[name], None, folder / name, {"tokens": 5})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "method_class", lambda name, kind: Factorise)
        checkpoint.save(Factorise()(tiny()), None, folder / "surgical")
    cases = json.dumps({name: auto for name, (auto, _, _) in PLAIN_CASES.items()})
    command = [sys.executable, "-c", PLAIN, str(folder), cases]
    # PYTHONSAFEPATH: the current folder, which may hold the package, is not searched
    subprocess.run(command, check=True, cwd=folder, env=os.environ | {"PYTHONSAFEPATH": "1"})
    return folder, models, torch.load(folder / "logits.pt"), json.loads((folder / "refused.json").read_text())


@pytest.mark.bits
@pytest.mark.parametrize("name", PLAIN_CASES)
def test_plain_transformers_and_we_open_it_with_equal_logits(plain, name):
    folder, models, by_transformers, _ = plain
    again, tokenizer = pretrain.load(folder / name)
    assert tokenizer is None
    assert_same_model(by_transformers[name], logits(models[name]), models[name])
    assert torch.equal(logits(again), logits(models[name]))
    configs = [model.config.to_dict() | {"_name_or_path": ""} for model in (again, models[name])]
    assert configs[0] == configs[1]
    assert again.config.architectures == [type(models[name]).__name__]
    assert checkpoint.lineage(folder / name) == {"tokens": 5}


def test_plain_transformers_refuses_what_it_cannot_build(plain):
    _, _, _, refused = plain
    assert set(refused) == {"AutoModelForCausalLM", "AutoModel", "AutoConfig", "LlamaForCausalLM", "LlamaModel"}
    for name in ("AutoModelForCausalLM", "AutoModel", "AutoConfig"):
        assert "pretrain.load" in refused[name]


def test_tied_weights_are_stored_once(plain):
    folder, models, _, _ = plain
    tied = {"llama-tied": "lm_head.weight", "gpt2": "lm_head.weight", "bert": "cls.predictions.decoder.weight"}
    tied |= {"modernbert": "decoder.weight", "t5": "lm_head.weight"}
    for name, weight in tied.items():
        assert weight in models[name].state_dict() and weight not in stored(folder / name)
    assert "lm_head.weight" in stored(folder / "llama") & stored(folder / "gpt2-untied")
    again, _ = pretrain.load(folder / "llama-tied")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_the_tokenizer_and_the_generation_settings_come_back(tiny, tmp_path, prepared, known_surgery):
    from pretrain.corpus.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(prepared / "tokenizer")
    for number, model in enumerate((tiny(), Factorise()(tiny()))):
        model.generation_config.max_new_tokens = 11
        checkpoint.save(model, tokenizer, tmp_path / str(number))
        again, same = pretrain.load(tmp_path / str(number))
        assert same is not None and same("import os")["input_ids"] == tokenizer("import os")["input_ids"]
        assert again.generation_config.max_new_tokens == 11


def test_a_lower_precision_does_not_round_the_rotary_tables(tiny, tmp_path, known_surgery):
    for number, model in enumerate((tiny(), Factorise()(tiny()))):
        checkpoint.save(model, None, tmp_path / str(number))
        again, _ = pretrain.load(tmp_path / str(number), dtype=torch.bfloat16)
        assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
        assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.fixture
def saved(tiny, tmp_path):
    checkpoint.save(tiny(), None, tmp_path / "c", {"tokens": 5})
    return tmp_path / "c"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.999])
def test_truncated_weights_are_named(saved, share):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(PretrainError, match=r"model.safetensors is truncated or damaged"):
        pretrain.load(saved)


def test_a_flipped_bit_and_swapped_weights_are_found_by_the_checksum(saved, tiny):
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(PretrainError, match=r"model.safetensors is damaged or was replaced: its checksum"):
        pretrain.load(saved)
    path.unlink()
    tiny(seed=1).save_pretrained(saved, max_shard_size="20KB")
    with pytest.raises(PretrainError, match=r"model.safetensors: No such file"):
        pretrain.load(saved)


def test_weights_of_an_older_release_are_compared_with_the_checksums_in_its_record(saved, tiny):
    (saved / "checksums.json").unlink()
    sums = {"model.safetensors": files.file_digest(saved / "model.safetensors")}
    (saved / "pretrain.json").write_text(json.dumps({"format": 1, "lineage": {}, "surgery": [], "checksums": sums}))
    pretrain.load(saved)
    tiny(seed=1).save_pretrained(saved)
    with pytest.raises(PretrainError, match=r"its checksum is not the one in pretrain.json"):
        pretrain.load(saved)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "pretrain.json", "checksums.json"])
def test_one_digit_changed_in_any_file_of_a_checkpoint_is_found(saved, name):
    path = saved / name
    text = path.read_text()
    digit = max(index for index, letter in enumerate(text) if letter.isdigit())
    path.write_text(f"{text[:digit]}{(int(text[digit]) + 1) % 10}{text[digit + 1 :]}")
    json.loads(path.read_text())
    with pytest.raises(PretrainError, match=rf"{name} is damaged"):
        pretrain.load(saved)


def _config(**fields):
    def change(folder):
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(config))

    return change


def _text(name, text):
    return lambda folder: (folder / name).write_text(text)


def _index(text):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def _weights(**changes):
    def change(folder):
        kept = load_file(folder / "model.safetensors") | changes
        save_file({k: v for k, v in kept.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})
        (folder / "pretrain.json").unlink()

    return change


BAD = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no checkpoint at .*; accepted: .* a folder with config.json"),
    "cut config": (_text("config.json", '{"model_type": "lla'), "config.json is not valid JSON"),
    "config of another kind": (_text("config.json", "[]"), "config.json holds a list; accepted: a JSON object"),
    "type misspelt": (_config(model_type="lama"), r"model_type 'lama' \(did you mean 'llama'\?\)"),
    "wrong field": (_config(hidden_size="x"), "config.json: .*hidden_size"),
    "class of another type": (_config(architectures=["BertForMaskedLM"]), r"architectures \['BertForMaskedLM'\]"),
    "not a class": (_config(architectures=["pipeline"]), r"architectures \['pipeline'\]: accepted: the class"),
    "no class": (_config(architectures=None), "architectures None: accepted: the class in transformers of a 'llama'"),
    "more layers": (_config(num_hidden_layers=3), r"9 weights do not fit config.json, first: model.layers.2\S+ is missing"),
    "wider": (_config(vocab_size=98), r"first: lm_head.weight is \(97, 32\) in the file and \(98, 32\) by config.json"),
    "cut record": (_text("pretrain.json", '{"format":'), "pretrain.json is not valid JSON"),
    "record of the future": (_text("pretrain.json", '{"format": 99}'), "pretrain.json: format 99: accepted: up to 1"),
    "cut generation settings": (_text("generation_config.json", '{"a'), "generation_config.json is not valid JSON"),
    "cut tokenizer": (_text("tokenizer.json", '{"a'), "tokenizer.json is not valid JSON"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "missing file .*model.safetensors"),
    "pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        r"pickled weights \(pytorch_model.bin\), which are never read: `pretrain convert \S+ TO` makes",
    ),
    "empty index": (_index("{}"), "index.json is damaged: accepted: a weight_map"),
    "index of elsewhere": (_index('{"weight_map": {"a": "../model.safetensors"}}'), "index.json is damaged"),
    "shard lost": (_index('{"weight_map": {"a": "model-2.safetensors"}}'), "missing file .*model-2.safetensors"),
    "extra weight": (
        _weights(**{"model.layers.0.mlp.up_proj.bias": torch.zeros(48)}), "up_proj.bias has no place in the model",
    ),
    "lost weight": (_weights(**{"model.layers.0.mlp.up_proj.weight": None}), r"first: model.layers.0.mlp.up_proj.weight is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_one_line_that_names_it(saved, case, capfd):
    change, message = BAD[case]
    (saved / "checksums.json").unlink()
    change(saved)
    with pytest.raises(PretrainError, match=message) as caught:
        pretrain.load(saved)
    assert "\n" not in str(caught.value) and str(saved) in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.bits
def test_published_bert_weights_without_use_in_a_masked_model_are_let_be(tiny, tmp_path):
    model = tiny("bert")
    checkpoint.save(model, None, tmp_path / "c")
    extra = {"cls.seq_relationship.bias": torch.zeros(2), "bert.pooler.dense.bias": torch.zeros(32)}
    (tmp_path / "c" / "checksums.json").unlink()
    _weights(**extra)(tmp_path / "c")
    assert torch.equal(logits(pretrain.load(tmp_path / "c")[0]), logits(model))


@pytest.mark.bits
def test_sharded_weights_are_loaded(tiny, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "c", max_shard_size="20KB")
    assert (tmp_path / "c" / "model.safetensors.index.json").exists()
    assert torch.equal(logits(pretrain.load(tmp_path / "c")[0]), logits(model))


def test_weights_that_are_not_finite_are_not_written(tiny, tmp_path):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(PretrainError, match=r"lm_head.weight holds NaN"):
        checkpoint.save(model, None, tmp_path / "c")
    assert not (tmp_path / "c").exists()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import conftest
from pretrain.core import checkpoint, files
from pretrain.core.models.families import new_model
folder, plain_fsync, plain_digest = Path(sys.argv[1]), files.fsync, checkpoint.file_digest
models = [new_model("llama", conftest.TINY["llama"] | {"vocab_size": 97}, seed=seed) for seed in (1, 2)]
checkpoint.save(models[0], None, folder, {"seed": 1})
def save_and_die(at):
    events = 0
    def event(path, plain):
        nonlocal events
        if events == at:
            os.kill(os.getpid(), signal.SIGKILL)
        events += 1
        return plain(path)
    checkpoint.file_digest = lambda path: event(path, plain_digest)  # the weights are written, nothing is synced
    files.fsync = lambda path: event(path, plain_fsync)
    checkpoint.save(models[1], None, folder, {"seed": 2})
    os._exit(0)
for at in range(100):
    child = os.fork()
    if not child:
        save_and_die(at)
    status = os.waitpid(child, 0)[1]
    print(at, os.WIFSIGNALED(status), checkpoint.lineage(folder)["seed"], flush=True)
    model, _ = checkpoint.load(folder)
    seed = checkpoint.lineage(folder)["seed"]
    assert all(map(lambda a, b: bool((a == b).all()), model.parameters(), models[seed - 1].parameters()))
    if not os.WIFSIGNALED(status):
        break
"""


@pytest.mark.processes
@pytest.mark.promise("Faults", "A kill at any moment of writing a checkpoint leaves the old one or the new one, whole.")
def test_a_kill_at_any_moment_of_writing_leaves_a_whole_checkpoint(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "c"), os.path.dirname(__file__)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    kills = [line.split() for line in done.stdout.splitlines()]
    assert len(kills) > 5
    assert [killed for _, killed, _ in kills] == ["True"] * (len(kills) - 1) + ["False"]
    seeds = [int(seed) for _, _, seed in kills]
    assert seeds[-1] == 2 and set(seeds[:-2]) == {1}  # only the last sync comes after the rename


HALF = """
import os, signal, sys
from pathlib import Path
from pretrain.core import files
with files.atomic_folder(Path(sys.argv[1])) as work:
    (work / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.promise(
    "Faults",
    "What a killed command left of a folder that it was writing (`.tmp-*`), an export above all, the next one to write "
    "that folder removes; what another process is writing at the moment it leaves alone.",
)
def test_what_a_killed_writer_left_the_next_one_removes_and_no_living_ones(tmp_path):
    for _ in range(2):
        subprocess.run([sys.executable, "-c", HALF, str(tmp_path / "out")], check=False)
    left = [path for path in tmp_path.iterdir() if (path / "half").exists()]
    assert len(left) == 1  # the second has removed what the first left
    with files.atomic_folder(tmp_path / "out") as first, files.atomic_folder(tmp_path / "out") as second:
        assert not left[0].exists() and {first, second} == {*tmp_path.iterdir()}
        (second / "whole").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.promise("Faults", "A full disk is one line, and what was there stays.")
@pytest.mark.bits
@pytest.mark.parametrize("what", ["weights", "tokenizer", "sync"])
def test_a_full_disk_is_one_clear_error_and_keeps_the_old(tiny, saved, prepared, monkeypatch, what):
    from pretrain.corpus.tokenizers import load_tokenizer

    model, tokenizer, full = tiny(seed=2), load_tokenizer(prepared / "tokenizer"), os.strerror(errno.ENOSPC)

    def fail(error):
        def function(*args, **kwargs):
            raise error

        return function

    if what == "weights":  # the types that safetensors and tokenizers raise on a really full disk
        monkeypatch.setattr(model, "save_pretrained", fail(SafetensorError(f"I/O error: {full} (os error 28)")))
    elif what == "tokenizer":
        monkeypatch.setattr(tokenizer, "save_pretrained", fail(Exception(f"{full} (os error 28)")))
    else:
        monkeypatch.setattr(files, "fsync", fail(OSError(errno.ENOSPC, full)))
    with pytest.raises(PretrainError, match=rf"cannot write {saved}: .*{full}"):
        checkpoint.save(model, tokenizer, saved)
    monkeypatch.undo()
    assert checkpoint.lineage(saved) == {"tokens": 5}
    assert torch.equal(logits(pretrain.load(saved)[0]), logits(tiny()))
    assert [path.name for path in saved.parent.iterdir()] == ["c"]


def test_a_folder_that_cannot_be_made_is_one_clear_error(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PretrainError, match=r"cannot write .*file/c: "):
        checkpoint.save(tiny(), None, tmp_path / "file" / "c")


@pytest.mark.bits
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_transformers_cannot_build_comes_back_by_its_record(tiny, tmp_path, known_surgery, tied):
    model = Factorise((3, 5))(tiny(tie_word_embeddings=tied)).eval()
    checkpoint.save(model, None, tmp_path / "c")
    again, _ = pretrain.load(tmp_path / "c")
    assert torch.equal(logits(again), logits(model))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert again.config.model_type == "llama"
    checkpoint.save(again, None, tmp_path / "d")
    expected = [{"method": "factorise_for_this_test", "config": {"ranks": [3, 5]}, "foreign": True}]
    assert checkpoint.read_record(tmp_path / "d")["surgery"] == expected
    assert torch.equal(logits(pretrain.load(tmp_path / "d")[0]), logits(model))


def test_mixed_precision_comes_back_as_it_was(tiny, tmp_path, known_surgery):
    model = Factorise()(tiny()).eval()
    model.model.layers[0].mlp.up_proj.to(torch.float16)
    checkpoint.save(model, None, tmp_path / "c")
    again, _ = pretrain.load(tmp_path / "c")
    assert {n: p.dtype for n, p in again.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("ranks", "change", "message"),
    [
        (
            (2, 2),
            {"model.layers.0.mlp.up_proj.0.weight": None},
            "first: model.layers.0.mlp.up_proj.0.weight is missing",
        ),
        ((2, 2), {"surplus": torch.ones(1)}, "first: surplus has no place in the model"),
        ((2, 3), {}, "do not fit the recorded surgery: .*size mismatch for model.layers.1.mlp.up_proj.0.weight"),
    ],
)
def test_weights_that_do_not_fit_the_record_are_named(tiny, tmp_path, known_surgery, ranks, change, message):
    checkpoint.save(Factorise()(tiny()), None, tmp_path)
    path = tmp_path / "pretrain.safetensors"
    save_file({k: v for k, v in (load_file(path) | change).items() if v is not None}, path, {"format": "pt"})
    record = json.loads((tmp_path / "pretrain.json").read_text())
    (tmp_path / "checksums.json").unlink()
    record["surgery"][0]["config"]["ranks"] = ranks
    (tmp_path / "pretrain.json").write_text(json.dumps(record))
    with pytest.raises(PretrainError, match=message):
        pretrain.load(tmp_path)


def test_a_recorded_surgery_that_is_not_here_or_has_changed_is_named(tiny, tmp_path, monkeypatch, known_surgery):
    checkpoint.save(Factorise()(tiny()), None, tmp_path)
    (tmp_path / "checksums.json").unlink()
    (tmp_path / "pretrain.json").write_text((tmp_path / "pretrain.json").read_text().replace('"ranks"', '"width"'))
    with pytest.raises(PretrainError, match=r"recorded surgery 'factorise_for_this_test': .*'width'"):
        pretrain.load(tmp_path)
    monkeypatch.undo()
    with pytest.raises(PretrainError, match=r"unknown surgery 'factorise_for_this_test'"):
        pretrain.load(tmp_path)


def test_a_surgery_without_restore_says_that_its_models_are_plain(tiny):
    class Plain(Surgery):
        name = "plain_for_this_test"

    with pytest.raises(PretrainError, match=r"'plain_for_this_test' leaves a plain transformers model"):
        Plain().restore(new_model("gpt2", {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 9}))
