"""Packed weights in AWQ's own layout: unpacked by the rule that AutoAWQ publishes, they are the matrices that were packed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from test_gptq import TOKENS, batches
from transformers import LlamaForCausalLM
from transformers.utils.quantization_config import AwqConfig

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.exchange.exporting import export
from pretrain.core.quick.hub import located
from pretrain.identity import state_of
from pretrain.surgery import Inputs
from pretrain.surgery.compression.awq import AWQ
from pretrain.surgery.compression.gptq import GPTQ

KERNEL = [0, 2, 4, 6, 1, 3, 5, 7]  # by AutoAWQ's `order_map`: bits 4i of a word hold output 8w + KERNEL[i]


@pytest.fixture
def saved(tiny, tmp_path):
    """`saved(surgery)`: the folder of a model after it."""

    def made(surgery, family="llama", **fields):
        model = surgery(tiny(family, **fields), Inputs(batches=batches()))
        checkpoint.save(model, None, tmp_path / "c")
        return tmp_path / "c"

    return made


def by_hand(stored, name):
    """The weight O x I, number by number."""
    qweight, qzeros, scales = (stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    inputs, outputs = len(qweight), scales.shape[1]
    size = inputs // len(scales)
    weight = torch.empty(outputs, inputs)
    for o in range(outputs):
        word, shift = o // 8, 4 * KERNEL.index(o % 8)
        for i in range(inputs):
            code, zero = (int(t[row, word]) >> shift & 15 for t, row in ((qweight, i), (qzeros, i // size)))
            weight[o, i] = (code - zero) * float(scales[i // size, o])
    return weight


@pytest.mark.parametrize(
    "surgery", [AWQ(group_size=16, ratios=3), GPTQ(group_size=-1, solver="rtn")], ids=["awq", "rtn"]
)
@pytest.mark.parametrize("tied", [False, True])
def test_each_matrix_is_the_one_that_was_packed_and_a_plain_model_of_them_answers_alike(saved, tmp_path, surgery, tied):
    source = saved(surgery, tie_word_embeddings=tied)
    packed, _ = checkpoint.load(source)
    facts = export(source, tmp_path / "out", "awq")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    names = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    assert len(names) == facts["matrices"] == 14 and facts["logits_off"] <= 1e-4 * facts["logits_span"]
    weights = {name: tensor.float() for name, tensor in stored.items() if name.rpartition(".")[0] not in names}
    for name in names:
        weights[f"{name}.weight"] = by_hand(stored, name)
        assert torch.equal(weights[f"{name}.weight"], packed.get_submodule(name).dense())
        assert {part: stored[f"{name}.{part}"].dtype for part in ("qweight", "qzeros", "scales")} == {
            "qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16,
        }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    said = config.pop("quantization_config")
    plain = LlamaForCausalLM(type(packed.config).from_dict(config)).eval()
    lacking, stray = plain.load_state_dict(weights, strict=False)
    assert not stray and lacking == (["lm_head.weight"] if tied else [])
    plain.tie_weights()
    for parameter in packed.parameters():
        parameter.data = parameter.data.half().float()
    torch.testing.assert_close(plain(TOKENS).logits, packed(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert (said["quant_method"], said["version"], said["zero_point"]) == ("awq", "gemm", True)
    known = AwqConfig(**{k: v for k, v in said.items() if k != "quant_method"})
    assert (known.bits, known.group_size, known.modules_to_not_convert) == (4, surgery.group_size, ["lm_head"])
    assert config["dtype"] == "float16" and {t.dtype for t in stored.values()} == {torch.float16, torch.int32}


REFUSED = {
    "other bits": (GPTQ(bits=8, group_size=16, solver="rtn"), {}, "has 8 bits: accepted: bits 4, for AWQ"),
    "no zeros": (GPTQ(group_size=16, symmetric=True, solver="rtn"), {}, "symmetric grid, without zeros: accepted: symmetric false"),
    "scattered groups": (GPTQ(group_size=16, desc_act=True), {}, "groups of scattered inputs: accepted: desc_act false"),
    "odd outputs": (GPTQ(group_size=16, solver="rtn"), {"intermediate_size": 44}, "has 44 outputs: accepted: a multiple of 8"),
    "groups that end early": (GPTQ(group_size=24, solver="rtn"), {}, "inputs in . groups: accepted: groups that are all of one size"),
    "several sizes": (GPTQ(group_size=48, solver="rtn"), {"intermediate_size": 96}, "groups of several sizes; accepted, for AWQ: one size"),
    "nothing packed": (GPTQ(group_size=16, solver="rtn", pack=False), {}, "holds no packed weights; accepted, for AWQ"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_layout_cannot_hold_is_one_line(case, saved, tmp_path):
    surgery, fields, message = REFUSED[case]
    with pytest.raises(PretrainError, match=message) as caught:
        export(saved(surgery, **fields), tmp_path / "out", "awq")
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("biases", [False, True])
def test_a_folder_in_the_layout_opens_as_the_checkpoint_it_was_written_of(biases, saved, tmp_path, monkeypatch):
    """To the bit in what is packed; all else is rounded to float16, biases too, and goes out again as it came."""
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    source = saved(AWQ(group_size=16, ratios=3), attention_bias=biases)
    export(source, tmp_path / "out", "awq")
    before, _ = checkpoint.load(source)
    again, _ = checkpoint.load(tmp_path / "out")
    for name, tensor in before.state_dict().items():
        assert torch.equal(
            again.state_dict()[name].float(), tensor.half().float() if tensor.is_floating_point() else tensor.float()
        ), name
    assert state_of(located(str(tmp_path / "out"))).startswith("awq ")
    export(tmp_path / "out", tmp_path / "twice", "awq")
    files = [(tmp_path / place / "model.safetensors").read_bytes() for place in ("out", "twice")]
    assert files[0] == files[1]


FOREIGN = {
    "another kernel's": ({"version": "gemv"}, r"quantization_config.version 'gemv': accepted, of AWQ: gemm"),
    "other bits": ({"bits": 8}, r"quantization_config.bits 8: accepted, of AWQ: 4"),
    "no zeros": ({"zero_point": False}, r"quantization_config.zero_point False: accepted, of AWQ: true"),
    "other groups": ({"group_size": 8}, r"rows of scales, of 32 inputs in groups of 8; accepted: packed weights in AWQ's"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_another_layout_is_refused_in_one_line_where_it_is_opened(case, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    export(saved(GPTQ(group_size=16, solver="rtn")), tmp_path / "out", "awq")
    (tmp_path / "out" / "checksums.json").unlink()
    fields, message = FOREIGN[case]
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= fields
    path.write_text(json.dumps(config))
    with pytest.raises(PretrainError, match=message) as caught:
        checkpoint.load(tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
