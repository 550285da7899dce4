"""FLOPs of products with zeros: what the meter counts of a layer is what a policy may leave out, no more."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_job
from policy_run import run, steps

from pretrain.core.checkpoint import load
from pretrain.core.errors import PretrainError
from pretrain.core.meter import Meter, Work, count_flops, matrix_products
from pretrain.core.models.families import base, linears, set_module
from pretrain.policies import Policy
from pretrain.policies.mixing.stability_gap import StabilityGap
from pretrain.policies.mixing.toremi import ToReMi
from pretrain.policies.pruning.gradual_pruning import GradualPruning
from pretrain.policies.pruning.spdf import SPDF
from pretrain.training.budget import Budget
from pretrain.training.loop import train


class NoProduct(torch.nn.Module):
    """In place of a linear layer: the same shapes and gradients for all, without a matrix product."""

    def __init__(self, layer, out):
        super().__init__()
        self.weight, self.out = layer.weight, out

    def forward(self, x):
        return (x.sum(-1, keepdim=True) + self.weight.sum()).expand(*x.shape[:-1], self.out).contiguous()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert", "modernbert", "t5"])
def test_a_layers_products_are_what_the_meter_counts_less_without_them(tiny, family):
    model = tiny(family)
    tokens_BL = torch.randint(3, 90, (2, 16))
    inputs = {"decoder_input_ids": tokens_BL[:, :7]} if family == "t5" else {}

    def flops():
        return count_flops(lambda: model(input_ids=tokens_BL, **inputs).logits.sum().backward())[1]

    layers = linears(model)
    with matrix_products(layers) as products:
        whole = flops()
    for name, layer in layers.items():
        out = layer.weight.shape[1] if family == "gpt2" else layer.weight.shape[0]
        set_module(model, name, NoProduct(layer, out))
        assert whole - flops() == products[name] > 0, name
        set_module(model, name, layer)


def test_recomputed_products_count_and_have_no_gradients_of_their_own(tiny):
    model = tiny().train()
    tokens_BL = torch.randint(3, 90, (2, 16))
    totals = {}
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with matrix_products(linears(model)) as products:
            _, flops = count_flops(lambda: model(input_ids=tokens_BL, use_cache=False).logits.sum().backward())
        totals[checkpointing] = flops, products
    more = {n: totals[True][1][n] - totals[False][1][n] for n in totals[True][1]}
    # Of each layer one product more, but of a block's last, whose output no gradient needs.
    assert all(m == totals[False][1][n] / 3 or (m == 0 and "down_proj" in n) for n, m in more.items())
    assert sum(more.values()) <= totals[True][0] - totals[False][0]


def test_frozen_weights_have_no_gradient_to_compute():
    layer, x_BE = torch.nn.Linear(8, 16, bias=False), torch.randn(4, 8)
    product = 2 * 4 * 8 * 16
    for weight, inputs, times in ((True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)):
        layer.weight.requires_grad_(weight)
        with matrix_products({"a": layer}) as products:
            y = layer(x_BE.clone().requires_grad_(inputs))
            _ = y.sum().backward() if y.requires_grad else None
        assert products == {"a": times * product}
    with torch.no_grad(), matrix_products({"a": layer}) as products:
        layer(x_BE)
    assert products == {"a": product}


def test_the_meter_remembers_products_and_recounts_only_when_they_are_new():
    layer, x, runs, meter = torch.nn.Linear(8, 16, bias=False), torch.randn(4, 8), [], Meter()

    def work():
        runs.append(1)
        return layer(x)

    meter.run(Work("a"), work)
    _, flops = meter.run(Work("a"), work, {"it": layer})
    assert meter.cost(Work("a")).products == {"it": 2 * 2 * 4 * 8 * 16} and flops == 2 * 4 * 8 * 16
    again = Meter(json.loads(json.dumps(meter.counts)))
    assert again.run(Work("a"), lambda: None, {"it": layer}) == (None, flops) and len(runs) == 2
    assert again.cost(Work("a")).skipped({"it": 0.5}) == 2 * 4 * 8 * 16 and again.cost(Work("a")).skipped({}) == 0
    assert not layer._forward_hooks


@pytest.mark.bits
def test_spdf_is_credited_its_share_of_the_masked_layers_and_nothing_else(tiny, prepared, tmp_path):
    dense = run(prepared, tiny(vocab_size=512), tmp_path / "dense", SPDF(sparsity=0.0))
    sparse = run(prepared, tiny(vocab_size=512), tmp_path / "sparse", SPDF(sparsity=0.75))
    met = [counted for counted in sparse.meter.counts.values() if counted[0][3]]
    assert len(met) == 1  # one shape of batch
    products = sum(met[0][0][3].values())
    assert sparse.dense_flops == dense.dense_flops == dense.flops
    assert sparse.flops == pytest.approx(dense.flops - 6 * 0.75 * products, abs=6)
    model = sparse.model
    weights = sum(m.weight.numel() for m in linears(model).values())
    assert products == 3 * 2 * 8 * 64 * weights  # forward and both gradients, 8 rows of 64 tokens
    last = steps(tmp_path / "sparse")[-1]
    assert last["flops"] == sparse.flops < last["dense_flops"] == sparse.dense_flops
    assert sparse.dense_flops - sparse.flops < base(model).num_parameters() * 6 * 8 * 64 * 6
    honest = run(prepared, tiny(vocab_size=512), tmp_path / "no", SPDF(sparsity=0.75, credit=False))
    assert honest.flops == honest.dense_flops == dense.flops
    for a, b in zip(honest.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_credited_flops_make_a_flop_budget_last_longer(tiny, prepared, tmp_path):
    limit = run(prepared, tiny(vocab_size=512), tmp_path / "a", budget=Budget(steps=4)).flops
    sparse = run(prepared, tiny(vocab_size=512), tmp_path / "b", SPDF(), budget=Budget(flops=limit))
    assert sparse.step > 4 and sparse.flops >= limit
    assert sparse.flops - sparse.flops / sparse.step < limit


def test_micro_batches_and_resumes_keep_the_credit(tiny, prepared, tmp_path):
    whole = run(prepared, tiny(vocab_size=512), tmp_path / "a", SPDF(), budget=Budget(steps=6))
    micro = run(prepared, tiny(vocab_size=512), tmp_path / "b", SPDF(), budget=Budget(steps=6), micro_rows=2)
    skipped = [t.dense_flops - t.flops for t in (whole, micro)]
    assert skipped[0] == pytest.approx(skipped[1], abs=24)
    run(prepared, tiny(vocab_size=512), tmp_path / "c", SPDF(), budget=Budget(steps=4), save_every=2)
    again = run(prepared, tiny(vocab_size=512), tmp_path / "c", SPDF(), budget=Budget(steps=6), save_every=2)
    assert (again.flops, again.dense_flops) == (whole.flops, whole.dense_flops)


def test_several_policies_are_not_credited_twice(tiny, prepared, tmp_path):
    class Half(Policy):
        name = "half"

        def zeros(self, training, state):
            return dict.fromkeys(linears(training.model), 0.5)

    both = run(prepared, tiny(vocab_size=512), tmp_path / "a", SPDF(sparsity=0.75), Half())
    one = run(prepared, tiny(vocab_size=512), tmp_path / "b", SPDF(sparsity=0.75))
    assert both.flops == one.flops


JOB = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_sparse_flops
test_sparse_flops.job(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def job(folder, prepared):
    """Four steps with all that acts on weights, losses and rows."""
    policies = [GradualPruning(every=1), ToReMi(interval=1), StabilityGap("python", epochs=2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_job, "train", functools.partial(train, policies=policies))
        training_job.main(folder, prepared, 4, "ddp", 0.0)


@pytest.mark.processes
def test_two_processes_prune_weigh_draw_and_are_credited_as_one(tmp_path, prepared):
    job(tmp_path / "one", prepared)
    script = tmp_path / "job.py"
    script.write_text(JOB.format(tests=str(Path(__file__).parent)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29641"]
    command = [*launch, str(script), str(tmp_path / "two"), str(prepared)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-5)
    assert one[-1]["dense_flops"] == two[-1]["dense_flops"] > one[-1]["flops"]
    assert one[-1]["flops"] == pytest.approx(two[-1]["flops"], abs=16)
    a, b = (load(tmp_path / name / "checkpoint")[0].state_dict() for name in ("one", "two"))
    assert all(torch.allclose(a[n], b[n], atol=1e-4) and torch.equal(a[n] == 0, b[n] == 0) for n in a)


def test_sharded_weights_are_refused(tiny, prepared, tmp_path):
    for policy in (SPDF(), GradualPruning()):
        model = tiny(vocab_size=512)
        next(iter(linears(model).values())).weight.full_tensor = None
        with pytest.raises(
            PretrainError, match=f"{policy.name}: sharded weights are not supported; accepted: strategy"
        ):
            run(prepared, model, tmp_path / policy.name, policy)
