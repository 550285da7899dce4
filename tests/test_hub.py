"""Models by their names on the hub: pinned, only safe files, and one line where there is no network. The hub is a fake."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import huggingface_hub
import pytest
from small_recipe import small_recipe

from pretrain import engine
from pretrain.core import checkpoint
from pretrain.core.errors import PretrainError
from pretrain.core.quick import hub
from pretrain.recipe import load


class Hub:
    """A hub with one repository, whose newest revision can be changed."""

    def __init__(self, folder):
        self.folder, self.sha, self.asked, self.fetched = folder, "a" * 40, 0, []

    def model_info(self, api, repo, *, revision=None, timeout=None):
        self.asked += 1
        if repo not in ("org/small", "gpt2"):
            raise ConnectionError("no route\nto host")
        siblings = [SimpleNamespace(rfilename=path.name) for path in self.folder.iterdir()]
        return SimpleNamespace(sha=revision if revision and len(revision) == 40 else self.sha, siblings=siblings)

    def snapshot_download(self, repo, *, revision, local_dir, allow_patterns, ignore_patterns):
        for path in self.folder.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, local_dir)
                self.fetched.append(path.name)


@pytest.fixture
def fake(tmp_path, stories, monkeypatch):
    (tmp_path / "r.yaml").write_text(small_recipe(tmp_path, stories[:30], budget={"steps": 1}))
    made = engine.run(load(tmp_path / "r.yaml", (), tmp_path / "made"), say=engine.silent)
    repository = tmp_path / "repository"
    shutil.copytree(made.folder / "model" / "checkpoint", repository)
    (repository / "pretrain.json").unlink()
    for name in ("pytorch_model.bin", "modeling_evil.py", "training_args.bin"):
        (repository / name).write_bytes(b"never")
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    fake = Hub(repository)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, *a, **k: fake.model_info(api, *a, **k))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def recipe(tmp_path, name, **fields):
    text = small_recipe(tmp_path, [{"text": f"text {i} " * 20} for i in range(30)], budget={"steps": 1})
    text = (
        text[: text.index("- stage: tokenizer")].rstrip()
        + f"\n  - {{stage: train, name: model, corpus: corpus, init: {name}, length: 32, batch_rows: 2, budget: {{steps: 2}}}}\n"
    )
    (tmp_path / "h.yaml").write_text(text)
    return load(tmp_path / "h.yaml", (), tmp_path / "out")


def test_a_hub_name_is_pinned_as_the_recipe_is_read_and_its_weights_come_when_it_runs(fake, tmp_path):
    read = recipe(tmp_path, "org/small")
    assert fake.asked == 1 and "model.safetensors" not in fake.fetched and "config.json" in fake.fetched
    said = []
    done = engine.run(read, say=said.append)
    assert "fetching org/small at aaaaaaaaaaaa from the hub" in said
    assert not {"pytorch_model.bin", "modeling_evil.py", "training_args.bin"} & set(fake.fetched)
    record = json.loads((done.folder / "model" / "stage.json").read_text())
    assert record["identity"]["inputs"]["init"] == f"hub org/small@{'a' * 40}"
    lineage = checkpoint.lineage(done.folder / "model" / "checkpoint")
    assert lineage["stages"][0]["name"] == "org/small" and lineage["stages"][0]["revision"] == "a" * 40

    fake.sha = "b" * 40  # the hub goes on; the name means what it meant
    again = engine.run(load(tmp_path / "h.yaml", (), tmp_path / "out"), say=said.append)
    assert fake.asked == 1 and again.stages["model"]["address"] == record["address"]
    assert "[model] already done" in said
    other = engine.run(
        load(tmp_path / "h.yaml", [f"model.init=org/small@{'b' * 40}"], tmp_path / "out"), say=said.append
    )
    assert other.stages["model"]["address"] != record["address"]


def test_weights_of_the_hub_come_whole_or_not_at_all_and_are_known_when_they_are_damaged(fake, tmp_path, monkeypatch):
    folder, said = hub.pin("org/small"), []
    (fake.folder / "second.safetensors").write_bytes(b"x")
    with monkeypatch.context() as patched:
        patched.setattr(hub.shutil, "copy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patched.setattr(
            huggingface_hub,
            "snapshot_download",
            lambda *a, local_dir, **k: (local_dir / "second.safetensors").write_bytes(b"x"),
        )
        with pytest.raises(KeyboardInterrupt):
            hub.fetch_weights(folder, said.append)
    assert not list(folder.glob("*.safetensors")) and not list(folder.parent.glob(".tmp-*"))
    (fake.folder / "second.safetensors").unlink()
    hub.fetch_weights(folder, said.append)
    checkpoint.load(folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(PretrainError, match=r"model.safetensors is damaged"):
        checkpoint.load(folder)


def test_without_the_hub_the_error_says_how_to_download(fake, tmp_path):
    with pytest.raises(PretrainError) as caught:
        recipe(tmp_path, "org/other")
    message = str(caught.value)
    assert "h.yaml:" in message and "model.init: 'org/other'; accepted: an earlier stage (corpus) or a path" in message
    assert "(ConnectionError: no route to host)" in message and "\n" not in message
    assert (
        "hf download org/other --include '*.safetensors' '*.json'" in message and "--local-dir models/other" in message
    )
    assert not hub.pinned("org/other")


def test_before_a_run_no_network_is_asked(fake, tmp_path):
    with (
        hub.offline(),
        pytest.raises(PretrainError, match="'gpt2' is neither a folder nor a model that has been fetched"),
    ):
        recipe(tmp_path, "gpt2")
    assert fake.asked == 0 and not hub.pinned("gpt2")
    recipe(tmp_path, "gpt2")
    with hub.offline():
        assert recipe(tmp_path, "gpt2").stages  # it has been pinned


def test_a_misspelt_stage_is_never_asked_of_the_hub(fake, tmp_path):
    with pytest.raises(PretrainError, match=r"'korpus' \(did you mean 'corpus'\?\)"):
        recipe(tmp_path, "korpus")
    assert fake.asked == 0


def test_a_repository_of_pickles_is_refused_before_anything_runs(fake, tmp_path):
    (fake.folder / "model.safetensors").unlink()
    with pytest.raises(PretrainError, match="'gpt2' on the hub has no safetensors; accepted: .*pickles are not read"):
        engine.run(recipe(tmp_path, "gpt2"), say=engine.silent)
    assert not (tmp_path / "out" / "corpus").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gpt2", True), ("org/name", True), ("org/name@main", True), ("./gpt2", False), ("/models/x", False), ("a/b/c", False),
     ("~/x", False), ("model.safetensors", False), ("org/", False), ("", False)],
)  # fmt: skip
def test_what_looks_like_a_hub_name(name, expected):
    assert hub.looks_like(name) is expected
