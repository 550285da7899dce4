"""The optimisers beside AdamW: their papers' formulas, another implementation, and what they do in the loop."""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import replace

import pytest
import pytorch_optimizer
import torch
from policy_run import run, steps
from small_recipe import small_recipe
from test_guard import Count, Poison, bits

from pretrain import engine
from pretrain.core.errors import PretrainError
from pretrain.core.hardware import precision
from pretrain.core.meter import Meter, Work
from pretrain.core.models.families import blocks
from pretrain.core.models.parameters import described
from pretrain.optim import hidden_matrices
from pretrain.optim.optimizers import muon
from pretrain.optim.optimizers.adafactor import Adafactor
from pretrain.optim.optimizers.adamw import AdamW
from pretrain.optim.optimizers.ademamix import AdEMAMix
from pretrain.optim.optimizers.lion import Lion
from pretrain.optim.optimizers.muon import Muon
from pretrain.optim.optimizers.nadamw import NAdamW
from pretrain.optim.optimizers.schedule_free import ScheduleFree
from pretrain.optim.optimizers.soap import SOAP
from pretrain.optim.schedules.constant import Constant
from pretrain.optim.schedules.cosine import Cosine
from pretrain.optim.schedules.linear import Linear
from pretrain.recipe import load
from pretrain.training.budget import Budget
from pretrain.training.compatible import ill_scheduled

# At rates that suit the small model.
OPTIMIZERS = [
    Muon(lr=1e-2), SOAP(lr=1e-2, precondition_frequency=3), NAdamW(lr=1e-2), AdEMAMix(lr=5e-3), Lion(lr=1e-3, weight_decay=0.1),
    ScheduleFree(lr=1e-2), Adafactor(lr=3e-2),
]  # fmt: skip
ALL = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.name)
# Of products of small matrices whose entries are below one, in what the processor iterates in.
ROUNDING = 2**-8 if precision(torch.device("cpu")) else 2**-20
VALUES = pytest.mark.parametrize("decay", [0.0, 0.3])


def gradients(*shape, count=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(count)]


def marked(parameter, role):
    """As `described` marks what is a matrix, a table or a head of a model."""
    parameter.role = role
    return parameter


def taken(method, start, grads, role="matrix", **group):
    """Where a parameter is after each step on these gradients."""
    p = marked(torch.nn.Parameter(start.clone()), role)
    optimizer, places = method.build([("weight", p)]), []
    for each in optimizer.param_groups:
        each.update(group)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        places.append(p.detach().double().clone())
    return places, optimizer, p


def close(places, expected, atol=1e-6):
    assert len(places) == len(expected) > 0
    for place, value in zip(places, expected, strict=True):
        torch.testing.assert_close(place, value, rtol=1e-5, atol=atol)


@VALUES
def test_lion_steps_by_the_sign_and_remembers_with_another_beta(decay):
    start, grads = torch.tensor([[1.0, -2.0]]), gradients(1, 2)
    places, _, _ = taken(Lion(lr=0.1, beta1=0.8, beta2=0.95, weight_decay=decay), start, grads)
    w, m, expected = start.double(), torch.zeros(1, 2).double(), []
    for g in map(torch.Tensor.double, grads):
        w = w - 0.1 * ((0.8 * m + 0.2 * g).sign() + decay * w)
        m = 0.95 * m + 0.05 * g
        expected.append(w)
    close(places, expected)


@VALUES
def test_nadamw_looks_ahead_by_the_momentum_of_the_next_step(decay):
    start, grads = torch.tensor([[1.0, -2.0]]), gradients(1, 2)
    places, _, _ = taken(NAdamW(lr=0.1, momentum_decay=0.5, weight_decay=decay), start, grads)
    w, m, v, product, expected = start.double(), 0.0, 0.0, 1.0, []
    momentum = [0.9 * (1 - 0.5 * 0.96 ** (t * 0.5)) for t in range(1, 9)]
    for t, g in enumerate(map(torch.Tensor.double, grads)):
        w = w * (1 - 0.1 * decay)
        m, v, product = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g, product * momentum[t]
        ahead = momentum[t + 1] * m / (1 - product * momentum[t + 1]) + (1 - momentum[t]) * g / (1 - product)
        w = w - 0.1 * ahead / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        expected.append(w)
    close(places, expected)


@VALUES
def test_ademamix_adds_a_slow_momentum_that_grows_in(decay):
    start, grads, total = torch.tensor([[1.0, -2.0]]), gradients(1, 2), 8
    method = AdEMAMix(lr=0.1, beta3=0.99, alpha=4.0, warmup=0.5, weight_decay=decay)
    places, _, _ = taken(method, start, grads, total_steps=total)
    w, fast, slow, v, expected = start.double(), 0.0, 0.0, 0.0, []
    for t, g in enumerate(map(torch.Tensor.double, grads), 1):
        share = t / (0.5 * total)
        half_life = math.log(0.5) / math.log(0.9) * (1 - share) + math.log(0.5) / math.log(0.99) * share
        alpha, beta3 = min(4.0, 4.0 * share), min(0.99, 0.5 ** (1 / half_life))
        fast, slow, v = 0.9 * fast + 0.1 * g, beta3 * slow + (1 - beta3) * g, 0.999 * v + 0.001 * g * g
        update = (fast / (1 - 0.9**t) + alpha * slow) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        w = w - 0.1 * (update + decay * w)
        expected.append(w)
    close(places, expected)


def test_ademamix_has_no_warm_up_where_none_is_asked_for():
    start, grads = torch.tensor([[1.0, -2.0]]), gradients(1, 2)
    without, _, _ = taken(AdEMAMix(lr=0.1, beta3=0.99, warmup=0.0), start, grads, total_steps=100)
    steps, _, _ = taken(AdEMAMix(lr=0.1, beta3=0.99, warmup=100), start, grads)
    share, _, _ = taken(AdEMAMix(lr=0.1, beta3=0.99, warmup=1.0), start, grads, total_steps=100)
    close(share, steps)
    assert not torch.allclose(without[0], share[0])


@VALUES
def test_adafactor_has_the_second_moment_of_rows_times_columns(decay):
    start, grads = torch.tensor([[1.0, -2.0, 0.5], [0.1, 0.2, -0.3]]), gradients(2, 3)
    places, _, _ = taken(Adafactor(lr=0.1, weight_decay=decay), start, grads)
    w, rows, columns, expected = start.double(), torch.zeros(2).double(), torch.zeros(3).double(), []
    for t, g in enumerate(map(torch.Tensor.double, grads), 1):
        beta2 = 1 - t**-0.8
        rows = beta2 * rows + (1 - beta2) * (g * g).sum(1)
        columns = beta2 * columns + (1 - beta2) * (g * g).sum(0)
        update = g / (torch.outer(rows, columns) / rows.sum()).sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        size = max(1e-3, float(w.square().mean().sqrt()))
        w = w * (1 - 0.1 * decay) - size * min(0.1, 1 / math.sqrt(t)) * update
        expected.append(w)
    close(places, expected, atol=1e-5)


@VALUES
def test_schedule_free_is_the_papers_three_sequences(decay):
    """z steps, x is the average of all z weighted by the squared highest rate, gradients are taken between them."""
    rates = [0.02, 0.06, 0.1, 0.1, 0.1, 0.1]
    p = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = ScheduleFree(lr=0.1, weight_decay=decay).build([("layers.0.up.weight", p)])
    z = x = y = p.detach().double().clone()
    v, weights = 0.0, 0.0
    for t, (rate, grad) in enumerate(zip(rates, gradients(1, 2), strict=True), 1):
        p.grad = grad.clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        g = grad.double()
        v, weights = 0.999 * v + 0.001 * g * g, weights + rate**2
        z = z - rate * (g / ((v / (1 - 0.999**t)).sqrt() + 1e-8) + decay * y)
        x = x + rate**2 / weights * (z - x)
        y = 0.1 * z + 0.9 * x
        close([p.detach().double(), optimizer.averages[p].double()], [y, x], atol=1e-5)


def test_schedule_free_says_so_when_the_rate_is_to_fall(stories, tmp_path):
    (tmp_path / "r.yaml").write_text(
        small_recipe(tmp_path, stories[:30], optimizer="schedule_free", budget={"steps": 1})
    )
    said: list[str] = []
    engine.run(load(tmp_path / "r.yaml", [], tmp_path / "out"), say=said.append)
    assert "[model] optimizer schedule_free is made for schedule constant (with a warm-up), not for cosine" in said
    assert ill_scheduled(ScheduleFree(), Constant(warmup=0.1)) == ill_scheduled(AdamW(), Cosine()) == ""
    text = "optimizer schedule_free is made for schedule constant (with a warm-up), not for cosine"
    assert ill_scheduled(ScheduleFree(), Cosine()) == text


@VALUES
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_muon_makes_its_momentum_orthogonal_at_adamws_scale(shape, decay):
    start, grads = gradients(*shape, seed=1)[0], gradients(*shape)
    places, _, _ = taken(Muon(lr=0.1, momentum=0.9, weight_decay=decay), start, grads)
    w, m = start.double(), torch.zeros(shape).double()
    for place, grad in zip(places, grads, strict=True):
        g = grad.double()
        m = 0.9 * m + 0.1 * g
        left, values, right = torch.linalg.svd(0.9 * m + 0.1 * g, full_matrices=False)
        values = values / values.norm()
        for _ in range(5):
            values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
        update = 0.2 * math.sqrt(max(shape)) * left @ torch.diag(values) @ right
        w = w * (1 - 0.1 * decay) - 0.1 * update
        # Fifteen products, in each of which what is rounded grows up to 3.4445 times: as good as steeper ones fall.
        torch.testing.assert_close(place, w, rtol=0, atol=0.1 * 15 * ROUNDING)
        assert 0.13 < float(update.square().mean().sqrt()) < 0.25  # AdamW's is 0.2 to 0.4
        w = place  # from where it is, so that rounding does not add up


def test_muon_leaves_tables_heads_and_vectors_to_adamw():
    named = {"embed_tokens.weight": (7, 4), "lm_head.weight": (7, 4), "norm.weight": (4,), "layers.0.up.weight": (6, 4)}
    roles = dict(zip(named, ("table", "head", "vector", "matrix"), strict=True))
    ours, theirs = (
        [(n, marked(torch.nn.Parameter(gradients(*s)[0]), roles[n])) for n, s in named.items()] for _ in range(2)
    )
    mine = Muon(lr=0.01, adamw_lr=0.03).build(ours)
    reference = AdamW(lr=0.03).build(theirs)
    for step in range(4):
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            a.grad, b.grad = (gradients(*a.shape, seed=step)[0] for _ in range(2))
        mine.step()
        reference.step()
    same = {name: torch.equal(a, b) for (name, a), (_, b) in zip(ours, theirs, strict=True)}
    assert same == {
        "embed_tokens.weight": True,
        "lm_head.weight": True,
        "norm.weight": True,
        "layers.0.up.weight": False,
    }
    assert [group["lr"] for group in mine.param_groups] == [0.01, 0.03, 0.03]


@VALUES
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it from 2.9 on")
def test_muon_steps_as_torchs_does(decay, nesterov):
    """Matrices of mixed shapes, within what bfloat16, in which torch iterates, rounds: 2⁻⁸ in each of 15 products."""
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5), (4, 6)]
    ours, theirs = ([torch.nn.Parameter(gradients(*s, seed=7)[0]) for s in shapes] for _ in range(2))
    method = Muon(lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=decay)
    mine = method.build([(f"layers.{n}.up.weight", marked(p, "matrix")) for n, p in enumerate(ours)])
    reference = torch.optim.Muon(
        theirs, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(4):
        for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad, b.grad = (gradients(*a.shape, seed=10 * step + n)[0] for _ in range(2))
        mine.step()
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0.1 * 15 * 2**-8)
            b.data.copy_(a)  # from where it is, so that rounding does not add up


def test_matrices_beyond_one_product_step_as_those_within(monkeypatch):
    start, grads = [gradients(6, 4, seed=n)[0] for n in range(5)], [gradients(6, 4, seed=9 + n)[0] for n in range(5)]
    places = []
    for stacked in (muon.STACKED, 2 * 24):
        monkeypatch.setattr(muon, "STACKED", stacked)
        matrices = [torch.nn.Parameter(each.clone()) for each in start]
        optimizer = Muon(lr=0.1).build([(f"layers.{n}.up.weight", marked(p, "matrix")) for n, p in enumerate(matrices)])
        for p, grad in zip(matrices, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        places.append(torch.stack([p.detach() for p in matrices]))
    torch.testing.assert_close(*places, rtol=0, atol=0.1 * 15 * ROUNDING)
    assert float((places[0] - torch.stack(start)).abs().amin((1, 2)).max()) > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "modernbert", "t5"])
def test_hidden_matrices_are_those_of_the_blocks(tiny, family):
    """No embedding, no table of positions, no head; each block has some, and all of them are matrices."""
    model = tiny(family)
    hidden, rest = hidden_matrices(described(model), "muon")
    names = {name for name, _ in hidden}
    assert len(names) + len(rest) == len(list(model.parameters())) and all(p.ndim == 2 for _, p in hidden)
    for block in blocks(model):
        inside = {id(p) for p in block.parameters() if p.ndim == 2}
        assert sum(id(p) in inside for _, p in hidden) >= 4
    ends = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    assert not ends & {id(p) for _, p in hidden}
    assert not any("embed" in name or "position" in name or "relative_attention_bias" in name for name in names)


class Sharded(torch.nn.Parameter):
    """Looks as a sharded parameter does."""

    full_tensor = None


@pytest.mark.parametrize("method", [Muon(), SOAP(), Adafactor()], ids=lambda method: method.name)
def test_those_that_need_whole_matrices_refuse_sharded_ones(method):
    with pytest.raises(PretrainError, match=f"{method.name}: sharded weights .* accepted: strategy: ddp"):
        method.build([("layers.0.up.weight", Sharded(torch.ones(2, 2)))])


@VALUES
@pytest.mark.parametrize("shape, role, most", [
    ((6, 4), "matrix", 10_000), ((4, 6), "matrix", 10_000), ((7, 4), "table", 4),
    ((7, 4), "matrix", 5), ((5,), "vector", 10_000),
])  # fmt: skip
def test_soap_is_the_packages(shape, role, most, decay):
    """From its second step on: the first only begins the averages, and there weights decay here but not in the package."""
    start, grads = gradients(*shape, seed=1)[0], gradients(*shape, count=9)
    decay = decay if len(shape) == 2 else 0.0
    places, _, _ = taken(
        SOAP(lr=0.1, precondition_frequency=3, max_precondition_dim=most, weight_decay=decay), start, grads, role
    )
    p = torch.nn.Parameter(start * (1 - 0.1 * decay))
    reference = pytorch_optimizer.SOAP(
        [p], lr=0.1, weight_decay=decay, precondition_frequency=3, max_precondition_dim=most
    )
    expected = []
    for grad in grads:
        p.grad = grad.clone()
        reference.step()
        expected.append(p.detach().double().clone())
    close(places, expected, atol=2e-4)  # eigenvectors of float32 matrices


def test_soap_does_not_rotate_the_long_side_of_a_table():
    _, optimizer, table = taken(SOAP(), torch.ones(7, 4), gradients(7, 4), "table")
    assert optimizer.state[table]["right"].shape == (4, 4) and "left" not in optimizer.state[table]


@pytest.mark.parametrize("rows, columns", [(6, 10), (10, 6)])
def test_what_matrix_steps_cost_is_metered(rows, columns):
    weight = torch.nn.Parameter(torch.ones(rows, columns))

    def spent(method, count):
        optimizer, meter, found = method.build([("layers.0.up.weight", weight)]), Meter(), []
        for grad in gradients(rows, columns, count=count):
            weight.grad = grad
            phase = getattr(optimizer, "phase", "")
            found.append((phase, meter.run(Work(f"optimizer {phase}"), optimizer.step)[1]))
        return found

    short, long = sorted((rows, columns))
    assert spent(Muon(), 2) == [("", 5 * (4 * short**2 * long + 2 * short**3))] * 2
    m, n = rows, columns
    averages, rotation = 2 * m * n * (m + n), 2 * m * n * (m + n)
    first, refined = averages + 9 * (m**3 + n**3), sum(2 * s**3 + 8 * s**3 // 3 for s in (m, n))
    plain = ("rotated", 3 * rotation + averages)
    assert spent(SOAP(precondition_frequency=2), 5) == [
        ("first", first), plain, ("new bases", plain[1] + refined), plain, ("new bases", plain[1] + refined),
    ]  # fmt: skip


@pytest.mark.bits
@ALL
def test_forty_steps_lower_the_loss_and_a_resume_after_twenty_gives_the_same_bits(prepared, tiny, tmp_path, optimizer):
    given = {"budget": Budget(steps=40), "optimizer": optimizer, "schedule": Constant(warmup=0.1)}
    whole = run(prepared, tiny(vocab_size=512), tmp_path / "a", save_every=20, keep=9, **given)
    losses = [row["loss"] for row in steps(tmp_path / "a")]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.5
    (tmp_path / "b" / "state").mkdir(parents=True)
    shutil.copytree(tmp_path / "a" / "state" / "step-000000020", tmp_path / "b" / "state" / "step-000000020")
    again = run(prepared, tiny(vocab_size=512), tmp_path / "b", **given)
    assert [row["step"] for row in steps(tmp_path / "b")] == list(range(21, 41))
    assert all(torch.equal(a, b) for a, b in zip(bits(whole), bits(again), strict=True))
    assert again.spent | {"seconds": 0} == whole.spent | {"seconds": 0}


@pytest.mark.bits
@ALL
def test_a_step_that_is_not_finite_changes_nothing(prepared, tiny, tmp_path, optimizer):
    if isinstance(optimizer, AdEMAMix):
        optimizer = replace(optimizer, warmup=0.0)  # else its steps depend on the budget
    given = {"optimizer": optimizer, "budget": Budget(steps=3)}
    before = run(prepared, tiny(vocab_size=512), tmp_path / "a", Count(), **given)
    given["budget"] = Budget(steps=4)
    after = run(prepared, tiny(vocab_size=512), tmp_path / "b", Count(), objective=Poison(first=4, last=4), **given)
    assert after.guard.skipped == 1 and after.step == 4
    assert all(torch.equal(a, b) for a, b in zip(bits(before), bits(after), strict=True))


@ALL
def test_each_group_follows_the_schedule_from_its_own_peak(prepared, tiny, tmp_path, optimizer):
    if isinstance(optimizer, Muon):
        optimizer = replace(optimizer, adamw_lr=3e-3)
    schedule = Linear(warmup=0.0)
    trained = run(prepared, tiny(vocab_size=512), tmp_path, optimizer=optimizer, schedule=schedule)
    factor = schedule.factor(5, 6)
    peaks = [group["peak_lr"] for group in trained.optimizer.param_groups]
    assert {group["total_steps"] for group in trained.optimizer.param_groups} == {6}
    assert [group["lr"] for group in trained.optimizer.param_groups] == [peak * factor for peak in peaks]
    assert set(peaks) == {optimizer.lr} | ({3e-3} if isinstance(optimizer, Muon) else set()) and 0 < factor < 1
    decays = {(p.ndim > 1, group["weight_decay"]) for group in trained.optimizer.param_groups for p in group["params"]}
    assert decays == {(True, optimizer.weight_decay), (False, 0.0)}


def test_schedule_free_evaluates_and_ends_with_its_average_and_is_not_disturbed_by_it(prepared, tiny, tmp_path):
    seen = []

    def evaluate(trainee):
        seen.append([p.detach().clone() for p in trainee.model.parameters()])
        return {"loss": 1.0}

    given = {"optimizer": ScheduleFree(lr=1e-2), "evaluate": evaluate, "save_every": 3}
    often = run(prepared, tiny(vocab_size=512), tmp_path / "a", evaluate_every=1, **given)
    rarely = run(prepared, tiny(vocab_size=512), tmp_path / "b", **given)
    assert [row["loss"] for row in steps(tmp_path / "a")] == [row["loss"] for row in steps(tmp_path / "b")]
    assert all(torch.equal(a, b) for a, b in zip(bits(often), bits(rarely), strict=True))
    assert len(seen) == 7 and all(torch.equal(a, b) for a, b in zip(seen[5], often.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen[5], seen[6], strict=True))
    # What the state holds for a resume is y, not x.
    again = run(prepared, tiny(vocab_size=512), tmp_path / "a", **given, budget=Budget(steps=8))
    plain = run(prepared, tiny(vocab_size=512), tmp_path / "c", **given, budget=Budget(steps=8))
    assert all(torch.equal(a, b) for a, b in zip(bits(again), bits(plain), strict=True))
    x = {p: value for p, value in plain.optimizer.averages.items()}
    assert x and not any(map(torch.equal, *zip(*itertools.islice(x.items(), 3), strict=True)))
