"""Adapters of `peft` in their own folders: opened as checkpoints, and written with the name of the model they go on."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch
from closeness import assert_same_model
from examples import logits, trained
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from test_hub import Hub, fake  # noqa: F401  # a fixture

from pretrain import engine
from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.exchange.convert import convert
from pretrain.core.exchange.exporting import export
from pretrain.core.folders import newest_checkpoint
from pretrain.core.quick import hub
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.identity import state_of
from pretrain.interactive import load
from pretrain.recipe import check

QUERIES = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def base(tiny, tmp_path):
    """`base(family)`: a model in a folder, as its users have it, with a tokenizer."""

    def made(family="llama", **fields):
        model = tiny(family, vocab_size=320, **fields)
        model.save_pretrained(tmp_path / "base")
        train_tokenizer(["a text of words"] * 5, vocab_size=300).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return made


def adapter(folder, config, out, cls=None, **fields):
    """What `peft` saves of an adapter that was trained on a folder's model; `fields` of its configuration as written."""
    model = (cls or type(checkpoint.load(folder)[0])).from_pretrained(folder)
    trained(get_peft_model(model, config)).save_pretrained(out)
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return out


KINDS = {
    "lora": ("llama", lambda q: LoraConfig(r=3, target_modules=q, task_type="CAUSAL_LM")),
    "ranks": ("llama", lambda q: LoraConfig(r=3, target_modules=q, rank_pattern={"up_proj": 5}, alpha_pattern={"q_proj": 7}, use_rslora=True)),
    "dora": ("llama", lambda q: LoraConfig(r=2, target_modules="all-linear", use_dora=True)),
    "biases": ("gpt2", lambda q: LoraConfig(r=2, target_modules=q, fan_in_fan_out=True, bias="all")),
    "a head": ("llama", lambda q: LoraConfig(r=2, target_modules=q, modules_to_save=["lm_head", "norm"])),
    "masked": ("bert", lambda q: LoraConfig(r=2, target_modules=q)),
    "loha": ("llama", lambda q: LoHaConfig(r=2, target_modules=q)),
    "ia3": ("bert", lambda q: IA3Config(target_modules=q, feedforward_modules=[])),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapters_folder_is_a_checkpoint_that_answers_as_peft_does(kind, base, tmp_path):
    family, config = KINDS[kind]
    folder = adapter(base(family), config(QUERIES[family]), tmp_path / "adapter")
    ours, tokenizer = load(folder)
    plain = type(ours).from_pretrained(tmp_path / "base").eval()
    untouched = logits(plain)
    theirs = logits(PeftModel.from_pretrained(plain, folder).eval())
    assert not torch.allclose(theirs, untouched, atol=1e-6)
    assert_same_model(logits(ours), theirs, ours)
    assert tokenizer("a text")["input_ids"]
    export(folder, tmp_path / "again", "peft")  # with the model's name, and what was trained whole
    plain = type(ours).from_pretrained(tmp_path / "base").eval()
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert again["base_model_name_or_path"] == str(tmp_path / "base")
    assert_same_model(logits(PeftModel.from_pretrained(plain, tmp_path / "again").eval()), theirs, ours)


@pytest.mark.parametrize(("family", "task", "kind"), [
    ("llama", "SEQ_CLS", "ForSequenceClassification"), ("bert", "SEQ_CLS", "ForSequenceClassification"),
    ("bert", "TOKEN_CLS", "ForTokenClassification"),
])  # fmt: skip
def test_a_classifiers_adapter_brings_its_last_layer_to_a_model_without_one(family, task, kind, base, tmp_path):
    import transformers

    cls = getattr(transformers, {"llama": "Llama", "bert": "Bert"}[family] + kind)
    saved = ["pooler"] if (family, task) == ("bert", "SEQ_CLS") else None  # of which a masked model has none
    folder = base(family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_labels": 3, "pad_token_id": 0}))
    config = LoraConfig(r=2, target_modules=QUERIES[family], task_type=task, modules_to_save=saved)
    made = adapter(folder, config, tmp_path / "adapter", cls)
    theirs = PeftModel.from_pretrained(cls.from_pretrained(folder), made).eval()
    ours, _ = checkpoint.load(made)
    assert type(ours) is cls and ours.config.num_labels == 3
    assert_same_model(logits(ours), logits(theirs), ours)


def test_of_a_bfloat16_model_the_adapter_stays_in_float32(base, tmp_path):
    folder = base()
    model, _ = checkpoint.load(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    made = adapter(folder, LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "adapter")
    ours, _ = checkpoint.load(made)
    wide = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    assert_same_model(logits(ours), logits(PeftModel.from_pretrained(wide, made).eval()), ours)
    small = sum(path.stat().st_size for path in newest_checkpoint(made).glob("*.safetensors"))
    assert small < 0.9 * sum(p.numel() * 4 for p in ours.parameters())


def test_training_goes_on_from_an_adapter_and_what_is_exported_names_the_first_model(base, stories, tmp_path):
    folder = adapter(base(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), tmp_path / "a")
    corpus = tmp_path / "texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": each["text"]}) + "\n" for each in stories[:30]))
    stages = [
        {"stage": "data", "name": "corpus", "sources": [{"files": str(corpus)}]},
        {"stage": "train", "name": "on", "corpus": "corpus", "init": str(folder), "length": 16, "batch_rows": 2, "budget": {"steps": 2}},
        {"stage": "export", "name": "out", "checkpoint": "on", "to": "peft"},
        {"stage": "evaluate", "name": "measured", "checkpoint": "out", "corpus": "corpus", "evaluations": ["held_out"]},
        {"stage": "surgery", "name": "merged", "checkpoint": str(folder), "surgeries": ["merge_adapters"]},
    ]  # fmt: skip
    run = engine.run(check({"stages": stages}, output=tmp_path / "run"), say=engine.silent)
    before, after = checkpoint.load(folder)[0], checkpoint.load(run.folder / "on" / "checkpoint")[0]
    moved = {n for (n, p), (_, q) in zip(before.named_parameters(), after.named_parameters(), strict=True) if not torch.equal(p, q)}  # fmt: skip
    assert moved == {n for n, _ in before.named_parameters() if "lora_" in n or n == "lm_head.weight"}
    out = run.folder / "out"
    assert json.loads((out / "export" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    assert_same_model(logits(load(out)[0]), logits(after), after)  # the stage's folder stands for what it has exported
    merged, _ = checkpoint.load(run.folder / "merged" / "checkpoint")
    assert_same_model(logits(merged), logits(before), merged)


def test_an_adapter_is_put_into_another_model_without_its_own(base, tmp_path):
    folder = adapter(base(), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "a", base_model_name_or_path=None)
    surgeries = [{"method": "peft_adapter", "folder": str(folder)}]
    stages = [{"stage": "surgery", "name": "s", "checkpoint": str(tmp_path / "base"), "surgeries": surgeries}]
    run = engine.run(check({"stages": stages}, output=tmp_path / "run"), say=engine.silent)
    ours, _ = checkpoint.load(run.folder / "s" / "checkpoint")
    plain = type(ours).from_pretrained(tmp_path / "base")
    assert_same_model(logits(ours), logits(PeftModel.from_pretrained(plain, folder).eval()), ours)
    assert not (tmp_path / "cache" / "peft").exists()


def test_an_adapter_of_ours_names_the_checkpoint_that_it_was_put_into(base, tmp_path):
    """Through further stages; none where another surgery came between, since such a model lies nowhere."""
    folder = str(base())
    stages = [
        {"stage": "surgery", "name": "first", "checkpoint": folder, "surgeries": [{"method": "lora", "rank": 2}]},
        {"stage": "surgery", "name": "dy", "checkpoint": folder, "surgeries": [{"method": "dylora", "rank": 2}]},
        {"stage": "surgery", "name": "cut", "checkpoint": "dy", "surgeries": [{"method": "dylora_truncate", "rank": 1}]},
        {"stage": "surgery", "name": "late", "checkpoint": folder, "surgeries": ["g_stack", "lora"]},
    ]  # fmt: skip
    run = engine.run(check({"stages": stages}, output=tmp_path / "run"), say=engine.silent)
    for name in ("first", "cut"):
        export(run.folder / name, tmp_path / name, "peft")
        facts = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert facts["base_model_name_or_path"] == folder, name
        ours = checkpoint.load(run.folder / name / "checkpoint")[0]
        assert_same_model(logits(checkpoint.load(tmp_path / name)[0]), logits(ours), ours)
    export(run.folder / "late", tmp_path / "late", "peft")
    assert json.loads((tmp_path / "late" / "adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_an_adapter_on_the_hub_finds_its_model_there(fake, tmp_path):  # noqa: F811
    small = fake.folder
    (small / "checksums.json").unlink()
    adapter_folder = adapter(small, LoraConfig(r=2, target_modules="all-linear"), tmp_path / "a")
    path = adapter_folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "org/small"}))
    model, tokenizer = checkpoint.load(adapter_folder)
    assert fake.asked == 1 and tokenizer is not None
    theirs = PeftModel.from_pretrained(type(model).from_pretrained(small), adapter_folder).eval()
    assert_same_model(logits(model), logits(theirs), model)
    export(adapter_folder, tmp_path / "out", "peft")
    facts = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (facts["base_model_name_or_path"], facts["revision"]) == ("org/small", "a" * 40)
    assert checkpoint.load(tmp_path / "out") and fake.asked == 2  # of that revision once more, and then never
    checkpoint.load(tmp_path / "out")
    assert fake.asked == 2


def test_an_adapter_that_is_named_as_on_the_hub_is_fetched_with_its_model(fake, tmp_path, monkeypatch):  # noqa: F811
    small, made = fake.folder, tmp_path / "a"
    (small / "checksums.json").unlink()
    adapter(small, LoraConfig(r=2, target_modules="all-linear"), made)
    path = made / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "org/small"}))
    theirs = PeftModel.from_pretrained(type(checkpoint.load(small)[0]).from_pretrained(small), made).eval()
    fetch = fake.snapshot_download

    def either(repo, **given):
        fake.folder = made if repo == "gpt2" else small
        fetch(repo, **given)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", either)
    fake.folder = made
    hub.pin("gpt2")  # the adapter
    fake.folder = small
    stages = [{"stage": "surgery", "name": "merged", "checkpoint": "gpt2", "surgeries": ["merge_adapters"]}]
    run = engine.run(check({"stages": stages}, output=tmp_path / "run"), say=engine.silent)
    ours, _ = checkpoint.load(run.folder / "merged" / "checkpoint")
    assert_same_model(logits(ours), logits(theirs), ours)
    again = engine.run(check({"stages": stages}, output=tmp_path / "run"), say=(lines := []).append)
    assert again.folder == run.folder and any("done already" in line or "already" in line for line in lines), lines


def test_a_changed_adapter_is_another_checkpoint_and_the_same_one_is_made_once(base, tmp_path, cache):
    folder = adapter(base(), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "a")
    first = newest_checkpoint(folder)
    assert newest_checkpoint(folder) == first and state_of(first).startswith("peft ")
    shutil.rmtree(folder)
    torch.manual_seed(5)
    adapter(tmp_path / "base", LoraConfig(r=3, target_modules=["q_proj"]), folder)
    assert newest_checkpoint(folder) != first and state_of(newest_checkpoint(folder)) != state_of(first)
    assert convert(folder, tmp_path / "converted")["made_by"]["format"] == "peft"


LORA = {"r": 2, "target_modules": ["q_proj"]}
REFUSED = {
    "no model": (LORA, {"base_model_name_or_path": None}, "base_model_name_or_path None: accepted: the folder of the model"),
    "a model that is gone": (LORA, {"base_model_name_or_path": "/nowhere/model"}, "'/nowhere/model': there is no such folder; accepted: the model"),
    "itself": (LORA, {"base_model_name_or_path": "SELF"}, "is an adapter itself; accepted: a whole model"),
    "another type": (LORA, {"peft_type": "PREFIX_TUNING"}, "peft_type PREFIX_TUNING: accepted: types that change layers, as LORA, or .*merge_and_unload"),
    "an unknown type": (LORA, {"peft_type": "LORB"}, "peft_type LORB: accepted: types that change layers"),
    "another task": (LORA, {"task_type": "QUESTION_ANS"}, "task_type QUESTION_ANS; accepted: CAUSAL_LM, .*merge_and_unload"),
    "other shapes": (LORA, {"r": 4}, "weights do not fit, first: .*lora_A.weight is .2, 32. in the file and .4, 32. in the model"),
    "shared weights": (LORA | {"modules_to_save": ["lm_head"]}, {}, "modules_to_save lm_head: model.embed_tokens shares its weights; accepted: .*merge_and_unload"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_opened_is_one_line_and_leaves_nothing(case, base, tmp_path, cache):
    fields, written, message = REFUSED[case]
    folder = base(tie_word_embeddings=case == "shared weights")
    made = adapter(folder, LoraConfig(**fields), tmp_path / "a", **written)
    if written.get("base_model_name_or_path") == "SELF":
        path = made / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(made)}))
    with pytest.raises(PretrainError, match=message) as caught:
        checkpoint.load(made)
    assert len(str(caught.value).splitlines()) == 1
    assert not [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.promise("Trust", "No pickle is read")
def test_a_pickled_adapter_is_never_read(base, tmp_path):
    made = adapter(base(), LoraConfig(**LORA), tmp_path / "a")
    (made / "adapter_model.safetensors").rename(made / "adapter_model.bin")
    with pytest.raises(
        PretrainError, match=r"missing file adapter_model.safetensors \(a pickled adapter_model.bin is n"
    ):
        checkpoint.load(made)


def test_a_prompt_that_peft_has_learnt_is_refused(base, tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    made = adapter(base(), config, tmp_path / "a")
    with pytest.raises(PretrainError, match="peft_type PROMPT_TUNING: accepted: types that change layers"):
        newest_checkpoint(made)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
        LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    ],
    ids=["head", "embeddings", "tokens"],
)
def test_adapters_on_weights_that_others_share_are_refused_in_a_line(base, tmp_path, config):
    folder = adapter(base(tie_word_embeddings=True), config, tmp_path / "adapter")
    with pytest.raises(PretrainError, match="shares its weights with .*; accepted: the folder that peft's merge_and"):
        load(folder)


def test_modules_to_save_that_are_no_names_are_refused(base, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    folder = adapter(base(), config, tmp_path / "adapter", modules_to_save=5)
    with pytest.raises(PretrainError, match="modules_to_save 5: accepted: a list of names"):
        load(folder)
