"""The surgery stage: what surgeries that calibrate are given, and what it says of the model before and after."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.quick.quantities import short
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.stages import Job
from pretrain.stages.surgery import Surgery as Stage
from pretrain.surgery import Surgery
from pretrain.surgery.compression.gptq import GPTQ
from pretrain.surgery.growth.g_stack import GStack
from pretrain.surgery.vocabulary.trim_vocabulary import TrimVocabulary


@dataclass(frozen=True)
class Spy(Surgery):
    """Keeps what it is given."""

    given: list = field(default_factory=list)

    def __call__(self, model, inputs=None):
        self.given.append(inputs)
        return model


@pytest.fixture(scope="module")
def source(tiny, prepared, tmp_path_factory):
    """A checkpoint of the prepared tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = load_tokenizer(prepared / "tokenizer")
    checkpoint.save(tiny(vocab_size=len(tokenizer)), tokenizer, folder, {"flops": 7})
    return folder


@pytest.fixture
def run(source, prepared, tmp_path):
    """`run(surgery, seed=1, …)`: the stage's result and what it said."""

    def run(surgery, *, at=source, seed=0, corpus=True, **fields):
        said = []
        inputs = {"checkpoint": at} | ({"corpus": prepared} if corpus else {})
        stage = Stage(checkpoint="start", surgeries=[surgery], **({"corpus": "text"} if corpus else {}), **fields)
        return stage.run(Job(tmp_path / "stage", inputs, seed=seed, say=said.append)), said

    return run


def test_a_trimmed_vocabulary_keeps_every_token_of_the_corpus_however_few_rows_calibrate(run, prepared, tmp_path):
    spy = Spy()
    run(spy, calibration_rows=1, length=16)
    tokenizer, count_V = load_tokenizer(prepared / "tokenizer"), spy.given[0].counts()
    ids = tokenizer([document["text"] for document in Corpus(prepared / "corpus").documents("train")])["input_ids"]
    used = torch.bincount(torch.tensor([i for row in ids for i in row]), minlength=len(count_V))
    text_V = torch.tensor([i for i in range(len(count_V)) if i not in tokenizer.all_special_ids])
    assert torch.equal(count_V[text_V], used[text_V]) and spy.given[0].batches[0]["input_ids"].numel() == 16
    result, _ = run(TrimVocabulary(), calibration_rows=1, length=16)
    assert result["metrics"]["trim_vocabulary/text_kept"] == 1
    _, trimmed = checkpoint.load(tmp_path / "stage" / "checkpoint")
    assert len(trimmed) >= int((used > 0).sum())


def test_calibration_rows_are_packed_training_documents_in_the_checkpoints_tokens(run, prepared):
    spy, again, other = Spy(), Spy(), Spy()
    run(spy, calibration_rows=11, length=64)
    run(again, calibration_rows=11, length=64)
    run(other, calibration_rows=11, length=64, seed=1)
    batches = spy.given[0].batches
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(8, 64), (3, 64)]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(batches, again.given[0].batches, strict=True) for k in a)
    assert not torch.equal(batches[0]["input_ids"], other.given[0].batches[0]["input_ids"])
    tokenizer = load_tokenizer(prepared / "tokenizer")
    known = {
        split: "\n".join(d["text"] for d in Corpus(prepared / "corpus").documents(split)) for split in ("train", "test")
    }
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "position_ids", "domain_B"}
        for ids, documents, positions in zip(
            *(batch[k] for k in ("input_ids", "attention_mask", "position_ids")), strict=True
        ):
            for number in range(1, int(documents.max()) + 1):
                piece = documents == number
                assert positions[piece].tolist() == list(range(int(piece.sum())))
                text = tokenizer.decode(ids[piece], skip_special_tokens=True).strip("\ufffd")
                assert text in known["train"]
            assert (ids[documents == 0] == tokenizer.pad_token_id).all()


def test_a_corpus_with_fewer_rows_gives_all_it_has(run):
    spy = Spy()
    _, said = run(spy, calibration_rows=10_000, length=256)
    rows = sum(len(batch["input_ids"]) for batch in spy.given[0].batches)
    assert 0 < rows < 10_000 and said[0] == f"calibration on {rows} rows: the corpus has no more"
    assert len(said) == 2


def test_quantising_says_how_many_bytes_it_saves_and_meters_its_flops(run, tmp_path):
    result, said = run(GPTQ(group_size=16), calibration_rows=4, length=32)
    numbers = result["metrics"]
    assert numbers["bytes"] < numbers["bytes_before"] and numbers["parameters"] == numbers["parameters_before"]
    model, tokenizer = checkpoint.load(tmp_path / "stage/checkpoint")
    assert tokenizer is not None and checkpoint.surgery_of(model)[0]["method"] == "gptq"
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert numbers["bytes"] == stored
    assert result["flops"] > 0 and checkpoint.lineage(tmp_path / "stage/checkpoint")["flops"] == 7 + result["flops"]
    assert said[-1].endswith(f"{short(numbers['bytes_before'], 'B')} -> {short(numbers['bytes'], 'B')}")


@pytest.mark.parametrize("packed", [True, False])
def test_quantising_says_what_share_of_the_weights_it_holds_and_what_the_files_take(run, source, tmp_path, packed):
    result, said = run(GPTQ(group_size=16, pack=packed, solver="rtn"), corpus=False)
    numbers = result["metrics"]
    if not packed:  # dense weights on a grid save nothing
        assert len(said) == 1 and "quantised_share" not in numbers
        return
    model, _ = checkpoint.load(source)
    inner = sum(p.numel() for name, p in model.named_parameters() if "layers." in name and p.ndim == 2)
    assert numbers["quantised_share"] == pytest.approx(inner / model.num_parameters())
    sizes = [
        sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        for folder in (tmp_path / "stage/checkpoint", source)
    ]
    assert [numbers["disk_bytes"], numbers["disk_bytes_before"]] == sizes
    assert f"4 bits for {inner:,} weights, {inner / model.num_parameters():.0%} of all" in said[0]
    assert f"{1 - sizes[0] / sizes[1]:.0%} less than before" in said[0]


def test_without_a_corpus_surgeries_are_as_before_and_those_that_need_one_say_so(run):
    spy = Spy()
    run(spy, corpus=False)
    assert list(spy.given[0].batches) == []
    result, _ = run(GStack(2), corpus=False)
    assert result["metrics"]["parameters"] > result["metrics"]["parameters_before"]
    with pytest.raises(
        PretrainError, match="gptq: it needs text to calibrate on: accepted: a surgery stage with `corpus`"
    ):
        run(GPTQ(), corpus=False)


def test_a_recipe_may_name_a_data_stage_as_the_corpus(source, tmp_path):
    from pretrain.recipe import check

    stages = [
        {"stage": "data", "name": "text", "sources": ["stdlib"]},
        {
            "stage": "surgery", "checkpoint": str(source), "corpus": "text",
            "surgeries": [{"method": "gptq", "solver": "rtn"}],
        },
    ]  # fmt: skip
    stage = check({"name": "one", "stages": stages}, None, output=tmp_path).stages[1]
    assert stage.references() == {"checkpoint": str(source), "corpus": "text"}
    assert (stage.calibration_rows, stage.length) == (128, 512)
    assert stage.config()["surgeries"][0]["method"] == "gptq" and stage.config()["surgeries"][0]["solver"] == "rtn"


def test_checkpoints_that_cannot_be_calibrated_are_refused(tiny, run, tmp_path):
    checkpoint.save(tiny(), None, tmp_path / "bare")
    with pytest.raises(PretrainError, match="start has no tokenizer; accepted, with a corpus: one with tokenizer.json"):
        run(Spy(), at=tmp_path / "bare")


def test_rows_longer_than_the_positions_are_refused(tiny, run, prepared, tmp_path):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    checkpoint.save(tiny("gpt2", vocab_size=len(tokenizer)), tokenizer, tmp_path / "gpt2")
    with pytest.raises(PretrainError, match="length 65: accepted: 2 to 64, the positions of the model"):
        run(Spy(), at=tmp_path / "gpt2", length=65)
    run(Spy(), at=tmp_path / "gpt2", length=64)
