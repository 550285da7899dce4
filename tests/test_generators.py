"""Generators: the same answers in any order and batches, nothing asked twice, servers that stumble, what is left out."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from servers import completion, serving

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.core.generation.loop import decode
from pretrain.core.generation.server import ServerClient, TooLong
from pretrain.core.grammar.sentences import sentences
from pretrain.core.meter import count_flops
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.data import _answers, _generator
from pretrain.data._answers import Answer, Answers, folder_of
from pretrain.data._chunks import chunks, count_tokens
from pretrain.data._generating import filled, read_prompts
from pretrain.data._generator import LocalGenerator, Prompt, Settings, answers
from pretrain.data._work import working
from pretrain.data.generation.wrap import Wrap

PROMPTS = [
    Prompt(text) for text in ("def f(x):", "class A:\n    pass\n\nclass B", "import", "return x + 1, y", "x = 3")
]


@pytest.fixture
def served():
    with serving() as made:
        yield made


@pytest.fixture(scope="module")
def folder(tiny, prepared, tmp_path_factory):
    """A checkpoint whose greedy tokens vary."""
    place = tmp_path_factory.mktemp("generator") / "checkpoint"
    model = tiny(vocab_size=512, initializer_range=0.4, max_position_embeddings=128)
    checkpoint.save(model, load_tokenizer(prepared / "tokenizer"), place)
    return place


@pytest.fixture
def here(tmp_path):
    with working(tmp_path / "stage" / "work") as desk:
        yield desk


def said(generator, prompts, here, folder):
    return list(answers(generator, prompts, Answers(folder), here))


def test_greedy_answers_are_those_of_the_plain_loop(folder, here, tmp_path):
    made = said(LocalGenerator(folder, Settings(12)), PROMPTS, here, tmp_path / "a")
    model, tokenizer = checkpoint.load(folder)
    vocabulary = Vocabulary.of(tokenizer)
    for prompt, answer in zip(PROMPTS, made, strict=True):
        ids = [vocabulary.begin, *encode(tokenizer, [prompt.user])[0].tolist()]
        new = decode(model, torch.tensor([ids]), max_new_tokens=12, eos=vocabulary.eos)[0, len(ids) :].tolist()
        assert answer.text == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert (answer.prompt_tokens, answer.new_tokens) == (len(ids), len(new))
        assert answer.finished == (new[-1] == vocabulary.eos) and answer.fits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_neither_order_nor_batches_change_an_answer(folder, here, tmp_path, monkeypatch, temperature):
    settings = Settings(10, temperature, seed=3)
    whole = said(LocalGenerator(folder, settings), PROMPTS, here, tmp_path / "a")
    turned = said(LocalGenerator(folder, settings), PROMPTS[::-1], here, tmp_path / "b")[::-1]
    monkeypatch.setattr(_generator, "BATCH_TOKENS", 1)
    monkeypatch.setattr(_generator, "SHARD", 2)
    alone = said(LocalGenerator(folder, settings), PROMPTS, here, tmp_path / "c")
    texts = [[answer.text for answer in each] for each in (whole, turned, alone)]
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) == len(PROMPTS)
    others = [Settings(10, temperature, seed=4), Settings(10, temperature, top_p=0.5, seed=3)]
    changed = [said(LocalGenerator(folder, o), PROMPTS, here, tmp_path / str(n)) for n, o in enumerate(others)]
    assert [[a.text for a in each] != texts[0] for each in changed] == [temperature > 0] * 2


def test_what_is_asked_again_is_sampled_anew_and_greedily_the_same(folder, here, tmp_path):
    prompts = [Prompt("import", number=number) for number in range(3)]
    for temperature, different in ((1.0, 3), (0.0, 1)):
        made = said(LocalGenerator(folder, Settings(10, temperature)), prompts, here, tmp_path / str(temperature))
        assert len({answer.text for answer in made}) == different


def test_nothing_is_answered_twice_and_the_flops_are_counted_each_time(folder, here, tmp_path, monkeypatch):
    settings = Settings(6)
    first, spent = count_flops(lambda: said(LocalGenerator(folder, settings), PROMPTS[:3] * 2, here, tmp_path / "a"))
    assert sum(answer.flops for answer in first[:3]) == spent > 0 and here.flops == 0
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("opened"))
    again, more = count_flops(lambda: said(LocalGenerator(folder, settings), PROMPTS[:3], here, tmp_path / "a"))
    assert again == first[:3] and more == 0 and here.flops == spent


def test_a_killed_run_asks_only_what_is_not_answered(served, here, tmp_path):
    generator = Wrap(server=served.url, served="m", parallel=1, temperature=0.0).opened()

    def stumble(body):
        return completion("an answer") if len(served.seen) < 4 else (400, b"no more", {})

    served.answer = stumble
    with pytest.raises(PretrainError, match="HTTP 400: no more"):
        said(generator, PROMPTS, here, tmp_path / "a")
    served.answer = lambda body: completion("an answer")
    before = len(served.seen)
    assert [answer.text for answer in said(generator, PROMPTS, here, tmp_path / "a")] == ["an answer"] * 5
    assert before == 4 and len(served.seen) == 6


def test_a_damaged_answer_is_one_that_is_not_there(tmp_path):
    kept, keys = Answers(tmp_path), [f"{n:064x}" for n in (7, 1 << 200, (1 << 200) + 1, (9 << 192) + 5, (9 << 192) + 6)]
    made = {key: Answer(f"text {n} é", new_tokens=n) for n, key in enumerate(keys)}
    kept.add(made)
    assert kept.get(keys[0]) == made[keys[0]] and not list(tmp_path.iterdir())
    kept.flush()
    assert kept.get(keys[0]) == made[keys[0]]
    again = Answers(tmp_path)
    assert [again.get(key) for key in keys] == [*made.values()]
    (path,) = tmp_path.glob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace("text 1", "text 9")
    path.write_text("".join(lines)[:-20])
    damaged = Answers(tmp_path)
    assert [damaged.get(key) for key in keys] == [made[keys[0]], None, made[keys[2]], made[keys[3]], None]
    damaged.add({keys[1]: made[keys[1]]})
    damaged.flush()
    assert Answers(tmp_path).get(keys[1]) == made[keys[1]] and Answers(tmp_path).get(keys[4]) is None


def test_many_answers_of_one_process_are_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(_answers, "MERGED", 3)
    kept, keys = Answers(tmp_path), [f"{n * 7919 + 1:016x}" + "0" * 48 for n in range(10)]
    for number, key in enumerate(keys):
        kept.add({key: Answer(str(number))})
        kept.flush()
    assert [kept.get(key).text for key in keys] == [str(number) for number in range(10)]
    assert len(list(tmp_path.iterdir())) == 1 and kept.get("f" * 64) is None


def test_answers_lie_beside_the_stages_of_a_run(here, tmp_path):
    assert folder_of(here) == tmp_path / ".generated"
    with working(tmp_path / "alone") as desk:
        assert folder_of(desk) == tmp_path / "alone" / ".generated"


def test_other_checkpoints_and_settings_are_asked_anew(folder, tmp_path):
    other = Path(shutil.copytree(folder, tmp_path / "other", copy_function=shutil.copy))
    (other / "extra.json").write_text("{}")
    made = [
        LocalGenerator(folder, Settings(6)), LocalGenerator(other, Settings(6)), LocalGenerator(folder, Settings(7)),
        LocalGenerator(folder, Settings(6, 0.5)),
    ]  # fmt: skip
    assert len({json.dumps(each.identity) for each in made}) == 4
    assert made[0].identity == LocalGenerator(folder, Settings(6)).identity


def test_a_prompt_that_does_not_fit_is_not_asked(folder, here, tmp_path):
    long, short = said(LocalGenerator(folder, Settings(8)), [Prompt("import os\n" * 200), PROMPTS[0]], here, tmp_path)
    assert not long.fits and long.new_tokens == 0 and short.fits and short.new_tokens


def test_a_chat_model_is_asked_in_its_template(folder, here, tmp_path):
    place = Path(shutil.copytree(folder, tmp_path / "chat"))
    tokenizer = load_tokenizer(place)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    tokenizer.save_pretrained(place)
    (made,) = said(LocalGenerator(place, Settings(9)), [Prompt("import", "be brief")], here, tmp_path / "a")
    model, tokenizer = checkpoint.load(place)
    ids = tokenizer("<|endoftext|>user: ", add_special_tokens=False)["input_ids"]
    ids += encode(tokenizer, ["be brief\n\nimport"])[0].tolist()
    ids += tokenizer("\nassistant:", add_special_tokens=False)["input_ids"]
    new = decode(model, torch.tensor([ids]), max_new_tokens=9, eos=Vocabulary.of(tokenizer).eos)[0, len(ids) :]
    assert made.text == tokenizer.decode(new, skip_special_tokens=True).strip() and made.prompt_tokens == len(ids)


def test_a_server_is_asked_in_parallel_with_its_key_and_no_more_at_once(served, here, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    served.seconds = 0.05
    served.answer = lambda body: completion(body["messages"][-1]["content"].upper())
    operation = Wrap(server=served.url, served="m", key="SOME_KEY", parallel=3, temperature=0.5, max_new_tokens=9)
    prompts = [Prompt(f"text {number}", "sys") for number in range(12)]
    made = said(operation.opened(), prompts, here, tmp_path / "a")
    assert [answer.text for answer in made] == [f"TEXT {number}" for number in range(12)]
    assert 2 <= served.most <= 3
    path, headers, body = served.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["messages"][0] == {"role": "system", "content": "sys"}
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 9, 0.5)
    seeds = {body["messages"][-1]["content"]: body["seed"] for _, _, body in served.seen}
    assert len(set(seeds.values())) == 12 and all(0 <= seed < 1 << 31 for seed in seeds.values())
    assert "secret" not in "".join(path.read_text() for path in (tmp_path / "a").iterdir())


@pytest.mark.parametrize("passing", [(503, b"busy", {}), (429, b"slow", {"Retry-After": "3"})])
def test_a_server_that_stumbles_is_asked_again(served, passing):
    pauses = []
    served.answer = lambda body: passing if len(served.seen) < 4 else completion("at last")
    client = ServerClient(served.url, "m", retries=3, pause=pauses.append)
    assert client.complete("", "q", max_tokens=3).text == "at last"
    assert pauses == ([3.0] * 3 if passing[2] else [1.0, 2.0, 4.0])
    served.answer = lambda body: passing
    with pytest.raises(PretrainError, match=rf"HTTP {passing[0]}: {passing[1].decode()}; .*\(asked 4 times\)") as error:
        client.complete("", "q", max_tokens=3)
    assert "\n" not in str(error.value) and len(served.seen) == 8


def test_a_mistake_of_ours_is_not_repeated_and_a_redirection_is_not_followed(served):
    client = ServerClient(served.url, "m", key="secret", retries=5, pause=pytest.fail)
    for status, headers in ((401, {}), (302, {"Location": served.url}), (307, {"Location": served.url})):
        served.seen.clear()
        served.answer = lambda body, status=status, headers=headers: (status, b"", headers)
        with pytest.raises(PretrainError, match=f"HTTP {status}"):
            client.complete("", "q", max_tokens=3)
        assert len(served.seen) == 1
    served.answer = lambda body: (400, b'{"error": "This model\'s maximum context length is 8 tokens"}', {})
    with pytest.raises(TooLong):
        client.complete("", "q", max_tokens=3)


def test_one_prompt_that_is_too_long_for_a_server_stops_nothing(served, here, tmp_path):
    generator = Wrap(server=served.url, served="m").opened()
    served.answer = lambda body: (
        (400, b"maximum context length", {})
        if "long" in body["messages"][-1]["content"]
        else completion("yes", "length")
    )
    first, other = said(generator, [Prompt("long"), Prompt("x")], here, tmp_path)
    assert (first.fits, other.fits, other.finished, other.text) == (False, True, False, "yes")


ANSWERS = {
    "cut": ("it goes on and on and on", "length"), "empty": ("", "stop"), "refusal": ("I'm sorry, but I can't help.", "stop"),
    "copy": ("the  Passage stands here.", "stop"), "short": ("Too few.", "stop"), "": ("These words say it in another way.", "stop"),
}  # fmt: skip


@pytest.mark.parametrize("reason", ANSWERS)
def test_what_is_of_no_use_is_left_out_and_counted(served, tmp_path, reason):
    text, ended = ANSWERS[reason]
    served.answer = lambda body: completion(text, ended)
    corpus = Dataset.from_list([{"text": "The passage stands here.", "domain": "d", "id": "a"}])
    with working(tmp_path) as desk:
        made = Wrap(server=served.url, served="m")(corpus)
    (report,) = desk.reports
    assert report["dropped"] == ({reason: 1} if reason else {}) and report["asked"] == 1
    assert report["used"] == len(made) - 1 == (not reason)
    shown = report["left_out"] if reason else report["examples"]
    assert text in str(shown) and "The passage stands here." in str(shown)


def test_whom_to_ask_is_said_in_one_way_and_a_key_is_not_in_the_recipe(served, monkeypatch):
    url = "http://localhost:1/v1"
    for fields, message in (
        ({}, "neither: accepted: a generator"),
        ({"generator": "a", "server": url, "served": "m"}, "both: accepted: a generator"),
        ({"server": url}, "served '': accepted: the name of a model"),
        ({"server": "localhost", "served": "m"}, "server 'localhost': accepted: an address"),
        ({"server": "http://me:secret@localhost/v1", "served": "m"}, "accepted: one without"),
        ({"server": url, "served": "m", "key": "sk-secret"}, "key: accepted: the name of an environment variable"),
        ({"generator": "a", "refusal": "("}, "refusal '\\(': .*accepted: a regular expression"),
    ):
        with pytest.raises(PretrainError, match=message) as error:
            Wrap(**fields)
        assert "secret" not in str(error.value) and "\n" not in str(error.value)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(PretrainError, match="environment variable NO_SUCH_KEY \\(key\\) is not set"):
        Wrap(server=url, served="m", key="NO_SUCH_KEY").opened()


def test_a_model_that_writes_no_text_is_refused(tiny, prepared, tmp_path, here):
    checkpoint.save(tiny("bert", vocab_size=512), load_tokenizer(prepared / "tokenizer"), tmp_path / "bert")
    with pytest.raises(PretrainError, match="accepted: a causal language model, with its tokenizer"):
        said(LocalGenerator(tmp_path / "bert", Settings(3)), PROMPTS, here, tmp_path / "a")


def test_prompts_of_a_file_are_checked(tmp_path):
    path = tmp_path / "p.yaml"
    for text, message in (
        ("[]", "accepted: a mapping of prompts \\(a\\)"),
        ("b: {user: '{text}'}", "prompt 'a': accepted: {system: TEXT, user: TEXT}"),
        ("a: {user: 'no place'}", "prompt 'a': no {text} in it; accepted: one with {text}"),
        ("a: {user: '{text}', other: x}", "prompt 'a': accepted"),
        ("a: {user: [1]}", "prompt 'a': accepted"),
    ):
        path.write_text(text)
        with pytest.raises(PretrainError, match=message):
            read_prompts("wrap", str(path), path, ["a"], ["text"])
    path.write_text("a: {user: 'say {text} {x}', system: 's {text}'}")
    prompt = read_prompts("wrap", str(path), path, ["a"], ["text"])["a"]
    assert filled(prompt, {"text": "{x} {text}"}, 2) == Prompt("say {x} {text} {x}", "s {x} {text}", 2)


TEXTS = (
    "One. Two is here! Three? Four",
    "no end at all " * 40,
    "一。二二二二。三三三三三三三三三三" * 3,
    "x" * 500,
    ' \n\n a.b c... (Yes.) "No." e.g. this\nthat\n',
    "",
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("most", [1, 5, 12])
def test_chunks_are_the_text_in_sentences(text, most):
    assert "".join(sentences(text)) == text
    pieces = chunks(text, most)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(0 < count_tokens(piece) <= most for piece in pieces)
    for before, after in pairwise(pieces):
        assert count_tokens(before) + count_tokens(sentences(after)[0]) > most  # as few as there can be


def test_a_chunk_ends_with_a_sentence():
    text = "The first is short. The second one is as short! The third one is longer than both of them."
    assert [count_tokens(each) for each in sentences(text)] == [5, 7, 10]
    for most, wanted in ((12, [2, 1]), (11, [1, 1, 1]), (17, [2, 1]), (22, [3])):
        assert [len(sentences(piece)) for piece in chunks(text, most)] == wanted
