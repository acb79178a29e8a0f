"""Hostile code passes none of its tests and harms nothing.

What hostile code attempts is real, run for real; each attempt is told apart from code that merely fails by a look at
what it would have left behind.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llm_modules.evaluation.code_tests import (
    ATTEMPTS,
    PROBE,
    ROOT,
    START,
    Limits,
    run_tests,
)
from llm_modules.evaluation.syscall_filter import ALLOWED, CONDITIONAL


def kernel_has_landlock() -> bool:
    """Asked without the code under test, so that a wall that is broken fails tests and skips none."""
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) > 0


pytestmark = pytest.mark.skipif(not kernel_has_landlock(), reason="the kernel has no Landlock")

LIMITS = Limits(10.0, 512 << 20, 8 << 20)
ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


def passed(code: str, tests: list[str] = TESTS, setup: str = "", limits: Limits = LIMITS) -> list[bool]:
    return run_tests(code, setup, tests, limits, unsafe=False).passed


FORGED = {
    "exit": "import sys\nsys.exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "exit in the function": "import os\ndef add(a, b): os._exit(0)",
    "equals anything": "class Yes:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n"
    "    def __bool__(self): return True\ndef add(a, b): return Yes()",
    "an int that equals anything": "class Y(int):\n    def __eq__(self, o): return True\ndef add(a, b): return Y(5)",
    "other built-ins": "import builtins\nbuiltins.AssertionError = builtins.Exception = None\n"
    "builtins.exec = lambda *a: None\ndef add(a, b): return None",
    "writes what a report would": "import os\nfor i in range(64):\n    try: os.write(i, b'.11')\n"
    "    except OSError: pass\ndef add(a, b): return None",
    "hands over a class of its own": "class Evil:\n    def __reduce__(self): return (eval, ('1/0',))\n"
    "def add(a, b): return Evil()",
    "hands over itself": "import sys\ndef add(a, b): return sys.modules",
    "raises": "def add(a, b): raise SystemExit(0)",
    "interrupts": "raise KeyboardInterrupt",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "endless recursion": "def add(a, b): return add(a, b)",
    "no text": "def add(a, b): return '\\ud800'",
    "no Python": "def add(a, b:\n",
    "a NUL": "x = '\0'",
    "half a surrogate pair": "x = '\ud800'",
}


@pytest.mark.parametrize("attempt", FORGED)
def test_nothing_passes_that_is_not_right(attempt: str) -> None:
    code = FORGED[attempt]
    if "def add" not in code:
        code += f"\n{ADD}"  # never reached
    assert passed(code) == [False, False]


BY_PIPE = """
import sys
frame = sys._getframe()
while "calls" not in frame.f_locals:
    frame = frame.f_back
calls = frame.f_locals["calls"]
calls.send("names", {"__builtins__": {"abs": lambda x: 0}, "mean": lambda x: 9}, {})
while True:
    calls.answer(*calls.receive()[1:])
"""
SHADOWS = {
    "abs": ("def abs(x): return 0", "assert abs(mean([1, 2]) - 1.5) < 1e-6"),
    "set": ("def set(x): return 1", "assert set(mean((3, 4))) == set((4, 5))"),
    "range": ("def range(*a): return []", "for i in range(3):\n    assert mean([i]) == i"),
    "a module": (
        "class math:\n    isclose = staticmethod(lambda *a, **k: True)",
        "import math as m\nassert math.isclose(mean([1, 2]), 1.5)",
    ),
    "its built-ins": (BY_PIPE, "assert abs(mean([1, 2]) - 1.5) < 1e-6"),
}


@pytest.mark.parametrize("name", SHADOWS)
def test_the_code_says_nothing_in_place_of_what_is_pythons(name: str) -> None:
    code, test = SHADOWS[name]
    assert passed(f"def mean(x): return 7\n{code}\n", [test]) == [False]


def test_what_is_tested_may_have_a_name_of_pythons() -> None:
    code = "import math\ndef total(x): return 3\ndef sum(a, b): return a + b\ndef abs(x): return 0\nnumbers = total\n"
    assert passed(code, ["assert sum(1, 2) == 3", "assert sum(2, 2) == 4"]) == [True, True]
    assert passed(code, ["assert numbers(5) == 3 and math.sqrt(9) == total(1)"]) == [True]
    assert passed(code, ["assert abs(sum(1, 2) - 9) < 1"]) == [False]


REFUSED = {
    "kills its parent": "os.kill(os.getppid(), signal.SIGKILL)",
    "kills its group": "os.killpg(0, signal.SIGKILL)",
    "limits its parent": "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
    "has the kernel kill its parent": "r, w = os.pipe()\nfcntl.fcntl(r, 10, signal.SIGKILL)\n"
    "fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())\nfcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')",
    "the same by ioctl": "fcntl.ioctl(socket.socketpair()[0], 0x8901, os.getppid().to_bytes(4, 'little'))",
    "slows its parent down": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "forks": "os.fork()",
    "starts a thread": "threading.Thread(target=print).start()",
    "starts a program": "subprocess.run(['true'])",
    "becomes a program": "os.execv('/bin/true', ['true'])",
    "opens a socket": "socket.socket()",
    "a socket that reaches others": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "leaves shared memory": "if ctypes.CDLL(None).shmget(1, 4096, 0o1600) < 0: raise OSError",
    "gives itself a user namespace": "if ctypes.CDLL(None).unshare(0x10000000): raise OSError",
    "ptrace": "if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0): raise OSError",
    "10 GB": "x = bytearray(10 << 30)",
    "10 GB bit by bit": "[bytearray(1 << 24) for _ in range(640)]",
}


@pytest.mark.parametrize("attempt", REFUSED)
def test_what_reaches_out_is_refused(attempt: str) -> None:
    """The code goes on after what is refused, and says that it was."""
    tried = REFUSED[attempt].replace("\n", "\n    ")
    code = f"""
import ctypes, fcntl, os, resource, signal, socket, subprocess, threading
refused = False
def add(a, b): return a + b
try:
    {tried}
except (OSError, RuntimeError, MemoryError):
    refused = True
def was_refused(): return refused
"""
    assert passed(code, ["assert was_refused()", *TESTS]) == [True, True, True]


@pytest.mark.parametrize(
    "code",
    [
        "import sys\ndef add(a, b):\n    frame, found = sys._getframe(), []\n    while frame:\n"
        "        found.append(repr(frame.f_locals) + repr(frame.f_globals)); frame = frame.f_back\n"
        "    return '\\n'.join(found)",
        "import gc\ndef add(a, b): return repr([o for o in gc.get_objects() if type(o) in (list, dict, tuple)])",
        "import sys\ndef add(a, b): return repr(sys.argv) + repr(sys.orig_argv)",
    ],
    ids=["stack", "heap", "command"],
)
def test_code_cannot_read_its_tests(code: str) -> None:
    """The function returns all that it finds; the tests look whether they are in it."""
    secret = "31337" + "4242"
    tests = [f"found = add(1, 2)\nassert found and '{secret}' not in found"]
    assert passed(code, tests) == [True]


def test_code_cannot_read_other_processes_or_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET_KEY", "sk-abc")
    (tmp_path / "secret").write_text("here")
    code = f"""
import os
def look(path):
    try:
        return open(path, "rb").read()
    except OSError:
        return None
def places(): return [f"/proc/{{os.getppid()}}/environ", "/proc/self/environ", "/proc/self/maps", "/etc/passwd",
                      "/root/.bashrc", {str(tmp_path / "secret")!r}, {str(Path(__file__))!r}]
def variables(): return dict(os.environ)
"""
    tests = ["assert not any(map(look, places()))", "assert 'SECRET_KEY' not in variables()"]
    assert passed(code, tests) == [True, True]


def test_code_writes_in_its_folder_alone(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")
    victim.chmod(0o644)
    before = victim.stat()
    code = f"""
import os, pathlib
victim = {str(victim)!r}
inside = pathlib.Path("mine.txt")
inside.write_text("x")
def text(): return inside.read_text()
actions = {{
    "write": lambda: open(victim, "w"),
    "append": lambda: open(victim, "a"),
    "truncate": lambda: os.truncate(victim, 0),
    "empty by reading": lambda: os.open(victim, os.O_RDONLY | os.O_TRUNC),
    "create": lambda: open(victim + "2", "w"),
    "remove": lambda: os.remove(victim),
    "rename": lambda: os.rename("mine.txt", victim),
    "link": lambda: os.link(victim, "link"),
    "follow": lambda: (os.symlink(victim, "soft"), open("soft", "w")),
    "mode": lambda: os.chmod(victim, 0),
    "owner": lambda: os.chown(victim, 1, 1),
    "times": lambda: os.utime(victim, (0, 0)),
    "attribute": lambda: os.setxattr(victim, "user.a", b"1"),
    "folder": lambda: os.mkdir({str(tmp_path / "new")!r}),
    "socket": lambda: os.mknod({str(tmp_path / "node")!r}),
    "shared memory": lambda: open("/dev/shm/litrecipes-test", "w"),
    "Python": lambda: open(os.__file__, "a"),
}}
def attempt(name):
    try:
        actions[name]()
    except OSError:
        return "refused"
"""
    names = re.findall(r'^    "([^"]+)": lambda', code, re.MULTILINE)
    assert len(names) == 17
    tests = ["assert text() == 'x'", *(f"assert attempt({name!r}) == 'refused'" for name in names)]
    assert dict(zip(["inside", *names], passed(code, tests), strict=True)) == dict.fromkeys(["inside", *names], True)
    after = victim.stat()
    assert victim.read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["victim"]
    assert (after.st_mode, after.st_uid, after.st_mtime, after.st_nlink) == (
        before.st_mode, before.st_uid, before.st_mtime, 1,
    )  # fmt: skip


def test_no_network() -> None:
    """A server that would be reached listens here."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        address = server.getsockname()
        code = (
            f"import socket\ndef call():\n    try: socket.create_connection({address!r})\n    except OSError: return 1"
        )
        assert passed(code, ["assert call() == 1"]) == [True]
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    ("code", "stopped", "limits"),
    [
        ("while True: pass", "seconds", Limits(1.0, 512 << 20, 8 << 20)),
        ("import time\ntime.sleep(99)", "seconds", Limits(1.0, 512 << 20, 8 << 20)),
        ("import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, "
         "ValueError): pass\nwhile True: pass", "seconds", Limits(1.0, 512 << 20, 8 << 20)),
        ("i = 0\nwhile True:\n    open(f'f{i}', 'wb').write(bytes(1 << 20)); i += 1", "disk", LIMITS),
        ("i = 0\nwhile True:\n    open(f'f{i}', 'wb'); i += 1", "disk", LIMITS),
    ],
    ids=["loops", "sleeps", "loops without signals", "fills the disk", "makes files"],
)  # fmt: skip
def test_limits(code: str, stopped: str, limits: Limits) -> None:
    start = time.monotonic()
    outcome = run_tests(f"{ADD}\n{code}", "", TESTS, limits, unsafe=False)
    assert outcome.stopped == stopped
    assert outcome.passed == [False, False]
    assert time.monotonic() - start < 8


def test_tests_that_passed_before_a_limit_count() -> None:
    code = "def add(a, b):\n    while a < 0: pass\n    return a + b\n"
    assert passed(code, limits=Limits(1.5, 512 << 20, 8 << 20)) == [True, False]


def test_a_gigabyte_printed_is_kept_nowhere() -> None:
    code = f"{ADD}\nfor i in range(1024): print('x' * (1 << 20))"
    assert passed(code) == [True, True]
    assert passed("def add(a, b): return 'x' * (1 << 25)") == [False, False]  # nor returned


def test_a_file_has_a_longest_size() -> None:
    code = "def size():\n    with open('big', 'wb') as f:\n        f.truncate(1 << 40)"
    assert passed(f"{code}\ndef add(a, b): return a + b\nsize()") == [False, False]


def test_whatever_was_started_is_dead_at_the_end(tmp_path: Path) -> None:
    """Also where the first process is killed in the middle."""
    mark = f"mark{os.getpid()}"
    job = {"code": f"{mark} = 1\nwhile True: pass", "unsafe": False}
    job["limits"] = {"seconds": 60, "memory": 1 << 29, "disk": 1 << 20}
    frames = b""
    for content in (job, {"setup": "", "tests": ["pass"]}):
        data = json.dumps(content).encode()
        frames += len(data).to_bytes(4, sys.byteorder) + data
    process = subprocess.Popen(
        [sys.executable, "-s", "-P", "-B", "-c", START, ROOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        cwd=tmp_path, start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(frames)
    process.stdin.flush()
    until(lambda: len(children(process.pid)) == 2)
    left = children(process.pid)
    time.sleep(0.5)
    process.kill()
    process.wait()
    until(lambda: not any(alive(child) for child in left))


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def until(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_each_wall_is_missed_where_it_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe is no formality: in a process without walls each attempt succeeds."""
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(PROBE, space)
    assert [name for name in ATTEMPTS if space["attempt"](name)] == []


@pytest.mark.parametrize("version", [1, 2, 3])
def test_older_kernels_hold_too(version: int, tmp_path: Path) -> None:
    """With the rights that an older Landlock knows, and the filter of system calls, a file outside stays as it is."""
    (tmp_path / "own").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("whole")
    program = f"""
import os, sys
from llm_modules.evaluation.containment import landlock
from llm_modules.evaluation.syscall_filter import filter_system_calls
assert landlock({str(tmp_path / "own")!r}, {version}) is None and filter_system_calls() is None
actions = [lambda: open({str(victim)!r}, "w"), lambda: os.truncate({str(victim)!r}, 0),
    lambda: os.remove({str(victim)!r}), lambda: os.open({str(victim)!r}, os.O_RDONLY | os.O_TRUNC),
    lambda: os.open({str(victim)!r}, 3 | os.O_TRUNC),
    lambda: os.link({str(victim)!r}, {str(tmp_path / "own" / "link")!r}),
    lambda: os.rename({str(victim)!r}, {str(tmp_path / "own" / "moved")!r})]
for number, action in enumerate(actions):
    try:
        action()
    except OSError:
        continue
    sys.exit(f"action {{number}} succeeded")
open({str(tmp_path / "own" / "file")!r}, "w").close()
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"PYTHONPATH": ROOT})
    assert victim.read_text() == "whole"


@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")],
)
def test_numbers_of_system_calls_are_the_kernels(column: int, header: str) -> None:
    if not Path(header).is_file():
        pytest.skip("needs the kernel's headers (linux-libc-dev)")
    defined = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()))
    defined.setdefault("newfstatat", defined.get("fstatat", ""))
    for entry in [*ALLOWED.split(), *CONDITIONAL]:
        name, *numbers = entry.split(":")
        assert defined.get(name, "-") == numbers[column], entry
