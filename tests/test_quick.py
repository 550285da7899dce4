"""What needs no model answers without torch and at once; `generate` imports no more than it must."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processor import libraries, python

from pretrain import recipe as recipes
from pretrain.core import checkpoint, hardware
from pretrain.core.quick import machine
from pretrain.identity import plan

ROOT = Path(__file__).parent.parent
SHIPPED = [*sorted((ROOT / "recipes").rglob("*.yaml")), *sorted((ROOT / "claims" / "bases").glob("*.yaml"))]
LARGE = ("torch", "transformers", "datasets", "pyarrow", "pandas", "scipy", "sklearn", "peft")


def command(*arguments, before="", **more):
    """Run a command; its output, the large libraries that it imported, the seconds of a processor."""
    code = f"""
        import atexit, sys
        atexit.register(lambda: print("IMPORTED", *[name for name in {LARGE} if name in sys.modules], file=sys.stderr))
        {before}
        sys.argv = ["pretrain", *{list(map(str, arguments))!r}]
        from pretrain.cli import app
        app()
    """
    done, seconds = python(code, **more)
    return done, done.stderr.rpartition("IMPORTED")[2].split(), seconds


LIGHT = {
    "help": (["--help"], "Usage"),
    "methods": (["methods"], "causal_lm"),
    "show": (["methods", "show", "gptq"], "group_size"),
    "papers": (["papers", "masked"], "DrBERT"),
    "claims": (["claim", "list", "--folder", str(ROOT / "claims")], "lion"),
    "new": (["new", "mine", "--starter"], "mine.yaml"),
    "corpus": (["corpus", str(ROOT / "recipes")], "characters"),
    "unknown method": (["methods", "show", "loar"], "did you mean 'lora'"),
    "field": (["run", "R", "--set", "model.batch_rowz=3"], "did you mean 'batch_rows'"),
    "method's field": (["run", "R", "--set", "model.optimizer.lrr=3"], "did you mean 'lr'"),
    "method's value": (["run", "R", "--set", "model.optimizer.lr=fast"], "accepted: a finite number"),
    "model's field": (["run", "R", "--set", "model.model.hidden_sise=3"], "did you mean 'hidden_size'"),
    "family": (["run", "R", "--set", "model.model.family=lama"], "did you mean 'llama'"),
    "task": (["run", "R", "--set", "model.task=causel"], "did you mean 'causal'"),
    "reference": (["run", "R", "--set", "model.tokenizer=tokeniser"], "did you mean 'tokenizer'"),
    "held method": (["run", "R", "--set", "model.objective={method: deft, objective: causal_ml}"], "causal_lm"),
    "generate": (["generate", "nowhere", "--method", "token_recyclin"], "did you mean 'token_recycling'"),
    "evaluate": (["evaluate", "nowhere", "--data", "x", "--evaluation", "held_oud"], "did you mean 'held_out'"),
}


@pytest.mark.parametrize("arguments, answer", LIGHT.values(), ids=LIGHT)
def test_what_needs_no_model_answers_at_once_and_without_torch(arguments, answer, tmp_path):
    arguments = [str(ROOT / "recipes" / "quickstart.yaml") if word == "R" else word for word in arguments]
    done, imported, seconds = command(*arguments, cwd=tmp_path)
    assert answer in done.stdout + done.stderr and imported == []
    assert seconds < 8 * libraries()  # `claim list`, the longest, takes 2.8 to 3.2 times


@pytest.mark.parametrize("name", ["quickstart", "frugal", "compress"])
def test_a_plan_and_its_reasons_are_told_at_once_and_without_torch(name, tmp_path):
    arguments = ["run", ROOT / "recipes" / f"{name}.yaml", "--output", tmp_path / "run", "--dry-run", "--why"]
    done, imported, seconds = command(*arguments)
    assert done.returncode == 0 and "never run" in done.stdout and imported == [], done.stderr
    assert seconds < 8 * libraries() + 1  # 5 to 6 times; up to a second of it is a look at the sources, on any machine


@pytest.mark.processes
def test_stages_have_the_same_address_and_code_with_torch_and_without(tmp_path):
    """Over all recipes here: outlines change nothing of what makes a stage's address."""
    theirs = {str(path): told(path) for path in SHIPPED}  # which makes the processors too
    probe = f"""
        import json, sys
        from pretrain import recipe as recipes
        from pretrain.identity import plan
        told = {{}}
        for path in {list(theirs)!r}:
            recipe = recipes.load(path)
            assert recipe.outlined, path
            told[path] = [[item.stage.name, item.address, item.config["methods"], item.code().as_json()] for item in plan(recipe)]
            assert "torch" not in sys.modules and "transformers" not in sys.modules, path
        print(json.dumps(told))
    """
    done, _ = python(probe)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(theirs))


def told(path):
    recipe = recipes.load(path)
    assert not recipe.outlined
    return [[item.stage.name, item.address, item.config["methods"], item.code().as_json()] for item in plan(recipe)]


def test_a_run_has_the_methods_own_classes(tmp_path, stories):
    """A recipe that was checked without torch is checked again before its first stage."""
    (tmp_path / "a.txt").write_text("\n\n".join(story["text"] for story in stories[:20]))
    (tmp_path / "r.yaml").write_text(
        "stages:\n- {stage: data, sources: [a.txt], validation: 0.2, operations: [deduplicate]}\n"
    )
    probe = """
        from pretrain import recipe as recipes
        from pretrain.core.method import method_class
        recipe = recipes.load("r.yaml")
        whole = recipes.whole(recipe)
        kinds = [type(made.stages[0].operations[0]) for made in (recipe, whole)]
        cls = method_class("deduplicate")
        print(kinds[0] is not cls, kinds[1] is cls, whole.outlined, whole.output == recipe.output)
    """
    done, _ = python(probe, cwd=tmp_path)
    assert done.stdout.split() == ["True", "True", "False", "True"], done.stderr


def test_a_finished_run_is_told_at_once_and_its_report_is_made_only_where_it_would_change(tmp_path, stories):
    (tmp_path / "a.txt").write_text("\n\n".join(story["text"] for story in stories[:20]))
    (tmp_path / "r.yaml").write_text("stages:\n- {stage: data, sources: [a.txt], validation: 0.2, test: 0.1}\n")
    report = tmp_path / "runs" / "r" / "report.html"

    def again(*more):
        done, imported, _ = command("run", "r.yaml", *more, cwd=tmp_path)
        assert done.returncode == 0 and "report: runs/r/report.html" in done.stdout, done.stderr
        return imported, report.read_text(), report.stat().st_mtime_ns

    imported, first, _ = again()
    assert "torch" in imported
    report.write_text("as it was")
    assert again()[:2] == ([], "as it was")
    _, other, _ = again("--set", "data.test=0.2")
    assert other not in ("as it was", first)
    assert again()[:2] == ([], first)  # finished, but the report showed the other
    report.unlink()
    assert again()[:2] == ([], first)


def test_compare_refuses_too_small_a_budget_before_torch(tmp_path):
    size = "family: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2"
    for name, rows in (("a", 4), ("b", 8)):
        (tmp_path / f"{name}.yaml").write_text(f"""
            stages:
            - {{stage: data, name: corpus, sources: [{{files: ., suffixes: [.txt]}}]}}
            - {{stage: tokenizer, name: words, corpus: corpus, vocab_size: 300}}
            - {{stage: train, name: first, corpus: corpus, tokenizer: words, model: {{{size}}}, budget: {{steps: 9_000}}}}
            - {{stage: train, name: last, corpus: corpus, init: first, batch_rows: {rows}, budget: {{steps: 9}}}}
        """)
    (tmp_path / "text.txt").write_text("words and words " * 400)
    done, imported, _ = command("compare", "a.yaml", "b.yaml", "--budget", "flops=1e9", cwd=tmp_path)
    assert done.returncode == 1 and "the stages before 'last' spend all 1 G FLOPs" in done.stderr
    assert "torch" not in imported and "transformers" not in imported


def test_generate_imports_no_more_than_it_must(tiny, prepared, tmp_path):
    """It takes less of a processor, the model and its answer included, than to import a model's class plainly."""
    from pretrain.corpus.tokenizers import load_tokenizer

    checkpoint.save(tiny(vocab_size=512, max_position_embeddings=128), load_tokenizer(prepared / "tokenizer"), tmp_path)
    for _ in range(2):
        done, imported, ours = command("generate", tmp_path, "--prompt", "def ", "--max-new-tokens", 8)
        _, plain = python("from transformers import LlamaForCausalLM")
        if ours < plain:
            break
    assert done.returncode == 0 and done.stdout.startswith("def "), done.stderr
    assert not {"datasets", "pyarrow", "pandas", "sklearn", "peft"} & {*imported}
    assert ours < plain


@pytest.fixture(scope="module")
def folders(tiny, prepared, tmp_path_factory):
    """A language model, a classifier of texts and a table of two labelled texts."""
    from transformers import LlamaForSequenceClassification

    from pretrain.corpus.tokenizers import load_tokenizer

    home, tokenizer = tmp_path_factory.mktemp("folders"), load_tokenizer(prepared / "tokenizer")
    model = tiny(vocab_size=512, max_position_embeddings=128)
    checkpoint.save(model, tokenizer, home / "words")
    model.config.update({"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}, "pad_token_id": 0})
    checkpoint.save(LlamaForSequenceClassification(model.config), tokenizer, home / "labels")
    (home / "table.csv").write_text("text,label\nimport os,yes\nreturn None,no\n")
    return home


ANSWERS = {  # and what they need besides
    "predict": (["predict", "labels", "table.csv"], set()),
    "evaluate words": (["evaluate", "words", "--data", "table.csv"], {"pyarrow"}),
    "evaluate labels": (["evaluate", "labels", "--data", "table.csv"], {"pyarrow", "pandas", "sklearn"}),
}


@pytest.mark.parametrize("arguments, needed", ANSWERS.values(), ids=ANSWERS)
def test_answers_first_say_what_they_open_and_import_no_more_than_they_must(arguments, needed, folders):
    finder = "type('Finder', (), {'find_spec': lambda name, *_: name == 'torch' and print('TORCH', file=sys.stderr) or None})"
    done, imported, _ = command(*arguments, before=f"sys.meta_path.insert(0, {finder})", cwd=folders)
    assert done.returncode == 0, done.stderr
    assert {*imported} <= {"torch", "transformers", "scipy"} | needed
    assert done.stderr.startswith(f"opening {arguments[1]} …\nTORCH")


def test_the_collector_passes_over_what_imports_have_made():
    probe = """
        import gc
        from pretrain.core.quick.imports import uncollected
        try:
            with uncollected():
                import pydantic
                assert not gc.isenabled()
                raise ImportError
        except ImportError:
            print(gc.isenabled(), gc.get_freeze_count() > 10_000)
    """
    assert python(probe)[0].stdout.split() == ["True", "True"]


def test_a_measured_rate_is_remembered_for_plans(tmp_path, monkeypatch):
    import torch

    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path))
    hardware.matrix_rate.cache_clear()
    assert machine.remembered_rate("cpu") is None
    assert machine.likely_rate() == machine.USUAL["cpu"] * machine.cores()
    rate = hardware.matrix_rate(torch.device("cpu"))
    assert machine.likely_rate() == rate
    assert machine.remembered_rate("cpu") == rate and machine.remembered_rate("cuda") is None
    machine.remember_rate("cpu", rate / 2)  # on a busy machine
    assert machine.remembered_rate("cpu") == rate
    machine.remember_rate("cpu", 2 * rate)  # by a run on the quiet one
    hardware.matrix_rate.cache_clear()
    assert hardware.matrix_rate(torch.device("cpu")) == 2 * rate
    hardware.matrix_rate.cache_clear()
    (tmp_path / "rates.json").write_text("{")
    assert machine.remembered_rate("cpu") is None
