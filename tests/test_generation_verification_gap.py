"""The generation-verification gap: sampling and scores from plain logits, oracles' gaps, utilities, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.generation.continuations import judge, sample
from pretrain.core.generation.loop import decode
from pretrain.evaluation.generation.generation_verification_gap import GenerationVerificationGap as Gap
from pretrain.evaluation.generation.generation_verification_gap import parses

SMALL = {"generations": 12, "max_new_tokens": 2, "temperature": 1.0, "top_p": 1.0, "resamples": 40}


@pytest.fixture(scope="module")
def model(tiny):
    return tiny(vocab_size=512, initializer_range=0.5, max_position_embeddings=256)


@pytest.fixture(scope="module")
def documents(model, tokenizer):
    """Prompts whose answer the model gives sometimes: the first token is its likeliest, the text ends anywhere."""
    found, vocabulary = [], Vocabulary.of(tokenizer)
    for i, text in enumerate(
        ("def add", "import os", "class A", "return the", "for x in", "while the", "self.x", "if y")
    ):
        ids = [vocabulary.begin, *encode(tokenizer, [text])[0].tolist()]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        for token in logits.argsort(descending=True).tolist():
            answer = tokenizer.decode([token])
            if answer.strip() and "\n" not in answer:
                break
        found.append({"prompt": text, "answer": answer, "domain": "even" if i % 2 == 0 else "odd", "text": text})
    return found


def plain(model, prompt, after):
    """Log-probabilities of plain `transformers`."""
    with torch.no_grad():
        logp = model(torch.tensor([[*prompt, *after]])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return logp[torch.arange(len(after)), torch.tensor(after, dtype=torch.long)], logp.argmax(-1).tolist() == list(
        after
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_continuations_are_judged_as_plain_transformers_does(tiny, name, monkeypatch):
    monkeypatch.setattr("pretrain.core.generation.continuations.BATCH_TOKENS", 40)
    model, rng = tiny(name, initializer_range=0.4), np.random.default_rng(0)
    pairs = [(rng.integers(3, 97, m).tolist(), rng.integers(3, 97, n).tolist()) for m, n in ((1, 1), (5, 9), (20, 3))]
    with torch.no_grad():
        likeliest = int(model(torch.tensor([[5, 6]])).logits[0, -1].argmax())
    pairs += [([5, 6], [likeliest]), ([5], [])]
    model.train()
    found = judge(model, pairs)
    assert model.training
    model.eval()
    for (prompt, after), said in zip(pairs, found, strict=True):
        logp_T, greedy = plain(model, prompt, after)
        assert said.logp == pytest.approx(float(logp_T.sum()), rel=1e-4, abs=1e-9)
        assert said.greedy == greedy and said.tokens == len(after)
    assert found[3].greedy and not found[1].greedy
    with pytest.raises(PretrainError, match="a prompt without tokens"):
        judge(model, [([], [3])])


def test_choices_of_one_token_are_read_once(tiny):
    model, read = tiny(initializer_range=0.4), []
    alone = [judge(model, [([5, 6, 7], after)])[0] for after in ([8], [9], [9, 10], [11])]
    handle = model.base_model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].shape), with_kwargs=True
    )
    found = judge(model, [([5, 6, 7], after) for after in ([8], [9], [9, 10], [11])])
    handle.remove()
    assert read == [(2, 4)]  # the prompt, and the prompt with the first of two tokens
    for said, one in zip(found, alone, strict=True):
        assert said.logp == pytest.approx(one.logp, rel=1e-5) and (said.greedy, said.tokens) == (one.greedy, one.tokens)


def test_samples_are_those_of_the_plain_loop(tiny):
    model, prompt = tiny(initializer_range=0.4), [1, 5, 9, 20]
    for temperature in (0.0, 0.9):
        options = {"max_new_tokens": 8, "temperature": temperature, "top_p": 0.9, "eos": 2, "pad": 0}
        found = sample(model, prompt, 6, **options, generator=torch.Generator().manual_seed(3))
        rows_BN = decode(model, torch.tensor([prompt] * 6), **options, generator=torch.Generator().manual_seed(3))
        for row, one in zip(rows_BN[:, 4:].tolist(), found, strict=True):
            assert one == (row[: row.index(2) + 1] if 2 in row else row)[: len(one)] and len(one) > 0
    more = sample(model, prompt, 5, **options, generator=torch.Generator().manual_seed(3), rows=2)
    assert len(more) == 5


def test_a_verifier_that_knows_reaches_one_and_one_that_does_not_gains_nothing(
    model, tokenizer, documents, monkeypatch
):
    def knowing(sign):
        def scores(self, _model, _tokenizer, _vocabulary, prompt, _ids, _made, texts):
            answer = next(d["answer"] for d in documents if d["prompt"] == prompt)
            return np.array([sign * float(self.useful(prompt, text, answer)) for text in texts])

        return scores

    few = {**SMALL, "generations": 40, "max_new_tokens": 1}
    raw = Gap(**few, quantile=0.0)(model, tokenizer, documents).metrics
    assert [raw["gv_gap"], raw["gv_relative_gap"], raw["gv_kept"]] == pytest.approx([0, 0, 1], abs=1e-12)
    assert 0.05 < raw["gv_utility"] < 0.9 and 0 < raw["gv_distinct"] < 1
    monkeypatch.setattr(Gap, "scores", knowing(0))
    for weights in ("filter", "reweight"):
        same = Gap(**few, weights=weights)(model, tokenizer, documents).metrics
        assert same["gv_gap"] == pytest.approx(0, abs=1e-12) and same["gv_kept"] == pytest.approx(1)
    monkeypatch.setattr(Gap, "scores", knowing(1))
    best = Gap(**few, quantile=0.99)(model, tokenizer, documents)
    assert best.metrics["gv_utility"] == raw["gv_utility"]
    names = ("gv_verified", "gv_relative_gap", "gv_prompt_relative_gap")
    assert [best.metrics[name] for name in names] == pytest.approx([1, 1, 1])
    assert best.metrics["gv_gap"] == pytest.approx(1 - raw["gv_utility"])
    assert best.intervals["gv_relative_gap"] == pytest.approx((1.0, 1.0))
    low, high = best.intervals["gv_gap"]
    assert low < best.metrics["gv_gap"] < high
    monkeypatch.setattr(Gap, "scores", knowing(-1))
    worst = Gap(**few, quantile=0.99)(model, tokenizer, documents).metrics
    assert worst["gv_verified"] == pytest.approx(0) and worst["gv_gap"] == pytest.approx(-raw["gv_utility"])


@pytest.mark.bits
@pytest.mark.parametrize("verifier", ["choice", "likelihood"])
@pytest.mark.parametrize("weights", ["filter", "reweight"])
def test_the_gap_is_that_of_plain_logits(model, tokenizer, documents, verifier, weights):
    gap = Gap(**SMALL, verifier=verifier, weights=weights, quantile=0.5)
    found = gap(model, tokenizer, documents)
    vocabulary, generator = Vocabulary.of(tokenizer), torch.Generator().manual_seed(0)
    yes, no = (one.tolist() for one in encode(tokenizer, [" yes", " no"]))
    raw, verified, each = [], [], []
    for d in documents:
        ids = [vocabulary.begin, *encode(tokenizer, [d["prompt"]])[0].tolist()]
        made = sample(
            model, ids, 12, max_new_tokens=2, temperature=1.0, top_p=1.0, eos=vocabulary.eos, pad=0, generator=generator
        )
        texts = [tokenizer.decode(one, skip_special_tokens=True).lstrip().split("\n")[0].strip() for one in made]
        right = np.array([text == d["answer"].strip() for text in texts], float)
        if verifier == "likelihood":
            scores = np.array([float(plain(model, ids, one)[0].mean()) for one in made])
            weight = np.exp(scores)
        else:
            asked = [f"{d['prompt']}{t}\n\nIs the answer above correct? Answer yes or no.\nAnswer:" for t in texts]
            heads = [[vocabulary.begin, *one.tolist()] for one in encode(tokenizer, asked)]
            p_yes, p_no = (np.array([float(plain(model, h, x)[0].sum().exp()) for h in heads]) for x in (yes, no))
            scores = weight = p_yes / (p_yes + p_no)
        if weights == "filter":
            weight = (scores >= np.quantile(scores, 0.5) - 1e-6).astype(float)
        raw.append(right.mean())
        verified.append((weight * right).sum() / weight.sum())
        each.append((verified[-1] - raw[-1]) / (1 - raw[-1]))
    metrics = found.metrics
    assert metrics["gv_utility"] == pytest.approx(np.mean(raw)) and 0 < np.mean(raw) < 1
    assert metrics["gv_verified"] == pytest.approx(np.mean(verified), abs=1e-5)
    assert metrics["gv_gap"] == pytest.approx(np.mean(verified) - np.mean(raw), abs=1e-5) != 0
    assert metrics["gv_relative_gap"] == pytest.approx(
        (np.mean(verified) - np.mean(raw)) / (1 - np.mean(raw)), abs=1e-5
    )
    assert metrics["gv_prompt_relative_gap"] == pytest.approx(np.mean(each), abs=1e-5)
    assert set(found.domains) == {"even", "odd"}
    assert found.domains["odd"]["gv_utility"] == pytest.approx(np.mean(raw[1::2]))
    assert gap(model, tokenizer, documents) == found


@pytest.mark.parametrize(
    ("prompt", "text", "said"),
    [
        ("def f(x):\n", "    return x\n", True),
        ("def f(x):\n", "    return x\n\ny = (1, ", True),  # the last line is not finished
        ("def f(x):\n", "    return x", True),
        ("def f(x):\n", "    return (x\n", False),
        ("x = 1\n", "", False),
        ("x = 1\n", "\n  \n", False),
        ("x = 1\n", "raise SystemExit(3)\n", True),  # read, not run
        ("x = ", "'\\d'", True),
        ("x = ", "\0", False),
        ("x = ", "(" * 5000, False),
    ],
)
@pytest.mark.filterwarnings("error")
def test_code_is_right_if_it_parses(prompt, text, said):
    assert parses(prompt, text) is said
    assert Gap(utility="parses").useful(prompt, text, None) is said


def test_documents_without_their_columns_are_left_out(model, tokenizer, documents):
    some = [*documents[:2], {"prompt": "x"}, {"answer": "y"}, {"prompt": "1 +", "answer": 0}]
    metrics = Gap(**SMALL)(model, tokenizer, some).metrics
    assert metrics["gv_prompts"] == 3 and metrics["gv_skipped"] == 2
    code = Gap(**SMALL, utility="parses", prompt="text", prompt_tokens=2)
    assert code.columns == ("text",) and Gap().columns == ("prompt", "answer")
    assert code(model, tokenizer, documents).metrics["gv_prompts"] == 8
    with pytest.raises(PretrainError, match="none of 1 documents has 'prompt' and 'answer'; accepted: columns with"):
        Gap(**SMALL)(model, tokenizer, [{"prompt": " ", "answer": "x"}])
    with pytest.raises(PretrainError, match="max_new_tokens 300 after .* 256 positions together; prompt_tokens"):
        Gap(**(SMALL | {"max_new_tokens": 300}))(model, tokenizer, documents)
    with pytest.raises(PretrainError, match="question of .* at most the model's 256 positions"):
        Gap(**SMALL, question="{answer}" + " x y" * 200)(model, tokenizer, documents)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"generations": 1}, "generations 1: accepted: 2 or more"),
        ({"temperature": 0.0}, "temperature 0.0: accepted: above 0"),
        ({"quantile": 1.0}, "quantile 1.0: accepted: from 0 to below 1"),
        ({"beta": 0}, "beta 0: accepted: above 0"),
        ({"utility": "runs"}, "utility 'runs': accepted: exact, parses"),
        ({"verifier": "vote"}, "verifier 'vote': accepted: choice, likelihood"),
        ({"weights": "top"}, "weights 'top': accepted: filter, reweight"),
        ({"question": "right?"}, "question 'right.': accepted"),
        ({"yes": " no"}, "yes ' no', no ' no': accepted: two texts"),
    ],
)
def test_what_cannot_be_measured_is_refused(fields, said):
    with pytest.raises(PretrainError, match=said):
        Gap(**fields)
