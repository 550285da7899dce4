"""Runs of earlier versions, adopting, and the package itself edited under a finished run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pretrain import engine, identity
from pretrain.adopt import adopt
from pretrain.core.errors import PretrainError
from pretrain.core.registry import PACKAGE
from pretrain.recipe import load

# What was made before


def older(folder: Path) -> None:
    """Make a run look as it did when addresses were of code: other names, digests of methods, no fingerprints."""
    run = json.loads((folder / "run.json").read_text())
    run.pop("seal", None)
    for entry in run["stages"]:
        home = folder / entry["folder"]
        record = json.loads((home / "stage.json").read_text())
        record["methods"] = {name: "0123456789abcdef" for name in record["methods"]}
        record["address"] = entry["address"] = "f" * 12 + record["address"][12:]
        del record["identity"], record["seal"], record["files"]
        (home / "code.json").unlink()
        (home / "stage.json").write_text(json.dumps(record))
        entry["folder"] = f"{entry['name']}-{'f' * 12}"
        home.rename(folder / entry["folder"])
        (folder / entry["name"]).unlink()
        (folder / entry["name"]).symlink_to(entry["folder"])
    (folder / "run.json").write_text(json.dumps(run))


SMALL = {
    "stages": [
        {"stage": "data", "name": "corpus", "sources": [], "validation": 0.1, "test": 0.1},
        {"stage": "tokenizer", "corpus": "corpus", "vocab_size": 300},
        {
            "stage": "train", "name": "model", "corpus": "corpus", "tokenizer": "tokenizer", "length": 32, "batch_rows": 2,
            "model": {"family": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
            "budget": {"steps": 3}, "save_every": 0,
        },
        {"stage": "evaluate", "checkpoint": "model", "corpus": "corpus", "max_documents": 4, "compressors": False},
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, stories):
    """A finished small run and its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text").mkdir()
    for number, story in enumerate(stories[:40]):
        (folder / "text" / f"{number}.py").write_text(story["text"])
    recipe = json.loads(json.dumps(SMALL))
    recipe["stages"][0]["sources"] = [{"files": str(folder / "text")}]
    (folder / "small.yaml").write_text(json.dumps(recipe))
    engine.run(load(folder / "small.yaml", output=folder / "run"), say=engine.silent)
    return folder


def test_a_run_of_an_earlier_version_still_opens_and_why_says_so(tmp_path, finished):
    from pretrain.cli import app
    from pretrain.report.page import collect

    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    older(tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    invoke = lambda *words: CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)  # noqa: E731
    assert invoke("report", tmp_path / "run").exit_code == 0 and (tmp_path / "run" / "report.html").exists()
    assert collect(tmp_path / "run")["stages"][2]["methods"].keys() == {"adamw", "causal_lm", "cosine"}
    model = tmp_path / "run" / "model"
    result = invoke("generate", model, "--prompt", "def ", "--max-new-tokens", 3)
    assert result.exit_code == 0 and result.stdout.startswith("def ")
    data = ("--data", tmp_path / "run" / "corpus", "--max-documents", 2)
    assert json.loads(invoke("evaluate", model, *data, "--json").stdout)["metrics"]["loss"] > 0
    planned = identity.plan(load(finished / "small.yaml", output=tmp_path / "run"))
    assert all(
        identity.why(item).startswith("made by an earlier version: address differs (compared with ") for item in planned
    )


# Adopting


def recipe_at(finished, output):
    return load(finished / "small.yaml", output=output)


@pytest.mark.parametrize("link", [False, True])
def test_an_adopted_checkpoint_is_run_on_and_says_where_it_is_from(tmp_path, finished, tiny, link):
    from pretrain.core import checkpoint

    given = finished / "run" / "model" / "checkpoint"
    source = tmp_path / "given"  # as from elsewhere: no pretrain.json, other files beside
    shutil.copytree(given, source, ignore=shutil.ignore_patterns("pretrain.json", "checksums.json"))
    for name in ("modeling_x.py", "pytorch_model.bin", ".git/config", "notes/more.txt"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("x")
    folder = adopt(recipe_at(finished, tmp_path / "run"), "model", source, link=link)
    made = folder / "checkpoint"
    names = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    assert names == {path.name for path in given.iterdir()} | {"notes/more.txt"}
    assert (made / "model.safetensors").is_symlink() == link and not (made / "pretrain.json").is_symlink()
    result = engine.run(recipe_at(finished, tmp_path / "run"), say=(said := []).append)
    assert "[model] already done" in said and "[evaluate] evaluate" in said
    assert result.stages["model"]["adopted"]["source"] == str(source) and result.report.exists()
    before = json.loads((finished / "run" / "evaluate" / "stage.json").read_text())["metrics"]["loss"]
    # Near, not equal: the length that it was trained at is not known, so that windows are others.
    assert result.stages["evaluate"]["metrics"]["loss"] == pytest.approx(before, rel=0.01)
    lineage = checkpoint.lineage(made)
    assert lineage["made_by"]["adopted"]["linked"] == link and lineage["made_by"]["name"] == "model"
    assert not (source / "pretrain.json").exists()
    (item,) = [i for i in identity.plan(recipe_at(finished, tmp_path / "run")) if i.stage.name == "model"]
    assert identity.why(item).startswith(f"adopted from {source} on 2") and identity.why(item).endswith("same address")
    if link:
        model, tokenizer = checkpoint.load(source)
        model.get_input_embeddings().weight.data += 1
        checkpoint.save(model, tokenizer, source, source=source)
        with pytest.raises(PretrainError, match="its checksum is not the one in checksums.json"):
            checkpoint.load(made)
        assert "where its files are linked from, has changed since" in identity.why(item)
    else:
        shutil.rmtree(source)
        assert checkpoint.load(made)[1] is not None


def test_an_adopted_corpus_and_tokenizer_are_trained_on(tmp_path, finished):
    recipe = recipe_at(finished, tmp_path / "run")
    adopt(recipe, "corpus", finished / "run" / "corpus")
    adopt(recipe, "tokenizer", finished / "run" / "tokenizer" / "tokenizer")
    result = engine.run(recipe, say=(said := []).append, report=False)
    said = [line for line in said if not line.startswith("warning")]
    assert said[:2] == ["[corpus] already done", "[tokenizer] already done"] and "[model] train" in said
    before = json.loads((finished / "run" / "evaluate" / "stage.json").read_text())
    assert result.stages["evaluate"]["metrics"]["loss"] == pytest.approx(before["metrics"]["loss"])
    assert result.stages["corpus"]["metrics"]["documents/train"] > 0
    lineage = json.loads((tmp_path / "run" / "model" / "checkpoint" / "pretrain.json").read_text())["lineage"]
    assert [bool(stage.get("adopted")) for stage in lineage["stages"]] == [True, True]


def test_what_was_made_before_an_adoption_is_kept_and_what_came_of_it_is_not_served(tmp_path, finished):
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    recipe = recipe_at(finished, tmp_path / "run")
    before = os.readlink(tmp_path / "run" / "model")
    adopt(recipe, "model", finished / "run" / "model")
    engine.run(recipe, say=(said := []).append, report=False)
    assert "[model] already done" in said and "[evaluate] evaluate" in said
    assert os.readlink(tmp_path / "run" / "model") != before and (tmp_path / "run" / before / "stage.json").exists()


def test_a_refreshed_stage_and_what_follows_it_take_no_tokens_made_before(tmp_path, finished, monkeypatch):
    """Tokens lie beside the stages and are shared by them: the text is the same, the code that cuts it is not."""
    from pretrain.corpus import shards

    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    tokens = lambda: sorted(path.parent for path in (tmp_path / "run" / ".tokens").glob("*/train/tokens.json"))  # noqa: E731
    before, written = tokens(), []
    really = shards._write
    monkeypatch.setattr(
        shards, "_write", lambda work, corpus, split, *more: written.append(split) or really(work, corpus, split, *more)
    )
    recipe = recipe_at(finished, tmp_path / "run")
    engine.run(recipe, say=engine.silent, report=False)
    assert written == [] and tokens() == before
    engine.run(recipe, say=engine.silent, report=False, refresh=["corpus"])
    assert "train" in written and len(tokens()) == len(before) + 1
    written.clear()
    engine.run(recipe, say=engine.silent, report=False, refresh=["model"])
    assert "train" in written and len(tokens()) == len(before) + 2
    written.clear()
    engine.run(recipe, say=engine.silent, report=False)
    engine.run(recipe, say=engine.silent, report=False, refresh=["evaluate"])
    assert written == []


def test_of_two_adoptions_the_second_is_measured(tmp_path, finished):
    from pretrain.core import checkpoint

    recipe = recipe_at(finished, tmp_path / "run")
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    losses = []
    for scale in (1.0, 0.5):
        model, tokenizer = checkpoint.load(finished / "run" / "model" / "checkpoint")
        model.get_output_embeddings().weight.data *= scale
        checkpoint.save(model, tokenizer, tmp_path / f"given-{scale}")
        folder = adopt(recipe, "model", tmp_path / f"given-{scale}")
        result = engine.run(recipe, say=(lines := []).append, report=False)
        assert "[model] already done" in lines and "[evaluate] evaluate" in lines
        assert result.stages["model"]["adopted"]["source"] == str(tmp_path / f"given-{scale}")
        losses.append(result.stages["evaluate"]["metrics"]["loss"])
        shutil.rmtree(folder)
    expected = json.loads((finished / "run" / "evaluate" / "stage.json").read_text())["metrics"]["loss"]
    assert losses[0] == pytest.approx(expected, rel=0.01) and abs(losses[1] - losses[0]) > 1e-4


def spoil(finished, tmp_path, name, file, text):
    shutil.copytree(finished / "run" / name, tmp_path / "bad", symlinks=False)
    (tmp_path / "bad" / file).write_bytes(text)
    for sums in (tmp_path / "bad").rglob("checksums.json"):
        sums.unlink()
    return tmp_path / "bad"


@pytest.mark.parametrize(
    "stage, file, text, said",
    [
        ("model", "checkpoint/model.safetensors", b"\x10", "truncated or damaged"),
        ("model", "checkpoint/config.json", b"{", "not valid JSON"),
        ("model", "checkpoint/config.json", b'{"model_type": "nix"}', "model_type 'nix'.*accepted"),
        ("tokenizer", "tokenizer/tokenizer.json", b"{", "tokenizer.json is not valid JSON"),
        ("corpus", "corpus/corpus.json", b"{}", "documents.train None: accepted: a whole number"),
        ("corpus", "corpus/corpus.json", b"[]", "corpus.json holds a list; accepted: a JSON object"),
        ("corpus", "corpus/corpus.json", b'{"documents": "x"}', "documents.train None: accepted: a whole number"),
        ("corpus", "corpus/train/part-00000.parquet", b"PAR1", "not a whole Parquet file"),
    ],
)
def test_a_folder_that_could_not_be_opened_is_refused_and_leaves_nothing(tmp_path, finished, stage, file, text, said):
    bad = spoil(finished, tmp_path, stage, file, text)
    with pytest.raises(PretrainError, match=said) as error:
        adopt(recipe_at(finished, tmp_path / "run"), stage, bad)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").glob("*/stage.json")) and not list((tmp_path / "run").glob("*/*/*"))


def test_a_corpus_with_fewer_documents_than_it_says_is_refused(tmp_path, finished):
    bad = spoil(finished, tmp_path, "corpus", "note", b"")
    next((bad / "corpus" / "train").glob("*.parquet")).unlink()
    with pytest.raises(PretrainError, match=r"train: 0 documents; accepted: \d+ by corpus.json"):
        adopt(recipe_at(finished, tmp_path / "run"), "corpus", bad)


def test_a_corpus_is_read_through_and_its_text_is_text(tmp_path, finished):
    import pyarrow
    import pyarrow.parquet

    bad = spoil(finished, tmp_path, "corpus", "note", b"")
    part = bad / "corpus" / "train" / "part-00000.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:60] + b"x" * 200 + whole[260:])  # its footer is as it was
    with pytest.raises(PretrainError, match="part-00000.parquet: not a whole Parquet file"):
        adopt(recipe_at(finished, tmp_path / "run"), "corpus", bad)
    part.write_bytes(whole)
    table = pyarrow.parquet.read_table(part)
    numbers = pyarrow.array(range(len(table)))
    pyarrow.parquet.write_table(table.set_column(table.column_names.index("text"), "text", numbers), part)
    with pytest.raises(PretrainError, match="part-00000.parquet: column 'text' holds int64; accepted: text"):
        adopt(recipe_at(finished, tmp_path / "run"), "corpus", bad)


@pytest.mark.parametrize("link", [False, True])
def test_what_lies_behind_links_is_taken_too_and_a_link_to_a_folder_above_ends(tmp_path, finished, link):
    given = finished / "run" / "corpus" / "corpus"
    shutil.copytree(given, tmp_path / "given", ignore=shutil.ignore_patterns("train", "checksums.json"))
    (tmp_path / "given" / "train").symlink_to((given / "train").resolve())
    (tmp_path / "given" / "again").symlink_to(tmp_path / "given")
    folder = adopt(recipe_at(finished, tmp_path / "run"), "corpus", tmp_path / "given", link=link)
    names = {path.relative_to(folder / "corpus") for path in (folder / "corpus").rglob("*") if path.is_file()}
    assert names == {path.relative_to(given) for path in given.rglob("*") if path.is_file()}
    before = identity.state_of(tmp_path / "given")
    shutil.rmtree(tmp_path / "given" / "test")
    (tmp_path / "given" / "test").symlink_to((given / "train").resolve())
    assert identity.state_of(tmp_path / "given") != before


def test_a_result_is_adopted_by_its_name_that_stays_and_a_tokenizer_without_weights(tmp_path, finished):
    recipe = recipe_at(finished, tmp_path / "run")
    address = os.readlink(finished / "run" / "model").rpartition("-")[2]
    assert (adopt(recipe, "model", finished / "run" / f"model@{address[:6]}") / "stage.json").exists()
    folder = adopt(recipe, "tokenizer", finished / "run" / "model")
    assert (folder / "tokenizer" / "tokenizer.json").exists() and not list(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("change", ["written", "gone", "new"])
def test_a_folder_that_is_written_meanwhile_is_refused(tmp_path, finished, monkeypatch, change, link):
    shutil.copytree(finished / "run" / "tokenizer" / "tokenizer", given := tmp_path / "given")
    (given / "checksums.json").unlink()
    really = sys.modules["pretrain.adopt"]._check_tokenizer

    def check(folder):
        answer, file = really(folder), given / "tokenizer.json"
        if change == "gone":
            file.unlink()
        else:
            (file if change == "written" else given / "more.json").write_text("{}")
        return answer

    monkeypatch.setattr("pretrain.adopt._check_tokenizer", check)
    file = "more.json" if change == "new" else "tokenizer.json"
    words = f"{file} (changed while it was taken in|cannot be read: No such file or directory); accepted"
    with pytest.raises(PretrainError, match=words):
        adopt(recipe_at(finished, tmp_path / "run"), "tokenizer", given, link=link)
    assert {path.name for path in (tmp_path / "run").glob("*/*")} == {".lock"}


def test_an_adoption_that_does_not_come_to_its_end_leaves_what_there_was(tmp_path, finished, monkeypatch):
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    recipe = recipe_at(finished, tmp_path / "run")
    for name in ("write_record", "keep_generations"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"pretrain.adopt.{name}", lambda *more: (_ for _ in ()).throw(KeyboardInterrupt))
            adopt(recipe, "model", finished / "run" / "model")
        assert all(item.finished for item in identity.plan(recipe))
    adopt(recipe, "model", finished / "run" / "model")
    assert [item.finished for item in identity.plan(recipe)] == [True, True, True, False]


def test_the_wrong_stage_or_folder_is_named(tmp_path, finished):
    from pretrain.cli import app

    recipe = recipe_at(finished, tmp_path / "run")
    with pytest.raises(
        PretrainError, match=r"no stage 'mode' \(did you mean 'model'\?\); accepted: corpus, tokenizer, model"
    ):
        adopt(recipe, "mode", tmp_path)
    with pytest.raises(
        PretrainError, match="'evaluate' is of kind evaluate, which leaves nothing for others; accepted"
    ):
        adopt(recipe, "evaluate", tmp_path)
    with pytest.raises(PretrainError, match="nowhere is no folder; accepted: a checkpoint made elsewhere"):
        adopt(recipe, "model", tmp_path / "nowhere")
    for name, what in (("model", "no checkpoint at"), ("corpus", "is not a corpus"), ("tokenizer", "is no tokenizer")):
        with pytest.raises(PretrainError, match=what):
            adopt(recipe, name, finished / "text")
    command = ["adopt", str(finished / "small.yaml"), "tokenizer", str(finished / "run" / "tokenizer"), "--link"]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "run")])
    assert result.exit_code == 0 and result.output.startswith("[tokenizer] tokenizer linked from ")


# For real: the package, copied and edited


@pytest.mark.processes
def test_a_comment_retrains_nothing_and_other_arithmetic_never_passes_in_silence(tmp_path, finished):
    shutil.copytree(PACKAGE, tmp_path / "pretrain", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    loop = tmp_path / "pretrain" / "training" / "loop.py"
    helper = tmp_path / "pretrain" / "objectives" / "_masking.py"
    command = [sys.executable, "-m", "pretrain", "run", str(finished / "small.yaml"), "--output", str(tmp_path / "run")]

    def run(*more):
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [*command, *more], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        )
        return [line for line in done.stderr.splitlines() if line.startswith("[")]

    helper.write_text(helper.read_text() + "\nUNUSED = 1\n")
    text = loop.read_text()
    loop.write_text(text.replace("def train(", "# A comment.\ndef train(", 1).replace('"""', '"""\nMore words. ', 1))
    before = os.readlink(tmp_path / "run" / "model")
    assert run() == [f"[{name}] already done" for name in ("corpus", "tokenizer", "model", "evaluate")]
    assert "settings.clip" in text
    loop.write_text(text.replace("settings.clip", "0.5 * settings.clip"))
    other = "[model] made with other code: pretrain/training/loop.py changed; going on with what is there (--refresh model runs it again)"
    assert run() == ["[corpus] already done", "[tokenizer] already done", other, "[evaluate] already done"]
    assert os.readlink(tmp_path / "run" / "model") == before
    said = run("--refresh", "model")
    assert (
        said[:3] == ["[corpus] already done", "[tokenizer] already done", "[model] train"]
        and "[evaluate] evaluate" in said
    )
    assert os.readlink(tmp_path / "run" / "model") != before
