"""Real processes of a group, as a launcher starts them, forked from one that has imported everything.

A launch by torchrun spends 20 s of two cores on imports; all tests of a worker share these. The processes can be killed
as others can, are in a process group of their own, and leave what they say in ``rank<n>.log`` of their folder. Tests of
launchers start their own.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_SERVER: list[subprocess.Popen[str]] = []


def run_command(folder: Path, words: list[str], ranks: int = 2, timeout: float = 590) -> list[int]:
    """The exit statuses of the ranks of ``recipes WORDS`` in ``folder``; one rank is what a shell starts."""
    return _run({"call": "recipes.__main__:main", "arguments": [words], "folder": str(folder), "ranks": ranks}, timeout)


def run_program(call: str, *arguments: Any, folder: Path, ranks: int = 2, timeout: float = 590) -> None:
    """Each rank calls ``module:function`` with the arguments (as JSON has them); all of them are to end well."""
    run = {"call": call, "arguments": list(arguments), "folder": str(folder), "ranks": ranks}
    statuses = _run(run, timeout)
    assert set(statuses) == {0}, f"{statuses}\n{said(folder)}"


def said(folder: Path) -> str:
    """The ends of what the ranks said."""
    return "\n".join(f"{log.name}: {log.read_text()[-4000:]}" for log in sorted(folder.glob("rank*.log")))


def _run(run: dict[str, Any], timeout: float) -> list[int]:
    if not _SERVER or _SERVER[0].poll() is not None:
        _SERVER[:] = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.ranks"],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        ]
    server = _SERVER[0]
    assert server.stdin is not None
    assert server.stdout is not None
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    server.stdin.write(json.dumps(run | {"environment": dict(environment)}) + "\n")
    server.stdin.flush()
    if not select.select([server.stdout], [], [], timeout)[0]:
        server.kill()  # and with it the ranks
        raise AssertionError(f"{run} hung:\n{said(Path(run['folder']))}")
    statuses: list[int] = json.loads(server.stdout.readline())
    return statuses


def _serve() -> None:
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in (
        "deepspeed", "transformers.models.llama.modeling_llama", "callbacks.checkpoint_folder", "recipes.cli",
        "llm_modules.language_model", "recipes.preview", "recipes.trainer_verbs",
    ):  # fmt: skip
        import_module(name)  # what runs import, and nothing that starts threads
    for line in sys.stdin:
        run = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids: list[int] = []
        for number in range(run["ranks"]):
            pids.append(_start(number, pids[0] if pids else 0, port, run))
        answers.write(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]) + "\n")
        answers.flush()


def _start(number: int, group: int, port: int, run: dict[str, Any]) -> int:
    """One rank; returns its process id."""
    pid = os.fork()
    if pid:
        os.setpgid(pid, group or pid)
        return pid
    status = 70
    try:
        _end_with_parent()
        os.setpgid(0, group)
        os.chdir(run["folder"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(f"rank{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.clear()
        os.environ |= run["environment"]
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if (ranks := run["ranks"]) > 1:
            os.environ |= {
                "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks), "GROUP_RANK": "0",
                "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": str(port),
            }  # fmt: skip
        module, _, function = run["call"].partition(":")
        status = getattr(import_module(module), function)(*run["arguments"]) or 0
        atexit._run_exitfuncs()  # what a process does that ends by itself: files of a drive are removed
    except BaseException:  # noqa: BLE001  # a fork must not go on with what its parent does
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    _serve()
