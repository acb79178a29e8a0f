"""Runs code against its tests: the program of the process that ``CodeTests`` starts, on the standard library alone.

Three processes. The first watches the time and the folder, and kills the other two. The second holds the answer's code,
the third the tests; both are confined before they run a line of it, and meet through ``Calls`` only. The second is
forked before the tests have been read, so they are nowhere in its memory, on no stack and in no file.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

from llm_modules.evaluation.code_calls import Calls
from llm_modules.evaluation.containment import confine, die_with_parent

READY, PASSED, FAILED, BROKEN = b".", b"1", b"0", b"!"
"""What the tests' process reports, a byte each; BROKEN is followed by a reason: it could not be confined."""
PERIOD = 0.05
"""Seconds between two looks at the folder."""
MOST_FILES = 1000


def main() -> None:
    """Reads two frames of JSON, the code with its limits and the tests; writes one line: passed, stopped, broken."""
    die_with_parent()
    job = json.loads(_frame())
    end = time.monotonic() + job["limits"]["seconds"]
    answers_in, asks_out = os.pipe()
    asks_in, answers_out = os.pipe()
    code = _fork(lambda: _serve(job, Calls(answers_in, answers_out, whole=True)), [answers_in, answers_out])
    os.close(answers_in)
    os.close(answers_out)
    tests = json.loads(_frame())
    report_in, report_out = os.pipe()
    tester = _fork(
        lambda: _test(job, tests, Calls(asks_in, asks_out, whole=False), report_out), [asks_in, asks_out, report_out]
    )
    for descriptor in (asks_in, asks_out, report_out):
        os.close(descriptor)
    report, stopped = _watch(report_in, end, job["limits"])
    for process in (code, tester):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    head, _, reason = report.partition(BROKEN)
    broken = reason.decode() if BROKEN in report else None if head.startswith(READY) else "it did not start"
    print(json.dumps({"passed": [byte == PASSED[0] for byte in head[1:]], "stopped": stopped, "broken": broken}))


def _serve(job: dict[str, Any], calls: Calls) -> None:
    """The process of the answer's code."""
    try:
        _confine(job)
    except (OSError, RuntimeError, ValueError) as error:
        calls.send("broken", f"{error}")
        return
    calls.send("ready")
    space: dict[str, Any] = {"__name__": "answer"}
    try:
        exec(compile(job["code"], "answer", "exec"), space)
    except BaseException as error:  # noqa: BLE001 - told to the tests' process, in which nothing then passes
        calls.send("failed", f"{type(error).__name__}")
        return
    module = type(sys)
    names = {name: value for name, value in space.items() if not name.startswith("__")}
    modules = {name: value.__name__ for name, value in names.items() if isinstance(value, module)}
    calls.send("names", {name: value for name, value in names.items() if name not in modules}, modules)
    while True:
        calls.answer(*calls.receive()[1:])


def _test(job: dict[str, Any], tests: dict[str, Any], calls: Calls, report: int) -> None:
    """The process of the tests; a byte for each in their order."""
    try:
        _confine(job)
        kind, *content = calls.receive()
        if kind != "ready":
            raise RuntimeError(content[0])
    except Exception as error:  # noqa: BLE001 - an error of the reward, not of the answer
        os.write(report, BROKEN + f"{type(error).__name__}: {error}".encode())
        return
    os.write(report, READY)
    kind, *content = calls.receive()
    if kind != "names":
        return
    values, modules = content
    space = {**_own(values, [tests["setup"], *tests["tests"]]), "__name__": "tests", "__builtins__": builtins}
    for name, module in modules.items():
        if module.split(".")[0] in sys.stdlib_module_names:  # the code's imports serve the tests, too
            with contextlib.suppress(ImportError):
                __import__(module)
                space[name] = sys.modules[module]
    exec(compile(tests["setup"], "setup", "exec"), space)
    for test in tests["tests"]:
        try:
            exec(compile(test, "test", "exec"), dict(space))
        except BaseException:  # noqa: BLE001 - a test that does not pass
            os.write(report, FAILED)
        else:
            os.write(report, PASSED)


def _own(values: dict[str, Any], sources: list[str]) -> dict[str, Any]:
    """What the tests get of the code. Nothing in the place of Python's own names, which could make everything equal: an
    ``abs`` that is always 0. What is tested may have such a name itself, if it is all that is read of the code."""
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    read = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    python = {*dir(builtins), *(read & sys.stdlib_module_names)}  # math of math.isclose, not numbers of numbers(3)
    values = {name: value for name, value in values.items() if not name.startswith("__")}
    return values if len(used & values.keys()) == 1 else {k: v for k, v in values.items() if k not in python}


def _watch(report: int, end: float, limits: dict[str, Any]) -> tuple[bytes, str | None]:
    """What the tests' process says until it ends or a limit is reached, and which."""
    said = b""
    while (left := end - time.monotonic()) > 0:
        if select.select([report], [], [], min(PERIOD, left))[0]:
            part = os.read(report, 65536)
            if not part:
                return said, None
            said += part
        if _too_much(limits["disk"]):
            return said, "disk"
    return said, "seconds"


def _too_much(disk: int) -> bool:
    """Whether the working folder holds more than so many bytes, or too many files."""
    total = 0
    with os.scandir(".") as entries:
        for number, entry in enumerate(entries):
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_blocks * 512
            if number >= MOST_FILES or total > disk:
                return True
    return False


def _fork(work: Callable[[], None], keep: list[int]) -> int:
    """The id of a process that does the work, without any file of this one but ``keep``."""
    process = os.fork()
    if process:
        return process
    try:
        die_with_parent()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        first = 3
        for descriptor in sorted(keep):
            os.closerange(first, descriptor)
            first = descriptor + 1
        os.closerange(first, os.sysconf("SC_OPEN_MAX"))
        work()
    finally:
        os._exit(0)


def _confine(job: dict[str, Any]) -> None:
    limits = job["limits"]
    seconds = int(limits["seconds"]) + 1
    confine(os.getcwd(), seconds=seconds, memory=limits["memory"], file_size=limits["disk"], unsafe=job["unsafe"])


def _frame() -> bytes:
    """What stdin holds next, after its length; read without a buffer, which would hold what comes after it."""
    size = struct.unpack("=I", _exactly(4))[0]
    return _exactly(size)


def _exactly(size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            raise EOFError("the job ends too early")
        data += part
    return data
