"""A run's folder ``runs/<recipe>/<n>/``: who makes it, what is noted in it, and which one `--ckpt_path last` means."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from recipes.errors import UserError
from recipes.ranks import job_id
from recipes.redaction import redact_command
from recipes.yaml_tree import display

FINISHED = "finished"  # an empty file: the run came to its planned end
JOB = "job"  # the name of the launcher's job that began the run
LOCK = ".lock"  # held by rank 0 while it runs
_STEP = re.compile(r"step-(\d+)\.ckpt")
PACKAGES = (
    "litrecipes",
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "numpy",
    "jsonargparse",
    "torchmetrics",
)


@dataclass
class RunFolder:
    """One run's folder, of which this process is the owner.

    Attributes:
        path: the folder, absolute.
        recipe: the recipe's name.
        lock: the open lock file; the lock goes with the process, however it ends.
    """

    path: Path
    recipe: str
    lock: Any = field(default=None, repr=False)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        return (self.path / FINISHED).exists()

    @property
    def number(self) -> int:
        return int(self.path.name)

    def acquire(self) -> None:
        """Takes the folder for this process.

        Raises:
            UserError: another process is running in it.
        """
        self.lock = (self.path / LOCK).open("a+")
        # A process that only looks whether the folder is taken holds the lock for an instant: not refused by that.
        if not any(_locked(self.lock, fcntl.LOCK_EX) for _ in _tries()):
            self.lock.close()
            self.lock = None
            raise UserError(f"{display(self.path)}: a process is still running in it; wait for it or stop it")
        self.lock.truncate(0)
        self.lock.write(job_id())
        self.lock.flush()

    def release(self) -> None:
        """Gives the folder up, as the end of the process would."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def running(self) -> bool:
        """Whether another job holds the folder."""
        try:
            with (self.path / LOCK).open("r") as lock:
                for _ in _tries():
                    if _locked(lock, fcntl.LOCK_SH):
                        return False
                    lock.seek(0)
                    if lock.read() == job_id():
                        return False  # ours: rank 0 of this job was faster than this process
                return True  # not at the first look: rank 0 has the lock an instant before its name is in it
        except FileNotFoundError:
            pass
        return False

    def note_job(self, job: str | None) -> None:
        """Writes down which job began the run, for that job's restarts."""
        if job is not None:
            _write(self.path / JOB, job + "\n")

    def mark_finished(self) -> None:
        (self.path / FINISHED).touch()

    def mark_unfinished(self) -> None:
        (self.path / FINISHED).unlink(missing_ok=True)

    def begin_again(self) -> None:
        """Drops what was measured before the first checkpoint was whole: the run repeats it from its first step."""
        for name in ("metrics.csv", "samples.jsonl"):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)

    def newest_checkpoint(self) -> Path | None:
        """The complete checkpoint of the highest step. (A half-written one has another name until it is whole.)"""
        found = [(int(match[1]), p) for p in self.checkpoints.glob("*.ckpt") if (match := _STEP.fullmatch(p.name))]
        return max(found)[1] if found else None


def _tries() -> Iterator[None]:
    """Yields at once, and again and again for a second: longer than any process is between two steps with a lock."""
    end = time.monotonic() + 1.0
    yield
    while time.monotonic() < end:
        time.sleep(0.05)
        yield


def _locked(lock: IO[str], kind: int) -> bool:
    """Takes the lock (LOCK_EX or LOCK_SH) if it is free."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def new_run(runs_dir: Path, recipe: str) -> RunFolder:
    """Makes and takes the next free folder; safe against other processes that do the same."""
    parent = (runs_dir / recipe).absolute()
    parent.mkdir(parents=True, exist_ok=True)
    number = max((run.number for run in runs_of(runs_dir, recipe)), default=-1) + 1
    while True:
        try:
            (parent / str(number)).mkdir()
        except FileExistsError:
            number += 1
            continue
        run = RunFolder(parent / str(number), recipe)
        run.acquire()
        return run


def runs_of(runs_dir: Path, recipe: str) -> list[RunFolder]:
    """The runs of a recipe, oldest first."""
    parent = (runs_dir / recipe).absolute()
    folders = [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    return [RunFolder(p, recipe) for p in sorted((p for p in folders if p.name.isdigit()), key=lambda p: int(p.name))]


def find_run(runs_dir: Path, recipe: str, number: int | None, *, unfinished: bool, which: str = "last") -> RunFolder:
    """The run that is meant by ``--run N``, or by its absence: the newest one (that is unfinished, if asked).

    Args:
        which: checkpoint of it that is asked for, which the error names.

    Raises:
        UserError: there is no such run.
    """
    runs = runs_of(runs_dir, recipe)
    parent = display((runs_dir / recipe).absolute())
    if number is not None:
        for run in runs:
            if run.number == number:
                return run
        there = ", ".join(str(run.number) for run in runs) or "none"
        raise UserError(f"--run {number}: {parent} has no run {number}; there are: {there}")
    if unfinished:
        runs = [run for run in runs if not run.finished and not run.running()]
    if not runs:
        kind = "unfinished run" if unfinished else "run"
        raise UserError(
            f"--ckpt_path {which}: {parent} has no {kind}; leave the flag out to begin one, or name one: --run N"
        )
    return runs[-1]


def run_of_job(runs_dir: Path, recipe: str, job: str) -> RunFolder | None:
    """The run that a job began; None at its first start."""
    for run in reversed(runs_of(runs_dir, recipe)):
        if (run.path / JOB).is_file() and (run.path / JOB).read_text(encoding="utf-8").strip() == job:
            return run
    return None


def checkpoint_of(run: RunFolder, which: str) -> Path:
    """The checkpoint ``last`` or ``best`` of a run.

    Raises:
        UserError: it has none.
    """
    if which == "best":
        best = run.checkpoints / "best.ckpt"
        if not best.exists():
            raise UserError(f"--ckpt_path best: {display(run.path)} has no best checkpoint; use --ckpt_path last")
        return best.resolve()
    path = run.newest_checkpoint()
    if path is None:
        raise UserError(
            f"--ckpt_path {which}: {display(run.path)} was stopped before its first checkpoint was whole; `fit` "
            "with the same flag begins it again, or name another run: --run N"
        )
    return path


# --- what is noted --------------------------------------------------------------------------------------------------


def write_config(run: RunFolder, text: str) -> Path | None:
    """Writes config.yaml; one that differs (a resumed run was changed) is kept as config.<k>.yaml, and returned."""
    path, earlier = run.path / "config.yaml", None
    if path.exists():
        if path.read_text(encoding="utf-8") == text:
            return None
        older = len(list(run.path.glob("config.*.yaml")))
        earlier = path.rename(run.path / f"config.{older}.yaml")
    _write(path, text)
    return earlier


def write_environment(run: RunFolder, command: Sequence[str], config: dict[str, Any]) -> None:
    """Writes environment.json; a resumed run's earlier one goes into its list ``earlier``."""
    path = run.path / "environment.json"
    notes = describe_environment(command)
    notes["recipe"] = run.recipe
    notes["precision"] = config.get("trainer", {}).get("precision")
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        notes["earlier"] = [*before.pop("earlier", []), before]
    _write(path, json.dumps(notes, indent=2) + "\n")


def describe_environment(command: Sequence[str]) -> dict[str, Any]:
    """Versions, commit, hardware and command, with nothing secret in it."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": redact_command(command),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerators": _accelerators(),
    }


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _commit() -> str | None:
    """The commit of the checkout that runs, with ``+`` where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _accelerators() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
