"""Runs of the command on two processes, one after another, forked from a process that has imported everything.

``python -m tests.distributed.forked_runs RUNS.json`` prints the exit statuses of each run's ranks. The ranks are real
processes of a group of their own, as a launcher's are (and can be killed as these can); a run of them by torchrun would
take 20 s of imports.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

WORLD = 2


def warm_up() -> None:
    """Import what runs import, and nothing that starts threads."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in (
        "deepspeed", "transformers.models.llama.modeling_llama", "callbacks.checkpoint_folder", "recipes.cli",
        "llm_modules.language_model", "recipes.preview", "recipes.trainer_verbs",
    ):  # fmt: skip
        import_module(name)


def rank(number: int, group: int, port: int, run: dict[str, Any]) -> int:
    """Starts one rank; returns its process id."""
    pid = os.fork()
    if pid:
        os.setpgid(pid, group or pid)
        return pid
    status = 70
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not left behind by a launcher that is stopped
        os.setpgid(0, group)
        os.chdir(run["folder"])
        log = os.open(f"rank{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {
            "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD),
            "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": str(port),
        }  # fmt: skip
        from recipes.__main__ import main

        status = main(run["words"])
    except BaseException:  # noqa: BLE001  # a fork must not go on with what its parent does
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(runs: list[dict[str, Any]]) -> list[list[int]]:
    warm_up()
    statuses = []
    for run in runs:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        first = rank(0, 0, port, run)
        others = [rank(number, first, port, run) for number in range(1, WORLD)]
        statuses.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (first, *others)])
    return statuses


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
