"""Which corpora a checkpoint comes from, as long as they lie beside it."""

import json
import os

from pretrain.corpus.overlap import training_corpora


def a_checkpoint(home, addresses):
    checkpoint = home / "model-0123456789ab" / "checkpoint"
    checkpoint.mkdir(parents=True)
    stages = [{"stage": "data", "address": address} for address in addresses]
    (checkpoint / "pretrain.json").write_text(json.dumps({"lineage": {"stages": stages}}))
    return checkpoint


def a_corpus(home, address):
    folder = home / f"corpus-{address}" / "corpus"
    folder.mkdir(parents=True)
    (folder / "corpus.json").write_text("{}")
    return folder


def test_corpora_are_found_beside_a_checkpoint_and_in_the_stores_beside_its_own(tmp_path):
    near, far, gone = "a" * 12, "b" * 12, "c" * 12
    checkpoint = a_checkpoint(tmp_path / "one", [near, far, gone, near])
    places = [a_corpus(tmp_path / "one", near), a_corpus(tmp_path / ".two", far)]
    assert training_corpora(checkpoint) == (places, 1)


def test_a_folder_that_another_process_removes_meanwhile_is_not_looked_into(tmp_path, monkeypatch):
    address, scan = "a" * 12, os.scandir
    checkpoint, far = a_checkpoint(tmp_path / "one", [address]), a_corpus(tmp_path / "two", address)
    (tmp_path / ".tmp-removed-5grzfvi3").mkdir()

    def vanishing(path="."):
        if "removed" in os.fspath(path):
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert training_corpora(checkpoint) == ([far], 0)
