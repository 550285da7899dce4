"""Tokenizers of others: a text does not grow in them without end, and what they give up at is one line."""

from __future__ import annotations

import base64
import json
import re
import shutil
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from pretrain.core import checkpoint
from pretrain.core.encoding import Encoder, encode, encoded, frame, text_of
from pretrain.core.encoding.stored import growth
from pretrain.core.errors import PretrainError
from pretrain.core.system.console import App
from pretrain.corpus.tokenizers import load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def models_folder(tiny, tmp_path_factory):
    """A tiny model with a tokenizer, without checksums, as it comes from elsewhere."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    checkpoint.save(tiny("llama", vocab_size=320), train_tokenizer(["some text"] * 9, vocab_size=290), folder)
    (folder / "checksums.json").unlink()
    return folder


def retokenized(folder: Path, change) -> None:
    """Change the tokenizer of a checkpoint."""
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


def replaced(pattern: str, content: str, kind: str = "Regex") -> dict[str, object]:
    """A step that puts `content` in place of what matches."""
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def charsmap(*replacements: str) -> dict[str, object]:
    """A `Precompiled` normalizer that knows no character, with these replacements."""
    data = (0).to_bytes(4, "little") + "\0".join((*replacements, "")).encode()
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def template(pieces: int) -> dict[str, object]:
    """A post-processor by which a text stands there so many times."""
    single = [{"Sequence": {"id": "A", "type_id": 0}}] * pieces
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}


SPACED = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
MANY_MARKS = {"X": {"id": "X", "ids": [5] * 10_000, "tokens": ["x"] * 10_000}}
BOMBS = {  # a part of a tokenizer, its steps, and how many characters or tokens become of one
    "a hundred of each, five times": ("normalizer", [replaced("a", "a" * 100, "String")] * 5, "1e+10 characters"),
    "two of any, and so on": ("normalizer", [replaced(".", "aa")] * 33, "8.59e+09 characters"),
    "where nothing is": ("normalizer", [replaced("x*", "aa")] * 20, "9.54e+13 characters"),
    "before and after nothing": ("normalizer", [replaced("", "aa", "String")] * 20, "9.54e+13 characters"),
    "what is made is replaced in turn": ("normalizer", [replaced(a, 10 * b, "String") for a, b in pairwise("abcdef")], "1e+05 characters"),
    "something put before": ("normalizer", [{"type": "Prepend", "prepend": "a" * 5000}], "5e+03 characters"),
    "forms of Unicode": ("normalizer", [replaced("\u0645", "\ufdfa", "String"), {"type": "NFKD"}] * 20, "e+23 characters"),
    "a long replacement": ("normalizer", [charsmap("x", "y" * 5000)], "5e+03 characters"),
    "bytes of bytes": ("pre_tokenizer", [BYTES] * 20, "9.54e+13 characters"),
    "something before each piece": ("pre_tokenizer", [SPACED] * 20, "1.05e+06 characters"),
    "when it is read back": ("decoder", [replaced(".", "a" * 36)] * 6, "2.18e+09 characters"),
    "a text many times": ("post_processor", [template(10)] * 9, "1e+09 tokens"),
    "marks without end": ("post_processor", [template(1) | {"special_tokens": MANY_MARKS, "single": [{"SpecialToken": {"id": "X", "type_id": 0}}]}], "1e+04 tokens"),
}  # fmt: skip
LISTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
    "post_processor": "processors",
}


@pytest.mark.promise(
    "What others have written",
    "A tokenizer makes at most 1,000 characters of one, by its normalizer, pre-tokenizer or decoder, and at most 1,000 tokens; one whose steps can make more, or a token of more than 10,000 characters, is refused before it reads a text. Those of the usual families make at most 36.",
)
@pytest.mark.parametrize("what", BOMBS)
def test_a_tokenizer_by_which_a_text_grows_without_end_is_refused_at_once(models_folder, tmp_path, what):
    shutil.copytree(models_folder, folder := tmp_path / "m")
    part, steps, grown = BOMBS[what]
    inner = {"type": "Sequence", LISTS[part]: steps[1:]}
    retokenized(folder, lambda t: t.update({part: {"type": "Sequence", LISTS[part]: [steps[0], inner]}}))
    start = time.process_time()
    for load_it in (checkpoint.load, load_tokenizer):
        with pytest.raises(
            PretrainError, match=rf"tokenizer.json: {part} makes .*{re.escape(grown)} of one; accepted: at most 1,000$"
        ):
            load_it(folder)
    assert time.process_time() - start < 5


SENTENCES = charsmap("a", " ", "\ufdfa"[:1] * 18)  # as long as the longest of SentencePiece's own rules
QUOTES = [replaced("``", '"', "String"), replaced("''", '"', "String")]
FAMILIES = {  # the steps of the usual families before their vocabularies, and the most that one character becomes
    "Llama 2": ([{"type": "Prepend", "prepend": "\u2581"}, replaced(" ", "\u2581", "String")], 2),
    "Llama 2, read back": ([replaced("\u2581", " ", "String"), {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip"}], 1),
    "GPT-2": ([BYTES], 5),
    "Llama 3, Qwen": ([{"type": "NFC"}, {"type": "Split"}, BYTES], 5),
    "BERT": ([{"type": "BertNormalizer"}, {"type": "BertPreTokenizer"}], 3),
    "CLIP": ([{"type": "NFC"}, replaced(r"\s+", " "), {"type": "Lowercase"}, {"type": "Split"}, BYTES], 10),
    "T5": ([SENTENCES, SPACED], 36),
    "XLM-R, Pegasus": ([replaced("\n", " ", "String"), SENTENCES, replaced(" {2,}", " "), {"type": "WhitespaceSplit"}, SPACED], 36),
    "ALBERT, XLNet": ([*QUOTES, {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}, SENTENCES, replaced(" {2,}", " "), SPACED], 36),
    "letters written with two, and marks as one": ([*(replaced(c, 2 * c.lower(), "String") for c in "ABCDEFGHIJKLM"), *(replaced(f"[{c}x]", "x") for c in "abcdefgh")], 2),
}  # fmt: skip


@pytest.mark.promise("What others have written", "Those of the usual families")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_usual_tokenizers_make_of_a_character_is_far_from_the_bound(family):
    steps, most = FAMILIES[family]
    assert growth(steps) == most


@given(st.text("ab ", min_size=1, max_size=5), st.data())
def test_no_text_grows_by_more_than_is_computed(text, data):
    """Against the steps as `tokenizers` takes them."""
    piece = st.text("ab ", max_size=3)
    strings = st.builds(lambda pattern, content: replaced(pattern, content, "String"), piece, piece)
    regexes = st.builds(
        replaced,
        st.sampled_from(
            ["a", ".", "a+", "[ab]{2,}", "b?", "", "a*|b", "(?=a)", " {2}", r"\s", "^", "a{1}?", r"a|", r"a\Kb?"]
        ),
        piece,
    )
    prepended = st.builds(lambda content: {"type": "Prepend", "prepend": content}, piece)
    steps = data.draw(
        st.lists(
            st.one_of(strings, regexes, prepended, st.sampled_from([{"type": "Lowercase"}, {"type": "NFKD"}])),
            max_size=5,
        )
    )
    made = normalizers.Sequence([])
    made.__setstate__(json.dumps({"type": "Sequence", "normalizers": steps}).encode())
    try:
        longer = made.normalize_str(text)
    except BaseException as error:
        assert type(error).__name__ == "PanicException", error  # tokenizers gives up where nothing is left of a text
        return
    assert len(longer) <= growth(steps) * len(text) + 1e-6


TRAP = {"type": "Split", "pattern": {"Regex": "(a|aa)+(b|bb)+$"}, "behavior": "Isolated", "invert": False}
WALK = r"^the tokenizer: Onig: Regex search error: .*; accepted: a text that it takes, or another tokenizer$"


@pytest.mark.promise(
    "What others have written",
    "What a tokenizer gives up at, or a regular expression in it, is one line that says so, when it reads a text and when it writes one.",
)
def test_what_a_regular_expression_gives_up_at_is_one_line(models_folder, tmp_path):
    shutil.copytree(models_folder, folder := tmp_path / "m")
    retokenized(folder, lambda t: t.update(pre_tokenizer=TRAP, decoder=replaced("(a|aa)+(b|bb)+$", "x")))
    tokenizer, hard = load_tokenizer(folder), "a" * 40
    for reads in (
        lambda: encode(tokenizer, [hard]),
        lambda: encoded(tokenizer, hard),
        lambda: Encoder(tokenizer).spans(hard),
    ):
        with pytest.raises(PretrainError, match=WALK):
            reads()
    retokenized(folder, lambda t: t.update(pre_tokenizer=None))
    ids = encode(load_tokenizer(folder), [hard])[0]
    word = json.loads((folder / "tokenizer.json").read_text())
    word["model"] = {"type": "WordLevel", "vocab": {hard: 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    writer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(word | {"added_tokens": []})))
    assert len(ids)
    with pytest.raises(PretrainError, match=WALK):
        text_of(writer, [0])


def test_a_word_for_which_a_vocabulary_has_nothing_is_one_line():
    words = Tokenizer(models.WordPiece({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(
        PretrainError, match=r"^the tokenizer: WordPiece error: Missing \[UNK\] token from the vocabulary; accepted: "
    ):
        encode(PreTrainedTokenizerFast(tokenizer_object=words), ["b"])


def test_a_template_whose_text_is_not_read_says_nothing_of_turns(models_folder, tmp_path):
    shutil.copytree(models_folder, folder := tmp_path / "m")
    retokenized(folder, lambda t: t.update(pre_tokenizer=TRAP))
    tokenizer = load_tokenizer(folder)
    begin, _ = frame(tokenizer)
    tokenizer.chat_template = "{{ 'a' * 40 }}"
    assert frame(tokenizer)[0] == begin


def test_a_library_that_gives_up_ends_a_command_in_one_line_and_an_interrupt_does_not(capsys):
    class PanicException(BaseException):
        """As pyo3 has it."""

    app, raised = App(), []

    @app.command()
    def work() -> None:
        raise raised[0]

    raised.append(PanicException("index out of bounds"))
    with pytest.raises(SystemExit, match="^1$"):
        app([])
    assert capsys.readouterr().err == "error: a library gave up: index out of bounds\n"
    raised[0] = KeyboardInterrupt()
    with pytest.raises(SystemExit, match="^130$"):
        app([])
    assert "error" not in capsys.readouterr().err
