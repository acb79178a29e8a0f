"""Stops a run before a bad batch spoils its weights, and says which batch it was."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from llm_modules.strategies.gradients import gradient_norm


class UnstableTraining(ValueError):
    """The loss or the gradient is no number, or the loss jumped; the weights are those from before."""


class SpikeGuard(Callback):
    """Looks at loss and gradient before each optimizer step.

    A loss or a gradient that is NaN or infinite stops the run, before it reaches the weights. The error names the step,
    the micro-batch and the dataset's rows in it. A loss far above those of the last steps (its z-score) gives a warning
    or stops the run, too. Under 16-bit floats with loss scaling, infinite gradients are usual and are not looked at.

    Args:
        spike: what to do when the loss jumps.
        threshold: how many standard deviations above the mean of the window is a jump.
        window: how many optimizer steps the mean is taken over; a quarter of it must have passed first.
        monitor: the logged metric that is the loss of an optimizer step.
    """

    def __init__(
        self,
        spike: Literal["warn", "stop", "off"] = "warn",
        threshold: float = 6.0,
        window: int = 100,
        monitor: str = "train/loss",
    ) -> None:
        if spike not in ("warn", "stop", "off"):
            raise ValueError(f"SpikeGuard.spike: {spike!r} is not allowed; warn, stop or off")
        if threshold <= 0:
            raise ValueError(f"SpikeGuard.threshold: {threshold} is not allowed; standard deviations, above 0")
        if window < 4:
            raise ValueError(f"SpikeGuard.window: {window} is not allowed; optimizer steps, 4 or more")
        self.spike = spike
        self.threshold = threshold
        self.monitor = monitor
        self._history: deque[float] = deque(maxlen=window)
        self._losses: list[Tensor] = []
        self._rows: list[list[int]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._losses, self._rows = [], []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._rows.append(list(getattr(batch, "rows", [])))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())  # looked at once a step: each look waits for the device

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return  # DeepSpeed comes here once a micro-batch; the window's loss is logged in its last one
        losses, rows = self._losses, self._rows
        self._losses, self._rows = [], []
        problem = self._not_a_number(trainer, pl_module, torch.stack(losses).float(), optimizer, rows)
        # Every rank stops, or none: the others would wait for this one for ever.
        if trainer.strategy.reduce_boolean_decision(bool(problem), all=False):
            raise UnstableTraining(self._of_any_rank(trainer, problem))
        if self.spike != "off":
            self._look_for_a_jump(trainer, rows)

    def _not_a_number(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        losses: Tensor,
        optimizer: Optimizer,
        rows: list[list[int]],
    ) -> str:
        """What is wrong on this rank, or nothing."""
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        norm = losses.new_zeros(())
        if not scaled:
            norm = gradient_norm(optimizer, getattr(trainer.strategy, "shard_group", None))
            if hasattr(pl_module, "gradient_norm"):
                pl_module.gradient_norm = norm  # the module clips by it and logs it: one pass over the gradients less
        finite = torch.isfinite(torch.cat([losses, norm.to(losses).reshape(1)])).tolist()
        if all(finite):
            return ""
        where = f"step {trainer.global_step}"
        for micro_step, good in enumerate(finite[:-1]):
            if not good:
                value = float(losses[micro_step])
                return f"{where}, micro-batch {micro_step}, {_named(trainer, rows[micro_step])}: the loss is {value}"
        every = [row for micro in rows for row in micro]
        return f"{where}, {_named(trainer, every)}: the norm of the gradient is {float(norm)} (the losses are finite)"

    @staticmethod
    def _of_any_rank(trainer: pl.Trainer, problem: str) -> str:
        """The most telling of all ranks' problems: a loss before a gradient, which all ranks share."""
        problems: list[Any] = [problem]
        if trainer.world_size > 1:
            problems = [None] * trainer.world_size
            torch.distributed.all_gather_object(problems, problem)
        told = [
            (text, f"rank {rank}, " if trainer.world_size > 1 else "") for rank, text in enumerate(problems) if text
        ]
        text, rank = min(told, key=lambda found: "micro-batch" not in found[0])
        return (
            f"{rank}{text}; stopped before the optimizer step. Look at these rows, lower the learning rate or clip the "
            "gradient, and go on with --ckpt_path last"
        )

    def _look_for_a_jump(self, trainer: pl.Trainer, rows: list[list[int]]) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            names = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ValueError(
                f"SpikeGuard.monitor: {self.monitor!r} is not logged by the training step; there is {names}"
            )
        loss, history = float(value), self._history
        assert history.maxlen is not None
        if len(history) >= max(4, history.maxlen // 4):
            mean = statistics.fmean(history)
            # A loss that hardly moves has a tiny deviation, of which anything is a multiple.
            deviation = max(statistics.pstdev(history), 1e-3 * abs(mean), 1e-12)
            score = (loss - mean) / deviation
            if score > self.threshold:
                every = [row for micro in rows for row in micro]
                message = (
                    f"step {trainer.global_step}, {_named(trainer, every)}: {self.monitor} jumped to {loss:.4g}, "
                    f"{score:.1f} standard deviations above its mean of {mean:.4g} over {len(history)} steps"
                )
                if self.spike == "stop":
                    raise UnstableTraining(f"{message}; stopped before the optimizer step (SpikeGuard.spike: stop)")
                rank_zero_warn(message)
        if math.isfinite(loss):
            history.append(loss)

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self._history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history.extend(state_dict["history"])


def _named(trainer: pl.Trainer, rows: list[int], most: int = 16) -> str:
    """The rows of the dataset, as many as fit on a line: file and place where the data know them, else their numbers.

    A number counts the documents of all sources from 0: nobody finds row 9 of a file by it.
    """
    if not rows:
        return "rows unknown"
    rows = list(dict.fromkeys(rows))  # several pieces of a long document
    describe = getattr(getattr(trainer, "datamodule", None), "describe_rows", None)
    shown = ", ".join(str(row) for row in (describe(rows[:most]) if describe else rows[:most]))
    return f"dataset rows {shown}" + (f" and {len(rows) - most} more" if len(rows) > most else "")
