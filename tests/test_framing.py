"""What stands before and after a document: as the model was trained, of a chat model not the marks of its turns."""

from __future__ import annotations

import math

import pytest

from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import frame
from pretrain.core.errors import PretrainError
from pretrain.core.generation.settings import ends
from pretrain.corpus.shards import tokenise, tokenizer_fingerprint
from pretrain.corpus.store import Corpus, write_corpus
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.evaluation.likelihood.held_out import HeldOut

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The beginning stands once; the end after each answer alone (Llama 2), or after every turn (Llama 3, Zephyr).
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}[INST]{{ m['content'] }}[/INST]{% endif %}{% endfor %}"
)
EVERY = "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] + eos_token }}{% endfor %}"
BROKEN = "{% for m in messages %}{{ raise_exception('no') }}{% endfor %}"


@pytest.fixture
def dressed(stories):
    """Makes a tokenizer with special tokens, a beginning, an end and a chat template."""

    def make(bos, eos, template=None, special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"), **more):
        made = train_tokenizer((d["text"] for d in stories[:20]), vocab_size=300)
        made.add_special_tokens({"additional_special_tokens": [name for name in special if name is not None]})
        made.bos_token, made.eos_token, made.chat_template = bos, eos, template
        made.init_kwargs.update(more)
        return made

    return make


def names(tokenizer):
    return tuple(None if token is None else tokenizer.convert_ids_to_tokens(token) for token in frame(tokenizer))


@pytest.mark.parametrize(
    ("bos", "eos", "template", "expected"),
    [
        ("<|im_start|>", "<|im_end|>", CHATML, ("<|endoftext|>", None)),  # SmolLM2's
        (None, "<|im_end|>", CHATML, ("<|endoftext|>", None)),  # Qwen's after tuning
        (None, "<|endoftext|>", CHATML, (None, "<|endoftext|>")),  # and before
        ("<|im_start|>", "<|endoftext|>", LLAMA2, ("<|im_start|>", "<|endoftext|>")),
        ("<|im_start|>", "<|im_end|>", EVERY, ("<|im_start|>", None)),
        ("<|im_start|>", "<|im_end|>", BROKEN, ("<|im_start|>", "<|im_end|>")),
        ("<|im_start|>", "<|im_end|>", None, ("<|im_start|>", "<|im_end|>")),
    ],
)
def test_marks_of_turns_are_no_frame_of_documents(dressed, bos, eos, template, expected):
    tokenizer = dressed(bos, eos, template)
    assert names(tokenizer) == expected
    vocabulary = Vocabulary.of(tokenizer)
    assert (vocabulary.before, vocabulary.after) == frame(tokenizer)
    assert vocabulary.eos == tokenizer.eos_token_id  # what an answer ends with


def test_it_can_be_said_and_goes_with_the_checkpoint(dressed, tiny, tmp_path):
    tokenizer = dressed("<|im_start|>", "<|im_end|>", CHATML, document_begin=None, document_end="<|endoftext|>")
    assert names(tokenizer) == (None, "<|endoftext|>")
    checkpoint.save(tiny(vocab_size=len(tokenizer)), tokenizer, tmp_path / "c")
    _, again = checkpoint.load(tmp_path / "c")
    assert names(again) == (None, "<|endoftext|>")
    with pytest.raises(PretrainError, match=r"document_end '<eos>': accepted: a token of the vocabulary, or null"):
        frame(dressed("<|im_start|>", "<|im_end|>", CHATML, document_end="<eos>"))


def test_shards_hold_the_frame_and_are_made_anew_for_another(dressed, stories, tmp_path):
    write_corpus(stories[:20], tmp_path / "corpus", validation=0.1, test=0.1)
    corpus = Corpus(tmp_path / "corpus")
    plain, chat = dressed("<|im_start|>", "<|im_end|>"), dressed("<|im_start|>", "<|im_end|>", CHATML)
    assert tokenizer_fingerprint(plain) != tokenizer_fingerprint(chat)
    for tokenizer, first, last in ((plain, "<|im_start|>", "<|im_end|>"), (chat, "<|endoftext|>", None)):
        shards = tokenise(corpus, tokenizer, tmp_path / "tokens", splits=("train",))["train"]
        row = shards.flat[shards.offsets_N1[0] : shards.offsets_N1[1]]
        assert tokenizer.convert_ids_to_tokens(int(row[0])) == first
        assert (tokenizer.convert_ids_to_tokens(int(row[-1])) == last) is (last is not None)


def test_a_chat_model_ends_with_its_turn_or_its_document(dressed, tiny):
    tokenizer = dressed("<|im_start|>", "<|im_end|>", CHATML)
    end = ends(tiny(vocab_size=len(tokenizer)), Vocabulary.of(tokenizer))
    assert {*tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])} <= end


@pytest.mark.parametrize("template", [None, CHATML])
def test_without_the_end_it_is_what_lm_eval_measures(dressed, tiny, stories, template):
    """`bits_per_byte` of lm-eval's own HFLM, told what stands before a document."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    tokenizer = dressed("<|im_start|>", "<|im_end|>", template)
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.3)
    documents = [{"text": s["text"][:300], "domain": "d"} for s in stories[:6]]
    theirs = huggingface.HFLM(
        pretrained=model, tokenizer=tokenizer, max_length=512, prefix_token_id=Vocabulary.of(tokenizer).begin
    )
    nll = -sum(
        theirs.loglikelihood_rolling(
            [Instance("loglikelihood_rolling", {}, (d["text"],), 0) for d in documents], disable_tqdm=True
        )
    )
    measured = HeldOut(end=False, length=512, resamples=1)(model, tokenizer, documents).metrics
    size = sum(len(d["text"].encode()) for d in documents)
    assert measured["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-4)
    whole = HeldOut(length=512, resamples=1)(model, tokenizer, documents).metrics
    assert (whole["bits_per_byte"] == measured["bits_per_byte"]) is (template is not None)
