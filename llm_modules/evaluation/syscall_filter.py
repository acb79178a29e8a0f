"""What code under test may ask of the Linux kernel: a seccomp filter with a list of what is allowed.

Runs in the process that it confines, on Python's standard library alone. Everything that is not listed fails with
"Operation not permitted": new processes and threads, other programs, signals, sockets, tracing, shared memory, owners
and modes of files, limits of other processes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine: column of the tables, and what the kernel calls it (linux/audit.h)."""

ALLOWED = """access:21:- alarm:37:- arch_prctl:158:- brk:12:214 chdir:80:49 clock_getres:229:114 clock_gettime:228:113
clock_nanosleep:230:115 close:3:57 close_range:436:436 copy_file_range:326:285 creat:85:- dup:32:23 dup2:33:-
dup3:292:24 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21 epoll_pwait:281:22 epoll_pwait2:441:441
epoll_wait:232:- eventfd2:290:19 exit:60:93 exit_group:231:94 faccessat:269:48 faccessat2:439:439 fadvise64:221:223
fallocate:285:47 fchdir:81:50 fdatasync:75:83 flock:73:32 fstat:5:80 fstatfs:138:44 fsync:74:82 ftruncate:77:46
futex:202:98 getcpu:309:168 getcwd:79:17 getdents:78:- getdents64:217:61 getegid:108:177 geteuid:107:175 getgid:104:176
getgroups:115:158 getitimer:36:102 getpgid:121:155 getpgrp:111:- getpid:39:172 getppid:110:173 getpriority:140:141
getrandom:318:278 getresgid:120:150 getresuid:118:148 getrlimit:97:163 getrusage:98:165 getsid:124:156 getsockopt:55:209
gettid:186:178 gettimeofday:96:169 getuid:102:174 link:86:- linkat:265:37 lseek:8:62 lstat:6:- madvise:28:233
membarrier:324:283 mincore:27:232 mmap:9:222 mprotect:10:226 mremap:25:216 msync:26:227 munmap:11:215 nanosleep:35:101
newfstatat:262:79 pause:34:- pipe:22:- pipe2:293:59 poll:7:- ppoll:271:73 pread64:17:67 preadv:295:69 pselect6:270:72
pwrite64:18:68 pwritev:296:70 read:0:63 readlink:89:- readlinkat:267:78 readv:19:65 recvfrom:45:207 rename:82:-
renameat:264:38 renameat2:316:276 restart_syscall:219:128 rseq:334:293 rt_sigaction:13:134 rt_sigpending:127:136
rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigsuspend:130:133 rt_sigtimedwait:128:137 sched_get_priority_max:146:125
sched_get_priority_min:147:126 sched_getaffinity:204:123 sched_getparam:143:121 sched_getscheduler:145:120
sched_yield:24:124 select:23:- sendfile:40:71 sendto:44:206 set_robust_list:273:99 set_tid_address:218:96
setitimer:38:103 setsockopt:54:208 shutdown:48:210 sigaltstack:131:132 stat:4:- statfs:137:43 statx:332:291 symlink:88:-
symlinkat:266:36 sysinfo:99:179 time:201:- timerfd_create:283:85 timerfd_gettime:287:87 timerfd_settime:286:86
times:100:153 umask:95:166 uname:63:160 unlink:87:- unlinkat:263:35 wait4:61:260 write:1:64 writev:20:66"""
"""name:number on x86_64:number on aarch64, as in the kernel's unistd.h."""

O_TRUNC, O_ACCMODE = 0o1000, 3
WRITABLE = (0, 1, 2, 3, O_TRUNC | 1, O_TRUNC | 2)
"""Emptying a file that is opened for reading escapes Landlock before its version 3."""

CONDITIONAL = {
    "fcntl:72:25": (1, 0xFFFFFFFF, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)),  # F_SETOWN sends signals
    "ioctl:16:29": (1, 0xFFFFFFFF, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # FIOSETOWN, too
    "open:2:-": (1, O_TRUNC | O_ACCMODE, WRITABLE),
    "openat:257:56": (2, O_TRUNC | O_ACCMODE, WRITABLE),
    "prlimit64:302:261": (0, 0xFFFFFFFF, (0,)),  # its own limits
    "socketpair:53:199": (1, 0xF, (1,)),  # a stream; a datagram could be sent to a socket of the system
}
"""Allowed if an argument (its number, a mask on its lower half) has one of the values."""

LOAD, AND, EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050001, 0x80000000
"""What a filter returns; DENY: EPERM."""
NR, ARCHITECTURE, ARGUMENTS = 0, 4, 16
"""Places in ``struct seccomp_data``."""
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def filter_system_calls() -> str | None:
    """Confines this process for good; None, or why that is not possible here."""
    if platform.system() != "Linux" or platform.machine() not in ARCHITECTURES:
        return f"no filter of system calls for {platform.system()} on {platform.machine()}"
    column, architecture = ARCHITECTURES[platform.machine()]
    program = _program(column, architecture)
    code = ctypes.create_string_buffer(program)
    libc = ctypes.CDLL(None, use_errno=True)
    argument = _Program(len(program) // 8, ctypes.addressof(code))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(argument), 0, 0
    ):
        return f"the kernel refuses a filter of system calls: {os.strerror(ctypes.get_errno())}"
    return None


def _program(column: int, architecture: int) -> bytes:
    """The filter, as ``struct sock_filter`` (code, jump if true, jump if false, value)."""
    lines = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NR)]
    for entry in ALLOWED.split():
        if (number := entry.split(":")[1 + column]) != "-":
            lines += [(EQUAL, 0, 1, int(number)), (RETURN, 0, 0, ALLOW)]
    for entry, (argument, mask, values) in CONDITIONAL.items():
        if (number := entry.split(":")[1 + column]) != "-":
            inner = [(LOAD, 0, 0, ARGUMENTS + 8 * argument), (AND, 0, 0, mask)]
            for value in values:
                inner += [(EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW)]
            inner.append((RETURN, 0, 0, DENY))
            lines += [(EQUAL, 0, len(inner), int(number)), *inner]
    return b"".join(struct.pack("=HBBI", *line) for line in [*lines, (RETURN, 0, 0, DENY)])
