"""Which checkpoints a run keeps, and when they are written."""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal
from weakref import proxy

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.checkpoint_writer import CheckpointWriter
from callbacks.metrics_csv import MetricsCSV

_NAME = re.compile(r"step-(\d{8,})\.ckpt")


class StepCheckpoint(ModelCheckpoint):
    """Saves ``step-XXXXXXXX.ckpt`` after whole optimizer steps, and only then.

    A checkpoint is written at every ``every_n_steps``-th optimizer step, where a validation finds one of the best
    ``keep_best`` values of ``monitor``, and at the end. Where a validation is due at the same step it comes first, so
    that its result is in the checkpoint and resuming does not skip it. ``last.ckpt`` and ``best.ckpt`` are links that
    are replaced in one piece. An old checkpoint is removed only when the new one is complete.

    Args:
        every_n_steps: optimizer steps between checkpoints; 0: only for the best and at the end.
        keep_last: how many of the newest checkpoints to keep; -1: all.
        keep_best: how many of the best checkpoints to keep beside them; 0: none, nothing is monitored.
        monitor: the validation metric that says which is best.
        mode: whether a small (`min`) or a large (`max`) value is good.
        dirpath: the folder; default: `checkpoints` in the run's folder.
        sharded: each process writes the part that it holds, into a folder `step-XXXXXXXX.ckpt/`; otherwise rank 0
            gathers all of it and writes one file.
        asynchronous: a thread writes a copy (in host memory: as much again as the checkpoint) while training goes on.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        keep_last: int = 1,
        keep_best: int = 1,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        dirpath: str | None = None,
        sharded: bool = False,
        asynchronous: bool = False,
    ) -> None:
        for name, value, least in (("every_n_steps", every_n_steps, 0), ("keep_best", keep_best, 0)):
            if value < least:
                raise ValueError(f"checkpoint.{name}: {value} is not allowed; {least} or more")
        if keep_last < 1 and keep_last != -1:
            raise ValueError(f"checkpoint.keep_last: {keep_last} is not allowed; 1 or more, or -1 for all")
        super().__init__(
            dirpath=dirpath,
            monitor=monitor if keep_best else None,
            mode=mode,
            save_top_k=keep_best if keep_best else 1,
            save_last="link",
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
        )
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.stop_with: SystemExit | None = None  # another callback's wish: save, then end the run with this
        self._writer = CheckpointWriter(sharded, asynchronous)
        self._due = False
        self._resumed = False
        self._stop_now = False
        self._stop_later = False

    @property
    def state_key(self) -> str:
        """The same whatever the arguments, so that a resumed run may change them."""
        return "StepCheckpoint"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = self.dirpath or os.path.join(trainer.log_dir or trainer.default_root_dir, "checkpoints")
        self.dirpath = trainer.strategy.broadcast(os.path.realpath(folder))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.stop_with, self._stop_now, self._stop_later = None, False, False
        _refuse_validation_inside_a_window(trainer)
        resumed = self._resumed = trainer.ckpt_path is not None
        earlier = [path.name for path in self.complete_checkpoints()]
        if not resumed and trainer.global_step == 0 and earlier and not self._last_checkpoint_saved:
            raise ValueError(
                f"checkpoint.dirpath: {self.dirpath} holds checkpoints of an earlier run ({', '.join(earlier)}); "
                "resume it with --ckpt_path last, or choose another folder"
            )
        if resumed:
            self._last_global_step_saved = trainer.global_step
            self._set_aside(trainer)
            for logger in trainer.loggers:
                if isinstance(logger, MetricsCSV):
                    logger.resume(trainer.global_step)

    # --- when ---------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, or leave it to the end of the validation that follows at once."""
        if _inside_window(trainer):
            # Who wants to stop here (a timer) gets it at the end of the window, or its gradients would be lost.
            self._stop_later = self._stop_later or trainer.should_stop
            trainer.should_stop = False
            return
        self._settle(trainer, wait=False)
        trainer.should_stop = trainer.should_stop or self._stop_later
        if self._should_skip_saving_checkpoint(trainer):
            return
        step = trainer.global_step
        due = self._due or (self.every_n_steps > 0 and step % self.every_n_steps == 0) or _is_final(trainer)
        self._due = False
        if validation_follows(trainer):
            self._due = due or self.stop_with is not None
            if self.stop_with is not None:
                # There may be no time for the validation. This checkpoint would skip it: it is written again after it.
                self.save(trainer)
                self._last_global_step_saved = -1
        elif due or self.stop_with is not None:
            self.save(trainer)
            self._stop_now = self.stop_with is not None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop here, not right after saving: all loggers have the step's row now."""
        if self._resumed:
            # The number of the row to be logged next; after some stops Lightning restores it one short.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self._resumed = False
        if self._stop_now:
            assert self.stop_with is not None
            error, self.stop_with, self._stop_now = self.stop_with, None, False
            raise error

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._should_skip_saving_checkpoint(trainer) or _inside_window(trainer):
            return
        self._settle(trainer, wait=True)  # first: it goes by what was the best until now
        best = self.keep_best > 0 and self._note_score(trainer)
        if best or self._due or _is_stopping(trainer) or self.stop_with is not None:
            self._due = False
            self.save(trainer)
            self._stop_now = self.stop_with is not None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: an epoch's last step is a step like the others."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > 0 and not _inside_window(trainer) and not self._should_skip_saving_checkpoint(trainer):
            self.save(trainer)
        self._settle(trainer, wait=True)
        self._writer.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """No checkpoint: the state may be that of half a step. One that is being written is whole."""
        self._writer.abandon()
        self._writer.close()

    def save(self, trainer: pl.Trainer) -> str:
        """Write a checkpoint of the present step; all ranks call it, between two optimizer steps. Returns its path.

        An asynchronous one is begun, and complete some steps later, or when the run stops.
        """
        assert self.dirpath is not None
        path = os.path.join(self.dirpath, f"step-{trainer.global_step:08d}.ckpt")
        if self._last_global_step_saved == trainer.global_step:
            return path
        self._settle(trainer, wait=True)
        _flush_metrics(trainer)
        self.last_model_path = os.path.join(self.dirpath, "last.ckpt")
        if not self.keep_best:
            self.best_model_path = path
        self._writer.begin(trainer, path)
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, path
        if self._writer.path is None:
            self._put_in_place(trainer, path)
        elif self.stop_with is not None:
            self._settle(trainer, wait=True)
        return path

    def _settle(self, trainer: pl.Trainer, wait: bool) -> None:
        """Put an asynchronous checkpoint in its place when it is complete; wait for it if asked."""
        path = self._writer.path
        if path is not None and self._writer.complete(trainer, wait):
            self._put_in_place(trainer, path)

    def _put_in_place(self, trainer: pl.Trainer, path: str) -> None:
        """Links to a checkpoint that is complete now; those that it replaces go."""
        if trainer.is_global_zero:
            _link(self.last_model_path, path)
            trainer.strategy.remove_checkpoint(_set_aside_name(Path(path)))
            if self.best_k_models:
                _link(os.path.join(str(self.dirpath), "best.ckpt"), self.best_model_path)
            self._remove_old(trainer)
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
        trainer.strategy.barrier("StepCheckpoint.save")

    # --- which --------------------------------------------------------------------------------------------------

    def _note_score(self, trainer: pl.Trainer) -> bool:
        """Take the validation's score down; whether it is among the best, so that a checkpoint is due."""
        assert self.dirpath is not None
        assert self.monitor is not None
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            names = ", ".join(sorted(name for name in metrics if not name.startswith("train"))) or "none"
            raise ValueError(f"checkpoint.monitor: {self.monitor!r} is not logged by the validation; there is {names}")
        score = float(metrics[self.monitor])
        worst = math.inf if self.mode == "min" else -math.inf
        score = worst if math.isnan(score) else score
        sign = 1 if self.mode == "min" else -1
        path = os.path.join(self.dirpath, f"step-{trainer.global_step:08d}.ckpt")
        self.current_score = torch.tensor(score)
        # Ties go to the older one, which is written already.
        scores = {**self.best_k_models, path: self.current_score}
        ranked = sorted(scores.items(), key=lambda item: sign * float(item[1]))
        kept = dict(ranked[: self.keep_best])
        if not trainer.strategy.reduce_boolean_decision(path in kept):
            return False
        self.best_k_models = kept
        self.best_model_path, self.best_model_score = ranked[0]
        self.kth_best_model_path, self.kth_value = list(kept.items())[-1]
        return True

    def complete_checkpoints(self) -> list[Path]:
        """The folder's checkpoints, oldest first."""
        assert self.dirpath is not None
        return sorted(path for path in Path(self.dirpath).glob("step-*.ckpt") if _NAME.fullmatch(path.name))

    def _remove_old(self, trainer: pl.Trainer) -> None:
        """Read off the folder, not off a list, so that what a killed run did not come to remove goes too."""
        if self.keep_last == -1:
            return
        past = [path for path in self.complete_checkpoints() if _step_of(path) <= trainer.global_step]
        for path in past[: -self.keep_last]:
            if str(path) not in self.best_k_models:
                trainer.strategy.remove_checkpoint(path)

    def _set_aside(self, trainer: pl.Trainer) -> None:
        """Rename the checkpoints of later steps than the one that the run goes on from (``--ckpt_path best``).

        They are of a course that was left: resuming, exporting or averaging must not take them for this run's newest.
        One goes when the run comes to its step and writes it again.
        """
        later = [path for path in self.complete_checkpoints() if _step_of(path) > trainer.global_step]
        if not later or not trainer.is_global_zero:
            return
        for path in later:
            path.rename(_set_aside_name(path))
        present = os.path.join(str(self.dirpath), f"step-{trainer.global_step:08d}.ckpt")
        for name, target in (("last.ckpt", present), ("best.ckpt", self.best_model_path)):
            link = os.path.join(str(self.dirpath), name)
            if os.path.islink(link) and not os.path.exists(link):
                _link(link, target) if os.path.exists(target) else os.unlink(link)
        names = ", ".join(path.name for path in later)
        print(f"checkpoint: {names}: of later steps than {trainer.global_step}; kept as left-step-*", file=sys.stderr)

    def state_dict(self) -> dict[str, Any]:
        """Names and plain numbers, so that the folder may be moved and the state loads with ``weights_only=True``."""
        return {
            "monitor": self.monitor,
            "mode": self.mode,
            "best": {os.path.basename(path): float(score) for path, score in self.best_k_models.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.dirpath is not None
        if state_dict["monitor"] != self.monitor or state_dict["mode"] != self.mode:
            return  # the scores of another metric say nothing about this one
        # Not those of another folder: that run's checkpoints are not this one's to link or remove.
        paths = {os.path.join(self.dirpath, name): score for name, score in state_dict["best"].items()}
        scores = {path: torch.tensor(score) for path, score in paths.items() if os.path.exists(path)}
        self.best_k_models = dict(list(scores.items())[: self.keep_best])
        if self.best_k_models:
            self.best_model_path, self.best_model_score = next(iter(self.best_k_models.items()))
            self.kth_best_model_path, self.kth_value = list(self.best_k_models.items())[-1]


def _inside_window(trainer: pl.Trainer) -> bool:
    """Whether gradients are being accumulated: the last micro-batch was not followed by an optimizer step.

    ``global_step`` does not tell: it stays the same over the micro-batches of the next window.
    """
    return trainer.fit_loop._should_accumulate()


def validation_follows(trainer: pl.Trainer) -> bool:
    """Whether Lightning will validate right after the present batch (asked in ``on_train_batch_end``)."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def _is_stopping(trainer: pl.Trainer) -> bool:
    """Whether somebody asked to stop and the run is long enough to do so."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def _is_final(trainer: pl.Trainer) -> bool:
    """Whether the present optimizer step is the run's last one, as far as can be known."""
    loop = trainer.fit_loop
    if _is_stopping(trainer) or (trainer.max_steps >= 0 and trainer.global_step >= trainer.max_steps):
        return True
    last_epoch = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
    return last_epoch and loop.epoch_loop._num_ready_batches_reached()


def _refuse_validation_inside_a_window(trainer: pl.Trainer) -> None:
    every, window = trainer.val_check_batch, trainer.accumulate_grad_batches
    if not trainer.enable_validation or not isinstance(every, int) or every == trainer.num_training_batches:
        return
    if every % window:
        raise ValueError(
            f"trainer.val_check_interval: every {every} micro-batches is inside an accumulation window "
            f"(trainer.accumulate_grad_batches is {window}); use a multiple of {window}, such as "
            f"{max(window, every // window * window)}"
        )


def _flush_metrics(trainer: pl.Trainer) -> None:
    """Put the present step's row on disk before the checkpoint: Lightning logs it just after ``on_train_batch_end``.

    A run that is killed between the two would resume behind a row that was never written. MetricsCSV knows the row
    again when Lightning comes with it.
    """
    connector = trainer._logger_connector
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            if trainer.training and connector.should_update_logs:
                metrics = convert_tensors_to_scalars(connector.metrics["log"])
                if metrics and "step" not in metrics:
                    metrics.setdefault("epoch", trainer.current_epoch)
                    logger.log_metrics(metrics, trainer.fit_loop.epoch_loop._batches_that_stepped)
            logger.sync()


def _link(link: str, target: str) -> None:
    """Make ``link`` point to a file beside it, in one step."""
    temporary = f"{link}-partial"
    if os.path.lexists(temporary):
        os.unlink(temporary)
    os.symlink(os.path.basename(target), temporary)
    os.replace(temporary, link)


def _set_aside_name(path: Path) -> Path:
    return path.with_name(f"left-{path.name}")


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
