"""Code that a checkpoint brings runs where its user says `trust_remote_code`, is that which a notice names, and nowhere else."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import warnings

import custom_model
import pytest
import torch
import transformers
import yaml
from custom_model import copied, give_tokenizer, ran
from typer.testing import CliRunner

import pretrain
from pretrain import engine
from pretrain.cli import app
from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError, PretrainWarning, Terminated
from pretrain.core.folders import SUMS
from pretrain.core.foreign import code as codes
from pretrain.core.foreign.code import brought, consent, consenting
from pretrain.core.method import method_class
from pretrain.core.models.families import blocks, family, in_table, linears
from pretrain.core.processors import load_processor
from pretrain.corpus.store import write_corpus
from pretrain.corpus.tokenizers import load_tokenizer, train_tokenizer
from pretrain.identity import plan, why
from pretrain.recipe import load
from pretrain.surgery import Inputs
from pretrain.surgery.adapters.lora import LoRA

IDS = torch.tensor([[1, 5, 9, 11, 40, 2]])
FILES = ("configuration_tiny.py", "mixing_tiny.py", "modeling_tiny.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint of its own code, and the corpus `corpus` beside it."""
    folder = tmp_path_factory.mktemp("made")
    texts = [f"document {number} of words, and of more words than {number * number} " * 12 for number in range(40)]
    write_corpus(({"id": str(n), "domain": "words", "text": t} for n, t in enumerate(texts)), folder / "corpus",
                 validation=0.2, test=0.2, near_duplicates=None)  # fmt: skip
    custom_model.write(folder / "model", train_tokenizer(texts, algorithm="bytes"))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """The checkpoint with code that has never run."""
    return copied(made / "model", tmp_path / "model")


@pytest.fixture
def run(made, tmp_path):
    """`run(stage, stage)` runs a recipe of these and gives what was said; `check=True` only reads it."""

    def make(*stages, check=False, **more):
        path = tmp_path / "recipe.yaml"
        known = {"corpus": str(made / "corpus")}
        rows = [(known if row["stage"] in ("train", "evaluate") else {}) | row for row in stages]
        path.write_text(yaml.safe_dump({"stages": rows, "output": str(tmp_path / "out")}, sort_keys=False))
        lines = []
        if check:
            return load(path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.run(path, report=False, say=lines.append, **more)
        return lines + [str(each.message) for each in caught if issubclass(each.category, PretrainWarning)]

    return make


def train(**fields):
    return {"stage": "train", "name": "model", "length": 32, "batch_rows": 2, "budget": {"steps": 2}} | fields


def opened(folder, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pretrain.load(folder, trust_remote_code=True, **more)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.promise(
    "Trust",
    "Code that a checkpoint brings (`auto_map`) runs only where its user says so for that reference: `trust_remote_code` of a stage, `--trust-remote-code`, `pretrain.load(…, trust_remote_code=True)`. Without, a kind that `transformers` knows itself is opened with its classes, any other is refused with the files and the field to set, before anything runs.",
)
def test_without_consent_nothing_of_it_runs_and_the_field_is_named(folder, run):
    give_tokenizer(folder)
    named = r"configuration_tiny\.py, modeling_tiny\.py, tokenization_tiny\.py, which is run only with trust_remote_code: true"
    with pytest.raises(PretrainError, match=named):
        pretrain.load(folder)
    for load_one in (load_processor, load_tokenizer):
        with pytest.raises(PretrainError, match=r"names code, tokenization_tiny\.py, which is run only with trust_rem"):
            load_one(folder)
    for stage in (
        train(init=str(folder)),
        {"stage": "evaluate", "checkpoint": str(folder)},
        {"stage": "decode", "checkpoint": str(folder), "prompts": ["a"]},
        {"stage": "surgery", "checkpoint": str(folder), "surgeries": ["lora"]},
    ):
        with pytest.raises(PretrainError, match=rf"recipe.yaml:\d+: \w+\.(init|checkpoint): {folder}: .*{named}"):
            run(stage, check=True)
    assert not ran(folder)


@pytest.mark.parametrize("arguments", [
    ("generate", "{0}", "--prompt", "a"), ("evaluate", "{0}", "--data", "{1}"),
    ("predict", "{0}", "{1}"), ("export", "{0}", "--to", "gguf", "--output", "{0}-gguf"), ("export", "{0}", "--to", "peft", "--output", "{0}-out"),
])  # fmt: skip
def test_commands_run_it_with_their_option_alone(folder, tmp_path, arguments):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"words of document {number}"}) + "\n" for number in range(3)))
    command = [each.format(folder, data) for each in arguments]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, PretrainError) and not ran(folder), done
    assert "--trust-remote-code of a command" in str(done.exception)
    with pytest.warns(PretrainWarning, match=f"trust_remote_code: code of {folder} is run: configuration_tiny.py"):
        done = CliRunner().invoke(app, [*command, "--trust-remote-code"])
    assert ran(folder)
    end = next((words for word, words in ENDS.items() if word in arguments), None)
    if end is not None:
        assert isinstance(done.exception, PretrainError) and end in str(done.exception), done
    else:
        assert done.exit_code == 0 and done.output, done


ENDS = {  # what is no matter of trust
    "predict": "predicts no labels or answers", "peft": "holds no adapter in peft's format",
    "gguf": "made of code that its checkpoint brings; accepted: onnx, peft",
}  # fmt: skip


@pytest.mark.promise(
    "Trust",
    "Before such code runs one notice says which files it is, with their sizes and SHA-256. What runs is the bytes that were read for it: they are imported from memory, and other files of the folder are not.",
)
def test_a_notice_says_which_files_run_and_no_other_does(folder):
    with pytest.warns(PretrainWarning, match="trust_remote_code") as caught:
        model, _ = pretrain.load(folder, trust_remote_code=True)
    assert len(caught) == 1 and ran(folder)
    notice = str(caught[0].message)
    for name in FILES:
        data = (folder / name).read_bytes()
        assert f"{name} ({len(data):,} bytes, SHA-256 {hashlib.sha256(data).hexdigest()})" in notice
    assert "convert.py" not in notice and notice.count("SHA-256") == len(FILES)
    assert not list(folder.rglob("__pycache__")), "nothing is written beside it"
    assert set(brought(model).files) == set(FILES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, _ = pretrain.load(folder, trust_remote_code=True)  # said once
    assert type(again) is type(model) and torch.equal(logits(again), logits(model))


@pytest.mark.promise(
    "Trust",
    "What a stage writes of such a model holds its code and its `auto_map`, opens with `trust_remote_code=True` in `transformers`, and here with consent again: a stage that reads what an earlier one of the recipe has made of it says so itself.",
)
def test_what_is_written_of_it_holds_its_code(folder, tmp_path, monkeypatch):
    model, tokenizer = opened(folder)
    checkpoint.save(model, tokenizer, tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == set(FILES)
    assert set(FILES) <= set(json.loads((tmp_path / "again" / SUMS).read_text())["sha256"])
    with pytest.raises(PretrainError, match="trust_remote_code"):
        pretrain.load(tmp_path / "again")
    ours, _ = opened(tmp_path / "again")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "modules"), *sys.path])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits(theirs), logits(model)) and torch.equal(logits(ours), logits(model))
    (tmp_path / "again" / "mixing_tiny.py").write_text("raise SystemExit\n")
    with pytest.raises(PretrainError, match=r"mixing_tiny\.py is damaged or was replaced"):
        opened(tmp_path / "again")


def test_it_trains_is_adapted_measured_continued_and_exported(folder, run, tmp_path):
    trust = {"trust_remote_code": True}
    chain = [
        train(init=str(folder), **trust),
        {"stage": "surgery", "name": "adapted", "checkpoint": "model", "surgeries": [{"method": "lora", "rank": 2}], **trust},
        train(name="tuned", init="adapted", **trust),
        {"stage": "export", "checkpoint": "tuned", "to": "peft", **trust},
        {"stage": "surgery", "name": "merged", "checkpoint": "tuned", "surgeries": ["merge_adapters"], **trust},
        {"stage": "surgery", "name": "small", "checkpoint": "merged", "surgeries": [{"method": "palettise"}], **trust},
        {"stage": "evaluate", "checkpoint": "merged", "evaluations": ["held_out"], "max_documents": 4, **trust},
        {"stage": "decode", "checkpoint": "merged", "prompts": ["words"], "max_new_tokens": 4, **trust},
    ]  # fmt: skip
    for index in range(1, len(chain)):  # consent does not go from stage to stage
        some = [row for row in chain[:index]] + [{k: v for k, v in chain[index].items() if k != "trust_remote_code"}]
        with pytest.raises(PretrainError, match=r"it brings the code of .*, which is run only with trust_remote_code"):
            run(*some, check=True)
    run(*chain)
    out = tmp_path / "out"
    assert ran(folder) and (out / "export" / "export" / "adapter_model.safetensors").exists()
    record = json.loads((out / "model" / "stage.json").read_text())
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    assert record["identity"]["code"] == {"init": digests}
    assert checkpoint.lineage(out / "merged" / "checkpoint")["stages"][0]["name"] == "model"
    assert checkpoint.lineage(out / "model" / "checkpoint")["made_by"]["code"] == {"init": digests}
    merged, _ = opened(out / "merged")
    assert type(merged).__name__ == "TinyForCausalLM" and not checkpoint.surgery_of(merged)
    before, _ = opened(folder)
    assert not torch.equal(logits(merged), logits(before)), "it was trained"


def test_from_python_it_is_measured_trained_and_continued(folder, made):
    model, tokenizer = opened(folder)
    texts = [f"document {number} of words, and of more words than {number} " * 10 for number in range(12)]
    before = pretrain.evaluate(model, tokenizer, texts)["metrics"]["bits_per_byte"]
    ended = pretrain.train(model, tokenizer, texts, budget={"steps": 40}, length=32, batch_rows=4)
    assert pretrain.evaluate(ended.model, tokenizer, texts)["metrics"]["bits_per_byte"] < before
    assert isinstance(pretrain.generate(ended.model, tokenizer, "words", max_new_tokens=3, temperature=0), str)


@pytest.mark.promise("Trust", "Code that a checkpoint brings (`auto_map`) runs only where its user says so")
def test_consent_for_one_lets_no_other_run(folder, made, run, tmp_path):
    other = copied(made / "model", tmp_path / "other")
    with consenting({folder: consent(folder)}), pytest.raises(PretrainError, match=f"{other}.*trust_remote_code"):
        checkpoint.load(other)
    with pytest.raises(PretrainError, match="trust_remote_code"):
        checkpoint.load(folder)  # whose consent has ended
    distil = {"method": "distillation", "teacher": str(other)}
    both = train(init=str(folder), objective=distil)
    with pytest.raises(PretrainError, match=rf"model\.objective\.teacher: {other}: .*trust_remote_code"):
        run(both | {"trust_remote_code": ["init"]}, check=True)
    with pytest.raises(
        PretrainError, match=r"trust_remote_code: true: accepted: a list of those that may be: init, objective.teacher"
    ):
        run(both | {"trust_remote_code": True}, check=True)
    with pytest.raises(PretrainError, match="trust_remote_code: 'teacher': accepted: a list of .*objective.teacher"):
        run(both | {"trust_remote_code": ["teacher"]}, check=True)
    assert not ran(folder) and not ran(other)
    run(both | {"trust_remote_code": ["init", "objective.teacher"]})
    assert ran(folder) and ran(other)
    record = json.loads((tmp_path / "out" / "model" / "stage.json").read_text())
    assert set(record["identity"]["code"]) == {"init", "objective.teacher"}


@pytest.mark.promise(
    "Trust",
    "Consent is to what the files hold: their SHA-256 are part of the stage's address and stand in its record and lineage. Where one changes the stage runs again, which is said with its name, and where one changes during a run the stage is refused.",
)
def test_changed_code_is_noticed(folder, run):
    stage = train(init=str(folder), trust_remote_code=True)
    run(stage)
    first = plan(run(stage, check=True))[0]
    assert first.finished and any("already done" in line for line in run(stage))
    path = folder / "mixing_tiny.py"
    path.write_text(path.read_text() + "\nCHANGED = True\n")
    second = plan(run(stage, check=True))[0]
    assert second.address != first.address and "code of init changed: mixing_tiny.py" in why(second)
    lines = run(stage)
    assert any(re.search(r"warning: code of init changed: mixing_tiny\.py since train-\w+ was made", x) for x in lines)
    assert any("trust_remote_code: code of" in line for line in lines), "other code has a notice of its own"
    with consenting({folder: consent(folder)}):
        path.write_text(path.read_text() + "\nCHANGED = 2\n")
        with pytest.raises(PretrainError, match="its code is not as it was when it was consented to"):
            checkpoint.load(folder)


def test_addresses_of_what_brings_no_code_are_as_they_were(run, tmp_path, tiny):
    tokenizer = train_tokenizer(["some text"] * 3, algorithm="bytes")
    checkpoint.save(tiny(vocab_size=len(tokenizer)), tokenizer, tmp_path / "plain")
    stage = train(init=str(tmp_path / "plain"))
    plain, trusted = (plan(run(each, check=True))[0] for each in (stage, stage | {"trust_remote_code": True}))
    assert plain.address == trusted.address and "code" not in trusted.reads


def test_a_tokenizer_of_code_of_its_own(folder, made, run, tmp_path):
    give_tokenizer(folder)
    facts = json.loads((made / "model" / "tokenizer_config.json").read_text())
    _, tokenizer = opened(folder)
    assert tokenizer.shout("ab") == tokenizer("AB", add_special_tokens=False)["input_ids"]
    with consenting({folder: consent(folder)}):
        assert type(load_tokenizer(folder)) is type(load_processor(folder)) is type(tokenizer)
    new = {
        "family": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    stage = train(tokenizer=str(folder), model=new)
    with pytest.raises(PretrainError, match="trust_remote_code"):
        run(stage)
    run(stage | {"trust_remote_code": True})
    written = tmp_path / "out" / "model" / "checkpoint"
    assert (written / "tokenization_tiny.py").exists()
    with pytest.raises(PretrainError, match=r"names code, tokenization_tiny\.py"):
        pretrain.load(written)
    model, again = opened(written)
    assert type(model) is transformers.LlamaForCausalLM and again.shout("ab") == tokenizer.shout("ab")
    assert "auto_map" not in json.loads((written / "config.json").read_text())
    facts["auto_map"] = {"AutoTokenizer": ["tokenization_tiny.TinyTokenizer", None]}  # of a kind that is known
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    assert not hasattr(load_tokenizer(folder), "shout")


WRONG = {
    "another repository": ({"AutoConfig": "org/other--configuration_tiny.TinyConfig"}, {}, "config.json: auto_map 'org/other--configuration_tiny.TinyConfig': code of another repository is never fetched or run"),
    "no file": ({"AutoConfig": "elsewhere.TinyConfig"}, {}, r"elsewhere\.py, which its auto_map names, is not there, and code is never fetched"),
    "a way out": ({"AutoConfig": "../x.TinyConfig"}, {}, r"auto_map '../x.TinyConfig': accepted: MODULE.CLASS"),
    "no Python": (custom_model.MAP, {"mixing_tiny.py": "def ("}, r"mixing_tiny\.py: .*; accepted: a file of Python"),
    "too large": (custom_model.MAP, {"mixing_tiny.py": "#" * (5 << 20)}, r"mixing_tiny\.py is too large; accepted: a file of at most 4 MiB"),
    "no class": (custom_model.MAP | {"AutoConfig": "configuration_tiny.Other"}, {}, r"configuration_tiny\.py has no class 'Other'"),
    "a package that is not here": (custom_model.MAP, {"mixing_tiny.py": "import no_such_package"}, "its code in modeling_tiny.py: .*no_such_package"),
    "an end of the program": (custom_model.MAP, {"mixing_tiny.py": "raise SystemExit(0)"}, "its code in modeling_tiny.py: .*it ends the program"),
    "an import of nothing": (custom_model.MAP, {"mixing_tiny.py": "from .nothing import x"}, r"its code in modeling_tiny\.py: .*nothing"),
    "no model": (custom_model.MAP, {"modeling_tiny.py": "class TinyForCausalLM: pass"}, r"architectures \['TinyForCausalLM'\]: accepted: a class of its code"),
    "a kernel": (custom_model.MAP, {"generation_config.json": '{"attn_implementation": "org/kernel"}'}, "kernels of the hub are never fetched or run"),
    "a pickle": (custom_model.MAP, {"pytorch_model.bin": "x", "model.safetensors": None}, "holds pickled weights .*, which are never read"),
}  # fmt: skip


@pytest.mark.promise(
    "Trust",
    "Nor does consent let code be fetched, of another repository be named, pickles be read, or kernels of the hub be used; what is wrong with the code is one line.",
)
@pytest.mark.parametrize("what", WRONG)
def test_with_consent_what_is_wrong_is_one_line(folder, what):
    table, files, message = WRONG[what]
    facts = json.loads((folder / "config.json").read_text()) | {"auto_map": table}
    (folder / "config.json").write_text(json.dumps(facts))
    for name, text in files.items():
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            (folder / name).write_text(text)
    with pytest.raises(PretrainError, match=message) as caught:
        opened(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_a_signal_while_code_is_imported_is_no_mistake_of_the_code(folder):
    (folder / "mixing_tiny.py").write_text("from pretrain.core.errors import Terminated\nraise Terminated(143)\n")
    with pytest.raises(Terminated):
        opened(folder)


def test_a_recipe_is_refused_for_code_that_cannot_be_run(folder, run):
    (folder / "modeling_tiny.py").unlink()
    with pytest.raises(PretrainError, match=r"recipe\.yaml:\d+: model\.init: .*modeling_tiny\.py.* is not there"):
        run(train(init=str(folder), trust_remote_code=True), check=True)


def test_what_its_code_raises_is_one_line_that_names_the_stage(folder, run):
    path = folder / "modeling_tiny.py"
    path.write_text(path.read_text().replace("x = self.embed(input_ids)", "raise AttributeError('a b c')"))
    with pytest.raises(PretrainError, match="stage 'model': .*AttributeError"):
        run(train(init=str(folder), trust_remote_code=True))


def test_code_in_folders_is_followed(folder):
    (folder / "parts").mkdir()
    (folder / "mixing_tiny.py").rename(folder / "parts" / "mixing.py")
    (folder / "parts" / "more.py").write_text("from ..configuration_tiny import TinyConfig\n")
    (folder / "mixing_tiny.py").write_text("from .parts.mixing import TinyAttention\nfrom .parts import more\n")
    model, tokenizer = opened(folder)
    names = {"parts/mixing.py", "parts/more.py", *FILES}
    assert set(brought(model).files) == names
    checkpoint.save(model, tokenizer, folder.with_name("again"))
    assert {
        p.relative_to(folder.with_name("again")).as_posix() for p in folder.with_name("again").rglob("*.py")
    } == names
    assert torch.equal(logits(opened(folder.with_name("again"))[0]), logits(model))


def test_two_files_of_one_name_are_not_mixed(folder, made, tmp_path):
    other = copied(made / "model", tmp_path / "other")
    for place in (folder, other):
        give_tokenizer(place)
    model, _ = opened(folder)
    with pytest.raises(PretrainError, match=r"configuration_tiny\.py of .* is not that of the model beside it"):
        checkpoint.save(model, opened(other)[1], tmp_path / "mixed")


@pytest.mark.promise(
    "Trust",
    "No family is told of a model of such code, whatever type it names: what asks the model itself works on it, and what must know its blocks is refused in one line.",
)
@pytest.mark.parametrize("kind", ["tiny_of_its_own", "llama"])
def test_no_family_describes_it(folder, kind):
    for name, field in (
        ("configuration_tiny.py", f'model_type = "{kind}"'),
        ("config.json", f'"model_type": "{kind}"'),
    ):
        text = (folder / name).read_text()
        (folder / name).write_text(re.sub(r'"?model_type"? ?[=:] "tiny_of_its_own"', field, text))
    model, tokenizer = opened(folder)
    assert model.config.model_type == kind and type(model).__name__ == "TinyForCausalLM"
    assert not in_table(model) and family(model).causal and family(model).name != kind
    with pytest.raises(
        PretrainError, match=f"model type '{kind}' is made by code of its checkpoint, whose blocks nobody"
    ):
        blocks(model)
    assert len(linears(model)) == 6
    before = logits(model)
    for name in ("g_stack", "relu2", "spike_no_more", "gptq"):
        with pytest.raises(PretrainError) as caught:
            method_class(name)()(model, Inputs(tokenizer))
        assert len(str(caught.value).splitlines()) == 1
    assert torch.equal(logits(LoRA(rank=2)(model)), before)
    checkpoint.save(model, tokenizer, folder.with_name("adapted"))
    with pytest.raises(PretrainError, match="trust_remote_code"):
        pretrain.load(folder.with_name("adapted"))
    assert torch.equal(logits(opened(folder.with_name("adapted"))[0]), before)


def test_consent_reaches_what_a_stage_has_left_and_no_further(folder, tmp_path):
    model, tokenizer = opened(folder)
    stage = tmp_path / "stage"
    checkpoint.save(model, tokenizer, stage / "checkpoint")
    checkpoint.save(model, tokenizer, stage / "other" / "checkpoint")
    with consenting({stage: consent(stage)}):
        assert codes.consented(stage / "checkpoint") is not None
        assert codes.consented(stage / "other" / "checkpoint") is None
    assert codes.consented(stage / "checkpoint") is None
