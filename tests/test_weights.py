"""Weights lie in aligned memory however they came: loaded, sharded, rebuilt by surgeries, resumed."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from torch import nn

from pretrain.core import checkpoint
from pretrain.core.method import method_class
from pretrain.core.weights import ALIGNMENT, align, aligned, load_tensors
from pretrain.training import state
from pretrain.training.background import Background
from pretrain.training.distributed import World

TOKENS = torch.arange(3, 23)[None]
STARTS = (0, 8, 24, 40, 56)  # where a file's data begin, modulo 64; safetensors fills its header up to a multiple of 8


def logits(model: Any) -> torch.Tensor:
    extra = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=TOKENS, **extra).logits


def astray(model: nn.Module) -> list[str]:
    """The parameters and buffers that do not lie on a multiple of 64 bytes."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if tensor.data_ptr() % ALIGNMENT]


def start(path: Path) -> int:
    """Where the data of a file of weights begin, modulo 64: after 8 bytes and the header, whose length they hold."""
    return (8 + struct.unpack("<Q", path.read_bytes()[:8])[0]) % ALIGNMENT


def shift(folder: Path, to: int) -> None:
    """Lengthen the headers of a checkpoint's files until their data begin at `to` modulo 64."""
    for path in folder.glob("*.safetensors"):
        tensors, padding = load_file(path), 0
        while start(path) != to:
            padding += 1
            # Written beside it: the old file is mapped by the tensors that are written.
            save_file(tensors, path.with_suffix(".new"), metadata={"format": "pt", "padding": "x" * padding})
            path.with_suffix(".new").replace(path)
    (folder / "checksums.json").unlink(missing_ok=True)  # of the files before


@pytest.mark.bits
@pytest.mark.parametrize("family", TINY)
def test_a_loaded_model_is_aligned_and_computes_the_same_bits_wherever_its_file_begins(tiny, tmp_path, family):
    model = tiny(family)
    checkpoint.save(model, None, tmp_path)
    for to in STARTS:
        shift(tmp_path, to)
        again, _ = checkpoint.load(tmp_path)
        assert astray(again) == []
        assert torch.equal(logits(again), logits(model)), to
    narrow, _ = checkpoint.load(tmp_path, dtype=torch.bfloat16)
    assert astray(narrow) == [] and {p.dtype for p in narrow.parameters()} == {torch.bfloat16}


@pytest.mark.bits
@pytest.mark.parametrize("to", STARTS)
def test_sharded_and_tied_weights_are_aligned_and_stay_tied(tiny, tmp_path, to):
    model = tiny("llama", tie_word_embeddings=True, hidden_size=20, num_attention_heads=2, num_key_value_heads=1)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    (tmp_path / "pretrain.json").write_text('{"format": 1}')
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    shift(tmp_path, to)
    again, _ = checkpoint.load(tmp_path)
    assert astray(again) == [] and again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


@pytest.mark.bits
@pytest.mark.parametrize("method", [
    method_class("lora")(rank=3, where="all"), method_class("svfit")(rank=3), method_class("gptq")(solver="rtn"),
    method_class("pela")(0.5), method_class("sltrain")(rank=3),
], ids=lambda method: method.name)  # fmt: skip
@pytest.mark.parametrize("to", [8, 56])
def test_what_a_surgery_put_in_is_aligned_too(tiny, tmp_path, method, to):
    model = method(tiny()).eval()
    checkpoint.save(model, None, tmp_path)
    shift(tmp_path, to)
    again, _ = checkpoint.load(tmp_path)
    assert astray(again) == [] and again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(again), logits(model))


def off(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, 4 bytes behind a multiple of 64."""
    room = torch.empty(tensor.numel() + 1)[1:].view(tensor.shape)
    return room.copy_(tensor)


def test_aligning_keeps_values_identities_layout_and_what_is_shared():
    model = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))
    first, second, third = model
    for layer in (first, third):
        layer.weight = nn.Parameter(off(layer.weight.detach()), requires_grad=False)
    second.weight = first.weight  # tied: one object
    third.bias = nn.Parameter(off(torch.ones(3)))
    first.register_buffer("seen", third.bias.detach())  # one piece of memory under two objects
    first.register_buffer("turned", off(torch.rand(4, 6)).T)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept, before = model[1].bias.data_ptr(), [id(parameter) for parameter in model.parameters()]
    assert len(astray(model)) == 5
    assert align(model) is model and astray(model) == []
    assert [id(parameter) for parameter in model.parameters()] == before and second.weight is first.weight
    assert model[1].bias.data_ptr() == kept, "what is aligned is not copied"
    assert first.seen.data_ptr() == third.bias.data_ptr() and first.turned.stride() == (1, 6)
    assert not first.weight.requires_grad and third.bias.requires_grad
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


def test_a_files_tensors_are_aligned_and_what_is_aligned_already_is_not_copied(tmp_path):
    tensors = {f"t{n}": torch.rand(n) for n in range(1, 20)} | {"none": torch.empty(0), "one": torch.tensor(1.5)}
    save_file(tensors, tmp_path / "some.safetensors")
    found = load_tensors(tmp_path / "some.safetensors")
    assert all(t.data_ptr() % ALIGNMENT == 0 for t in found.values())
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert aligned(tensors["t3"]) is tensors["t3"]


def test_a_training_state_comes_back_aligned(tmp_path):
    def made():
        layer = nn.Linear(5, 3)
        return layer, torch.optim.AdamW(layer.parameters())

    layer, optimizer = made()
    layer(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    policies = {"average": {"odd": torch.ones(3), "more": torch.ones(7)}}
    alone = World(0, 1, torch.device("cpu"))
    with Background(alone) as background:
        state.save(tmp_path, 1, layer, optimizer, policies, {}, alone, 1, background)
    fresh, other = made()
    _, came = state.load(state.newest(tmp_path), fresh, other)
    moments = [t for entries in other.state.values() for t in entries.values()]
    everything = [*fresh.parameters(), *moments, *came["average"].values()]
    assert len(everything) == 2 + 6 + 2 and all(t.data_ptr() % ALIGNMENT == 0 for t in everything)
