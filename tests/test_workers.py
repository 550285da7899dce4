"""Operations shared out to processes and to a Ray cluster: the same corpus byte for byte, and errors in one line."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from worker_functions import deadly, lengths, wrong

from pretrain import engine
from pretrain.core.errors import PretrainError
from pretrain.corpus.copies.minhash import copies
from pretrain.data import _mapped, _workers
from pretrain.data._work import working
from pretrain.data._workers import Shard, Workers
from pretrain.data.deduplication import _near
from pretrain.data.deduplication.deduplicate import Deduplicate
from pretrain.identity import plan
from pretrain.recipe import load

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "that",
    "have",
    "with",
    "be",
    "river",
    "sea",
    "valley",
    "people",
    "years",
    "water",
    "house",
    "a@b.org",
    "call",
    "+49",
    "30",
    "1234567",
]
OPERATIONS = [
    {"method": "gopher_quality", "least_words": 5, "tag": True}, {"method": "gopher_repetition"}, "c4_quality",
    "document_statistics", "mask_pii", {"method": "line_deduplication", "least_words": 3},
    {"method": "paragraph_deduplication", "common": 2, "least_words": 3}, "deduplicate",
]  # fmt: skip


def shards(count=12):
    return [Shard([f"{number}" * (number + 1)]) for number in range(count)]


def documents(count, seed=0):
    """Texts of which some are copies, some nearly so, and lines stand in several."""
    rng, texts = random.Random(seed), []
    for number in range(count):
        if texts and number % 5 == 0:
            texts.append(rng.choice(texts))
        elif texts and number % 5 == 1:
            texts.append(f"{rng.choice(texts)} last")
        else:
            lines = (" ".join(rng.choices([*WORDS, str(number)], k=rng.randint(4, 14))) for _ in range(8))
            texts.append(".\n".join(lines) + ".")
    return texts


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    rows = [json.dumps({"text": text, "id": str(number)}) for number, text in enumerate(documents(300))]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    stage = {"stage": "data", "name": "corpus", "sources": [{"files": str(folder / "rows.jsonl")}]}
    made = folder / "recipe.yaml"
    made.write_text(yaml.safe_dump({"stages": [stage | {"operations": OPERATIONS}]}, sort_keys=False))
    return made


def written(folder):
    """The bytes of all files of the corpus, by name."""
    corpus = folder / "corpus" / "corpus"
    return {
        str(path.relative_to(corpus)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(corpus.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def all_shared(monkeypatch):
    """Shards of a few documents, which all are handed over from the first on."""
    monkeypatch.setattr(_mapped, "SHARD", 32)
    monkeypatch.setattr(_workers.Workers.__init__, "__defaults__", (1, "", lambda text: None, -1.0))


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_order_whatever_the_number_of_processes(count):
    with Workers(count, start=-1) as workers:
        made = list(workers.each("lengths", lengths, shards(), 12))
    assert made == [(shard, [len(shard.rows[0])]) for shard in shards()]


def test_what_is_known_is_not_measured_again():
    with Workers(2, start=-1) as workers:
        keyed = [shard._replace(key=str(n)) for n, shard in enumerate(shards())]
        made = [each for _, each in workers.each("wrong", wrong, keyed, 12, lambda key: f"kept {key}")]
    assert made == [f"kept {n}" for n in range(12)]


def test_little_work_and_what_cannot_be_pickled_stay_in_this_process():
    with Workers(2) as workers:
        assert [made for _, made in workers.each("pid", lambda rows: os.getpid(), shards(), 12)] == [os.getpid()] * 12
        list(workers.each("lengths", lengths, shards(), 12))
        assert workers._pool is None


def test_a_worker_that_is_killed_is_one_error_that_names_the_operation():
    with pytest.raises(PretrainError, match="deadly: a worker process was killed") as caught, Workers(2, start=-1) as w:
        list(w.each("deadly", deadly, [*shards(), Shard(["die"])], 13))
    assert "accepted: fewer workers" in str(caught.value)


def test_an_error_in_a_worker_is_the_same_as_here():
    with pytest.raises(PretrainError, match="^here: what is wrong; accepted: nothing$"), Workers(2, start=-1) as w:
        list(w.each("wrong", wrong, shards(), 12))


def test_a_program_without_a_main_guard_may_share_out(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "print('begun')\nfrom pretrain.data._workers import Workers, Shard\n\n"
        "with Workers(2, start=-1) as w: print([m for _, m in w.each('max', max, [Shard(['a', 'b'])] * 3, 6)])\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[:2] == ["begun", "['b', 'b', 'b']"], done.stderr


def test_progress_says_how_much_is_left(monkeypatch):
    monkeypatch.setattr(_workers, "EVERY", 0.0)
    said = []
    with Workers(1, say=said.append) as workers:
        list(workers.each("lengths", lengths, shards(4), 4))
    assert said[0].startswith("lengths: 1 of 4 documents, about ") and said[-1].startswith("lengths: 4 of 4 documents")


@pytest.mark.parametrize("threshold", [None, 0.3, 0.8])
def test_copies_are_those_of_looking_at_all_in_memory(threshold, monkeypatch):
    monkeypatch.setattr(_near, "SORTED", 50)
    monkeypatch.setattr(_near, "SPAN", 64)
    rows = [(text, "ab"[number % 7 == 0]) for number, text in enumerate(documents(400))]
    with _near.Signatures(threshold) as signatures:
        for start in range(0, len(rows), 30):
            signatures.add(*_near.signed(rows[start : start + 30], threshold))
        found = {number: reason for number, reason, *_ in signatures.copies()}
    expected = {number: copy[0] for number, copy in enumerate(copies(rows, threshold)) if copy}
    assert found == expected and len(found) > 50


def test_deduplication_has_the_document_that_is_alike_and_says_how_much():
    texts = [" ".join(f"w{n}" for n in range(60)), "quite another text", " ".join(f"w{n}" for n in range(58))]
    with _near.Signatures(0.5) as signatures:
        signatures.add(*_near.signed([(text, "") for text in texts], 0.5))
        ((number, reason, alike, first),) = signatures.copies()
    assert (number, reason, first) == (2, "near-duplicate", 0) and alike == pytest.approx(54 / 56, abs=0.1)
    assert Deduplicate(threshold=0.5)(Dataset.from_dict({"text": texts}))["text"][:] == texts[:2]
    assert len(Deduplicate()(Dataset.from_dict({"text": []}))) == 0


def test_two_processes_write_the_same_bytes_as_one(recipe, tmp_path, all_shared):
    for count in (1, 2):
        made = load(recipe, [f"corpus.workers={count}"], tmp_path / str(count))
        engine.run(made, report=False, say=engine.silent)
    one, two = written(tmp_path / "1"), written(tmp_path / "2")
    assert one == two and "dropped.parquet" in one and any(name.startswith("train/") for name in one)


def test_workers_and_a_cluster_do_not_change_the_address(recipe, tmp_path):
    addresses = {
        plan(load(recipe, words, tmp_path))[0].address for words in ([], ["corpus.workers=7"], ["corpus.ray=auto"])
    }
    assert len(addresses) == 1


def test_without_ray_one_line_says_what_brings_it(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PretrainError, match=r"a cluster needs ray; accepted: pip install 'pretrain\[ray\]'"):
        engine.run(load(recipe, [], tmp_path), ray="auto", report=False, say=engine.silent)


@pytest.fixture(scope="module")
def nodes():
    """The address of a cluster of two nodes on this machine, each with one core."""
    pytest.importorskip("ray", reason="needs ray: pip install 'pretrain[ray]'")
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


@pytest.mark.processes
def test_two_nodes_of_ray_write_the_same_bytes_as_this_process(recipe, tmp_path, all_shared, nodes):
    for name, ray in (("here", ""), ("ray", nodes)):
        engine.run(load(recipe, ["corpus.workers=1"], tmp_path / name), ray=ray, report=False, say=engine.silent)
    assert written(tmp_path / "here") == written(tmp_path / "ray")


@pytest.mark.processes
def test_errors_of_a_cluster_come_out_as_here(nodes):
    with Workers(ray=nodes, start=-1) as workers:
        with pytest.raises(PretrainError, match="^here: what is wrong; accepted: nothing$"):
            list(workers.each("wrong", wrong, shards(), 12))
        made = [each for _, each in workers.each("lengths", lengths, shards(), 12)]
    assert made == [[len(shard.rows[0])] for shard in shards()]
    with pytest.raises(PretrainError, match="no ray cluster at 'nowhere:1'"), Workers(ray="nowhere:1"):
        pass


def test_an_operation_called_alone_stays_in_this_process(tmp_path):
    with working(tmp_path) as here:
        assert here.workers.count == 1
