"""Sleep-time compute: notes and rounds, reused prefixes, plain decoding without rounds, costs, servers and their errors."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.generation.loop import decode
from pretrain.core.generation.server import Reply, ServerClient
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.decoding.deliberation import _clients, sleep_time
from pretrain.decoding.deliberation._clients import LocalClient
from pretrain.decoding.deliberation.sleep_time import NOTES, RETHINK, TASK, Cost, SleepTime, Slept, answer, sleep, split

CONTEXT, QUERIES = "Ann has 3 apples and buys 4.\n\n", ("How many has Ann?", "Who buys?", "What?")


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return load_tokenizer(prepared / "tokenizer")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tiny):
    limit = "max_position_embeddings" if request.param == "llama" else "n_positions"
    return tiny(request.param, vocab_size=512, initializer_range=0.4, **{limit: 1024})


class Scripted:
    """A client that says what it was told to."""

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    def complete(self, shared, rest, *, max_tokens):
        self.asked.append((shared, rest, max_tokens))
        text = self.texts.pop(0)
        return Reply(text, len(shared + rest), len(text))


def test_notes_are_written_anew_until_the_model_has_finished():
    client = Scripted("3 + 4 = 8", " 3 + 4 = 7 ", "3 + 4 = 7, 7 - 3 = 4\nFINISHED", "never asked")
    slept = sleep(client, CONTEXT, max_tokens=50)
    assert slept.notes == "3 + 4 = 7, 7 - 3 = 4" and slept.finished and slept.rounds == 3
    shared = TASK + CONTEXT
    notes = ("none", "3 + 4 = 8", "3 + 4 = 7")
    assert client.asked == [(shared, RETHINK.replace("{notes}", one), 50) for one in notes]
    assert slept.new_tokens == len("3 + 4 = 8" + " 3 + 4 = 7 " + "3 + 4 = 7, 7 - 3 = 4\nFINISHED")
    assert slept.prompt_tokens == sum(len(a + b) for a, b, _ in client.asked)
    assert slept.revised == f"{CONTEXT}\n\n{NOTES}3 + 4 = 7, 7 - 3 = 4\n\n"


@pytest.mark.parametrize(
    ("texts", "notes", "rounds", "finished"),
    [
        (("a", "b", "c"), "b", 2, False),  # no more than it may
        (("a", "FINISHED"), "a", 2, True),  # what was there stays
        (("a", "a", "b"), "a", 2, False),  # nothing changes any more
        (("", "b"), "", 1, False),
        (("FINISHED",), "", 1, True),
    ],
)
def test_when_rounds_end(texts, notes, rounds, finished):
    found = sleep(Scripted(*texts), CONTEXT, rounds=2)
    assert (found.notes, found.rounds, found.finished) == (notes, rounds, finished)


def test_without_rounds_the_context_is_as_it_was(model, tokenizer):
    client = Scripted("said")
    slept = sleep(client, CONTEXT, rounds=0)
    assert slept == Slept(CONTEXT) and slept.revised == CONTEXT and not client.asked
    assert answer(client, slept.revised, QUERIES[0], 9).text == "said" and client.asked == [(CONTEXT, QUERIES[0], 9)]
    local, vocabulary = LocalClient(model, tokenizer), Vocabulary.of(tokenizer)
    reply = answer(local, slept.revised, QUERIES[0], 12)
    ids = [vocabulary.begin, *(i for text in (CONTEXT, QUERIES[0]) for i in encode(tokenizer, [text])[0].tolist())]
    plain = decode(model, torch.tensor([ids]), max_new_tokens=12, eos=vocabulary.eos)[0, len(ids) :]
    assert reply.text == tokenizer.decode(plain, skip_special_tokens=True)
    assert (reply.prompt_tokens, reply.new_tokens, reply.kept_tokens) == (len(ids), len(plain), 0)


def passes(model, call):
    """The tokens that a model reads."""
    read = []
    handle = model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    result = call()
    handle.remove()
    return result, read


def test_a_kept_prefix_gives_the_tokens_of_reading_it_again(model, tokenizer):
    reusing, reading = LocalClient(model, tokenizer), LocalClient(model, tokenizer, reuse=False)
    prefix = len(reusing.ids(CONTEXT, "")[0])
    for i, query in enumerate((*QUERIES, QUERIES[0])):
        kept, read = passes(model, lambda q=query: answer(reusing, CONTEXT, q, 20))
        whole, read_all = passes(model, lambda q=query: answer(reading, CONTEXT, q, 20))
        assert kept.text == whole.text and kept.new_tokens == whole.new_tokens and whole.kept_tokens == 0
        assert kept.kept_tokens == (prefix if i else 0)
        assert sum(read_all) - sum(read) == kept.kept_tokens and read_all[0] == whole.prompt_tokens
    for number in range(6):
        answer(reusing, f"{number}{CONTEXT}", "x", 1)
    assert len(reusing.prefixes.kept) == 4 and answer(reusing, CONTEXT, "x", 1).kept_tokens == 0
    sampled = [
        answer(LocalClient(model, tokenizer, temperature=1.0, seed=s, reuse=r), CONTEXT, "x", 12).text
        for s, r in ((0, True), (0, False), (1, True))
    ]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.fixture
def generates(model, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    begin = Vocabulary.of(tokenizer).begin
    prompts = [[begin, *encode(tokenizer, [CONTEXT + query])[0].tolist()] for query in QUERIES]
    return lambda **fields: SleepTime(
        **({"tokenizer": str(tmp_path), "notes_tokens": 10, "rounds": 2} | fields)
    ), prompts


def padded(prompts):
    longest = max(map(len, prompts))
    ids_BL = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    return ids_BL, torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])


def test_generation_continues_context_notes_and_query(model, tokenizer, generates, monkeypatch):
    make, prompts = generates
    method, vocabulary = make(), Vocabulary.of(tokenizer)
    ids_BL, mask_BL = padded(prompts)
    slept = []
    real = sleep_time.sleep
    monkeypatch.setattr(sleep_time, "sleep", lambda *a, **k: slept.append(real(*a, **k)) or slept[-1])
    options = {"max_new_tokens": 8, "eos": vocabulary.eos, "pad": vocabulary.pad}
    found_BN = method.generate(model, ids_BL, attention_mask_BL=mask_BL, **options)
    assert len(slept) == 1 and slept[0].notes and slept[0].context == CONTEXT  # once for three queries
    assert torch.equal(found_BN[:, : ids_BL.shape[1]], ids_BL)
    notes = encode(tokenizer, [f"{NOTES}{slept[0].notes}\n\n"])[0].tolist()
    begin, context = [vocabulary.begin], encode(tokenizer, [CONTEXT])[0].tolist()
    for ids, row in zip(prompts, found_BN[:, ids_BL.shape[1] :].tolist(), strict=True):
        assert ids[: len(context) + 1] == begin + context
        whole = begin + context + notes + ids[len(context) + 1 :]
        plain = decode(model, torch.tensor([whole]), **options)[0, len(whole) :].tolist()
        assert row == plain + [vocabulary.pad] * (len(row) - len(plain))
    again, read = passes(model, lambda: method.generate(model, torch.tensor([prompts[1]]), **options))
    assert (
        len(slept) == 1
        and again[0, len(prompts[1]) :].tolist()
        == found_BN[1, ids_BL.shape[1] :].tolist()[: again.shape[1] - len(prompts[1])]
    )
    assert read[0] == len(prompts[1]) - len(context) - 1  # the query alone
    no_context = torch.tensor([[vocabulary.begin, *encode(tokenizer, ["What?"])[0].tolist()]])
    assert torch.equal(method.generate(model, no_context, **options), decode(model, no_context, **options))
    assert len(slept) == 1


def test_the_query_begins_after_the_last_separator(tokenizer):
    for text, sep in (("a b.\n\nc.\n\nd e", "\n\n"), ("é ü.\n\nwhy", "\n\n"), ("x = 1 ### y", " ###")):
        ids = encode(tokenizer, [text])[0].tolist()
        place = split(tokenizer, ids, sep)
        assert tokenizer.decode(ids[:place]) == text[: text.rfind(sep) + len(sep)]
    for text in ("no separator", "nothing after\n\n", ""):
        assert split(tokenizer, encode(tokenizer, [text])[0].tolist(), "\n\n") == 0


def test_the_tokenizer_is_the_checkpoints_own_by_default(model, tokenizer, generates, tmp_path):
    make, prompts = generates
    checkpoint.save(model, tokenizer, tmp_path / "own")
    loaded, _ = checkpoint.load(tmp_path / "own")
    one, two = (
        make(**fields).generate(m, torch.tensor([prompts[0]]), max_new_tokens=5)
        for fields, m in (({"tokenizer": None}, loaded), ({}, model))
    )
    assert torch.equal(one, two)
    with pytest.raises(PretrainError, match="tokenizer None: accepted: a checkpoint or a folder with a tokenizer"):
        make(tokenizer=None).generate(model, torch.tensor([prompts[0]]))


def test_a_chat_template_frames_both_parts_and_its_tokens_are_not_for_users(model, tokenizer, prepared):
    chat = load_tokenizer(prepared / "tokenizer")
    chat.chat_template = (
        "{% for m in messages %}<|endoftext|>{{ m.role }}\n{{ m.content }}\n{% endfor %}<|endoftext|>assistant:"
    )
    client, end = LocalClient(model, chat), Vocabulary.of(chat).eos
    prefix, rest = client.ids("The <|endoftext|> context", "Why <|endoftext|>?")
    assert chat.decode(prefix + rest) == (
        "<|endoftext|>system\nThe <|endoftext|> context\n<|endoftext|>user\nWhy <|endoftext|>?\n<|endoftext|>assistant:"
    )
    assert (prefix.count(end), rest.count(end)) == (2, 1)
    assert client.ids("The <|endoftext|> context", "Other")[0] == prefix
    assert chat.decode(client.ids("", "q")[0]) == "<|endoftext|>user\n"
    assert (
        answer(client, CONTEXT, "Why?", 4).text
        == answer(LocalClient(model, chat, reuse=False), CONTEXT, "Why?", 4).text
    )


def test_costs_add_up_and_are_shared_by_the_queries(model, tokenizer):
    client = LocalClient(model, tokenizer)
    slept = sleep(client, CONTEXT, rounds=2, max_tokens=9)
    replies = [answer(client, slept.revised, query, 6) for query in QUERIES]
    cost = Cost.of(slept, replies)
    assert cost.sleep_new == slept.new_tokens <= 18 and cost.sleep_prompt == slept.prompt_tokens
    assert cost.test_new == sum(r.new_tokens for r in replies) and cost.test_prompt == sum(
        r.prompt_tokens for r in replies
    )
    assert cost.total == slept.new_tokens + 10 * cost.test_new and cost.per_query == cost.total / 3
    assert Cost(queries=10, sleep_new=100, test_new=50, weight=2).per_query == 20
    each = [Cost.of(slept, [r]) for r in replies]
    assert sum(c.total for c in each) - 2 * slept.new_tokens == pytest.approx(cost.total)
    with pytest.raises(PretrainError, match="no answers"):
        Cost.of(slept, [])


def test_a_query_that_the_context_foretells_is_more_predictable(model, tokenizer):
    client = LocalClient(model, tokenizer)
    ids = [Vocabulary.of(tokenizer).begin, *encode(tokenizer, [CONTEXT])[0].tolist()]
    query = encode(tokenizer, [QUERIES[0]])[0]
    with torch.no_grad():
        logp = model(torch.tensor([[*ids, *query]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    wanted = float(logp[torch.arange(len(query)), torch.from_numpy(query)].mean())
    assert client.predictability(CONTEXT, QUERIES[0]) == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(PretrainError, match="a query without tokens"):
        client.predictability(CONTEXT, "")


@pytest.fixture
def server():
    """A server whose `answer` is (status, body); `seen` holds what it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.server.seen.append((self.path, dict(self.headers), json.loads(body)))
            status, said = self.server.answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_):
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    made.seen, made.url = [], f"http://127.0.0.1:{made.server_port}/v1"
    made.answer = (200, json.dumps(chat("7 apples\nFINISHED")).encode())
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def chat(text):
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}


def test_a_server_is_sent_chat_completions(server):
    client = ServerClient(server.url, "tiny", key="k", temperature=0.5, top_p=0.9)
    slept = sleep(client, CONTEXT, max_tokens=40)
    assert slept == Slept(CONTEXT, "7 apples", 1, True, 11, 3)
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer k"
    assert headers["Content-Type"] == "application/json"
    asked = [
        {"role": "system", "content": TASK + CONTEXT}, {"role": "user", "content": RETHINK.replace("{notes}", "none")}
    ]  # fmt: skip
    assert body == {"model": "tiny", "messages": asked, "max_tokens": 40, "temperature": 0.5, "top_p": 0.9}
    reply = answer(ServerClient(server.url + "/", "tiny"), slept.revised, "How many?", 5)
    assert reply == Reply("7 apples\nFINISHED", 11, 3, 8)
    path, headers, body = server.seen[1]
    assert path == "/v1/chat/completions" and "Authorization" not in headers and body["max_tokens"] == 5
    assert [m["content"] for m in body["messages"]] == [slept.revised, "How many?"]


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (500, b"out of\n memory", "chat/completions: HTTP 500: out of memory; accepted: HTTP 200"),
        (404, b"", "HTTP 404: ; accepted"),
        (200, b"<html>", "answers '<html>'; accepted: a chat completion with content and usage"),
        (200, b"\xff\xfe", "accepted: a chat completion"),
        (200, b"[]", "accepted: a chat completion"),
        (200, b'{"choices": []}', "accepted: a chat completion"),
        (200, json.dumps(chat("x") | {"usage": None}).encode(), "accepted: a chat completion"),
        (200, json.dumps(chat(None)).encode(), "accepted: a chat completion"),
    ],
)
def test_what_a_server_does_wrong_is_one_error(server, status, body, said):
    server.answer = (status, body)
    with pytest.raises(PretrainError, match=said):
        ServerClient(server.url, "tiny").complete("", "q", max_tokens=3)


def test_a_server_that_is_not_there_is_one_error():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(PretrainError, match="refused; accepted: one that answers within 600 seconds"):
        ServerClient(url, "tiny").complete("", "q", max_tokens=3)
    with socket.socket() as mute:  # takes the connection and says nothing
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/v1"
        with pytest.raises(PretrainError, match="timed out; accepted: one that answers within 0.05 seconds"):
            ServerClient(url, "tiny", timeout=0.05).complete("", "q", max_tokens=3)
    for url in ("localhost:8000", "file:///etc/hostname", ""):
        with pytest.raises(PretrainError, match="accepted: an address such as http://"):
            ServerClient(url, "tiny")


def test_other_mistakes_are_refused(model, tokenizer):
    for fields, said in (
        ({"rounds": -1}, "rounds -1: accepted: 0 or more"),
        ({"notes_tokens": 0}, "notes_tokens 0: accepted: 1 or more"),
        ({"separator": ""}, "separator '': accepted"),
    ):
        with pytest.raises(PretrainError, match=said):
            SleepTime(**fields)
    client = LocalClient(model, tokenizer)
    with pytest.raises(PretrainError, match="rounds -1, max_tokens 3: accepted"):
        sleep(client, CONTEXT, rounds=-1, max_tokens=3)
    with pytest.raises(PretrainError, match="budget 0, query 'q': accepted"):
        answer(client, CONTEXT, "q", 0)
    with pytest.raises(PretrainError, match="and 2000 new ones: accepted: at most the model's 1024 positions together"):
        answer(client, CONTEXT, "q", 2000)
    assert _clients.Prefixes().most == 4
