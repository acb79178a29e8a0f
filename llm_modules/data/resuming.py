"""Lightning's own counters, brought to where the data are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from llm_modules.data.loading import WindowLoader


def align_progress(trainer: Trainer, loader: WindowLoader) -> None:
    """Set the number of micro-batches that Lightning believes it has done in this epoch to what the position says.

    They differ if the run goes on with another number of processes, batch size or accumulation, or from a checkpoint
    that was written inside of an accumulation window. Lightning would then step, validate and end the epoch at the
    wrong places.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    current = progress.current
    accumulate, total = loader.slicing.accumulate, loader.steps_in_epoch * loader.slicing.accumulate
    # That of the whole run decides when to validate (check_val_every_n_epoch: null): windows end at its multiples.
    excess = progress.total.ready % accumulate
    for name in ("ready", "started", "processed", "completed"):
        setattr(progress.total, name, getattr(progress.total, name) - excess)
    if current.ready == 0:
        return
    done = loader.step * accumulate if loader.rows else total
    behind = current.ready - current.completed  # 1 if the checkpoint was written before the batch was counted as done
    current.ready = current.started = current.processed = done
    current.completed = done - behind
