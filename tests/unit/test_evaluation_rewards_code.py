"""Code is scored by its tests, whatever it does; hostile code passes nothing and harms nothing.

What hostile code attempts is real, run for real; each attempt is told apart from code that merely fails by a look at
what it would have left behind.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llm_modules.evaluation import Answer, CodeTests
from llm_modules.evaluation.code_tests import (
    ATTEMPTS,
    PROBE,
    ROOT,
    START,
    Limits,
    containment_problem,
    extract_code,
    run_tests,
)
from llm_modules.evaluation.syscall_filter import ALLOWED, CONDITIONAL

pytestmark = pytest.mark.skipif(containment_problem() is not None, reason=f"no containment: {containment_problem()}")

LIMITS = Limits(10.0, 512 << 20, 8 << 20)
ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


def answer(text: str, row: int = 7, **fields: Any) -> Answer:
    return Answer(row, "", text, "", {"test_list": TESTS} | fields, 1, True)


def passed(code: str, tests: list[str] = TESTS, setup: str = "", limits: Limits = LIMITS) -> list[bool]:
    return run_tests(code, setup, tests, limits, unsafe=False).passed


def test_right_and_wrong_and_half_right() -> None:
    half = "def add(a, b):\n    return 3\n"
    answers = [answer(ADD), answer(half), answer("def add(a, b): return a - b"), answer("no code at all")]
    assert CodeTests()(answers) == [1.0, 0.5, 0.0, 0.0]
    assert CodeTests(score="all")(answers) == [1.0, 0.0, 0.0, 0.0]


def test_a_program_of_tests_with_an_entry_point_goes_on_with_the_prompt() -> None:
    fields = {"prompt": "import math\ndef root(x):\n    '''The root.'''\n", "entry_point": "root"}
    fields["test_list"] = "def check(candidate):\n    assert candidate(9) == 3\n"
    whole = "```python\ndef root(x):\n    return x ** 0.5\n```"
    texts = ["    return math.sqrt(x)", whole, "    return x"]
    assert CodeTests()([answer(text, **fields) for text in texts]) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("Look:\n```python\nx = 1\n```\nand\n```\n1\n```", "x = 1\n"),
        ("```py\nx = 1\n```\n```Python\ny = 2\n```", "x = 1\n\ny = 2\n"),
        ("```\n    x = 1\n```", "    x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("```python title=a.py\nx = '```'\n```", "x = '```'\n"),
    ],
)
def test_code_is_found_in_fences(text: str, code: str) -> None:
    assert extract_code(text) == code


def test_values_pass_between_code_and_tests_as_they_are() -> None:
    code = """
import re, collections, decimal, enum
Point = collections.namedtuple("Point", "x y")
class Colour(enum.IntEnum):
    RED = 1
class Node:
    def __init__(self, value): self.value, self.next = value, None
    def __eq__(self, other): return self.value == other.value
def echo(*values, **named): return values[0] if values else named
def count(text): return collections.Counter(text)
def point(): return Point(1, 2)
def colour(): return [Colour.RED]
def numbers(n):
    for i in range(n): yield i
def sort(values): values.sort()
def chain(node):
    while node.next: node = node.next
    return node.value
def apply(function, value): return function(value)
def broken(x): raise KeyError(x)
def node(value): return Node(value)
"""
    tests = [
        "for value in (1, 1.5, 'a', b'a', None, True, [1, [2]], (1,), {1: {2}}, {1, 2}, frozenset([1]), range(3)):\n"
        "    assert echo(value) == value and type(echo(value)) is type(value)",
        "assert count('aab') == {'a': 2, 'b': 1}",
        "assert point() == (1, 2)",
        "assert colour() == [1]",
        "assert list(numbers(3)) == [0, 1, 2] and next(numbers(1)) == 0",
        "values = [3, 1, 2]\nsort(values)\nassert values == [1, 2, 3]",
        "a = Node(1)\na.next = Node(2)\nassert chain(a) == 2 and a.next.value == 2",
        "assert apply(lambda x: x + 1, 2) == 3",
        "try:\n    broken('x')\nexcept KeyError:\n    pass\nelse:\n    raise AssertionError",
        "assert re.fullmatch('a', echo('a'))",
        "assert node(3) == Node(3) and node(3) != Node(4)",
        "assert echo(key=2) == {'key': 2}",
    ]
    assert passed(code, tests) == [True] * len(tests)


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
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "kills its group": "import os, signal\nos.killpg(0, signal.SIGKILL)",
    "limits its parent": "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
    "has the kernel kill its parent": "import os, fcntl, signal\nr, w = os.pipe()\nfcntl.fcntl(r, 10, signal.SIGKILL)\n"
    "fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())\nfcntl.fcntl(r, fcntl.F_SETFL, fcntl.O_ASYNC)\nos.write(w, b'x')",
    "forks": "import os\nos.fork()",
    "starts a thread": "import threading\nthreading.Thread(target=print).start()",
    "starts a program": "import subprocess\nsubprocess.run(['true'])",
    "becomes a program": "import os\nos.execv('/bin/true', ['true'])",
    "opens a socket": "import socket\nsocket.socket()",
    "gives itself a user namespace": "import ctypes, os\nif ctypes.CDLL(None).unshare(0x10000000): raise OSError",
    "ptrace": "import ctypes, os\nif ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0): raise OSError",
    "10 GB": "x = bytearray(10 << 30)",
    "10 GB bit by bit": "x = []\nwhile True: x.append(bytearray(1 << 24))",
}


@pytest.mark.parametrize("attempt", FORGED)
def test_nothing_passes_that_is_not_right(attempt: str) -> None:
    code = FORGED[attempt]
    if "def add" not in code:
        code += f"\n{ADD}"  # it would pass if what it attempts were possible
    start = time.monotonic()
    assert passed(code) == [False, False]
    assert time.monotonic() - start < 9


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


def test_several_run_at_once() -> None:
    answers = [answer(f"import time\ntime.sleep(1)\n{ADD}") for _ in range(4)]
    before = threading.active_count()
    start = time.monotonic()
    assert CodeTests(workers=4)(answers) == [1.0] * 4
    assert time.monotonic() - start < 3.5
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"test_list": []}, "row 7: no tests in column 'test_list'"),
        ({"test_list": None}, "row 7: no tests in column 'test_list'"),
        ({"test_list": ["assert ("]}, "row 7: column 'test_list' is no Python"),
        ({"test_setup_code": "def"}, "row 7: column 'test_setup_code' is no Python"),
    ],
)
def test_data_without_tests_is_an_error(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        CodeTests()([answer(ADD, **fields)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [("seconds", 0), ("seconds", float("nan")), ("memory", 1), ("disk", 0), ("workers", -1), ("score", "most")],
)
def test_options_are_checked(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"rewards.code_tests.{option}: .* is not allowed; allowed: "):
        CodeTests(**{option: value})


def test_where_code_cannot_be_contained_it_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_modules.evaluation.code_tests.containment_problem", lambda: "the kernel has no Landlock")
    with pytest.raises(ValueError, match=r"cannot be contained here: the kernel has no Landlock; .* set unsafe: true"):
        CodeTests()
    assert CodeTests(unsafe=True)([answer(ADD)]) == [1.0]


def test_a_python_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = CodeTests()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="code_tests: row 7: the tests could not be run: "):
        reward([answer(ADD)])


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
