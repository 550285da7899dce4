"""The compute meter counts what runs: forward, backward, recomputation."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
import zoo
from gradient_cases import all_cases, build, counts, work_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import default_rng
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pretrain.core.meter import Meter, Work, count_flops, peak_memory, recomputing


def test_forward_and_backward_of_a_linear_layer():
    layer, x_BE = torch.nn.Linear(8, 16, bias=False), torch.randn(32, 8, requires_grad=True)
    _, flops = count_flops(lambda: layer(x_BE).sum().backward())
    assert flops == 3 * 2 * 32 * 8 * 16


def test_attention_on_the_cpu_is_counted():
    q, k, v = (torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 64 * 64 * 16
    _, flops = count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert flops == 2 * product
    _, flops = count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward())
    assert flops == 7 * product  # backward: the scores again, and four products


@pytest.mark.parametrize("family", ["modernbert", "t5"])
def test_a_models_step_costs_what_torchs_own_counter_finds(tiny, family):
    model, ids_BL = tiny(family), torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": ids_BL} if model.config.is_encoder_decoder else {}
    step = lambda: model(input_ids=ids_BL, **more).logits.square().mean().backward()  # noqa: E731
    forward, backward = (
        getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{end}") for end in ("", "_backward")
    )
    of_cpu = {forward: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v), backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)}  # fmt: skip
    with FlopCounterMode(display=False, custom_mapping=of_cpu) as counter:
        step()
    assert count_flops(step)[1] == counter.get_total_flops() > 0


def test_recomputed_activations_count_again():
    layer, x_BE = torch.nn.Linear(8, 8, bias=False), torch.randn(4, 8, requires_grad=True)
    _, plain = count_flops(lambda: layer(x_BE).relu().sum().backward())
    _, again = count_flops(lambda: checkpoint(lambda x: layer(x).relu(), x_BE, use_reentrant=False).sum().backward())
    assert again == plain + 2 * 4 * 8 * 8


def test_a_shape_is_counted_once_and_remembered():
    meter, runs = Meter(), []

    def work():
        runs.append(1)
        return torch.randn(4, 4) @ torch.randn(4, 4)

    first, second = meter.run(Work("4x4"), work)[1], meter.run(Work("4x4"), work)[1]
    assert first == second == 2 * 4**3 and len(runs) == 2
    again = Meter(json.loads(json.dumps(meter.counts)))
    assert again.run(Work("4x4"), lambda: None) == (None, first)


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000)), min_size=6, max_size=12), st.randoms())
@settings(max_examples=30)
def test_work_that_is_affine_in_its_numbers_is_counted_until_they_are_known_and_then_computed(sizes, random):
    body, *slopes = (random.randrange(1, 10**3) for _ in range(3))
    meter, counted = Meter(), 0

    def product(rows):
        return torch.empty(rows, 1) @ torch.empty(1, 1)

    for pair in sizes:
        work, times = Work("shape", tuple(map(float, pair))), []

        def call(pair=pair, times=times):
            times.append(1)
            product(body)
            for slope, number in zip(slopes, pair, strict=True):
                product(slope * number)

        known = meter.known(work) is not None
        _, flops = meter.run(work, call)
        assert flops == 2 * (body + sum(slope * number for slope, number in zip(slopes, pair, strict=True)))
        counted += not known
    assert counted <= 3  # a point, and one in each of two directions


@pytest.mark.parametrize(("name", "given", "family"), all_cases(), ids=lambda value: str(value) if value else "")
def test_what_is_computed_of_every_objective_is_what_a_count_finds(prepared, tmp_path, name, given, family):
    """What is computed of numbers that were not counted, of all there are; and twice what is remembered of them."""
    case = build(name, given, family, prepared, tmp_path)
    meter, numbers = Meter(), []
    for seed, start in itertools.product(range(3), range(0, 6, 2)):
        batch = case.objective.prepare(case.rows[start : start + 2], replace(case.context, rng=default_rng(seed)))
        work = work_of(case.trainee.model, [batch])
        if work in numbers and len(numbers) - len(set(numbers)) == 2:
            continue
        known = meter.known(work)
        numbers.append(work)

        def gradient(batch=batch):
            case.trainee([batch], [counts(batch)])[0].backward()

        if known is None:
            meter.run(work, gradient)
            continue
        _, truth = count_flops(gradient)
        assert known.flops == truth, f"{work}: {known.flops / truth:.4f} of what was spent"
    assert sum(map(len, meter.counts.values())) <= len(set(numbers))


def test_what_checkpointing_and_fused_attention_compute_again_is_not_useful(tiny):
    tokens_BL = torch.randint(3, 90, (2, 16))

    def cost(checkpointing):
        model = tiny("llama").train()
        if checkpointing:
            kwargs = {"use_reentrant": False, "context_fn": recomputing}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        meter = Meter()
        meter.run(Work("a"), lambda: model(input_ids=tokens_BL).logits.sum().backward())
        return meter.cost(Work("a"))

    plain, again = cost(False), cost(True)
    scores = 2 * (2 * 2 * 4 * 16 * 16 * 8)  # of two blocks, two rows, four heads
    assert plain.flops - plain.useful == scores
    assert again.useful == plain.useful and again.flops > plain.flops


def test_peak_memory_is_of_this_process():
    assert 10e6 < peak_memory() < 1e12


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "granitemoe"])
def test_the_products_of_experts_are_counted_however_they_are_computed(kind):
    tokens, model = torch.arange(3, 67)[None], zoo.make(kind)

    def counted(way):
        model.config._experts_implementation = way
        _, forward = count_flops(lambda: model(tokens, use_cache=False))
        return forward, count_flops(lambda: model(tokens, labels=tokens, use_cache=False).loss.backward())[1]

    forward, both = counted("eager")
    assert counted("grouped_mm") == (forward, both)
    inner = next(p for name, p in model.named_parameters() if name.endswith("experts.down_proj")).shape[-1]
    experts = 2 * 64 * model.config.num_experts_per_tok * 3 * zoo.WIDTH * inner * zoo.BLOCKS
    assert forward > experts and both > 3 * experts


def test_the_fallback_of_grouped_products_is_counted_as_they_are():
    pytest.importorskip("transformers.integrations.moe")
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(3, 4, 5, requires_grad=True)
    ends = torch.tensor([2, 3, 6], dtype=torch.int32)
    _, flops = count_flops(lambda: torch.ops.transformers.grouped_mm_fallback(x, weight, ends).sum().backward())
    assert flops == 3 * 2 * 6 * 4 * 5
