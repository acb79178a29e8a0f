"""GracefulStop: a signal to a real process, then a resume that must be exact."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_runs import TinyModule, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import GracefulStop, StepCheckpoint
from callbacks.graceful_stop import StoppedBySignal
from callbacks.metrics_csv import MACHINE_COLUMNS, read_rows

SCRIPT = Path(__file__).with_name("callback_runs.py")


def start(folder: Path, signals: list[str], **options: Any) -> subprocess.Popen[str]:
    options |= {"folder": str(folder), "callbacks": {"stop": [signals], "announce": [0.05]}}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), json.dumps(options)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for found in process.stdout:
        if found.strip().endswith(line):
            return
    pytest.fail(f"the run ended before {line!r}: {process.stderr.read() if process.stderr else ''}")


def measured(folder: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in MACHINE_COLUMNS} for row in read_rows(folder / "metrics.csv")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_after_the_step_and_the_resumed_run_is_exact(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {
        "trainer": {"max_steps": 30, "accumulate_grad_batches": 4, "limit_val_batches": 2, "val_check_interval": 40},
        "checkpoint": {"every_n_steps": 1000, "keep_best": 1},
        "module": {"length": 40},
    }
    process = start(tmp_path / "run", ["SIGTERM", "SIGUSR1", "SIGINT"], **options)
    wait_for(process, "step 5")
    process.send_signal(signal.Signals[name])
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.Signals[name], errors
    assert f"{name}: saving a checkpoint after this step, then stopping" in errors
    assert "Traceback" not in errors
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    loops = torch.load(last, weights_only=True)["loops"]["fit_loop"]
    assert loops["state_dict"]["combined_loader"][0]["position"] % 4 == 0
    assert 5 <= torch.load(last, weights_only=True)["global_step"] <= 7
    for folder, resume in ((tmp_path / "run", last), (tmp_path / "whole", None)):
        trainer = make_trainer(folder, checkpoint=StepCheckpoint(**options["checkpoint"]), **options["trainer"])
        trainer.fit(TinyModule(length=40), ckpt_path=resume)
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")


@pytest.mark.slow
def test_the_same_signal_again_ends_the_run_at_once(tmp_path: Path) -> None:
    process = start(
        tmp_path, ["SIGTERM"], trainer={"max_steps": 10_000, "accumulate_grad_batches": 500}, module={"length": 10_000}
    )
    wait_for(process, "step 0")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == -signal.SIGTERM
    process.communicate()


class SignalAt(TinyModule):
    """Sends itself a signal in a place, as if from outside."""

    def __init__(self, place: str, step: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.place, self.step = place, step

    def signal(self, place: str) -> None:
        if place == self.place and self.global_step == self.step:
            self.step = -1
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.signal("training")

    def on_validation_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.signal("validation")


@pytest.mark.parametrize(("place", "step", "saved"), [("training", 3, 4), ("training", 2, 3), ("validation", 4, 4)])
def test_resume_is_exact_also_where_a_validation_is_due(tmp_path: Path, place: str, step: int, saved: int) -> None:
    """The signal comes in the step before a validation, in another one, and in the validation."""

    def fit(folder: Path, module: TinyModule, resume: Path | None = None) -> None:
        checkpoint = StepCheckpoint(every_n_steps=1000)
        arguments: dict[str, Any] = {"max_steps": 8, "limit_val_batches": 2, "val_check_interval": 4}
        make_trainer(folder, GracefulStop(), checkpoint=checkpoint, **arguments).fit(module, ckpt_path=resume)

    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(StoppedBySignal) as stopped:
        fit(tmp_path / "run", SignalAt(place, step))
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) is before
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert os.readlink(last) == f"step-{saved:08d}.ckpt"
    fit(tmp_path / "run", TinyModule(), last)
    fit(tmp_path / "whole", TinyModule())
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")


def test_a_checkpoint_is_there_before_the_validation_that_follows(tmp_path: Path) -> None:
    """There may be no time for it: a validation that never ends must not cost the steps before it."""

    class Endless(SignalAt):
        def on_validation_batch_start(self, batch: Any, batch_idx: int) -> None:
            raise TimeoutError("killed in the validation")

    trainer = make_trainer(
        tmp_path,
        GracefulStop(),
        checkpoint=StepCheckpoint(every_n_steps=1000),
        max_steps=8,
        limit_val_batches=2,
        val_check_interval=4,
    )
    with pytest.raises(TimeoutError):
        trainer.fit(Endless("training", 3))
    assert os.readlink(tmp_path / "checkpoints" / "last.ckpt") == "step-00000004.ckpt"


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, GracefulStop(), max_steps=3)
    trainer.fit(SignalAt("training", 2))
    assert trainer.state.finished
    assert os.readlink(tmp_path / "checkpoints" / "last.ckpt") == "step-00000003.ckpt"


def _kill_oneself(number: int) -> None:
    os.kill(os.getpid(), number)


def exit_code_of_a_worker(number: int) -> int | None:
    """Of a forked process that is sent a signal, as Slurm sends it to all processes of a task."""
    worker = multiprocessing.get_context("fork").Process(target=_kill_oneself, args=(number,))
    worker.start()
    worker.join(30)
    return worker.exitcode


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_worker_of_the_loader_outlives_the_signal(tmp_path: Path, name: str) -> None:
    """It dying would end the run before the checkpoint."""
    number = signal.Signals[name]
    codes: list[int | None] = []

    class Forks(TinyModule):
        def on_train_start(self) -> None:
            codes.append(exit_code_of_a_worker(number))

    make_trainer(tmp_path, GracefulStop(), max_steps=1).fit(Forks())
    assert codes == [0]
    assert exit_code_of_a_worker(number) == -number  # after the run, as it was before


def test_refuses_what_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"GracefulStop.signals: 'SIGKILL' is not allowed"):
        GracefulStop(["SIGKILL"])
    with pytest.raises(ValueError, match=r"GracefulStop: needs callbacks.StepCheckpoint"):
        make_trainer(tmp_path, GracefulStop(), checkpoint=ModelCheckpoint(tmp_path), max_steps=1).fit(TinyModule())
