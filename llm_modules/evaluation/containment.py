"""The walls around code under test, built from inside by the process that is to run it; standard library alone.

Limits of the process (CPU, memory, files), Landlock (which files it may read and write), no capabilities, and a filter
of system calls. None of it needs root or a namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
import sys

from llm_modules.evaluation.syscall_filter import PR_SET_NO_NEW_PRIVS, filter_system_calls

OPEN_FILES = 64
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""Landlock's system calls, the same on every architecture."""
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5
MAKE_REG, MAKE_FIFO, MAKE_SYM, REFER, TRUNCATE = 1 << 8, 1 << 10, 1 << 12, 1 << 13, 1 << 14
HANDLED = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""Rights on files that each version of Landlock knows (linux/landlock.h)."""
SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom")
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
CAPSET = {"x86_64": 126, "aarch64": 91}


def die_with_parent() -> None:
    """SIGKILL for this process when the one that started it ends; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)


def confine(folder: str, *, seconds: int, memory: int, file_size: int, unsafe: bool) -> None:
    """Confines this process for good.

    Args:
        folder: where alone it may write; no folders within.
        seconds: of CPU time.
        memory: bytes of address space.
        file_size: bytes of the longest file.
        unsafe: go on without the walls that this system cannot build.

    Raises:
        RuntimeError: a wall cannot be built; one line.
    """
    limits = {"CPU": seconds, "AS": memory, "FSIZE": file_size, "NOFILE": OPEN_FILES, "CORE": 0}
    for name, value in limits.items():
        with contextlib.suppress(*([ValueError, OSError] if unsafe else [])):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    for wall in (lambda: landlock(folder), drop_capabilities, filter_system_calls):
        if (problem := wall()) and not unsafe:
            raise RuntimeError(problem)


def landlock(folder: str, version: int | None = None) -> str | None:
    """Files: Python and the system's libraries may be read, ``folder`` read and written, nothing else opened.

    Args:
        folder: as of ``confine``.
        version: of Landlock; None: the kernel's.

    Returns:
        None, or why that is not possible here.
    """
    if sys.platform != "linux":
        return f"no Landlock on {sys.platform}"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    there = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if there < 1:
        return f"the kernel has no Landlock (Linux 5.13, in its list of security modules): {_reason()}"
    handled = HANDLED[max(known for known in HANDLED if known <= (version or there))]
    attributes = struct.pack("=Q", handled)
    rules = libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    if rules < 0:
        return f"Landlock: {_reason()}"
    read = EXECUTE | READ_FILE | READ_DIR
    own = WRITE_FILE | READ_FILE | READ_DIR | REMOVE_FILE | MAKE_REG | MAKE_FIFO | MAKE_SYM | REFER | TRUNCATE
    paths = dict.fromkeys((*SYSTEM, sys.prefix, sys.base_prefix, *_libraries()), read)
    for path, rights in (paths | {"/dev/null": READ_FILE | WRITE_FILE | TRUNCATE, folder: own}).items():
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            rights &= EXECUTE | READ_FILE | WRITE_FILE | TRUNCATE
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights & handled, file)
        failed = libc.syscall(ADD_RULE, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint32(0))
        os.close(file)
        if failed:
            return f"Landlock: {path}: {_reason()}"
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(
        RESTRICT_SELF, ctypes.c_int(rules), ctypes.c_uint32(0)
    ):
        return f"Landlock: {_reason()}"
    os.close(rules)
    return None


def drop_capabilities() -> str | None:
    """What root may do beyond its own files; None, or why that is not possible here."""
    number = CAPSET.get(os.uname().machine)
    if sys.platform != "linux" or number is None:
        return f"no way to give up capabilities on {sys.platform}, {os.uname().machine}"
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    if ctypes.CDLL(None, use_errno=True).syscall(number, header, none):
        return f"capabilities: {_reason()}"
    return None


def _libraries() -> list[str]:
    """Where this interpreter finds packages, if that is outside its prefix."""
    return [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages", "lib-dynload")]


def _reason() -> str:
    return os.strerror(ctypes.get_errno())
