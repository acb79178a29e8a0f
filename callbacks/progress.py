"""How far a run is: a bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import math
import sys
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_REFRESH_SECONDS = 0.5


class RecipeProgress(ProgressBar):
    """Shows step, loss, validation loss, tokens/s, MFU where it is known, and the time that is left.

    In a terminal a bar, refreshed twice a second; elsewhere a line on standard error every ``seconds``, after each
    validation and at the end.

    Args:
        seconds: between two lines where standard error is not a terminal.
        loss: the logged metric that is shown as the loss.
    """

    def __init__(self, seconds: float = 15.0, loss: str = "train/loss") -> None:
        super().__init__()
        if seconds <= 0:
            raise ValueError(f"RecipeProgress.seconds: {seconds} is not allowed; seconds between lines, above 0")
        self.seconds = seconds
        self.loss = loss
        self._enabled = True
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._shown = 0.0
        self._began = 0.0
        self._first: tuple[float, int] | None = None  # when and after which step the run was under way

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print beside the bar."""
        if self._enabled:
            (self._bar.console if self._bar is not None else self._console).print(*args, **kwargs)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not trainer.is_global_zero:
            self.disable()

    # --- training -----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()
        self._first = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._enabled or trainer.fit_loop._should_accumulate():
            return
        now, step, total = time.monotonic(), trainer.global_step, total_steps(trainer)
        if self._first is None:
            self._first = (now, step)
        last = total is not None and step >= total
        if last or now - self._shown >= (_REFRESH_SECONDS if self._bar is not None else self.seconds):
            self._show("train", step, total, self.describe(trainer, now))

    def describe(self, trainer: pl.Trainer, now: float) -> str:
        """The numbers of the present step, which are waited for."""
        metrics, step, total = trainer.callback_metrics, trainer.global_step, total_steps(trainer)
        parts = []
        if self.loss in metrics:
            parts.append(f"loss {float(metrics[self.loss]):.4g}")
        if "val/loss" in metrics:
            parts.append(f"val {float(metrics['val/loss']):.4g}")
        if "throughput/tokens_per_second" in metrics:
            parts.append(f"{float(metrics['throughput/tokens_per_second']):,.0f} tokens/s")
        if "throughput/mfu" in metrics:
            parts.append(f"MFU {float(metrics['throughput/mfu']):.1%}")
        parts.append(f"elapsed {_clock(now - self._began)}")
        if total is not None and self._first is not None and step > self._first[1]:
            # Validations and checkpoints are in it, for they are to come, too; the first step's warming up is not.
            seconds = (now - self._first[0]) / (step - self._first[1])
            parts.append(f"ETA {_clock(seconds * max(total - step, 0))}")
        return "  ".join(parts)

    # --- validation, test, prediction ---------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._begin()

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if not trainer.sanity_checking:
            fitting = trainer.state.fn == "fit"
            loop = trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop
            self._evaluated("validate", trainer.num_val_batches, loop)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._enabled or trainer.sanity_checking:
            return
        self._end_task("validate")
        if trainer.state.fn == "fit":
            self._show("train", trainer.global_step, total_steps(trainer), self.describe(trainer, time.monotonic()))
        else:
            self._finish()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._evaluated("test", trainer.num_test_batches, trainer.test_loop)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()

    def on_predict_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._evaluated("predict", trainer.num_predict_batches, trainer.predict_loop)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish()

    def _evaluated(self, name: str, batches: Any, loop: Any) -> None:
        """One more batch of a loop without optimizer steps."""
        now = time.monotonic()
        if not self._enabled or now - self._shown < (_REFRESH_SECONDS if self._bar is not None else self.seconds):
            return
        total = sum(batches) if isinstance(batches, list) else batches
        self._show(
            name,
            loop.batch_progress.current.ready,
            None if math.isinf(total) else int(total),
            f"elapsed {_clock(now - self._began)}",
        )

    # --- showing ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if not self._enabled or self._bar is not None:
            return
        self._began = self._shown = time.monotonic()
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[place]}"),
                TextColumn("{task.fields[text]}", style="dim"),
            )
            self._bar = Progress(*columns, console=self._console, auto_refresh=False)
            self._bar.start()

    def _show(self, name: str, done: int, total: int | None, text: str) -> None:
        self._shown = time.monotonic()
        place = f"{done:,}/{total:,}" if total is not None else f"{done:,}"
        if self._bar is None:
            share = f" ({done / total:.0%})" if total else ""
            print(f"{name} {place}{share}  {text}", file=sys.stderr, flush=True)
            return
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=total, place=place, text=text)
        self._bar.update(self._tasks[name], completed=done, total=total, place=place, text=text)
        self._bar.refresh()

    def _end_task(self, name: str) -> None:
        if self._bar is not None and name in self._tasks:
            self._bar.remove_task(self._tasks.pop(name))

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._tasks = None, {}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._finish()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._finish()

    def __getstate__(self) -> dict[str, Any]:
        """Launchers that start processes copy the callback; a live bar stays where it is."""
        return {**self.__dict__, "_bar": None, "_tasks": {}}


def total_steps(trainer: pl.Trainer) -> int | None:
    """How many optimizer steps the run will have taken at its end; None where that is not known."""
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    batches = trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and not math.isinf(batches):
        limits.append(trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    return min(limits, default=None)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
