"""Codebook features: what a codebook computes, to the authors' numbers; its gradients, its codes from text, steering."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from test_objectives import context, rows
from torch.nn import functional as F

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.generation.loop import decode
from pretrain.core.models.discrete.codebooks import Codebooks, codebooks, errors_of, fired, modules_of
from pretrain.core.models.families import at, blocks, family
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.decoding.steering.code_steering import CodeSteering
from pretrain.evaluation.probes.code_activations import CodeActivations
from pretrain.objectives.language.causal_lm import CausalLM
from pretrain.objectives.language.codebook_lm import CodebookLM
from pretrain.stages import Job
from pretrain.stages.evaluate import Evaluate
from pretrain.surgery import Inputs
from pretrain.surgery.discrete.codebook_features import CodebookFeatures

IDS_BL = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(0))
FAMILIES = ["llama", "qwen3", "gpt2"]
ROWS = rows((12, 9), (20,), (5, 7))


def layer(heads=2, codes=12, width=6, k=3, seed=0):
    """Codebooks in float64 with codes, scales and shifts that are drawn."""
    made = Codebooks("attention", heads, codes, width, k, {"dtype": torch.float64, "device": torch.device("cpu")})
    source = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=source, dtype=torch.float64)
    return made


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_codes(tiny, name="llama", vocab_size=97, **fields):
    """A model in float64 with codebooks."""
    model = tiny(name, initializer_range=0.3, vocab_size=vocab_size).double()
    return CodebookFeatures(**{"codes": 20, "k": 2, "initialisation": "normal"} | fields)(model)


def by_hand(module, x_BLE):
    """As the paper's code has it, head by head and token by token: ids by the inner product with c / ‖c‖, the codes' mean."""
    codes_HKD, scale_HD, shift_HD = (p.detach().numpy() for p in (module.codes, module.scale, module.shift))
    x_NHD = x_BLE.detach().numpy().reshape(-1, *scale_HD.shape)
    ids, out, normed = [], np.empty_like(x_NHD), np.empty_like(x_NHD)
    for n, x_HD in enumerate(x_NHD):
        for h, x_D in enumerate(x_HD):
            z_D = (x_D - x_D.mean()) / np.sqrt(x_D.var() + 1e-5) * scale_HD[h] + shift_HD[h]
            order = np.argsort(-(codes_HKD[h] @ z_D) / np.linalg.norm(codes_HKD[h], axis=1))[: module.k]
            ids.append(order)
            normed[n, h], out[n, h] = z_D, codes_HKD[h][order].sum(0) / module.k
    return np.array(ids).reshape(*x_NHD.shape[:2], module.k), normed, out


def test_a_code_times_a_scale_is_replaced_by_that_code():
    module = layer(k=1)
    module.scale.data.fill_(1)
    module.shift.data.zero_()
    module.codes.data -= module.codes.data.mean(-1, keepdim=True)  # as what a layer norm leaves
    for scale, offset in ((3.7, 0.0), (0.2, -4.0)):  # the norm takes both away
        x_KHD = scale * module.codes.detach().transpose(0, 1) + offset
        assert torch.equal(module(x_KHD.reshape(1, 12, 12)).view(12, 2, 6), module.codes.transpose(0, 1))


def test_with_as_many_as_there_are_every_activation_is_the_mean_of_all():
    module = layer(codes=4, k=4)
    expected = module.codes.mean(1).flatten().expand(2, 5, 12)
    assert torch.allclose(module(drawn(2, 5, 12)), expected, atol=1e-15)


def test_numbers_and_gradients_are_those_of_the_authors_code():
    module, x_BLE, weight_BLE = layer(), drawn(2, 5, 12).requires_grad_(), drawn(2, 5, 12, seed=2)
    module.errors = []
    y_BLE = module(x_BLE)
    id_NHJ, n_NHD, y_NHD = by_hand(module, x_BLE)
    assert np.array_equal(module.nearest(torch.tensor(n_NHD)).numpy(), id_NHJ)
    assert np.allclose(y_BLE.detach().numpy().reshape(y_NHD.shape), y_NHD, atol=1e-14)
    (error_BL,) = module.errors
    assert np.allclose(error_BL.detach().numpy().ravel(), ((y_NHD - n_NHD) ** 2).sum((1, 2)), atol=1e-13)
    ((y_BLE * weight_BLE).sum() + error_BL.mean()).backward()
    codes_HKD = np.zeros((2, 12, 6))  # what the task asks of them, and 2 (y - n) / N of the mean squared error
    grad_NHD = weight_BLE.numpy().reshape(y_NHD.shape) + 2 * (y_NHD - n_NHD) / len(y_NHD)
    for n, h, j in np.ndindex(id_NHJ.shape):
        codes_HKD[h, id_NHJ[n, h, j]] += grad_NHD[n, h] / 3
    assert np.allclose(module.codes.grad.numpy(), codes_HKD, atol=1e-13)
    # Straight through: the activation gets what the norm alone would hand back, and nothing of the squared error.
    again_BLE = x_BLE.detach().requires_grad_()
    (module.normed(again_BLE).reshape(2, 5, 12) * weight_BLE).sum().backward()
    assert torch.equal(x_BLE.grad, again_BLE.grad)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_projection_and_the_residual_stream_are_given_codes_alone(tiny, name):
    model = with_codes(tiny, name)
    entry, places = family(model), codebooks(model)
    heads = model.config.num_attention_heads
    assert list(places) == [
        f"{n}.{p}" for n in (0, 1) for p in (*(f"attention.{h}" for h in range(heads)), "feed_forward")
    ]
    given, left = {}, {}
    for number, block in enumerate(blocks(model)):
        at(block, entry.attention).get_submodule(f"{entry.output}.linear").register_forward_pre_hook(
            lambda _, args, number=number: given.setdefault(number, args[0])
        )
        at(block, entry.feed_forward).register_forward_hook(
            lambda _, __, out, number=number: left.setdefault(number, out)
        )
    with fired(model) as ids, torch.no_grad():
        model(IDS_BL)
    for place, (module, head) in places.items():
        number, part = int(place[0]), place.split(".")[1]
        mean_BLD = module.codes[head][ids[place][0]].mean(-2)
        width = mean_BLD.shape[-1]
        there = given[number] if part == "attention" else left[number]
        assert torch.allclose(there[..., head * width : (head + 1) * width], mean_BLD, atol=1e-14)
    assert not any(module.log for module in modules_of(model))


def test_one_codebook_for_all_heads_and_some_blocks_alone(tiny):
    model = with_codes(tiny, heads=False, layers=(1,), places="attention")
    assert list(codebooks(model)) == ["1.attention"] and modules_of(model)[0].codes.shape == (1, 20, 32)
    plain, coded = (with_codes(tiny, places=part) for part in ("attention", "feed_forward"))
    assert {m.part for m in modules_of(plain)} == {"attention"} and {m.part for m in modules_of(coded)} == {
        "feed_forward"
    }


def test_the_loss_is_that_of_the_tokens_and_of_the_codes(tiny):
    model = with_codes(tiny).train()
    batch = CausalLM().prepare(ROWS, context())
    found, plain = (objective.loss(model, batch) for objective in (CodebookLM(alpha=0.3), CausalLM()))
    assert all(module.errors is None for module in modules_of(model))
    with errors_of(model) as errors, torch.no_grad():
        CausalLM().loss(model, batch)
    has_target_BL = batch["target_BL"] >= 0
    missed = sum(errors)[has_target_BL].mean()
    assert len(errors) == 4 and torch.allclose(found.value, plain.value + 0.3 * missed)
    assert torch.allclose(found.parts["reconstruction"], missed) and torch.equal(found.nll_BL, plain.nll_BL)


def test_what_is_recomputed_in_the_backward_pass_gives_the_same_gradients(tiny):
    def gradients(model):
        CodebookLM().loss(model, CausalLM().prepare(ROWS, context())).value.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    model = with_codes(tiny).train()
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable({"use_reentrant": False})
    expected, found = gradients(model), gradients(again)
    assert expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in expected)
    assert all(bool(expected[n].any()) for n in expected if "codebooks" in n)


def test_as_many_codes_as_there_are_activations_miss_nothing(shelf):
    model, surgery = shelf.model("llama").double(), CodebookFeatures(codes=5, k=1)
    surgery.restore(model)
    module, source = modules_of(model)[0], torch.Generator().manual_seed(0)
    x_NE = drawn(5, 32).repeat(40, 1)
    assert surgery._fit(module, x_NE, source) < 1e-12
    centres_KD = {tuple(row) for row in module.codes[0].detach().numpy().round(5)}
    assert centres_KD == {tuple(row) for row in module.normed(x_NE)[:5, 0].detach().numpy().round(5)}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_codes_from_text_are_nearer_than_drawn_ones_and_padding_is_no_text(shelf, name):
    def made(batches, **fields):
        inputs = Inputs(shelf.tokenizer, batches, seed=1)
        return CodebookFeatures(codes=12, k=1, **fields)(shelf.model(name), inputs), inputs

    model, inputs = made(shelf.batches())
    assert 0 < inputs.extra["metrics"]["code_error"] < 1
    other = shelf.batches()
    for batch in other:
        batch["input_ids"][batch["attention_mask"] == 0] = 9
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), made(other)[0].parameters(), strict=True))

    def missed(model):
        with errors_of(model) as errors, torch.no_grad():
            model(shelf.batches()[0]["input_ids"][:, :10])
        return float(sum(errors).mean())

    assert missed(model) < missed(made([], initialisation="normal")[0])


def test_a_checkpoint_is_opened_and_trained_on(tiny, tmp_path):
    model = with_codes(tiny).float()
    checkpoint.save(model, None, tmp_path / "c")
    again, _ = checkpoint.load(tmp_path / "c")
    with torch.no_grad():
        assert torch.equal(again(IDS_BL).logits, model(IDS_BL).logits)
    optimizer = torch.optim.Adam([module.codes for module in modules_of(again.train())], lr=0.1)
    batch, losses = CausalLM().prepare(ROWS, context()), []
    for _ in range(8):
        loss = CodebookLM().loss(again, batch)
        losses.append(float(loss.parts["reconstruction"]))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_forced_codes_stand_in_the_place_of_the_least_near(tiny):
    model, codes = with_codes(tiny, k=3), ("1.feed_forward:4", "1.feed_forward:7", "0.attention.2:19")
    method, seen = CodeSteering(codes), []
    with fired(model) as free, torch.no_grad():
        model(IDS_BL)
    modules_of(model)[0].register_forward_pre_hook(lambda *_: seen.append(dict(modules_of(model)[0].forced)))
    with fired(model) as steered:
        tokens_BN = method.generate(model, IDS_BL, max_new_tokens=3)
    assert len(seen) == 3 and all(set(each) == {2} for each in seen)
    assert all(bool((ids == torch.tensor([4, 7])).all()) for ids in (i[..., 1:] for i in steered["1.feed_forward"]))
    assert all(bool((ids[..., -1] == 19).all()) for ids in steered["0.attention.2"])
    first = steered["0.attention.2"][0]
    assert torch.equal(first[..., :2], free["0.attention.2"][0][..., :2])  # the nearest two are the token's own
    assert torch.equal(steered["0.attention.0"][0], free["0.attention.0"][0])  # and the other heads are
    assert not any(module.forced for module in modules_of(model))
    assert not torch.equal(tokens_BN, decode(model, IDS_BL, max_new_tokens=3))


def test_a_code_that_writes_a_token_makes_the_model_write_it(tiny):
    model = with_codes(tiny, k=1)
    module = codebooks(model)["1.feed_forward"].module
    with torch.no_grad():
        module.codes[0, 5] = 1e4 * F.normalize(model.lm_head.weight[42], dim=-1)
        assert int((model.lm_head.weight @ module.codes[0, 5]).argmax()) == 42
    steered_BN = CodeSteering(("1.feed_forward:5",)).generate(model, IDS_BL, max_new_tokens=4)
    assert bool((steered_BN[:, 9:] == 42).all())


def test_codes_are_counted_told_apart_by_domain_and_shown_where_they_fire(tiny, shelf):
    """Codes that follow from the token alone: of one domain's text the one, of the other's the other."""
    model = with_codes(tiny, vocab_size=len(shelf.tokenizer), places="feed_forward", layers=(0,), codes=6, k=1)
    module = modules_of(model)[0]
    tokenizer = shelf.tokenizer
    fox = tokenizer(" fox", add_special_tokens=False)["input_ids"][0]
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0]))

    def known(x):
        module.log[0].append((seen[-1] == fox).long()[..., None] * 2 + 1)  # 3 at a fox, 1 elsewhere
        return x

    module.forward = known
    texts = [("the quick fox jumps over the fox", "zoo"), ("the dog sleeps", "home"), ("the dog jumps", "home")]
    documents = [{"text": text, "domain": domain} for text, domain in texts]
    found = CodeActivations(least=1, contexts=1, window=2)(model, tokenizer, documents)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in texts]
    before = found.metrics
    lengths = [row["tokens"] for row in found.listed]
    total, foxes = sum(lengths), sum(row.count(fox) for row in ids)
    assert foxes == 2 and before["codes"] == 6 and before["dead_codes"] == before["dead_codes.0.feed_forward"] == 4 / 6
    assert [row["code"] for row in found.listed] == ["0.feed_forward:1", "0.feed_forward:3"]
    beginnings = (total - sum(map(len, ids))) / 3  # tokens that stand before a text
    zoo = len(ids[0]) + beginnings
    home = total - zoo
    assert found.listed[1] | {"context_0": ""} == {
        "code": "0.feed_forward:3", "tokens": 2.0, "domain": "zoo", "precision": 1.0, "recall": 2 / zoo, "context_0": "",
    }  # fmt: skip
    assert found.listed[1]["context_0"].endswith("quick[ fox]")
    other = max(zoo - 2, home) / (total - 2)
    assert (
        before["code_precision"] == pytest.approx((1 + other) / 2) and before["code_chance"] == max(zoo, home) / total
    )


def test_the_stage_writes_the_list_and_the_shares(tiny, prepared, tmp_path):
    model = with_codes(tiny, vocab_size=512).float()
    checkpoint.save(model, load_tokenizer(prepared / "tokenizer"), tmp_path / "c")
    inputs = {"checkpoint": tmp_path / "c", "corpus": prepared / "corpus"}
    stage = Evaluate(checkpoint="c", corpus="d", compressors=False, evaluations=[CodeActivations(listed=5, contexts=2)])
    metrics = stage.run(Job(tmp_path, inputs, say=lambda text: None))["metrics"]
    assert metrics["codes"] == 2 * 5 * 20 and 0 <= metrics["dead_codes"] < 1
    assert metrics["code_chance"] <= metrics["code_precision"] <= 1
    listed = json.loads((tmp_path / "codes.json").read_text())["code_activations"]
    assert len(listed) == 10 * 5 and {"code", "tokens", "domain", "precision", "recall", "context_1"} <= {*listed[0]}
    CodeSteering((listed[0]["code"],)).generate(model, IDS_BL, max_new_tokens=1)  # as it is written there


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codes": 3}, "codebook_features: k 8: accepted: at most 3, the codes"),
        ({"layers": (2,)}, r"codebook_features: layers \[2\]: accepted: 0 to 1"),
        ({"codes": 77, "initialisation": "kmeans"}, "codes 77: accepted: at most 76, the tokens of the text"),
    ],
)
def test_what_cannot_be_is_refused(shelf, fields, message):
    inputs = Inputs(shelf.tokenizer, shelf.batches())
    with pytest.raises(PretrainError, match=message):
        CodebookFeatures(**{"initialisation": "normal"} | fields)(shelf.model("llama"), inputs)


def test_a_second_time_is_refused_and_a_model_without_codes_is_not_coded(tiny):
    model = with_codes(tiny)
    with pytest.raises(PretrainError, match="has codebooks already; accepted: one codebook_features"):
        CodebookFeatures(codes=20, k=2, initialisation="normal")(model)
    for code, message in (
        ("3.feed_forward:1", "no codebook '3.feed_forward'.*the places 0.attention.0 to 1.feed_forward"),
        ("1.feed_forward", "accepted: 1.feed_forward:0 to 1.feed_forward:19"),
        ("1.feed_forward:20", "accepted: 1.feed_forward:0 to 1.feed_forward:19"),
    ):
        with pytest.raises(PretrainError, match=message):
            CodeSteering((code,)).generate(model, IDS_BL)
    with pytest.raises(PretrainError, match="3 codes of 1.feed_forward: accepted: at most 2"):
        CodeSteering(tuple(f"1.feed_forward:{n}" for n in range(3))).generate(model, IDS_BL)
    for call in (
        lambda: CodebookLM().loss(tiny("llama"), CausalLM().prepare(ROWS, context())),
        lambda: CodeSteering(("0.attention:1",)).generate(tiny("llama"), IDS_BL),
    ):
        with pytest.raises(PretrainError, match="no codebooks: accepted: one that the surgery codebook_features made"):
            call()
