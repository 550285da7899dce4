"""AutoDistil: students are slices of one model, in place and taken out; they learn a teacher's relations; the search."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from small_recipe import small_recipe
from test_objectives import context, rows
from test_training import log, small
from transformers import AutoModelForMaskedLM

from pretrain import engine
from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.meter import count_flops
from pretrain.core.models.elastic.relations import distance, projections, scores
from pretrain.core.models.elastic.subnetworks import Subnetwork, kept_blocks, parameters, run, subspace, weights, whole
from pretrain.core.models.families import base
from pretrain.objectives.distillation.autodistil import AutoDistil
from pretrain.recipe import load
from pretrain.stages.surgery import Surgery as SurgeryStage
from pretrain.surgery import Inputs
from pretrain.surgery.search.autodistil_search import AutoDistilSearch, relations
from pretrain.training.budget import Budget
from pretrain.training.loop import Settings

SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4}
SPACE = {
    "hidden_size": (32, 48, 64), "num_attention_heads": (2, 3, 4), "num_hidden_layers": (2, 3, 5),
    "mlp_ratio": (2.0, 4.0), "head_size": 16,
}  # fmt: skip
FEW = {
    "hidden_size": (32, 64),
    "num_attention_heads": (2, 4),
    "num_hidden_layers": (1, 2),
    "mlp_ratio": (2.0,),
    "head_size": 16,
}
TWO = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = ["bert", "roberta", "camembert"]
TOKENS = torch.arange(3, 43).view(2, 20)
ROWS = [{"input_ids": TOKENS[:1]}, {"input_ids": TOKENS[1:]}]
CHOSEN = [Subnetwork(32, 2, 64, 2), Subnetwork(48, 3, 192, 4), Subnetwork(48, 5, 96, 3), Subnetwork(64, 3, 256, 4)]


def loud(model, seed=0):
    """The model with weights of a size that matters, biases and norms among them."""
    source = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=source)
    return model


def made(family="bert", seed=0, **fields):
    return loud(zoo.make(family, **SIZES, **fields), seed).eval()


def logits(model):
    return model(TOKENS).logits


def alone(chosen, **more):
    """The surgery that takes out one subnetwork."""
    w, layers, i, h = chosen
    return AutoDistilSearch((w,), (h,), (layers,), (i / w,), 16, **more)


@pytest.fixture
def taught(tiny, tmp_path):
    """`taught(space, **fields)`: objective, SuperLM, what it trains beside, batch."""

    def make(space=FEW, given=((20, 31), (45,)), teacher=None, **fields):
        checkpoint.save(loud(tiny("bert", seed=7, **(teacher or TWO))), None, tmp_path / "teacher" / "checkpoint")
        objective = AutoDistil(str(tmp_path / "teacher"), **{**space, **fields})
        model = loud(tiny("bert", **TWO, **QUIET))
        batch = objective.prepare(rows(*map(list, given)), context(60))
        return objective, model, objective.modules(model), batch

    return make


def gradients(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return dict(zip((name for name, _ in model.named_parameters()), found, strict=True))


@pytest.mark.bits
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chosen", CHOSEN, ids=str)
@torch.no_grad()
def test_a_subnetwork_that_is_taken_out_computes_what_it_computed_in_place(family, chosen, tmp_path):
    model = made(family)
    student = alone(chosen)(model)
    assert whole(student) == chosen and not checkpoint.surgery_of(student)
    assert torch.equal(logits(student), run(model, chosen, logits))
    checkpoint.save(student, None, tmp_path / "c")
    opened = AutoModelForMaskedLM.from_pretrained(tmp_path / "c").eval()
    assert type(opened) is type(model) and torch.equal(logits(opened), logits(student))


@pytest.mark.bits
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_full_slice_is_the_model_itself(family):
    model = made(family)
    assert torch.equal(run(model, whole(model), logits), logits(model))
    given = dict(model.named_parameters())
    assert all(cut.data_ptr() == given[name].data_ptr() for name, cut in weights(model, whole(model)).items())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    taken = alone(whole(model))(model).state_dict()
    assert all(torch.equal(taken[name], value) for name, value in before.items())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_weights_are_the_first_along_each_axis_of_heads_the_first_of_the_first_and_blocks_spread_evenly():
    model, chosen = made(), Subnetwork(48, 3, 96, 4)  # heads of 12 of 16
    student = alone(chosen)(model)
    assert (
        kept_blocks(5, 3) == [0, 1, 3] and kept_blocks(12, 4) == [0, 3, 6, 9] and kept_blocks(5, 5) == [0, 1, 2, 3, 4]
    )
    units = [16 * head + entry for head in range(4) for entry in range(12)]
    for ours, theirs in enumerate([0, 1, 3]):
        small, large = student.bert.encoder.layer[ours], model.bert.encoder.layer[theirs]
        for name in ("query", "key", "value"):
            layer, source = getattr(small.attention.self, name), getattr(large.attention.self, name)
            assert torch.equal(layer.weight, source.weight[units][:, :48]) and torch.equal(
                layer.bias, source.bias[units]
            )
        output, source = small.attention.output, large.attention.output
        assert torch.equal(output.dense.weight, source.dense.weight[:48][:, units])
        assert torch.equal(output.LayerNorm.bias, source.LayerNorm.bias[:48])
        assert torch.equal(small.intermediate.dense.weight, large.intermediate.dense.weight[:96, :48])
        assert torch.equal(small.output.dense.weight, large.output.dense.weight[:48, :96])
    table = model.bert.embeddings.word_embeddings.weight
    assert torch.equal(student.bert.embeddings.word_embeddings.weight, table[:, :48])
    assert student.cls.predictions.decoder.weight is student.bert.embeddings.word_embeddings.weight
    assert torch.equal(student.cls.predictions.bias, model.cls.predictions.bias)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chosen", CHOSEN[:2], ids=str)
def test_what_is_outside_the_slice_has_no_gradient(family, chosen):
    model = made(family)
    inside = gradients(sum(cut.sum() for cut in weights(model, chosen).values()), model)  # 1 in the slice
    found = gradients(run(model, chosen, logits).square().sum(), model)
    assert sum(int((g != 0).sum()) for g in inside.values() if g is not None) == parameters(model, chosen)
    for name, gradient in found.items():
        if gradient is not None:
            assert not gradient[inside[name] == 0].any(), name
    student = alone(chosen)(model)
    theirs = gradients(logits(student).square().sum(), student)
    # The same numbers, each where it was cut from.
    total = sum(float(g.double().square().sum()) for g in found.values() if g is not None)
    assert total == pytest.approx(sum(float(g.double().square().sum()) for g in theirs.values()), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_parameters_and_flops_are_those_of_the_model_that_is_taken_out(family):
    model = made(family)
    for chosen in CHOSEN:
        student = alone(chosen)(model)
        assert parameters(model, chosen) == student.num_parameters() == sum(p.numel() for p in student.parameters())
        assert count_flops(lambda s=student: base(s)(TOKENS))[1] == 2 * chosen.flops(20)


def test_a_space_is_ordered_and_has_no_heads_that_a_model_cannot_have():
    space = subspace(*SPACE.values())
    assert len(space) == 5 * 3 * 2  # of width 64 only four heads are of at most 16
    assert {each[0::3] for each in space} == {(32, 2), (32, 4), (48, 3), (48, 4), (64, 4)}
    model = made()
    sizes = [parameters(model, each) for each in space]
    assert sizes[0] == min(sizes) and sizes[-1] == max(sizes) and space[-1] == whole(model)
    # The authors' space of tiny students, of heads that are no wider than theirs.
    tiny = subspace((128, 160, 192, 224), (7, 8, 9, 10), (4, 5, 6, 7), (2.0, 2.5, 3.0, 3.5), 64)
    assert {each[0::3] for each in tiny} == {(128, 8), (160, 8), (160, 10), (192, 8), (224, 7), (224, 8)}


def test_a_step_draws_the_largest_the_smallest_and_others_without_preference():
    objective, counts = AutoDistil("t", **SPACE), np.zeros(30)
    for seed in range(600):
        drawn = objective.draw(context(seed=seed))
        assert len(drawn) == len(set(drawn)) == 4 and {0, 29} <= set(drawn)
        counts[drawn] += 1
    assert counts[0] == counts[-1] == 600 and counts[1:-1].sum() == 1200
    assert np.abs(counts[1:-1] / 600 - 2 / 28).max() < 0.05
    single = AutoDistil("t", (64,), (4,), (2,), (2.0,), 16)
    assert single.draw(context()) == [0] and AutoDistil("t", **SPACE, sampled=0).draw(context()) == [0, 29]
    assert AutoDistil("t", **FEW, sampled=9).draw(context()) == list(range(6))


def test_a_batch_says_which_students_read_it():
    objective = AutoDistil("t", **SPACE, masked_lm=1.0)
    batch = objective.prepare(rows([20, 31], [45]), context(60))
    drawn = [n for n in range(30) if batch[f"weight_student_{n}"]]
    assert len(drawn) == 4 and all(int(batch[f"weight_student_{n}"]) == 2 for n in drawn)
    assert int(batch["weight"]) == 96 and int(batch["weight_masked_lm"]) == int((batch["target_BL"] != -100).sum())
    assert int(batch["weight_logits"]) == int(batch["weight_masked_lm"]) * sum(objective.space[n][0] for n in drawn)


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_relations_are_compared_over_the_tokens_of_a_document(kind):
    torch.manual_seed(0)
    ours, theirs = torch.randn(1, 7, 10), torch.randn(1, 7, 24)  # of which the first leaves two entries out
    documents = torch.tensor([[1, 1, 1, 2, 2, 2, 2]])
    mask = documents[:, :, None] == documents[:, None]
    found = distance([scores(ours, 4)], [scores(theirs, 4)], mask, kind)
    for place in range(7):
        seen, wanted = torch.nonzero(mask[0, place])[:, 0], []
        for head in range(4):
            a, b = ours[0, :, 2 * head : 2 * head + 2], theirs[0, :, 6 * head : 6 * head + 6]
            a, b = a[seen] @ a[place] / math.sqrt(2), b[seen] @ b[place] / math.sqrt(6)
            kl = F.kl_div(a.log_softmax(0), b.log_softmax(0), log_target=True, reduction="sum")
            wanted.append((a - b).square().mean() if kind == "mse" else kl)
        assert float(found[0, place]) == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-5)


def test_the_loss_is_the_sum_over_students_of_the_mean_over_tokens(taught):
    objective, model, beside, batch = taught(sampled=2)
    loss = objective.loss(model, batch, beside)
    drawn = [objective.space[n] for n in range(len(objective.space)) if batch[f"weight_student_{n}"]]
    inside = batch["document_BL"] != 0
    mask = batch["document_BL"][:, :, None] == batch["document_BL"][:, None]
    inputs = {"input_ids": batch["tokens_BL"], "position_ids": batch["position_BL"]}
    inputs["attention_mask"] = torch.zeros(mask[:, None].shape).masked_fill(
        ~mask[:, None], torch.finfo(torch.bfloat16).min
    )
    with torch.no_grad():
        theirs = relations(beside.model, inputs, 4)
        apart = []
        for chosen in drawn:
            ours = relations(alone(chosen)(model), inputs, 4)
            squares = [(a - b).square().mean(1) for a, b in zip(ours, theirs, strict=True)]
            each = [(square * mask).sum(-1) / mask.sum(-1) for square in squares]
            apart.append(float(sum(each)[inside].mean()))
    assert loss.value.item() == pytest.approx(sum(apart), rel=1e-5)
    assert float(loss.parts["smallest"]) == pytest.approx(apart[0], rel=1e-5)
    assert float(loss.parts["largest"]) == pytest.approx(apart[-1], rel=1e-5)
    assert float(loss.parts["sampled"]) == pytest.approx(sum(apart[1:-1]) / 2, rel=1e-5)


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(taught, kind):
    space = {
        "hidden_size": (64,),
        "num_attention_heads": (4,),
        "num_hidden_layers": (2,),
        "mlp_ratio": (2.0,),
        "head_size": 16,
    }
    objective, model, beside, batch = taught(space, distance=kind)
    assert float(objective.loss(model, batch, beside).value) > 0.01
    assert abs(float(objective.loss(copy.deepcopy(beside.model), batch, beside).value)) < 1e-6


def test_the_loss_of_masked_language_modelling_is_each_students_own(taught):
    objective, model, beside, batch = taught(masked_lm=0.5, sampled=1)
    loss, plain = objective.loss(model, batch, beside), taught(sampled=1)[0].loss(model, batch, beside)
    drawn = [objective.space[n] for n in range(len(objective.space)) if batch[f"weight_student_{n}"]]
    wanted, target = 0.0, batch["target_BL"]
    mask = (batch["document_BL"][:, :, None] == batch["document_BL"][:, None])[:, None]
    for chosen in drawn:
        student = alone(chosen)(model)
        with torch.no_grad():
            guessed = student(batch["tokens_BL"], position_ids=batch["position_BL"], attention_mask=mask).logits
        wanted += float(F.cross_entropy(guessed[target != -100], target[target != -100]))
    assert float(loss.parts["masked_lm"]) == pytest.approx(wanted, rel=1e-4)
    assert float(loss.value) == pytest.approx(float(plain.value) + 0.5 * wanted, rel=1e-4)


@pytest.mark.parametrize("masked_lm", [0.0, 1.0])
def test_recomputed_activations_leave_the_same_gradient(taught, masked_lm):
    objective, model, beside, batch = taught(masked_lm=masked_lm)
    before = gradients(objective.loss(model, batch, beside).value, model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective.loss(model, batch, beside).value.backward()
    assert all(torch.allclose(p.grad, before[name], rtol=1e-4, atol=1e-7) for name, p in model.named_parameters())


def training(prepared, tiny, folder, steps, tmp_path, *, seed=0, **fields):
    """A training of a SuperLM of six students, and what each step drew."""
    if not (tmp_path / "teacher").exists():
        checkpoint.save(loud(tiny("bert", vocab_size=512, seed=7, **TWO)), None, tmp_path / "teacher" / "checkpoint")
    objective, drawn = AutoDistil(str(tmp_path / "teacher"), **{**FEW, **fields}), []
    plain = AutoDistil.prepare

    def noted(self, rows, context):
        batch = plain(self, rows, context)
        drawn.append(tuple(n for n in range(6) if batch[f"weight_student_{n}"]))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoDistil, "prepare", noted)
        settings = Settings(budget=Budget(steps=steps), save_every=2, bar=False)
        done = small(prepared, tiny, folder, settings=settings, objective=objective, family="bert", **TWO)
    return done, drawn


@pytest.mark.bits
def test_a_training_goes_on_with_the_same_students_and_the_same_bits(prepared, tiny, tmp_path):
    undisturbed, drawn = training(prepared, tiny, tmp_path / "a", 6, tmp_path)
    _, before = training(prepared, tiny, tmp_path / "b", 2, tmp_path)
    resumed, after = training(prepared, tiny, tmp_path / "b", 6, tmp_path)
    assert before + after == drawn and len(set(drawn)) > 1
    ours, theirs = undisturbed.trainee.state_dict(), resumed.trainee.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and undisturbed.flops == resumed.flops


@pytest.mark.parametrize("masked_lm", [0.0, 1.0])
def test_the_flops_of_a_step_are_those_of_its_students_and_of_one_pass_of_the_teacher(
    prepared, tiny, tmp_path, masked_lm
):
    steps = 12
    done, drawn = training(prepared, tiny, tmp_path / "a", steps, tmp_path, masked_lm=masked_lm)
    assert len(drawn) == steps
    model, teacher = done.model, done.trainee.beside[0]
    tokens = torch.arange(8 * 64).view(8, 64) % 500 + 5
    passed = count_flops(lambda: relations(teacher.model, {"input_ids": tokens}, 4))[1]

    def cost(number, targets):
        w, layers, i, h = AutoDistil("t", **FEW).space[number]
        single = AutoDistil(str(tmp_path / "teacher"), (w,), (h,), (layers,), (i / w,), 16, masked_lm=masked_lm)
        batch = single.prepare(rows(*[[64]] * 8), context(64))
        batch["tokens_BL"], batch["target_BL"] = tokens, torch.full((8, 64), -100)
        batch["target_BL"].view(-1)[:targets] = 7
        batch["weight_masked_lm"] = torch.tensor(targets)
        return count_flops(lambda: single.loss(model, batch, teacher).value.backward())[1] - passed

    costs = {number: (cost(number, 64), cost(number, 96)) for number in range(6)}
    spent = 0.0
    for numbers, count in zip(drawn, _targets(done, steps), strict=True):
        each = [costs[n][0] + (costs[n][1] - costs[n][0]) * (count - 64) / 32 for n in numbers]
        spent += passed + sum(each)
    assert done.flops == pytest.approx(spent, rel=1e-9)
    counted = [key for key in done.meter.counts if not key.startswith("optimizer")]
    assert len(counted) == 1 and len(done.meter.counts[counted[0]]) < steps  # the rest was worked out


def _targets(done, steps):
    """How many tokens each step hid."""
    done.loader.load_state({"step": 0, "taken": {"*": 0}, "progress": 0.0, "mixture": None})
    for step in range(steps):
        yield sum(int(batch["weight_masked_lm"]) for (batch,) in done.loader.step(step, 0.0))


def test_students_come_nearer_to_the_teacher(prepared, tiny, tmp_path):
    done, _ = training(prepared, tiny, tmp_path / "a", 30, tmp_path)
    parts = [row["parts"] for row in log(tmp_path / "a")]
    for name in ("largest", "smallest"):
        assert np.mean([part[name] for part in parts[-5:]]) < 0.8 * np.mean([part[name] for part in parts[:5]])
    assert done.step == 30


@torch.no_grad()
def test_the_search_gives_the_nearest_student_within_the_limits():
    model, teacher = made(), made(seed=3)
    space = subspace(*SPACE.values())
    inputs = Inputs(batches=ROWS, models=[teacher])

    def apart(chosen):
        with projections(teacher) as theirs:
            teacher(TOKENS)
        student = alone(chosen)(model)
        with projections(student) as ours:
            student(TOKENS)
        pairs = [(scores(a, 4), scores(b, 4)) for a, b in zip(ours, theirs, strict=True)]
        return float(sum(F.mse_loss(a, b) for a, b in pairs))

    distances = {chosen: apart(chosen) for chosen in space}
    for limits in ({}, {"max_parameters": 90_000}, {"max_flops": space[12].flops(30), "length": 30}):
        within = [
            c for c in space
            if parameters(model, c) <= limits.get("max_parameters", math.inf) and c.flops(30) <= limits.get("max_flops", math.inf)
        ]  # fmt: skip
        best = min(within, key=distances.__getitem__)
        student = AutoDistilSearch(**SPACE, **limits)(model, inputs)
        metrics = inputs.extra.pop("metrics")
        assert whole(student) == best and metrics["autodistil/tried"] == len(within) < 31
        assert metrics["autodistil/distance"] == pytest.approx(distances[best], rel=1e-5)
        assert metrics["autodistil/distance_largest"] == pytest.approx(distances[within[-1]], rel=1e-5)
        assert [metrics[f"autodistil/{field}"] for field in Subnetwork._fields] == list(best)
        assert metrics["autodistil/flops"] == best.flops(limits.get("length", 128))
        assert not student.training and torch.equal(logits(student), run(model, best, logits))
    assert len({whole(AutoDistilSearch(**SPACE, max_parameters=n)(model, inputs)) for n in (40_000, 90_000)}) == 2


def test_padding_and_other_documents_have_no_part_in_the_search():
    model, teacher = made(), made(seed=3)
    apart = [{"input_ids": TOKENS[:1, :9]}, {"input_ids": TOKENS[1:, :9]}]
    ids = torch.cat([TOKENS[0, :9], TOKENS[1, :9], torch.tensor([5] * 4)])[None]
    packed = [{
        "input_ids": ids, "attention_mask": torch.tensor([[1] * 9 + [2] * 9 + [0] * 4]),
        "position_ids": torch.cat([torch.arange(9), torch.arange(9), torch.arange(4)])[None],
    }]  # fmt: skip
    found = []
    for batches in (apart, packed):
        inputs = Inputs(batches=batches, models=[teacher])
        AutoDistilSearch(**SPACE)(model, inputs)
        found.append(inputs.extra["metrics"])
    assert found[0]["autodistil/distance"] == pytest.approx(found[1]["autodistil/distance"], rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hidden_size": (50,)},
            "no hidden_size is a num_attention_heads of heads of at most head_size 16: accepted: a",
        ),
        ({"hidden_size": ()}, "accepted: a width that one of num_attention_heads divides"),
        ({"num_hidden_layers": (0,)}, "num_hidden_layers"),
        ({"mlp_ratio": (-1.0,)}, "mlp_ratio"),
        ({"distance": "cosine"}, "distance 'cosine': accepted: mse, kl"),
    ],
)
@pytest.mark.parametrize("cls", [lambda **fields: AutoDistil("t", **fields), AutoDistilSearch])
def test_a_wrong_field_is_named(cls, fields, message):
    with pytest.raises(PretrainError, match=message) as error:
        cls(**SPACE | fields)
    assert "\n" not in str(error.value)


def test_models_that_cannot_hold_the_students_are_refused(taught, tiny, tmp_path):
    for fields, message in (
        ({"head_size": 32}, "head_size 32: accepted: 16, the model's"),
        ({"num_hidden_layers": (1, 3)}, "num_hidden_layers 3: accepted: at most the model's 2"),
        ({"mlp_ratio": (2.0, 2.5)}, "mlp_ratio: intermediate_size 160: accepted: at most the model's 128"),
        ({"relation_heads": 40}, "relation_heads 40: accepted: at most 32, the width of the narrowest model"),
    ):
        with pytest.raises(PretrainError, match=f"autodistil: {message}"):
            taught(**fields)
    with pytest.raises(PretrainError, match="the teacher's vocabulary has 50 entries: accepted: 97"):
        taught(teacher=TWO | {"vocab_size": 50})
    checkpoint.save(tiny("modernbert"), None, tmp_path / "modern")
    with pytest.raises(PretrainError, match="the teacher's family 'modernbert': accepted: bert, roberta, camembert"):
        AutoDistil(str(tmp_path / "modern"), **FEW).modules(tiny("bert", **TWO))
    with pytest.raises(PretrainError, match="family 'modernbert': accepted: bert, roberta, camembert"):
        AutoDistilSearch(**FEW)(tiny("modernbert"))


def test_what_the_search_needs_is_one_clear_line():
    model = made()
    with pytest.raises(PretrainError, match="it needs text to calibrate on"):
        AutoDistilSearch(**SPACE)(model, Inputs(models=[model]))
    with pytest.raises(PretrainError, match=r"0 other models: accepted: a stage with `models: \[TEACHER\]`"):
        AutoDistilSearch(**SPACE)(model, Inputs(batches=ROWS))
    smallest = parameters(model, subspace(*SPACE.values())[0])
    with pytest.raises(
        PretrainError, match=f"max_parameters 1000, max_flops None: accepted: at least {smallest:,} par"
    ):
        AutoDistilSearch(**SPACE, max_parameters=1000)(model, Inputs(batches=ROWS, models=[model]))
    other = made(vocab_size=50)
    with pytest.raises(PretrainError, match="the teacher's vocabulary has 50 entries: accepted: 96"):
        AutoDistilSearch(**SPACE)(model, Inputs(batches=ROWS, models=[other]))


def test_a_stage_reads_held_out_rows_to_choose_by_and_one_split_alone():
    search = {
        "method": "autodistil_search",
        **{name: list(v) if isinstance(v, tuple) else v for name, v in SPACE.items()},
    }
    given = {"checkpoint": "c", "corpus": "d", "models": ["t"]}
    assert SurgeryStage(**given, surgeries=[search]).splits() == {"corpus": "validation"}
    assert SurgeryStage(**given, surgeries=["gptq"]).splits() == {}
    with pytest.raises(PretrainError, match="gptq the train split and autodistil_search the validation split of the"):
        SurgeryStage(**given, surgeries=["gptq", search]).splits()


@pytest.mark.processes
def test_a_recipe_trains_a_superlm_takes_out_a_student_and_tunes_it(tmp_path, stories):
    space = {name: list(v) if isinstance(v, tuple) else v for name, v in FEW.items()}
    stage = {
        "stage": "train",
        "corpus": "corpus",
        "length": 32,
        "batch_rows": 4,
        "budget": {"steps": 3},
        "evaluate_tokens": 256,
    }
    text = small_recipe(
        tmp_path, stories[:24],
        stage | {"name": "superlm", "init": "model", "objective": {"method": "autodistil", "teacher": "model", **space}},
        {
            "stage": "surgery", "name": "student", "checkpoint": "superlm", "models": ["model"], "corpus": "corpus",
            "calibration_rows": 4, "length": 32, "surgeries": [{"method": "autodistil_search", "max_parameters": 60_000, **space}],
        },
        stage | {"name": "tuned", "init": "student", "objective": "masked_lm"},
        model={"family": "bert", **TWO, "max_position_embeddings": 64}, objective="masked_lm", budget={"steps": 2},
        evaluate_tokens=256, held_out=0.3,
    )  # fmt: skip
    (tmp_path / "r.yaml").write_text(text.replace("    vocab_size: 400", "    vocab_size: 400\n    mask: true"))
    done = engine.run(load(tmp_path / "r.yaml", [], tmp_path / "run"), say=engine.silent)
    metrics = done.stages["student"]["metrics"]
    assert metrics["parameters"] <= 60_000 < metrics["parameters_before"] and metrics["autodistil/tried"] >= 1
    config = json.loads(next(tmp_path.rglob("tuned/checkpoint/config.json")).read_text())
    assert config["hidden_size"] == metrics["autodistil/hidden_size"] and config["model_type"] == "bert"
