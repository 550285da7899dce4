"""Checkpoints: plain transformers opens them, damage is named, an interrupted write loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import pretrain
from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.families import set_module
from pretrain.surgery import Surgery

PLAIN = """
import sys, torch, transformers
assert not any(name.startswith("pretrain") for name in sys.modules)
folder, auto = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder).eval()
tokens = torch.arange(3, 23)[None]
extra = {"decoder_input_ids": tokens} if auto == "AutoModelForSeq2SeqLM" else {}
with torch.no_grad():
    torch.save(model(input_ids=tokens, **extra).logits, folder + "/logits.pt")
"""
AUTO = {"llama": "CausalLM", "gpt2": "CausalLM", "bert": "MaskedLM", "modernbert": "MaskedLM", "t5": "Seq2SeqLM"}


@pytest.mark.parametrize("name", AUTO)
def test_plain_transformers_opens_it_with_equal_logits(tiny, tmp_path, name):
    model = tiny(name)
    checkpoint.save(model, None, tmp_path / "c", {"tokens": 5})
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "c"), f"AutoModelFor{AUTO[name]}"]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""})
    tokens = torch.arange(3, 23)[None]
    extra = {"decoder_input_ids": tokens} if name == "t5" else {}
    with torch.no_grad():
        expected = model(input_ids=tokens, **extra).logits
        ours = pretrain.load(tmp_path / "c")[0](input_ids=tokens, **extra).logits
    assert torch.equal(torch.load(tmp_path / "c" / "logits.pt"), expected)
    assert torch.equal(ours, expected)
    assert checkpoint.lineage(tmp_path / "c") == {"tokens": 5}


def test_tied_weights_are_stored_once_and_the_tokenizer_comes_back(tiny, tmp_path, prepared):
    from safetensors import safe_open

    from pretrain.corpus.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(prepared / "tokenizer")
    checkpoint.save(tiny(tie_word_embeddings=True), tokenizer, tmp_path / "c")
    with safe_open(tmp_path / "c" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    model, again = pretrain.load(tmp_path / "c")
    assert again("import os")["input_ids"] == tokenizer("import os")["input_ids"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_named(tiny, tmp_path, share):
    checkpoint.save(tiny(), None, tmp_path / "c")
    path = tmp_path / "c" / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(PretrainError, match=r"model.safetensors is truncated or damaged"):
        pretrain.load(tmp_path / "c")


def test_a_flipped_bit_is_found_by_the_checksum(tiny, tmp_path):
    checkpoint.save(tiny(), None, tmp_path / "c")
    path = tmp_path / "c" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(PretrainError, match="checksum"):
        pretrain.load(tmp_path / "c")


def test_what_is_missing_or_pickled_or_does_not_fit_is_named(tiny, tmp_path):
    with pytest.raises(PretrainError, match=r"no config.json"):
        pretrain.load(tmp_path)
    checkpoint.save(tiny(), None, tmp_path / "c")
    (tmp_path / "c" / "pretrain.json").unlink()
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(PretrainError, match="weights do not fit config.json: missing keys, first model.layers.2"):
        pretrain.load(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").rename(tmp_path / "c" / "pytorch_model.bin")
    with pytest.raises(PretrainError, match="pickled weights"):
        pretrain.load(tmp_path / "c")
    (tmp_path / "c" / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(PretrainError, match=r"config.json is not valid JSON"):
        pretrain.load(tmp_path / "c")


def test_sharded_weights_are_loaded(tiny, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "c", max_shard_size="20KB")
    assert (tmp_path / "c" / "model.safetensors.index.json").exists()
    tokens = torch.arange(3, 9)[None]
    assert torch.equal(pretrain.load(tmp_path / "c")[0](tokens).logits, model(tokens).logits)


def test_weights_that_are_not_finite_are_not_written(tiny, tmp_path):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(PretrainError, match=r"lm_head.weight holds NaN"):
        checkpoint.save(model, None, tmp_path / "c")
    assert not (tmp_path / "c").exists()


KILLED = """
import sys, signal, os
sys.path.insert(0, {tests!r})
from pathlib import Path
import conftest
from pretrain.core import checkpoint, files
from pretrain.core.families import new_model
synced, at = 0, int(sys.argv[2])
def fsync(path, plain=files.fsync):
    global synced
    synced += 1
    if synced == at:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(path)
files.fsync = fsync
model = new_model("llama", conftest.TINY["llama"] | dict(vocab_size=97), seed=int(sys.argv[3]))
checkpoint.save(model, None, Path(sys.argv[1]), dict(seed=int(sys.argv[3])))
"""


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path, at):
    program = KILLED.format(tests=os.path.dirname(__file__))
    for when, seed in ((0, 1), (at, 2)):
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "c"), str(when), str(seed)], check=False)
        assert done.returncode == (-signal.SIGKILL if when else 0)
    pretrain.load(tmp_path / "c")
    assert checkpoint.lineage(tmp_path / "c") == {"seed": 1}


def test_a_full_disk_is_one_clear_error_and_keeps_the_old(tiny, tmp_path, monkeypatch):
    from pretrain.core import files

    checkpoint.save(tiny(seed=1), None, tmp_path / "c", {"seed": 1})

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "fsync", full)
    with pytest.raises(PretrainError, match=r"cannot write .*/c: No space left on device"):
        checkpoint.save(tiny(seed=2), None, tmp_path / "c")
    monkeypatch.undo()
    assert checkpoint.lineage(tmp_path / "c") == {"seed": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


class Factors(nn.Module):
    linear_like = True

    def __init__(self, rows, columns, rank):
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(rows, rank)), nn.Parameter(torch.randn(rank, columns))

    def forward(self, x):
        return x @ (self.left @ self.right).T


@dataclass(frozen=True)
class Factorise(Surgery):
    rank: int = 2
    name = "factorise_for_this_test"

    def restore(self, model):
        for block in model.model.layers:
            old = block.mlp.up_proj
            set_module(block, "mlp.up_proj", Factors(*old.weight.shape, self.rank))
        return model

    def __call__(self, model, inputs=None):
        checkpoint.record(self.restore(model), self)
        return model


def test_a_model_that_transformers_cannot_build_comes_back_by_its_record(tiny, tmp_path, monkeypatch):
    model = Factorise(3)(tiny()).eval()
    checkpoint.save(model, None, tmp_path / "c")
    monkeypatch.setattr(checkpoint, "method_class", lambda name, kind: {"factorise_for_this_test": Factorise}[name])
    tokens = torch.arange(3, 9)[None]
    again, _ = pretrain.load(tmp_path / "c")
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    checkpoint.save(again, None, tmp_path / "d")
    assert checkpoint.read_record(tmp_path / "d")["surgery"] == [
        {"method": "factorise_for_this_test", "config": {"rank": 3}}
    ]
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "c"), "AutoModelForCausalLM"]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    assert plain.returncode != 0 and "pretrain_llama" in plain.stderr
