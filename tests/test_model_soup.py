"""Model soups: exact means, the paper's greedy recipe, and which models cannot be averaged."""

from __future__ import annotations

import copy
from dataclasses import make_dataclass

import pytest
import torch

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.evaluation.likelihood.calibration import Calibration
from pretrain.evaluation.likelihood.held_out import HeldOut
from pretrain.surgery import Inputs
from pretrain.surgery.architecture.pre_rmsnorm import PreRMSNorm
from pretrain.surgery.merging.model_soup import ModelSoup

DOCUMENTS = 1
TOKENS = torch.arange(3, 23)[None]


def near(model, amount, seed):
    """A copy of the model, each weight moved at random."""
    moved, source = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=source).to(parameter.dtype)
    return moved


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "modernbert", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_soup_of_one_model_is_that_model_bit_for_bit(tiny, family, dtype):
    model = tiny(family).to(dtype)
    for count, weights in ((2, ()), (6, ()), (2, (0.3, 0.1, 0.37))):
        soup = ModelSoup("uniform", weights)(model, Inputs(models=[copy.deepcopy(model) for _ in range(count)]))
        assert soup is not model
        for (name, mine), theirs in zip(soup.state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype, name


def test_the_soup_is_the_weighted_mean_of_the_weights_and_leaves_its_ingredients_alone(tiny):
    models = [tiny(seed=seed, tie_word_embeddings=True) for seed in range(3)]
    before = [{n: p.clone() for n, p in model.named_parameters()} for model in models]
    soup = ModelSoup("uniform", (1.0, 2.0, -0.5))(models[0], Inputs(models=models[1:]))
    for name, parameter in soup.named_parameters():
        wanted = (before[0][name].double() + 2 * before[1][name].double() - 0.5 * before[2][name].double()) / 2.5
        assert torch.equal(parameter, wanted.float()), name
        assert all(torch.equal(b[name], m.get_parameter(name)) for b, m in zip(before, models, strict=True))
    assert soup.lm_head.weight is soup.model.embed_tokens.weight
    uniform = ModelSoup("uniform")(models[0], Inputs(models=models[1:]))
    assert torch.equal(
        uniform.lm_head.weight, torch.stack([b["model.embed_tokens.weight"].double() for b in before]).mean(0).float()
    )


def test_the_mean_rounds_once_where_the_weights_are_narrow(tiny):
    models = [tiny(seed=seed).bfloat16() for seed in range(5)]
    soup = ModelSoup("uniform")(models[0], Inputs(models=models[1:]))
    for name, parameter in soup.named_parameters():
        assert torch.equal(
            parameter, torch.stack([m.get_parameter(name).float() for m in models]).mean(0).bfloat16()
        ), name


@pytest.mark.parametrize("weights", [(), (0.3, 1.7)])
@pytest.mark.parametrize(("family", "fields"), [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {})])
def test_a_soup_is_the_linear_merge_of_mergekit(tiny, tmp_path, family, fields, weights):
    merge = pytest.importorskip("mergekit.merge")
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    models = [tiny(family, seed=seed, **fields) for seed in range(2)]
    for number, model in enumerate(models):
        checkpoint.save(model, None, tmp_path / str(number))
    shares = [{"weight": share} for share in weights or (1.0, 1.0)]
    said = {
        "merge_method": "linear",
        "dtype": "float32",
        "models": [{"model": str(tmp_path / str(i)), "parameters": share} for i, share in enumerate(shares)],
    }
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    merge.run_merge(MergeConfiguration.model_validate(said), str(tmp_path / "merged"), options)
    theirs = checkpoint.load(tmp_path / "merged")[0].state_dict()
    mine = ModelSoup("uniform", weights)(models[0], Inputs(models=models[1:])).state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def text(prepared):
    """Where the corpus is, its tokenizer, and how the loss on its validation documents is measured."""
    tokenizer = load_tokenizer(prepared / "tokenizer")
    documents = Corpus(prepared / "corpus").sample("validation", DOCUMENTS)
    return str(prepared / "corpus"), tokenizer, lambda model: HeldOut()(model, tokenizer, documents).metrics["loss"]


def greedy(corpus, **fields):
    return ModelSoup(corpus=corpus, max_documents=DOCUMENTS, **fields)


@pytest.mark.bits
def test_the_greedy_soup_is_the_papers_recipe_written_out(tiny, text):
    corpus, tokenizer, loss = text
    start = tiny(vocab_size=512)
    models = [near(start, amount, seed) for seed, amount in enumerate((0.03, 0.2, 0.02, 0.6, 0.025), 10)]
    inputs = Inputs(tokenizer=tokenizer, models=models[1:])
    soup = greedy(corpus)(models[0], inputs)

    def mean(chosen):
        made = copy.deepcopy(start)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.copy_(torch.stack([m.get_parameter(name).double() for m in chosen]).mean(0))
        return made

    order = sorted(models, key=loss)
    chosen = [order[0]]
    for candidate in order[1:]:
        if loss(mean([*chosen, candidate])) <= loss(mean(chosen)):
            chosen.append(candidate)
    assert 1 < len(chosen) < 5  # the case is worth testing
    wanted = dict(mean(chosen).named_parameters())
    assert all(torch.allclose(p, wanted[n], atol=1e-7) for n, p in soup.named_parameters())
    told = inputs.extra["metrics"]
    assert told["model_soup/ingredients"] == len(chosen)
    assert told["model_soup/soup"] == pytest.approx(loss(soup), abs=1e-9)
    assert told["model_soup/best_ingredient"] == pytest.approx(min(map(loss, models)), abs=1e-9)


@pytest.mark.bits
def test_the_greedy_soup_is_never_worse_than_the_best_ingredient(tiny, text):
    corpus, tokenizer, loss = text
    models = [near(tiny(vocab_size=512), 0.5, seed) for seed in range(3)]
    soup = greedy(corpus)(models[0], Inputs(tokenizer=tokenizer, models=models[1:]))
    assert loss(soup) <= min(map(loss, models))


@pytest.mark.bits
def test_the_best_alone_is_the_ingredient_of_the_lowest_loss_bit_for_bit(tiny, text):
    corpus, tokenizer, loss = text
    models = [near(tiny(vocab_size=512), 0.5, seed) for seed in range(3)]
    inputs = Inputs(tokenizer=tokenizer, models=models[1:])
    best, wanted = greedy(corpus, recipe="best")(models[0], inputs), min(models, key=loss)
    assert all(torch.equal(p, wanted.get_parameter(name)) for name, p in best.named_parameters())
    told = inputs.extra["metrics"]
    assert told["model_soup/ingredients"] == 1 and told["model_soup/soup"] == told["model_soup/best_ingredient"]


@pytest.mark.bits
def test_the_evaluation_may_be_given_with_its_fields(tiny, text, prepared):
    corpus, tokenizer, _ = text
    models = [near(tiny(vocab_size=512), 0.5, seed) for seed in range(2)]
    fields = {"method": "held_out", "length": 8}
    found = []
    for given in ({"evaluation": fields}, {"length": 8}):
        inputs = Inputs(tokenizer=tokenizer, models=models[1:])
        greedy(corpus, **given)(models[0], inputs)
        found.append(inputs.extra["metrics"])
    assert found[0] == found[1]
    assert greedy(corpus, evaluation={"method": "task", "objective": "classification"}).parts() == (
        "task",
        "classification",
    )


@pytest.mark.bits
def test_windows_are_of_the_length_asked_for(tiny, text, prepared):
    corpus, tokenizer, _ = text
    models = [near(tiny(vocab_size=512), 0.5, seed) for seed in range(2)]
    inputs = Inputs(tokenizer=tokenizer, models=models[1:])
    soup = greedy(corpus, length=8)(models[0], inputs)
    documents = Corpus(prepared / "corpus").sample("validation", DOCUMENTS)
    wanted = HeldOut(length=8)(soup, tokenizer, documents).metrics["loss"]
    assert inputs.extra["metrics"]["model_soup/soup"] == pytest.approx(wanted, abs=1e-9)


@pytest.mark.bits
def test_equal_models_all_join_and_the_better_side_can_be_the_higher_one(tiny, text):
    corpus, tokenizer, loss = text
    model, other = tiny(vocab_size=512), near(tiny(vocab_size=512), 0.4, 1)
    inputs = Inputs(tokenizer=tokenizer, models=[copy.deepcopy(model), copy.deepcopy(model)])
    greedy(corpus)(model, inputs)
    assert inputs.extra["metrics"]["model_soup/ingredients"] == 3
    worst = greedy(corpus, better="higher")(model, Inputs(tokenizer=tokenizer, models=[other]))
    assert loss(worst) >= max(loss(model), loss(other))


def test_which_way_is_better_follows_from_the_metric(tiny, text, prepared):
    """By an accuracy the best model is the one with the highest, and nobody need say so."""
    corpus, tokenizer, _ = text
    models = [near(tiny(vocab_size=512), 0.3, seed) for seed in range(4)]
    documents = Corpus(prepared / "corpus").sample("validation", DOCUMENTS)
    evaluation = Calibration(bins=2)
    right = [evaluation(model, tokenizer, documents).metrics["token_accuracy"] for model in models]
    assert max(right) > min(right)
    inputs = Inputs(tokenizer=tokenizer, models=models[1:])
    soup = ModelSoup(
        "best", corpus=corpus, evaluation={"method": "calibration", "bins": 2}, metric="token_accuracy",
        max_documents=DOCUMENTS,
    )(models[0], inputs)  # fmt: skip
    best = models[right.index(max(right))]
    assert torch.equal(soup.lm_head.weight, best.lm_head.weight)
    assert inputs.extra["metrics"]["model_soup/soup"] == pytest.approx(max(right))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tiny: tiny("gpt2"), r"models\.1 is a GPT2LMHeadModel; accepted: a LlamaForCausalLM"),
        (lambda tiny: tiny(num_hidden_layers=3), r"models\.1 has the weight model\.layers\.2\.\S+, which the checkpoint does not have"),
        (lambda tiny: tiny(num_hidden_layers=1), r"models\.1 does not have the weight model\.layers\.1\.\S+, which the checkpoint has"),
        (lambda tiny: tiny(tie_word_embeddings=True), r"models\.1 does not have the weight lm_head\.weight,.*tied alike"),
        (lambda tiny: tiny(intermediate_size=40), r"models\.1 has model\.layers\.0\.mlp\.\S+ of shape \(40, 32\); accepted: \(48, 32\)"),
        (lambda tiny: tiny(vocab_size=99), r"models\.1 has model\.embed_tokens\.weight of shape \(99, 32\)"),
        (lambda tiny: tiny(rope_theta=5e5), r"models\.1 has rope_parameters .* accepted: .*10000"),
    ],
)  # fmt: skip
def test_the_first_difference_is_named(tiny, change, message):
    with pytest.raises(PretrainError, match=r"^model_soup: " + message):
        ModelSoup("uniform")(tiny(), Inputs(models=[tiny(seed=1), change(tiny)]))


def test_what_training_alone_reads_may_differ(tiny):
    ModelSoup("uniform")(tiny(), Inputs(models=[tiny(seed=1, attention_dropout=0.1, eos_token_id=5)]))


def test_whole_numbers_must_be_equal_and_are_kept(tiny):
    models = [tiny(seed=seed) for seed in range(2)]
    for model in models:
        model.model.register_buffer("chosen", torch.tensor([3, 5]))
        model.model.register_buffer("passing", torch.rand(3), persistent=False)
    assert ModelSoup("uniform")(models[0], Inputs(models=models[1:])).model.chosen.tolist() == [3, 5]
    models[1].model.chosen += 1
    with pytest.raises(
        PretrainError, match=r"models\.0 has other values in model\.chosen \(torch\.int64\), which has no mean"
    ):
        ModelSoup("uniform")(models[0], Inputs(models=models[1:]))


def test_a_model_of_other_surgeries_is_refused(tiny):
    with pytest.raises(PretrainError, match="has been through pre_rmsnorm; accepted: no recorded surgery"):
        ModelSoup("uniform")(tiny("gpt2"), Inputs(models=[PreRMSNorm()(tiny("gpt2"))]))
    one, other = (PreRMSNorm()(tiny("gpt2", seed=seed)) for seed in range(2))
    assert checkpoint.surgery_of(ModelSoup("uniform")(one, Inputs(models=[other]))) == checkpoint.surgery_of(one)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipe": "stew"}, "recipe 'stew': accepted: greedy, uniform, best"),
        ({}, "corpus '': accepted: one with validation documents, or recipe uniform"),
        ({"corpus": "c", "weights": (1.0, 2.0)}, r"weights \[1.0, 2.0\]: accepted: none with recipe greedy"),
        ({"recipe": "uniform", "weights": (1.0, -1.0)}, r"weights \[1.0, -1.0\]: accepted: numbers whose sum is not 0"),
        ({"recipe": "best"}, "corpus '': accepted: one with validation documents, or recipe uniform"),
        ({"recipe": "best", "corpus": "c", "weights": (1.0,)}, r"weights \[1.0\]: accepted: none with recipe best"),
        ({"corpus": "c", "evaluation": {"method": "task", "goal": 1}}, "evaluation 'task': .*accepted fields: objective"),
        ({"corpus": "c", "metric": "glow"}, "metric 'glow': it is not known which way it is better; accepted: better: low"),
        ({"corpus": "c", "better": "best"}, "better 'best': accepted: lower, higher"),
        ({"corpus": "c", "max_documents": 0}, "max_documents 0: accepted: 1 or more"),
        ({"corpus": "c", "length": -1}, "length -1: accepted: 0 or more"),
        ({"corpus": "c", "evaluation": "held_in"}, "unknown evaluation 'held_in'"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(PretrainError, match=message):
        ModelSoup(**fields)


def test_an_evaluation_without_windows_takes_no_length(monkeypatch):
    monkeypatch.setattr(
        "pretrain.core.method.nested", lambda *_: make_dataclass("N", [], namespace={"name": "held_out"})()
    )
    with pytest.raises(PretrainError, match="length 64: accepted: 0 with held_out, which has no windows"):
        ModelSoup(corpus="c", length=64)


def test_what_is_missing_is_named(tiny, text, prepared):
    corpus, tokenizer, _ = text
    with pytest.raises(PretrainError, match=r"models \[\]: accepted: one or more models besides the checkpoint"):
        ModelSoup("uniform")(tiny())
    with pytest.raises(
        PretrainError, match=r"weights \[1.0, 1.0, 1.0\]: accepted: 2, the checkpoint's first, or 1 for all"
    ):
        ModelSoup("uniform", (1.0, 1.0, 1.0))(tiny(), Inputs(models=[tiny()]))
    with pytest.raises(PretrainError, match="the checkpoint has no tokenizer"):
        greedy(corpus)(tiny(), Inputs(models=[tiny()]))
    models = [tiny(vocab_size=512), tiny(vocab_size=512)]
    with pytest.raises(PretrainError, match="metric 'accuracy': accepted: loss, perplexity, bits_per_byte of held_out"):
        greedy(corpus, metric="accuracy")(models[0], Inputs(tokenizer=tokenizer, models=models[1:]))
    with torch.no_grad():
        models[1].lm_head.weight.fill_(torch.nan)
    with pytest.raises(PretrainError, match=r"loss of models\.0 is nan; accepted: a finite measure"):
        greedy(corpus)(models[0], Inputs(tokenizer=tokenizer, models=models[1:]))


def test_references_are_the_corpus():
    assert ModelSoup(corpus="c").references() == {"corpus": "c"}
