"""A reward of code: the share of its tests that it passes, in a process that cannot reach anything else."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm_modules.evaluation.rewards import Answer, Reward, RowError

ROOT = str(Path(__file__).resolve().parent.parent.parent)
START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from llm_modules.evaluation.code_process import main; "
    "sys.path.remove(sys.argv[1]); main()"
)
GRACE = 30.0
"""Seconds beyond its own limit that a process gets to start and to end."""
MEBIBYTE = 1 << 20
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")
"""Variables that the process gets; all others, with their secrets, stay here."""

FENCE = re.compile(r"^[ ]{0,3}```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ ]{0,3}```|\Z)", re.MULTILINE | re.DOTALL)

PROBE = """
import os, socket

def refused(action):
    try:
        action()
    except OSError:
        return True
    return False

def forks():
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)

def writes():
    open("/tmp/litrecipes-probe", "w").close()
    os.remove("/tmp/litrecipes-probe")

def changes():
    open("probe", "a").close()
    os.chmod("probe", 0o600)

def attempt(name):
    return refused({
        "start a process": forks,
        "open a socket": lambda: socket.socket(),
        "signal its parent": lambda: os.kill(os.getppid(), 0),
        "list the root folder": lambda: os.listdir("/"),
        "write outside its folder": writes,
        "change a file's mode": changes,
        "read another process": lambda: open("/proc/self/environ"),
    }[name])
"""
ATTEMPTS = (
    "start a process",
    "open a socket",
    "signal its parent",
    "list the root folder",
    "write outside its folder",
    "change a file's mode",
    "read another process",
)


@dataclass(frozen=True)
class Limits:
    """Of one answer: seconds (wall clock, and CPU in each process), bytes of memory, bytes on disk."""

    seconds: float
    memory: int
    disk: int


@dataclass(frozen=True)
class Outcome:
    """Which tests passed, and the limit that ended them early (``seconds``, ``disk``)."""

    passed: list[bool]
    stopped: str | None


class CodeTests(Reward):
    """The share of a row's tests that the answer's Python code passes, or 1 for all of them and else 0.

    The code is what the answer has in ``` fences (those marked as Python, or the first), or all of it. A ``prompt``
    column with code that it goes on with (HumanEval) is put before it. Code and tests run in two processes that
    exchange plain data only: code cannot read its tests, report them as passed, or return what equals everything.

    On Linux (5.13, x86_64 or aarch64) both may read Python and the system's libraries, write files in an empty folder
    of their own, and nothing else: no process, thread, program, signal or socket, no environment, no capability of
    root. That is tried out when this class is made; README.md says what it rests on.

    Args:
        tests: the row's column with its tests: a list of statements (MBPP), each a test, or a program (HumanEval).
        setup: the column with what runs before the tests; may be missing or empty.
        entry_point: the column with a function's name, which the tests' ``check`` is called with; may be missing.
        prompt: the column with code that the answer goes on with; may be missing.
        score: `share` of the tests passed; `all`: 1 if all passed, else 0.
        seconds: longest run of an answer's tests together, wall clock.
        memory: MiB of address space of each of the two processes.
        disk: MiB of files.
        workers: answers that run at once; None: as many as CPUs, at most 8.
        unsafe: run where the code cannot be contained as said above, with what of it this system has.
        weight: as of ``Reward``.
        name: as of ``Reward``.
    """

    def __init__(
        self,
        tests: str = "test_list",
        setup: str = "test_setup_code",
        entry_point: str = "entry_point",
        prompt: str = "prompt",
        score: Literal["share", "all"] = "share",
        seconds: float = 10.0,
        memory: int = 1024,
        disk: int = 16,
        workers: int | None = None,
        unsafe: bool = False,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if score not in ("share", "all"):
            raise ValueError(f"rewards.{self.name}.score: {score!r} is not allowed; allowed: share, all")
        for key, value, least in (("seconds", seconds, 0.1), ("memory", memory, 64), ("disk", disk, 1),
                                  ("workers", workers or 1, 1)):  # fmt: skip
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"rewards.{self.name}.{key}: {value} is not allowed; allowed: {least} or more")
        self.tests, self.setup, self.entry_point, self.prompt = tests, setup, entry_point, prompt
        self.kind, self.unsafe = score, unsafe
        self.limits = Limits(seconds, memory * MEBIBYTE, disk * MEBIBYTE)
        self.workers = workers or min(8, os.cpu_count() or 1)
        if not unsafe and (problem := containment_problem()):
            raise ValueError(
                f"rewards.{self.name}: code cannot be contained here: {problem}; run where it can (Linux 5.13 with "
                "Landlock and seccomp), or set unsafe: true to run it as you would run your own"
            )

    def score(self, answers: Sequence[Answer]) -> list[float]:
        jobs = [(answer, self._code(answer), *self._tests(answer)) for answer in answers]  # data first, all of it
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda job: self._run(*job), jobs))

    def check(self, asked: Answer) -> None:
        self._tests(asked)

    def _run(self, answer: Answer, code: str, setup: str, tests: list[str]) -> float:
        try:
            outcome = run_tests(code, setup, tests, self.limits, unsafe=self.unsafe)
        except (OSError, RuntimeError) as error:
            raise RowError(answer.row, f"the tests could not be run: {error}") from error
        return sum(outcome.passed) / len(tests) if self.kind == "share" else float(sum(outcome.passed) == len(tests))

    def _code(self, answer: Answer) -> str:
        code = extract_code(answer.text)
        begun = answer.fields.get(self.prompt)
        goes_on = isinstance(begun, str) and isinstance(answer.fields.get(self.entry_point), str)
        return f"{begun}\n{code}" if goes_on else code

    def _tests(self, answer: Answer) -> tuple[str, list[str]]:
        """The code that runs before the tests, and these."""
        fields = answer.fields
        tests, setup, entry = fields.get(self.tests), fields.get(self.setup) or "", fields.get(self.entry_point)
        if isinstance(tests, str) and tests.strip():
            tests = [f"{tests}\n\ncheck({entry})\n" if isinstance(entry, str) else tests]
        if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
            there = ", ".join(map(str, fields)) or "none"
            raise RowError(
                answer.row, f"no tests in column {self.tests!r} (set `tests`); there are the columns {there}"
            )
        for column, source in ((self.setup, setup), *((self.tests, test) for test in tests)):
            try:
                compile(source, column, "exec")  # parsed, not run
            except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
                raise RowError(answer.row, f"column {column!r} is no Python: {error}") from error
        return setup, tests


def extract_code(text: str) -> str:
    """The code in ``` fences: all blocks that are marked as Python one after another, or the first, or all text."""
    blocks = FENCE.findall(text)
    python = [code for mark, code in blocks if mark.lower() in ("python", "py", "python3")]
    return "\n".join(python or [code for _, code in blocks[:1]] or [text])


def run_tests(code: str, setup: str, tests: list[str], limits: Limits, *, unsafe: bool) -> Outcome:
    """Runs code against its tests, contained; when it returns, whatever ran is dead.

    Args:
        code: defines what the tests use.
        setup: runs before the tests, beside them.
        tests: each passes if it raises nothing.
        limits: beyond which the rest of the tests has failed.
        unsafe: go on without the walls that this system cannot build.

    Raises:
        RuntimeError: the processes could not be started or confined.
    """
    with tempfile.TemporaryDirectory(prefix="litrecipes-code-") as folder:
        folder = os.path.realpath(folder)
        job = {"code": code, "limits": vars(limits), "unsafe": unsafe}
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ} | {
            "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-B", "-c", START, ROOT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            cwd=folder, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            said, problem = process.communicate(
                _frame(job) + _frame({"setup": setup, "tests": tests}), limits.seconds + GRACE
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"no end {GRACE:g} s after the limit") from error
        finally:
            _kill_group(process)
    try:
        result = json.loads(said)
    except ValueError as error:
        raise RuntimeError((problem.decode(errors="replace").strip().splitlines() or ["no result"])[-1]) from error
    if result["broken"] is not None:
        raise RuntimeError(result["broken"])
    passed = result["passed"][: len(tests)]
    return Outcome(passed + [False] * (len(tests) - len(passed)), result["stopped"])


@functools.cache
def containment_problem() -> str | None:
    """What code could do here in spite of the walls, tried out; None: nothing of it."""
    limits = Limits(20.0, 512 * MEBIBYTE, MEBIBYTE)
    tests = [f"assert attempt({name!r})" for name in ATTEMPTS]
    try:
        outcome = run_tests(PROBE, "", tests, limits, unsafe=False)
    except (OSError, RuntimeError) as error:
        return str(error)
    possible = [name for name, passed in zip(ATTEMPTS, outcome.passed, strict=True) if not passed]
    return f"it could {', '.join(possible)}" if possible else None


def _frame(content: dict[str, Any]) -> bytes:
    data = json.dumps(content).encode()
    return struct.pack("=I", len(data)) + data


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Whatever is left of the process and those that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
