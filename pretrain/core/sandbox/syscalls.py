"""The filter of system calls: a program of the kernel's packet filter (seccomp-bpf), for what a program has no use for.

Namespaces keep the machine away; this keeps the parts of the kernel away that namespaces do not cut off: sockets of
other families than AF_UNIX (of a virtual machine's host, of the kernel itself), memory that no limit counts, and what
has been the way out of namespaces before.
"""

from __future__ import annotations

import errno
import platform
import struct

from pretrain.core.errors import PretrainError

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of a 32-bit word, a constant
NUMBER, ARCHITECTURE, FIRST = 0, 4, 16  # places in what the kernel shows: the call, its first argument
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
AF_UNIX, CLONE_NEWUSER, X32 = 1, 0x10000000, 0x40000000

# By architecture the kernel's name for it, `socket`, `clone`, `clone3`, and what is refused whole.
SHARED = (*range(425, 428), *range(428, 434), 438, 442, 447)  # io_uring, mounts, pidfd_getfd, memfd_secret
CALLS = {
    "x86_64": (
        0xC000003E, 41, 56, 435,
        # ptrace, process_vm_*, kcmp, mounts, roots, namespaces, keys, bpf, perf, userfaultfd, memfd, shared memory,
        # queues, modules, kexec, reboot, swap, quotas, accounting, handles, clocks, ports, the log
        (101, 310, 311, 312, 165, 166, 155, 161, 272, 308, 248, 249, 250, 321, 298, 323, 319, 29, 64, 68, 240, 175, 313,
         176, 246, 320, 169, 167, 168, 179, 163, 303, 304, 164, 227, 159, 305, 172, 173, 103),
    ),
    "aarch64": (
        0xC00000B7, 198, 220, 435,
        (117, 270, 271, 272, 40, 39, 41, 51, 97, 268, 217, 218, 219, 280, 241, 282, 279, 194, 190, 186, 180, 105, 273,
         106, 104, 294, 142, 224, 225, 60, 89, 264, 265, 170, 112, 171, 266, 116),
    ),
}  # fmt: skip


def program() -> bytes:
    """The filter for this machine; eight bytes for each instruction. Raises `PretrainError` where none is known."""
    machine = platform.machine()
    if machine not in CALLS:
        raise PretrainError(f"sandbox: a processor of kind {machine!r}; accepted: {', '.join(CALLS)}")
    architecture, socket, clone, clone3, refused = CALLS[machine]
    eperm = REFUSE | errno.EPERM
    code = [
        (LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL),
        (EQUAL, 0, 1, clone3), (RETURN, 0, 0, REFUSE | errno.ENOSYS),  # its flags cannot be seen; libraries use `clone`
    ]  # fmt: skip
    for number in (*refused, *SHARED):
        code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, eperm)]
    code += [(EQUAL, 0, 4, socket), (LOAD, 0, 0, FIRST), (EQUAL, 1, 0, AF_UNIX), (RETURN, 0, 0, REFUSE | errno.EACCES)]
    code += [(RETURN, 0, 0, ALLOW)]
    code += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, FIRST), (ANY_BIT, 0, 1, CLONE_NEWUSER), (RETURN, 0, 0, eperm)]
    code += [(RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
