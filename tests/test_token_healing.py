"""Prompts that end where people end them, within what the tokenizer would make one token of."""

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import encoded
from pretrain.core.generation.healing import LONGEST, healing
from pretrain.core.generation.loop import decode
from pretrain.core.generation.settings import StopStrings
from pretrain.core.models.families import new_model
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.stages.decode import continue_prompt

CODE = ["def main(self):\n    return None\n", "class Model:\n    def run(self):\n        return main()\n\n"] * 50
PROMPTS = [
    "def ",
    "def",
    "class Model:\n    ",
    "def run(self)",
    "        ret",
    "x = main(",
    "é",
    "a é",
    "\n\n",
    " ",
    "2 ",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CODE, vocab_size=330)


def ids_of(tokenizer, text):
    return encoded(tokenizer, text, add_special_tokens=False)["input_ids"]


def healed(tokenizer, prompt, before=1):
    return healing(tokenizer, prompt, ids_of(tokenizer, prompt), before)


def ways(tokenizer, prompt):
    """How the last word may be written: what the tokenizer spells of each beginning, and what may come next."""
    found = healed(tokenizer, prompt)
    spell = tokenizer.convert_ids_to_tokens
    return {"".join(spell(list(path))): set(spell(may)) for path, may in found.following.items()}


def test_a_word_begun_by_its_space_goes_on_as_the_tokenizer_writes_words(tokenizer):
    found = healed(tokenizer, "def ")
    assert tokenizer.convert_ids_to_tokens(found.again) == ["Ġ"] and found.length == 2
    assert {"Ġmain", "ĠNone"} <= ways(tokenizer, "def ")[""]


def test_four_spaces_are_three_and_a_word_with_its_own(tokenizer):
    after = ways(tokenizer, "class Model:\n    ")
    assert "ĠĠĠ" in after[""] and {"Ġreturn", "Ġdef"} <= after["ĠĠĠ"]


def test_a_bracket_may_be_the_beginning_of_a_line_s_end(tokenizer):
    assert "()ĊĊ" in ways(tokenizer, "x = main()")[""]


def test_a_beginning_is_one_that_the_tokenizer_goes_on_from(tokenizer):
    """After " r" stands no "eturn", since " return" is one token: the r alone is no beginning of " ret"."""
    after = ways(tokenizer, "    ret")
    assert "Ġreturn" in after[""] and "Ġr" not in after


@settings(max_examples=60, deadline=None)
@given(prompt=st.one_of(st.sampled_from(PROMPTS), st.text("defmain rtu()\n:=é", max_size=12)), seed=st.integers(0, 9))
def test_what_is_written_is_the_prompt_and_more_in_the_tokenizers_own_tokens(tokenizer, tiny, prompt, seed):
    model = tiny(vocab_size=len(tokenizer), seed=seed)
    ids = [1, *ids_of(tokenizer, prompt)]
    found = healed(tokenizer, prompt)
    if found is None:
        return
    assert (*ids[: found.length], *found.again) == tuple(ids)

    ids_1L = torch.tensor([ids[: found.length]])
    new = decode(model, ids_1L, max_new_tokens=found.most + 1, healing=found)[0, found.length :].tolist()
    written = tokenizer.decode([*ids[1 : found.length], *new])
    assert written.startswith(prompt)
    word = tokenizer.decode(found.again)
    count = next(n for n in range(len(new) + 1) if tokenizer.decode(new[:n]).startswith(word))
    if new[:count] != list(found.again) and "\ufffd" not in tokenizer.decode(new[:count]):
        assert ids_of(tokenizer, tokenizer.decode(new[:count])) == new[:count]


def test_nothing_is_healed_where_there_is_nothing_to_choose(tokenizer, stories):
    letters = train_tokenizer([story["text"] for story in stories[:3]], algorithm="bytes")
    assert healed(letters, "def ") is None
    assert healed(tokenizer, "") is None
    assert healed(tokenizer, "def<|endoftext|>") is None
    assert healed(tokenizer, "def", before=0) is None  # nothing would stand before it


def test_of_a_long_word_the_last_token_alone_is_written_anew(tokenizer):
    found = healed(tokenizer, "x" * (LONGEST + 4) + "d")  # after which stands "def"
    assert len(found.again) == 1 and set(found.following) == {()}


@pytest.mark.parametrize(("family", "fields"), [("llama", {}), ("gpt2", {}), ("mistral", {"sliding_window": 6})])
def test_the_continuation_is_what_stands_behind_the_prompt(tokenizer, family, fields):
    """Of models that the loop runs, and of one that `transformers` generates with."""
    fields = TINY["gpt2" if family == "gpt2" else "llama"] | fields
    model = new_model(family, fields, vocabulary=Vocabulary.of(tokenizer)).eval()
    for prompt in PROMPTS:
        plain = continue_prompt(model, tokenizer, prompt, temperature=0, max_new_tokens=6, token_healing=False)
        sample = continue_prompt(model, tokenizer, prompt, temperature=0, max_new_tokens=6)
        assert 0 < sample["tokens"] <= 6 >= plain["tokens"] > 0
        found = healed(tokenizer, prompt)
        if found is None:
            assert sample["continuation"] == plain["continuation"]
        else:
            after = tokenizer.decode(found.again) + sample["continuation"]
            first = [*found.following[()]]
            assert any(after.startswith(tokenizer.decode([token]).rstrip("\ufffd")) for token in first)


def test_a_stop_that_stands_in_the_prompt_ends_nothing(tokenizer):
    stop = StopStrings(tokenizer, (":",), "):")
    colon, more = ids_of(tokenizer, "):"), ids_of(tokenizer, "\n    return None")
    assert not stop(colon) and not stop([*colon, *more]) and not StopStrings(tokenizer, ("x",), "):")([*colon, *more])
    assert stop([*colon, *more, *colon]) and stop([*colon, *more * 9, *colon])
    assert not stop([*colon, *more * 9])


def test_a_models_own_words_follow_a_prompt_that_ends_in_a_space(tokenizer, tiny, prepared):
    """A model that knows what stands in a word's middle says it, however the prompt is cut."""
    import pretrain

    model = {"family": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    model |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    given = {"budget": {"steps": 60}, "length": 32, "batch_rows": 8, "optimizer": {"method": "adamw", "lr": 5e-3}}
    made = pretrain.train(model, tokenizer, CODE, validation=0.0, **given)
    for prompt, rest in (
        ("class Model:\n    ", "def run(self):"),
        ("def ", "main("),
        ("class Model:\n    d", "ef run("),
    ):
        assert pretrain.generate(made.model, tokenizer, prompt, temperature=0, max_new_tokens=9).startswith(rest)
