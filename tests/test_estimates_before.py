"""Estimates of a recipe whose corpus is not made yet: copies are left out, splits are as they will be, tokens as long."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from string import ascii_lowercase

import pytest
from small_recipe import small_recipe
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.corpus.look import glance
from pretrain.data.deduplication.exact_substring_deduplication import ExactSubstringDeduplication
from pretrain.data.filters.gopher_quality import GopherQuality
from pretrain.data.generation.wrap import Wrap
from pretrain.engine import run, silent
from pretrain.forecast import forecast, warnings
from pretrain.identity import plan
from pretrain.recipe import Recipe, check, load
from pretrain.stages import _examples
from pretrain.stages.corpora import look
from pretrain.stages.corpora.estimate import COMPARED, LIBRARIES, OPENED, corpus_estimate, work_seconds
from pretrain.stages.corpora.look import Looked
from pretrain.stages.data import LOOKED, build_source

EVALUATION = {
    "stage": "evaluate",
    "name": "evaluation",
    "checkpoint": "model",
    "corpus": "corpus",
    "compressors": False,
}


@pytest.fixture(autouse=True)
def unseen():
    LOOKED.clear()


def recipe_of(folder: Path, texts: list[str], entries: int = 700) -> Recipe:
    """A recipe on files of these texts, which drops documents that are alike."""
    text = small_recipe(folder, [{"text": each} for each in texts], EVALUATION, held_out=0.2, budget={"steps": 40})
    (folder / "r.yaml").write_text(text)
    operations = ["corpus.operations=[{method: deduplicate, threshold: 0.8}]", f"tokenizer.vocab_size={entries}"]
    return load(folder / "r.yaml", operations, folder / "run")


def estimates(recipe: Recipe, *again: str):
    return {each.item.stage.name: each.estimate for each in forecast(plan(recipe, None, again))}


def copied(stories) -> list[str]:
    """Texts with exact copies of a half of them, and some that are nearly the same."""
    texts = [story["text"] for story in stories[:60]]
    near = [f"{text}\n# one more line\n" for text in texts[30:45]]
    return [*texts, *texts[:30], *near]


def test_passes_and_evaluations_are_those_of_the_corpus_that_is_made_of_copies(tmp_path, stories):
    recipe = recipe_of(tmp_path, copied(stories))
    before = estimates(recipe)
    result = run(recipe, say=silent, report=False)
    after = estimates(recipe, "model", "evaluation")
    left = [each["corpus"].left for each in (before, after)]
    assert left[0].bytes["test"] == left[1].bytes["test"] and left[0].documents["test"] == left[1].documents["test"]
    assert left[0].bytes["train"] == pytest.approx(left[1].bytes["train"], rel=0.05)
    assert before["model"].passes == pytest.approx(after["model"].passes, rel=0.2)
    assert before["evaluation"].flops == pytest.approx(result.stages["evaluation"]["flops"], rel=0.2)


def test_a_token_is_as_long_as_it_is_in_such_text(tmp_path):
    rng = random.Random(0)
    letters = ["\n".join("".join(rng.choices(ascii_lowercase, k=60)) for _ in range(50)) for _ in range(80)]
    words = ["\n".join(rng.choices(["mountain", "riverbank", "garden", "letters"], k=400)) for _ in range(80)]
    passes = []
    for name, texts in (("letters", letters), ("words", words)):
        (tmp_path / name).mkdir()
        recipe = recipe_of(tmp_path / name, texts)
        before = estimates(recipe)["model"].passes
        run(recipe, say=silent, report=False)
        passes.append((before, estimates(recipe, "model")["model"].passes))
    for before, after in passes:
        assert before == pytest.approx(after, rel=0.35)
    assert passes[1][1] > 2 * passes[0][1], "tokens of words hold more, so that as many are more of the text"


def test_of_more_than_there_is_time_for_a_part_is_taken_for_all(tmp_path, stories, monkeypatch):
    texts = [story["text"] for story in stories[:60]]
    recipe = recipe_of(tmp_path, [each for text in texts for each in (text, text)])
    whole = estimates(recipe)["corpus"]
    LOOKED.clear()
    hurried(monkeypatch, 50)
    part = estimates(recipe)["corpus"]
    assert part.left.bytes["train"] == pytest.approx(whole.left.bytes["train"], rel=0.35)
    assert sum(part.left.bytes.values()) < 0.7 * sum(len(text.encode()) for text in texts) * 2
    assert "a look at its sources, of which copies are 5" in whole.basis
    assert "of its sources, from all over them, of which copies are" in part.basis


def hurried(monkeypatch, documents: int) -> None:
    """Let looks have time for so many documents."""
    clock = iter(range(10**6))
    for name in ("LEAST", "LEAST_BYTES", "LONGER"):
        monkeypatch.setattr(glance, name, 1)
    monkeypatch.setattr(glance.time, "process_time", lambda: next(clock) * look.READ / documents)


def test_a_look_at_a_part_goes_over_all_files_and_sources_alike(tmp_path, monkeypatch):
    """Of 200 files the first third is long and the rest short; the second source is as large and of one text."""
    for number in range(200):
        path = tmp_path / "a" / f"{number:03}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{number} long\n" * 400 if number < 67 else f"{number} short\n" * 100)
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / path.name).write_text("the same " * 200)
    sources = [build_source(str(tmp_path / name)) for name in "ab"]
    sizes = [source.size().bytes for source in sources]
    given = (10**6, (0.0, 0.0), None, None, 0, sizes)
    whole = look.looked(sources, *given)
    hurried(monkeypatch, 120)
    part = look.looked(sources, *given)
    assert whole.whole and not part.whole and part.alike and part.given < 0.4 * sum(sizes)
    assert part.kept == pytest.approx(whole.kept, rel=0.1)
    share = [sum(size > 2000 for size in each.sizes["train"]) / len(each.sizes["train"]) for each in (whole, part)]
    assert share[0] == pytest.approx(67 / 201, rel=0.05) and share[1] == pytest.approx(share[0], rel=0.4)


def test_copies_that_lie_far_apart_are_seen_in_a_part(tmp_path, monkeypatch):
    texts = [f"{number} words " * (300 + number) for number in range(70)]
    for place, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / folder / f"{number}.txt").write_text(
                text + "." * 9 * (place * (number % 2))
            )  # a half are copies
    source = build_source(str(tmp_path))
    hurried(monkeypatch, 40)
    part = look.looked([source], 10**6, (0.0, 0.0), None, None, 0, [source.size().bytes])
    copied = sum(len(text.encode()) for text in texts[::2]) / source.size().bytes
    assert not part.whole and 1 - part.kept == pytest.approx(copied, rel=0.4)


def test_of_tables_whose_rows_nobody_has_counted_a_look_tells_how_many_there_are(tmp_path, monkeypatch):
    rows = [json.dumps({"text": f"{number} " + "words " * 60}) for number in range(4000)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    (tmp_path / "r.yaml").write_text(f"stages:\n- {{stage: data, name: corpus, sources: ['{tmp_path}/t.jsonl']}}\n")
    hurried(monkeypatch, 1000)
    corpus = estimates(load(tmp_path / "r.yaml", [], tmp_path / "run"))["corpus"]
    assert "a look at the first 2" in corpus.basis
    assert sum(corpus.left.documents.values()) == pytest.approx(4000, rel=0.05)


def small(folder: Path, stories, copies: int) -> Recipe:
    """A recipe on so many pieces of text, each other than all the rest."""
    whole = "\n".join(story["text"] for story in stories)
    (folder / "text").mkdir()
    for number in range(copies):
        at = number * 3_001 % (len(whole) - 4_000)
        (folder / "text" / f"{number:04}.txt").write_text(f"{number}\n{whole[at : at + 4_000]}")
    (folder / "r.yaml").write_text(f"stages:\n- {{stage: data, name: corpus, sources: ['{folder}/text']}}\n")
    return load(folder / "r.yaml", [], folder / "run")


@pytest.mark.parametrize("clocks", [("process_time", "perf_counter"), ("perf_counter",)], ids=["no time", "others"])
def test_whatever_else_a_machine_does_enough_is_looked_at_to_tell_of_the_rest(tmp_path, stories, monkeypatch, clocks):
    recipe = small(tmp_path, stories, 300)
    whole = estimates(recipe)["corpus"]
    LOOKED.clear()
    hours = iter(range(0, 10**9, 3600))
    for clock in clocks:
        monkeypatch.setattr(glance.time, clock, lambda: float(next(hours)))
    part = estimates(recipe)["corpus"]
    assert "a look at its sources" in whole.basis and "a look at 2" in part.basis
    assert part.disk_bytes == pytest.approx(whole.disk_bytes, rel=0.3)
    assert part.left.bytes["train"] == pytest.approx(whole.left.bytes["train"], rel=0.1)


def test_a_look_that_others_make_slower_is_no_shorter(tmp_path, stories, monkeypatch):
    recipe, clock = small(tmp_path, stories, 200), iter(range(10**6))
    monkeypatch.setattr(glance.time, "process_time", lambda: 0.0)
    monkeypatch.setattr(glance.time, "perf_counter", lambda: next(clock) * look.READ / 100)
    assert "a look at its sources" in estimates(recipe)["corpus"].basis


def test_of_less_than_can_tell_of_the_rest_no_disk_is_foretold(tmp_path, stories, monkeypatch):
    recipe = small(tmp_path, stories, 300)
    really = look._documents

    def broken(*given):
        for number, document in enumerate(really(*given)):
            if number == 3:
                raise OSError("gone")
            yield document

    monkeypatch.setattr(look, "_documents", broken)
    few = estimates(recipe)["corpus"]
    assert few.disk_bytes is None and "by the sizes of its sources" in few.basis


def test_examples_are_counted_by_a_least_amount_too(tmp_path, monkeypatch):
    rows = ["text,label", *(f"{'words ' * 50}{number},a" for number in range(3000))]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    source, hours = build_source(str(tmp_path / "t.csv")), iter(range(0, 10**9, 3600))
    for clock in ("process_time", "perf_counter"):
        monkeypatch.setattr(glance.time, clock, lambda: float(next(hours)))
    seen = _examples.sampled(source, source.size().bytes, rows_alone=True)
    assert len(seen.rows) >= 64 and seen.documents == pytest.approx(3000, rel=0.1)


def uneven_recipe(folder: Path, seed: int = 0) -> Recipe:
    """A recipe on small documents and a few large ones, all of words of their own, most of which are in a split."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(ascii_lowercase, k=rng.randint(2, 9))) for _ in range(1500)]
    sizes = [60] * 70 + [6000] * 6
    lines = [[" ".join(rng.choices(words, k=10)) for _ in range(size // 10)] for size in sizes]
    return recipe_of(folder, ["\n".join([*some, str(number)]) for number, some in enumerate(lines)], 2400)


def test_a_split_of_uneven_documents_is_told_by_a_plan_and_by_the_run(tmp_path):
    recipe = uneven_recipe(tmp_path)
    before = warnings(forecast(plan(recipe, None)))
    said: list[str] = []
    run(replace(recipe, stages=recipe.stages[:1]), say=said.append, report=False)
    (line,) = {each.partition("] warning: ")[2] for each in said if each.startswith("[corpus] warning: the test")}
    assert line.startswith("the test split has 22 of the documents with 3.3% of the text, not 20.0%")
    assert f"stage 'corpus': {line}" in before


def test_tokens_are_as_long_as_a_vocabulary_that_is_learnt_of_few_words_makes_them(tmp_path):
    recipe = uneven_recipe(tmp_path)
    before = estimates(recipe)
    result = run(recipe, say=silent, report=False)
    after = estimates(recipe, "model", "evaluation")
    assert before["corpus"].left.bytes == after["corpus"].left.bytes
    assert before["model"].passes == pytest.approx(after["model"].passes, rel=0.1)
    assert before["evaluation"].flops == pytest.approx(result.stages["evaluation"]["flops"], rel=0.15)


def test_a_small_corpus_is_seen_in_whole_though_it_takes_longer(tmp_path, stories, monkeypatch):
    recipe, clock = small(tmp_path, stories, 200), iter(range(10**6))
    monkeypatch.setattr(glance.time, "process_time", lambda: next(clock) * look.READ / 100)  # a hundred documents
    assert "a look at its sources" in estimates(recipe)["corpus"].basis
    LOOKED.clear()
    monkeypatch.setattr(glance, "LONGER", 1)
    assert "of its sources, from all over them" in estimates(recipe)["corpus"].basis


def test_of_a_part_it_is_said_how_much_text_a_split_may_have_by_chance(tmp_path):
    even, large = [100.0] * 400, [100.0] * 390 + [20_000.0] * 10
    seen = [Looked(False, sum(some), {"train": sum(some)}, squares=sum(s**2 for s in some)) for some in (even, large)]
    said = [corpus_estimate(1e6, 0, 0.1, 0.1, False, seen=each).basis for each in seen]
    assert "uneven" not in said[0] and "the test split may have 2.2% to 17.8% of the text, not 10.0%" in said[1]
    rng, total = random.Random(0), sum(large)
    drawn = [sum(size for size in large if rng.random() < 0.1) / total for _ in range(4000)]
    assert stdev(drawn) == pytest.approx(seen[1].spread(0.1, total), rel=0.1)


def test_a_dry_run_says_that_the_corpus_is_not_made_yet_until_it_is(tmp_path, stories):
    recipe = recipe_of(tmp_path, copied(stories))
    arguments = ["run", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "run"), "--dry-run"]
    given = ["--set", "corpus.operations=[{method: deduplicate, threshold: 0.8}]", "--set", "tokenizer.vocab_size=700"]
    before = CliRunner().invoke(app, [*arguments, *given], catch_exceptions=False).output
    assert (
        "note: corpus is not made yet: what is said of its text is by a look at its sources, of which copies" in before
    )
    run(recipe, say=silent, report=False)
    assert "not made yet" not in CliRunner().invoke(app, [*arguments, *given], catch_exceptions=False).output


class Stopped(Exception):
    """A run that is not to go on."""


SIZED = """stages:
- {{stage: data, name: corpus, sources: ['{folder}/text'], operations: [{{method: deduplicate, threshold: 0.8}}]}}
- {{stage: tokenizer, corpus: corpus, vocab_size: 512}}
"""
AUTO = "- {stage: train, name: model, corpus: corpus, tokenizer: tokenizer, size: auto, model: {family: llama}, budget: {epochs: 2}}\n"


def test_what_a_size_goes_by_is_not_unknown_once_the_corpus_is_made(tmp_path, stories):
    small(tmp_path, stories, 60)
    (tmp_path / "r.yaml").write_text(SIZED.format(folder=tmp_path))
    whole, output = tmp_path / "auto.yaml", tmp_path / "run"
    whole.write_text(SIZED.format(folder=tmp_path) + AUTO)

    def said_by_the_run() -> str:
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            if line.startswith("[corpus]"):  # after what is said of sizes, and before anything is made
                raise Stopped

        with pytest.raises(Stopped):
            run(load(whole, (), output), report=False, say=say)
        return "\n".join(said)

    def told() -> list[bool]:
        commands = (["plan"], ["run", "--dry-run"])
        outputs = [
            CliRunner().invoke(app, [*command, str(whole), "--output", str(output)], catch_exceptions=False).output
            for command in commands
        ] + [said_by_the_run()]
        assert all("model" in each for each in outputs)
        return ["deduplicate will leave is not known" in each for each in outputs]

    assert told() == [True] * 3
    run(load(tmp_path / "r.yaml", (), output), report=False, say=silent)
    assert told() == [False] * 3


def test_a_plan_adds_the_seconds_of_operations_which_workers_share(tmp_path):
    """Of 1 GB: no operation, one that workers share, one that none shares, one of which nothing is known."""
    shared, alone, unknown = GopherQuality(tag=True), ExactSubstringDeduplication(), Wrap(generator="x")
    assert (shared.shared, alone.shared, unknown.speed) == (True, False, 0)

    def seconds(*operations, workers=1, **more):
        return work_seconds(1e9, 1e5, False, operations, workers, **more)

    bare = seconds()
    assert seconds(shared) - bare == pytest.approx(1e9 / shared.speed + LIBRARIES)
    assert seconds(shared, workers=4) - bare == pytest.approx(1e9 / shared.speed / 4 + LIBRARIES + 1, rel=0.1)
    assert seconds(alone, workers=4) == seconds(alone) and seconds(alone, unknown) is None
    assert seconds(shared) - seconds(shared, loaded=True) == pytest.approx(OPENED + LIBRARIES)
    assert work_seconds(1e9, 1e5, True, (), 1) - bare == pytest.approx(1e9 / COMPARED)


def test_a_plan_takes_longer_for_slower_operations(tmp_path, stories):
    source = {"files": str(tmp_path / "texts")}
    (tmp_path / "texts").mkdir()
    for number, story in enumerate(stories):
        (tmp_path / "texts" / f"{number}.txt").write_text(story["text"] * 50)

    def planned(*operations):
        stages = [{"name": "corpus", "stage": "data", "sources": [source], "operations": list(operations)}]
        return estimates(check({"name": "r", "stages": stages}))["corpus"].seconds

    slow = planned({"method": "gopher_repetition", "tag": True})
    assert planned() < planned({"method": "line_deduplication"}) < slow


def test_a_split_that_one_text_leaves_empty_is_told_before_it_runs_and_pieces_fill_it(tmp_path, stories):
    (tmp_path / "book.txt").write_text("\n\n".join(story["text"] for story in stories))

    def odd(**fields):
        source = {"files": str(tmp_path / "book.txt")} | fields
        stages = [{"name": "corpus", "stage": "data", "sources": [source], "validation": 0.2, "test": 0.2}]
        return [line.text for line in estimates(check({"name": "r", "stages": stages}))["corpus"].warnings]

    lines = odd()
    assert [line.split(":")[0] for line in lines] == ["no validation documents", "no test documents"]
    assert "1 are too few for a share of 0.2" in lines[0] and "pieces: 5000" in lines[0]
    assert not any("too few" in line for line in odd(pieces=500))
