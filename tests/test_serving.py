"""A checkpoint behind OpenAI's protocol: what is answered, to whom, and what is refused."""

from __future__ import annotations

import copy
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import zoo
from conftest import TINY
from serving_cases import joined, served, wait_for
from support import OWN
from test_chat import chatty  # noqa: F401 - a fixture

from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import encode, text_of
from pretrain.core.generation.loop import decode
from pretrain.core.generation.packed import Cached, Packed
from pretrain.core.models.families import new_model
from pretrain.core.models.features import Framing, text_features
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.inference.chat import Conversation
from pretrain.inference.serving.text import Writer
from pretrain.stages.decode import continue_prompt

pytest.importorskip("starlette", reason="needs the extra serve")

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPTS = ["import os", "def f(a, b):", "class A", "return [x for x in", "for key, value in items:", "# a comment"]


def stirred(model, ends=(0, 1, 2), seed=1):
    """A copy that says something else of each prompt, and whose likeliest token is none of `ends`."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # tied to nothing
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    model.lm_head.weight.data[list(ends)] = 0
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def lively(chatty):  # noqa: F811
    """A model of two blocks that says something of each prompt, and its tokenizer."""
    model, tokenizer, _ = chatty
    return stirred(model, tokenizer.all_special_ids), tokenizer


@pytest.fixture(scope="module")
def client(lively):
    with served(*lively) as made:
        yield made


def alone(lively, prompt, **fields):
    """What the project's own loop says after a prompt."""
    fields = {"max_new_tokens": 12, "temperature": 0.0, "token_healing": False} | fields
    return continue_prompt(*lively, prompt, **fields)["continuation"]


# The pass


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_texts_that_come_and_go_are_read_as_each_would_be_alone(tiny, family):
    model = stirred(tiny(family))
    packed, generator = Packed(model, 60), np.random.default_rng(0)
    prompts = [generator.integers(3, 97, size).tolist() for size in (5, 9, 1, 20)]
    wanted = [decode(model, torch.tensor([ids]), max_new_tokens=10)[0, len(ids) :].tolist() for ids in prompts]
    caches, unread = [Cached(len(ids) + 10) for ids in prompts], [list(ids) for ids in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    for turn in range(40):
        running = [n for n in range(len(prompts)) if turn >= 2 * n and len(new[n]) < 10]
        if not running:
            break
        logits_RV = packed.read([(caches[n], unread[n][:7]) for n in running])
        for n, logits_V in zip(running, logits_RV, strict=True):
            unread[n] = unread[n][7:]
            if not unread[n]:
                unread[n] = [int(logits_V.argmax())]
                new[n] += unread[n]
    assert new == wanted and model.config._attn_implementation != "pretrain_packed"


# Answers


def test_the_answer_to_a_prompt_is_that_of_the_loop(client, lively):
    for prompt in PROMPTS[:3]:
        assert client.text(prompt, temperature=0, max_tokens=12) == alone(lively, prompt)
    status, answer, _ = client.post(COMPLETIONS, prompt=PROMPTS[:2], temperature=0, max_tokens=5)
    assert status == 200 and [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert [choice["text"] for choice in answer["choices"]] == [alone(lively, p, max_new_tokens=5) for p in PROMPTS[:2]]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 10


def test_a_conversation_is_answered_as_in_the_terminal(client, lively):
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "import os"}]},
    ]
    talk = Conversation(*lively, max_new_tokens=12, temperature=0.0, system="be brief")
    status, answer, _ = client.post(CHAT, messages=turns, temperature=0, max_completion_tokens=12)
    assert status == 200, answer
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant" and message["content"].strip() == talk.answer("import os")


@pytest.mark.promise("Serving", "A stream says what the whole answer says.")
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("more", [{}, {"stop": ["e", "\n"]}, {"temperature": 1.0, "top_p": 0.9, "n": 3}])
def test_a_stream_says_what_the_whole_answer_says(client, chat, more):
    asked = {"messages": [{"role": "user", "content": "import os"}]} if chat else {"prompt": "import os"}
    asked |= {"max_tokens": 24, "seed": 5, "temperature": 0} | more
    path = CHAT if chat else COMPLETIONS
    status, answer, _ = client.post(path, **asked)
    assert status == 200, answer
    whole = {
        choice["index"]: ((choice["message"]["content"] if chat else choice["text"]), choice["finish_reason"])
        for choice in answer["choices"]
    }
    with client.stream(path, **asked, stream_options={"include_usage": True}) as pieces:
        events = list(pieces)
    assert joined(events, chat) == whole and len(whole) == more.get("n", 1)
    assert events[-2]["usage"] == answer["usage"] and events[-2]["choices"] == []


def test_a_stop_text_ends_an_answer_before_it(client, lively):
    text = alone(lively, "import os", max_new_tokens=24)
    stop = text[6:9]
    wanted = text[: text.index(stop)]
    status, answer, _ = client.post(COMPLETIONS, prompt="import os", temperature=0, max_tokens=24, stop=stop)
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (wanted, "stop"), status
    with client.stream(COMPLETIONS, prompt="import os", temperature=0, max_tokens=24, stop=[stop]) as pieces:
        assert joined(pieces) == {0: (wanted, "stop")}


@pytest.mark.promise(
    "Serving",
    "A request with a seed gives the same tokens whatever runs beside it; a greedy one too, but for near ties.",
)
def test_answers_are_the_same_alone_and_beside_others(client, lively):
    """Greedy, and of a seed: each answer has numbers of its own."""
    asked = [
        (prompt, {"max_tokens": 20, **more})
        for prompt in PROMPTS
        for more in (
            {"temperature": 0},
            {"temperature": 1.0, "top_p": 1, "seed": 7},
            {"temperature": 0.9, "top_p": 0.8, "seed": 3},
        )
    ]
    one_by_one = [client.text(prompt, **more) for prompt, more in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda each: client.text(each[0], **each[1]), asked))
    assert together == one_by_one and len(set(one_by_one)) > len(PROMPTS)
    assert one_by_one[1] == alone(lively, PROMPTS[0], max_new_tokens=20, temperature=1.0, top_p=1.0, seed=7)


def test_without_a_seed_answers_differ(client):
    assert len({client.text("import os", temperature=1.0, max_tokens=12) for _ in range(4)}) > 1


@pytest.mark.parametrize("method", ["prompt_lookup", {"method": "token_recycling"}])
def test_a_decoding_method_answers_between_the_others(client, lively, method):
    wanted = [alone(lively, prompt, max_new_tokens=24) for prompt in PROMPTS[:5]]
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(client.text, prompt, temperature=0, max_tokens=24) for prompt in PROMPTS[:5]]
        mine = pool.submit(client.text, "import os", temperature=0, max_tokens=12, method=method)
        assert wanted[0].startswith(mine.result()) and mine.result()
    assert [each.result() for each in others] == wanted


def test_the_settings_of_the_checkpoint_hold(lively):
    """Its repetition penalty and its stop strings, as everywhere else."""
    model, tokenizer = copy.deepcopy(lively[0]), lively[1]
    model.generation_config.update(repetition_penalty=1.5)
    wanted = alone((model, tokenizer), "import os", max_new_tokens=24)
    assert wanted != alone(lively, "import os", max_new_tokens=24)
    with served(model, tokenizer) as client:
        assert client.text("import os", temperature=0, max_tokens=24) == wanted
        model.generation_config.stop_strings = [wanted[4:6]]
        assert client.text("import os", temperature=0, max_tokens=24) == wanted[: wanted.index(wanted[4:6])]


@pytest.mark.parametrize("family", ["gpt_neox", "t5"])
def test_a_model_that_the_pass_cannot_run_is_served_too(tiny, prepared, family):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    fields = TINY.get(family) or {name: value for name, value in zoo.fields(family).items() if name not in OWN}
    task = "seq2seq" if family == "t5" else "causal"
    model = new_model(family, fields, task=task, vocabulary=Vocabulary.of(tokenizer), seed=0).eval()
    model = stirred(model, tokenizer.all_special_ids)
    wanted = [alone((model, tokenizer), prompt) for prompt in PROMPTS[:3]]
    with served(model, tokenizer) as client:
        assert client.engine.packed is None
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(lambda p: client.text(p, temperature=0, max_tokens=12), PROMPTS[:3])) == wanted
        fields = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 12}
        with client.stream(COMPLETIONS, **fields) as pieces:
            events = list(pieces)
        assert joined(events) == {0: (wanted[0], "length")} and len(events) > 3  # as it is written
        stop = wanted[0][len(wanted[0]) // 2 :][:2]
        with client.stream(COMPLETIONS, **fields, stop=stop) as pieces:
            assert joined(pieces) == {0: (wanted[0][: wanted[0].index(stop)], "stop")}


# Text


@pytest.mark.parametrize("text", ["naïve café – 東京都 🙂🙃", "a\n\n  b\tc", "🙂" * 30, "x" * 300])
def test_pieces_are_whole_characters_and_together_the_text(lively, text):
    tokenizer = lively[1]
    ids = encode(tokenizer, [text])[0].tolist()
    writer = Writer(tokenizer, [], ())
    pieces = [writer.push(token) for token in ids]
    assert "".join(pieces) + writer.end() == text_of(tokenizer, ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


def test_nothing_of_a_stop_text_is_shown_and_nothing_else_is_kept_back(lively):
    tokenizer = lively[1]
    ids = encode(tokenizer, ["one EN two END three"])[0].tolist()
    writer = Writer(tokenizer, [], ("END", "never"))
    shown = ""
    for token in ids:
        shown += writer.push(token)
        assert "END" not in shown and "one EN two ".startswith(shown)
    assert shown == "one EN two " and writer.stopped
    writer = Writer(tokenizer, [], ("END",))
    assert "".join(map(writer.push, encode(tokenizer, ["one EN"])[0].tolist())) + writer.end() == "one EN"


# Vectors


def test_vectors_are_the_models_features_of_length_one(client, lively):
    texts = ["import os", "class A", "x = 1 " * 20]
    status, answer, _ = client.post(EMBEDDINGS, input=texts)
    assert status == 200, answer
    made = np.array([row["embedding"] for row in answer["data"]])
    pieces = encode(lively[1], texts)
    plain = text_features(lively[0], pieces, Framing(lively[0], Vocabulary.of(lively[1]), 512))
    np.testing.assert_allclose(made, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-5)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, pieces))
    by_tokens = client.post(EMBEDDINGS, input=[piece.tolist() for piece in pieces])[1]
    np.testing.assert_allclose([row["embedding"] for row in by_tokens["data"]], made, atol=1e-6)


def test_an_encoder_makes_vectors_and_says_that_it_writes_nothing(tiny, prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    model = new_model("bert", TINY["bert"], task="masked", vocabulary=Vocabulary.of(tokenizer), seed=0).eval()
    with served(model, tokenizer, length=64) as client:
        assert client.get("/v1/models")[1]["data"][0]["capabilities"] == ["embeddings"]
        status, answer, _ = client.post(EMBEDDINGS, input="import os")
        assert status == 200 and len(answer["data"][0]["embedding"]) == 32
        status, answer, _ = client.post(COMPLETIONS, prompt="import os")
        assert status == 400 and "predicts no next token; accepted: POST /v1/embeddings" in answer["error"]["message"]


# What is refused


WRONG = [
    (COMPLETIONS, {"prompt": 3}, "prompt"),
    (COMPLETIONS, {}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "n"),
    (COMPLETIONS, {"prompt": [99999]}, None),
    (COMPLETIONS, {"prompt": "a", "temprature": 1}, "temprature"),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "top_p": 1.5}, "top_p"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, "n"),
    (COMPLETIONS, {"prompt": "a", "n": 65}, "n"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 10**9}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a " * 600}, "prompt"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 3}, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "stop": ""}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}, None),
    (COMPLETIONS, {"prompt": "a", "method": "nothing_such"}, "method"),
    (COMPLETIONS, {"prompt": "a", "method": {"method": "minference", "patterns": "/etc/passwd"}}, "method"),
    (COMPLETIONS, {"prompt": "a", "method": {"method": "proxy_tuning", "expert": "/", "anti_expert": "/"}}, "method"),
    (COMPLETIONS, {"prompt": "a", "method": "expert_store"}, "method"),
    (COMPLETIONS, {"prompt": "a", "method": {"method": "suffix_decoding", "nothing": 1}}, "method"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": ""}] * 30_000}, "messages"),
    (CHAT, {"messages": [{"role": "nobody", "content": "a"}]}, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "logprobs": True}, "logprobs"),
    (EMBEDDINGS, {"input": []}, "input"),
    (EMBEDDINGS, {"input": ""}, "input"),
    (EMBEDDINGS, {"input": "a", "dimensions": 7}, "dimensions"),
]  # fmt: skip


@pytest.mark.promise(
    "Serving", "A wrong request is one clear error in OpenAI's shape; no request opens a file of the machine."
)
@pytest.mark.parametrize(("path", "fields", "param"), WRONG)
def test_a_wrong_request_is_one_clear_error(client, path, fields, param):
    status, answer, _ = client.post(path, **fields)
    error = answer["error"]
    assert status == 400 and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"] and "accepted:" in error["message"]
    assert param is None or error["param"] == param, error


def test_what_asks_for_nothing_is_let_through(client):
    neutral = {"user": "me", "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": None, "echo": False}
    assert client.text("import os", temperature=0, max_tokens=4, **neutral) == client.text(
        "import os", temperature=0, max_tokens=4
    )


def test_other_addresses_bodies_and_models_are_refused_in_the_same_shape(client):
    json_type = {"Content-Type": "application/json"}
    cases = [
        ("GET", "/v1/nothing", None, json_type, 404),
        ("GET", COMPLETIONS, None, json_type, 405),
        ("POST", COMPLETIONS, b"{", json_type, 400),
        ("POST", COMPLETIONS, b"[" * 100_000, json_type, 400),
        ("POST", COMPLETIONS, b'{"model": "\xff"}', json_type, 400),
        ("POST", COMPLETIONS, b"{}", {"Content-Type": "text/plain"}, 415),
        ("POST", COMPLETIONS, b" " * (2 << 20), json_type, 413),
        ("POST", COMPLETIONS, b'{"model": "other", "prompt": "a"}', json_type, 404),
        ("GET", "/v1/models/other", None, json_type, 404),
    ]
    for method, path, body, headers, wanted in cases:
        status, answer, _ = client.ask(method, path, body, **headers)
        assert status == wanted and "accepted:" in answer["error"]["message"], (path, answer)


def test_a_key_is_asked_for_where_there_is_one(lively):
    with served(*lively, settings={"api_key": "secret"}) as client:
        assert client.get("/health")[0] == client.get("/")[0] == 200
        for key in ("", "secre", "secret2", "Secret"):
            client.key = key
            for status, answer, headers in (client.get("/v1/models"), client.post(COMPLETIONS, prompt="a")):
                assert status == 401 and answer["error"]["code"] == "invalid_api_key", key
                assert headers["www-authenticate"] == "Bearer"
        client.key = "secret"
        assert (
            client.get("/v1/models")[0] == client.get("/metrics")[0] == client.post(COMPLETIONS, prompt="a")[0] == 200
        )


# Many at once, and those who leave


@pytest.mark.promise(
    "Serving",
    "Of many clients none loses anything, and what runs stays within the answers and the tokens of caches that were set.",
)
@pytest.mark.parametrize(("rows", "cache"), [(6, 4096), (64, 100)])  # either bound is what holds
def test_many_clients_lose_nothing_and_stay_within_the_bounds(lively, rows, cache):
    with served(*lively, rows=rows, cache_tokens=cache, queue=64) as client:
        engine, most = client.engine, {"rows": 0, "cache": 0}
        wanted = {prompt: alone(lively, prompt, max_new_tokens=16) for prompt in PROMPTS}
        passes = engine._pass

        def watched():
            most["rows"] = max(most["rows"], len(engine.rows))
            most["cache"] = max(most["cache"], engine.cached_tokens)
            passes()

        engine._pass = watched

        def ask(number):
            prompt = PROMPTS[number % len(PROMPTS)]
            fields = {"prompt": prompt, "temperature": 0, "max_tokens": 16}
            if number % 2:
                return client.text(**fields) == wanted[prompt]
            with client.stream(COMPLETIONS, **fields) as pieces:
                return joined(pieces)[0][0] == wanted[prompt]

        with ThreadPoolExecutor(64) as pool:
            assert all(pool.map(ask, range(128)))
        assert 1 < most["rows"] <= rows and most["cache"] <= cache
        wait_for(lambda: not engine.rows and not engine.waiting)
        assert client.metric("running_answers") == 0
        assert engine.metrics.passes < engine.metrics.new_tokens / 2  # more than one answer a pass


def test_a_long_prompt_keeps_no_answer_waiting(lively, monkeypatch):
    from pretrain.inference.serving import engine as module

    monkeypatch.setattr(module, "PASS", 16)
    long = "import os, sys " * 20
    wanted = alone(lively, long, max_new_tokens=4)
    with served(*lively) as client:
        read, packed = [], client.engine.packed
        plain = packed.read

        def watched(texts):
            read.append([len(new) for _, new in texts])
            return plain(texts)

        monkeypatch.setattr(packed, "read", watched)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(client.text, "import os", temperature=0, max_tokens=200)
            wait_for(lambda: client.engine.rows)
            second = pool.submit(client.text, long, temperature=0, max_tokens=4)
            assert second.result() == wanted and first.result()
    both = [sizes for sizes in read if len(sizes) == 2 and sizes[1] > 1]
    assert len(both) > 3 and all(sizes[0] == 1 and sum(sizes) <= 17 for sizes in both)


@pytest.mark.promise("Serving", "A client that goes away frees its place before the next pass.")
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(lively, stream):
    with served(*lively, rows=1, length=100_000, cache_tokens=60_000, settings={"max_tokens": 50_000}) as client:
        connection = client.connection()
        body = b'{"model": "tiny", "prompt": "import os", "temperature": 0, "max_tokens": 50000, "stream": %s}'
        connection.request("POST", COMPLETIONS, body % (b"true" if stream else b"false"), client.headers())
        wait_for(lambda: client.engine.rows and client.engine.metrics.new_tokens)
        waiting = client.connection()
        waiting.request("POST", COMPLETIONS, body % b"false", client.headers())
        wait_for(lambda: client.engine.waiting)
        waiting.close()
        wait_for(lambda: not client.engine.waiting)
        connection.close() if not stream else connection.getresponse().close()
        connection.close()
        wait_for(lambda: not client.engine.rows)
        assert client.text("class A", temperature=0, max_tokens=4) == alone(lively, "class A", max_new_tokens=4)
        assert client.metric("cancelled_total") == 2 and client.metric("cache_tokens") == 0


@pytest.mark.promise("Serving", "Beyond the queue a client gets HTTP 429 and when to ask again.")
def test_beyond_the_queue_a_client_is_told_when_to_ask_again(lively):
    wanted = alone(lively, "class A", max_new_tokens=3)
    with served(
        *lively, rows=1, queue=2, length=100_000, cache_tokens=60_000, settings={"max_tokens": 50_000}
    ) as client:
        with client.stream(COMPLETIONS, prompt="import os", max_tokens=50_000, temperature=0) as running:
            next(running)
            fields = {"prompt": "class A", "max_tokens": 3, "temperature": 0}
            with ThreadPoolExecutor(2) as pool:
                waiting = [pool.submit(client.text, **fields) for _ in range(2)]
                wait_for(lambda: len(client.engine.waiting) == 2)
                status, answer, headers = client.post(COMPLETIONS, **fields)
                assert (status, answer["error"]["type"]) == (429, "rate_limit_error") and int(
                    headers["retry-after"]
                ) >= 1
                running.close()
                client.engine.cancel([row.answer for row in client.engine.rows])
                assert {each.result() for each in waiting} == {wanted}
        assert client.post(COMPLETIONS, **fields)[0] == 200


@pytest.mark.promise("Serving", "An answer that fails leaves the others alone, and says nothing of the machine.")
def test_an_answer_that_fails_leaves_the_others_alone(lively, monkeypatch):
    """Of a model whose logits after one token are none."""
    model, tokenizer = copy.deepcopy(lively[0]), lively[1]
    bad = encode(tokenizer, ["class"])[0][-1]
    model.get_input_embeddings().weight.data[bad] = float("nan")
    with served(model, tokenizer) as client, ThreadPoolExecutor(4) as pool:
        fields = {"temperature": 0, "max_tokens": 30}
        good = [pool.submit(client.post, COMPLETIONS, prompt=p, **fields) for p in (PROMPTS[0], PROMPTS[1])]
        status, answer, _ = client.post(COMPLETIONS, prompt="class", **fields)
        assert status == 400 and "not finite" in answer["error"]["message"]
        assert [each.result()[0] for each in good] == [200, 200]

        def broken(texts):
            raise RuntimeError("a fault of the server")

        monkeypatch.setattr(client.engine.packed, "read", broken)
        status, answer, _ = client.post(COMPLETIONS, prompt="import os", **fields)
        assert status == 500 and answer["error"]["type"] == "server_error" and "fault" not in answer["error"]["message"]
        monkeypatch.undo()
        assert client.text("import os", **fields) and client.get("/health")[0] == 200


def test_the_metrics_count_what_was_done(lively):
    with served(*lively) as client:
        client.text("import os", temperature=0, max_tokens=5)
        client.post(COMPLETIONS, prompt=3)
        client.get("/x" + os.urandom(4).hex())
        lines = client.get("/metrics")[1].splitlines()
        assert 'pretrain_requests_total{path="/v1/completions",status="200"} 1' in lines
        assert 'pretrain_requests_total{path="/v1/completions",status="400"} 1' in lines
        assert 'pretrain_requests_total{path="other",status="404"} 1' in lines
        assert client.metric("generated_tokens_total") == 5 and client.metric("first_token_seconds_count") == 1
        assert (
            client.metric("prompt_tokens_total")
            == client.post(COMPLETIONS, prompt="import os")[1]["usage"]["prompt_tokens"]
        )


def test_the_official_client_is_answered(client, lively):
    openai = pytest.importorskip("openai", reason="the package openai, of the extra dev")
    asking = openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0)
    assert [model.id for model in asking.models.list()] == ["tiny"]
    fields = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    turns = [{"role": "user", "content": "import os"}]
    whole = asking.chat.completions.create(messages=turns, **fields)
    pieces = asking.chat.completions.create(messages=turns, stream=True, **fields)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content and whole.usage.completion_tokens == 12
    looked = asking.chat.completions.create(messages=turns, extra_body={"method": "prompt_lookup"}, **fields)
    assert looked.choices[0].message.content == text
    assert asking.completions.create(prompt="import os", **fields).choices[0].text == alone(lively, "import os")
    vector = asking.embeddings.create(model="tiny", input="import os").data[0].embedding  # by base64
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-4) and len(vector) == 32
    with pytest.raises(openai.BadRequestError, match="accepted: 1 to"):
        asking.completions.create(prompt="import os", **(fields | {"max_tokens": 10**6}))
    with pytest.raises(openai.NotFoundError, match="unknown model"):
        asking.completions.create(prompt="import os", **(fields | {"model": "tony"}))
