"""A signal ends a run after the present optimizer step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.checkpoint import StepCheckpoint

_HELD_BACK: set[signal.Signals] = set()  # what forked processes do not get, while a run trains


def _hold_back() -> None:
    """In a process that was just forked: a loader's worker.

    Slurm, and a terminal's Ctrl-C, signal every process of a task. A worker that dies of it takes the run down before
    the checkpoint; one that inherited the handler talks of a checkpoint that is not its own. It ends with its loader.
    """
    if _HELD_BACK:
        signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)


os.register_at_fork(after_in_child=_hold_back)


class StoppedBySignal(SystemExit):
    """The run was stopped by a signal after its checkpoint was written; the exit status is the shell's 128 + number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"


class GracefulStop(Callback):
    """On a signal: finish the optimizer step, write a checkpoint, stop; ``--ckpt_path last`` goes on from there.

    The handler only sets a flag, and all ranks agree on it after each optimizer step, so that it is enough to send the
    signal to one of them. Where a validation is due at that step, a checkpoint is written at once, and again after the
    validation, so that nothing is skipped on resume. The same signal once more ends the process at once.

    Args:
        signals: names of the signals.
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM", "SIGUSR1", "SIGINT")) -> None:
        known = {item.name for item in signal.Signals} - {"SIGKILL", "SIGSTOP"}
        for name in signals:
            if name not in known:
                raise ValueError(f"GracefulStop.signals: {name!r} is not allowed; such as SIGTERM, SIGUSR1, SIGINT")
        self.signals = [signal.Signals[name] for name in signals]
        self._received = 0
        self._before: dict[signal.Signals, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(trainer.checkpoint_callback, StepCheckpoint):
            raise ValueError("GracefulStop: needs callbacks.StepCheckpoint as the trainer's checkpoint callback")
        if stage == "fit":
            _HELD_BACK.update(self.signals)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        _HELD_BACK.clear()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the handlers in the place of Lightning's, which would save in the middle of a step."""
        self._received = 0
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.signals}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.fit_loop._should_accumulate():
            self._agree(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fit_loop._should_accumulate():
            self._agree(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()
        _HELD_BACK.clear()

    def _agree(self, trainer: pl.Trainer) -> None:
        """Tell the checkpoint callback, which comes after all others, to save and stop."""
        number = self._received
        if trainer.world_size > 1:
            flag = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(flag, reduce_op="max"))  # type: ignore[arg-type]
        if number:
            assert isinstance(trainer.checkpoint_callback, StepCheckpoint)
            trainer.checkpoint_callback.stop_with = StoppedBySignal(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._received = self._received == number, number
        name = signal.Signals(number).name
        if again:
            self._restore()
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
            os.kill(os.getpid(), number)
            return
        # Not print(): a signal may come in the middle of one.
        os.write(2, f"\n{name}: saving a checkpoint after this step, then stopping; once more: at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
