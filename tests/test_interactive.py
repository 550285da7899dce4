"""`pretrain` from Python, without a recipe; names complete; the notebook runs."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pretrain
from pretrain.core.errors import PretrainWarning
from pretrain.core.files import read_json
from pretrain.core.registry import methods as registered

ROOT = Path(__file__).parent.parent
MODEL = {
    "family": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(stories):
    return [story["text"] for story in stories[:60]]


@pytest.fixture(scope="module")
def trained(texts):
    tokenizer = pretrain.train_tokenizer(texts, vocab_size=400)
    return pretrain.train(
        MODEL,
        tokenizer,
        texts,
        budget={"steps": 30},
        optimizer={"method": "adamw", "lr": 1e-2},
        length=64,
        batch_rows=8,
    )


def test_a_model_is_trained_on_texts_and_lets_nothing_on_the_disk(texts, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    losses = [row["loss"] for row in trained.log if row["event"] == "step"]
    assert len(losses) == 30 and losses[-1] < losses[0] - 1 and trained.spent["steps"] == 30
    assert trained.metrics["loss"] < losses[0] and not trained.model.training
    again = pretrain.train(
        MODEL, trained.tokenizer, texts, budget={"steps": 30}, optimizer=pretrain.methods.AdamW(lr=1e-2), length=64,
        batch_rows=8,
    )  # fmt: skip
    assert again.metrics == trained.metrics  # the same by name and by object, and of the same seed
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_trained_as_a_stage_trains_it(texts, tmp_path):
    """The same loop: the same corpus, tokenizer, fields and seed make the same weights."""
    from pretrain.corpus.store import write_corpus

    documents = ({"text": text, "id": str(number), "domain": "texts"} for number, text in enumerate(texts))
    write_corpus(documents, tmp_path / "corpus", validation=0.1, test=0.0, near_duplicates=None)
    tokenizer = pretrain.train_tokenizer(texts, vocab_size=400)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    stage = {
        "stage": "train", "corpus": str(tmp_path / "corpus"), "tokenizer": str(tmp_path / "tokenizer"), "model": MODEL,
        "length": 32, "batch_rows": 4, "budget": {"steps": 4}, "seed": 3,
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps({"stages": [stage]}))
    run = pretrain.run(tmp_path / "r.yaml", output=tmp_path / "run", say=lambda _: None, report=False)
    ours = pretrain.train(MODEL, tokenizer, texts, budget={"steps": 4}, length=32, batch_rows=4, seed=3)
    theirs, _ = pretrain.load(run.folder)
    for (name, weight), other in zip(ours.model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(weight, other), name
    corpus = pretrain.train(MODEL, tokenizer, tmp_path / "corpus", budget={"steps": 4}, length=32, batch_rows=4, seed=3)
    assert corpus.metrics == ours.metrics


def test_texts_that_a_checkpoint_was_trained_on_are_told(texts, tmp_path):
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(rows)
    recipe = {
        "stages": [
            {"name": "corpus", "stage": "data", "sources": [{"files": str(tmp_path / "texts.jsonl")}]},
            {"name": "tokenizer", "stage": "tokenizer", "corpus": "corpus", "vocab_size": 300},
            {"name": "model", "stage": "train", "corpus": "corpus", "tokenizer": "tokenizer", "model": MODEL,
             "length": 32, "batch_rows": 4, "budget": {"steps": 2}},
        ]
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    run = pretrain.run(tmp_path / "r.yaml", output=tmp_path / "run", say=lambda _: None, report=False)
    new = ["quite another text, of which no line was ever read " * 3] * 2
    with pytest.warns(PretrainWarning, match=r"of 62 documents were in the training data: what is measured"):
        measured = pretrain.evaluate(run.folder, [*texts, *new])
    assert measured["seen"].endswith("says little of new text")
    assert "seen" not in pretrain.evaluate(run.folder, new)


def test_a_classifier_is_trained_on_documents(tiny, trained):
    documents = [{"text": f"{word} {n}", "label": word} for n in range(30) for word in ("yes", "no")]
    model = {
        "family": "bert",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tokenizer = pretrain.train_tokenizer([d["text"] for d in documents], vocab_size=280, mask=True, cls=True)
    made = pretrain.train(
        model, tokenizer, documents, objective="classification", budget={"steps": 40},
        optimizer={"method": "adamw", "lr": 1e-2}, length=16,
    )  # fmt: skip
    assert made.metrics["accuracy"] == 1.0


def test_a_model_with_an_adapter_is_trained_in_place(texts, tiny, trained):
    import copy

    adapted = pretrain.methods.LoRA(rank=2)(copy.deepcopy(trained.model))
    frozen = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    made = pretrain.train(adapted, trained.tokenizer, texts, budget={"steps": 3}, length=64)
    assert frozen and all(torch.equal(dict(made.model.named_parameters())[name], p) for name, p in frozen.items())
    assert made.model is adapted


@pytest.mark.parametrize(
    "more, message",
    [
        ({"budget": {"step": 3}}, "train.budget: unknown field 'step' of budget (did you mean 'steps'?)"),
        ({"budget": {"steps": 3}, "batch_rowz": 3}, "train.batch_rowz: unknown field (did you mean 'batch_rows'?)"),
        ({"budget": {"steps": 3}, "optimizer": "adam"}, "unknown optimiser 'adam' (did you mean 'adamw'?)"),
        ({"budget": {"steps": 3}, "surgeries": ["lora"]}, "pretrain.methods.LoRA()(model)"),
        ({"budget": {"steps": 3}, "data": "a text"}, "accepted: a list of texts"),
        ({"budget": {"steps": 3}, "model": MODEL | {"hidden_sise": 3}}, "did you mean 'hidden_size'"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(texts, trained, more, message):
    given = {"model": trained.model, "tokenizer": trained.tokenizer, "data": texts} | more
    with pytest.raises(pretrain.PretrainError) as error:
        pretrain.train(**given)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_texts_are_measured_as_documents_are(texts, trained):
    ours = pretrain.evaluate(trained.model, trained.tokenizer, texts[:5], length=64)
    theirs = pretrain.methods.HeldOut(length=64)(
        trained.model, trained.tokenizer, [{"text": t, "domain": "texts"} for t in texts[:5]]
    )
    assert ours["metrics"] == theirs.metrics and ours["documents"] == 5
    both = pretrain.evaluate(
        trained.model, trained.tokenizer, texts[:5], [{"method": "held_out", "length": 64}], compressors=True
    )
    assert both["metrics"] == ours["metrics"] and any("xz" in tool for tool in both["compressors"])
    with pytest.raises(pretrain.PretrainError, match="did you mean 'held_out'"):
        pretrain.evaluate(trained.model, trained.tokenizer, texts[:1], ["heldout"])


def test_several_prompts_at_once_are_refused_by_name(trained):
    with pytest.raises(pretrain.PretrainError, match=r"prompt \['a', 'b'\]: accepted: one text; of several"):
        pretrain.generate(trained.model, trained.tokenizer, ["a", "b"])


def test_texts_are_measured_in_windows_as_long_as_those_of_the_checkpoints_training(texts, trained, tmp_path):
    from pretrain.core import checkpoint

    checkpoint.save(trained.model, trained.tokenizer, tmp_path / "c", lineage={"length": 32})
    opened = pretrain.load(tmp_path / "c")
    losses = {
        length: pretrain.evaluate(*opened, texts[:5], length=length)["metrics"]["loss"] for length in (None, 32, 64)
    }
    assert losses[None] == losses[32] != losses[64]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("predict", {"batch_size": 0}, "batch_size 0: accepted: 1 or more"),
        ("predict", {"batch_size": -1}, "batch_size -1: accepted: 1 or more"),
        ("predict", {"batch_size": "8"}, "batch_size '8': accepted: a whole number"),
        ("generate", {"max_new_tokens": 0}, "max_new_tokens 0: accepted: 1 or more"),
        ("generate", {"seed": -1}, "seed -1: accepted: from 0"),
        ("generate", {"temperature": "hot"}, "temperature 'hot': accepted: a finite number"),
        ("generate", {"top_p": 2}, "top_p 2: accepted: from 0 to 1"),
        ("generate", {"stop": (1,)}, "accepted: a list, each a text"),
        ("evaluate", {"length": -1}, "length -1: accepted: 0 or more"),
        ("train", {"budget": {"steps": 1}, "validation": 1}, "validation 1: accepted: from 0 to below 1"),
        ("train", {"budget": {"steps": 1}, "validation": "a"}, "validation 'a': accepted: a finite number"),
        ("train", {"budget": {"steps": 1}, "batch_rows": 0}, "batch_rows: 0: accepted: 1 or more"),
        ("train_tokenizer", {"vocab_size": "a"}, "vocab_size 'a': accepted: a whole number"),
        ("train_tokenizer", {"sentinels": -1}, "sentinels -1: accepted: 0 or more"),
    ],
)
def test_a_number_outside_its_bounds_is_refused_by_its_name(trained, name, given, message):
    opened = {
        "predict": [(trained.model, trained.tokenizer), ["a"]],
        "generate": [trained.model, trained.tokenizer, "a"],
        "evaluate": [trained.model, trained.tokenizer, ["a text"]],
        "train": [trained.model, trained.tokenizer, ["a text"]],
        "train_tokenizer": [["a text"]],
    }
    with pytest.raises(pretrain.PretrainError) as error:
        getattr(pretrain, name)(*opened[name], **given)
    assert message in str(error.value)


def test_a_lone_text_to_stop_at_is_one_and_not_its_letters(trained):
    def written(**given):
        return pretrain.generate(trained.model, trained.tokenizer, "def ", max_new_tokens=24, temperature=0, **given)

    letters = written()[1:3] + "\0"  # which as a whole is never written, as letters are
    assert written(stop=letters) == written()
    assert len(written(stop=tuple(letters))) < len(written())


def test_a_model_writes(trained):
    assert pretrain.generate(trained.model, trained.tokenizer, "def ", max_new_tokens=8, temperature=0) == (
        pretrain.generate(trained.model, trained.tokenizer, "def ", max_new_tokens=8, temperature=0, seed=1)
    )
    assert isinstance(pretrain.generate(trained.model, trained.tokenizer, max_new_tokens=3), str)


def test_what_a_run_has_printed_can_be_loaded(tiny, prepared, tmp_path):
    from pretrain.core import checkpoint
    from pretrain.corpus.tokenizers import load_tokenizer

    (tmp_path / "corpus").mkdir()
    for number, name in enumerate(("first", "last")):
        model = tiny(vocab_size=512, seed=number)
        checkpoint.save(model, load_tokenizer(prepared / "tokenizer"), tmp_path / name / "checkpoint")
    stages = [{"name": name, "stage": "train"} for name in ("corpus", "first", "last", "to come")]
    (tmp_path / "run.json").write_text(json.dumps({"stages": stages}))
    (tmp_path / "report.html").write_text("")
    weight = next(model.parameters())
    for place in (tmp_path, tmp_path / "report.html", tmp_path / "last", str(tmp_path / "last" / "checkpoint")):
        loaded, tokenizer = pretrain.load(place)
        assert torch.equal(next(loaded.parameters()), weight) and tokenizer is not None
    stages.pop(1), stages.pop(1)
    (tmp_path / "run.json").write_text(json.dumps({"stages": stages}))
    with pytest.raises(pretrain.PretrainError, match="no stage of the run .* has written a checkpoint"):
        pretrain.load(tmp_path)


def test_methods_are_found_by_the_names_of_their_classes():
    assert sorted(row.cls for row in registered().values()) == dir(pretrain.methods)
    assert pretrain.methods.LoRA(rank=3).name == "lora" and "2106.09685" in pretrain.methods.LoRA.__doc__
    with pytest.raises(AttributeError, match="did you mean 'LoRA'"):
        pretrain.methods.Lora  # noqa: B018
    with pytest.raises(AttributeError, match="did you mean 'Cosine'"):
        pretrain.methods.Cosin  # noqa: B018


def test_the_stub_gives_editors_and_type_checkers_every_method():
    """Each name leads to the class itself; what is public is there for them too."""
    stub = ast.parse((ROOT / "pretrain" / "methods" / "__init__.pyi").read_text()).body
    named = {(row.cls, row.module) for row in registered().values() if row.ours}
    assert {(node.names[0].asname, node.module) for node in stub} == named
    package = ast.parse((ROOT / "pretrain" / "__init__.py").read_text()).body
    typed = next(node.body for node in package if isinstance(node, ast.If))
    assert {alias.name for node in typed for alias in node.names} == set(pretrain.__all__)
    assert (ROOT / "pretrain" / "py.typed").exists()


def test_to_import_the_package_is_to_import_nothing_large():
    probe = "import sys, pretrain; dir(pretrain), dir(pretrain.methods); print([n for n in ('torch', 'numpy', 'pydantic') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
    assert set(pretrain.__all__) <= set(dir(pretrain))
    for name in pretrain.__all__:
        assert getattr(pretrain, name).__doc__


def executed(path, folder):
    """Run a notebook's cells one after another, as a kernel does; what the last line of each shows."""
    names, shown = {"__name__": "__main__"}, []
    before = Path.cwd()
    os.chdir(folder)
    try:
        for cell in read_json(path)["cells"]:
            if cell["cell_type"] != "code":
                continue
            body = ast.parse("".join(cell["source"])).body
            last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(ast.Module(body, []), str(path), "exec"), names)
                value = eval(compile(ast.Expression(last.value), str(path), "eval"), names) if last else None
            shown.append(printed.getvalue() + ("" if value is None else repr(value)))
    finally:
        os.chdir(before)
    return names, shown


@pytest.mark.processes
def test_the_notebook_of_the_first_afternoon_runs_from_top_to_bottom(tmp_path):
    names, shown = executed(ROOT / "docs" / "first-afternoon.ipynb", tmp_path)
    assert all(shown) and names["adapted"].metrics["loss"] < names["before"]["metrics"]["loss"]
    book = read_json(ROOT / "docs" / "first-afternoon.ipynb")
    assert all(not cell.get("outputs") for cell in book["cells"])  # what a machine has measured is of that machine


def test_a_folder_of_the_name_beside_a_script_does_not_hide_the_package(tmp_path):
    """As the clone does, seen from the folder that it was cloned into."""
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "use.py").write_text("import pretrain; print(pretrain.load.__module__)")
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pretrain.")


def test_a_path_in_place_of_a_model_is_answered_with_how_it_is_opened():
    with pytest.raises(
        pretrain.PretrainError, match=r"model 'runs/mine': accepted: model, tokenizer = pretrain.load\('runs/mine'\)"
    ):
        pretrain.generate("runs/mine", "def f")
    with pytest.raises(pretrain.PretrainError, match=r"model 'runs/mine': accepted: model, tokenizer = pretrain.load"):
        pretrain.generate("runs/mine")


def test_a_model_and_its_tokenizer_may_come_as_one(tiny, prepared):
    from pretrain.corpus.tokenizers import load_tokenizer

    pair = tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer")
    given = {"max_new_tokens": 6, "temperature": 0.0}
    assert pretrain.generate(pair, "def f", **given) == pretrain.generate(*pair, "def f", **given) != ""
    with pytest.raises(
        pretrain.PretrainError, match=r"tokenizer 'def f': accepted: generate\(model, tokenizer, prompt\)"
    ):
        pretrain.generate(pair[0], "def f")
