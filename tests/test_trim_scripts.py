"""Vocabularies by writing script: text of the kept scripts is split as before, byte by byte where tokens are bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from closeness import assert_same_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pretrain.core import checkpoint
from pretrain.core.encoding import encode
from pretrain.core.errors import PretrainError
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.surgery import Inputs
from pretrain.surgery.vocabulary._scripts import byte_of, script_of
from pretrain.surgery.vocabulary._scripts import of_bytes as script_of_bytes
from pretrain.surgery.vocabulary.trim_scripts import TrimScripts, scripts_of

TEXTS = {
    "Latin": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Tous les êtres humains naissent libres et égaux. Bínádam ni wọ́n bí ní òmìnira.",
    "Cyrillic": "Все люди рождаются свободными и равными в своем достоинстве и правах. Всі люди народжуються вільними.",
    "Ethiopic": "የሰው ልጅ ሁሉ ሲወለድ ነጻና በክብርና በመብትም እኩልነት ያለው ነው። ሰብ ዝበለ መጠን ሰብኣዊ መሰል አለዎ።",
    "Arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق، وقد وهبوا عقلا وضميرا.",
    "Han": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。",
}  # fmt: skip
KINDS = ["bpe", "unigram", "wordpiece", "sentencepiece", "fallback"]
KEPT = ("Latin", "Ethiopic")


def wordpiece(texts):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]", "[PAD]", "[MASK]"], show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]"
    )


def sentencepiece(texts):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(
        texts,
        trainers.UnigramTrainer(
            vocab_size=400, special_tokens=["<unk>", "<pad>"], unk_token="<unk>", show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def fallback(texts):
    """BPE of characters that spells what it does not know in bytes, as Llama's."""
    spelt = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()])
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=800, special_tokens=["<unk>", "<pad>", *spelt], show_progress=False)
    )
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:2]  # the bytes are tokens like others
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), unk_token="<unk>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def tokenizers():
    texts = [*TEXTS.values()] * 3
    made = {"wordpiece": wordpiece(texts), "sentencepiece": sentencepiece(texts), "fallback": fallback(texts)}
    sizes = {"bpe": {"vocab_size": 560}, "unigram": {"vocab_size": 500, "algorithm": "unigram"}}
    return made | {name: train_tokenizer(texts, mask=True, **given) for name, given in sizes.items()}


def cut(tiny, tokenizer, surgery, family="bert", **given):
    model = tiny(family, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    inputs = Inputs(tokenizer=tokenizer, **given)
    return surgery(model, inputs), inputs.extra


def mapped(old, new):
    """Each old token's new number, for those that stay."""
    numbers = new.get_vocab()
    return {index: numbers[token] for token, index in old.get_vocab().items() if token in numbers}


@pytest.mark.parametrize("kind", KINDS)
def test_all_text_of_the_kept_scripts_is_split_as_before_and_tokens_of_others_are_gone(tiny, tokenizers, kind):
    old = tokenizers[kind]
    model, extra = cut(tiny, old, TrimScripts(KEPT))
    new = extra["tokenizer"]
    to = mapped(old, new)
    words = [w for s in KEPT for w in TEXTS[s].split()]
    rng = np.random.default_rng(0)
    mixed = ["".join(rng.permutation(list("".join(rng.choice(words, 3)) + " 1,.?"))) for _ in range(30)]
    for text in (*(TEXTS[s] for s in KEPT), *words, *mixed):
        before, after = encode(old, [text])[0], encode(new, [text])[0]
        assert [to[int(i)] for i in before] == after.tolist(), text
    foreign = [
        token for token in new.get_vocab() if token not in old.all_special_tokens and not token.startswith("<0x")
    ]
    if kind in ("unigram", "sentencepiece"):  # the piece of least score stays, whatever its script
        pieces = json.loads(old.backend_tokenizer.to_str())["model"]["vocab"]
        foreign = [token for token in foreign if token != min(pieces, key=lambda piece: piece[1])[0]]
    if kind in ("bpe", "unigram"):
        whole = [bytes(map(byte_of().get, t)) for t in foreign if len(t) > 1]
        foreign = [data.decode() for data in whole if data.decode(errors="ignore").encode() == data]
    assert foreign and all(script_of(t.removeprefix("##"), KEPT) for t in foreign)
    assert len(new) < 0.9 * len(old) and model.config.vocab_size == len(new)
    metrics = extra["metrics"]
    assert metrics["trim_scripts/tokens"] == len(new) and metrics["trim_scripts/parameters"] == model.num_parameters()
    assert {"trim_scripts/tokens_Latin", "trim_scripts/tokens_Ethiopic", "trim_scripts/tokens_Common"} <= set(metrics)
    if kind in ("bpe", "unigram", "fallback"):  # what is spelt in bytes can still be written
        assert new.decode(encode(new, [TEXTS["Han"]])[0]) == old.decode(encode(old, [TEXTS["Han"]])[0])
    else:
        assert new.unk_token_id in encode(new, [TEXTS["Han"]])[0]


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_logits_of_kept_tokens_are_as_before_and_it_opens_in_transformers(tiny, tokenizers, kind, tmp_path):
    old = tokenizers[kind]
    ids = torch.tensor(encode(old, [TEXTS["Ethiopic"]])[0][None, :40].astype(np.int64))
    plain = tiny("bert", vocab_size=len(old), pad_token_id=old.pad_token_id)
    with torch.no_grad():
        before = plain.double()(ids).logits
    model, extra = cut(tiny, old, TrimScripts(KEPT))
    to = mapped(old, extra["tokenizer"])
    new_ids = torch.tensor([[to[int(i)] for i in ids[0]]])
    with torch.no_grad():
        after = model.double()(new_ids).logits
    torch.testing.assert_close(after, before[..., sorted(to)], atol=1e-13, rtol=1e-13)
    checkpoint.save(model.float(), extra["tokenizer"], tmp_path / "c")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "c").eval()
    assert_same_model(theirs(new_ids).logits, model(new_ids).logits, model)


def test_bytes_within_a_character_belong_to_the_scripts_that_have_such_characters():
    """Against all substrings of the bytes of all characters, of which a script's may hold what a token is."""
    script = script_of_bytes(("Cyrillic",))
    allowed = [c.encode() for c in map(chr, range(0x80, 0x3000)) if script_of(c, ("Cyrillic",)) is not None]
    others = [chr(c).encode() for c in range(0x1200, 0x1380)]  # Ethiopic
    for data in allowed:
        assert all(script(data[a:b]) for a in range(len(data)) for b in range(a + 1, len(data) + 1))
    assert script("б".encode()) == script("б".encode()[:1]) == "Cyrillic" and script(b"1") == "Common"
    assert not any(script(data) or script(data[:2]) for data in others)
    assert script("жя".encode()[1:3]) and script("ж1".encode()[1:])  # the end of one and the beginning of another
    for wrong in (b"\xff", b"\xd0\x41", b"a\x80b", "aé".encode()[:2] + "é".encode(), "я".encode() + b"\x80"):
        assert script(wrong) is None


def test_byte_level_characters_stand_for_the_bytes_that_the_tokenizer_means():
    table = byte_of()
    assert {*table} == {*pre_tokenizers.ByteLevel.alphabet()} and sorted(table.values()) == list(range(256))
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in (" a\nß", *TEXTS.values()):
        ((made, _),) = splitter.pre_tokenize_str(text)
        assert bytes(map(table.get, made)).decode() == text


def test_of_a_corpus_each_scripts_most_frequent_tokens_stay(tiny, tokenizers):
    old = tokenizers["sentencepiece"]
    text = TEXTS["Latin"] * 4 + TEXTS["Ethiopic"] + TEXTS["Han"]
    ids = torch.tensor(encode(old, [text])[0][None].astype(np.int64))
    counts = torch.bincount(ids[0], minlength=len(old))
    of = scripts_of(old, KEPT)
    expected = {script: [i for t, i in old.get_vocab().items() if of(t) == script and counts[i]] for script in KEPT}
    for keep in (0, 7):
        _, extra = cut(tiny, old, TrimScripts(KEPT, keep=keep), batches=[{"input_ids": ids}])
        metrics = extra["metrics"]
        for script in KEPT:
            assert metrics[f"trim_scripts/tokens_{script}"] == (keep or len(expected[script]))
        names = extra["tokenizer"].get_vocab()
        best = max(expected["Ethiopic"], key=lambda i: (counts[i], -i))
        assert old.convert_ids_to_tokens(best) in names and 0 < metrics["trim_scripts/text_kept"] < 1
        there = (extra["batches"][0]["attention_mask"] > 0)[0]
        assert there.float().mean() == pytest.approx(metrics["trim_scripts/text_kept"])
    unused = {t for t, i in old.get_vocab().items() if of(t) == "Latin" and not counts[i] and len(t) > 1}
    assert len(unused) > 2 and unused & {*names} == {"<unk>", "<pad>"}


def test_what_does_not_fit_is_refused(tiny, tokenizers):
    with pytest.raises(
        PretrainError, match="trim_scripts: script 'Latinum': accepted: a script of Unicode by its name"
    ):
        TrimScripts(("Latin", "Latinum"))
    with pytest.raises(PretrainError, match="trim_scripts: no scripts: accepted: one or more"):
        TrimScripts(())
    with pytest.raises(PretrainError, match="trim_scripts: keep 5: accepted: 0, or a surgery stage with `corpus`"):
        cut(tiny, tokenizers["bpe"], TrimScripts(("Latn",), keep=5))
    with pytest.raises(PretrainError, match="trim_scripts: the checkpoint has no tokenizer; accepted: one that has"):
        TrimScripts(("Latn",))(tiny(), None)
