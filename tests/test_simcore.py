"""Coresets: rounds against rounds written out, the stop, documents of the target's kind, any modality, going on."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Image
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import new_model
from pretrain.core.processors import new_processor
from pretrain.corpus.store import Corpus, write_corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.data._work import working
from pretrain.data.selection import simcore
from pretrain.data.selection.simcore import SimCore, centres, taken, unit


def rounds(similarity_NK, wanted, stop):
    """Of each round the documents that it takes, by its definition: each centre the nearest that none has before."""
    before, value_of = [], []
    while sum(map(len, before)) < min(wanted, len(similarity_NK)):
        known = set().union(*before)
        free = [n for n in range(len(similarity_NK)) if n not in known]
        best = [max(free, key=lambda n: similarity_NK[n, k]) for k in range(similarity_NK.shape[1])]
        value_of.append(float(np.mean([similarity_NK[n, k] for k, n in enumerate(best)])))
        if stop and len(value_of) >= stop[0] and value_of[-1] < stop[1] * value_of[stop[0] - 1]:
            break
        before.append(set(best))
    return before


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_rounds_take_what_their_definition_says(data):
    n, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    similarity_NK = rng.permutation(n * k).reshape(n, k).astype(np.float32) / (n * k)
    wanted, stop = data.draw(st.integers(1, 50)), data.draw(st.none() | st.tuples(st.integers(1, 4), st.just(0.8)))
    expected = rounds(similarity_NK, wanted, stop)
    found = taken(similarity_NK, wanted, stop, seed=0)
    whole = expected if sum(map(len, expected)) <= wanted else expected[:-1]
    assert set().union(*whole) <= set(found.tolist()) <= set().union(*expected)
    assert len(found) == min(wanted, sum(map(len, expected))) and (np.diff(found) > 0).all()


def test_sampling_stops_where_documents_resemble_the_target_less():
    similarity_NK = np.array([[0.9], [0.89], [0.88], [0.2], [0.1]], np.float32)
    assert taken(similarity_NK, 5, (1, 0.95), 0).tolist() == [0, 1, 2]
    assert taken(similarity_NK, 5, (4, 0.95), 0).tolist() == [0, 1, 2, 3]  # the fourth round is what others go by
    assert taken(similarity_NK, 2, (1, 0.95), 0).tolist() == [0, 1]
    assert taken(similarity_NK, 9, None, 0).tolist() == [0, 1, 2, 3, 4]


def test_few_documents_are_centres_themselves():
    feature_TE = unit(np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32))
    assert centres(feature_TE, 7, 0) is feature_TE
    means_KE = centres(feature_TE, 3, 0)
    assert means_KE.shape == (3, 4) and np.allclose(np.linalg.norm(means_KE, axis=1), 1, atol=1e-6)


@pytest.fixture(scope="module")
def places(tiny, prepared, tmp_path_factory):
    """A model whose features are its embeddings' means, a target of one kind of words, an open set of both."""
    folder = tmp_path_factory.mktemp("simcore")
    checkpoint.save(tiny(vocab_size=512), load_tokenizer(prepared / "tokenizer"), folder / "model")
    rng = np.random.default_rng(0)
    text = {
        "kind": lambda: " ".join(rng.choice(["the", "cat", "dog", "and", "was", "little"], 12)),
        "other": lambda: " ".join(rng.choice(["{}", "[0]", "==", "%%", "#!", "::"], 12)),
    }
    rows = [{"text": text["kind"](), "domain": "t", "id": str(n)} for n in range(40)]
    write_corpus(iter(rows), folder / "target", validation=0.1, test=0.1, near_duplicates=None)
    kinds = ["kind", "other", "other"] * 20
    open_set = [{"text": text[kind](), "domain": kind, "number": n} for n, kind in enumerate(kinds)]
    return {"model": str(folder / "model"), "target": str(folder / "target")}, Dataset.from_list(open_set)


def test_documents_of_the_targets_kind_are_taken_in_their_order(places):
    fields, open_set = places
    kept = SimCore(**fields, layer=0, share=0.3, clusters=4)(open_set)
    assert kept["domain"][:] == ["kind"] * 18 and kept["number"][:] == sorted(kept["number"][:])


def test_the_stop_leaves_out_what_is_unlike_the_target(places):
    fields, open_set = places
    kept = SimCore(**fields, layer=0, clusters=4, patience=2, threshold=0.9)(open_set)
    assert set(kept["domain"]) == {"kind"} and 10 <= len(kept) <= 20


def test_documents_without_text_are_never_taken(places):
    fields, _ = places
    kept = SimCore(**fields, share=1.0)(Dataset.from_list([{"text": "the cat"}, {"text": ""}, {"text": "a dog"}]))
    assert kept["text"][:] == ["the cat", "a dog"]


def test_most_is_a_multiple_of_the_targets_documents(places):
    fields, open_set = places
    target = len(list(Corpus(Path(fields["target"])).documents("train")))
    kept = SimCore(**fields, layer=0, threshold=1e-9, most=10 / target)(open_set)
    assert len(kept) == 10


def test_a_sampling_that_was_stopped_reads_nothing_twice(places, tmp_path, monkeypatch):
    fields, open_set = places
    monkeypatch.setattr(simcore, "SHARD", 16)
    method, reads = SimCore(**fields, layer=0, share=0.2), []
    plain = simcore.Reader._read

    def breaking(self, documents):
        reads.append(len(documents))
        if len(reads) == 4:
            raise KeyboardInterrupt
        return plain(self, documents)

    monkeypatch.setattr(simcore.Reader, "_read", breaking)
    with working(tmp_path) as desk, pytest.raises(KeyboardInterrupt):
        method(open_set)
    with working(tmp_path) as desk:
        kept = method(open_set)
    assert desk.flops > 0 and len(reads) == 4 + 1 + (2 + 4 + 1 - 4)
    assert kept["number"][:] == method(open_set)["number"][:]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A model of images, a target of dark ones, and an open set of both."""
    folder = tmp_path_factory.mktemp("pictures")
    fields = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = new_model("vit", fields | {"num_attention_heads": 2}, task="AutoModelForImageClassification")
    processor = new_processor("ViTImageProcessor", {"size": {"height": 16, "width": 16}})
    checkpoint.save(model, processor, folder / "model")
    shades = {"dark": range(40), "bright": range(200, 240)}
    rows = [{"image": picture(shade), "domain": "t", "id": str(shade)} for shade in shades["dark"]]
    write_corpus(iter(rows), folder / "target", validation=0.1, test=0.1, near_duplicates=None)
    mixed = [{"image": picture(shade + 1, 2), "domain": kind} for kind in shades for shade in list(shades[kind])[::2]]
    fields = {"model": str(folder / "model"), "target": str(folder / "target")}
    return fields, Dataset.from_list(mixed).cast_column("image", Image())


def picture(shade, edge=1):
    held = io.BytesIO()
    values = np.full((16, 16), shade, np.uint8)
    values[:edge] += 3
    PIL.Image.fromarray(values).save(held, "PNG")
    return {"bytes": held.getvalue(), "path": None}


def test_images_are_taken_by_what_a_model_of_images_makes_of_them(pictures):
    fields, open_set = pictures
    kept = SimCore(**fields, share=0.25, layer=0, clusters=3)(open_set)
    assert kept["domain"][:] == ["dark"] * 10


def test_a_target_without_anything_to_read_is_refused(pictures, places):
    (_, images), (fields, _) = pictures, places
    with pytest.raises(PretrainError, match="no training document has anything to read; accepted: at least one"):
        SimCore(pictures[0]["model"], fields["target"])(images)
