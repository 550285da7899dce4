"""Conversations in the terminal: what the model is given of them, what is shown of its answers, and when they end."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from test_chat import chatty  # noqa: F401 - a fixture
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.core import checkpoint
from pretrain.core.encoding import Encoder, text_of
from pretrain.core.errors import PretrainError, PretrainWarning
from pretrain.core.generation.loop import decode
from pretrain.core.method import method_class
from pretrain.inference.chat import HALF, Conversation, Shown, in_utf8


@pytest.fixture
def talk(chatty):  # noqa: F811
    def make(**fields):
        model, tokenizer, _ = chatty
        return Conversation(model, tokenizer, **({"max_new_tokens": 12, "temperature": 0.0} | fields))

    return make


def plain(talk, turns):
    """What the plain loop answers to a conversation."""
    ids, _ = Encoder(talk.tokenizer).conversation(turns, answering=True)
    new_1N = decode(talk.model, torch.tensor([ids]), max_new_tokens=talk.max_new_tokens, eos=None)[:, len(ids) :]
    new = new_1N[0].tolist()
    ends = talk.model.generation_config.eos_token_id
    end = next((place for place, token in enumerate(new) if token in ends), len(new))
    return text_of(talk.tokenizer, new[:end], skip_special_tokens=True).strip().rstrip(HALF)


@pytest.mark.parametrize("method", [None, "prompt_lookup", "suffix_decoding", "streaming_llm"])
def test_an_answer_is_of_the_whole_conversation_and_shown_piece_by_piece(talk, method):
    fields = {"compression_ratio": 0.0} if method == "streaming_llm" else {}
    one = talk(method=method and method_class(method)(**fields), system="be brief")
    pieces: list[str] = []
    first = one.answer("import os", pieces.append)
    assert "".join(pieces).strip() == first and len(pieces) > 3
    assert first == plain(one, [("system", "be brief"), ("user", "import os")])
    second = one.answer("class A")
    turns = [("system", "be brief"), ("user", "import os"), ("assistant", first), ("user", "class A")]
    assert second == plain(one, turns) and one.turns == [*turns[1:], ("assistant", second)]


def test_the_earliest_turns_go_where_there_is_no_room_and_the_system_message_stays(talk, monkeypatch):
    from pretrain.core.models import families

    one = talk(
        system="be brief", turns=[("user", "x " * 40), ("assistant", "y"), ("user", "import os"), ("assistant", "z")]
    )
    kept = [("system", "be brief"), ("user", "import os"), ("assistant", "z"), ("user", "class A")]
    needed = len(Encoder(one.tokenizer).conversation(kept, answering=True)[0]) + 12
    monkeypatch.setattr(families, "positions_of", lambda model: needed)
    assert one._prompt("class A") == Encoder(one.tokenizer).conversation(kept, answering=True)[0] and one.left_out == 2
    monkeypatch.setattr(families, "positions_of", lambda model: 14)
    with pytest.raises(PretrainError, match="more than the model's 14 positions; accepted: a shorter message"):
        one.answer("class A")
    assert len(one.turns) == 4


def test_an_interrupt_ends_an_answer_and_what_was_said_stays(talk):
    one, pieces = talk(), []

    def write(text):
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    said = one.answer("import os", lambda text: write(text) if text != " …" else pieces.append(text))
    whole = plain(one, [("user", "import os")])
    assert pieces[-1] == " …" and whole.startswith(said) and said != whole and one.turns[-1] == ("assistant", said)


def test_characters_of_several_tokens_are_shown_whole():
    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode("utf-8", "replace")

    pieces: list[str] = []
    shown, ids = Shown(Bytes(), pieces.append), list("aé€".encode())
    for count in range(1, len(ids) + 1):
        shown.show(ids[:count])
    assert pieces == ["a", "é", "€"] and HALF not in shown.text


def test_each_line_of_a_pipe_is_a_message_and_words_with_a_slash_are_orders(chatty, tmp_path, monkeypatch, talk):  # noqa: F811
    model, tokenizer, _ = chatty
    checkpoint.save(model, tokenizer, tmp_path / "c")
    lines = "import os\n\n/nonsense\n/system be brief\nclass A\n/reset\nclass A\n/quit\nimport os\n"
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "chat", str(tmp_path / "c"), "--temperature", "0", "--max-new-tokens", "12"],
        input=lines, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    one = talk()
    told = plain(one, [("system", "be brief"), ("user", "class A")])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{answer}\n" for answer in (plain(one, [("user", "import os")]), told, told))


def test_a_model_without_a_template_is_refused_with_what_makes_one(tiny, prepared, tmp_path, monkeypatch):
    from pretrain.corpus.tokenizers import load_tokenizer

    checkpoint.save(tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer"), tmp_path / "c")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    result = CliRunner().invoke(app, ["chat", str(tmp_path / "c")])
    assert "has no chat template; accepted: a chat model, or a base with the surgery chat_template" in str(
        result.exception
    )


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_not_utf_8_are_named(errors):
    stream = io.TextIOWrapper(io.BytesIO("café".encode("latin-1")), "utf-8", errors)
    with pytest.raises(PretrainError, match="chat: byte 0xe9 of standard input is not UTF-8; accepted: text in UTF-8"):
        in_utf8(stream.readline, "chat")
    assert in_utf8(io.StringIO("caf\u00e9").read, "chat") == "caf\u00e9"


@pytest.mark.parametrize("method", ["prompt_lookup", "snapkv"])
def test_a_prompt_of_more_tokens_than_positions_is_cut_for_methods_as_it_is_without(tiny, prepared, method):
    from pretrain.corpus.tokenizers import load_tokenizer
    from pretrain.stages.decode import continue_prompt

    model, tokenizer = tiny(vocab_size=512, max_position_embeddings=32), load_tokenizer(prepared / "tokenizer")
    made = method_class(method)(**({"compression_ratio": 0.0} if method == "snapkv" else {}))
    given = {
        "prompt": "def f(a, b): return a + b\n" * 12,
        "max_new_tokens": 6,
        "temperature": 0.0,
        "token_healing": False,
    }
    with pytest.warns(PretrainWarning, match="tokens are cut off"):
        plain = continue_prompt(model, tokenizer, **given)
    with pytest.warns(PretrainWarning, match="tokens are cut off"):
        assert continue_prompt(model, tokenizer, method=made, **given)["continuation"] == plain["continuation"]
