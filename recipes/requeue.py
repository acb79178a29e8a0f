"""Slurm's word that a job must leave its nodes: it saves, goes back into the queue, and later goes on.

SIGUSR1 (the time is nearly over) requeues the job. SIGTERM requeues it where Slurm has preempted it, and not where
somebody has cancelled it.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_BY_TIME, _BY_SLURM = 128 + signal.SIGUSR1, 128 + signal.SIGTERM  # a stopped run's exit status
_PATIENCE = 60.0  # seconds in which Slurm ends the processes of a job that it has requeued


@contextmanager
def requeued_when_told(job: str | None) -> Iterator[None]:
    """Requeues the Slurm job that this process belongs to when a signal of Slurm's ends the body, at whatever moment.

    While the model trains, the signals are `GracefulStop`'s, which lets the body end after a checkpoint. Before
    (reading data) and after (exporting) they end the body at once: what is done so far is in the checkpoints.

    Args:
        job: the name by which the next start finds the run; None: the process is not to be requeued.
    """
    main = threading.current_thread() is threading.main_thread()
    if job is None or "SLURM_JOB_ID" not in os.environ or not main:
        yield
        return
    before = {number: signal.signal(number, _stop) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        yield
    except SystemExit as stop:
        if stop.code in (_BY_TIME, _BY_SLURM):
            for number in before:
                signal.signal(number, signal.SIG_IGN if number == signal.SIGUSR1 else signal.SIG_DFL)
            _requeue(os.environ["SLURM_JOB_ID"], time_is_over=stop.code == _BY_TIME)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def how_to_go_on(job: str | None) -> str:
    """What somebody does who wants the run to continue."""
    return "--ckpt_path last continues" if job is None else "the next start of this job continues"


def _stop(number: int, frame: FrameType | None) -> None:
    if multiprocessing.parent_process() is None:  # not in a worker of a loader, which inherits the handler
        raise SystemExit(128 + number)


def _requeue(number: str, *, time_is_over: bool) -> None:
    """Rank 0 asks for it; the others stay until Slurm ends them, or the first to leave would pull rank 0 down."""
    if int(os.environ.get("SLURM_PROCID", "0")) == 0:
        scontrol = shutil.which("scontrol")
        if scontrol is None:
            print(f"recipes: scontrol not found: job {number} was not requeued; submit it again", file=sys.stderr)
            return
        shown = subprocess.run([scontrol, "show", "job", "--oneliner", number], capture_output=True, text=True).stdout
        if not wants_requeueing(shown, time_is_over=time_is_over):
            return
        print(f"recipes: requeueing job {number}", file=sys.stderr, flush=True)
        done = subprocess.run([scontrol, "requeue", number], capture_output=True, text=True)
        if done.returncode:
            print(f"recipes: scontrol requeue {number}: {' '.join(done.stderr.split())}", file=sys.stderr)
            return
    time.sleep(_PATIENCE)


def wants_requeueing(shown: str, *, time_is_over: bool) -> bool:
    """Whether a job that was told to stop is to be requeued by us.

    Args:
        shown: what `scontrol show job --oneliner` says of it.
        time_is_over: whether SIGUSR1 told it; else SIGTERM.
    """
    fields = dict(re.findall(r"(\w+)=(\S*)", shown))
    # Not where Slurm has done it, nor where somebody cancelled the job.
    running = fields.get("JobState") in ("RUNNING", "SIGNALING")  # the latter until all have their signal
    preempted = fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A")
    return running and (time_is_over or preempted)
