"""SCBench: what the generators ask is in the context, a reused cache computes what no cache does, modes, errors."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections import Counter

import numpy as np
import pytest
import torch
from closeness import assert_same_model

from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.evaluation.generation import scbench
from pretrain.evaluation.generation._scbench import TASKS, right
from pretrain.evaluation.generation.scbench import Reader, SCBench, _Asked

SMALL = {"contexts": 2, "turns": 3, "length": 400, "width": 4, "resamples": 50}


@pytest.fixture(scope="module")
def model(varied):
    return varied


@pytest.fixture
def shared(tokenizer, stories):
    return lambda task, number=0, **fields: SCBench(**(SMALL | fields)).shared(
        task, number, tokenizer, stories, fields.get("length", 400)
    )


def answer_in(task, context, query):
    """The answer found in the context without knowing how it was made."""
    lines = context.splitlines()
    if task == "kv":
        return [line.split(" = ")[1] for line in lines if line.startswith(query.strip())]
    if task == "prefix_suffix":
        begin, end = re.search(r"begins with (\w+) and ends with (\w+) is", query).groups()
        return [line for line in lines[1:] if line.startswith(begin) and line.endswith(end)]
    if task == "variable":
        said = re.search(r"VAR (\w+) stands", query)[1]
        while not said.isdigit():
            (said,) = re.findall(rf"VAR {said} = (?:VAR )?(\w+)", context)
        return [said]
    if task == "frequent":
        counts = Counter(lines[1].split())
        word = re.search(r"times that (\w+) occurs", query)
        best = max(counts.values())
        return [str(counts[word[1]])] if word else [w for w, n in counts.items() if n == best]
    if task == "many_shot":
        return sorted({line.removeprefix("domain: ") for line in lines if line.startswith("domain: ")})
    if query.startswith("\nThe number of"):
        return re.findall(rf"{query.strip()} (\d+)", context)
    return [line.strip().removeprefix(query.strip() + " ") for line in lines if line.strip().startswith(query.strip())]


@pytest.mark.parametrize("task", TASKS)
def test_each_answer_is_in_the_context_and_alone(task, shared, tokenizer, stories):
    for number in range(3):
        made = shared(task, number)
        assert len({turn.query for turn in made.turns}) == 3
        for turn in made.turns:
            found = answer_in(task, made.context, turn.query)
            if task == "many_shot":
                assert turn.answer in found and len(found) > 1 and turn.query.strip() not in made.context
                text = re.search(r"text: (.*)\n", turn.query)[1]
                assert {d["domain"] for d in stories if " ".join(d["text"].split()).startswith(text)} == {turn.answer}
            else:
                assert found == [turn.answer]
        whole = [made.context, *(part for t in made.turns for part in (t.query, f" {t.answer}"))]
        assert 250 < sum(map(len, encode(tokenizer, whole))) < 400
    assert shared(task, 0) == shared(task, 0) != shared(task, 1)
    assert shared(task, 0, seed=1) != shared(task, 0)


def test_mix_asks_for_lines_of_the_documents_too(shared, stories):
    made = shared("mix")
    repeated = [turn for turn in made.turns if not turn.answer.isdigit()]
    assert len(repeated) == 1 and any(f"{t.query.strip()} {t.answer}" in d["text"] for t in repeated for d in stories)


def test_an_answer_is_right_as_whole_words_and_a_number_as_the_first():
    assert right(" abc.\n", "abc") and right("it is abc", "abc") and not right(" abcd", "abc")
    assert not right(" x\nabc", "abc") and right(" x = f(y) now", "f(y)")
    assert right(" 12 times", "12") and not right(" 112", "12") and not right(" 3 or 12", "12") and not right("", "12")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_reused_cache_gives_the_logits_of_no_cache(tiny, name):
    model = tiny(name, initializer_range=0.4)
    tokens = torch.randint(3, 97, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        whole = model(torch.tensor([tokens]), use_cache=False).logits[0]
        reader = Reader(model)
        assert torch.allclose(reader.read(tokens[:30]), whole[29:30], atol=1e-4)
        other = reader.fork()
        assert torch.allclose(reader.read(tokens[30:37], 7), whole[30:37], atol=1e-4)
        assert torch.allclose(reader.read(tokens[37:], 13), whole[37:], atol=1e-4)
        assert torch.allclose(other.read(tokens[30:], 20), whole[30:], atol=1e-4)  # not changed by the first
    assert reader.nbytes == other.nbytes == sum(x.keys.nbytes * 2 for x in other.cache.layers)


def plain(model, tokenizer, made, going_on):
    """Accuracy and log-likelihood of each answer, every token recomputed from the beginning."""
    asked, found = _Asked(model, tokenizer, made), []
    before = list(asked.context)
    for query, answer, text in zip(asked.queries, asked.answers, asked.texts, strict=True):
        start = before + query
        with torch.no_grad():
            logp = model(torch.tensor([start + answer]), use_cache=False).logits[0].double().log_softmax(-1)
            said = []
            for _ in range(len(answer) + 4):
                said.append(int(model(torch.tensor([start + said]), use_cache=False).logits[0, -1].argmax()))
        ids = torch.tensor(answer)
        nll = logp[len(start) - 1 : -1][torch.arange(len(answer)), ids].mean()
        words = tokenizer.decode(said)
        found.append((right(words, text), float(nll)))
        before = start + answer if going_on else before
    return found


def test_both_modes_are_what_recomputing_gives(model, tokenizer, stories, shared):
    bench = SCBench(**SMALL, tasks=("kv", "frequent"))
    measured = bench(model, tokenizer, stories)
    for mode, going_on in (("multi_turn", True), ("multi_request", False)):
        per_task = {
            task: [plain(model, tokenizer, shared(task, n), going_on) for n in range(2)] for task in bench.tasks
        }
        values = np.array([per_task[task] for task in bench.tasks])  # tasks, contexts, turns, two
        for k, end in enumerate(("", "_logp")):
            name = f"scbench_{mode}"
            assert measured.metrics[name + end] == pytest.approx(values[..., k].mean(), abs=1e-4)
            for i, task in enumerate(bench.tasks):
                assert measured.metrics[f"{name}_{task}{end}"] == pytest.approx(values[i, ..., k].mean(), abs=1e-4)
            for t in range(3):
                assert measured.metrics[f"{name}{end}@{t + 1}"] == pytest.approx(values[:, :, t, k].mean(), abs=1e-4)
        low, high = measured.intervals[f"scbench_{mode}_logp"]
        assert low < measured.metrics[f"scbench_{mode}_logp"] < high
    first = measured.metrics["scbench_multi_turn_logp@1"]
    assert first == pytest.approx(measured.metrics["scbench_multi_request_logp@1"], abs=1e-9)
    assert measured.metrics["scbench_multi_turn_logp@3"] != pytest.approx(
        measured.metrics["scbench_multi_request_logp@3"], abs=1e-6
    )
    config = model.config
    each = (
        2 * 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 4
    )  # layers, k and v
    assert measured.metrics["scbench_kv_bytes"] == pytest.approx(measured.metrics["scbench_context_tokens"] * each)
    assert bench(model, tokenizer, stories) == measured


def test_requests_do_not_depend_on_their_order_and_turns_do(model, tokenizer, shared):
    bench, made = SCBench(**SMALL), shared("kv")
    there, back = (
        _Asked(model, tokenizer, m) for m in (made, dataclasses.replace(made, turns=tuple(reversed(made.turns))))
    )
    with torch.no_grad():
        reader = Reader(model)
        reader.read(there.context)
        one, two = (bench.ask(asked, reader, going_on=False) for asked in (there, back))
        assert one == two[::-1] and reader.seen == len(there.context)
        one, two = (bench.ask(asked, reader, going_on=True) for asked in (there, back))
        assert one != two[::-1]


class Oracle:
    """Reads as `Reader` does, and knows what comes next."""

    texts: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}

    def __init__(self, model, window=None):
        self.tokens = []

    def read(self, tokens, keep=1):
        logits = []
        for token in tokens:
            self.tokens.append(token)
            wanted = 0
            for (context, query), answer in self.texts.items():
                if self.tokens[: len(context)] != list(context):
                    continue
                for cut in range(len(answer)):
                    end = [*query, *answer[:cut]]
                    if self.tokens[-len(end) :] == end:
                        wanted = answer[cut]
            logits.append(torch.nn.functional.one_hot(torch.tensor(wanted), 512) * 100.0)
        return torch.stack(logits)[-keep:]

    def fork(self):
        return copy.deepcopy(self)

    nbytes = 0


@pytest.mark.parametrize("golden", [True, False])
def test_who_knows_the_answers_is_always_right(model, tokenizer, stories, shared, monkeypatch, golden):
    monkeypatch.setattr(scbench, "Reader", Oracle)
    newline = encode(tokenizer, ["\n"])[0].tolist()
    for task in TASKS:
        for number in range(2):
            asked = _Asked(model, tokenizer, shared(task, number))
            for query, answer in zip(asked.queries, asked.answers, strict=True):
                Oracle.texts[tuple(asked.context), tuple(query)] = answer + newline
    metrics = SCBench(**SMALL, golden=golden)(model, tokenizer, stories).metrics
    accuracies = {k: v for k, v in metrics.items() if k.startswith("scbench_multi") and "_logp" not in k}
    assert len(accuracies) == 2 * (1 + 6 + 3) and set(accuracies.values()) == {1.0}
    assert metrics["scbench_multi_turn_logp"] == pytest.approx(0, abs=1e-6)
    Oracle.texts.clear()
    metrics = SCBench(**SMALL, golden=golden)(model, tokenizer, stories).metrics
    assert metrics["scbench_multi_turn"] == metrics["scbench_multi_request"] == 0


@pytest.mark.bits
def test_a_window_keeps_sinks_and_the_newest_at_their_positions(model, tokenizer, stories):
    tokens = torch.randint(3, 512, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        reader, full = Reader(model, (2, 10)), Reader(model)
        assert torch.equal(reader.read(tokens[:30]), full.read(tokens[:30]))  # read in full, then dropped
        for kept, whole in zip(reader.cache.layers, full.cache.layers, strict=True):
            assert torch.equal(kept.keys, torch.cat([whole.keys[:, :, :2], whole.keys[:, :, -10:]], 2))
        # A model that may attend to the kept tokens alone says the same after them.
        mask = torch.ones(40, 40).tril().bool()
        mask[30:, 2:20] = False
        masked = model(
            torch.tensor([tokens]), attention_mask=torch.zeros(1, 1, 40, 40).masked_fill(~mask, -1e9), use_cache=False
        ).logits[0]
        # The kept tokens' keys were computed with everything in sight, as there.
        assert_same_model(reader.read(tokens[30:], 10), masked[30:], model)
    narrow = SCBench(**SMALL, tasks=("kv",), cache="window", sink=2, window=30)(model, tokenizer, stories).metrics
    wide, full = (SCBench(**SMALL, tasks=("kv",), **f)(model, tokenizer, stories) for f in ({"cache": "window"}, {}))
    assert wide == full
    assert narrow["scbench_kv_bytes"] == full.metrics["scbench_kv_bytes"] / full.metrics["scbench_context_tokens"] * 32
    assert narrow["scbench_multi_turn_logp"] != full.metrics["scbench_multi_turn_logp"]


@pytest.mark.bits
def test_a_decoding_method_over_the_cache_is_compared(model, tokenizer, stories):
    full = SCBench(**SMALL, tasks=("kv",))(model, tokenizer, stories).metrics
    keeps = {"method": "pyramid_infer", "prefill_decay_ratio": 1.0, "gen_decay_ratio": 1.0, "gen_compress_ratio": 1.0}
    same = SCBench(**SMALL, tasks=("kv",), cache=keeps)(model, tokenizer, stories).metrics
    assert same == pytest.approx(full, abs=1e-4)
    drops = {"method": "pyramid_infer", "prefill_decay_ratio": 0.3, "prefill_decay_strategy": "constant"}
    bench = SCBench(**SMALL, tasks=("kv",), cache=drops)
    less = bench(model, tokenizer, stories).metrics
    assert bench.parts() == ("pyramid_infer",) and SCBench().parts() == ()
    assert less["scbench_kv_bytes"] < 0.9 * full["scbench_kv_bytes"]
    assert less["scbench_multi_request_logp"] != full["scbench_multi_request_logp"]
    assert SCBench(**SMALL, tasks=("kv",))(model, tokenizer, stories).metrics == full  # nothing is left behind


def test_tasks_are_those_that_the_documents_allow(model, tokenizer, stories):
    one = [d | {"domain": "python"} for d in stories]
    bench = SCBench(**(SMALL | {"contexts": 1}), mode="multi_request")
    metrics = bench(model, tokenizer, one).metrics
    assert metrics["scbench_contexts"] == 5 and "scbench_multi_turn" not in metrics
    with pytest.raises(PretrainError, match="1 domains; accepted: two domains or more"):
        dataclasses.replace(bench, tasks=("many_shot",))(model, tokenizer, one)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"turns": 0}, "turns 0: accepted: 1 or more"),
        ({"width": 3}, "width 3: accepted: 4 or more"),
        ({"mode": "single"}, "mode 'single': accepted: both, multi_turn, multi_request"),
        ({"tasks": ("mixed",)}, "unknown task of scbench 'mixed' .did you mean 'mix'"),
        ({"cache": "windows"}, "cache 'windows': accepted: full, window; or: unknown decoding"),
        ({"cache": "aded"}, "cache 'aded': accepted: full, window, or a decoding method over the cache"),
        ({"cache": {"method": "pyramid_infer", "ratio": 1}}, "ratio.*accepted fields: recent_ratio"),
    ],
)
def test_what_cannot_be_measured_is_refused(fields, said):
    with pytest.raises(PretrainError, match=said):
        SCBench(**fields)


def test_a_length_that_does_not_fit_is_refused(model, tokenizer, stories):
    with pytest.raises(PretrainError, match="length 4000: accepted: at most the model's 2048 positions"):
        SCBench(length=4000)(model, tokenizer, stories)
    with pytest.raises(PretrainError, match="length 60: prefix_suffix with 5 turns needs .* a greater length"):
        SCBench(length=60, tasks=("prefix_suffix",))(model, tokenizer, stories)
    with pytest.raises(PretrainError, match="frequent: the documents have 0 words"):
        SCBench(length=100, tasks=("frequent",))(model, tokenizer, [{"text": "1 2 3"}])
