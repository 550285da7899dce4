"""Fine-tuning in a random subspace: the transform against its matrix, what is trained, round trips, d90."""

from __future__ import annotations

import copy
from functools import partial

import examples
import numpy as np
import pytest
import torch
from examples import IDS, logits
from scipy.linalg import hadamard

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.core.models.heads import with_head
from pretrain.surgery.adapters._adapters import adapters

intrinsic = method_class("intrinsic_dimension")
VOCABULARY = Vocabulary(97, pad=0, bos=1, eos=2)
FAMILIES = ("llama", "gpt2", "bert")
trained = partial(examples.trained, by=0.5)


def subspace(model):
    return next(iter(adapters(model).values())).subspace


@pytest.mark.parametrize("dimension", (30, 5000))
def test_the_change_is_the_product_with_the_dense_matrix_and_its_columns_have_length_one(tiny, dimension) -> None:
    model = trained(intrinsic(dimension=dimension)(tiny()))
    theta, scales = subspace(model).theta.detach(), subspace(model).scales.detach()
    assert len(theta) + len(scales) == dimension and len(scales) == 14
    for number, module in enumerate(adapters(model).values()):
        size, expected = module.in_features * module.out_features, 0
        pieces, power = module.signs_NP.shape
        assert power == 2 ** int(np.ceil(np.log2(size))) and pieces == -(-len(theta) // power)
        H = torch.from_numpy(hadamard(power)).float()
        for n, piece in enumerate(theta.split(power)):
            permuted = torch.eye(power)[module.order_NP[n]]
            matrix = H @ torch.diag(module.gauss_NP[n]) @ permuted @ H @ torch.diag(module.signs_NP[n].float())
            length = matrix.square().sum(0) * (size / power)
            assert torch.allclose(length, torch.ones(power), atol=1e-4)
            assert sorted(module.order_NP[n].tolist()) == list(range(power))
            expected = expected + matrix[:size, : len(piece)] @ piece
        shape = module.change().shape
        assert shape == (module.out_features, module.in_features)
        assert torch.allclose(module.change(), scales[number] * expected.view(shape), atol=1e-4)
        if number == 1:
            break


def test_the_gradient_of_the_numbers_is_that_of_the_dense_matrix(tiny) -> None:
    model = trained(intrinsic(dimension=6, said=False, where="attention")(tiny()).double())
    module = next(iter(adapters(model).values()))
    module.gauss_NP = module.gauss_NP.double()

    def change(theta):
        module.shared[0].theta.data.copy_(theta.detach())
        held, module.shared[0] = module.shared[0], type("Held", (), {"theta": theta, "scales": None})()
        try:
            return module.change()
        finally:
            module.shared[0] = held

    theta = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(change, (theta,))


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_changes_at_first_and_only_the_numbers_are_trained(tiny, name) -> None:
    model = tiny(name)
    before = logits(model)
    changed = intrinsic(dimension=50)(model)
    assert torch.allclose(logits(changed), before, atol=1e-6)
    asked = [(n, p.numel()) for n, p in changed.named_parameters() if p.requires_grad]
    assert sum(count for _, count in asked) == 50 and all("subspace" in n for n, _ in asked)
    changed.train()(IDS).logits.logsumexp(-1).sum().backward()
    assert subspace(changed).theta.grad.abs().min() > 0  # every number moves the model, through all matrices


@pytest.mark.bits
def test_another_seed_is_another_subspace_and_a_classifiers_last_layer_is_trained(tiny, tmp_path) -> None:
    first, same, other = (intrinsic(dimension=50, seed=seed)(tiny()) for seed in (0, 0, 1))
    found = [logits(trained(model)) for model in (first, same, other)]
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2], atol=1e-4)
    classifier = trained(intrinsic(dimension=50)(with_head(tiny("bert"), "sequence", ("a", "b"), VOCABULARY)))
    assert classifier.classifier.weight.requires_grad and not classifier.bert.pooler.dense.weight.requires_grad
    checkpoint.save(classifier, None, tmp_path / "c")
    assert torch.equal(logits(checkpoint.load(tmp_path / "c")[0]), logits(classifier))


def test_what_does_not_fit_is_one_clear_error(tiny) -> None:
    with pytest.raises(PretrainError, match="dimension 0: accepted: 1 or more"):
        intrinsic(dimension=0)
    with pytest.raises(PretrainError, match="dimension 14: accepted: above 14, the number of matrices"):
        intrinsic(dimension=14)(tiny())
    with pytest.raises(PretrainError, match="where 'head': accepted: query_value, attention, feed_forward, all"):
        intrinsic(where="head")
    with pytest.raises(PretrainError, match="adapted already"):
        intrinsic(dimension=50)(intrinsic(dimension=50)(tiny()))


def test_d90_is_the_smallest_subspace_that_comes_near_full_fine_tuning_and_the_model_stays(tiny, prepared) -> None:
    from pretrain.corpus.tokenizers import load_tokenizer

    model, tokenizer = tiny("gpt2", vocab_size=512, n_layer=1), load_tokenizer(prepared / "tokenizer")
    before = copy.deepcopy(model.state_dict())
    words = {"yes": ["import", "os", "sys"], "no": ["return", "self", "None"]}
    rng = np.random.default_rng(0)
    documents = [
        {"text": " ".join([*rng.choice(words[label], 4), str(n)]), "label": label}
        for n, label in enumerate(["yes", "no"] * 30)
    ]
    method = method_class("intrinsic_dimension_d90")(
        dimensions=(9, 100), steps=15, length=16, rates=(1e-2,), subspace_rates=(1e-9,), said=True
    )
    with torch.no_grad():
        found = method(model, tokenizer, documents).metrics
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert found["intrinsic_full_accuracy"] > 0.9 and found["intrinsic_accuracy.100"] < 0.8
    assert "intrinsic_d90" not in found  # at such a rate nothing is learnt: the last layer is not trained either
    sure = method_class("intrinsic_dimension_d90")(
        dimensions=(9, 100), steps=15, length=16, rates=(1e-2,), subspace_rates=(1e-9, 1e-1)
    )
    found = sure(model, tokenizer, documents).metrics
    reached = [d for d in (9, 100) if found[f"intrinsic_accuracy.{d}"] >= 0.9 * found["intrinsic_full_accuracy"]]
    assert found["intrinsic_d90"] == reached[0]
    fields = {"steps": 1, "rates": (1e-2,), "subspace_rates": (1e-9,), "length": 16}
    found = method_class("intrinsic_dimension_d90")(dimensions=(3, 4, 5), **fields)(model, tokenizer, documents).metrics
    assert "intrinsic_accuracy.5" in found and not {"intrinsic_accuracy.3", "intrinsic_accuracy.4"} & {*found}
    with pytest.raises(PretrainError, match=r"dimensions \[3, 4\]: accepted: one or more above 4, the number of matr"):
        method_class("intrinsic_dimension_d90")(dimensions=(3, 4), **fields)(model, tokenizer, documents)
    with pytest.raises(PretrainError, match=r"dimensions \(200, 100\): accepted: one or more that rise"):
        method_class("intrinsic_dimension_d90")(dimensions=(200, 100))
    with pytest.raises(PretrainError, match=r"rates \(0.0,\): accepted: a list, each above 0"):
        method_class("intrinsic_dimension_d90")(rates=(0.0,))
    with pytest.raises(PretrainError, match="share 0: accepted: above 0, at most 1"):
        method_class("intrinsic_dimension_d90")(share=0)
    with pytest.raises(PretrainError, match="0 labelled documents: accepted: more"):
        sure(model, tokenizer, [{"text": "a"}])
