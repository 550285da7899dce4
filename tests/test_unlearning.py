"""Unlearning: each mode's formula, the two sides apart, and that a training forgets what it was told to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_objectives import VOCABULARY, context, rows
from test_training import small

from pretrain.core.errors import PretrainError
from pretrain.core.models.cross_entropy import IGNORE
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.objectives.privacy.unlearning import Unlearning
from pretrain.training.budget import Budget
from pretrain.training.loop import Settings

KEPT, FORGOTTEN = "kept", "forgotten"


@pytest.fixture
def text():
    """Two rows to keep and two to forget."""
    return [replace(row, domain=number % 2) for number, row in enumerate(rows([20, 31], [45], [12, 40], [33]))]


def prepared_by(objective, chosen):
    return objective.prepare(chosen, replace(context(60), domains=(KEPT, FORGOTTEN)))


def logits(model, row):
    """Of each document of a row by itself: what it predicts, and what follows."""
    for piece in row.pieces():
        tokens = torch.from_numpy(piece).long()[None]
        yield model(tokens).logits[0, :-1], tokens[0, 1:]


def mean(model, chosen, each):
    return torch.cat([each(z, y) for row in chosen for z, y in logits(model, row)]).mean()


def nll(z, y):
    return torch.nn.functional.cross_entropy(z, y, reduction="none")


def gradients(value, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_ascent_is_minus_the_gradient_of_language_modelling(tiny, text, family):
    model, objective, forget = tiny(family), Unlearning(FORGOTTEN), text[1::2]
    ascent = objective.loss(model, prepared_by(objective, forget)).value
    descent = CausalLM().loss(model, CausalLM().prepare(forget, context(60))).value
    assert ascent.item() == pytest.approx(-descent.item(), rel=1e-6)
    torch.testing.assert_close(gradients(ascent, model), -gradients(descent, model), rtol=1e-4, atol=1e-7)


def test_ascent_and_descent_are_the_means_over_their_own_targets(tiny, text):
    model, objective = tiny(), Unlearning(FORGOTTEN, weight=0.3)
    loss = objective.loss(model, prepared_by(objective, text))
    forget, retain = mean(model, text[1::2], nll), mean(model, text[::2], nll)
    assert loss.parts["forget"].item() == pytest.approx(forget.item(), rel=1e-5)
    assert loss.parts["retain"].item() == pytest.approx(retain.item(), rel=1e-5)
    assert loss.value.item() == pytest.approx((0.3 * retain - forget).item(), rel=1e-5)
    torch.testing.assert_close(
        gradients(loss.value, model), gradients(0.3 * retain - forget, model), rtol=1e-4, atol=1e-6
    )


def test_retained_rows_alone_are_plain_language_modelling(tiny, text):
    model, objective = tiny(), Unlearning(FORGOTTEN)
    ours = objective.loss(model, prepared_by(objective, text[::2]))
    plain = CausalLM().loss(model, CausalLM().prepare(text[::2], context(60)))
    assert ours.value.item() == pytest.approx(plain.value.item(), rel=1e-6)
    assert torch.allclose(ours.nll_BL, plain.nll_BL)


def test_random_labels_are_ordinary_tokens_at_the_places_to_forget_alone(text):
    objective = Unlearning(FORGOTTEN, "random_labels")
    batch, plain = prepared_by(objective, text), prepared_by(Unlearning(FORGOTTEN), text)
    given, true = batch["forget_target_BL"], plain["forget_target_BL"]
    assert torch.equal(given == IGNORE, true == IGNORE) and torch.equal(
        batch["retain_target_BL"], plain["retain_target_BL"]
    )
    labels = given[given != IGNORE]
    assert not set(labels.tolist()) & VOCABULARY.special and (labels == true[true != IGNORE]).float().mean() < 0.1


def test_adversarial_samples_are_the_likeliest_of_the_other_tokens_at_first(tiny, text):
    model, objective = tiny(seed=1), Unlearning(FORGOTTEN, "adversarial_samples")
    first, batch = objective.modules(model), prepared_by(objective, text[1::2])
    moved = tiny(seed=2)  # the labels stay those of the first model

    def runner_up(row):
        for z, y in logits(model, row):
            yield z.scatter(-1, y[:, None], -torch.inf).argmax(-1)

    labels = torch.cat([a for row in text[1::2] for a in runner_up(row)])
    predicted = torch.cat([z for row in text[1::2] for z, _ in logits(moved, row)])
    loss = objective.loss(moved, batch, first)
    assert loss.value.item() == pytest.approx(nll(predicted, labels).mean().item(), rel=1e-5)


def test_the_divergence_is_nothing_before_the_first_step_and_kl_after_it(tiny, text):
    model, objective = tiny(seed=1), Unlearning(FORGOTTEN, retain="kl_divergence")
    first, batch = objective.modules(model), prepared_by(objective, text[::2])
    assert objective.loss(model, batch, first).parts["retain"].abs() < 1e-6
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    p, q = (
        torch.cat([z for row in text[::2] for z, _ in logits(m, row)]).log_softmax(-1) for m in (first.model, model)
    )
    wanted = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert objective.loss(model, batch, first).parts["retain"].item() == pytest.approx(wanted.item(), rel=1e-4)
    assert not any(p.requires_grad for p in first.model.parameters())


def test_a_domain_that_the_corpus_lacks_is_one_line(text):
    with pytest.raises(PretrainError, match="unknown domain to forget 'forgoten'.*forgotten"):
        prepared_by(Unlearning("forgoten"), text)


def test_descent_on_the_rest_keeps_it_while_the_domain_is_forgotten(prepared, tiny, tmp_path):
    """From one trained model, by the same ascent: what is not to be forgotten is lost without descent."""

    def losses(model, objective, folder, steps):
        settings = Settings(budget=Budget(steps=steps), save_every=0, bar=False)
        training = small(prepared, model, folder, objective=objective, settings=settings)
        return training.model, {name: [] for name in training.loader.shards.domain_names}

    trained, _ = losses(tiny, CausalLM(), tmp_path / "trained", 30)
    state = {name: value.clone() for name, value in trained.state_dict().items()}

    def again(*args, **fields):
        model = tiny(*args, **fields)
        model.load_state_dict(state)
        return model

    lost = {}
    for weight in (0.0, 1.0):
        model, _ = losses(again, Unlearning("docstrings", weight=weight), tmp_path / str(weight), 8)
        lost[weight] = domain_losses(model, prepared)
    before = domain_losses(trained, prepared)
    assert lost[0.0]["docstrings"] > before["docstrings"] + 0.5 and lost[1.0]["docstrings"] > before["docstrings"] + 0.5
    assert lost[1.0]["python"] < lost[0.0]["python"] - 0.5


def domain_losses(model, prepared):
    import numpy as np

    from pretrain.core.batch import Context, Vocabulary
    from pretrain.corpus.shards import Shards
    from pretrain.corpus.tokenizers import load_tokenizer

    shards = Shards(prepared / "tokens" / "train")
    plan, vocabulary = shards.plan(64), Vocabulary.of(load_tokenizer(prepared / "tokenizer"))
    result = {}
    for number, name in enumerate(shards.domain_names):
        chosen = [plan.row(shards, int(i)) for i in plan.rows_of_domain(number)[:16]]
        batch = CausalLM().prepare(chosen, Context(vocabulary, 64, np.random.default_rng(0)))
        with torch.no_grad():
            result[name] = float(CausalLM().loss(model.eval(), batch).value)
    return result
