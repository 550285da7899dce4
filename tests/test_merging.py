"""Merges of models: equal to mergekit's, to the formulas written out, and read weight by weight."""

from __future__ import annotations

import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.forecast import forecast
from pretrain.identity import plan
from pretrain.recipe import check
from pretrain.surgery import Inputs
from pretrain.surgery.merging._streams import Place, Stored, at_place, places
from pretrain.surgery.merging.model_stock import share_of_mean


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """`folders(family)`: checkpoints of five models of six blocks, made once."""
    made = {}

    def of(family):
        if family not in made:
            home, layers = tmp_path_factory.mktemp(family), {"gpt2": "n_layer"}.get(family, "num_hidden_layers")
            for number in range(5):
                checkpoint.save(tiny(family, seed=number, **{layers: 6}), None, home / str(number))
            made[family] = [str(home / str(number)) for number in range(5)]
        return made[family]

    return of


def merged(name, start, **fields):
    """The weights of the checkpoint after the merge."""
    return method_class(name)(**fields)(checkpoint.load(start)[0], Inputs(seed=3)).state_dict()


def theirs(given, folder):
    """The weights that mergekit makes."""
    merge = pytest.importorskip("mergekit.merge")
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    merge.run_merge(MergeConfiguration.model_validate({"dtype": "float32"} | given), str(folder), options)
    return checkpoint.load(folder)[0].state_dict()


def assert_equal(mine, wanted):
    assert mine.keys() == wanted.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6, msg=name)


def as_filters(setting):
    """A setting as mergekit writes it."""
    if isinstance(setting, dict):
        return [{"filter": part, "value": as_filters(value)} for part, value in setting.items()]
    return list(setting) if isinstance(setting, tuple) else setting


GRADIENT, FILTERED = (0.2, 0.9, 0.5), {"mlp": (0.1, 0.8), "attn": 0.3, "*": 0.6}
TASK_VECTORS = {
    "task_arithmetic": {},
    "ties": {"density": (0.3, GRADIENT)},
    "breadcrumbs": {"density": (0.3, GRADIENT), "gamma": 0.04},
    "breadcrumbs_ties": {"density": (0.3, GRADIENT), "gamma": 0.04, "elect": True},
    "dare_linear": {"density": (0.3, GRADIENT), "rescale": "l1"},
    "dare_ties": {"density": (0.3, GRADIENT), "rescale": "l1", "elect": True},
    "della": {"density": (0.3, GRADIENT), "rescale": "l1", "epsilon": 0.05},
    "della_linear": {
        "density": (0.3, GRADIENT), "rescale": "l1", "epsilon": 0.05, "elect": False, "normalize": False,
    },
}  # fmt: skip


@pytest.fixture
def same_numbers(monkeypatch):
    """What is drawn for a weight of a model depends on its task vector alone, here and in mergekit."""
    bernoulli = torch.bernoulli

    def drawn(kept, *, generator=None):
        source = torch.Generator().manual_seed(kept.numel())
        return bernoulli(kept.float(), generator=source).to(kept)

    monkeypatch.setattr(torch, "bernoulli", drawn)


@pytest.mark.parametrize("name", TASK_VECTORS)
def test_a_merge_of_task_vectors_is_mergekits(folders, tmp_path, same_numbers, name):
    start, *models = folders("llama")[:3]
    weights, ours = (0.7, FILTERED), TASK_VECTORS[name]
    method = name if name == "task_arithmetic" else name.partition("_")[0]
    mine = merged(method, start, models=tuple(models), weights=weights, scale=1.3, **ours)
    each = [
        {
            "model": model,
            "parameters": {"weight": as_filters(weights[number])}
            | {field: as_filters(value[number]) for field, value in ours.items() if isinstance(value, tuple)},
        }
        for number, model in enumerate(models)
    ]
    numbers = {field: ours[field] for field in ("gamma", "epsilon") if field in ours}
    given = {"merge_method": name, "base_model": start, "models": each, "parameters": {"lambda": 1.3} | numbers}
    assert_equal(mine, theirs(given, tmp_path / "merged"))


@pytest.mark.parametrize("t", [0.3, GRADIENT, FILTERED], ids=["number", "gradient", "filters"])
def test_slerp_is_mergekits(folders, tmp_path, t):
    start, other = folders("gpt2")[:2]
    given = {"merge_method": "slerp", "base_model": start, "models": [{"model": m} for m in (start, other)]}
    wanted = theirs(given | {"parameters": {"t": as_filters(t)}}, tmp_path / "merged")
    assert_equal(merged("slerp", start, other=other, t=t), wanted)


@pytest.mark.parametrize("normalize", [True, False])
def test_linear_is_mergekits(folders, tmp_path, normalize):
    models, weights = folders("gpt2")[:3], (0.7, FILTERED, GRADIENT)
    each = [{"model": m, "parameters": {"weight": as_filters(w)}} for m, w in zip(models, weights, strict=True)]
    given = {"merge_method": "linear", "models": each, "parameters": {"normalize": normalize}}
    mine = merged("linear_merge", models[0], models=tuple(models[1:]), weights=weights, normalize=normalize)
    assert_equal(mine, theirs(given, tmp_path / "merged"))


@pytest.mark.parametrize("count", [2, 3])
def test_model_stock_is_mergekits(folders, tmp_path, count):
    start, *models = folders("llama")[: count + 1]
    given = {"merge_method": "model_stock", "base_model": start, "models": [{"model": m} for m in models]}
    assert_equal(merged("model_stock", start, models=tuple(models)), theirs(given, tmp_path / "merged"))


def test_model_stock_goes_back_by_the_angle_of_two_models():
    assert share_of_mean([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])]) == 0
    assert share_of_mean([torch.tensor([1.0, 2.0])] * 2) == pytest.approx(1)
    sixty = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.75**0.5])
    assert share_of_mean([*sixty]) == pytest.approx(2 * 0.5 / (1 + 0.5))
    assert share_of_mean([torch.zeros(2), torch.zeros(2)]) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_passthrough_is_mergekits(folders, tmp_path, family):
    models, slices = folders(family)[:2], ((0, 0, 4), (1, 2, 6), (0, 5, 6))
    scale = (1.0, {"mlp": (0.5, 1.5), "*": 1.0}, (0.25, 2.0))
    each = [
        {"sources": [{"model": models[which], "layer_range": [start, end], "parameters": {"scale": as_filters(by)}}]}
        for (which, start, end), by in zip(slices, scale, strict=True)
    ]
    wanted = theirs({"merge_method": "passthrough", "slices": each}, tmp_path / "merged")
    assert_equal(merged("passthrough", models[0], models=(models[1],), slices=slices, scale=scale), wanted)


def test_blocks_of_which_nothing_comes_out_change_nothing(folders):
    start, other = folders("llama")[:2]
    silent = {"o_proj": 0.0, "down_proj": 0.0, "*": 1.0}
    slices, scale = ((0, 0, 4), (1, 2, 4), (0, 4, 6)), (1.0, silent, 1.0)
    model, _ = checkpoint.load(start)
    wanted = model(torch.arange(3, 23)[None]).logits
    made = method_class("passthrough")(slices, (other,), scale)(model)
    assert made.config.num_hidden_layers == 8 and torch.equal(made(torch.arange(3, 23)[None]).logits, wanted)


def test_slerp_keeps_to_the_arc_between_its_ends(folders):
    start, other = folders("gpt2")[:2]
    first, last = (checkpoint.load(folder)[0].state_dict() for folder in (start, other))
    ends = [merged("slerp", start, other=other, t=t) for t in (0.0, 1.0)]
    half, name = merged("slerp", start, other=other), "transformer.wte.weight"
    for wanted, end in zip((first, last), ends, strict=True):
        assert all(torch.equal(wanted[each], tensor) for each, tensor in end.items())
    a, b = first[name].double(), last[name].double()
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    torch.testing.assert_close(half[name].double(), (a + b) / (2 * torch.cos(angle / 2)), rtol=0, atol=1e-8)


def test_ties_trims_elects_and_averages_those_that_agree(tiny, tmp_path):
    start, models = tiny(), [tiny(), tiny(), tiny()]
    vectors = [[0.9, -0.5, 0.1, 0.0], [-0.4, -0.7, 0.2, 0.1], [0.3, 0.9, -0.1, 0.05]]
    with torch.no_grad():
        for model, vector in zip((start, *models), ([0.0] * 4, *vectors), strict=True):
            model.model.norm.weight.fill_(1)
            model.model.norm.weight[:4] += torch.tensor(vector)
    for number, model in enumerate((start, *models)):
        checkpoint.save(model, None, tmp_path / str(number))
    folders = tuple(str(tmp_path / str(number)) for number in (1, 2, 3))
    # Of 32 numbers 2 are kept of each: 0.9 -0.5 | -0.4 -0.7 | 0.3 0.9; their sums are 0.8 and -0.3.
    found = merged("ties", tmp_path / "0", models=folders, density=(2 / 32,))["model.norm.weight"][:4] - 1
    torch.testing.assert_close(found, torch.tensor([(0.9 + 0.3) / 2, (-0.5 - 0.7) / 2, 0, 0]), rtol=0, atol=1e-6)


def test_dare_and_della_keep_the_mean_of_a_task_vector(tiny, tmp_path):
    start, other = tiny(vocab_size=4000), tiny(vocab_size=4000)
    name, vector = "model.embed_tokens.weight", torch.linspace(0.5, 1.5, 4000 * 32).view(4000, 32)
    with torch.no_grad():
        start.get_parameter(name).zero_()
        other.get_parameter(name).copy_(vector)
    for number, model in enumerate((start, other)):
        checkpoint.save(model, None, tmp_path / str(number))
    for method, epsilon in (("dare", 0.0), ("della", 0.1)):
        fields = {"epsilon": epsilon} if epsilon else {}
        made = merged(method, tmp_path / "0", models=(str(tmp_path / "1"),), density=(0.2,), **fields)[name]
        kept = made != 0
        assert float(kept.double().mean()) == pytest.approx(0.2, abs=0.005)
        assert float(made.double().mean()) == pytest.approx(1.0, abs=0.02)
        for column, share in ((0, 0.2 - epsilon), (31, 0.2 + epsilon)):  # rows rise
            assert float(kept[:, column].double().mean()) == pytest.approx(share, abs=0.03)
            torch.testing.assert_close((made / vector)[:, column][kept[:, column]].mean(), torch.tensor(1 / share))


def test_breadcrumbs_leave_the_middle(tiny, tmp_path):
    start, other = tiny(), tiny()
    with torch.no_grad():
        start.model.norm.weight.zero_()
        other.model.norm.weight.copy_(torch.arange(1.0, 33.0) * (-1) ** torch.arange(32))
    for number, model in enumerate((start, other)):
        checkpoint.save(model, None, tmp_path / str(number))
    models = (str(tmp_path / "1"),)
    made = merged("breadcrumbs", tmp_path / "0", models=models, density=(0.25,), gamma=0.1)["model.norm.weight"]
    assert made.nonzero().flatten().tolist() == [*range(21, 29)]  # of 32 the 3 largest go, and 8 are left
    made = merged("breadcrumbs", tmp_path / "0", models=models, density=(0.25,), gamma=0.0)["model.norm.weight"]
    assert made.nonzero().flatten().tolist() == [*range(24, 32)]


def test_a_setting_is_spread_over_the_blocks_and_chosen_by_the_longest_part_of_the_name(tiny):
    assert [at_place((0.0, 1.0, 0.0), Place("x", depth)) for depth in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.5, 1.0, 0.0]
    parts = {"attn": 1.0, "self_attn.q": 2.0, "*": 3.0}
    assert [at_place(parts, Place(f"a.{n}", 0.0)) for n in ("self_attn.q_proj", "self_attn.k", "mlp")] == [2, 1, 3]
    where = places(tiny(num_hidden_layers=5))
    assert where["model.layers.3.mlp.up_proj.weight"].depth == 0.75
    assert {where[name].depth for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")} == {0}
    both = places(tiny("t5"))
    assert {name.split(".")[0] for name, place in both.items() if place.depth} == {"encoder", "decoder"}


EVERY = {
    "task_arithmetic": {"models": 4},
    "ties": {"models": 4},
    "dare": {"models": 4},
    "della": {"models": 4},
    "breadcrumbs": {"models": 4},
    "linear_merge": {"models": 4},
    "model_stock": {"models": 4},
    "passthrough": {"models": 1, "slices": ((0, 0, 2), (1, 1, 6))},
    "slerp": {},
}


def fields_of(name, folders):
    """The fields of a merge of the first checkpoint with as many others as `EVERY` gives it."""
    count = EVERY[name].get("models")
    return EVERY[name] | ({"models": tuple(folders[1 : count + 1])} if count else {"other": folders[1]})


@pytest.mark.parametrize("name", EVERY)
def test_the_other_models_are_read_weight_by_weight_and_never_whole(folders, monkeypatch, name):
    alive, most, whole = weakref.WeakSet(), 0, []
    read = Stored.read

    def counted(self, weight):
        nonlocal most
        tensor = read(self, weight)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    start, *others = folders("llama")
    model = checkpoint.load(start)[0]
    monkeypatch.setattr(Stored, "read", counted)
    monkeypatch.setattr("pretrain.surgery.merging._streams.load", whole.append)
    method_class(name)(**fields_of(name, [start, *others]))(model)
    room = 2 if name == "passthrough" else EVERY[name].get("models", 1)  # which holds the last while it reads the next
    assert not whole and most <= room


def test_shards_and_weights_without_prefix_are_read_and_bfloat16_stays(tiny, tmp_path):
    for number in (0, 1):
        checkpoint.save(tiny("gpt2", seed=number).bfloat16(), None, tmp_path / str(number))
    wanted = merged("slerp", tmp_path / "0", other=str(tmp_path / "1"))
    assert wanted["transformer.wte.weight"].dtype == torch.bfloat16
    for kind in ("shards", "bare"):
        folder = tmp_path / kind
        folder.mkdir()
        shutil.copy(tmp_path / "1" / "config.json", folder)
        tensors = load_file(tmp_path / "1" / "model.safetensors")
        if kind == "bare":
            tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            continue
        weight_map = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
        for file in {*weight_map.values()}:
            save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for kind in ("shards", "bare"):
        made = merged("slerp", tmp_path / "0", other=str(tmp_path / kind))
        assert all(torch.equal(made[name], tensor) for name, tensor in wanted.items())


def test_a_model_whose_files_name_weights_otherwise_is_read_through_a_copy(tiny, tmp_path):
    fields = {"num_local_experts": 2, "num_experts_per_tok": 1, "hidden_size": 16, "intermediate_size": 24}
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**fields, vocab_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    models = []
    for number in (0, 1):
        torch.manual_seed(number)
        models.append(MixtralForCausalLM(config))
        checkpoint.save(models[-1], None, tmp_path / str(number))
    made = merged("task_arithmetic", tmp_path / "0", models=(str(tmp_path / "1"),), weights=(0.25,))
    first, second = (model.state_dict() for model in models)
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, torch.lerp(first[name], second[name], 0.25), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_what_does_not_fit_is_refused(tiny, tmp_path, folders, name):
    texts = ["the quick brown fox"], ["over the lazy dog"]
    for number, text in enumerate(texts):
        made = train_tokenizer(text * 3, vocab_size=290)
        checkpoint.save(tiny(vocab_size=300), made, tmp_path / str(number))
    model, tokenizer = checkpoint.load(tmp_path / "0")
    fields = fields_of(name, [str(tmp_path / "0"), *[str(tmp_path / "1")] * 4])
    with pytest.raises(PretrainError, match=rf"{name}: token \d+ is .+; accepted: vocabularies of which the shorter"):
        method_class(name)(**fields)(model, Inputs(tokenizer=tokenizer))
    other = fields_of(name, folders("llama"))
    if name == "passthrough":
        with pytest.raises(PretrainError, match=r"passthrough: slices \[1, 1, 7\]: accepted: up to 6"):
            method_class(name)(**other | {"slices": ((1, 1, 7),)})(model, Inputs())
        return
    with pytest.raises(PretrainError, match=f"{name}: .+ has num_hidden_layers 6 in its config; accepted: 2"):
        method_class(name)(**other)(model, Inputs())
    other = fields_of(name, folders("gpt2"))
    with pytest.raises(PretrainError, match=f"{name}: .+ is a GPT2LMHeadModel; accepted: a LlamaForCausalLM"):
        method_class(name)(**other)(model, Inputs())


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("ties", {"models": ()}, r"models \[\]: accepted: one or more"),
        ("ties", {"models": ("a", "b", "c"), "weights": (1.0, 2.0)}, r"weights .*: accepted: 1 for all, or 3"),
        ("ties", {"models": ("a",), "density": (0.0,)}, r"density \(0.0,\): accepted: "),
        ("ties", {"models": ("a",), "density": ((),)}, r"density \(\): accepted: at least 1 number"),
        ("della", {"models": ("a",), "density": (0.1,)}, r"epsilon 0.15: accepted: below 0.1 with density 0.1"),
        ("model_stock", {"models": ("a",)}, r"models \['a'\]: accepted: two or more"),
        ("linear_merge", {"models": ("a",), "weights": (1.0,) * 3}, r"weights .*: accepted: 1 for all, or 2"),
        ("passthrough", {"slices": ()}, r"slices \[\]: accepted: one or more"),
        ("passthrough", {"slices": ((1, 0, 2),)}, r"slices \[1, 0, 2\]: accepted: .* from 0 \(the checkpoint\) to 0"),
        ("passthrough", {"slices": ((0, 2, 2),)}, r"slices \[0, 2, 2\]: accepted: .* an end after the block"),
        ("slerp", {"other": "a", "t": {"mlp": 0.5}}, r"t .*: accepted: a mapping with '\*'"),
        ("slerp", {"other": "a", "t": (0.5, 1.5)}, r"t \(0.5, 1.5\): accepted: "),
    ],
)
def test_settings_that_leave_gaps_are_refused(name, fields, message):
    with pytest.raises(PretrainError, match=f"^{name}: {message}"):
        method_class(name)(**fields)


@pytest.mark.parametrize("name", EVERY)
def test_what_a_merge_takes_in_memory_counts_the_other_models(folders, tmp_path, name):
    """As a stage's `models` do: each is as much as the checkpoint, which is there twice."""
    start, *others = folders("llama")

    def expected(surgeries):
        stages = [{"stage": "surgery", "name": "s", "checkpoint": start, "surgeries": surgeries}]
        return forecast(plan(check({"stages": stages}, output=tmp_path / "run")))[0].estimate.memory_bytes

    fields = fields_of(name, [start, *others])
    references = method_class(name)(**fields).references()
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    one = 4.0 * sum(p.numel() for p in checkpoint.load(start)[0].parameters())
    more = expected([{"method": name} | listed]) - expected(["zero_init"])
    assert references and more >= 0.9 * len(references) * one
