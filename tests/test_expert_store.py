"""Experts that lie elsewhere: the same bits, counted fetches, the next mixture's while one computes, in bounded room."""

from __future__ import annotations

import copy
import json
import threading
import time
import warnings

import pytest
import torch
import zoo
from small_recipe import small_recipe
from test_pre_gated import deep
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.experts import store as stores
from pretrain.core.experts.opening import open_without_experts
from pretrain.core.experts.store import Memory, borrowed_store, give_store, store_of
from pretrain.core.generation.settings import generate
from pretrain.decoding.offloading.expert_store import ExpertStore
from pretrain.engine import run
from pretrain.recipe import load as load_recipe
from pretrain.surgery.adapters.lora import LoRA
from pretrain.surgery.experts.pre_gated import PreGated

FAMILIES = ExpertStore.families
TOKENS = torch.arange(3, 43)[None]
CPU = torch.device("cpu")
BYTES = 3 * 32 * 64 * 4  # of an expert of Mixtral's tiny model: gate, up and down in float32


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens, use_cache=False).logits


def gated(kind, *, yes=True):
    model = deep(kind)
    return PreGated()(model) if yes else model


def lent(model, **fields):
    return borrowed_store(model, "expert_store", FAMILIES, **fields)


def step(model, token, cache=None):
    """The cache after one token more."""
    with torch.no_grad():
        return model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).past_key_values


@pytest.mark.bits
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("pre", [True, False], ids=["pre_gated", "plain"])
@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm", "eager"])
def test_logits_are_those_of_the_model_to_the_bit(kind, pre, way):
    model = gated(kind, yes=pre)
    model.set_experts_implementation(way)
    inputs = (TOKENS, TOKENS[:, :1], TOKENS[:, 5:8], TOKENS.view(8, 5))
    wanted = [logits(model, ids) for ids in inputs]
    for resident in (2, 3, 5, 12, 50):
        with lent(model, resident=resident):
            for _ in range(2):
                assert all(torch.equal(logits(model, ids), want) for ids, want in zip(inputs, wanted, strict=True))
    assert torch.equal(logits(model), wanted[0])


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_model_is_as_it_was_afterwards_and_a_pass_that_breaks_off_harms_nothing(kind):
    model = gated(kind)
    before, wanted = copy.deepcopy(model.state_dict()), logits(model)
    inside = [(name, type(module), len(vars(module))) for name, module in model.named_modules()]
    experts = model.get_submodule(
        "model.layers.1." + ("block_sparse_moe" if kind == "granitemoe" else "mlp") + ".experts"
    )
    with lent(model) as store:

        def fail(*args):
            raise RuntimeError("broken off")

        handle = experts.act_fn.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="broken off"):
            logits(model, TOKENS.flip(1))
        handle.remove()
        assert torch.equal(logits(model), wanted) and store_of(model) is store
    assert store_of(model) is None and torch.equal(logits(model), wanted)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [name for name, _ in experts.named_parameters()] == ["gate_up_proj", "down_proj"]
    for number, (name, module) in enumerate(model.named_modules()):
        assert (name, type(module), len(vars(module))) == inside[number]
        assert not module._forward_pre_hooks and (not module._forward_hooks or name.endswith("embed_tokens"))


def test_one_token_finds_the_first_mixtures_experts_lacking_and_all_others_fetched_ahead():
    model = gated("mixtral")
    with lent(model) as store:  # 2 of 4 experts a token, 3 mixtures: 4 places
        cache = step(model, 5)
        assert vars(store.traffic) | {"seconds_waited": 0} == {
            "hits": 0, "prefetched": 4, "misses": 2, "bytes_fetched": 6 * BYTES, "seconds_waited": 0,
            "bytes_resident": 4 * BYTES, "bytes_of_all": 12 * BYTES,
        }  # fmt: skip
        step(model, 5, cache)
        assert store.traffic.prefetched + store.traffic.hits >= 8 and store.traffic.misses <= 4
        assert store.traffic.bytes_fetched == (store.traffic.misses + store.traffic.prefetched) * BYTES
        assert store.traffic.bytes_resident == 4 * BYTES


@pytest.mark.parametrize("how", ["plain", "no prefetch"])
def test_without_pre_gating_or_without_prefetching_all_are_fetched_on_demand(how):
    model = gated("mixtral", yes=how != "plain")
    with lent(model, prefetch=how == "plain") as store:
        step(model, 5)
        assert (store.traffic.hits, store.traffic.prefetched, store.traffic.misses) == (0, 0, 6)
        assert store.traffic.metrics()["expert_misses"] == 6


def test_where_there_is_room_for_all_each_is_fetched_once():
    model = gated("mixtral")
    with lent(model, resident=99) as store:
        logits(model)
        once = store.traffic.bytes_fetched
        assert once <= 12 * BYTES == store.traffic.bytes_resident
        logits(model)
        assert store.traffic.bytes_fetched == once and store.traffic.hits * BYTES == once


def test_what_was_used_least_recently_gives_way_and_never_what_computes():
    model = gated("mixtral", yes=False)
    with lent(model, resident=2) as store:  # as many as a token is given: each mixture turns the one before out
        step(model, 5)
        assert [key[0] for key in store.slots] == [2, 2] and store.traffic.misses == 6
    with lent(model, resident=6) as store:
        step(model, 5)
        step(model, 5)
        assert store.traffic.hits == 6 and store.traffic.bytes_fetched == 6 * BYTES


def test_a_prompt_has_all_that_it_chooses_of_one_mixture_for_its_turn():
    model = gated("mixtral")
    with lent(model, resident=2) as store:
        logits(model)
        assert store.traffic.bytes_resident == (2 + 4) * BYTES
        assert len(store.slots) <= 2


class Slow(Memory):
    """Says when it begins to read, and takes its time."""

    def __init__(self, weights, seconds=0.0):
        super().__init__(weights)
        self.seconds, self.begun = seconds, [threading.Event() for _ in weights]

    def read(self, mixture, expert, into):
        self.begun[mixture].set()
        time.sleep(self.seconds)
        super().read(mixture, expert, into)


def slow(model, seconds=0.0):
    experts = [layer.mlp.experts for layer in model.model.layers]
    return Slow([(each.gate_up_proj.data, each.down_proj.data) for each in experts], seconds)


@pytest.mark.parametrize("pre", [True, False], ids=["pre_gated", "plain"])
def test_the_next_mixtures_experts_are_read_while_one_computes(pre):
    model = gated("mixtral", yes=pre)
    source, seen = slow(model), []
    for number in (0, 1):
        activation = model.model.layers[number].mlp.experts.act_fn
        activation.register_forward_hook(
            lambda *_, number=number: seen.append(source.begun[number + 1].wait(5 if pre else 0.05))
        )
    store = give_store(model, "expert_store", FAMILIES, source=source, device=CPU)
    step(model, 5)
    assert seen == [pre] * 2
    store.detach(CPU)


def test_time_that_is_waited_is_time_in_which_nothing_computes():
    waited = {}
    for pre in (True, False):
        model = gated("mixtral", yes=pre)
        for layer in model.model.layers:  # as long as two experts take to be fetched
            layer.mlp.experts.act_fn.register_forward_hook(lambda *_: time.sleep(0.12))
        store = give_store(model, "expert_store", FAMILIES, source=slow(model, 0.05), device=CPU)
        step(model, 5)
        waited[pre] = store.traffic.seconds_waited
        store.detach(CPU)
    assert waited[True] > 0.09 and waited[False] > 0.29  # for two experts, and for six
    assert waited[True] < waited[False] - 0.1


def test_what_goes_wrong_where_it_reads_is_told():
    class Gone(Slow):
        gone = True

        def read(self, mixture, expert, into):
            if self.gone and mixture == 1:
                raise PretrainError("the disk is gone; accepted: a disk")
            super().read(mixture, expert, into)

    model = gated("mixtral")
    wanted, source = logits(model, TOKENS[:, :1]), Gone(slow(model).weights)
    store = give_store(model, "expert_store", FAMILIES, source=source, device=CPU)
    for _ in range(2):
        with pytest.raises(PretrainError, match="the disk is gone"):
            logits(model, TOKENS[:, :1])
    source.gone = False  # and what was not read then is read now
    assert torch.equal(logits(model, TOKENS[:, :1]), wanted)
    store.detach(CPU)


@pytest.fixture(scope="module", params=[(kind, pre) for kind in FAMILIES for pre in (False, True)], ids=str)
def saved(request, tmp_path_factory):
    """A checkpoint's folder."""
    kind, pre = request.param
    folder = tmp_path_factory.mktemp("saved") / "c"
    checkpoint.save(gated(kind, yes=pre), None, folder)
    return folder


@pytest.mark.bits
@pytest.mark.parametrize("source", ["disk", "memory"])
def test_opened_with_its_experts_elsewhere_a_checkpoint_answers_as_it_is(saved, source):
    whole, _ = checkpoint.load(saved)
    part, processor = ExpertStore(source=source).load(saved, device=CPU)
    assert processor is None and checkpoint.surgery_of(part) == checkpoint.surgery_of(whole)
    assert torch.equal(logits(part), logits(whole)) and part.config.to_dict() == whole.config.to_dict()
    assert {name: value.dtype for name, value in part.state_dict().items()}.items() <= {
        name: value.dtype for name, value in whole.state_dict().items()
    }.items()
    assert not any(".experts." in name for name, _ in part.named_parameters())
    assert store_of(part).traffic.bytes_of_all == sum(
        value.nbytes for name, value in whole.named_parameters() if ".experts." in name
    )


@pytest.mark.bits
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "granitemoe", "minimax"])
def test_in_bfloat16_too_and_in_several_files(kind, tmp_path):
    model = deep(kind).bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path / "c", max_shard_size="60KB")
    assert len([*(tmp_path / "c").glob("*.safetensors")]) > 1
    whole, _ = checkpoint.load(tmp_path / "c")
    part, _ = ExpertStore(source="disk").load(tmp_path / "c", device=CPU)
    assert logits(whole).dtype == torch.bfloat16 and torch.equal(logits(part), logits(whole))
    buffers = dict(whole.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in part.named_buffers())


def test_from_the_disk_an_expert_is_read_when_it_is_chosen_and_not_before(tmp_path, monkeypatch):
    checkpoint.save(gated("mixtral"), None, tmp_path / "c")
    part, _ = ExpertStore(source="disk").load(tmp_path / "c", device=CPU)
    read, files = [], store_of(part).source
    monkeypatch.setattr(files, "read", lambda m, e, into, real=files.read: (read.append((m, e)), real(m, e, into)))
    assert read == []
    step(part, 5)
    assert len(read) == len(set(read)) == 6


def damaged(folder, name):
    """A checkpoint without its checksums, in which a tensor has another name."""
    from safetensors.torch import load_file, save_file

    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    tensors[name + "_of_another"] = tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "checksums.json").unlink()


def test_files_that_lack_what_the_model_needs_are_one_clear_line(tmp_path, tiny):
    for number, (name, words) in enumerate(
        {
            "model.layers.1.mlp.experts.gate_up_proj": r"no expert 0 of model.layers.1.mlp.experts in its files; accepted: ",
            "model.norm.weight": r"1 weights do not fit config.json, first: model.norm.weight is missing",
        }.items()
    ):
        checkpoint.save(gated("mixtral"), None, tmp_path / str(number))
        damaged(tmp_path / str(number), name)
        with pytest.raises(PretrainError, match=words) as error:
            open_without_experts(tmp_path / str(number), "expert_store", FAMILIES)
        assert "\n" not in str(error.value)
    checkpoint.save(tiny("llama"), None, tmp_path / "llama")
    for source in ("memory", "disk"):
        with pytest.raises(PretrainError, match="expert_store: family 'llama': accepted: mixtral, .*minimax"):
            ExpertStore(source=source).load(tmp_path / "llama", device=CPU)


def test_too_few_places_and_experts_that_are_not_plain_are_refused():
    with pytest.raises(PretrainError, match="expert_store: resident 1: accepted: 2 or more, as many as a token is"):
        ExpertStore(resident=1).generate(deep("mixtral"), TOKENS, max_new_tokens=1)
    with pytest.raises(PretrainError, match=r"resident -1: accepted: 0 or more"):
        ExpertStore(resident=-1)


def test_an_adapter_beside_the_experts_is_part_of_what_is_opened(tmp_path):
    tuned = LoRA(rank=2)(gated("qwen3_moe"))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    checkpoint.save(tuned, None, tmp_path / "c")
    part, _ = ExpertStore(source="disk").load(tmp_path / "c", device=CPU)
    assert torch.equal(logits(part), logits(tuned))


@pytest.mark.bits
@pytest.mark.parametrize("kind", FAMILIES)
def test_continuations_are_those_of_plain_decoding_greedy_and_sampled(kind):
    model = gated(kind)
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    for options in ({}, {"temperature": 1.0, "top_p": 0.9}):
        given = {"max_new_tokens": 6, "pad": 0} | options
        torch.manual_seed(3)
        wanted = generate(model, ids, mask, given)
        torch.manual_seed(3)
        assert torch.equal(ExpertStore().generate(model, ids, attention_mask_BL=mask, **given), wanted)
    seeded = [
        ExpertStore().generate(
            model, ids, max_new_tokens=6, temperature=1.0, generator=torch.Generator().manual_seed(n)
        )
        for n in (0, 0, 1)
    ]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])


def test_stages_measure_and_write_with_it_and_tell_what_it_did(tmp_path, stories):
    small = {name: value for name, value in zoo.fields("mixtral").items() if name != "vocab_size"}
    store = {"method": "expert_store", "source": "disk", "resident": 4}
    evaluation = {
        "stage": "evaluate",
        "checkpoint": "gated",
        "corpus": "corpus",
        "compressors": False,
        "max_documents": 2,
    }
    writing = {"stage": "decode", "checkpoint": "gated", "prompts": ["import "], "max_new_tokens": 4, "temperature": 0}
    text = small_recipe(
        tmp_path, stories[:12],
        {"stage": "surgery", "name": "gated", "checkpoint": "model", "surgeries": ["pre_gated"]},
        evaluation | {"name": "whole"}, evaluation | {"name": "part", "opening": store},
        writing | {"name": "plain"}, writing | {"name": "written", "method": store},
        model={"family": "mixtral", **small}, budget={"steps": 2}, evaluate_tokens=256, held_out=0.3,
    )  # fmt: skip
    (tmp_path / "r.yaml").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(tmp_path / "r.yaml", output=tmp_path / "run", report=False, say=lambda line: None)
    found = {name: stage["metrics"] for name, stage in result.stages.items()}
    assert found["part"]["loss"] == found["whole"]["loss"]
    assert found["part"]["expert_bytes_fetched"] > 0 and "expert_hits" not in found["whole"]
    assert found["written"]["expert_prefetched"] > 0 and found["written"]["expert_seconds_waited"] >= 0
    assert found["written"]["expert_bytes_resident"] <= found["written"]["expert_bytes_of_all"] * 2
    samples = [
        json.loads((tmp_path / "run" / n / "samples.json").read_text())["samples"][0] for n in ("plain", "written")
    ]
    assert samples[0]["continuation"] == samples[1]["continuation"] and samples[1]["method"] == "expert_store"

    again = run(tmp_path / "r.yaml", output=tmp_path / "run", report=False, say=lambda line: None)
    assert again.stages["part"]["metrics"] == found["part"]
    made = CliRunner().invoke(
        app, ["generate", str(tmp_path / "run" / "gated"), "--prompt", "import ", "--max-new-tokens", "4", "--temperature", "0", "--method", json.dumps(store)]
    )  # fmt: skip
    assert made.exit_code == 0 and made.stdout.strip() == ("import " + samples[0]["continuation"]).strip()


def test_an_evaluation_is_opened_by_what_opens(tmp_path, stories):
    text = small_recipe(
        tmp_path, stories[:4],
        {"stage": "evaluate", "checkpoint": "model", "corpus": "corpus", "opening": "prompt_lookup"}, budget={"steps": 1},
    )  # fmt: skip
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(PretrainError, match="prompt_lookup: accepted: a method that opens checkpoints: expert_store"):
        load_recipe(tmp_path / "r.yaml")


def test_an_evaluation_that_is_opened_whole_has_the_address_that_it_had():
    from pretrain.stages.evaluate import Evaluate

    assert "opening" not in Evaluate(checkpoint="a", corpus="b").config()
    assert Evaluate(checkpoint="a", corpus="b", opening="expert_store").config()["opening"]["method"] == "expert_store"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("pre", [True, False], ids=["pre_gated", "plain"])
def test_on_a_gpu_experts_lie_in_the_machine_and_logits_are_the_same(pre, tmp_path):
    checkpoint.save(gated("mixtral", yes=pre), None, tmp_path / "c")
    cuda = torch.device("cuda")
    whole, _ = checkpoint.load(tmp_path / "c", device=cuda)
    ids = TOKENS.to(cuda)
    wanted = logits(whole, ids)
    for source in ("memory", "disk"):
        part, _ = ExpertStore(source=source, resident=4).load(tmp_path / "c", device=cuda)
        assert torch.equal(logits(part, ids), wanted) and torch.equal(logits(part, ids), wanted)
        assert {parameter.device.type for parameter in part.parameters()} == {"cuda"}
    with lent(whole, resident=4):
        assert torch.equal(logits(whole, ids), wanted)
        assert not any(".experts." in name for name, _ in whole.named_parameters())
    assert torch.equal(logits(whole, ids), wanted) and {p.device.type for p in whole.parameters()} == {"cuda"}
    assert stores.store_of(whole) is None
