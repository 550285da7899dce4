"""What runs inside the sandbox before the program does; the standard library alone, since nothing else is mounted.

`run` starts it as `python -I -S -c SOURCE STATUS LIFE`, with its settings as JSON on standard input. It makes the
namespaces and mounts (unless bubblewrap has), becomes process 1 of them, gives up all rights, and starts the program
under limits. It watches what limits of single processes do not bound, the sum of all, and its end is the end of every
process inside.
On the file descriptor STATUS it writes a line of JSON for each thing that the other side has to know; LIFE is a pipe
that is closed when the other side has ended, or wants an end.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import signal
import sys
from typing import TypedDict

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MNT_DETACH = 442, -100, 0x8000, 2  # the number is that of all architectures
ATTR_READ_ONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
CLONES = {"ns": 0x20000, "uts": 0x4000000, "ipc": 0x8000000, "pid": 0x20000000, "net": 0x40000000}
CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
CAPABILITY_VERSION_3, NOBODY, MAX_INODES, WATCH_SECONDS = 0x20080522, 65534, 20_000, 0.02


class Settings(TypedDict):
    """What `run` asks for: `files` and `filter` in base64, `memory` and `disk` in bytes."""

    program: list[str]
    environment: dict[str, str]
    files: dict[str, str]
    seconds: float
    memory: int
    processes: int
    disk: int
    readable: list[str]
    devices: list[str]
    filter: str
    entered: bool  # whether bubblewrap has made the namespaces


libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """A function of the C library; what it refuses is an OSError that names it."""
    words = [ctypes.c_char_p(a.encode()) if isinstance(a, str) else a for a in arguments]
    words = [ctypes.c_void_p(None) if a is None else ctypes.c_ulong(a) if isinstance(a, int) else a for a in words]
    if getattr(libc, name)(*words) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def tell(status: int, **facts: object) -> None:
    """A line for the other side."""
    os.write(status, (json.dumps(facts) + "\n").encode())


def enter(settings: Settings, status: int) -> None:
    """Into namespaces of its own; returns in the process that is the first of them."""
    call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL))
    user, group, flags = os.getuid(), os.getgid(), sum(CLONES.values())
    call("unshare", flags | (CLONE_NEWUSER if user else 0))
    if user:  # without a right outside, all rights inside, and over nothing else
        for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    child = os.fork()
    if child:
        tell(status, init=child)
        os.close(status)
        os.waitpid(child, 0)
        os._exit(0)
    call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL))
    mount(settings)


def mount(settings: Settings) -> None:
    """A new root: the system and Python to read, /tmp to write in, and nothing else of this machine."""
    call("mount", "none", "/", None, MS_REC | MS_PRIVATE, None)
    call("mount", "tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for name in ("old", "new"):
        os.mkdir(f"/tmp/{name}")
    call("mount", "/tmp/new", "/tmp/new", None, MS_BIND, None)
    root("/tmp", "/tmp/old")  # so that what lies in /tmp itself can be mounted too
    for path in settings["readable"]:
        bind(path, ATTR_READ_ONLY | ATTR_NOSUID | ATTR_NODEV)
    for name in settings["devices"]:
        bind(f"/dev/{name}", ATTR_NOSUID)
    for name in ("proc", "tmp"):
        os.makedirs(f"/new/{name}", exist_ok=True)
    os.symlink("/tmp", "/new/dev/shm")
    call("mount", "proc", "/new/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    size = f"mode=1777,size={settings['disk']},nr_inodes={MAX_INODES}"
    call("mount", "tmpfs", "/new/tmp", "tmpfs", MS_NOSUID | MS_NODEV, size)
    call("umount2", "/old", MNT_DETACH)
    root("/new", "/new/tmp")
    call("umount2", "/tmp", MNT_DETACH)  # what was the root: under it the empty one is seen again
    attributes("/", ATTR_READ_ONLY, 0)


def root(new: str, old: str) -> None:
    """Make `new` the root, with the old one at `old`, which lies in it."""
    call("syscall", 155 if os.uname().machine == "x86_64" else 41, new, old)  # pivot_root has no function
    os.chdir("/")


def bind(path: str, more: int) -> None:
    """Show a file or a folder of the machine at its own place; a link is made again."""
    source, place = f"/old{path}", f"/new{path}"
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), place)
        return
    if os.path.isdir(source):
        os.makedirs(place, exist_ok=True)
    else:
        open(place, "w").close()
    call("mount", source, place, None, MS_BIND | MS_REC, None)
    attributes(place, more, AT_RECURSIVE)


def attributes(path: str, more: int, flags: int) -> None:
    """Set attributes of a mount, and of all below it where it is recursive."""
    wanted = (ctypes.c_uint64 * 4)(more, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, path, flags, ctypes.byref(wanted), ctypes.sizeof(wanted))


def give_up_rights() -> None:
    """Nobody, without capabilities, now and after any `exec`."""
    if os.getuid() == 0:
        for number in range(64):
            if libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0) == -1:
                break
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL))  # which a change of user takes away
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    call("capset", ctypes.byref(header), ctypes.byref(none))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody inside may look into this process


class Program(ctypes.Structure):
    """A filter of system calls as the kernel takes it."""

    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def start(settings: Settings) -> int:
    """The program, in a child process, under the limits of a process and the filter of system calls."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.closerange(3, 65536)
    bounds = {
        resource.RLIMIT_AS: settings["memory"], resource.RLIMIT_FSIZE: settings["disk"], resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: int(settings["seconds"] * settings["processes"]) + 1, resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_NPROC: settings["processes"] + 1, resource.RLIMIT_MEMLOCK: 0, resource.RLIMIT_MSGQUEUE: 0,
    }  # fmt: skip
    for limit, most in bounds.items():
        resource.setrlimit(limit, (most, most))
    code = base64.b64decode(settings["filter"])
    call("prctl", PR_SET_SECCOMP, 2, ctypes.byref(Program(len(code) // 8, code)), 0, 0)
    name, environment = settings["program"][0], settings["environment"]
    for folder in [""] if "/" in name else environment["PATH"].split(":"):
        with contextlib.suppress(OSError):
            os.execve(os.path.join(folder, name), settings["program"], environment)
    os.write(2, f"{name}: no such program\n".encode())
    os._exit(127)


def breach(settings: Settings) -> str:
    """The limit that all processes together are beyond; empty where they keep within."""
    pages, count = 0, 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            try:
                with open(f"/proc/{name}/statm") as file:
                    pages += int(file.read().split()[1])
            except OSError:  # it has ended
                continue
            count += 1
    place = os.statvfs("/tmp")
    if pages * resource.getpagesize() > settings["memory"]:
        return "memory"
    if count > settings["processes"]:
        return "processes"
    full = place.f_bavail < 1 or place.f_ffree < 1 or place.f_files - place.f_ffree > MAX_INODES
    return "disk" if full else ""


def watch(settings: Settings, child: int, status: int, life: int) -> None:
    """Wait for the program, and end all when it ends or a limit is passed; children that it left are reaped."""
    reason, code = "", 0
    ended = False
    while not ended and not reason:
        try:
            pid, state = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == child:
            ended, code = True, os.waitstatus_to_exitcode(state)
        elif not pid:
            reason = breach(settings)
            if select.select([life], [], [], WATCH_SECONDS)[0]:
                os._exit(0)
    tell(status, exit=code if ended else -int(signal.SIGKILL), reason=reason)
    os._exit(0)  # with the first process of a namespace the kernel ends all others


def main() -> None:
    """Set up, run, tell."""
    status, life, settings = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.stdin.buffer.read())
    try:
        if not settings["entered"]:
            enter(settings, status)
        give_up_rights()
        os.chdir("/tmp")
        for name, content in settings["files"].items():
            os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
            with open(name, "wb") as file:
                file.write(base64.b64decode(content))
        child = start(settings)
        tell(status, ready=True)
    except OSError as error:
        tell(status, refused="the files do not fit" if error.errno == errno.ENOSPC else error.strerror or str(error))
        os._exit(1)
    watch(settings, child, status, life)


if __name__ == "__main__":
    main()
