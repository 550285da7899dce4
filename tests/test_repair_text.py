"""Texts of a wrong encoding are made right as ftfy does it, once, and what is right is left as it is."""

from __future__ import annotations

import sys

import pytest
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain.core.errors import PretrainError
from pretrain.data import _mapped
from pretrain.data._work import working
from pretrain.data.rewriting.repair_text import RepairText

pieces = st.lists(
    st.sampled_from(["Ã¼", "â€œso itâ€\x9d", "ü", "&amp;", "&amp;lt;", "<b>", "\n", "plain", "\x00", "\x1b[31m", "\ufeff", "“q”", "ﬁ", "Ａ",
                     "\r\n", "\ud83d\ude00", "Ã\xa0", "\x85", " "]) | st.text(max_size=3),
    max_size=12,
).map("".join)  # fmt: skip


@pytest.mark.parametrize(
    "broken, right",
    [
        ("GrÃ¼ÃŸe aus KÃ¶ln", "Grüße aus Köln"),
        ("a\x00b\x1b[36mc\ufeff", "abc"),
        ("&lt;3 &amp;amp; more", "<3 & more"),
        ("<p> &lt;3", "<p> &lt;3"),
        ("“curly” ﬁ Ａ e\u0301\r\nas it is", "“curly” ﬁ Ａ e\u0301\r\nas it is"),
        ("x\ud83d\ude00", "x\U0001f600"),
    ],
)
def test_broken_text_is_made_right(broken, right):
    pytest.importorskip("ftfy")
    assert RepairText().repairer()(broken) == (right, int(broken != right))


@settings(deadline=None, max_examples=200)
@given(pieces)
@example("&lt;\n&amp;lt;")
@example("<a>\n&amp;")
@example("&amp;\n<a>\n&amp;")
def test_it_is_what_ftfy_makes_of_the_whole_text_and_a_second_time_nothing_changes(text):
    ftfy = pytest.importorskip("ftfy")
    config = ftfy.TextFixerConfig(
        fix_latin_ligatures=False, fix_character_width=False, uncurl_quotes=False, fix_line_breaks=False, normalization=None
    )  # fmt: skip
    repair = RepairText().repairer()
    repaired, changed = repair(text)
    whole = ftfy.fix_text(text, config)
    assert repaired == whole or repaired == ftfy.fix_text(whole, config)
    assert repair(repaired) == (repaired, 0) and (changed > 0) == (repaired != text)


def test_documents_that_changed_are_counted_in_any_batches(tmp_path, monkeypatch):
    pytest.importorskip("ftfy")
    corpus = Dataset.from_dict({"text": ["Ã¼ber\nÃ¼ber", "plain", None, "über", "&amp;", ""]})
    monkeypatch.setattr(_mapped, "SHARD", 2)
    with working(tmp_path) as desk:
        assert RepairText()(corpus)["text"][:] == ["über\nüber", "plain", None, "über", "&", ""]
        assert RepairText(html=False)(corpus)["text"][4] == "&amp;"
    assert desk.reports[0] == {"method": "repair_text", "changed": 2, "lines": 3}


def test_without_the_package_the_extra_is_named_and_a_corpus_without_text_is_refused(monkeypatch):
    with pytest.raises(PretrainError, match="accepted: one with text"):
        RepairText()(Dataset.from_dict({"image": [1]}))
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(PretrainError, match=r"accepted: pip install 'pretrain\[repair\]'"):
        RepairText()(Dataset.from_dict({"text": ["a"]}))
