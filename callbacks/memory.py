"""How much memory a run takes."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

_GIB = 2**30


class Memory(Callback):
    """Logs the memory of rank 0's process at each logged step.

    - ``memory/rss_gib``: what it holds in main memory now (Linux).
    - ``memory/peak_gib``: the most it has held: on a GPU of the device's memory as PyTorch reserved it, else of main
      memory. The device's peak is that of the present run, also after earlier runs in the same process.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.fit_loop._should_accumulate() or trainer.global_step % every:
            return
        values = {"memory/peak_gib": peak_bytes(pl_module.device) / _GIB}
        if (now := resident_bytes()) is not None:
            values["memory/rss_gib"] = now / _GIB
        pl_module.log_dict(values, on_step=True, on_epoch=False)


def resident_bytes() -> int | None:
    """Main memory that this process holds now; None where the system does not say."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held: of ``device`` if it is a GPU, else main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
