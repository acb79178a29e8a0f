"""When a job goes back into Slurm's queue, and how its next start finds the run."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

from recipes import requeue
from recipes.command_line import parse_command
from recipes.compose import compose
from recipes.errors import UserError
from recipes.requeue import requeued_when_told, wants_requeueing
from recipes.run_folder import new_run, run_of_job
from recipes.trainer_verbs import find_checkpoint

RUNNING = "JobId=7 JobName=x JobState=RUNNING Reason=None PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime={} X=1"


@pytest.mark.parametrize(
    ("shown", "time_is_over", "wanted"),
    [
        (RUNNING.format("None"), True, True),
        (RUNNING.format("None"), False, False),  # scancel
        (RUNNING.format("2026-01-01T00:10:00"), False, True),
        (RUNNING.format("None").replace("RUNNING", "SIGNALING"), True, True),
        (RUNNING.format("None").replace("RUNNING", "CANCELLED"), True, False),
        (RUNNING.format("2026-01-01T00:10:00").replace("RUNNING", "PENDING"), False, False),  # Slurm has done it
        ("", True, False),
    ],
)
def test_who_wants_the_job_back(shown: str, time_is_over: bool, wanted: bool) -> None:
    assert wants_requeueing(shown, time_is_over=time_is_over) is wanted


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for scontrol that writes down what it was asked; the file."""
    (tmp_path / "bin").mkdir()
    file = tmp_path / "bin/scontrol"
    shown = RUNNING.format("None")
    file.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ "$1" = show ] && echo "{shown}"\nexit 0\n')
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setattr(requeue, "_PATIENCE", 0.0)
    return tmp_path / "asked"


def asked(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if "requeue" in line] if file.exists() else []


def told(number: int, job: str | None) -> object:
    try:
        with requeued_when_told(job):
            os.kill(os.getpid(), number)
    except SystemExit as stop:
        return stop.code
    raise AssertionError("the signal must end the body")


def test_a_signal_before_training_requeues(slurm: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    assert told(signal.SIGUSR1, "slurm-7") == 128 + signal.SIGUSR1
    assert asked(slurm) == ["requeue 7"]
    assert signal.getsignal(signal.SIGUSR1) is before


def test_scancel_does_not(slurm: Path) -> None:
    assert told(signal.SIGTERM, "slurm-7") == 128 + signal.SIGTERM
    assert slurm.exists()  # it looked
    assert asked(slurm) == []


def test_only_rank_0_asks(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    told(signal.SIGUSR1, "slurm-7")
    assert not slurm.exists()


def test_another_end_requeues_nothing(slurm: Path) -> None:
    for error in (SystemExit(2), UserError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), requeued_when_told("slurm-7"):
            raise error
    assert not slurm.exists()


def test_a_run_without_a_job_is_left_alone(slurm: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with requeued_when_told(None):
        assert signal.getsignal(signal.SIGUSR1) is before
    with pytest.raises(SystemExit), requeued_when_told(None):
        raise SystemExit(128 + signal.SIGUSR1)
    assert not slurm.exists()


# --- the run of a job -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text("model: {class_path: x.Y}\n")
    return tmp_path


def find(*words: str) -> object:
    command = parse_command("fit", ["-c", "tiny", *words])
    return find_checkpoint(command, compose(command.configs))


def test_the_first_start_begins_a_run(folder: Path) -> None:
    other = new_run(folder / "runs", "tiny")  # of somebody else, unfinished
    other.note_job(None)
    assert find("--job", "a") == (None, None)


def test_the_next_start_goes_on_with_it(folder: Path) -> None:
    for job in ("a", "b"):
        run = new_run(folder / "runs", "tiny")
        run.note_job(job)
        run.release()
    run, checkpoint = find("--job", "a")  # type: ignore[misc]
    assert (run.number, checkpoint) == (0, None)
    run.checkpoints.mkdir()
    (run.checkpoints / "step-00000002.ckpt").touch()
    (run.checkpoints / "step-00000010.ckpt").touch()
    run, checkpoint = find("--job", "a")  # type: ignore[misc]
    assert (run.number, checkpoint.name) == (0, "step-00000010.ckpt")


def test_job_names_are_compared_whole(folder: Path) -> None:
    run = new_run(folder / "runs", "tiny")
    run.note_job("slurm-12")
    assert run_of_job(folder / "runs", "tiny", "slurm-1") is None
    assert run_of_job(folder / "runs", "tiny", "slurm-12").path == run.path


@pytest.mark.parametrize("more", [["--ckpt_path", "last"], ["--run", "0"]])
def test_a_job_finds_its_run_itself(folder: Path, more: list[str]) -> None:
    with pytest.raises(UserError, match="--job a"):
        find("--job", "a", *more)
