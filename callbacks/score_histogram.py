"""How a reward model scores the answers that are held out."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from callbacks.run_files import run_folder, write_whole


class ScoreHistogram(Callback):
    """Writes ``score_histogram.csv`` into the run's folder after each validation, of modules that have a
    ``score_histogram``: a row for each bin, with its bounds and how many chosen and rejected answers are in it.
    """

    FILE_NAME = "score_histogram.csv"

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rows = getattr(pl_module, "score_histogram", None)
        if not rows or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            lines = [",".join(f"{value:g}" for value in row) for row in rows]
            write_whole(folder / self.FILE_NAME, "\n".join(["low,high,chosen,rejected", *lines]) + "\n")
