"""What a process can know of its fellow processes before they are connected.

Rank 0 may have started the others itself (Lightning's launcher) or stand beside them (torchrun, Slurm). Preparing data
takes longer than a connection waits, so it is done before there is one.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PARENT = os.getppid()  # the launcher, or rank 0 that started this process
_WORD = 10.0  # seconds in which rank 0 comes to the same mistake, and the launcher ends the others

FOLDER_VARIABLE = "LITRECIPES_RUN_FOLDER"  # set by rank 0 for the ranks that Lightning starts from its process


def told_folder() -> Path | None:
    """The run's folder, in a process that rank 0 started."""
    told = os.environ.get(FOLDER_VARIABLE)
    if not job_id().startswith("process"):
        return None  # a launcher started us, not rank 0: what is there was left behind by another run
    return Path(told) if told is not None and int(os.environ.get("LOCAL_RANK", "0")) > 0 else None


def tell_folder(folder: Path | None) -> None:
    """None: the run is over."""
    os.environ.pop(FOLDER_VARIABLE, None)
    if folder is not None:
        os.environ[FOLDER_VARIABLE] = str(folder)


def under_srun() -> bool:
    """Whether this process is a task of srun's, which Slurm told its rank. (Not one that torchrun started there.)"""
    env = os.environ
    # The same two names stand for a shell in an allocation, as Lightning takes them.
    shell = env.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_PROCID" in env and "SLURM_NTASKS" in env and "TORCHELASTIC_RUN_ID" not in env and not shell


def own_rank() -> tuple[int, int]:
    """(rank, rank on this machine), as a launcher has told them."""
    env = os.environ
    if under_srun():
        return int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", "0"))
    local = int(env.get("LOCAL_RANK", "0"))
    return int(env.get("RANK", local)), local


def word_of_this_rank() -> str | None:
    """Who says a mistake that this process has found: what its line begins with; None: rank 0 has said it.

    Rank 0 speaks at once, and its launcher then ends the other processes. One that still lives after a while has found
    what rank 0 has not, or stands on another node with a log of its own; it says who it is. One on each node is enough:
    the first that speaks ends the others there.
    """
    rank, local = own_rank()
    if rank == 0:
        return ""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's word
    end = time.monotonic() + _WORD + min(local, 10)
    while time.monotonic() < end:
        if os.getppid() != _PARENT:
            return None
        time.sleep(0.1)
    return f"rank {rank} on {socket.gethostname()}: "


def job_id() -> str:
    """The same text in all processes of a job, and in no other job; without a launcher: of this process."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return f"elastic {env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')} {env['TORCHELASTIC_RUN_ID']}"
    if int(env.get("SLURM_NTASKS", "1")) > 1:
        return f"slurm {env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')} {env.get('SLURM_RESTART_COUNT', '0')}"
    return f"process {os.getpid()}"


def end_on_sigterm(trainer: Any) -> None:
    """Lets SIGTERM end a Trainer's processes at once, but while it trains (`GracefulStop`) or where a handler is set.

    Lightning's own handler broadcasts, and goes on: a rank that is told while it waits for another, as all do before
    the first step, then waits for ever.
    """
    connector = trainer._signal_connector

    def end(number: int, frame: Any) -> None:
        launcher = trainer.strategy.launcher
        if hasattr(launcher, "kill"):
            launcher.kill(number)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def register() -> None:
        connector._original_handlers = connector._get_current_signal_handlers()  # put back when the Trainer is done
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, end)

    connector.register_signal_handlers = register


def part_from_the_others() -> None:
    """Ends the connection when all processes are done.

    One that ends while it is connected is aborted now and then by the connection's own threads, and the launcher then
    stops rank 0, which may be writing still.
    """
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@contextmanager
def first_on_each_machine(local_rank: int) -> Iterator[bool]:
    """True in one process of each machine, which runs the body; False in the others, when that is done."""
    job = job_id()
    if job.startswith("process"):
        yield True
        return
    # All ranks of a machine have one parent under torchrun; a restart of them is another round.
    parent = os.getppid() if job.startswith("elastic") else 0
    name = f"litrecipes-{os.getuid()}-{job}-{parent}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    done = Path(tempfile.gettempdir()) / "".join(letter if letter.isalnum() else "-" for letter in name)
    if local_rank > 0:
        while not done.exists():
            time.sleep(0.1)
        yield False
        return
    yield True  # after an error the launcher stops the others
    done.touch()
    atexit.register(done.unlink, missing_ok=True)
