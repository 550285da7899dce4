"""Locks, links, flushing and memory on systems that lack what Linux has, played by taking it away."""

from __future__ import annotations

import builtins
import os
import sys
import types
from pathlib import Path

import pytest

from pretrain.core import files
from pretrain.core.files import atomic_folder, locked, write_text
from pretrain.core.folders import newest_checkpoint, place_of, stage_folders
from pretrain.core.system import portable, templates, watched


class Msvcrt(types.SimpleNamespace):
    """Windows' locks: a region that is locked is refused to all others."""

    LK_NBLCK = 2

    def __init__(self, tries=0):
        super().__init__(tries=tries, locked=[])

    def locking(self, handle, mode, count):
        assert (mode, count) == (2, 1) and os.lseek(handle, 0, os.SEEK_CUR) == 0
        self.tries -= 1
        if self.tries >= 0:
            raise PermissionError(13, "Permission denied")
        self.locked.append(handle)


@pytest.fixture
def windows(monkeypatch):
    """A system without `fcntl`, `resource` and symbolic links, whose folders cannot be opened."""
    plain, opened = builtins.__import__, os.open

    def importing(name, *more):
        if name in ("fcntl", "resource"):
            raise ModuleNotFoundError(name)
        return plain(name, *more)

    def opening(path, flags, *more, **named):
        if os.path.isdir(path) or flags == os.O_RDONLY:  # which `fsync` refuses there
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *more, **named)

    def refused(*_, **__):
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(builtins, "__import__", importing)
    monkeypatch.setattr(portable.os, "symlink", refused)
    monkeypatch.setattr(portable, "sys", types.SimpleNamespace(platform="win32"))
    monkeypatch.setattr(portable, "os", types.SimpleNamespace(**vars(os) | {"open": opening, "symlink": refused}))
    monkeypatch.setitem(sys.modules, "msvcrt", Msvcrt())
    return sys.modules["msvcrt"]


def test_windows_locks_a_byte_and_waits_for_it(windows, tmp_path, monkeypatch):
    blocked, naps = [], []
    monkeypatch.setattr(portable.time, "sleep", naps.append)
    windows.tries = 3
    with locked(tmp_path / "a.lock", lambda: blocked.append(1)):
        assert blocked == [1] and naps == [portable.WAIT] * 2 and len(windows.locked) == 1
    windows.tries = 1
    assert portable.held(tmp_path / "a.lock") and not portable.held(tmp_path / "a.lock")


def test_windows_writes_and_replaces_folders_in_two_renames(windows, tmp_path):
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "folder") as work:
            (work / "file").write_text(text)
    assert (tmp_path / "folder" / "file").read_text() == "two" and len(list(tmp_path.iterdir())) == 1
    write_text(tmp_path / "text", "whole")
    assert (tmp_path / "text").read_text() == "whole"


def test_no_file_is_renamed_while_it_is_open(tmp_path, monkeypatch):
    replace, opened = os.replace, []
    temporary = files.tempfile.NamedTemporaryFile

    def keeping(*given, **named):
        opened.append(temporary(*given, **named))
        return opened[-1]

    def checked(old, new):
        assert all(file.closed for file in opened)
        replace(old, new)

    monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", keeping)
    monkeypatch.setattr(files.os, "replace", checked)
    write_text(tmp_path / "a", "b")
    assert opened and (tmp_path / "a").read_text() == "b"


def test_where_no_symbolic_link_may_be_made_a_small_file_is_one(windows, tmp_path):
    portable.link(tmp_path / "model", "train-1")
    portable.link(tmp_path / "model", "../store/train-2")
    assert (tmp_path / "model").is_file() and portable.link_target(tmp_path / "model") == "../store/train-2"
    (tmp_path / "other").write_text("pretrain is a word")
    assert portable.link_target(tmp_path / "other") is None and portable.link_target(tmp_path) is None


def test_a_run_with_such_links_is_read_like_any_other(windows, tmp_path):
    checkpoint = tmp_path / "run" / "train-0123456789ab" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    row = '{"name": "model", "stage": "train", "folder": "train-0123456789ab", "address": "", "status": "finished"}'
    (tmp_path / "run" / "run.json").write_text(f'{{"stages": [{row}]}}')
    portable.link(tmp_path / "run" / "model", "train-0123456789ab")
    assert place_of(tmp_path / "run" / "model" / "checkpoint") == checkpoint
    assert newest_checkpoint(tmp_path / "run") == newest_checkpoint(tmp_path / "run" / "model") == checkpoint
    assert stage_folders(tmp_path / "run") == {"model": checkpoint.parent}


def test_a_symbolic_link_is_replaced_in_one_step(tmp_path):
    portable.link(tmp_path / "model", "train-1")
    portable.link(tmp_path / "model", "train-2")
    assert os.readlink(tmp_path / "model") == portable.link_target(tmp_path / "model") == "train-2"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("system, name, here", [("darwin", "renameatx_np", -2), ("linux", "renameat2", -100)])
def test_folders_trade_names_by_the_systems_own_call(system, name, here, monkeypatch):
    calls = []
    library = types.SimpleNamespace(**{name: lambda *given: calls.append(given) or 0})
    monkeypatch.setattr(portable.ctypes, "CDLL", lambda path: library)
    monkeypatch.setattr(portable, "sys", types.SimpleNamespace(platform=system))
    assert portable.exchange(Path("a"), Path("b")) and calls == [(here, b"a", here, b"b", 2)]
    library.__dict__.clear()
    assert not portable.exchange(Path("a"), Path("b"))


def test_peak_memory_is_bytes_everywhere(monkeypatch, windows):
    peaks = types.SimpleNamespace(peak_wset=5_000_000)
    psutil = types.SimpleNamespace(Process=lambda: types.SimpleNamespace(memory_info=lambda: peaks))
    monkeypatch.setitem(sys.modules, "psutil", psutil)
    assert portable.peak_resident() == 5_000_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts a peak anew")
def test_a_peak_is_counted_anew_once_what_took_it_is_given_back():
    held = bytearray(b"x" * (256 << 20))
    most = portable.peak_resident()
    del held
    portable.restart_peak()
    assert portable.peak_resident() < most - (200 << 20)


@pytest.mark.parametrize("system, unit", [("darwin", 1), ("linux", 1024)])
def test_the_unit_of_peak_memory_is_the_systems(system, unit, monkeypatch):
    usage = types.SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: types.SimpleNamespace(ru_maxrss=3_000))
    monkeypatch.setitem(sys.modules, "resource", usage)
    monkeypatch.setattr(portable, "sys", types.SimpleNamespace(platform=system))
    assert portable.peak_resident() == 3_000 * unit


def test_no_other_module_asks_for_what_one_system_alone_has():
    package = Path(portable.__file__).parents[2]
    for path in package.rglob("*.py"):
        # Templates are filled in by a copy where there are copies, and so is a command watched under a limit of memory;
        # the sandbox is for Linux alone, and says so.
        known = [Path(module.__file__) for module in (portable, templates, watched)]
        if path not in known and path.parent.name != "sandbox":
            text = path.read_text(encoding="utf-8")
            odd = [
                word
                for word in ("import fcntl", "import resource", "renameat2", "os.fork", "os.getuid", "os.readlink")
                if word in text
            ]
            assert not odd, f"{path}: {odd}"
