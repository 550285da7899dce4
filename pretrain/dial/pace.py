"""How fast a machine trains beyond its large products, from a few steps of two small decoders."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import cast

import torch

from pretrain.core.hardware import autocast, matrix_rate
from pretrain.core.models.cross_entropy import linear_cross_entropy
from pretrain.core.models.fast import accelerate
from pretrain.core.quick.machine import Beside, efficiency, likely_beside, remember_beside
from pretrain.dial.shapes import Shape, fields, shape_of

WIDTH, FEW, MANY = 64, 1024, 8192  # of the two decoders, and their vocabularies
ROWS, LENGTH = 4, 256
WARM, STEPS = 2, 9  # steps of each that are not looked at, and those whose median is taken


def measure(device: torch.device) -> Beside:
    """What a step takes beside its large products on this machine, which is remembered for the plans to come.

    Of the two decoders the larger has but more logits: what its steps take more, beyond what the products of its head
    do at the rate of large ones, is theirs. What the smaller one's steps take beyond both is its blocks'. While more
    wants the cores than there are nothing is measured, and what is known stands.
    """
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1):
        return likely_beside()
    rate, tokens = matrix_rate(device) * efficiency(WIDTH), ROWS * LENGTH
    few, many = shape_of(WIDTH, FEW), shape_of(WIDTH, MANY)
    work = [tokens * shape.flops(LENGTH) / rate for shape in (few, many)]
    steps = [_step(shape, device) for shape in (few, many)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(WARM + STEPS):
        for each, step in zip(seconds, steps, strict=True):  # in turn: what else the machine does slows both
            each.append(step())
    quick, slow = (statistics.median(each[WARM:]) for each in seconds)
    logit = max(0.0, slow - quick - (work[1] - work[0])) / (tokens * (MANY - FEW))
    block = max(0.0, quick - work[0] - tokens * FEW * logit) / few.depth
    return remember_beside(device.type, Beside(block, logit), quick + slow)


def _step(shape: Shape, device: torch.device) -> Callable[[], float]:
    """What makes a step, forwards, backwards and AdamW's update, and tells its seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):  # nothing drawn later depends on whether it was measured
        config = LlamaConfig.from_dict(fields(shape, "llama", LENGTH) | {"vocab_size": shape.vocabulary})
        model = LlamaForCausalLM(config)
    cast("torch.nn.Module", model).to(device)
    accelerate(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids_BL = torch.arange(ROWS * LENGTH, device=device).view(ROWS, LENGTH) % shape.vocabulary

    def step() -> float:
        started = time.perf_counter()
        with autocast(device, "auto"):
            hidden_BLE = model.model(input_ids=ids_BL, use_cache=False).last_hidden_state
            loss, _ = linear_cross_entropy(hidden_BLE, model.lm_head.weight, ids_BL)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    return step
