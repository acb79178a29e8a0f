"""A callback that makes steps long enough for somebody outside to act in the middle of a run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Pause(Callback):
    """Sleeps after each micro-batch, and leaves its process's id in a file named after its rank.

    Args:
        seconds: of sleep.
        folder: where the files are left.
        first_start_only: do not sleep where a checkpoint is continued.
    """

    def __init__(self, seconds: float, folder: str, first_start_only: bool = True) -> None:
        self.seconds = seconds
        self.folder = folder
        self.first_start_only = first_start_only

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Path(self.folder, f"rank{trainer.global_rank}.pid").write_text(str(os.getpid()))
        if self.first_start_only and trainer.global_step > 0:
            self.seconds = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        time.sleep(self.seconds)


class PauseInValidation(Callback):
    """Sleeps at the first batch of a validation, and leaves its process's id in a file named after its rank."""

    def __init__(self, seconds: float, folder: str) -> None:
        self.seconds = seconds
        self.folder = folder

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        Path(self.folder, f"rank{trainer.global_rank}.pid").write_text(str(os.getpid()))
        time.sleep(self.seconds)
        self.seconds = 0.0
