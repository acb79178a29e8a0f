"""Floor 0: learning-rate schedules over the whole run.

A schedule is told the run's length (``total_steps``) by the module, after the Trainer knows it; torch's own schedulers
work too, with the length given by hand.
"""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class RunSchedule(LRScheduler):
    """A factor of the base learning rates as a function of step and run length.

    Args:
        optimizer: whose groups' learning rates are multiplied.
        warmup: linear warm-up from near 0: a share of the run if below 1, else a number of optimizer steps.
        final: learning rate at the end, as a share of the peak.
        total_steps: length of the run in optimizer steps; None: the Trainer's.

    Raises:
        ValueError: a value outside its range, or a warm-up longer than the run.
    """

    def __init__(
        self, optimizer: Optimizer, warmup: float = 0.0, final: float = 0.1, total_steps: int | None = None
    ) -> None:
        if warmup < 0:
            raise ValueError(f"schedule.warmup: {warmup} is negative; allowed: a share below 1, or a number of steps")
        if not 0 <= final <= 1:
            raise ValueError(f"schedule.final: {final} is not in [0, 1] (a share of the peak learning rate)")
        self.warmup, self.final, self.total_steps = warmup, final, total_steps
        super().__init__(optimizer)

    def bind(self, total_steps: int) -> None:
        """Sets the run's length, unless the config gave one, and the rates of the first step."""
        if self.total_steps is None:
            self.total_steps = total_steps
        if self.warmup_steps > self.total_steps:
            raise ValueError(
                f"schedule.warmup: {self.warmup:g} steps are more than the run's {self.total_steps}; "
                "allowed: a share below 1, or at most the run's steps"
            )
        self.set_rates()

    def set_rates(self) -> None:
        """The groups' rates of the present step."""
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def warmup_steps(self) -> int:
        assert self.total_steps is not None
        return round(self.warmup * self.total_steps) if self.warmup < 1 else int(self.warmup)

    def shape(self, progress: float) -> float:
        """The factor after warm-up; ``progress`` goes from 0 to 1."""
        raise NotImplementedError

    def factor(self, step: int) -> float:
        """The factor of optimizer step ``step``, counted from 0; the warm-up's first step is not 0."""
        if self.total_steps is None:
            return 1.0
        warmup = self.warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        return self.shape(min(1.0, (step - warmup) / max(1, self.total_steps - warmup)))

    def get_lr(self) -> list[Any]:
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Only the position: the shape is the config's, so that a resumed run may be made longer."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count, "_last_lr": self._last_lr}


class WarmupCosine(RunSchedule):
    """Half a cosine from the peak to ``final`` (Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5)."""

    def shape(self, progress: float) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


class WarmupLinear(RunSchedule):
    """A straight line from the peak to ``final``."""

    def shape(self, progress: float) -> float:
        return 1 - (1 - self.final) * progress


class WarmupConstant(RunSchedule):
    """The peak to the end; ``final`` is not used."""

    def shape(self, progress: float) -> float:
        return 1.0


class WarmupStableDecay(RunSchedule):
    """Warm-up, stable, decay (WSD; MiniCPM, arXiv 2404.06395, section 4.2), with a linear decay.

    Args:
        optimizer: whose groups' learning rates are multiplied.
        warmup: as in every schedule: a share below 1, or a number of steps.
        final: learning rate at the end, as a share of the peak.
        decay: share of what follows the warm-up in which the rate falls.
        total_steps: length of the run in optimizer steps; None: the Trainer's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: float = 0.01,
        final: float = 0.0,
        decay: float = 0.1,
        total_steps: int | None = None,
    ) -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"schedule.decay: {decay} is not in (0, 1] (a share of the run after warm-up)")
        self.decay = decay
        super().__init__(optimizer, warmup, final, total_steps)

    def shape(self, progress: float) -> float:
        into_decay = max(0.0, (progress - (1 - self.decay)) / self.decay)
        return 1 - (1 - self.final) * into_decay


def run_length(trainer: Any) -> int:
    """A run's optimizer steps. (Lightning's own estimate would lose the loader's place on resume.)

    Raises:
        ValueError: the run has neither ``max_steps`` nor ``max_epochs``.
    """
    steps: int = trainer.max_steps
    epochs = trainer.max_epochs
    if epochs is not None and epochs > 0:
        by_epochs = epochs * trainer.datamodule.steps_per_epoch
        steps = by_epochs if steps < 0 else min(steps, by_epochs)
    if steps < 0:
        raise ValueError(
            "schedule: the run has no length; set trainer.max_steps or trainer.max_epochs, or schedule.total_steps"
        )
    return steps
