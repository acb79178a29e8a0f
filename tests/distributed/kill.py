"""A callback that kills its own process group with SIGKILL at a chosen point, as a lost machine would."""

from __future__ import annotations

import os
import signal
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


def kill() -> None:
    os.killpg(os.getpgid(0), signal.SIGKILL)


class Kill(Callback):
    """Kills at optimizer step ``step``.

    Args:
        where: ``window`` (before the last micro-batch of an accumulation window), ``torn`` (the first checkpoint
            from that step on is half written), ``unnamed`` (it is written, but has not got its name), ``validation``.
        step: optimizer steps that are done by then.
    """

    def __init__(self, where: str, step: int) -> None:
        self.where = where
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step < self.step:
            return
        if self.where == "window" and batch.micro_step == trainer.accumulate_grad_batches - 1:
            kill()
        if self.where in ("torn", "unnamed"):
            name = {"torn": "fsync", "unnamed": "replace"}[self.where]
            original = getattr(os, name)

            def fatal(first: Any, *rest: Any) -> Any:
                path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
                if ".ckpt" not in path:
                    return original(first, *rest)
                if isinstance(first, int):
                    os.truncate(path, os.path.getsize(path) // 2)
                return kill()

            setattr(os, name, fatal)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.where == "validation" and trainer.global_step >= self.step:
            kill()
