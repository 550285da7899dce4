"""The one way to run code that a corpus or a model has brought: a process that can reach nothing and is bounded.

    run(["python", "test.py"], files={"test.py": "assert 1 + 1 == 2"})

The program has no network, sees of the machine only the system's folders and Python, to read, and writes into a folder
in memory, `/tmp`, where it begins and the files lie. It has no rights and no user of the machine. Time, memory, disk,
processes and output are bounded, for all its processes together, and with the program end all that it has started.
Namespaces and a filter of system calls do this, by bubblewrap where it is installed; where neither can be had, `run`
refuses.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pretrain.core.errors import PretrainError
from pretrain.core.sandbox.syscalls import program as filter_program

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
ENVIRONMENT = {"HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
GRACE = 5.0  # seconds that it may take to begin, and to end once it is killed
DEVICES = ("null", "zero", "full", "random", "urandom")
WAYS = ("bubblewrap", "namespaces")
NEEDED = "Linux 5.12 or newer, and root or user namespaces, or bubblewrap that works"


@dataclass(frozen=True)
class Ran:
    """How a program ended: its exit status (negative: the signal), what it wrote, and the limit that ended it, if any.

    `reason` is `seconds`, `memory`, `processes`, `disk`, `output`, or empty where it ended by itself.
    """

    exit: int
    stdout: str
    stderr: str
    reason: str = ""


@dataclass
class _Heard:
    """What has come from the other side so far."""

    texts: dict[str, bytearray] = field(default_factory=lambda: {"stdout": bytearray(), "stderr": bytearray()})
    status: bytearray = field(default_factory=bytearray)

    def facts(self) -> dict[str, object]:
        """What the inside has told."""
        facts: dict[str, object] = {}
        for line in bytes(self.status).split(b"\n")[:-1]:
            facts |= json.loads(line)
        return facts


def run(
    program: Sequence[str],
    *,
    files: Mapping[str, str | bytes] | None = None,
    seconds: float = 10.0,
    memory: int = 1 << 30,
    processes: int = 16,
    output: int = 1 << 20,
    disk: int = 64 << 20,
    way: str | None = None,
) -> Ran:
    """Run a program, `["python", …]` or one of the system's, among `files` (path -> content) in a folder of its own.

    `memory` (bytes in use by all its processes; of one process also addresses), `disk` and `output` are in bytes.
    `way` is one of `WAYS`, by default the first that can be had. Raises `PretrainError` where no sandbox can be had,
    and for files whose paths lead out of the folder.
    """
    python, readable = str(Path(sys.executable).resolve()), [*filter(os.path.lexists, SYSTEM), *_python()]
    settings = {
        "program": [python if program[0] == "python" else program[0], *program[1:]],
        "environment": ENVIRONMENT | {"PATH": f"{Path(python).parent}:/usr/bin:/bin"},
        "files": _checked(files or {}), "seconds": seconds, "memory": memory, "processes": processes, "disk": disk,
        "readable": readable, "devices": DEVICES, "filter": base64.b64encode(filter_program()).decode(),
    }  # fmt: skip
    inside = [python, "-I", "-S", "-c", Path(__file__).with_name("inside.py").read_text()]
    refusals = []
    for name in _ways(way):
        by_bubblewrap = name == "bubblewrap"
        command = [*(_bubblewrap(readable, disk) if by_bubblewrap else []), *inside]
        ran = _attempt(command, json.dumps(settings | {"entered": by_bubblewrap}), seconds, output)
        if isinstance(ran, Ran):
            return ran
        refusals.append(f"{name}: {ran}")
    raise PretrainError(f"sandbox: {'; '.join(refusals)}; accepted: {NEEDED}")


def _ways(way: str | None) -> list[str]:
    """The way that is asked for, or those there may be."""
    if not sys.platform.startswith("linux"):
        raise PretrainError(f"sandbox: {sys.platform}; accepted: {NEEDED}")
    if way is not None and way not in WAYS:
        raise PretrainError(f"sandbox: way {way!r}; accepted: {', '.join(WAYS)}")
    return [way] if way else [name for name in WAYS if name != "bubblewrap" or shutil.which("bwrap")]


def _attempt(command: Sequence[str], settings: str, seconds: float, output: int) -> Ran | str:
    """What came of it, or why nothing was run."""
    reader, status = os.pipe()
    life, lifeline = os.pipe()  # its end is heard inside when this process dies, however that be
    try:
        process = subprocess.Popen(
            [*command, str(status), str(life)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            pass_fds=(status, life), env={}, cwd="/", start_new_session=True,
        )  # fmt: skip
    except BaseException:
        os.close(lifeline)
        os.close(reader)
        raise
    finally:
        os.close(status)
        os.close(life)
    heard = _Heard()
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(settings.encode())
        reason = _listen(process, reader, heard, seconds, output)
    finally:
        os.close(lifeline)
        _end(process, heard)
        os.close(reader)
    facts = heard.facts()
    stdout, stderr = (bytes(heard.texts[name]).decode(errors="replace") for name in ("stdout", "stderr"))
    if "ready" not in facts or "refused" in facts:
        return str(facts.get("refused") or " ".join(stderr.split())[-300:] or "it did not begin")
    code = facts.get("exit", -int(signal.SIGKILL))
    return Ran(int(str(code)), stdout, stderr, reason or str(facts.get("reason", "")))


def _python() -> list[str]:
    """The folders of this Python, without its packages' virtual environment."""
    folders = {str(Path(sys.base_prefix).resolve()), str(Path(sys.executable).resolve().parent.parent)}
    return sorted(folder for folder in folders if not folder.startswith(("/usr", "/bin", "/lib")) and folder != "/")


def _bubblewrap(readable: Sequence[str], disk: int) -> list[str]:
    """The command that enters the namespaces by bubblewrap."""
    program = shutil.which("bwrap")
    if program is None:
        raise PretrainError("sandbox: bwrap is not installed; accepted: Debian's bubblewrap")
    shown: list[str] = []
    for path in readable:
        for parent in sorted(map(str, Path(path).parents))[1:]:  # else only its owner may pass
            shown += ["--perms", "0755", "--dir", parent]
        shown += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    user = ["--unshare-user"] if os.getuid() else []  # root is given up inside, for which it must be root
    spaces = [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts")]
    devices = [word for name in DEVICES for word in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")]
    user = ["--unshare-user"] if os.getuid() else []  # root is given up inside, for which it must be root
    spaces = [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts")]
    return [
        program, *user, *spaces, "--die-with-parent", "--new-session", "--clearenv", "--as-pid-1", *shown,
        "--perms", "0755", "--dir", "/dev", *devices, "--symlink", "/tmp", "/dev/shm", "--proc", "/proc",
        "--size", str(disk), "--perms", "1777", "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--",
    ]  # fmt: skip


def _checked(files: Mapping[str, str | bytes]) -> dict[str, str]:
    """The files as JSON holds them; their paths must stay inside."""
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise PretrainError(f"sandbox: file {name!r}; accepted: a path inside the program's folder")
    contents = {name: c.encode() if isinstance(c, str) else c for name, c in files.items()}
    return {name: base64.b64encode(content).decode() for name, content in contents.items()}


def _listen(process: subprocess.Popen[bytes], status: int, heard: _Heard, seconds: float, output: int) -> str:
    """Read until the inside has told the end, or closed everything; the limit passed, which only this side can see."""
    assert process.stdout is not None and process.stderr is not None
    deadline = time.monotonic() + GRACE + seconds  # by its own clock once it has begun
    ready = False
    with selectors.DefaultSelector() as selector:
        for stream, name in ((process.stdout, "stdout"), (process.stderr, "stderr"), (status, "status")):
            selector.register(stream, selectors.EVENT_READ, name)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return "seconds"
            for key, _ in selector.select(left):
                part = os.read(key.fd, 65536)
                if not part:
                    selector.unregister(key.fileobj)
                elif key.data == "status":
                    heard.status += part
                    if not ready and "ready" in heard.facts():
                        ready, deadline = True, time.monotonic() + seconds
                else:
                    room = output - sum(map(len, heard.texts.values()))
                    heard.texts[key.data] += part[:room]
                    if len(part) > room:
                        return "output"
    return ""


def _end(process: subprocess.Popen[bytes], heard: _Heard) -> None:
    """Wait for the end, and force it: with the first process of the namespace the kernel ends all others."""
    first = heard.facts().get("init")
    if process.poll() is None and isinstance(first, int):  # not yet waited for: the number is still its own
        with contextlib.suppress(ProcessLookupError):
            os.kill(first, signal.SIGKILL)
    for wait in (GRACE, GRACE):
        try:
            process.wait(wait)
            break
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
