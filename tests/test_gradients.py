"""Micro-batches and processes add up to the gradient of the whole batch: one contract for every objective."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from gradient_cases import CUTS, all_cases, build, distance
from test_training import small

from pretrain.core.batch import Example, counts
from pretrain.core.errors import PretrainError
from pretrain.core.method import method_class
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.objectives.language.electra import Electra
from pretrain.objectives.language.span_corruption import SpanCorruption
from pretrain.policies import Policy
from pretrain.stages.train import Train
from pretrain.training.compatible import check_together
from pretrain.training.distributed import World

ALONE = World(0, 1, torch.device("cpu"))
ROUNDING = 5e-6  # sums in float32 in another order: up to 5e-7 was seen; one weight for all terms: from 1e-3 on
CASES = all_cases()
NAMES = ["-".join([n, *(str(v) for v in given.values()), family]).rstrip("-") for n, given, family in CASES]


@dataclass(frozen=True)
class Contrast(CausalLM):
    """One whose rows are compared with one another."""

    divisible: ClassVar[bool] = False
    name = "contrast"


@dataclass(frozen=True)
class Weighing(Policy):
    """One that weighs tokens."""

    weighs_tokens: ClassVar[bool] = True
    name = "weighing"


@dataclass(frozen=True)
class Sly(Policy):
    """One that does so without saying it."""

    name = "sly"

    def before_step(self, training: Any, state: Any, batches: Any) -> None:
        for batch in batches:
            batch["token_weight_BL"] = torch.ones(batch["tokens_BL"].shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teachers")


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_uneven_micro_batches_leave_the_gradient_of_the_whole_batch(prepared, folder, case) -> None:
    made = build(*case, prepared, folder)
    batch, micro_batches = made.batch(), made.micro_batches()
    numbers = [counts(micro_batch) for (micro_batch,) in micro_batches]
    assert counts(batch) == {name: sum(part[name] for part in numbers) for name in counts(batch)}
    whole, loss = made.gradients([[batch]], ALONE)
    parts, loss_of_parts = made.gradients(micro_batches, ALONE)
    assert distance(whole, parts) < ROUNDING
    largest = math.log(made.context.vocabulary.size)  # of each term; those of either sign may cancel
    assert loss_of_parts == pytest.approx(loss, rel=ROUNDING, abs=ROUNDING * largest)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "modernbert"])
@pytest.mark.parametrize("text", ["", "x"])
def test_a_document_with_nothing_to_predict_counts_nothing_in_a_batch_of_its_own(prepared, folder, family, text):
    """Of a mean over no targets neither value nor gradient would be a number."""
    made = build("native", {}, family, prepared, folder)
    made.rows.append(Example({"text": text}, 0, len(made.rows)))
    whole, loss = made.gradients([[made.batch()]], ALONE)
    parts, loss_of_parts = made.gradients([[made.batch(0, 4)], [made.batch(4, 6)], [made.batch(6)]], ALONE)
    assert loss_of_parts == pytest.approx(loss, rel=ROUNDING) and distance(whole, parts) < ROUNDING


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_tokens_of_weight_zero_have_no_part_in_any_term(prepared, folder, case) -> None:
    """Rows that weigh nothing leave what the others leave alone, as long as both are shares of the same whole."""
    name, given, family = case
    made = build(name, given | ({"perturbation": 0.0} if name == "pela_pretraining" else {}), family, prepared, folder)
    if not made.objective.token_weights:
        with pytest.raises(PretrainError, match="'weighing' weighs tokens"):
            check_together([made.objective], [Weighing()], 1)
        return
    light, heavy = made.batch(), made.batch(0, CUTS[1])
    light["token_weight_BL"] = torch.ones(light["target_BL"].shape)
    light["token_weight_BL"][CUTS[1] :] = 0
    weighed, _ = made.gradients([[light]], ALONE)
    heavy["token_weight_BL"] = torch.ones(heavy["target_BL"].shape)
    for count in counts(light):
        heavy[count] = heavy[count].double()
    alone, _ = made.gradients([[heavy]], ALONE, targets=[counts(light)])
    assert distance(alone, weighed) < ROUNDING


@pytest.mark.parametrize("micro_rows", [4, 8])
def test_a_loss_of_the_whole_batch_is_refused_in_parts(tiny, prepared, tmp_path, micro_rows) -> None:
    if micro_rows == 8:
        assert small(prepared, tiny, tmp_path, objective=Contrast()).step == 5
        return
    with pytest.raises(PretrainError, match="'contrast'.* cut into 2: accepted: micro_rows 0"):
        small(prepared, tiny, tmp_path, objective=Contrast(), micro_rows=micro_rows)


def test_weights_of_tokens_that_an_objective_would_not_follow_are_refused_before_training(tiny, prepared, tmp_path):
    wrong = "weighing' weighs tokens, which not every term of the loss of 'electra' follows: accepted"
    with pytest.raises(PretrainError, match=wrong):
        check_together([CausalLM(), Electra()], [Weighing()], 1)
    check_together([CausalLM()], [Weighing()], 4)
    assert not (tmp_path / "log.jsonl").exists()
    with pytest.raises(PretrainError, match="a policy weighs tokens, .*'span_corruption'"):
        small(prepared, tiny, tmp_path, objective=SpanCorruption(), policies=[Sly()], family="t5")


def test_a_recipe_with_such_a_pair_is_refused_as_it_is_read() -> None:
    fields = {"corpus": "c", "tokenizer": "t", "budget": {"steps": 1}}
    with pytest.raises(PretrainError, match="'toremi' weighs tokens, which not every term of the loss of 'electra'"):
        Train(**fields, model={"family": "bert"}, objective="electra", policies=["toremi"])


@pytest.mark.processes
def test_two_processes_leave_the_gradient_of_the_whole_batch(prepared, folder) -> None:
    """With ddp and with fsdp, one after the other."""
    job = Path(__file__).with_name("gradient_job.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(job)]
    for name, *case in all_cases():  # teachers are made here, once, and not by two processes at a time
        if "teacher" in {item.name for item in fields(method_class(name))}:
            build(name, *case, prepared, folder)
    subprocess.run([*command, str(prepared), str(folder), str(ROUNDING)], check=True)
