"""What every decoding method promises, on each causal family that it declares; `examples` has one of each.

A new method is held to it without being named here.
"""

from __future__ import annotations

import copy

import pytest
import torch
import yaml
from conftest import TASK, TINY
from examples import NEVER_PLAIN, PLAIN, declared, example, names

from pretrain.core.errors import PretrainError
from pretrain.core.generation.healing import Healing
from pretrain.core.generation.loop import decode
from pretrain.core.method import method_class
from pretrain.core.registry import methods
from pretrain.recipe import load
from pretrain.stages import dump

CAUSAL = [family for family in TINY if TASK[family] == "causal"]
CASES = [(name, family) for name in names("decoding") for family in CAUSAL if declared(name, family)]
TEXTS = ("the lazy dog sleeps over the fox", "the quick fox", "dog")
NEW, PAD = 6, 7


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, shelf):
    """A decoding method's name, itself and a model; not to be changed."""
    name, family = request.param
    return name, family, example(name, shelf, family), shelf.decoded(family)


@pytest.fixture(scope="module")
def prompts(shelf):
    """`ids_BL` and `mask_BL` of texts of three lengths, padded on the left."""
    rows = [shelf.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    most = max(map(len, rows))
    ids_BL = torch.tensor([[PAD] * (most - len(row)) + row for row in rows])
    return ids_BL, torch.tensor([[0] * (most - len(row)) + [1] * len(row) for row in rows])


def run(method, model, prompts, **options):
    ids_BL, mask_BL = prompts
    given = {"attention_mask_BL": mask_BL, "max_new_tokens": NEW, "pad": PAD}
    call = decode if method is None else method.generate
    return call(model, ids_BL, **given | options)


def cut(tokens_N, start, eos):
    """A row up to its end, and padding."""
    new = tokens_N[start:].tolist()
    end = new.index(eos) + 1 if eos in new else len(new)
    return tokens_N[:start].tolist() + new[:end] + [PAD] * (len(new) - end)


def seeded(seed):
    return {"temperature": 1.0, "top_p": 0.9, "generator": torch.Generator().manual_seed(seed)}


@pytest.mark.parametrize("name", names("decoding"))
def test_a_recipe_gives_the_same_method_and_unknown_fields_are_refused(name, shelf, tmp_path):
    method, path = example(name, shelf), tmp_path / "r.yaml"
    stage = {
        "name": "s",
        "stage": "decode",
        "checkpoint": shelf.saved("llama"),
        "prompts": ["the"],
        "method": dump(method),
    }
    path.write_text(yaml.safe_dump({"stages": [stage]}))
    assert load(path).stages[0].method == method
    path.write_text(yaml.safe_dump({"stages": [stage | {"method": dump(method) | {"no_such": 1}}]}))
    with pytest.raises(
        PretrainError, match=rf"s.method: unknown field 'no_such' of decoding '{name}'.*accepted: "
    ) as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", names("decoding"))
def test_a_family_that_is_not_declared_is_refused_in_one_line_with_those_that_are(name, shelf, prompts):
    accepted = ", ".join(methods()[name].families) or "a causal language model"
    for family in TINY:
        if not (declared(name, family) and family in CAUSAL):
            with pytest.raises(PretrainError, match=rf"accepted: .*{accepted}") as error:
                run(example(name, shelf), shelf.model(family), prompts)
            assert "\n" not in str(error.value)


def test_rows_together_are_the_rows_alone(case, prompts):
    _, _, method, model = case
    ids_BL, mask_BL = prompts
    together_BN = run(method, model, prompts)
    assert torch.equal(together_BN[:, : ids_BL.shape[1]], ids_BL) and together_BN.shape[1] == ids_BL.shape[1] + NEW
    for row, length in enumerate(mask_BL.sum(1).tolist()):
        alone_1N = run(method, model, (ids_BL[row : row + 1, -length:], mask_BL[row : row + 1, -length:]))
        assert torch.equal(together_BN[row, -length - NEW :], alone_1N[0])


def test_rows_end_at_their_end_and_no_row_is_longer_than_asked(case, prompts):
    _, _, method, model = case
    start, whole_BN = prompts[0].shape[1], run(method, model, prompts)
    assert torch.equal(run(method, model, prompts, max_new_tokens=2), whole_BN[:, : start + 2])
    for eos in whole_BN[:, start + 2].tolist():
        found_BN = run(method, model, prompts, eos=eos)
        wanted = [cut(row_N, start, eos) for row_N in whole_BN]
        width = found_BN.shape[1]
        assert found_BN.tolist() == [row[:width] for row in wanted]
        assert all(set(row[width:]) <= {PAD} for row in wanted)  # all have ended there
        assert width == len(wanted[0]) or any(row[width - 1] != PAD for row in wanted)


def test_a_seed_decides_the_samples(case, prompts):
    _, _, method, model = case
    if not method.samples:
        with pytest.raises(PretrainError, match="temperature"):
            run(method, model, prompts, **seeded(0))
        return
    one, again, other = (run(method, model, prompts, **seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_where_nothing_is_lost_tokens_and_samples_are_those_of_plain_decoding(case, prompts, shelf):
    name, family, method, model = case
    if name in NEVER_PLAIN:
        assert not torch.equal(run(method, model, prompts), run(None, model, prompts))
        return
    method = method if method.lossless else method_class(name)(**PLAIN[name](shelf, family))
    for options in ({}, {"eos": int(run(None, model, prompts)[0, -3])}):
        assert torch.equal(run(method, model, prompts, **options), run(None, model, prompts, **options))
    if method.samples:
        assert torch.equal(run(method, model, prompts, **seeded(3)), run(None, model, prompts, **seeded(3)))
    one = first(prompts)
    assert torch.equal(run(method, model, one, healing=bound(one)), run(None, model, one, healing=bound(one)))


def first(prompts):
    """The longest of them alone, since what is healed is one prompt."""
    return tuple(each[:1] for each in prompts)


def bound(prompts):
    """Of a word that may be written as 3 and 4, or as 5 or 6."""
    return Healing((3, 4), {(): [3, 5, 6], (3,): [4]}, prompts[0].shape[1])


def test_the_first_tokens_are_those_that_healing_lets_stand(case, prompts):
    _, _, method, model = case
    one = first(prompts)
    for options in [{}, *(seeded(seed) for seed in range(3) if method.samples)]:
        new = run(method, model, one, healing=bound(one), **options)[0, one[0].shape[1] :].tolist()
        assert new[:2] == [3, 4] or new[0] in (5, 6)


@pytest.mark.bits
def test_the_model_is_as_it_was_afterwards(case, prompts):
    _, _, method, model = case
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config)
    inside = [(name, type(module), len(vars(module))) for name, module in model.named_modules()]
    with torch.no_grad():
        wanted = model(prompts[0]).logits
    run(method, model, prompts)
    with pytest.raises(IndexError):
        run(method, model, (prompts[0] + 1000, prompts[1]))
    with torch.no_grad():
        assert torch.equal(model(prompts[0]).logits, wanted) and model.config.to_dict() == config.to_dict()
    assert model.config._attn_implementation == config._attn_implementation and not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert inside == [(name, type(module), len(vars(module))) for name, module in model.named_modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
def test_it_decodes_in_bfloat16(case, prompts, autocast):
    _, _, method, model = case
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found_BN = run(method, model if autocast else copy.deepcopy(model).bfloat16(), prompts)
    assert found_BN.shape == (3, prompts[0].shape[1] + NEW) and torch.equal(found_BN[:, :-NEW], prompts[0])
    assert all(0 <= token < model.config.vocab_size for token in found_BN.flatten().tolist())
