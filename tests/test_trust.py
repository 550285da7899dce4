"""Nothing that is read runs as code, is unpickled or makes anything be fetched: by what the package calls, and by trial."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from package_code import calls, nodes, texts
from package_code import words as words_of

from pretrain.core import checkpoint
from pretrain.core.checkpoint import load
from pretrain.core.errors import PretrainError
from pretrain.core.folders import SUMS
from pretrain.core.processors import image_of, load_processor
from pretrain.core.quick.trust import offline
from pretrain.core.samples import image_sample
from pretrain.corpus.shards import Shards
from pretrain.corpus.sources import Files, Images, read
from pretrain.corpus.tokenizers import load_tokenizer, train_tokenizer
from pretrain.evaluation.tasks.harness import Harness

WORKERS = "data/_workers.py"  # hands functions of its own to processes of its own


@pytest.mark.promise(
    "Trust",
    "No pickle is read but by `pretrain convert`, which takes tensors from it and refuses the rest: nothing else of the package calls what would, but processes that measure documents, of the function that the one which began them hands over; pickles beside a checkpoint, in the place of any of its files, among a corpus's tokens or among its documents are passed over or are an error.",
)
def test_no_file_of_the_package_reads_a_pickle_but_that_of_conversions():
    for module, reader in (("foreign.pickles", "core/exchange/convert.py"), ("exchange.convert", "cli_exchange.py")):
        naming = [name for name, text in texts().items() if module.rpartition(".")[2] in text]
        assert [name for name in naming if f"pretrain.core.{module}" in ast.unparse(nodes(name)[0])] == [reader]
    forbidden = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas"}
    for name in texts():
        for node in nodes(name):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            allowed = {"pickle"} if name == WORKERS else set()
            assert not {module.partition(".")[0] for module in modules} & (forbidden - allowed), name
            assert "distributed.checkpoint" not in " ".join(modules), name  # whose metadata is a pickle
        for call, node in calls(name):
            words = words_of(node)
            assert call not in ("torch.save", "torch.jit.load", "torch.hub.load", "np.fromfile"), name
            assert call != "torch.load" or (name == READER and words["weights_only"] == "True"), name
            assert not call.endswith(("load_state_dict_from_url", "read_pickle", "to_pickle", "_reconstruct")), name
            assert words.get("allow_pickle", "False") == "False" and words.get("weights_only", "True") == "True", name
            if call in ("yaml.load", "yaml.load_all"):
                raise AssertionError(name)
            assert call not in ("yaml.unsafe_load", "yaml.full_load"), name


READER = "core/foreign/pickles.py"  # of what `pretrain convert` is given, and of nothing else

# What opens a folder, in the files that look at it beforehand; `Embedding.from_pretrained` takes a tensor.
OPENERS = {
    "core/checkpoint.py",
    "core/exchange/gguf_in.py",
    "core/processors.py",
    "corpus/tokenizers.py",
    "surgery/architecture/spike_no_more.py",
}
RUNNERS = {
    "exec": {"core/quick/outline.py"},  # of the package's own files, and of a folder that `--methods` names
    "subprocess": {"core/packages.py", "core/sandbox/__init__.py"},
}


@pytest.mark.promise(
    "Trust",
    "What could run code stands in few files, which the test names. Methods of `--methods FOLDER` and installed plug-ins are the user's own code, and run.",
)
def test_what_could_run_code_stands_where_it_is_looked_after():
    for name in texts():
        for call, node in calls(name):
            words = words_of(node)
            if call.endswith("from_pretrained"):
                assert name in OPENERS, f"{name}: {call}"
            assert words.get("trust_remote_code", "False") == "False", name
            assert call not in ("eval", "__import__", "os.system", "os.popen", "runpy.run_path"), f"{name}: {call}"
            assert not call.endswith(("SourceLoader", "spec_from_loader")) or name == "core/foreign/code.py", name
            assert call != "exec" or name in RUNNERS["exec"], name
            assert not call.startswith("subprocess.") or name in RUNNERS["subprocess"], name
            assert call != "Image.open" or "formats" in words, name
    assert "yaml.SafeLoader" in ast.unparse(nodes("core/foreign/yaml.py")[0])


class Bomb:
    """What leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (open, (self.mark, "w"))


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """A checkpoint with its tokenizer, as from elsewhere: without checksums, by which a changed file is refused."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    tokenizer = train_tokenizer(["some text to learn from"] * 3, algorithm="bytes")
    checkpoint.save(tiny(vocab_size=len(tokenizer)), tokenizer, folder)
    for name in (checkpoint.RECORD, SUMS):
        (folder / name).unlink()
    return folder


@pytest.fixture
def folder(plain, tmp_path):
    return Path(shutil.copytree(plain, tmp_path / "model"))


EVENTS: list[str] = []
WATCHED = [False]


def _heard(event, arguments):
    if WATCHED[0] and event.startswith(
        ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "pickle.find")
    ):
        EVENTS.append(f"{event} {arguments}"[:200])
    if WATCHED[0] and event == "exec" and "evil" in str(getattr(arguments[0], "co_filename", "")):
        EVENTS.append(f"{event} {arguments}"[:200])


@pytest.fixture
def watched(monkeypatch):
    """What Python does meanwhile: a connection, a process, an unpickled class, a file of code that is named `evil`."""
    if _heard not in vars(sys).get("pretrain_hooks", []):
        sys.addaudithook(_heard)
        sys.pretrain_hooks = [_heard]
    monkeypatch.setattr(torch, "load", lambda *_, **__: EVENTS.append("torch.load"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # as for one who has not said so
    EVENTS.clear()
    WATCHED[0] = True
    yield EVENTS
    WATCHED[0] = False


def edit(path, **fields):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


def evil(folder, mark):
    """Files of code that leave a mark."""
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "processing_evil", "evil"):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")


CODE = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
NEVER = "which is run only with trust_remote_code: true in the stage"
# File, fields, and what is said of it by what opens the whole checkpoint; None: it opens, and the fields are nothing to it.
ASKS = {
    "code of a model": ("config.json", {"model_type": "evil", "auto_map": CODE}, f"config.json names code, configuration_evil.py, modeling_evil.py, {NEVER}"),
    "code of a known model": ("config.json", {"auto_map": CODE}, None),
    "code of a tokenizer": ("tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}, f"tokenizer_config.json names code, tokenization_evil.py, {NEVER}"),
    "code of a known tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}, None),
    "code elsewhere": ("tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": "evil/repo--tokenization_evil.Evil"}}, NEVER),
    "code of an image processor": ("preprocessor_config.json", {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}, f"names code, evil.py, {NEVER}"),
    "code of a processor": ("processor_config.json", {"processor_class": "Evil", "auto_map": {"AutoProcessor": "processing_evil.Evil"}}, f"names code, processing_evil.py, {NEVER}"),
    "a kernel": ("config.json", {"attn_implementation": "evil/kernel"}, "attn_implementation 'evil/kernel': kernels of the hub are never fetched or run; accepted: sdpa"),
    "a kernel of a version": ("config.json", {"_attn_implementation": "evil/kernel@v1:attention"}, "never fetched or run"),
    "a paged kernel": ("config.json", {"_attn_implementation": "paged|evil/kernel"}, "never fetched or run"),
    "a kernel of a part": ("config.json", {"text_config": {"attn_implementation": {"decoder": "evil/kernel"}}}, "text_config.attn_implementation.decoder 'evil/kernel'"),
    "a kernel of experts": ("config.json", {"_experts_implementation": "evil/moe"}, "never fetched or run"),
    "another model for sound": ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "evil/codec"}}, "audio_tokenizer: no other model is opened"),
    "a table of the hub": ("preprocessor_config.json", {"image_processor_type": "OneFormerImageProcessor", "repo_path": "evil/table", "class_info_file": "x.json"}, "the processor cannot be loaded"),
    "another model below": ("adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "evil/base", "r": 2}, "an adapter's, of another model; accepted: .*peft_adapter"),
    "a backbone": ("config.json", {"backbone": "evil/timm", "use_timm_backbone": True, "use_pretrained_backbone": True}, None),
    "a way to generate": ("generation_config.json", {"custom_generate": "evil/generate"}, None),
    "quantised kernels": ("config.json", {"quantization_config": {"quant_method": "mxfp4"}}, None),
    "other names": ("config.json", {"_name_or_path": "evil/base", "_commit_hash": "0" * 40}, None),
}  # fmt: skip


@pytest.mark.promise(
    "Trust",
    "Kernels of the hub (`attn_implementation: org/name`), a model below an adapter or behind a processor, tables and backbones of the hub are never fetched. What a recipe names on the hub itself is the exception, and the model that an adapter's folder, given as a checkpoint, names: safetensors, JSON and tokenizers' files of it are fetched.",
)
@pytest.mark.parametrize("asked", ASKS)
def test_what_a_checkpoint_asks_for_is_neither_run_nor_fetched(folder, tmp_path, watched, asked):
    name, fields, message = ASKS[asked]
    evil(folder, tmp_path / "mark")
    edit(folder / name, **fields)
    words = []
    for opened in (load, load_processor, load_tokenizer):
        try:
            opened(folder)
        except PretrainError as error:
            words.append(str(error))
    assert watched == [] and not (tmp_path / "mark").exists()
    assert not [module for module in sys.modules if "evil" in module]
    if message is None:
        assert words == []
        model, tokenizer = load(folder)
        checkpoint.save(model, tokenizer, tmp_path / "again")  # and what is written on asks for nothing either
        assert not re.search("auto_map|evil/kernel", (tmp_path / "again" / "config.json").read_text())
        with torch.no_grad():
            model(torch.tensor([[1, 2]]))
    else:
        assert any(re.search(message, line) for line in words), words
        assert all(len(line.splitlines()) == 1 for line in words)


def test_a_name_that_is_no_folder_is_not_asked_of_the_hub(watched):
    with pytest.raises(PretrainError, match="no tokenizer can be loaded from evil/repo"):
        load_tokenizer("evil/repo")
    assert watched == []


def test_the_hub_can_be_asked_again_afterwards(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with offline(), offline():
        assert constants.is_offline_mode()
    assert not constants.is_offline_mode()
    with pytest.raises(ValueError, match="x"), offline():
        raise ValueError("x")
    assert not constants.is_offline_mode()


PICKLES = ("pytorch_model.bin", "model.pt", "adapter_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth",
           "vocab.pkl", "tokenizer.pkl", "tf_model.h5", "flax_model.msgpack", "adapter.pt.bin", "pytorch_model.bin.index.json.bin")  # fmt: skip


@pytest.mark.promise("Trust", "No pickle is read")
@pytest.mark.parametrize("weights", [True, False])
def test_no_pickle_beside_a_checkpoint_is_read(folder, tmp_path, watched, weights):
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    if not weights:
        (folder / "model.safetensors").unlink()
        with pytest.raises(PretrainError, match="pickled weights"):
            load(folder)
    else:
        load(folder)
    load_tokenizer(folder)
    assert watched == [] and not (tmp_path / "mark").exists()


@pytest.mark.promise("Trust", "No pickle is read")
def test_a_pickle_in_the_place_of_any_file_of_a_checkpoint_is_an_error(folder, tmp_path, watched):
    content = pickle.dumps(Bomb(tmp_path / "mark"))
    for path in sorted(folder.iterdir()):
        kept = path.read_bytes()
        path.write_bytes(content)
        try:
            load(folder)
        except PretrainError as error:
            assert path.name in str(error) or "cannot be loaded" in str(error)
        else:
            assert path.name in ("generation_config.json",), path
        path.write_bytes(kept)
    assert watched == [] and not (tmp_path / "mark").exists()
    load(folder)


def pickled_array(mark):
    """What numpy writes of objects: a pickle in an `.npy`."""
    file = io.BytesIO()
    np.save(file, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.promise("Trust", "No pickle is read")
def test_no_pickle_among_a_corpus_tokens_is_read(prepared, tmp_path, watched):
    tokens = Path(shutil.copytree(prepared / "tokens", tmp_path / "tokens"))
    arrays = sorted(tokens.rglob("*.npy"))
    assert arrays
    for path in arrays:
        kept = path.read_bytes()
        path.write_bytes(pickled_array(tmp_path / "mark"))
        with pytest.raises((PretrainError, ValueError)):
            Shards(path.parent)
        path.write_bytes(kept)
    assert watched == [] and not (tmp_path / "mark").exists()


@pytest.mark.promise("Trust", "No pickle is read")
def test_no_pickle_among_a_corpus_documents_is_read(tmp_path, watched):
    home = tmp_path / "documents"
    home.mkdir()
    for name in (
        "a.pkl",
        "b.pickle",
        "c.pt",
        "d.pth",
        "e.joblib",
        "f.npy",
        "g.npz",
        "h.bin",
        "i.txt",
        "j.py",
        "k.json",
    ):
        content = pickled_array(tmp_path / "mark") if "np" in name else pickle.dumps(Bomb(tmp_path / "mark"))
        (home / name).write_bytes(content)
    list(read(Files(files=str(home), on_error="skip")))
    for path in home.iterdir():
        with contextlib.suppress(PretrainError):
            list(read(Files(files=str(path))))
    assert watched == [] and not (tmp_path / "mark").exists()


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
(mark) (w) file closefile
showpage
"""


@pytest.mark.promise("Trust", "An image in PostScript is no image.")
def test_an_image_that_is_a_program_is_no_image(tmp_path, watched):
    for opened in (image_of, image_sample):
        with pytest.raises((PretrainError, OSError)):
            opened({"bytes": EPS, "path": "a.png"})
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(EPS)
    with contextlib.suppress(PretrainError):
        assert list(read(Images(images=str(tmp_path / "images")))) == []
    assert watched == []


@pytest.fixture
def task(tmp_path):
    """A folder of one lm-eval task, with other fields."""

    def make(**fields):
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        (folder / "t.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 3)
        whole = {
            "task": "t", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "t.jsonl"}}, "test_split": "test",
            "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": ["b", "c"], "doc_to_target": 0,
            "metric_list": [{"metric": "acc"}],
        }  # fmt: skip
        (folder / "t.yaml").write_text(json.dumps(whole | fields))
        return str(folder)

    return make


@pytest.mark.promise("Trust", "Templates and metrics of lm-eval's tasks reach nothing outside themselves.")
def test_no_code_of_a_task_is_run(task, tiny, tokenizer, tmp_path, watched):
    pytest.importorskip("lm_eval")
    model, mark = tiny(vocab_size=512, max_position_embeddings=128), tmp_path / "mark"
    assert Harness(folder=task())(model, tokenizer, []).metrics["t_samples"] == 3
    escape = f"{{{{ cycler.__init__.__globals__.os.mkdir({str(mark)!r}) }}}}"
    with pytest.raises(PretrainError, match="unsafe"):
        Harness(folder=task(doc_to_text=escape))(model, tokenizer, [])
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    for metric in ({"metric": str(tmp_path / "evil.py")}, {"metric": "acc", "hf_evaluate": True}):
        with pytest.raises(PretrainError, match="metric .*: accepted: .*acc"):
            Harness(folder=task(metric_list=[metric]))(model, tokenizer, [])
    assert not mark.exists() and not [event for event in watched if "evil" in event]


@pytest.mark.promise("Trust", "Templates of conversations reach nothing outside themselves.")
def test_a_template_of_a_conversation_reaches_nothing(folder, tmp_path):
    mark = tmp_path / "mark"
    edit(
        folder / "tokenizer_config.json", chat_template=f"{{{{ cycler.__init__.__globals__.os.mkdir({str(mark)!r}) }}}}"
    )
    _, tokenizer = load(folder)
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not mark.exists()


def test_code_in_the_folder_where_one_works_is_not_imported(folder, tmp_path, monkeypatch, watched):
    evil(tmp_path, tmp_path / "mark")
    for name in ("sitecustomize", "tokenizers_extra", "llama"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    load(folder)
    assert not (tmp_path / "mark").exists() and watched == []
    assert transformers.__file__ and os.getcwd() == str(tmp_path)
