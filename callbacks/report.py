"""Writes the run's report.html while it trains and when it ends."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from callbacks.report_data import read_run
from callbacks.report_page import render
from callbacks.run_files import run_folder, write_whole


class RunReport(Callback):
    """Writes ``report.html`` into the run's folder: after validations, and however the run ends.

    It is made of the run's files alone; ``recipes report RUN`` makes it again.

    Args:
        seconds: least time between two reports of a run that goes on.
    """

    FILE_NAME = "report.html"

    def __init__(self, seconds: float = 30.0) -> None:
        self.seconds = seconds
        self._folder: Path | None = None
        self._written = -math.inf

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._folder = run_folder(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fitting and time.monotonic() - self._written >= self.seconds:
            self._write(trainer, "running")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, "finished")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._write(trainer, "failed" if isinstance(exception, Exception) else "stopped")

    def _write(self, trainer: pl.Trainer, status: str) -> None:
        folder = self._folder
        if trainer.is_global_zero and folder is not None and (folder / "metrics.csv").exists():
            self._written = time.monotonic()
            try:
                write_whole(folder / self.FILE_NAME, render([read_run(folder, status=status)]))
            except OSError as error:
                # Not worth a run; and what had ended one (a full disk, mostly) would no longer be what is said.
                print(f"{folder / self.FILE_NAME}: cannot be written: {error.strerror}", file=sys.stderr)
