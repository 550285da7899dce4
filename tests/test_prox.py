"""ProX: programs are read by a grammar and never evaluated, do what they say, and are written by whom one likes."""

from __future__ import annotations

import re
from collections import Counter

import pyarrow.parquet as parquet
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import completion, serving

from pretrain.core.errors import PretrainError
from pretrain.data._dropped import Ledger
from pretrain.data._work import working
from pretrain.data.rewriting._numbered import numbered
from pretrain.data.rewriting._programs import DROP, MOST, NEARLY_ALL, SHORT, kept_document, read, refined, written
from pretrain.data.rewriting.prox import NO_SEED, SYSTEM, Prox
from pretrain.data.rewriting.web_noise import WebNoise

BOUNDS = {"most_removed": 0.95, "errors": 2, "least_words": 3}
TEXT = "Home | About\nThe mill grinds at ebb.\nSee http://a.b/c and come.\nIts wheel is of oak.\n(c) 2019"


def after(program, text=TEXT, **more):
    return refined(text, program, **(BOUNDS | more))


def test_lines_go_by_the_numbers_that_were_shown_and_strings_wherever_they_stand():
    made = after(
        'remove_lines(start=000, end=0)\nnormalize(source_str="http://a.b/c ", target_str="")\nremove_lines(4, 4)'
    )
    assert made.text == "The mill grinds at ebb.\nSee and come.\nIts wheel is of oak."
    assert (made.removed, made.replaced, made.errors, made.refused) == (2, 1, 0, 0)


@pytest.mark.parametrize(
    ("program", "source", "left"),
    [
        ('normalize(source_str="a, b = (c)", target_str="d")', "x a, b = (c) y z", "x d y z"),
        ("normalize('a', 'b')  # why", "a c d e", "b c d e"),
        ('normalize(source_str="say \\"no\\"")', 'they say "no" to all of it', "they  to all of it"),
        (r'normalize(source_str="\frac{1}", target_str="")', r"x \frac{1} y z", "x  y z"),
        ('normalize(target_str="c", source_str="x")', "x a b d", "c a b d"),
    ],
)
def test_a_string_is_what_stands_in_quotes(program, source, left):
    made = after(program, source)
    assert (made.text, made.errors, made.replaced) == (left, 0, 1)


@pytest.mark.parametrize("line", [
    "import os", "__import__('os').system('true')", "print(remove_lines(start=0, end=0))", "x = remove_lines(0, 0)",
    "drop_doc", "untouch_doc(1)", "open('/etc/passwd')", "remove_lines", "eval('1')", "Sure, here is the program:",
])  # fmt: skip
def test_anything_else_is_refused_and_counted_and_the_rest_is_done(line):
    made = after(f"{line}\nremove_lines(start=0, end=0)")
    assert made.text == TEXT.partition("\n")[2] and (made.refused, made.errors) == (1, 0)


@pytest.mark.parametrize("line", [
    "remove_lines(start=1, end=f(0))", "remove_lines(start=1)", "remove_lines(start=2, end=1)", "remove_lines(-1, 2)",
    "remove_lines(start=1, end=1", "remove_lines(start=1, end=1); import os", "remove_lines(start=1, end=1, all=True)",
    "remove_lines(start='1', end=1)", "remove_lines(begin=1, end=1)", "remove_lines(start=1, start=1)",
    "remove_lines(start=9, end=12)", "remove_lines(start=9999999999, end=99999999999)", "normalize()",
    "normalize(source_str=x)", 'normalize(source_str="")', 'normalize(source_str=" ", target_str="x")',
    'normalize(source_str="a" + "b")', "normalize(source_str=f'{x}')", 'normalize("a", "b", "c")',
    'normalize(source_str="e", target_str="' + "x" * 100 + '")',
])  # fmt: skip
def test_a_call_at_fault_is_an_error_and_two_leave_the_text_as_it_was(line):
    one, two = (
        after(f"{line}\nremove_lines(start=0, end=0)"),
        after(f"{line}\nremove_lines(start=0, end=0)\nnormalize(1)"),
    )
    assert one.text == TEXT.partition("\n")[2] and (one.errors, one.refused, one.ignored) == (1, 0, False)
    assert two.text == TEXT and (two.errors, two.ignored, two.removed) == (2, True, 0)


def test_lines_beyond_the_end_are_removed_as_far_as_they_are_there():
    made = after("remove_lines(start=4, end=40)")
    assert made.text == TEXT.rpartition("\n")[0] and made.errors == 1 and made.removed == 1


def test_a_text_that_is_nearly_gone_or_too_short_is_dropped_with_the_reason():
    long = "\n".join(["word " * 40] * 10)
    assert after("remove_lines(all=True)", long).reason == NEARLY_ALL
    assert after("remove_lines(start=0, end=8)", long, most_removed=0.89).reason == NEARLY_ALL
    assert after("remove_lines(start=0, end=8)", long).text == "word " * 40
    assert after("untouch_doc()", "two words").reason == SHORT and after("", "").reason == SHORT
    assert after("untouch_doc()", "two words", least_words=2).text == "two words"
    assert after("untouch_doc()", "水车在退潮时磨面粉", least_words=9).text  # as many units as characters


@pytest.mark.parametrize(("program", "kept"), [
    ("drop_doc()", False), ("keep_doc()", True), ("```python\ndrop_doc()\n```", False), ("I would drop this", True),
    ("", True), ("drop_doc()\nkeep_doc()", True), ("drop_doc(now)", True), ("remove_lines(0, 0)", True),
])  # fmt: skip
def test_a_document_is_dropped_by_one_call_alone(program, kept):
    made = kept_document(TEXT, program)
    assert (made.text == TEXT) is kept and (made.reason == DROP) is not kept


NOTES = st.text(alphabet="ab ,=()\"'\\#\n|é0", min_size=0, max_size=60)
CALLS = st.sampled_from(["remove_lines(", "normalize(", "start=", "end=", 'source_str="', "'", '"', ")", ",", "1", "02", "\n", "all=True", " ", "\\"])  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(NOTES, st.one_of(st.text(max_size=200), st.lists(CALLS, max_size=40).map("".join)))
def test_no_program_fails_grows_a_text_or_brings_lines_that_are_not_of_it(text, program):
    made = refined(text, program, **BOUNDS)
    said = read(program)
    if made.text is not None:
        assert len(made.text) <= MOST * len(text) and made.text.count("\n") <= text.count("\n") + program.count(
            "\\n"
        ) * len(text)
        if not said.lines and not said.strings and not said.everything:
            assert made.text == text
    lines = [line for line in program.split("\n") if line.strip()]
    assert said.errors + said.refused + len(said.lines) + len(said.strings) <= len(lines)


@settings(max_examples=200, deadline=None)
@given(st.lists(NOTES.map(lambda text: text.replace("\n", "")), min_size=1, max_size=12), st.data())
def test_what_is_written_is_read_again(lines, data):
    spans = data.draw(
        st.lists(st.tuples(st.integers(0, 11), st.integers(0, 3)).map(lambda p: (p[0], p[0] + p[1])), max_size=4)
    )
    strings = data.draw(
        st.lists(
            st.tuples(NOTES.filter(lambda t: t.strip() and "\n" not in t and "\\" not in t), st.just("")), max_size=3
        )
    )
    said = read(written(spans, strings))
    assert (said.errors, said.refused) == (0, 0) and len(said.strings) == len({*strings})
    assert {n for a, b in said.lines for n in range(a, b + 1)} == {n for a, b in spans for n in range(a, b + 1)}
    source = "\n".join([*lines, *(string for string, _ in strings)])
    assert (
        refined(source, written((), strings), most_removed=1.0, errors=1, least_words=0).missing == 0
        or len(strings) > 1
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet="abc d\n", max_size=30), max_size=12).map("\n".join), st.integers(2, 40))
def test_pieces_hold_each_line_once_but_those_too_long(text, most):
    lines = text.split("\n")
    pieces = numbered(text, most)
    shown = [line for piece in pieces for line in piece.text.split("\n")]
    for piece in pieces:
        numbers = range(piece.first, piece.last + 1)
        assert piece.text == "\n".join(f"[{n:03d}]{lines[n]}" for n in numbers)
    assert len({*shown}) == len(shown) and len(numbered(text, 10_000)) == 1


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text(alphabet="abc d", max_size=30), min_size=1, max_size=12).map("\n".join),
    st.integers(0, 5),
    st.integers(8, 200),
)
def test_the_programs_that_noise_brings_take_out_just_the_noise(text, seed, tokens):
    operation = WebNoise(rate=1.0, learn="chunk", tokens=tokens, seed=seed)
    noisy = operation.noisy(text)
    rows = operation.rows(noisy)
    program = "\n".join(program for *_, program in rows)
    if all(line in "".join(text for _, text, _ in rows) for line in noisy.text.split("\n")):  # none was too long
        assert refined(noisy.text, program, most_removed=1.0, errors=1, least_words=0).text == text
    assert not text.strip() or noisy.text != text


ROWS = [
    {"text": TEXT + "\n" + "\n".join(f"Line {n} of a mill that stood here." for n in range(12)), "domain": "a", "id": "x", "label": 1},
    {"text": "buy now " * 20, "domain": "a", "id": "y", "label": 2},
    {"text": "Two cats sat on a wall, and all of them were grey as the wall was.", "domain": "b", "id": "z", "label": None},
]  # fmt: skip


@pytest.fixture
def served():
    with serving() as made:
        yield made


def test_documents_are_kept_or_dropped_by_what_a_model_says_and_the_reason_is_kept(served, tmp_path):
    served.answer = lambda body: completion("drop_doc()" if "buy" in body["messages"][-1]["content"] else "keep_doc()")
    ledger = Ledger(tmp_path)
    with working(tmp_path, ledger) as desk:
        made = Prox(server=served.url, served="m", level="document")(Dataset.from_list(ROWS))
    assert made.to_list() == [ROWS[0], ROWS[2]]
    assert all(body["messages"][0] == {"role": "system", "content": SYSTEM} for *_, body in served.seen)
    assert all(body["temperature"] == 0 for *_, body in served.seen)
    ledger.close()
    (row,) = parquet.read_table(ledger.path).to_pylist()
    assert (row["id"], row["reason"]) == ("y", DROP)
    (report,) = desk.reports
    assert report["documents"] == {"a": {"before": 2, "after": 1}, "b": {"before": 1, "after": 1}}


def test_the_programs_of_pieces_are_one_program_of_the_document(served, tmp_path):
    def answer(body):
        lines = re.findall(r"^\[(\d+)\](.*)", body["messages"][-1]["content"], re.MULTILINE)
        calls = [f"remove_lines(start={n}, end={n})" for n, line in lines if "|" in line or "(c)" in line]
        return completion("\n".join(calls) or "untouch_doc()")

    served.answer = answer
    with working(tmp_path) as desk:
        made = Prox(server=served.url, served="m", tokens=40, only=("a",))(Dataset.from_list(ROWS))
    assert len(served.seen) > 4  # several pieces
    kept = [line for line in ROWS[0]["text"].split("\n") if "|" not in line and "(c)" not in line]
    assert made["text"][:] == ["\n".join(kept), ROWS[1]["text"], ROWS[2]["text"]] and made["label"][:] == [1, 2, None]
    (report,) = desk.reports
    assert report["programs"]["lines removed"] == 2 and report["programs"]["documents changed"] == 1
    assert not any("cats" in text for text in served.asked)


def test_what_has_no_answer_of_use_stays_as_it_is(served, tmp_path):
    served.answer = lambda body: completion("I'm sorry, I cannot do that.")
    with working(tmp_path) as desk:
        made = Prox(server=served.url, served="m")(Dataset.from_list(ROWS))
    assert made.to_list() == ROWS and desk.reports[0]["dropped"] == {"refusal": 3}
    assert desk.reports[0]["programs"]["documents without an answer"] == 3


def test_an_annotator_scores_documents_and_two_scores_are_a_program(served, tmp_path):
    scores = {"mill": (3, 0), "buy": (2, 3), "cats": (2, 4)}

    def answer(body):
        asked = body["messages"][-1]["content"]
        education, form = next(pair for word, pair in scores.items() if word in asked.partition("extract:")[2])
        scale, score = ("Extraction Quality Score", form) if "cleanly" in asked else ("Educational score", education)
        return completion(f"It is so so.\n\n{scale}: **{score}**")

    served.answer = answer
    corpus = Dataset.from_list(ROWS)
    made = Prox(server=served.url, served="m", step="annotate", level="document")(corpus)
    assert made["target"][:] == ["keep_doc()", "drop_doc()", "keep_doc()"] and made["text"][:] == corpus["text"][:]
    served.answer = lambda body: completion("Educational score: none")
    ledger = Ledger(tmp_path)
    with working(tmp_path, ledger):
        made = Prox(server=served.url, served="other", step="annotate", level="document")(corpus)
    ledger.close()
    assert len(made) == 0 and {r["reason"] for r in parquet.read_table(ledger.path).to_pylist()} == {NO_SEED}


def test_an_annotators_three_programs_are_merged_and_what_is_at_fault_is_left_out(served):
    def answer(body):
        asked = body["messages"][-1]["content"]
        which = next(word for word in ("navigation bars", "clean web text of links", "footers") if word in asked)
        if "cats" in asked:
            return completion("```python\nremove_lines(start=7, end=7)\n```")
        if "buy" in asked:
            return completion("no program")
        code = {"navigation bars": "remove_lines(start=0, end=0)", "clean web text of links": 'normalize(source_str="http://a.b/c ")', "footers": "untouch_doc()"}[which]  # fmt: skip
        return completion(f"A word before.\n```python\n# so\n{code}\n```")

    served.answer = answer
    operation = Prox(server=served.url, served="m", step="annotate")
    made = operation(Dataset.from_list(ROWS))
    assert made["id"][:] == ["x#chunk-0"] and made["text"][0].startswith("[doc]\n[000]Home | About\n[001]The mill")
    assert made["target"][:] == ['remove_lines(start=0, end=0)\nnormalize(source_str="http://a.b/c ", target_str="")']
    served.answer = lambda body: completion(made["target"][0])
    seen = len(served.seen)
    Prox(server=served.url, served="m")(Dataset.from_list(ROWS[:1]))
    assert served.asked[seen:] == [made["text"][0]]  # the refining model reads what it learnt from


def test_noise_follows_the_text_and_the_seed_and_junk_is_told_from_the_rest():
    corpus = Dataset.from_list([{"text": f"Document {n} on mills.\nIt says {n}.", "id": str(n)} for n in range(200)])
    noisy, again, other = (WebNoise(junk=0.2, seed=seed)(corpus)["text"][:] for seed in (0, 0, 1))
    assert noisy == again != other
    rows = WebNoise(junk=0.2, learn="document")(corpus)
    kinds = Counter(rows["target"][:])
    assert 20 < kinds["drop_doc()"] < 60 and kinds.total() == 200
    for text, target in zip(rows["text"][:], rows["target"][:], strict=True):
        assert ("on mills" in text) == (target == "keep_doc()")


@pytest.mark.parametrize(("fields", "message"), [
    ({"domain": "web"}, "prox: domain 'web': accepted: none"),
    ({"step": "annotate", "only": ("web",)}, r"prox: only \['web'\]: accepted: none with step: annotate"),
    ({"level": "page"}, "level"), ({"errors": 0}, "errors 0: accepted: 1 or more"), ({"most_removed": 0.0}, "most_removed"),
])  # fmt: skip
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(PretrainError, match=message):
        Prox(generator="x", **fields)


def test_a_corpus_without_texts_or_without_the_domain_is_refused(served):
    with pytest.raises(PretrainError, match="prox: a corpus with image; accepted: one with text"):
        Prox(generator="x")(Dataset.from_list([{"image": 1}]))
    with pytest.raises(PretrainError, match=r"prox: only: no document of the domain 'c'.*accepted: a, b"):
        Prox(server=served.url, served="m", only=("c",))(Dataset.from_list(ROWS))
