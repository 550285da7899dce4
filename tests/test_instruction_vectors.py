"""Instruction residual and instruction vector: the sums, what they give exactly, and vocabularies that have grown."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.surgery import Inputs
from pretrain.surgery.merging.instruction_residual import InstructionResidual
from pretrain.surgery.merging.instruction_vector import InstructionVector

TOKENS = torch.arange(3, 23)[None]
BOTH = pytest.mark.parametrize("method", [InstructionResidual, InstructionVector])


@pytest.fixture
def saved(tmp_path):
    """Save models, and a tokenizer where one is given; their folders in order."""

    def save(*given):
        folders = []
        for number, one in enumerate(given):
            model, tokenizer = one if isinstance(one, tuple) else (one, None)
            folders.append(str(tmp_path / f"c{number}"))
            checkpoint.save(model, tokenizer, folders[-1])
        return folders

    return save


def numbers(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@BOTH
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "modernbert", "t5"])
def test_a_checkpoint_that_is_the_base_becomes_the_instruct_model_exactly(tiny, saved, method, family):
    base, instruct = tiny(family), tiny(family, seed=1)
    with torch.no_grad():  # a sum even in float64 loses the smaller of such two
        base.get_input_embeddings().weight[5] = 1.0
        instruct.get_input_embeddings().weight[5] = 1e-30
    made = method(*saved(base, instruct))(copy.deepcopy(base))
    assert all(torch.equal(p, instruct.get_parameter(n)) for n, p in made.named_parameters())


@BOTH
def test_an_instruct_model_that_is_the_base_changes_nothing(tiny, saved, method):
    base, continued = tiny(), tiny(seed=1)
    with torch.no_grad():
        base.model.embed_tokens.weight[5], continued.model.embed_tokens.weight[5] = 1.0, 1e-30
    before = numbers(continued)
    made = method(*saved(base, base))(continued)
    assert all(torch.equal(p, before[n]) for n, p in made.named_parameters())


def test_the_residual_is_scaled_added_and_rounded_once(tiny, saved):
    base, instruct, continued = (tiny(seed=seed, tie_word_embeddings=True) for seed in range(3))
    folders, before = saved(base, instruct), numbers(continued)
    made = InstructionResidual(*folders, scale=0.7)(copy.deepcopy(continued))
    for name, parameter in made.named_parameters():
        residual = instruct.get_parameter(name).double() - base.get_parameter(name).double()
        wanted = before[name].double() + 0.7 * residual
        assert torch.allclose(parameter.double(), wanted, rtol=2**-24 + 1e-12, atol=1e-15), name
    assert made.lm_head.weight is made.model.embed_tokens.weight
    none = InstructionResidual(*folders, scale=0.0)(copy.deepcopy(continued))
    assert all(torch.equal(p, before[n]) for n, p in none.named_parameters())


def test_the_two_vectors_are_weighted_and_their_cosine_is_told(tiny, saved):
    base, instruct, continued = (tiny(seed=seed) for seed in range(3))
    folders, before, inputs = saved(base, instruct), numbers(continued), Inputs()
    made = InstructionVector(*folders, instruction=0.5, domain=0.8)(continued, inputs)
    one, two = [], []
    for name, parameter in made.named_parameters():
        start = base.get_parameter(name).double()
        one.append((instruct.get_parameter(name) - start).flatten())
        two.append((before[name] - start).flatten())
        wanted = start.flatten() + 0.5 * one[-1] + 0.8 * two[-1]
        assert (parameter.double().flatten() - wanted).abs().max() < 1e-7, name
    cosine = torch.nn.functional.cosine_similarity(torch.cat(one), torch.cat(two), dim=0)
    assert inputs.extra["metrics"]["instruction_vector/cosine"] == pytest.approx(cosine.item(), abs=1e-9)


def test_with_both_factors_1_the_vector_is_the_residual(tiny, saved):
    base, instruct, continued = (tiny(seed=seed) for seed in range(3))
    folders = saved(base, instruct)
    one, other = (m(*folders)(copy.deepcopy(continued)) for m in (InstructionResidual, InstructionVector))
    assert all(torch.equal(p, other.get_parameter(n)) for n, p in one.named_parameters())


@BOTH
def test_rows_that_only_the_checkpoint_has_stay(tiny, saved, method):
    base, instruct, continued = tiny(), tiny(seed=1), tiny(seed=2, vocab_size=101)
    before = numbers(continued)
    made = method(*saved(base, instruct))(continued)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = made.get_parameter(name)
        assert table.shape == (101, 32) and torch.equal(table[97:], before[name][97:])
        wanted = before[name][:97].double() + instruct.get_parameter(name).double() - base.get_parameter(name).double()
        assert (table[:97] - wanted).abs().max() < 1e-7


@BOTH
@pytest.mark.bits
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_rows_that_only_the_instruct_model_has_are_added(tiny, saved, method, family, tmp_path):
    base, instruct, continued = tiny(family), tiny(family, seed=1, vocab_size=103), tiny(family, seed=2)
    with torch.no_grad():
        if family == "bert":
            instruct.cls.predictions.bias.copy_(torch.arange(103))
    before = numbers(continued)
    made = method(*saved(base, instruct))(continued)
    assert made.config.vocab_size == 103 and made(TOKENS).logits.shape[-1] == 103
    for name, parameter in instruct.named_parameters():
        mine = made.get_parameter(name)
        assert mine.shape == parameter.shape, name
        rows = 97 if len(parameter) == 103 else len(parameter)
        assert torch.equal(mine[rows:], parameter[rows:]), name
        wanted = before[name].double() + parameter[:rows].double() - base.get_parameter(name).double()
        assert (mine[:rows] - wanted).abs().max() < 1e-6, name
    checkpoint.save(made, None, tmp_path / "merged")
    assert torch.equal(checkpoint.load(tmp_path / "merged")[0](TOKENS).logits, made(TOKENS).logits)


@BOTH
def test_weights_in_half_precision_are_added_in_full(tiny, saved, method):
    base, instruct, continued = (tiny(seed=seed).bfloat16() for seed in range(3))
    before = numbers(continued)
    made = method(*saved(base, instruct))(continued)
    for name, parameter in made.named_parameters():
        wanted = before[name].double() + instruct.get_parameter(name).double() - base.get_parameter(name).double()
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, wanted.bfloat16()), name


@pytest.fixture(scope="module")
def tokenizers():
    """Of a base, of an instruct model with one more token and a template, and of a model continued with another."""
    base = train_tokenizer(["some text to learn from"] * 3, algorithm="bytes")
    instruct, other = copy.deepcopy(base), copy.deepcopy(base)
    instruct.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    instruct.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    other.add_tokens(["somewhere"])
    return base, instruct, other


@BOTH
def test_the_tokenizer_gets_the_tokens_and_the_template_of_the_instruct_model(tiny, saved, tokenizers, method):
    base, instruct, _ = tokenizers
    models = tiny(vocab_size=258), tiny(vocab_size=259, seed=1), tiny(vocab_size=258, seed=2)
    folders, inputs = saved((models[0], base), (models[1], instruct)), Inputs(tokenizer=base)
    made = method(*folders)(models[2], inputs)
    found = inputs.extra["tokenizer"]
    assert found.get_vocab() == instruct.get_vocab() and made.config.vocab_size == len(found) == 259
    assert found.apply_chat_template([{"content": "hi"}], tokenize=False) == "<|user|>hi"
    assert base.chat_template is None


@BOTH
def test_the_template_comes_to_a_tokenizer_that_has_grown(tiny, saved, tokenizers, method):
    base, instruct, other = tokenizers
    tuned = copy.deepcopy(base)
    tuned.chat_template = instruct.chat_template
    models = tiny(vocab_size=258), tiny(vocab_size=258, seed=1), tiny(vocab_size=259, seed=2)
    folders, inputs = saved((models[0], base), (models[1], tuned)), Inputs(tokenizer=other)
    method(*folders)(models[2], inputs)
    found = inputs.extra["tokenizer"]
    assert found.get_vocab() == other.get_vocab() and found.chat_template == instruct.chat_template
    assert other.chat_template is None


@BOTH
def test_settings_for_generation_are_those_of_the_instruct_model(tiny, saved, method):
    base, instruct, continued = (tiny(seed=seed) for seed in range(3))
    instruct.generation_config.eos_token_id = [2, 7]
    assert method(*saved(base, instruct))(continued).generation_config.eos_token_id == [2, 7]


@BOTH
def test_vocabularies_that_grew_apart_are_refused(tiny, saved, tokenizers, method):
    base, instruct, other = tokenizers
    models = tiny(vocab_size=258), tiny(vocab_size=259, seed=1), tiny(vocab_size=259, seed=2)
    folders = saved((models[0], base), (models[1], instruct))
    with pytest.raises(PretrainError, match=r"token 258 is '.+' in .+ and '.+' in .+; accepted: vocabularies of which"):
        method(*folders)(models[2], Inputs(tokenizer=other))


@BOTH
def test_models_that_do_not_fit_are_named(tiny, saved, method):
    name = {"InstructionResidual": "instruction_residual"}.get(method.__name__, "instruction_vector")
    folders = saved(tiny(), tiny(intermediate_size=40), tiny("gpt2"))
    with pytest.raises(PretrainError, match=rf"^{name}: instruct has model\.layers\.0\.mlp\.\S+ of shape \(40, 32\)"):
        method(folders[0], folders[1])(tiny())
    with pytest.raises(PretrainError, match=f"^{name}: base is a GPT2LMHeadModel; accepted: a LlamaForCausalLM"):
        method(folders[2], folders[0])(tiny())
    with pytest.raises(PretrainError, match=f"^{name}: instruct '': accepted: an earlier stage or"):
        method(folders[0], "")(tiny())
    assert method("a", "b").references() == {"base": "a", "instruct": "b"}


def test_factors_must_be_numbers():
    with pytest.raises(PretrainError, match="instruction_residual: scale nan: accepted: a finite number"):
        InstructionResidual("a", "b", scale=math.nan)
    with pytest.raises(PretrainError, match="instruction_vector: domain inf: accepted: a finite number"):
        InstructionVector("a", "b", domain=math.inf)
