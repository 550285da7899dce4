"""The sandbox: what hostile programs try in it, by each way there is; where none is, that it refuses."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.core import sandbox
from pretrain.core.errors import PretrainError
from pretrain.core.sandbox import WAYS, Ran, run
from pretrain.core.sandbox.syscalls import program

REPOSITORY = Path(__file__).parent.parent
SCRIPT = "main.py"


def works(way: str) -> bool:
    try:
        return run(["python", "-c", "pass"], way=way).exit == 0
    except PretrainError:
        return False


@pytest.fixture(scope="module", params=WAYS)
def way(request):
    """Each way that works here; where it does not, it must refuse in words and run nothing."""
    if not works(request.param):
        with pytest.raises(PretrainError, match="accepted: (Linux|Debian)"):
            run(["python", "-c", "pass"], way=request.param)
        pytest.skip(f"{request.param} cannot be had here; that it refuses is tested")
    return request.param


def attempt(way: str, code: str, **bounds) -> Ran:
    return run(["python", SCRIPT], files={SCRIPT: code}, way=way, **bounds)


def test_a_program_runs_among_its_files_and_its_ends_are_told(way):
    done = run(["python", "-c", "import sys; print(open('a/b.txt').read()); sys.exit('bad')"], files={"a/b.txt": "ä"}, way=way)  # fmt: skip
    assert done == Ran(1, "ä\n", "bad\n")
    assert run(["sh", "-c", "kill -11 $$"], way=way) == Ran(-11, "", "")
    assert run(["nosuch"], way=way).exit == 127
    assert run(["python", "-c", "import sys; print(sys.stdin.read())"], way=way).stdout == "\n"
    tools = "import multiprocessing, sqlite3, ssl, tempfile; tempfile.mkdtemp(); multiprocessing.Lock(); print('ok')"
    assert run(["python", "-c", tools], way=way).stdout == "ok\n"


@pytest.mark.promise(
    "The sandbox",
    "A program inside reads the system's folders (`/usr`, `/lib`, …), Python and its own files, and nothing else.",
)
def test_nothing_of_the_machine_can_be_read(way, tmp_path):
    (tmp_path / "secret").write_text("secret")
    paths = ["/etc/shadow", "/etc/passwd", "/root/.bashrc", "/home", "/var/log", "/sys/kernel", "/dev/sda", "/dev/mem",
             str(REPOSITORY / "README.md"), str(tmp_path / "secret"), str(Path.home() / ".ssh"), "/proc/1/environ",
             "/proc/1/root/etc/passwd", "/proc/1/cwd", "/proc/1/mem", "/proc/self/root/etc/shadow", "/proc/kcore"]  # fmt: skip
    code = """
import os
for path in {paths}:
    try:
        print(path, os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read(9))
    except OSError:
        pass
print(sorted(os.listdir('/')), len([name for name in os.listdir('/proc') if name.isdigit()]))
"""
    done = attempt(way, code.format(paths=paths))
    lines = done.stdout.splitlines()
    assert done.exit == 0 and len(lines) == 1, done
    shown = {"bin", "dev", "etc", "lib", "lib32", "lib64", "proc", "sbin", "tmp", "usr"}
    python = {Path(folder).parts[1] for folder in sandbox._python()}
    assert set(eval(lines[0].rpartition(" ")[0])) <= shown | python and lines[0].endswith(" 2")


@pytest.mark.promise("The sandbox", "No variable of the environment goes into the sandbox.")
def test_no_variable_of_the_environment_goes_in(way, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    done = attempt(way, "import os; print(os.environ, open('/proc/self/environ').read())")
    assert done.exit == 0 and "hunter2" not in done.stdout and "HOME" in done.stdout


@pytest.mark.promise(
    "The sandbox", "A program inside reaches no network, no loopback, no abstract socket, no host of a virtual machine."
)
def test_no_socket_reaches_out_of_it(way):
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        name = f"\0pretrain-{os.getpid()}"
        unix.bind(name)
        unix.listen()
        code = f"""
import socket
def reach(family, address, kind=socket.SOCK_STREAM):
    try:
        with socket.socket(family, kind) as s:
            s.settimeout(1)
            s.connect(address)
        print('reached', address)
    except OSError as error:
        print(type(error).__name__)
reach(socket.AF_INET, ('127.0.0.1', {tcp.getsockname()[1]}))
reach(socket.AF_INET, ('1.1.1.1', 53), socket.SOCK_DGRAM)
reach(socket.AF_INET6, ('::1', 80))
reach(socket.AF_UNIX, {name!r})
reach(socket.AF_VSOCK, (2, 1))
reach(socket.AF_NETLINK, (0, 0), socket.SOCK_RAW)
a, b = socket.socketpair()
a.send(b'x')
print(b.recv(1))
"""
        done = attempt(way, code)
    assert "reached" not in done.stdout and done.stdout.count("Error") == 6 and "b'x'" in done.stdout, done


@pytest.mark.promise("The sandbox", "A program inside writes into a folder in memory alone.")
def test_nothing_can_be_written_outside(way, tmp_path):
    code = f"""
import os, sys
prefix = os.path.dirname(os.__file__)
for path in ('/x', '/usr/x', '/etc/x', '/dev/x', '/proc/sys/kernel/hostname', {str(tmp_path / "x")!r}, prefix + '/x', sys.executable):
    try:
        open(path, 'a').write('x')
        print(path)
    except OSError:
        pass
for path in ('/usr/bin/python3', sys.executable):
    for change in (os.unlink, lambda p: os.chmod(p, 0o777), lambda p: os.chown(p, 1, 1)):
        try:
            change(path)
            print(path, change)
        except OSError:
            pass
open('/tmp/mine', 'w').write('x')
open('/dev/null', 'w').write('x')
"""
    assert attempt(way, code) == Ran(0, "", "") and not list(tmp_path.iterdir())


@pytest.mark.promise("The sandbox", "A program inside has no rights and can get none.")
def test_rights_cannot_be_had_again(way):
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
tries = {
    'unshare': lambda: libc.unshare(0x10000000), 'namespace': lambda: libc.unshare(0x20000), 'mount': lambda: libc.mount(b'none', b'/tmp', b'tmpfs', 0, None),
    'chroot': lambda: libc.chroot(b'/tmp'), 'root': lambda: libc.setuid(0), 'ptrace': lambda: libc.ptrace(16, 1, 0, 0),
    'trace me': lambda: libc.ptrace(0, 0, 0, 0), 'bpf': lambda: libc.syscall(321, 0, 0, 0), 'memfd': lambda: libc.memfd_create(b'x', 0),
    'io_uring': lambda: libc.syscall(425, 1, 0), 'shared memory': lambda: libc.shmget(0, 4096, 0o1600), 'keys': lambda: libc.syscall(250, 0, -3, 1) if os.uname().machine == 'x86_64' else -1,
    'clone': lambda: libc.syscall(56, 0x10000011, 0, 0, 0, 0) if os.uname().machine == 'x86_64' else -1,
}
for name, attempt in tries.items():
    if attempt() != -1:
        print(name)
facts = dict(line.split(':', 1) for line in open('/proc/self/status'))
print(os.getuid() != 0, *[facts[name].strip() for name in ('CapEff', 'CapPrm', 'CapBnd', 'NoNewPrivs', 'Seccomp')])
"""
    none = "0" * 16
    done = attempt(way, code)
    user, effective, permitted, bounding, new, filtered = done.stdout.split()
    assert (user, effective, permitted, new, filtered) == ("True", none, none, "1", "2"), done
    assert os.getuid() != 0 or bounding == none


@pytest.mark.promise("The sandbox", "No signal of a program inside leaves the sandbox.")
def test_no_signal_leaves_it_and_its_first_process_cannot_be_stopped(way):
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        code = f"""
import os, signal
for pid in (1, {os.getpid()}, {victim.pid}, {os.getppid()}):
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
        try:
            os.kill(pid, number)
        except OSError:
            pass
print('here')
os.kill(-1, signal.SIGKILL)
"""
        done = attempt(way, code, seconds=5)
        assert done.stdout == "here\n" and not done.reason and victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


FILL = "i = 0\nwhile True:\n    try: open(f'/tmp/{{i}}', 'wb'){write}\n    except OSError: pass\n    i += 1"


@pytest.mark.promise(
    "The sandbox",
    "A program inside is ended beyond its time, memory, processes, disk or output, and the limit is named.",
)
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import time; time.sleep(60)", "seconds"),
        ("while True: pass", "seconds"),
        ("import os, signal\nfor n in (15, 2, 1): signal.signal(n, signal.SIG_IGN)\nos.close(1); os.close(2)\nwhile True: pass", "seconds"),
        ("import os\nwhile True: os.fork()", "processes"),
        ("import os\nfor i in range(6):\n    if not os.fork(): break\nx = b'x' * (60 << 20)\nimport time; time.sleep(60)", "memory"),
        ("print('x' * (1 << 30))", "output|memory"),
        ("import os\nwhile True: os.write(1, b'x' * 65536)", "output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 65536)", "output"),
        (FILL.format(write=".write(b'x' * (1 << 20))"), "disk"),
        (FILL.format(write=""), "disk"),
    ],
)  # fmt: skip
def test_what_goes_beyond_a_limit_is_ended_and_the_limit_named(way, code, reason):
    began = time.monotonic()
    seconds = 1 if reason == "seconds" else 20
    done = attempt(way, f"{code}\n", seconds=seconds, memory=200 << 20, output=100_000, disk=8 << 20, processes=8)
    ended_by = "processes" if "fork" in code and done.reason == "" else done.reason or "memory"
    assert ended_by in reason.split("|"), done
    assert done.exit != 0 and time.monotonic() - began < seconds + 5
    assert len(done.stdout) + len(done.stderr) <= 100_000


@pytest.mark.promise(
    "The sandbox",
    "Memory is looked at every 20 milliseconds, so that many processes together may pass it for that long, each of them never.",
)
def test_a_process_gets_no_more_memory_than_allowed(way):
    done = attempt(way, "x = bytearray(300 << 20)", memory=200 << 20)
    assert done.exit == 1 and "MemoryError" in done.stderr
    done = attempt(way, "x = bytearray(100 << 20); print(len(x))", memory=200 << 20)
    assert done.stdout == f"{100 << 20}\n"


def alive(mark: str) -> list[str]:
    """The processes of the machine whose command line holds the mark."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if mark in line]


DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(120)', '{mark}'])
    os._exit(0)
time.sleep(0.3)
{then}
"""


@pytest.mark.promise(
    "The sandbox", "A program inside leaves no process behind, also when what has started it is killed."
)
@pytest.mark.parametrize("then", ["print('done')", "time.sleep(60)", "os.kill(os.getpid(), 9)"])
def test_nothing_outlives_the_program(way, then):
    mark = f"outlives-{os.getpid()}-{way}-{len(then)}"
    attempt(way, DAEMON.format(mark=mark, then=then), seconds=1)
    deadline = time.monotonic() + 3
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(mark)


@pytest.mark.promise("The sandbox", "A program inside leaves no process behind")
def test_nothing_outlives_a_killed_parent(way):
    mark = f"orphan-{os.getpid()}-{way}"
    code = f"from pretrain.core.sandbox import run\nrun(['python', '-c', 'import time; time.sleep(100)', '{mark}'], seconds=90, way='{way}')"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    deadline = time.monotonic() + 20
    while len([line for line in alive(mark) if "/bin/python" in line and "time.sleep(100)" in line]) < 2:
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(mark)


def test_an_interrupt_ends_what_runs(way, monkeypatch):
    mark = f"interrupt-{os.getpid()}-{way}"

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sandbox, "_listen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(["python", "-c", "import time; time.sleep(60)", mark], way=way)
    assert not alive(mark)


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "", "."])
def test_files_whose_paths_lead_out_are_refused(name):
    with pytest.raises(PretrainError, match="accepted: a path inside"):
        run(["python", "-c", "pass"], files={name: "x"})


def test_files_that_do_not_fit_are_refused(way):
    with pytest.raises(PretrainError, match="do not fit"):
        run(["python", "-c", "pass"], files={"x": b"x" * (2 << 20)}, disk=1 << 20, way=way)


@pytest.mark.promise(
    "The sandbox", "Where none of those is there, or the processor is another, it refuses and runs nothing."
)
def test_without_a_way_it_refuses_and_runs_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(PretrainError, match="bwrap is not installed"):
        run(["python", "-c", "pass"], way="bubblewrap")
    source = Path(sandbox.__file__).with_name("inside.py").read_text()
    forbidden = source.replace('call("unshare", ', 'raise OSError(1, "unshare refused"); call("unshare", ')
    assert forbidden != source
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *a: forbidden if path.name == "inside.py" else read(path, *a))
    with pytest.raises(PretrainError, match="sandbox: namespaces: unshare refused; accepted: Linux 5.12"):
        run(["python", "-c", "print('ran')"])
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(PretrainError, match="darwin; accepted: Linux"):
        run(["python", "-c", "pass"])


def test_bubblewrap_that_does_not_work_is_passed_over(monkeypatch, tmp_path):
    if not works("namespaces"):
        pytest.skip("namespaces cannot be had here")
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: no rights' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(["python", "-c", "print('ran')"]).stdout == "ran\n"
    with pytest.raises(PretrainError, match="bubblewrap: bwrap: no rights; accepted"):
        run(["python", "-c", "pass"], way="bubblewrap")


@pytest.mark.promise("The sandbox", "Where none of those is there")
def test_a_processor_without_a_filter_is_refused(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "sparc64")
    with pytest.raises(PretrainError, match="'sparc64'; accepted: x86_64, aarch64"):
        program()
